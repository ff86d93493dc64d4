//! A provider that dies is replaced; a path that is merely bad is not.

use std::{
    io::Read as _,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use dvpn_common::status::{StateName, Status};
use dvpn_tests::{
    network::NetworkConfig,
    wire::Path,
    world::{World, unique_id},
};

/// From the death of a provider until traffic flows through another.
const FAILOVER: Duration = Duration::from_secs(13);

/// Waits until another provider carries traffic; how long that took since `from`.
fn wait_for_another(world: &World, old: &Status, from: Instant) -> Result<(Status, Duration)> {
    let id = |status: &Status| status.provider.as_ref().map(|provider| provider.id.clone());
    let left = FAILOVER.saturating_sub(from.elapsed());
    let status = world
        .ask()
        .wait_status("another provider", left, |now| {
            now.state == StateName::Connected && id(now) != id(old)
        })
        .with_context(|| format!("the client's log ends:\n{}", world.client.process.log_tail()))?;
    let (code, _) = world.ask().health()?;
    ensure!(code == 200, "/health is {code} with another provider");
    let exit = world.ask().exit_address(left)?;
    ensure!(
        exit == world.address_of(&status)?,
        "the exit is {exit}, the status says {:?}",
        status.provider
    );
    Ok((status, from.elapsed()))
}

#[test]
fn a_provider_that_dies_in_the_middle_of_a_download_is_replaced_within_13_seconds() -> Result<()> {
    let mut world = World::build(&[8, 10, 13])?;
    let first = world.pay_and_connect()?;
    let mut download = world.ask().fetch("/bytes/20000000000", Duration::from_secs(5))?;
    let mut buffer = vec![0; 1 << 16];
    let mut received = 0;
    while received < 5_000_000 {
        received += download.read(&mut buffer)?;
    }
    // Killed: its socket is closed, and its machine says so by ICMP.
    let number = world.provider_number(first.provider.as_ref().context("a provider")?.id.as_str())?;
    world.providers.get_mut(number).context("its process")?.process.kill()?;
    let (second, took) = wait_for_another(&world, &first, Instant::now())?;
    ensure!(took <= FAILOVER, "{took:?} after the death of a provider");

    // Silent: its cable is cut, and nobody says anything.
    let cut = world.provider_machine(second.provider.as_ref().context("a provider")?.id.as_str())?;
    cut.wire.set_outage(true);
    let (third, took) = wait_for_another(&world, &second, Instant::now())?;
    ensure!(took <= FAILOVER, "{took:?} after a cut");
    ensure!(third.switches >= 2, "two switches are counted: {}", third.switches);
    Ok(())
}

/// A minute by default, ten with `DVPN_CI_LONG`, thirty with `DVPN_SOAK`.
fn endurance() -> Duration {
    let is_set = |name| std::env::var_os(name).is_some();
    match (is_set("DVPN_SOAK"), is_set("DVPN_CI_LONG")) {
        (true, _) => Duration::from_mins(30),
        (false, true) => Duration::from_mins(10),
        (false, false) => Duration::from_mins(1),
    }
}

#[test]
fn two_per_cent_of_loss_and_outages_of_three_seconds_cause_no_switch() -> Result<()> {
    let mut config = NetworkConfig::with_round_trips(&unique_id(), &[8, 10, 13]);
    for path in &mut config.providers {
        *path = Path { loss: 0.02, ..*path };
    }
    let world = World::build_with(&config, |environment| environment)?;
    let before = world.pay_and_connect()?;
    let used = world.provider_machine(before.provider.as_ref().context("a provider")?.id.as_str())?;
    let end = Instant::now() + endurance();
    let mut fetched = 0_u32;
    while Instant::now() < end {
        used.wire.set_outage(true);
        let back = Instant::now() + Duration::from_secs(3);
        // Somebody goes on asking, as applications do.
        while Instant::now() < back {
            drop(
                world.ask().exit_address(
                    back.saturating_duration_since(Instant::now())
                        .max(Duration::from_millis(1)),
                ),
            );
        }
        used.wire.set_outage(false);
        let calm = Instant::now() + Duration::from_secs(12);
        while Instant::now() < calm {
            let exit = world.ask().exit_address(Duration::from_secs(10))?;
            ensure!(exit == used.address, "traffic left through {exit}");
            fetched += 1;
        }
    }
    let after = world.ask().health()?.1;
    ensure!(
        after.switches == 0 && after.attempts == before.attempts,
        "{} switches, {after:?}",
        after.switches
    );
    ensure!(fetched > 10, "only {fetched} answers");
    Ok(())
}
