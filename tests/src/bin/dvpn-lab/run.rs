//! The process that holds the network: everything it made goes when it ends.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use dvpn_tests::{
    certs::Identity,
    namespace::names,
    network::{Machine, Network, NetworkConfig, PREFIX, ROOT},
    node::{self, Daemon, Environment},
    process::{self, Process},
    sweep,
};
use nix::{
    errno::Errno,
    sys::signal::{Signal, kill},
    unistd::{Pid, setsid},
};

use super::{Files, ID, say};

/// The line after which everything stands.
pub(super) const READY: &str = "the network stands";
/// Settings that `.env` may give the client of the local network. Its pool and payment server are the local ones.
pub(super) const CLIENT_SETTINGS: [&str; 6] = [
    "USER_ID",
    "TOKEN_PASSPHRASE",
    "MESH_SAMPLE_SIZE",
    "PROVIDERS_ONLY",
    "PROVIDERS_EXCLUDE",
    "DVPN_LOG",
];

/// Where the holder writes its progress.
pub(super) fn log_path() -> PathBuf {
    Path::new(ROOT).join(format!("{}.log", *ID))
}

/// Where its process id stands.
pub(super) fn pid_path() -> PathBuf {
    Path::new(ROOT).join(format!("{}.pid", *ID))
}

fn absolute(path: &Path) -> Result<PathBuf> {
    std::fs::canonicalize(path).with_context(|| format!("finding {}", path.display()))
}

/// The process that a file names, while it runs.
pub(super) fn running(pid_file: &Path) -> Option<u32> {
    let text = std::fs::read_to_string(pid_file).ok()?;
    let pid = text.trim().parse().ok()?;
    process::runs(pid).then_some(pid)
}

/// Builds the network and holds it until told to end.
pub(super) fn run(files: &Files) -> Result<()> {
    // Away from the terminal, so that closing it or Ctrl-C there does not end the network. Fails for a group leader,
    // which is somebody who runs this by hand and wants it in the foreground.
    if setsid().is_err() {
        say("running in the foreground");
    }
    let ca = absolute(&files.ca)?;
    let identity = Identity {
        certificate: absolute(&files.certificate)?,
        key: absolute(&files.key)?,
    };
    say("making the namespaces and wires");
    let network = Network::build(&NetworkConfig::with_round_trips(&ID, &files.round_trips))?;
    write_pid(&pid_path(), std::process::id())?;
    say("starting the web server that only providers reach");
    let web = node::spawn_web(&network)?;
    write_pid(&network.directory.join("web.pid"), web.id())?;
    say("starting the pool");
    let pool = node::spawn_pool(&network, &identity)?;
    write_machine_pid(&network.pool, &pool)?;
    let mut providers = Vec::new();
    for machine in &network.providers {
        say(&format!("starting {} at {}", machine.name, machine.address));
        let daemon = Daemon::spawn(&network, machine, node::provider_environment(machine, &ca))?;
        write_machine_pid(machine, &daemon.process)?;
        providers.push(daemon);
    }
    say("waiting until the pool lists the providers");
    node::wait_until_listed(&network, &ca, network.providers.len(), Duration::from_secs(30))?;
    say("starting the client");
    let client = Daemon::spawn(&network, &network.client, client_environment(files)?)?;
    write_machine_pid(&network.client, &client.process)?;
    say(&format!(
        "the client was ready after {} ms",
        client.ready_after.as_millis()
    ));
    say(READY);
    wait_for_end()?;
    say("taking the network down");
    drop((client, providers, pool, web));
    Ok(())
}

/// What the client is told: the local network's own, and what `.env` says of
/// [`CLIENT_SETTINGS`].
pub(super) fn client_environment(files: &Files) -> Result<Environment> {
    let mode = if files.device { "device" } else { "app" };
    let mut environment = node::client_environment(&absolute(&files.ca)?).with("TUNNEL_MODE", mode);
    let text = match std::fs::read_to_string(&files.env) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(error).with_context(|| format!("reading {}", files.env.display())),
    };
    for line in text.lines().map(str::trim).filter(|line| !line.starts_with('#')) {
        let Some((name, value)) = line.split_once('=') else {
            continue;
        };
        if CLIENT_SETTINGS.contains(&name) && !value.is_empty() {
            environment = environment.with(name, value);
        }
    }
    Ok(environment)
}

fn write_machine_pid(machine: &Machine, process: &Process) -> Result<()> {
    write_pid(&machine.directory.join("pid"), process.id())
}

fn write_pid(path: &Path, pid: u32) -> Result<()> {
    std::fs::write(path, format!("{pid}\n")).with_context(|| format!("writing {}", path.display()))
}

/// Waits for SIGTERM or SIGINT.
pub(super) fn wait_for_end() -> Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("starting a runtime")?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("listening for SIGINT")?;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        Ok(())
    })
}

/// Ends the holder, and removes what is left in any case.
pub(super) fn down() -> Result<()> {
    if sweep::is_running(&ID) {
        let text = std::fs::read_to_string(pid_path()).with_context(|| {
            format!(
                "the network runs, but {} does not say who holds it",
                pid_path().display()
            )
        })?;
        let pid = Pid::from_raw(text.trim().parse().context("reading the holder's process id")?);
        say("ending the processes and removing the namespaces");
        match kill(pid, Signal::SIGTERM) {
            // Gone meanwhile is what was wanted.
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(error) => return Err(error).context("ending the holder of the network"),
        }
        let deadline = Instant::now() + Duration::from_secs(15);
        // Its lock is gone before it has tidied up.
        while sweep::is_running(&ID) || running(&pid_path()).is_some() {
            if Instant::now() >= deadline {
                bail!("process {pid} does not end: kill -9 {pid}, then run this again");
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    sweep::remove(&ID)?;
    for path in [log_path(), pid_path()] {
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("removing {}", path.display()));
            }
            Ok(()) | Err(_) => {}
        }
    }
    let left = names(&format!("{PREFIX}{}-", *ID));
    if !left.is_empty() {
        bail!("these namespaces are still there: {left:?}");
    }
    sweep::forget_root();
    say("the network is down");
    Ok(())
}
