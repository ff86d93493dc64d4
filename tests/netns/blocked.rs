//! While everything is blocked a program is told so at once, and does not wait for an answer that cannot come.

use std::{
    io::{self, Write as _},
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use dvpn_common::status::StateName;
use dvpn_tests::{
    leak::UPLINK,
    network::{CLIENT, NetworkConfig, POOL, ROUTER, WEB},
    world::{World, unique_id},
};
use socket2::{Domain, Socket, Type};

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

#[test]
fn a_blocked_program_gets_an_error_at_once_whatever_its_socket_is_bound_to() -> Result<()> {
    let network = NetworkConfig::with_round_trips(&unique_id(), &[8]);
    let mut world = World::build_with(&network, |environment| environment.with("TUNNEL_MODE", "device"))?;
    world.pay_and_connect()?;
    let namespace = &world.network.client.namespace;
    namespace.ip(&format!("addr add 2001:db8::20/64 dev {UPLINK} nodad"))?;
    // One that stands in the tunnel.
    let mut before = namespace.connect((WEB, 80).into(), Duration::from_secs(5))?;
    for provider in &mut world.providers {
        provider.process.kill()?;
    }
    world.ask().wait_status("another state", PATIENCE, |status| {
        !matches!(
            status.state,
            StateName::Connected | StateName::Degraded | StateName::Disconnecting
        )
    })?;
    let way = |what, to: SocketAddr, address, interface| Way {
        what,
        to,
        address,
        interface,
    };
    let six = SocketAddr::from((Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x80), 80));
    let mut told = Vec::new();
    for way in [
        way("any", (WEB, 80).into(), None, false),
        way("the uplink's address", (WEB, 80).into(), Some(CLIENT), false),
        way("the uplink", (WEB, 80).into(), None, true),
        way("both", (WEB, 80).into(), Some(CLIENT), true),
        way("the local network", (ROUTER, 80).into(), None, true),
        way("the pool", (POOL, 8443).into(), None, true),
        way("IPv6", six, None, false),
        way("IPv6 by the uplink", six, None, true),
    ] {
        let (connected, after) = namespace.run(|| connect(&way))??;
        told.push(format!("{}: {connected:?} after {after:?}", way.what));
        ensure!(connected.is_err() && after < AT_ONCE, "{told:#?}");
    }
    eprintln!("{told:#?}");
    let begun = Instant::now();
    let outcome = before.write_all(b"GET / HTTP/1.1\r\n\r\n").context("writing");
    eprintln!("standing: {outcome:?} after {:?}", begun.elapsed());
    Ok(())
}
