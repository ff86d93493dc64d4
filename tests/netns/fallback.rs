//! The pool fails, and a provider is made by the orchestrator: what runs for that, who sees the token, what is returned.

use std::{
    collections::BTreeMap,
    os::unix::fs::PermissionsExt as _,
    path::Path as FilePath,
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use dvpn_common::status::{PaymentStatus, StateName};
use dvpn_tests::{
    network::{Network, NetworkConfig},
    node::{self, Daemon, Environment, LEASE_SECONDS},
    process::{program, wait_for},
    wire::Path,
    world::{CONNECT_PATIENCE, World, unique_id},
};

const UNREACHABLE_POOL: &str = "https://127.0.0.1:9/providers";
const TIMEOUT: Duration = Duration::from_secs(5);
/// The script asks over a slow wire in some of these tests.
const PATIENCE: Duration = Duration::from_mins(1);

/// The shipped script at a path that is root's alone, whoever the working copy belongs to.
fn install_script(network_id: &str) -> Result<std::path::PathBuf> {
    let shipped = FilePath::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/setup_fallback_node.sh");
    let path = FilePath::new(dvpn_tests::network::ROOT)
        .join(network_id)
        .join("setup_fallback_node.sh");
    let text = std::fs::read(&shipped).with_context(|| format!("reading {}", shipped.display()))?;
    std::fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

fn with_fallback(environment: Environment, script: &FilePath, ca: &FilePath) -> Environment {
    environment
        .with("FALLBACK_ENABLED", "true")
        .with("FALLBACK_SCRIPT_PATH", script)
        .with("FALLBACK_ORCHESTRATOR_URL", node::orchestrator_url())
        .with("FALLBACK_CA_CERT", ca)
        .with("FALLBACK_TIMEOUT_SECONDS", "30")
}

/// A world whose client has the fallback switched on.
fn world(config: &NetworkConfig, told: impl FnOnce(Environment) -> Environment) -> Result<World> {
    let mut installed = Ok(std::path::PathBuf::new());
    let built = World::build_with(config, |environment| {
        installed = install_script(&config.id);
        let script = installed.as_deref().unwrap_or(FilePath::new("/nonexistent"));
        let ca = environment.value("SSL_CERT_FILE").unwrap_or_default();
        told(with_fallback(environment, script, FilePath::new(&ca)))
    });
    installed?;
    built
}

/// Takes a provider off the list and makes it lendable; waits until the list has this many left.
fn put_on_standby(world: &World, id: &str, left: usize) -> Result<()> {
    let database = world.network.pool.directory.join("pool.sqlite");
    let done = Command::new(program("dvpn-pool")?)
        .args(["standby-node", id, "--database"])
        .arg(database)
        .output()
        .context("running dvpn-pool standby-node")?;
    ensure!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    wait_for("a shorter list", Duration::from_secs(20), || {
        Ok((node::listed(&world.network, &world.ca())? == left).then_some(()))
    })
}

fn log_of(network: &Network, number: usize) -> Result<String> {
    let machine = network.providers.get(number).context("a provider's machine")?;
    Ok(std::fs::read_to_string(machine.directory.join("log")).unwrap_or_default())
}

fn context(world: &World) -> String {
    format!(
        "the client's log ends:\n{}\nthe pool's:\n{}",
        world.client.process.log_tail(),
        world.pool.log_tail()
    )
}

#[test]
fn without_a_pool_the_orchestrator_lends_a_provider_that_is_kept_while_used_and_returned_after() -> Result<()> {
    let config = NetworkConfig::with_round_trips(&unique_id(), &[8]);
    let world = world(&config, |environment| environment.with("POOL_URL", UNREACHABLE_POOL))?;
    put_on_standby(&world, "provider-a", 0)?;
    world.pay()?;
    let status = world.ask().connect(PATIENCE).with_context(|| context(&world))?;
    ensure!(status.payment == PaymentStatus::Paid, "{status:?}");
    let provider = status.provider.as_ref().context("a provider")?;
    ensure!(provider.id.as_str() == "provider-a", "{provider:?}");
    let exit = world.ask().exit_address(TIMEOUT)?;
    ensure!(exit == world.address_of(&status)?, "the web server saw {exit}");

    // Longer than the lease: it is renewed, and the tunnel that stands is the same all the time.
    let end = Instant::now() + Duration::from_secs(LEASE_SECONDS) + Duration::from_secs(5);
    while Instant::now() < end {
        let exit = world.ask().exit_address(TIMEOUT).with_context(|| context(&world))?;
        ensure!(exit == world.address_of(&status)?, "traffic left through {exit}");
        thread::sleep(Duration::from_millis(500));
    }
    let (_, now) = world.ask().health()?;
    ensure!(
        (now.state, now.attempts) == (StateName::Connected, status.attempts),
        "{now:?}\n{}",
        context(&world)
    );
    ensure!(
        log_of(&world.network, 0)?.matches("peer_removed").count() == 0,
        "the peer was removed while it was used"
    );

    world.ask().disconnect(CONNECT_PATIENCE)?;
    let returned = wait_for(
        "the end of the peer at the standby node",
        Duration::from_secs(8),
        || Ok(log_of(&world.network, 0)?.contains("peer_removed").then_some(())),
    );
    returned.with_context(|| context(&world))?;
    ensure!(
        world.pool.log_text().contains("a lease was returned"),
        "{}",
        context(&world)
    );
    Ok(())
}

#[test]
fn with_the_fallback_off_an_unreachable_pool_is_only_waited_for() -> Result<()> {
    let config = NetworkConfig::with_round_trips(&unique_id(), &[8]);
    let world = world(&config, |environment| {
        environment
            .with("POOL_URL", UNREACHABLE_POOL)
            .with("FALLBACK_ENABLED", "false")
    })?;
    put_on_standby(&world, "provider-a", 0)?;
    world.pay()?;
    world.ask().start()?;
    let status = world
        .ask()
        .wait_status("a second attempt", PATIENCE, |status| {
            status.attempts >= 2 && status.state == StateName::Backoff
        })
        .with_context(|| context(&world))?;
    ensure!(status.problem.is_some(), "{status:?}");
    ensure!(!world.pool.log_text().contains("a lease begins"), "{}", context(&world));
    ensure!(
        !world.client.process.log_text().contains("provisioning"),
        "{}",
        context(&world)
    );
    Ok(())
}

#[test]
fn when_every_listed_provider_is_dead_the_orchestrator_is_asked_too() -> Result<()> {
    let config = NetworkConfig::with_round_trips(&unique_id(), &[8, 10]);
    let world = world(&config, |environment| environment)?;
    put_on_standby(&world, "provider-b", 1)?;
    let dead = world.provider_machine("provider-a")?;
    dead.wire.set_outage(true);
    world.pay()?;
    let status = world.ask().connect(PATIENCE).with_context(|| context(&world))?;
    let provider = status.provider.as_ref().context("a provider")?;
    ensure!(provider.id.as_str() == "provider-b", "{provider:?}");
    ensure!(world.ask().exit_address(TIMEOUT)? == world.address_of(&status)?);
    Ok(())
}

/// What the processes of the script showed to everybody who may look, by their command lines.
fn watch_processes(stop: &AtomicBool) -> BTreeMap<String, String> {
    let mut seen = BTreeMap::new();
    while !stop.load(Ordering::Relaxed) {
        let Ok(entries) = std::fs::read_dir("/proc") else {
            continue;
        };
        for entry in entries.flatten() {
            let path = entry.path();
            let read = |name: &str| {
                let bytes = std::fs::read(path.join(name)).unwrap_or_default();
                String::from_utf8_lossy(&bytes).replace('\0', " ")
            };
            let line = read("cmdline");
            if line.contains("setup_fallback_node") || line.starts_with("curl ") {
                let environment = read("environ");
                seen.entry(line).or_insert(environment);
            }
        }
    }
    seen
}

#[test]
fn only_the_script_and_what_it_runs_is_executed_and_none_of_it_shows_the_token() -> Result<()> {
    // Slow enough that curl is there for a while.
    let config = NetworkConfig {
        pool: Path::round_trip(Duration::from_millis(150)),
        ..NetworkConfig::with_round_trips(&unique_id(), &[8])
    };
    let mut world = world(&config, |environment| environment.with("POOL_URL", UNREACHABLE_POOL))?;
    put_on_standby(&world, "provider-a", 0)?;
    world.pay()?;
    world.client.process.stop(Duration::from_secs(20))?;
    let trace = world.network.client.directory.join("strace");
    let wrap = |daemon: Command| {
        let mut strace = Command::new("strace");
        strace
            .args(["-f", "-qq", "-e", "trace=execve,execveat", "-o"])
            .arg(&trace)
            .arg(daemon.get_program());
        strace.env_clear();
        strace.envs(daemon.get_envs().filter_map(|(name, value)| Some((name, value?))));
        strace
    };
    // Field by field, because the old daemon's bus must be gone before the new one's takes its socket.
    let environment = world.client.environment.clone();
    world.client = Daemon::spawn_by(&world.network, &world.network.client, environment, wrap)?;

    let stop = AtomicBool::new(false);
    let (connected, seen) = thread::scope(|scope| {
        let watching = scope.spawn(|| watch_processes(&stop));
        let connected = world.ask().connect(PATIENCE);
        stop.store(true, Ordering::Relaxed);
        (connected, watching.join())
    });
    connected.with_context(|| context(&world))?;
    let seen = seen.ok().context("the watching thread failed")?;
    world.ask().disconnect(CONNECT_PATIENCE)?;
    world.ask().bus().call("Exit", &[])?;
    world.client.process.wait_exit(Duration::from_secs(20))?;

    ensure!(
        seen.keys().any(|line| line.contains("setup_fallback_node"))
            && seen
                .keys()
                .any(|line| line.starts_with("curl ") && line.contains("--data-binary")),
        "the script or its curl was not seen: {:?}",
        seen.keys()
    );
    for (line, environment) in &seen {
        // Tokens of a development pool begin with dev_.
        ensure!(!line.contains("dev_"), "the token is an argument: {line}");
        ensure!(
            !environment.contains("dev_"),
            "the token is in the environment of {line}"
        );
    }
    let text = std::fs::read_to_string(&trace).with_context(|| format!("reading {}", trace.display()))?;
    // A call may be told in two lines when another thread comes between: the first names the program. What failed in one
    // line is only a place of PATH where it is not.
    let executed: Vec<&str> = text
        .lines()
        .filter(|line| line.contains("execve") && !line.contains(" = -1 ") && !line.contains("resumed>"))
        .filter_map(|line| line.split('"').nth(1))
        .collect();
    let mut programs = executed.iter().map(|path| path.rsplit('/').next().unwrap_or(path));
    ensure!(programs.next() == Some("dvpn-daemon"), "{executed:?}");
    ensure!(programs.next() == Some("setup_fallback_node.sh"), "{executed:?}");
    let others: Vec<&str> = programs.collect();
    ensure!(
        others.iter().all(|name| ["bash", "cat", "curl", "head"].contains(name)) && others.contains(&"curl"),
        "{executed:?}"
    );
    ensure!(
        !world.client.process.log_text().contains("dev_"),
        "the token is in the log"
    );
    Ok(())
}

#[test]
fn in_device_mode_the_script_reaches_the_orchestrator_and_nothing_leaks_meanwhile() -> Result<()> {
    let config = NetworkConfig::with_round_trips(&unique_id(), &[8]);
    let world = world(&config, |environment| {
        environment
            .with("POOL_URL", UNREACHABLE_POOL)
            .with("TUNNEL_MODE", "device")
    })?;
    put_on_standby(&world, "provider-a", 0)?;
    let watch = super::device::connect_watched(&world, PATIENCE).with_context(|| context(&world))?;
    let exit = dvpn_tests::leak::exit_address(world.ask().namespace(), TIMEOUT)?;
    let (_, status) = world.ask().health()?;
    ensure!(
        exit == std::net::IpAddr::V4(world.address_of(&status)?),
        "traffic left through {exit}"
    );
    ensure!(
        !world
            .network
            .client
            .directory
            .join("state/orchestrator.socket")
            .exists(),
        "the script's way to the orchestrator outlives it"
    );
    watch.end(super::device::stop(&world)).map(drop)
}
