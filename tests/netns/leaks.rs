//! Nothing of what applications send passes outside the tunnel: not while it stands, not when it is gone.

use std::{
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use dvpn_tests::{
    capture::{Capture, Packet, hardware_address, is_housekeeping},
    client::SOCKS5,
    network::{POOL, WEB, WEB_NAME},
    socks::{self, Target},
    world::{CONNECT_PATIENCE, World},
};

const TIMEOUT: Duration = Duration::from_millis(700);

/// Every packet that the client sends by its uplink and that is not for the pool or a provider. Frames are told by
/// their hardware address: a leak with a foreign or an IPv6 source is one too.
fn watch(world: &World) -> Result<Capture> {
    let mut allowed: Vec<Ipv4Addr> = world
        .network
        .providers
        .iter()
        .map(|provider| provider.address)
        .collect();
    allowed.push(POOL);
    let mine = hardware_address(&world.network.client.namespace, "eth0")?;
    Capture::start(&world.network.client.namespace, "eth0", move |frame| {
        frame.get(6..12) == Some(mine.as_slice())
            && !is_housekeeping(frame)
            && Packet::in_frame(frame).is_none_or(|packet| !allowed.contains(&packet.destination))
    })
}

/// What leaks would look like: a packet straight to the web server, and one of IPv6. The capture must see both.
fn plant(world: &World, capture: &Capture) -> Result<()> {
    let namespace = world.ask().namespace();
    let before = capture.matched();
    let socket = namespace.udp(world.network.client.address.into())?;
    socket.send_to(b"a planted leak", (WEB, 7))?;
    let seen = capture.wait_for_more(before, Duration::from_secs(5))?;

    namespace.ip("addr replace 2001:db8::20/64 dev eth0 nodad\n\
                  neigh replace 2001:db8::80 lladdr 02:00:00:00:00:80 dev eth0")?;
    let socket = namespace.udp(Ipv6Addr::UNSPECIFIED.into())?;
    socket.send_to(b"a planted leak", ("2001:db8::80".parse::<Ipv6Addr>()?, 7))?;
    capture.wait_for_more(seen, Duration::from_secs(5))?;
    namespace.ip("addr del 2001:db8::20/64 dev eth0")
}

/// Asks the proxy in every way it knows; true if one of them was served.
fn asks_anything(world: &World) -> bool {
    let targets = [
        Target::Name(WEB_NAME, 80),
        Target::Address((WEB, 80).into()),
        Target::Name("some-other-name.test", 443),
    ];
    let connected = targets
        .map(|target| socks::connect(world.ask().namespace(), SOCKS5, target, TIMEOUT).is_ok())
        .contains(&true);
    let echoed = || -> Result<bool> {
        let (_control, relay) = socks::associate(world.ask().namespace(), SOCKS5, TIMEOUT)?;
        let socket = world.ask().namespace().udp(Ipv4Addr::LOCALHOST.into())?;
        socket.set_read_timeout(Some(Duration::from_millis(200)))?;
        for target in [Target::Address((WEB, 7).into()), Target::Name(WEB_NAME, 7)] {
            socket.send_to(&socks::datagram(target, b"hello")?, relay)?;
        }
        Ok(socket.recv_from(&mut [0; 512]).is_ok())
    };
    connected || echoed().unwrap_or(false)
}

#[test]
fn without_a_tunnel_the_proxy_refuses_and_no_packet_passes_outside_of_one() -> Result<()> {
    let world = World::build(&[8, 10])?;
    let planted = watch(&world)?;
    plant(&world, &planted)?;
    drop(planted);

    // Before any session.
    let capture = watch(&world)?;
    ensure!(!asks_anything(&world), "the proxy serves without a tunnel");
    // While connected, everything the proxy carries is inside.
    world.pay_and_connect()?;
    ensure!(asks_anything(&world), "the proxy serves nothing while connected");
    // The interface is torn away under the running session: until another tunnel stands, nothing is served outside.
    world.ask().namespace().ip("link del dvpn0")?;
    let until = Instant::now() + Duration::from_secs(4);
    while Instant::now() < until {
        asks_anything(&world);
    }
    // After Stop.
    world.ask().disconnect(CONNECT_PATIENCE)?;
    ensure!(!asks_anything(&world), "the proxy serves after Stop");
    ensure!(
        capture.matched() == 0,
        "{} packets leaked: {:?}",
        capture.matched(),
        capture.samples()
    );
    ensure!(capture.seen() > 0, "the capture saw nothing at all");

    // The same capture, to the end, would have seen it.
    plant(&world, &capture)
}

#[test]
fn after_the_daemon_is_killed_nothing_passes_and_its_proxy_is_gone() -> Result<()> {
    let mut world = World::build(&[8])?;
    world.pay_and_connect()?;
    let capture = watch(&world)?;
    world.client.process.kill()?;
    ensure!(!asks_anything(&world), "a killed daemon serves");
    let at = SocketAddr::from((WEB, 80));
    ensure!(capture.matched() == 0, "{:?}", capture.samples());
    // In application mode programs that ignore the proxy use the network as it is: the capture sees those.
    drop(world.network.client.namespace.connect(at, TIMEOUT));
    capture.wait_for_more(0, Duration::from_secs(2))?;
    Ok(())
}
