//! Measures what a person waits for: the start of the daemon, and Start until the first byte through the proxy.
//!
//! Prints a table and then `figure NAME VALUE` lines for `scripts/bench/start.sh`. The network is that of
//! `one-click.sh`: providers at 8, 10 and 13 ms.

use std::{
    fmt::Write as _,
    io::Write as IoWrite,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use dvpn_tests::{
    node::Daemon,
    world::{CONNECT_PATIENCE, World},
};

const ROUNDS: usize = 15;

fn main() -> ExitCode {
    match measure().and_then(|text| {
        std::io::stdout()
            .write_all(text.as_bytes())
            .context("writing the figures")
    }) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            drop(IoWrite::write_fmt(
                &mut std::io::stderr(),
                format_args!("bench-start: {error:#}\n"),
            ));
            ExitCode::FAILURE
        }
    }
}

fn measure() -> Result<String> {
    let mut world = World::build(&[8, 10, 13])?;
    let idle = world.client.process.resident_kib()?;
    world.pay()?;
    let (mut first_byte, mut resident) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        first_byte.push(start_to_first_byte(&world)?);
        world.ask().disconnect(CONNECT_PATIENCE)?;
        resident.push(world.client.process.resident_kib()?);
    }
    let mut ready = vec![world.client.ready_after];
    for _ in 1..ROUNDS {
        world.client.process.stop(Duration::from_secs(10))?;
        let environment = world.client.environment.clone();
        let next = Daemon::spawn(&world.network, &world.network.client, environment)?;
        ready.push(next.ready_after);
        world.client = next;
    }
    let rows = [
        ("first-byte-ms", millis(&mut first_byte)),
        ("ready-ms", millis(&mut ready)),
    ];
    let mut text = format!("{:<16} {:>8} {:>8} {:>8}\n", "figure", "least", "median", "most");
    for (name, [least, median, most]) in &rows {
        writeln!(text, "{name:<16} {least:>8.1} {median:>8.1} {most:>8.1}")?;
    }
    resident.sort_unstable();
    let kib = resident.last().copied().unwrap_or_default();
    writeln!(
        text,
        "memory: {idle} KiB before the first session, {kib} KiB at most after {ROUNDS}"
    )?;
    for (name, [_, median, _]) in rows {
        writeln!(text, "figure {name} {median:.1}")?;
    }
    writeln!(text, "figure idle-kib {idle}\nfigure sessions-kib {kib}")?;
    Ok(text)
}

/// D-Bus Start until the web server's answer begins to arrive through the proxy, which is asked without a pause.
fn start_to_first_byte(world: &World) -> Result<Duration> {
    let started = Instant::now();
    world.ask().start()?;
    while started.elapsed() < CONNECT_PATIENCE {
        if world.ask().exit_address(Duration::from_secs(2)).is_ok() {
            return Ok(started.elapsed());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    bail!(
        "no byte came through the proxy; the log ends:\n{}",
        world.client.process.log_tail()
    )
}

/// Least, median and most.
fn millis(times: &mut [Duration]) -> [f64; 3] {
    times.sort_unstable();
    let at = |index: usize| times.get(index).map_or(0.0, |time| time.as_secs_f64() * 1e3);
    [at(0), at(times.len() / 2), at(times.len().saturating_sub(1))]
}
