//! While everything is blocked a program is told so at once, and does not wait for an answer that cannot come.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use dvpn_common::status::{ModeName, StateName, Status};
use dvpn_tests::{
    leak::UPLINK,
    network::{CLIENT, NetworkConfig, POOL, ROUTER, WEB},
    node::{Daemon, POOL_PORT},
    world::{CONNECT_PATIENCE, World, unique_id},
};
use socket2::{Domain, Socket, Type};

use crate::device::{connect_watched, stop};

/// A program that has no answer by then waits for one.
const AT_ONCE: Duration = Duration::from_millis(500);
const PATIENCE: Duration = Duration::from_secs(30);

/// How a program's socket is made.
struct Way {
    what: &'static str,
    to: SocketAddr,
    address: Option<Ipv4Addr>,
    interface: bool,
}

/// What connecting says, and after how long.
fn connect(way: &Way) -> Result<(io::Result<()>, Duration)> {
    let socket = Socket::new(Domain::for_address(way.to), Type::STREAM, None)?;
    if let Some(address) = way.address {
        socket.bind(&SocketAddr::from((address, 0)).into())?;
    }
    if way.interface {
        socket.bind_device(Some(UPLINK.as_bytes()))?;
    }
    let begun = Instant::now();
    let connected = socket.connect_timeout(&way.to.into(), Duration::from_secs(3));
    Ok((connected, begun.elapsed()))
}

/// What asking a name server by UDP says, and after how long.
fn ask(server: SocketAddr) -> Result<(io::Result<usize>, Duration)> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.set_read_timeout(Some(Duration::from_secs(3)))?;
    socket.connect(server)?;
    let begun = Instant::now();
    let answered = socket.send(b"?").and_then(|_| socket.recv(&mut [0; 512]));
    Ok((answered, begun.elapsed()))
}

#[test]
fn a_blocked_program_gets_an_error_at_once_whatever_its_socket_is_bound_to() -> Result<()> {
    const LAN_SERVER: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 1);
    let network = NetworkConfig::with_round_trips(&unique_id(), &[8]);
    let mut world = World::build_with(&network, |environment| {
        environment.with("TUNNEL_MODE", "device").with("ALLOW_LAN", "true")
    })?;
    // A local network, which is allowed, and whose name server is not; it hears and says nothing.
    world.ask().namespace().ip(&format!(
        "addr add 192.168.77.20/24 dev {UPLINK}\n\
         neigh replace {LAN_SERVER} lladdr 02:00:00:00:00:77 dev {UPLINK}"
    ))?;
    let watch = connect_watched(&world, CONNECT_PATIENCE)?;
    for provider in &mut world.providers {
        provider.process.kill()?;
    }
    world.ask().wait_status("another state", PATIENCE, |status| {
        !matches!(
            status.state,
            StateName::Connected | StateName::Degraded | StateName::Disconnecting
        )
    })?;
    let namespace = world.ask().namespace();
    let six = SocketAddr::from((Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x80), 80));
    let way = |what, to: SocketAddr, address, interface| Way {
        what,
        to,
        address,
        interface,
    };
    let mut told = Vec::new();
    for way in [
        way("any", (WEB, 80).into(), None, false),
        way("the uplink's address", (WEB, 80).into(), Some(CLIENT), false),
        way("the uplink", (WEB, 80).into(), None, true),
        way("both", (WEB, 80).into(), Some(CLIENT), true),
        way("the router", (ROUTER, 80).into(), None, true),
        way("the pool", (POOL, 8443).into(), None, true),
        way("the local network's name server", (LAN_SERVER, 53).into(), None, false),
        way("IPv6", six, None, false),
        way("IPv6 by the uplink", six, None, true),
    ] {
        let (connected, after) = namespace.run(|| connect(&way))??;
        told.push(format!("{}: {connected:?} after {after:?}", way.what));
        ensure!(connected.is_err() && after < AT_ONCE, "{told:#?}");
    }
    let (answered, after) = namespace.run(|| ask((LAN_SERVER, 53).into()))??;
    ensure!(answered.is_err() && after < AT_ONCE, "{answered:?} after {after:?}");
    // Nobody outside is told anything, and nothing leaves with what is told inside.
    let outside = &world.network.pool.namespace;
    let begun = Instant::now();
    let knocked = outside.connect((CLIENT, 8080).into(), Duration::from_millis(700));
    ensure!(
        knocked.is_err() && begun.elapsed() > AT_ONCE,
        "somebody outside is answered: {knocked:?}"
    );
    watch.end(stop(&world)).map(drop)
}

#[test]
fn the_status_says_what_goes_through_the_tunnel_and_whether_the_rest_is_blocked() -> Result<()> {
    let network = NetworkConfig::with_round_trips(&unique_id(), &[8]);
    let mut world = World::build_with(&network, |environment| {
        environment.with("TUNNEL_MODE", "device").with("LOCKDOWN", "true")
    })?;
    let says = |world: &World, mode: ModeName, blocking: bool| -> Result<()> {
        let (_, status) = world.ask().health()?;
        ensure!((status.mode, status.blocking) == (mode, blocking), "{status:?}");
        ensure!(world.ask().bus().property("Mode")? == mode.as_str());
        ensure!(world.ask().bus().property("Blocking")? == blocking);
        let closed = world
            .ask()
            .namespace()
            .connect((POOL, POOL_PORT).into(), Duration::from_secs(1))
            .is_err();
        ensure!(closed == blocking, "blocking {blocking} and closed {closed}");
        Ok(())
    };
    let blocking = |world: &World, wanted: bool| {
        let shown = move |status: &Status| status.blocking == wanted;
        world.ask().wait_status("blocking or not", PATIENCE, shown).map(drop)
    };
    blocking(&world, true)?;
    says(&world, ModeName::Device, true)?;
    // A run that is told nothing leaves what it finds, and says so.
    world.client.process.kill()?;
    let environment = world.client.environment.clone().without("LOCKDOWN");
    world.client = Daemon::spawn(&world.network, &world.network.client, environment.clone())?;
    says(&world, ModeName::Device, true)?;
    world.ask().stop()?;
    blocking(&world, false)?;
    says(&world, ModeName::Device, false)?;
    world.client.process.kill()?;
    let environment = environment.without("TUNNEL_MODE");
    world.client = Daemon::spawn(&world.network, &world.network.client, environment)?;
    says(&world, ModeName::App, false)
}
