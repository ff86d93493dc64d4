//! What a provider's owner allows, kept by real processes: its hours, and the month's volume over crashes.

use std::{
    io,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, ensure};
use dvpn_common::status::StateName;
use dvpn_daemon::host::Host;
use dvpn_tests::{
    hours,
    network::Machine,
    node::{self, Daemon},
    process::wait_for,
    world::{CONNECT_PATIENCE, World},
};

const TIMEOUT: Duration = Duration::from_secs(5);
const PATIENCE: Duration = Duration::from_secs(30);
/// The volume is kept each 20 s, at one of the looks that come every 5 s; the rest is for a busy machine.
const KEPT_WITHIN: Duration = Duration::from_secs(20 + 5 + 10);

/// Replaces the provider's process; what it is told beyond the usual is `change`'s.
fn begin_anew(world: &mut World, change: impl FnOnce(node::Environment) -> node::Environment) -> Result<()> {
    drop(world.providers.remove(0));
    let machine = world.network.providers.first().context("a provider")?;
    let environment = change(node::provider_environment(machine, &world.ca()));
    let daemon = Daemon::spawn(&world.network, machine, environment)?;
    world.providers.insert(0, daemon);
    Ok(())
}

#[test]
fn the_pool_hands_a_node_out_in_its_hours_only_and_who_is_there_stays_for_a_while() -> Result<()> {
    let mut world = World::build(&[8])?;
    let provider = world.providers.first_mut().context("a provider")?;
    provider.process.stop(PATIENCE)?;
    let (network, ca) = (&world.network, world.ca());
    wait_for("an empty list", PATIENCE, || {
        Ok((node::listed(network, &ca)? == 0).then_some(()))
    })?;
    let hours = hours::soon_over(Duration::from_secs(40));
    begin_anew(&mut world, |environment| {
        environment.with("NODE_SCHEDULE", &hours.schedule)
    })?;
    node::wait_until_listed(&world.network, &ca, 1, PATIENCE)?;
    let before = world.pay_and_connect()?;
    ensure!(
        SystemTime::now() < hours.closes,
        "this machine is too slow for this test"
    );

    wait_for("an empty list", hours::until(hours.closes) + PATIENCE, || {
        Ok((node::listed(&world.network, &ca)? == 0).then_some(()))
    })?;
    ensure!(SystemTime::now() >= hours.closes, "not before its time");
    let exit = world.ask().exit_address(TIMEOUT)?;
    ensure!(exit == world.address_of(&before)?, "whoever is there has five minutes");

    let patience = hours::until(hours.opens) + PATIENCE;
    node::wait_until_listed(&world.network, &ca, 1, patience)?;
    ensure!(SystemTime::now() >= hours.opens, "not before its time");
    let (_, after) = world.ask().health()?;
    ensure!(
        after.state == StateName::Connected && after.attempts == before.attempts,
        "{after:?}"
    );
    world.ask().disconnect(CONNECT_PATIENCE)?;
    world.ask().connect(CONNECT_PATIENCE)?;
    Ok(())
}

/// What the kernel counts for clients, since the provider's table was made.
fn carried(machine: &Machine) -> Result<u64> {
    let read = || -> Result<u64> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let all = runtime.block_on(async { Host::open()?.provider_carried() })?;
        Ok(all
            .values()
            .map(|carried| carried.sent.bytes + carried.received.bytes)
            .sum())
    };
    machine.namespace.run(read)?
}

/// What the node has on its disk.
fn kept(machine: &Machine) -> Result<u64> {
    match std::fs::read_to_string(machine.directory.join("state/node-usage")) {
        Ok(text) => {
            let (_month, bytes) = text.trim().split_once(' ').context("month and bytes")?;
            Ok(bytes.parse()?)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
        Err(error) => Err(error.into()),
    }
}

/// What it shows, once it shows something.
fn shown(daemon: &Daemon) -> Result<u64> {
    wait_for("the month's volume", PATIENCE, || {
        let Ok((_, page)) = daemon.client.control("/metrics") else {
            return Ok(None);
        };
        // Of a node that has begun: before, there is nothing to show.
        let value = |what: &str| {
            let name = format!("dvpn_provider{{what=\"{what}\"}} ");
            page.lines()
                .find_map(|line| line.strip_prefix(&name)?.parse::<f64>().ok())
        };
        let open = value("open").is_some_and(|open| open > 0.0);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a count of some megabytes"
        )]
        Ok(value("month_bytes").filter(|_| open).map(|bytes| bytes as u64))
    })
}

fn download(world: &World, bytes: usize) -> Result<()> {
    let mut page = world.ask().fetch(&format!("/bytes/{bytes}"), PATIENCE)?;
    let got = io::copy(&mut page, &mut io::sink())?;
    ensure!(got == bytes as u64, "{got} of {bytes} bytes");
    Ok(())
}

#[test]
fn a_months_volume_survives_kill_9_but_for_the_last_seconds_and_nothing_counts_twice() -> Result<()> {
    let mut world = World::build(&[8])?;
    world.pay_and_connect()?;
    // The month so far, at the least and at the most.
    let (mut least, mut most) = (0, 0);
    for round in 0..3 {
        let machine = world.network.providers.first().context("a provider")?;
        let before = carried(machine)?;
        download(&world, 2_000_000)?;
        let after = carried(machine)?;
        ensure!(after >= before + 2_000_000, "{after} after {before}");
        wait_for("the volume on the disk", KEPT_WITHIN, || {
            Ok((kept(machine)? >= least + after).then_some(()))
        })?;
        // These have no time to be kept, or just so.
        download(&world, 1_000_000)?;
        let daemon = world.providers.first_mut().context("a provider")?;
        daemon.process.kill()?;
        // With the process its interface is gone: the table stands, and counts no more.
        let all = carried(machine)?;
        let on_disk = kept(machine)?;
        ensure!(
            on_disk >= least + after && on_disk <= most + all,
            "round {round}: {on_disk} kept, at least {least} and at most {most} before, then {after} of {all}"
        );
        (least, most) = (on_disk, on_disk);

        begin_anew(&mut world, |environment| environment)?;
        let daemon = world.providers.first().context("a provider")?;
        let machine = world.network.providers.first().context("a provider")?;
        let month = shown(daemon)?;
        let since = carried(machine)?;
        ensure!(
            month >= least && month <= most + since,
            "round {round}: {month} after {least} were kept and at most {since} were carried since"
        );
        world.ask().wait_state(StateName::Connected, Duration::from_mins(1))?;
        wait_for("the exit", PATIENCE, || Ok(world.ask().exit_address(TIMEOUT).ok()))?;
    }
    Ok(())
}
