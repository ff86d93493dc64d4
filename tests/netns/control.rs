//! The D-Bus interface as its users meet it: who is served, what is shown, what is broadcast.

use std::{
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use dvpn_common::{
    dbus::{NAME, PATH},
    status::{StateName, Status},
};
use dvpn_tests::{
    process::{Process, Surroundings, wait_for},
    world::{CONNECT_PATIENCE, World},
};
use nix::sys::signal::Signal;
use serde_json::Value;

/// The reply of a method with one value.
fn first(reply: &Value) -> Result<&Value> {
    reply
        .pointer("/data/0")
        .with_context(|| format!("a reply without a value: {reply}"))
}

fn status(world: &World) -> Result<Status> {
    let reply = world.ask().bus().call("Status", &[])?;
    let text = first(&reply)?.as_str().context("Status is a text")?;
    serde_json::from_str(text).context("reading Status")
}

fn logs(world: &World, lines: u32) -> Result<Vec<String>> {
    let reply = world.ask().bus().call("Logs", &["u", &lines.to_string()])?;
    let lines = first(&reply)?.as_array().context("Logs is an array")?;
    Ok(lines
        .iter()
        .filter_map(|line| line.as_str().map(str::to_owned))
        .collect())
}

#[test]
fn status_properties_and_log_tell_what_happens_and_nothing_private() -> Result<()> {
    let passphrase = "correct-horse-planted-secret";
    let world = World::build_with(
        &dvpn_tests::network::NetworkConfig::with_round_trips(&dvpn_tests::world::unique_id(), &[8, 10]),
        |environment| environment.with("TOKEN_PASSPHRASE", passphrase),
    )?;
    let bus = world.ask().bus();
    ensure!(bus.property("State")? == "disconnected", "{:?}", bus.property("State"));
    ensure!(bus.property("Autostart")? == false, "a wish that nobody had");
    ensure!(
        bus.property("Version")?
            .as_str()
            .is_some_and(|version| !version.is_empty()),
        "no version"
    );
    let since = bus.property("Since")?.as_i64().context("Since is a number")?;
    ensure!(since > 1_700_000_000, "since {since}");

    let (before, during) = (status(&world)?, world.pay_and_connect()?);
    ensure!(before.state == StateName::Disconnected, "{before:?}");
    ensure!(during.state == StateName::Connected, "{during:?}");
    let shown = status(&world)?;
    ensure!(
        shown.provider.as_ref().map(|provider| &provider.id) == during.provider.as_ref().map(|provider| &provider.id),
        "{shown:?}"
    );
    ensure!(bus.property("State")? == "connected", "{:?}", bus.property("State"));
    ensure!(bus.property("Autostart")? == true, "Start stores the wish");

    let all = logs(&world, 1000)?;
    ensure!(all.len() > 5, "only {} lines: {all:?}", all.len());
    ensure!(logs(&world, 2)?.len() == 2, "Logs 2 gives two lines");
    ensure!(logs(&world, 0)?.is_empty(), "Logs 0 gives none");
    for line in all.iter().chain([&serde_json::to_string(&shown)?]) {
        ensure!(
            !line.contains(passphrase) && !line.contains("dev_"),
            "a secret is shown: {line}"
        );
    }
    Ok(())
}

#[test]
fn a_choice_limits_the_session_and_lifting_it_restores_the_fastest() -> Result<()> {
    let world = World::build(&[8, 20])?;
    let id = |status: &Status| status.provider.as_ref().map(|provider| provider.id.to_string());
    let bus = world.ask().bus();
    let nearest = world.pay_and_connect()?;
    ensure!(id(&nearest).as_deref() == Some("provider-a"), "{nearest:?}");
    world.ask().disconnect(CONNECT_PATIENCE)?;

    bus.call("Choose", &["asas", "1", "provider-b", "0"])?;
    let chosen = world.ask().connect(CONNECT_PATIENCE)?;
    ensure!(id(&chosen).as_deref() == Some("provider-b"), "{chosen:?}");
    world.ask().disconnect(CONNECT_PATIENCE)?;

    bus.call("Choose", &["asas", "0", "1", "provider-b"])?;
    let rest = world.ask().connect(CONNECT_PATIENCE)?;
    ensure!(id(&rest).as_deref() == Some("provider-a"), "{rest:?}");
    world.ask().disconnect(CONNECT_PATIENCE)?;

    let bad = bus.call("Choose", &["asas", "1", "not an id!", "0"]);
    ensure!(
        bad.as_ref()
            .is_err_and(|error| format!("{error:#}").contains("not an id!")),
        "{bad:?}"
    );
    bus.call("Choose", &["asas", "1", "no-such-provider", "0"])?;
    world.ask().start()?;
    let none = world
        .ask()
        .wait_status("a problem", CONNECT_PATIENCE, |status| status.problem.is_some())?;
    ensure!(none.provider.is_none(), "{none:?}");
    bus.call("Choose", &["asas", "0", "0"])?;
    let lifted = world.ask().wait_state(StateName::Connected, CONNECT_PATIENCE)?;
    ensure!(id(&lifted).is_some(), "{lifted:?}");
    Ok(())
}

#[test]
fn another_user_is_refused_every_method_and_changes_nothing() -> Result<()> {
    const NOBODY: u32 = 65_534;
    let world = World::build(&[8])?;
    world.pay()?;
    let bus = world.ask().bus();
    let calls: [&[&str]; 9] = [
        &["Start"],
        &["Stop"],
        &["Status"],
        &["Payments"],
        &["Exit"],
        &["Logs", "u", "10"],
        &["Choose", "asas", "0", "0"],
        &["Portal", "u", "65534"],
        &["LeakTest"],
    ];
    for call in calls {
        let (method, arguments) = call.split_first().context("a method")?;
        let refused = bus.call_as(NOBODY, method, arguments);
        let text = refused
            .as_ref()
            .map_or_else(|error| format!("{error:#}"), ToString::to_string);
        ensure!(
            refused.is_err() && text.to_lowercase().contains("denied"),
            "{method} by another user: {text}"
        );
    }
    ensure!(
        world.ask().health()?.1.state == StateName::Disconnected,
        "a stranger started it"
    );
    // What is broadcast to everybody may be read by everybody.
    ensure!(
        bus.property_as(NOBODY, "State")? == "disconnected",
        "{:?}",
        bus.property("State")
    );
    // The interface cannot be taken over, nor its properties written.
    ensure!(bus.property_as(NOBODY, "Token").is_err(), "there is no such property");
    let log = world.client.process.log_text();
    ensure!(
        log.contains("65534"),
        "denials are not audited:\n{}",
        world.client.process.log_tail()
    );
    Ok(())
}

#[test]
fn every_change_of_state_is_announced_once_and_in_order() -> Result<()> {
    let world = World::build(&[8])?;
    let bus = world.ask().bus();
    let log = world.network.client.directory.join("monitor.log");
    let mut command = Command::new("busctl");
    command.arg(format!("--address={}", bus.as_str())).args([
        "--json=short",
        "monitor",
        "--match",
        &format!("type='signal',path='{PATH}',interface='org.freedesktop.DBus.Properties'"),
    ]);
    let surroundings = Surroundings {
        namespace: &world.network.client.namespace,
        log: &log,
        resolv_conf: None,
    };
    let monitor = Process::spawn("busctl monitor", command, &surroundings)?;
    wait_for("the monitor", Duration::from_secs(10), || {
        Ok(monitor.log_text().contains("Monitoring").then_some(()))
    })?;
    world.pay_and_connect()?;
    world.ask().disconnect(CONNECT_PATIENCE)?;
    let announced = || -> Vec<String> {
        let text = monitor.log_text();
        let messages = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        messages
            .filter(|message| message.pointer("/payload/data/0").and_then(Value::as_str) == Some(NAME))
            .filter_map(|message| Some(message.pointer("/payload/data/1/State/data")?.as_str()?.to_owned()))
            .collect()
    };
    let states = wait_for("the last announcement", Duration::from_secs(10), || {
        let states = announced();
        Ok((states.last().is_some_and(|last| last == "disconnected")).then_some(states))
    })?;
    ensure!(states.iter().any(|state| state == "connected"), "{states:?}");
    ensure!(
        states.windows(2).all(|pair| matches!(pair, [a, b] if a != b)),
        "announced twice: {states:?}"
    );
    Ok(())
}

/// When the service manager was told that the daemon lives, within a time.
fn signs_of_life(world: &World, within: Duration) -> Vec<Instant> {
    let (end, mut seen, mut buffer) = (Instant::now() + within, Vec::new(), [0; 256]);
    while Instant::now() < end {
        if let Ok(length) = world.client.notifications.recv(&mut buffer)
            && buffer.get(..length) == Some(b"WATCHDOG=1")
        {
            seen.push(Instant::now());
        }
    }
    seen
}

#[test]
fn the_service_managers_watchdog_is_fed_while_the_daemon_lives_and_only_then() -> Result<()> {
    let limit = Duration::from_secs(2);
    let world = World::build_with(
        &dvpn_tests::network::NetworkConfig::with_round_trips(&dvpn_tests::world::unique_id(), &[8]),
        |environment| environment.with("WATCHDOG_USEC", limit.as_micros().to_string()),
    )?;
    for connected in [false, true] {
        if connected {
            world.pay_and_connect()?;
        }
        let seen = signs_of_life(&world, Duration::from_secs(5));
        ensure!(seen.len() >= 4, "{} signs of life in 5 s", seen.len());
        let longest = seen.iter().zip(seen.iter().skip(1)).map(|(a, b)| *b - *a).max();
        ensure!(longest < Some(limit), "{longest:?} without one");
    }
    world.client.process.signal(Signal::SIGSTOP)?;
    signs_of_life(&world, Duration::from_millis(500));
    let seen = signs_of_life(&world, limit);
    world.client.process.signal(Signal::SIGCONT)?;
    ensure!(seen.is_empty(), "{} signs of life of a stopped process", seen.len());
    ensure!(!signs_of_life(&world, limit).is_empty(), "none after it went on");
    Ok(())
}
