//! Device mode: everything goes through the tunnel, and with the kill switch nothing ever beside it. The leak table: each
//! row is a [`LeakWatch`] whose planted leaks were seen before and after.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream},
    path::Path as FilePath,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use dvpn_common::status::{StateName, Status};
use dvpn_tests::{
    leak::{LeakWatch, UPLINK, exit_address},
    namespace::Namespace,
    network::{CLIENT, NetworkConfig, POOL, PREFIX, ROOT, WEB},
    node::{Daemon, Environment, POOL_PORT, resolv_conf},
    process::{Process, Surroundings, program, wait_for},
    snapshot,
    world::{CONNECT_PATIENCE, World, unique_id},
};
use nix::sys::signal::Signal;

const TIMEOUT: Duration = Duration::from_millis(700);
const PATIENCE: Duration = Duration::from_secs(5);
const WEB_SITE: SocketAddr = SocketAddr::new(IpAddr::V4(WEB), 80);
/// All that stands of the client's side.
const STANDING: &str = "nft --stateless list table inet dvpn || true; ip rule; ip -6 rule; \
                        ip route show table 3329; ip route show table 3330; ip -6 route show table 3329";
/// What others do to the machine is undone within this long; the figure is for a busy one.
const REPAIRED_WITHIN: Duration = Duration::from_secs(2);

/// Whether the long tests run.
fn is_long() -> bool {
    ["DVPN_CI_LONG", "DVPN_SOAK"]
        .iter()
        .any(|name| std::env::var_os(name).is_some())
}

/// A client in device mode among providers at these round-trip times.
fn build(round_trips_ms: &[u64], told: impl FnOnce(Environment) -> Environment) -> Result<World> {
    let network = NetworkConfig::with_round_trips(&unique_id(), round_trips_ms);
    World::build_with(&network, |environment| told(environment.with("TUNNEL_MODE", "device")))
}

/// Pays and connects with everything watched from before the first packet.
pub(crate) fn connect_watched(world: &World, patience: Duration) -> Result<LeakWatch> {
    world.pay()?;
    let mut watch = LeakWatch::begin(&world.network.client)?;
    world.ask().start()?;
    // From here on the firewall stands: the state changes after it.
    world
        .ask()
        .wait_status("an attempt", PATIENCE, |status| status.attempts > 0)?;
    watch.flood()?;
    world
        .ask()
        .wait_state(StateName::Connected, patience)
        .with_context(|| world.client.process.log_tail())?;
    Ok(watch)
}

fn direct(world: &World) -> Result<IpAddr> {
    exit_address(world.ask().namespace(), PATIENCE)
}

fn is_provider(world: &World, address: IpAddr) -> bool {
    world
        .network
        .providers
        .iter()
        .any(|machine| IpAddr::V4(machine.address) == address)
}

/// An ordinary program's connection works again within this long, and leaves by a provider.
fn wait_for_traffic(world: &World, patience: Duration) -> Result<()> {
    wait_for("traffic through a provider", patience, || {
        // Beside a flood that fills the tunnel's queues an answer may take its time.
        Ok(exit_address(world.ask().namespace(), Duration::from_secs(2)).ok())
    })
    .and_then(|exit| {
        ensure!(is_provider(world, exit), "traffic left through {exit}");
        Ok(())
    })
    .with_context(|| world.client.process.log_tail())
}

pub(crate) fn stop(world: &World) -> impl FnOnce() -> Result<()> + '_ {
    || world.ask().disconnect(CONNECT_PATIENCE).map(drop)
}

fn network_of(world: &World) -> Result<String> {
    let client = &world.network.client;
    let all = snapshot::take(&client.namespace, &world.network.bpf_directory(client))?;
    // The packet counters' pins go on from session to session.
    Ok(all.split("# pinned").next().unwrap_or_default().to_owned())
}

#[test]
fn every_program_goes_through_the_tunnel_and_after_stop_the_machine_is_as_before() -> Result<()> {
    let world = build(&[8, 10], |environment| environment)?;
    world.pay()?;
    let before = network_of(&world)?;
    let names = || Ok::<_, anyhow::Error>(std::fs::read_to_string(resolv_conf(&world.network.client)?)?);
    let names_before = names()?;
    let status = world.ask().connect(CONNECT_PATIENCE)?;
    wait_for("name servers inside the tunnel", PATIENCE, || {
        Ok(names()?.contains("nameserver 10.").then_some(()))
    })
    .with_context(|| names().unwrap_or_default())?;
    for _ in 0..5 {
        ensure!(
            direct(&world)? == IpAddr::V4(world.address_of(&status)?),
            "another exit"
        );
    }
    world.ask().disconnect(CONNECT_PATIENCE)?;
    world.ask().check_no_way_around()?;
    let after = network_of(&world)?;
    ensure!(after == before, "Stop left something:\n{after}\nbefore:\n{before}");
    let names_after = names()?;
    ensure!(
        names_after == names_before,
        "names are resolved by {names_after:?}, before {names_before:?}"
    );
    Ok(())
}

#[test]
fn nothing_leaks_while_sessions_begin_lose_their_interface_and_change_providers() -> Result<()> {
    let mut world = build(&[8, 10], |environment| environment)?;
    let watch = connect_watched(&world, CONNECT_PATIENCE)?;
    for round in 0..3 {
        world.ask().namespace().ip("link del dvpn0")?;
        // A session that is lost again and again waits longer each time.
        wait_for_traffic(&world, Duration::from_mins(1)).with_context(|| format!("round {round}"))?;
        watch.check("interface deleted")?;
    }
    let (_, status) = world.ask().health()?;
    let number = world.provider_number(status.provider.context("a provider")?.id.as_str())?;
    world.providers.get_mut(number).context("its daemon")?.process.kill()?;
    wait_for_traffic(&world, Duration::from_secs(30))?;
    watch.check("provider killed")?;
    let tried = watch.end(stop(&world))?;
    ensure!(tried > 100, "the flood tried only {tried} times");
    Ok(())
}

/// Kills every provider and waits until the client has noticed.
fn lose_every_provider(world: &mut World) -> Result<()> {
    for provider in &mut world.providers {
        provider.process.kill()?;
    }
    let lost = |status: &Status| !matches!(status.state, StateName::Connected | StateName::Degraded);
    world
        .ask()
        .wait_status("another state", Duration::from_secs(30), lost)?;
    Ok(())
}

#[test]
fn while_nothing_connects_everything_is_blocked_and_paying_works() -> Result<()> {
    let mut world = build(&[8], |environment| environment)?;
    let watch = connect_watched(&world, CONNECT_PATIENCE)?;
    lose_every_provider(&mut world)?;
    let until = Instant::now() + Duration::from_secs(4);
    while Instant::now() < until {
        ensure!(
            world.ask().namespace().connect(WEB_SITE, TIMEOUT).is_err(),
            "something passes without a tunnel"
        );
    }
    let checkout = world.ask().begin_checkout()?;
    ensure!(!checkout.is_empty());
    watch.end(stop(&world)).map(drop)
}

#[test]
fn a_daemon_killed_at_any_moment_leaves_everything_blocked_and_its_successor_connects() -> Result<()> {
    let rounds = if std::env::var_os("DVPN_SOAK").is_some() {
        200
    } else {
        8
    };
    let mut world = build(&[8], |environment| environment)?;
    let watch = connect_watched(&world, CONNECT_PATIENCE)?;
    for round in 0_u64..rounds {
        // Somewhere in the start, the attempt, the set-up, or after it.
        std::thread::sleep(Duration::from_millis(round * 61 % 490));
        world.client.process.kill()?;
        ensure!(
            world.ask().namespace().connect(WEB_SITE, TIMEOUT).is_err(),
            "something passes beside a dead daemon in round {round}"
        );
        let environment = world.client.environment.clone();
        world.client = Daemon::spawn(&world.network, &world.network.client, environment)?;
        watch.check("killed and started again")?;
    }
    wait_for_traffic(&world, CONNECT_PATIENCE)?;
    // A service manager's restart is no Stop: the daemon goes, what blocks stays.
    world.client.process.signal(Signal::SIGUSR1)?;
    let ended = world.client.process.wait_exit(PATIENCE)?;
    ensure!(ended.success(), "the daemon ended with {ended}");
    ensure!(world.ask().namespace().connect(WEB_SITE, TIMEOUT).is_err());
    watch.check("restarted")?;
    let environment = world.client.environment.clone();
    world.client = Daemon::spawn(&world.network, &world.network.client, environment)?;
    wait_for_traffic(&world, CONNECT_PATIENCE)?;
    watch.end(stop(&world)).map(drop)
}

#[test]
fn cleanup_opens_what_a_killed_daemon_left_and_a_new_start_alone_does_not() -> Result<()> {
    let mut world = build(&[8], |environment| environment)?;
    let before = network_of(&world)?;
    world.pay_and_connect()?;
    world.client.process.kill()?;
    let environment = world.client.environment.clone();
    Daemon::run(&world.network.client, &environment, &["--cleanup"])?;
    let after = network_of(&world)?;
    ensure!(after == before, "--cleanup left something:\n{after}\nbefore:\n{before}");
    Ok(())
}

#[test]
fn what_others_do_to_rules_routes_and_firewall_lets_nothing_out_and_is_undone() -> Result<()> {
    let world = build(&[8], |environment| environment)?;
    let watch = connect_watched(&world, CONNECT_PATIENCE)?;
    let namespace = world.ask().namespace();
    let sh = |script: &str| namespace.output("sh", &["-euc", script]);
    let standing = sh(
        "nft --stateless list table inet dvpn; ip rule; ip -6 rule; ip route show table 3329; ip route show table 3330; ip -6 route show table 3329; true",
    )?;
    let rows = [
        // Where the kernel lets a table be owned, nobody else can do this; elsewhere it is undone.
        ("ruleset flushed", "nft flush ruleset"),
        ("table deleted", "nft delete table inet dvpn || true"),
        ("chain flushed", "nft flush chain inet dvpn leaving || true"),
        (
            "rules deleted",
            "while ip rule del lookup 3329; do :; done; while ip -6 rule del lookup 3329; do :; done; true",
        ),
        (
            "routes flushed",
            "ip route flush table 3329; ip -6 route flush table 3329",
        ),
        ("routes to nobody flushed", "ip route flush table 3330"),
        ("addresses flushed", "ip addr flush dev dvpn0"),
        ("IPv6 address deleted", "ip -6 addr flush dev dvpn0 scope global"),
        ("link taken down", "ip link set dvpn0 down"),
    ];
    for (what, script) in rows {
        sh(script).with_context(|| what.to_owned())?;
        let mut last = String::new();
        wait_for("the repair", REPAIRED_WITHIN, || {
            last = sh(STANDING)?;
            Ok((last == standing).then_some(()))
        })
        .with_context(|| format!("{what}: it stood\n{standing}\nand now\n{last}"))?;
        wait_for_traffic(&world, Duration::from_mins(1)).with_context(|| what.to_owned())?;

        watch.check(what)?;
    }
    // Routes that are more specific than a default route lead nobody away.
    sh(&format!(
        "ip route add 0.0.0.0/1 via 203.0.113.1 dev {UPLINK}; ip route add 128.0.0.0/1 via 203.0.113.1 dev {UPLINK}"
    ))?;
    wait_for_traffic(&world, PATIENCE)?;
    watch.check("routes 0/1 and 128/1")?;
    sh("ip route del 0.0.0.0/1; ip route del 128.0.0.0/1")?;
    // Answers pass the check of their way back, however strict; it is the uplink's and the tunnel's.
    for strictness in ["1", "2", "0"] {
        namespace.sysctl("ipv4/conf/all/rp_filter", strictness)?;
        // What a change of the network brings: the daemon looks again.
        sh("ip link add dvpntest type veth; ip link del dvpntest")?;
        wait_for_traffic(&world, Duration::from_mins(1)).with_context(|| format!("rp_filter {strictness}"))?;
        watch.check("rp_filter")?;
    }
    watch.end(stop(&world)).map(drop)
}

/// A namespace behind a bridge of the client, as containers are.
fn container(world: &World) -> Result<Namespace> {
    let client = world.ask().namespace();
    let inside = Namespace::create(&format!("{PREFIX}{}-container", unique_id()))?;
    client.ip(&format!(
        "link add br-test type bridge\nlink add veth-test type veth peer name eth0 netns {}\n\
         link set veth-test master br-test\naddr add 172.29.0.1/16 dev br-test\nlink set veth-test up\n\
         link set br-test up",
        inside.name()
    ))?;
    inside.ip("link set eth0 up\naddr add 172.29.0.2/16 dev eth0\nroute add default via 172.29.0.1")?;
    client.sysctl("ipv4/ip_forward", "1")?;
    Ok(inside)
}

#[test]
fn what_containers_send_goes_through_the_tunnel_or_nowhere() -> Result<()> {
    let mut world = build(&[8], |environment| environment)?;
    let container = container(&world)?;
    let watch = connect_watched(&world, CONNECT_PATIENCE)?;
    // Its way out began before the session or after it: the network is looked at when the session begins.
    let exit = exit_address(&container, PATIENCE).with_context(|| world.client.process.log_tail())?;
    ensure!(is_provider(&world, exit), "the container's traffic left through {exit}");
    // The machine itself reaches its containers, and they it.
    let listener = container.listen((Ipv4Addr::new(172, 29, 0, 2), 8080).into())?;
    world
        .ask()
        .namespace()
        .connect((Ipv4Addr::new(172, 29, 0, 2), 8080).into(), PATIENCE)?;
    drop(listener);
    let ssh = world.ask().namespace().listen((Ipv4Addr::UNSPECIFIED, 2222).into())?;
    container.connect((Ipv4Addr::new(172, 29, 0, 1), 2222).into(), PATIENCE)?;
    drop(ssh);
    world.client.process.kill()?;
    ensure!(
        container.connect(WEB_SITE, TIMEOUT).is_err(),
        "a container passes beside a dead daemon"
    );
    watch.check("container")?;
    let environment = world.client.environment.clone();
    world.client = Daemon::spawn(&world.network, &world.network.client, environment)?;
    wait_for_traffic(&world, CONNECT_PATIENCE)?;
    exit_address(&container, PATIENCE)?;
    watch.end(stop(&world)).map(drop)
}

/// Sends a line each way.
fn talk(one: &mut TcpStream, other: &mut TcpStream) -> Result<()> {
    for (from, to) in [(0, 1), (1, 0)] {
        let (sender, receiver) = if from < to {
            (&mut *one, &mut *other)
        } else {
            (&mut *other, &mut *one)
        };
        sender.write_all(b"still here\n")?;
        let mut line = [0; 11];
        receiver.read_exact(&mut line).context("the other side hears nothing")?;
    }
    Ok(())
}

#[test]
fn ssh_from_outside_survives_start_and_other_ports_are_closed() -> Result<()> {
    let mut world = build(&[8], |environment| environment)?;
    let (inside, outside) = (&world.network.client.namespace, &world.network.pool.namespace);
    let daemon = inside.listen((Ipv4Addr::UNSPECIFIED, 22).into())?;
    let other = inside.listen((Ipv4Addr::UNSPECIFIED, 8080).into())?;
    let login = || -> Result<(TcpStream, TcpStream)> {
        let far = outside.connect((CLIENT, 22).into(), PATIENCE)?;
        let (near, _) = daemon.accept()?;
        for end in [&far, &near] {
            end.set_read_timeout(Some(PATIENCE))?;
        }
        Ok((far, near))
    };
    let mut before = login()?;
    outside.connect((CLIENT, 8080).into(), PATIENCE)?;
    world.pay_and_connect()?;
    talk(&mut before.0, &mut before.1).context("the connection from before Start")?;
    let mut during = login().context("a new connection while connected")?;
    talk(&mut during.0, &mut during.1)?;
    ensure!(
        outside.connect((CLIENT, 8080).into(), TIMEOUT).is_err(),
        "a port that is not named is reachable from outside"
    );
    // Blocked, with no daemon at all.
    world.client.process.kill()?;
    talk(&mut before.0, &mut before.1).context("the first connection while blocked")?;
    talk(&mut during.0, &mut during.1).context("the second connection while blocked")?;
    let mut blocked = login().context("a new connection while blocked")?;
    talk(&mut blocked.0, &mut blocked.1)?;
    drop(other);
    // A program that takes such a port for its own connections gets nowhere.
    let sly = inside.run(|| -> Result<bool> {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(true)?;
        let bound = socket.bind(&SocketAddr::from((CLIENT, 22)).into());
        Ok(bound.is_ok() && socket.connect_timeout(&WEB_SITE.into(), TIMEOUT).is_ok())
    })??;
    if sly {
        bail!("a connection from port 22 passes");
    }
    Ok(())
}

#[test]
fn a_start_over_ssh_is_taken_back_unless_it_is_confirmed() -> Result<()> {
    let world = build(&[8], |environment| environment)?;
    world.pay()?;
    let armed = |what: &str, wanted: bool| {
        let shown = move |status: &dvpn_common::status::Status| status.confirm_by.is_some() == wanted;
        world.ask().wait_status(what, PATIENCE, shown)
    };
    world.ask().bus().call_over_ssh("Start")?;
    let status = armed("a start to be confirmed", true)?;
    let left = status
        .confirm_by
        .context("a moment")?
        .duration_since(jiff::Timestamp::now());
    ensure!((50..=60).contains(&left.as_secs()), "{left:?} to confirm");
    world.ask().wait_state(StateName::Connected, CONNECT_PATIENCE)?;
    world.ask().bus().call_over_ssh("Start")?;
    armed("a confirmed start", false)?;
    // Nobody else's start waits for anything.
    world.ask().disconnect(CONNECT_PATIENCE)?;
    world.ask().connect(CONNECT_PATIENCE)?;
    armed("an ordinary start", false)?;
    world.ask().disconnect(CONNECT_PATIENCE)?;
    if is_long() {
        world.ask().bus().call_over_ssh("Start")?;
        let begun = Instant::now();
        world.ask().wait_state(StateName::Connected, CONNECT_PATIENCE)?;
        world
            .ask()
            .wait_state(StateName::Disconnected, Duration::from_secs(75))?;
        let after = begun.elapsed();
        ensure!((58..=65).contains(&after.as_secs()), "taken back after {after:?}");
        ensure!(
            world.client.process.log_text().contains("start_taken_back"),
            "no record of it"
        );
        let (_, status) = world.ask().health()?;
        ensure!(!status.autostart, "a restart would go on with it");
    }
    Ok(())
}

#[test]
fn early_boot_blocks_for_whoever_was_connected_and_the_service_goes_on() -> Result<()> {
    let mut world = build(&[8], |environment| environment)?;
    let environment = world.client.environment.clone();
    let client = &world.network.client;
    let says = Daemon::run(client, &environment, &["--early-boot"])?;
    ensure!(says.contains("nothing is to be blocked"), "{says}");
    world.pay_and_connect()?;
    world.client.process.kill()?;
    // The machine starts: nothing stands.
    Daemon::run(&world.network.client, &environment, &["--cleanup"])?;
    let mut watch = LeakWatch::begin(&world.network.client)?;
    Daemon::run(&world.network.client, &environment, &["--early-boot"])?;
    watch.flood()?;
    ensure!(world.ask().namespace().connect(WEB_SITE, TIMEOUT).is_err());
    watch.check("early boot")?;
    world.client = Daemon::spawn(&world.network, &world.network.client, environment)?;
    wait_for_traffic(&world, CONNECT_PATIENCE)?;
    watch.end(stop(&world)).map(drop)
}

#[test]
fn names_resolve_beside_the_tunnel_for_the_daemon_alone_and_are_remembered() -> Result<()> {
    const NAME: &str = "pool.dvpn.test";
    let network = NetworkConfig::with_round_trips(&unique_id(), &[8]);
    let names_file = FilePath::new(ROOT).join(&network.id).join("client/resolv.conf");
    let mut world = World::build_with(&network, |environment| {
        let written = std::fs::write(&names_file, format!("nameserver {POOL}\n"));
        assert!(written.is_ok(), "{written:?}");
        environment
            .with("TUNNEL_MODE", "device")
            .with("POOL_URL", format!("https://{NAME}:{POOL_PORT}/providers"))
            .with("PAYMENT_API_URL", format!("https://{NAME}:{POOL_PORT}/payment"))
    })?;
    let mut command = Command::new(program("dvpn-lab")?);
    command.args(["web", "--address", &POOL.to_string(), "--name", NAME]);
    let log = world.network.directory.join("names.log");
    let surroundings = Surroundings {
        namespace: &world.network.pool.namespace,
        log: &log,
        resolv_conf: None,
    };
    let mut names = Process::spawn("the name server", command, &surroundings)?;
    wait_for("the name server", PATIENCE, || {
        Ok(world.network.pool.namespace.connect((POOL, 80).into(), TIMEOUT).ok())
    })?;
    let watch = connect_watched(&world, CONNECT_PATIENCE)?;
    lose_every_provider(&mut world)?;
    let checkout = world.ask().begin_checkout().context("with a name server")?;
    ensure!(!checkout.is_empty());
    // The name server is gone, and so is every connection that was kept: a new daemon has none.
    names.kill()?;
    world.client.process.kill()?;
    let environment = world.client.environment.clone();
    world.client = Daemon::spawn(&world.network, &world.network.client, environment)?;
    let again = world.ask().begin_checkout().context("without a name server")?;
    ensure!(!again.is_empty());
    watch.end(stop(&world)).map(drop)
}
