//! What the daemon costs, what it executes, and what it leaves.

use std::{io::Read as _, path::Path, process::Command, time::Duration};

use anyhow::{Context as _, Result, ensure};
use dvpn_common::dbus::NAME;
use dvpn_tests::{
    node::{Daemon, wait_until_listed},
    snapshot,
    world::{CONNECT_PATIENCE, World},
};

#[test]
fn after_kill_9_cleanup_leaves_the_machine_as_it_was() -> Result<()> {
    let mut world = World::build(&[8])?;
    let network = &world.network;
    let bpf = network.bpf_directory(&network.client);
    world.pay_and_connect()?;
    let during = snapshot::take(&network.client.namespace, &bpf)?;
    ensure!(
        during != world.client_before,
        "a session changes nothing that this test could see"
    );
    ensure!(during.contains("dvpn0"), "no tunnel interface in:\n{during}");
    world.client.process.kill()?;
    Daemon::run(&network.client, &world.client.environment, &["--cleanup"])?;
    let after = snapshot::take(&network.client.namespace, &bpf)?;
    let left = snapshot::difference(&world.client_before, &after);
    ensure!(left.is_empty(), "--cleanup left or removed:\n{left}");

    // The provider's side as well: its interface, its NAT, its programs.
    let machine = network.providers.first().context("a provider")?;
    let daemon = world.providers.first_mut().context("a provider")?;
    let bpf = network.bpf_directory(machine);
    let during = snapshot::take(&machine.namespace, &bpf)?;
    ensure!(during.contains("dvpnp0"), "no provider interface in:\n{during}");
    daemon.process.kill()?;
    Daemon::run(machine, &daemon.environment, &["--cleanup"])?;
    let after = snapshot::take(&machine.namespace, &bpf)?;
    let left = snapshot::difference(&world.provider_before, &after);
    ensure!(left.is_empty(), "--cleanup left or removed on the provider:\n{left}");
    ensure!(
        !bpf.exists() || std::fs::read_dir(&bpf)?.next().is_none(),
        "programs are still pinned in {}",
        bpf.display()
    );
    Ok(())
}

/// The same command under strace, which writes what is executed to `trace`.
fn traced(trace: &Path) -> impl FnOnce(Command) -> Command {
    let trace = trace.to_owned();
    |daemon: Command| {
        let mut strace = Command::new("strace");
        strace
            .args(["-f", "-qq", "-e", "trace=execve,execveat", "-o"])
            .arg(trace)
            .arg(daemon.get_program())
            .args(daemon.get_args());
        strace.env_clear();
        strace.envs(daemon.get_envs().filter_map(|(name, value)| Some((name, value?))));
        strace
    }
}

/// Fails unless the trace shows the start of the daemon itself and nothing more.
fn ensure_only_itself(trace: &Path) -> Result<()> {
    let seen = executed(trace)?;
    let [only] = seen.as_slice() else {
        anyhow::bail!("{NAME} executed programs:\n{}", seen.join("\n"))
    };
    ensure!(only.contains("dvpn-daemon"), "{only}");
    Ok(())
}

#[test]
fn neither_client_nor_provider_nor_cleanup_executes_a_program() -> Result<()> {
    let mut world = World::build(&[8])?;
    let files = world.network.directory.clone();
    let trace = |name: &str| files.join(format!("strace-{name}"));
    // A program that was executed would be seen: the trace of a shell that runs one shows both.
    let mut shell = Command::new("/bin/sh");
    shell.args(["-c", "/bin/true; exit 0"]);
    let shell = traced(&trace("planted"))(shell)
        .status()
        .context("running strace: install it")?;
    ensure!(
        shell.success() && executed(&trace("planted"))?.len() == 2,
        "strace does not see what a shell executes"
    );

    let provider = world.providers.first_mut().context("a provider")?;
    provider.process.stop(Duration::from_secs(10))?;
    let environment = provider.environment.clone();
    let machine = world.network.providers.first().context("its machine")?;
    *provider = Daemon::spawn_by(&world.network, machine, environment, traced(&trace("provider")))?;
    world.client.process.stop(Duration::from_secs(10))?;
    let environment = world.client.environment.clone();
    world.client = Daemon::spawn_by(
        &world.network,
        &world.network.client,
        environment,
        traced(&trace("client")),
    )?;
    wait_until_listed(&world.network, &world.ca(), 1, Duration::from_secs(30))?;
    world.pay_and_connect()?;
    world.ask().exit_address(Duration::from_secs(5))?;
    world.ask().disconnect(CONNECT_PATIENCE)?;
    world.ask().bus().call("Exit", &[])?;
    world.client.process.wait_exit(Duration::from_secs(10))?;
    let provider = world.providers.first_mut().context("a provider")?;
    provider.client.bus().call("Exit", &[])?;
    provider.process.wait_exit(Duration::from_secs(10))?;
    let machine = world.network.providers.first().context("its machine")?;
    Daemon::run_by(
        machine,
        &provider.environment,
        &["--cleanup"],
        traced(&trace("cleanup")),
    )?;
    for who in ["client", "provider", "cleanup"] {
        ensure_only_itself(&trace(who)).with_context(|| who.to_owned())?;
    }
    Ok(())
}

/// The lines of a trace that are successful calls.
fn executed(trace: &Path) -> Result<Vec<String>> {
    let text = std::fs::read_to_string(trace).with_context(|| format!("reading {}", trace.display()))?;
    Ok(text
        .lines()
        .filter(|line| line.contains("exec") && line.ends_with("= 0"))
        .map(str::to_owned)
        .collect())
}

#[test]
#[cfg_attr(
    debug_assertions,
    ignore = "memory and start are judged in an optimised build: --cargo-profile lab"
)]
fn the_daemon_is_small_before_and_after_a_gigabyte_and_ready_at_once() -> Result<()> {
    let world = World::build(&[8])?;
    ensure!(
        world.client.ready_after <= Duration::from_millis(200),
        "READY=1 after {:?}",
        world.client.ready_after
    );
    let idle = world.client.process.resident_kib()?;
    ensure!(idle <= 25 * 1024, "{idle} KiB before any traffic");
    world.pay_and_connect()?;
    let response = world.ask().fetch("/bytes/1000000000", Duration::from_secs(30))?;
    let received = std::io::copy(&mut response.take(1_000_000_000), &mut std::io::sink())?;
    ensure!(received == 1_000_000_000, "{received} bytes came");
    let loaded = world.client.process.resident_kib()?;
    ensure!(loaded <= 40 * 1024, "{loaded} KiB after a gigabyte");
    Ok(())
}
