//! The leak test on demand, on a machine where nothing leaks, and on others where something does: a test that cannot fail
//! shows nothing.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use dvpn_common::status::StateName;
use dvpn_tests::{
    leak::UPLINK,
    network::NetworkConfig,
    world::{CONNECT_PATIENCE, World, unique_id},
};

/// A test is promised to be over by then; the rest is for a bus and a machine that are busy.
const OVER_AFTER: Duration = Duration::from_secs(5);
const PATIENCE: Duration = Duration::from_secs(30);

fn build(settings: &[(&str, &str)]) -> Result<World> {
    let network = NetworkConfig::with_round_trips(&unique_id(), &[8]);
    World::build_with(&network, |environment| {
        settings
            .iter()
            .fold(environment, |environment, (name, value)| environment.with(name, *value))
    })
}

/// Each row's verdict and reason.
type Rows = BTreeMap<String, (String, String)>;

fn leak_test(world: &World) -> Result<Rows> {
    let begun = Instant::now();
    let reply = world.ask().bus().call("LeakTest", &[])?;
    let took = begun.elapsed();
    ensure!(took < OVER_AFTER, "a leak test took {took:?}");
    let rows = reply.pointer("/data/0").and_then(serde_json::Value::as_array);
    let rows = rows.with_context(|| reply.to_string())?;
    let text = |row: &serde_json::Value, at: usize| -> Result<String> {
        let text = row.get(at).and_then(serde_json::Value::as_str);
        text.map(str::to_owned).with_context(|| row.to_string())
    };
    rows.iter()
        .map(|row| Ok((text(row, 0)?, (text(row, 1)?, text(row, 2)?))))
        .collect()
}

fn all_are(rows: &Rows, verdict: &str) -> Result<()> {
    ensure!(
        rows.values().all(|(found, _)| found == verdict),
        "not all are {verdict}: {rows:#?}"
    );
    Ok(())
}

fn is(rows: &Rows, name: &str, verdict: &str) -> Result<()> {
    let found = rows.get(name).with_context(|| format!("no row {name}: {rows:#?}"))?;
    ensure!(found.0 == verdict, "{name} is not {verdict}: {rows:#?}");
    Ok(())
}

/// What every test in device mode looks at.
const ALWAYS: [&str; 8] = [
    "firewall",
    "capture",
    "route_ipv4",
    "route_ipv6",
    "ipv4",
    "ipv6",
    "name_server",
    "public_name_server",
];

#[test]
fn where_nothing_leaks_every_row_is_good_connected_and_blocked() -> Result<()> {
    let mut world = build(&[("TUNNEL_MODE", "device")])?;
    // Packets of IPv6 have somewhere to go, too.
    world.ask().namespace().ip(&format!(
        "addr add 2001:db8::20/64 dev {UPLINK} nodad\nroute add default via 2001:db8::ff dev {UPLINK}\n\
         neigh replace 2001:db8::ff lladdr 02:00:00:00:00:ff dev {UPLINK}"
    ))?;
    world.pay_and_connect()?;
    let rows = leak_test(&world)?;
    all_are(&rows, "good")?;
    for name in ALWAYS
        .into_iter()
        .chain(["tunnel", "tunnel_address", "provider", "settings"])
    {
        ensure!(rows.contains_key(name), "no row {name}: {rows:#?}");
    }
    // Not for everybody, and one at a time.
    ensure!(
        world.ask().bus().call_as(65534, "LeakTest", &[]).is_err(),
        "anybody may test"
    );
    let (one, other) = std::thread::scope(|scope| {
        let test = || scope.spawn(|| leak_test(&world));
        let (one, other) = (test(), test());
        (one.join(), other.join())
    });
    let refused = [one, other]
        .into_iter()
        .filter_map(Result::ok)
        .filter_map(Result::err)
        .map(|error| format!("{error:#}"))
        .collect::<Vec<_>>();
    ensure!(
        refused.len() == 1 && refused.concat().contains("is running"),
        "{refused:?}"
    );

    // A rule of somebody else's leads packets out, and the second barrier holds.
    let namespace = world.ask().namespace();
    namespace.output(
        "sh",
        &[
            "-euc",
            "ip rule add pref 7 lookup main; ip -6 rule add pref 7 lookup main",
        ],
    )?;
    let rows = leak_test(&world)?;
    is(&rows, "route_ipv4", "leak")?;
    is(&rows, "route_ipv6", "leak")?;
    for name in [
        "firewall",
        "capture",
        "ipv4",
        "ipv6",
        "name_server",
        "public_name_server",
        "provider",
    ] {
        is(&rows, name, "good")?;
    }
    namespace.output("sh", &["-euc", "ip rule del pref 7; ip -6 rule del pref 7"])?;

    for provider in &mut world.providers {
        provider.process.kill()?;
    }
    world.ask().wait_status("another state", PATIENCE, |status| {
        !matches!(status.state, StateName::Connected | StateName::Degraded)
    })?;
    let rows = leak_test(&world)?;
    all_are(&rows, "good").with_context(|| world.client.process.log_tail())?;
    for name in ALWAYS {
        ensure!(rows.contains_key(name), "no row {name}: {rows:#?}");
    }
    ensure!(
        world.client.process.log_text().contains("leak_tested"),
        "no record of it"
    );
    Ok(())
}

#[test]
fn what_leaks_is_said_row_by_row() -> Result<()> {
    let world = build(&[("TUNNEL_MODE", "device"), ("KILL_SWITCH", "false")])?;
    // No session: everything goes its usual way.
    let rows = leak_test(&world)?;
    is(&rows, "capture", "good")?;
    for name in ["firewall", "route_ipv4", "ipv4", "name_server", "public_name_server"] {
        is(&rows, name, "leak")?;
    }
    // Packets of IPv6 have nowhere to go on this machine.
    is(&rows, "ipv6", "good")?;
    world.pay_and_connect()?;
    let rows = leak_test(&world)?;
    is(&rows, "firewall", "leak")?;
    for name in ["capture", "route_ipv4", "ipv4", "tunnel", "tunnel_address"] {
        is(&rows, name, "good")?;
    }
    // With one barrier, one rule of somebody else's is a leak.
    let namespace = world.ask().namespace();
    namespace.output("sh", &["-euc", "ip rule add pref 7 lookup main"])?;
    let rows = leak_test(&world)?;
    for name in ["route_ipv4", "ipv4", "name_server"] {
        is(&rows, name, "leak")?;
    }
    is(&rows, "ipv6", "good")?;
    namespace.output("sh", &["-euc", "ip rule del pref 7"])?;
    is(&leak_test(&world)?, "ipv4", "good")?;
    // The session is over.
    world.ask().disconnect(CONNECT_PATIENCE)?;
    let rows = leak_test(&world)?;
    for name in ["firewall", "route_ipv4", "ipv4", "name_server"] {
        is(&rows, name, "leak")?;
    }
    Ok(())
}

#[test]
fn a_test_that_cannot_see_says_so() -> Result<()> {
    let world = build(&[("TUNNEL_MODE", "device")])?;
    world.pay_and_connect()?;
    // What is planted cannot leave; neither can anything else.
    world.ask().namespace().ip(&format!("link set {UPLINK} down"))?;
    let rows = leak_test(&world)?;
    is(&rows, "capture", "unknown")?;
    for (name, (verdict, detail)) in &rows {
        ensure!(
            verdict != "good" || !detail.contains("seen to leave"),
            "{name}: {detail}"
        );
    }
    Ok(())
}

#[test]
fn app_mode_is_tested_for_what_it_promises() -> Result<()> {
    let world = build(&[])?;
    let rows = leak_test(&world)?;
    is(&rows, "firewall", "not_promised")?;
    ensure!(!rows.contains_key("ipv4"), "{rows:#?}");
    world.pay()?;
    world.ask().connect(CONNECT_PATIENCE)?;
    let rows = leak_test(&world)?;
    for name in ["capture", "tunnel", "tunnel_address"] {
        is(&rows, name, "good")?;
    }
    is(&rows, "firewall", "not_promised")
}
