//! Device mode: everything goes through the tunnel, and with the kill switch nothing ever beside it.

use std::{
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use dvpn_common::status::StateName;
use dvpn_tests::{
    capture::{Capture, Packet, hardware_address, is_housekeeping},
    http,
    network::{NetworkConfig, POOL, WEB, provider_address},
    node::{Daemon, Environment, NODE_PORT, POOL_PORT},
    snapshot,
    world::{CONNECT_PATIENCE, World, unique_id},
};

const TIMEOUT: Duration = Duration::from_millis(700);
const WEB_SITE: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(WEB), 80);

fn device_mode(environment: Environment) -> Environment {
    environment.with("TUNNEL_MODE", "device")
}

fn build(round_trips_ms: &[u64], told: impl FnOnce(Environment) -> Environment) -> Result<World> {
    let network = NetworkConfig::with_round_trips(&unique_id(), round_trips_ms);
    World::build_with(&network, |environment| told(device_mode(environment)))
}

/// What may leave the client's uplink: WireGuard and echoes to providers, TLS to the pool. Everything else that the
/// client's hardware address sends is a leak.
fn watch(world: &World) -> Result<Capture> {
    let mine = hardware_address(&world.network.client.namespace, "eth0")?;
    Capture::start(&world.network.client.namespace, "eth0", move |frame| {
        frame.get(6..12) == Some(mine.as_slice()) && !is_housekeeping(frame) && !is_ours(frame)
    })
}

fn is_ours(frame: &[u8]) -> bool {
    Packet::in_frame(frame).is_some_and(|packet| {
        let to_provider = (0..8).any(|number| packet.destination == provider_address(number));
        match packet.protocol {
            17 => to_provider && [NODE_PORT, NODE_PORT + 1].contains(&packet.destination_port),
            6 => packet.destination == POOL && packet.destination_port == POOL_PORT,
            _ => false,
        }
    })
}

/// What leaks would look like: a packet straight to the web server, one to the network's own, and one of IPv6. The
/// capture must see all.
fn plant(world: &World, capture: &Capture) -> Result<()> {
    let before = capture.matched();
    send_everywhere(world)?;
    let seen = capture.wait_for_more(before + 1, Duration::from_secs(5))?;
    ensure!(
        seen >= before + 2,
        "the capture saw {} of the planted leaks",
        seen - before
    );
    Ok(())
}

/// Sends what must not leave, not caring what becomes of it: by every way an application has.
fn send_everywhere(world: &World) -> Result<()> {
    let namespace = world.ask().namespace();
    let anywhere = namespace.udp(Ipv4Addr::UNSPECIFIED.into())?;
    let from_uplink = namespace.udp(world.network.client.address.into())?;
    let bound = namespace.udp(Ipv4Addr::UNSPECIFIED.into())?;
    socket2::SockRef::from(&bound).bind_device(Some(b"eth0"))?;
    let router = SocketAddr::from(([203, 0, 113, 1], 53));
    let pool = SocketAddr::from((POOL, POOL_PORT));
    let endpoint = SocketAddr::from((provider_address(0), NODE_PORT));
    for socket in [&anywhere, &from_uplink, &bound] {
        for to in [SocketAddr::from((WEB, 7)), router, pool] {
            drop(socket.send_to(b"a planted leak", to));
        }
    }
    // An unmarked process to the very endpoint, from a port that WireGuard does not use.
    drop(from_uplink.send_to(b"", endpoint));
    if let Ok(six) = namespace.udp(Ipv6Addr::UNSPECIFIED.into()) {
        drop(six.send_to(b"a planted leak", ("2001:db8::80".parse::<Ipv6Addr>()?, 7)));
    }
    Ok(())
}

/// The address that the web server sees of an ordinary program on the client.
fn exit_address(world: &World) -> Result<Ipv4Addr> {
    let stream = world.ask().namespace().connect(WEB_SITE, Duration::from_secs(5))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let (status, text) = http::get_text(stream, "web.dvpn.test", "/")?;
    ensure!(status == 200, "the web server answered {status}: {text:?}");
    text.trim()
        .parse()
        .with_context(|| format!("the web server answered {text:?}"))
}

fn none_leaked(capture: &Capture) -> Result<()> {
    ensure!(
        capture.matched() == 0,
        "{} packets leaked: {:?}",
        capture.matched(),
        capture.samples()
    );
    ensure!(capture.seen() > 0, "the capture saw nothing at all");
    Ok(())
}

#[test]
fn every_program_goes_through_the_tunnel_and_after_stop_the_machine_is_as_before() -> Result<()> {
    let world = build(&[8, 10], |environment| environment)?;
    let planted = watch(&world)?;
    plant(&world, &planted)?;
    drop(planted);
    world.pay()?;

    let capture = watch(&world)?;
    let status = world.ask().connect(CONNECT_PATIENCE)?;
    for _ in 0..5 {
        ensure!(exit_address(&world)? == world.address_of(&status)?, "another exit");
        send_everywhere(&world)?;
    }
    none_leaked(&capture)?;

    world.ask().disconnect(CONNECT_PATIENCE)?;
    world.ask().check_no_way_around()?;
    let after = snapshot::take(
        &world.network.client.namespace,
        &world.network.bpf_directory(&world.network.client),
    )?;
    // The packet counters go on from session to session.
    let network = |text: &str| text.split("# pinned").next().map(str::to_owned);
    ensure!(
        network(&after) == network(&world.client_before),
        "Stop left something:\n{after}"
    );
    plant(&world, &capture)
}

#[test]
fn while_nothing_connects_everything_is_blocked_and_paying_works() -> Result<()> {
    let mut world = build(&[8], |environment| environment)?;
    world.pay()?;
    let capture = watch(&world)?;
    world.ask().connect(CONNECT_PATIENCE)?;
    // The only provider dies: the session goes on looking for another.
    for provider in &mut world.providers {
        provider.process.kill()?;
    }
    world
        .ask()
        .wait_status("another state", Duration::from_secs(30), |status| {
            !matches!(status.state, StateName::Connected | StateName::Degraded)
        })?;
    let until = Instant::now() + Duration::from_secs(4);
    while Instant::now() < until {
        send_everywhere(&world)?;
        ensure!(
            world.ask().namespace().connect(WEB_SITE, TIMEOUT).is_err(),
            "something passes without a tunnel"
        );
    }
    // While blocked the control plane is reached.
    let checkout = world.ask().begin_checkout()?;
    ensure!(!checkout.is_empty());
    none_leaked(&capture)
}

#[test]
fn a_killed_daemon_leaves_everything_blocked_and_its_successor_connects() -> Result<()> {
    let mut world = build(&[8], |environment| environment)?;
    world.pay_and_connect()?;
    let capture = watch(&world)?;
    world.client.process.kill()?;
    for _ in 0..5 {
        send_everywhere(&world)?;
        ensure!(world.ask().namespace().connect(WEB_SITE, TIMEOUT).is_err());
    }
    let environment = world.client.environment.clone();
    world.client = Daemon::spawn(&world.network, &world.network.client, environment)?;
    world.ask().wait_state(StateName::Connected, CONNECT_PATIENCE)?;
    exit_address(&world)?;
    send_everywhere(&world)?;
    none_leaked(&capture)?;
    world.ask().disconnect(CONNECT_PATIENCE)?;
    plant(&world, &capture)
}
