//! What a provider's client reaches and what not. The client's tunnel is a veth by the tunnel's name, so that these
//! tests are about the policy alone; whatever WireGuard delivers looks the same to it. Like a tunnel it resolves no
//! neighbours: both ends have one link address.
//!
//! ```text
//! client ns ── dvpnp0 ─ node (this ns) ─ eth0 ── upstream ns (router, 198.51.100.254; web server 203.0.113.80)
//! other ns  ──┘ (same interface's network)  └ lan0 ── LAN ns (192.168.7.9)
//! ```

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    time::Duration,
};

use dvpn_daemon::host::{Host, PROVIDER_INTERFACE, ProviderNetwork, refused};

use crate::namespace::Namespace;

const PATIENCE: Duration = Duration::from_millis(400);

pub(crate) struct World {
    pub(crate) here: Namespace,
    pub(crate) client: Namespace,
    pub(crate) upstream: Namespace,
    pub(crate) lan: Namespace,
    pub(crate) host: Host,
    pub(crate) runtime: tokio::runtime::Runtime,
}

fn network() -> ProviderNetwork {
    ProviderNetwork {
        interface: PROVIDER_INTERFACE.into(),
        networks: vec!["10.96.0.1/20".parse().unwrap(), "fd00:96::1/64".parse().unwrap()],
        mtu_bytes: 1420,
        public: Vec::new(),
    }
}

fn world() -> World {
    world_after(|_, _| {})
}

/// The same with something done to the node and its LAN before the provider side comes up.
pub(crate) fn world_after(prepare: impl FnOnce(&Namespace, &Namespace)) -> World {
    let here = Namespace::enter_new();
    let (client, upstream, lan) = (Namespace::new(), Namespace::new(), Namespace::new());
    here.sh(&format!(
        "ip link add dvpnp0 address 02:00:00:00:00:01 type veth peer name tun0 address 02:00:00:00:00:01 netns {}
         ip link set dvpnp0 arp off
         ip link add eth0 type veth peer name up0 netns {}
         ip link add lan0 type veth peer name host0 netns {}
         ip addr add 198.51.100.1/24 dev eth0; ip addr add 2001:db8:1::1/64 dev eth0 nodad; ip link set eth0 up
         ip addr add 192.168.7.1/24 dev lan0; ip addr add 203.0.114.1/24 dev lan0; ip link set lan0 up
         ip route add default via 198.51.100.254; ip -6 route add default via 2001:db8:1::ff",
        client.path(),
        upstream.path(),
        lan.path()
    ));
    client.sh(
        "ip link set tun0 arp off; ip addr add 10.96.0.2/20 dev tun0; ip addr add 10.96.0.3/20 dev tun0; ip addr add fd00:96::2/64 dev tun0 nodad
         ip addr add 10.96.99.9/32 dev tun0
         ip link set tun0 up; ip route add default via 10.96.0.1; ip -6 route add default via fd00:96::1",
    );
    // The upstream answers for every address in question: what is refused is refused by the node, not by absence.
    upstream.sh(
        "ip addr add 198.51.100.254/24 dev up0; ip addr add 2001:db8:1::ff/64 dev up0 nodad; ip link set up0 up
         for a in 203.0.113.80 10.1.2.3 172.20.0.9 192.168.9.9 100.64.0.9 169.254.169.254 198.18.0.9; do
         ip addr add $a/32 dev lo; done
         ip -6 addr add 2001:db8:9::80/128 dev lo nodad; ip -6 addr add fd99::9/128 dev lo nodad",
    );
    lan.sh(
        "ip addr add 192.168.7.9/24 dev host0; ip addr add 203.0.114.9/24 dev host0; ip link set host0 up
         ip route add default via 192.168.7.1",
    );
    prepare(&here, &lan);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let host = runtime.block_on(async {
        let host = Host::open().unwrap();
        host.provider_up(&network()).await.unwrap();
        host
    });
    World {
        here,
        client,
        upstream,
        lan,
        host,
        runtime,
    }
}

/// A TCP server that answers each connection with the address it sees, on every address of its namespace.
pub(crate) fn whoami(place: &Namespace, port: u16) {
    for any in ["0.0.0.0", "[::]"] {
        let listener = place.run(|| {
            let address: SocketAddr = format!("{any}:{port}").parse().unwrap();
            let domain = if address.is_ipv4() {
                socket2::Domain::IPV4
            } else {
                socket2::Domain::IPV6
            };
            let socket = socket2::Socket::new(domain, socket2::Type::STREAM, None).unwrap();
            if address.is_ipv6() {
                socket.set_only_v6(true).unwrap();
            }
            socket.bind(&address.into()).unwrap();
            socket.listen(16).unwrap();
            TcpListener::from(socket)
        });
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let seen = stream.peer_addr().unwrap().ip();
                drop(write!(&stream, "{seen}"));
            }
        });
    }
}

/// What the server at `to` answers to somebody in `place`; nothing if it cannot be reached.
pub(crate) fn ask(place: &Namespace, to: &str) -> Option<String> {
    place.run(|| {
        let mut stream = TcpStream::connect_timeout(&to.parse().unwrap(), PATIENCE).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        Some(answer)
    })
}

impl World {
    pub(crate) fn refused(&self, counter: &str) -> u64 {
        self.host.provider_counters().unwrap()[counter].packets
    }

    /// The packet to `to` is refused, and by that counter.
    pub(crate) fn assert_refused(&self, to: &str, counter: &str) {
        let before = self.refused(counter);
        assert_eq!(ask(&self.client, to), None, "{to} must not be reachable");
        assert!(self.refused(counter) > before, "{to} must be refused as {counter}");
    }
}

#[test]
fn the_internet_is_reached_and_sees_the_node_not_the_client() {
    let world = world();
    whoami(&world.upstream, 80);
    assert_eq!(ask(&world.client, "203.0.113.80:80").as_deref(), Some("198.51.100.1"));
    assert_eq!(
        ask(&world.client, "[2001:db8:9::80]:80").as_deref(),
        Some("2001:db8:1::1")
    );
}

#[test]
fn networks_that_are_not_the_internet_are_refused() {
    let world = world();
    whoami(&world.upstream, 80);
    whoami(&world.lan, 80);
    // First that each is reachable but for the policy: from the node itself.
    for there in [
        "192.168.7.9:80",
        "203.0.114.9:80",
        "10.1.2.3:80",
        "169.254.169.254:80",
        "100.64.0.9:80",
    ] {
        assert!(
            ask(&world.here, there).is_some(),
            "{there} must be reachable from the node"
        );
    }
    for special in [
        "192.168.7.9:80",
        "10.1.2.3:80",
        "172.20.0.9:80",
        "192.168.9.9:80",
        "100.64.0.9:80",
        "169.254.169.254:80",
        "198.18.0.9:80",
        "[fd99::9]:80",
        "[64:ff9b::c0a8:709]:80",
    ] {
        let before = world.refused(refused::SPECIAL) + world.refused(refused::ON_LINK);
        assert_eq!(ask(&world.client, special), None, "{special}");
        assert!(
            world.refused(refused::SPECIAL) + world.refused(refused::ON_LINK) > before,
            "{special}"
        );
    }
    // Public addresses, but the node's own LAN and the uplink's neighbours.
    world.assert_refused("203.0.114.9:80", refused::ON_LINK);
    world.assert_refused("198.51.100.254:80", refused::ON_LINK);
    world.assert_refused("203.0.113.80:25", refused::SMTP);
    // Multicast and broadcast are not forwarded even where a router would.
    let sent = world.client.run(|| {
        let socket = UdpSocket::bind("10.96.0.2:0").unwrap();
        socket.send_to(b"x", "239.1.2.3:1900").is_ok()
    });
    assert!(sent);
    assert!(!world.upstream.sh("cat /proc/net/dev").is_empty());
}

#[test]
fn the_nodes_own_services_are_closed_but_dns_and_ping_at_the_gateway() {
    let world = world();
    whoami(&world.here, 80);
    whoami(&world.here, 53);
    for own in [
        "10.96.0.1:80",
        "198.51.100.1:80",
        "192.168.7.1:80",
        "[2001:db8:1::1]:80",
        "198.51.100.1:53",
    ] {
        world.assert_refused(own, refused::NODE);
    }
    assert_eq!(ask(&world.client, "10.96.0.1:53").as_deref(), Some("10.96.0.2"));
    assert_eq!(ask(&world.client, "[fd00:96::1]:53").as_deref(), Some("fd00:96::2"));
    assert!(world.client.sh("ping -c1 -W1 10.96.0.1").contains("1 received"));
    // The gateway is the clients' alone.
    world.lan.sh("ip route add 10.96.0.1 via 192.168.7.1");
    let before = world.refused(refused::GATEWAY);
    assert_eq!(ask(&world.lan, "10.96.0.1:53"), None);
    assert!(world.refused(refused::GATEWAY) > before);
}

#[test]
fn clients_do_not_reach_each_other_and_nobody_reaches_them() {
    let world = world();
    // A second client behind the same interface; the node would have to send the packet back where it came from.
    world
        .client
        .sh("ip addr del 10.96.0.3/20 dev tun0; ip route add 10.96.0.3 via 10.96.0.1");
    world.assert_refused("10.96.0.3:80", refused::PEER);
    // From outside, and from the node itself.
    whoami(&world.client, 80);
    world.upstream.sh("ip route add 10.96.0.0/20 via 198.51.100.1");
    let before = world.refused(refused::INBOUND);
    assert_eq!(ask(&world.upstream, "10.96.0.2:80"), None);
    assert_eq!(ask(&world.here, "10.96.0.2:80"), None);
    assert!(world.refused(refused::INBOUND) >= before + 2);
}

#[test]
fn an_address_that_is_no_clients_is_refused() {
    let world = world();
    whoami(&world.upstream, 80);
    world.client.sh("ip route replace default via 10.96.0.1 src 10.96.99.9");
    world
        .here
        .sh("ip route add 10.96.99.9 dev dvpnp0; echo 0 > /proc/sys/net/ipv4/conf/dvpnp0/rp_filter");
    world.assert_refused("203.0.113.80:80", refused::SPOOFED);
}

#[test]
fn a_network_that_appears_later_is_refused_as_soon_as_it_is_there() {
    let world = world();
    whoami(&world.lan, 80);
    whoami(&world.upstream, 80);
    world.upstream.sh("ip addr add 203.0.115.9/32 dev lo");
    assert!(
        ask(&world.client, "203.0.115.9:80").is_some(),
        "reachable upstream while it is not on-link"
    );
    world.runtime.block_on(async {
        let mut changes = world.host.network_changes().await.unwrap();
        world.here.sh("ip addr add 203.0.115.1/24 dev lan0");
        let change = futures::StreamExt::next(&mut changes);
        tokio::time::timeout(Duration::from_secs(3), change)
            .await
            .expect("the change is reported")
            .unwrap();
        world.host.provider_refresh().await.unwrap();
        // The kernel's own link-local addresses settle for a while; after that, our changes are none.
        let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
        while tokio::time::timeout(Duration::from_secs(2), futures::StreamExt::next(&mut changes))
            .await
            .is_ok()
        {
            assert!(tokio::time::Instant::now() < deadline, "the machine becomes quiet");
        }
        world
            .here
            .sh("ip addr add 10.96.0.77/32 dev dvpnp0; ip addr del 10.96.0.77/32 dev dvpnp0");
        let silence = tokio::time::timeout(Duration::from_secs(1), futures::StreamExt::next(&mut changes)).await;
        assert!(silence.is_err());
    });
    let before = world.refused(refused::ON_LINK);
    assert!(before == 0, "counters go on over a refresh");
    world.lan.sh("ip addr add 203.0.115.9/24 dev host0");
    world.assert_refused("203.0.115.9:80", refused::ON_LINK);
}

#[test]
fn a_node_that_was_no_router_forwards_for_nobody_else_and_is_none_afterwards() {
    let world = world();
    whoami(&world.lan, 80);
    whoami(&world.upstream, 80);
    world.upstream.sh("ip route add 192.168.7.0/24 via 198.51.100.1");
    let before = world.refused(refused::TRANSIT);
    assert_eq!(ask(&world.upstream, "192.168.7.9:80"), None);
    assert!(
        world.refused(refused::TRANSIT) > before,
        "forwarding of the uplink was ours, so we close it for others"
    );
    assert_eq!(
        ask(&world.lan, "203.0.113.80:80"),
        None,
        "the LAN's interface was not switched on"
    );
    world.runtime.block_on(world.host.provider_down()).unwrap();
    assert_eq!(world.here.sh("nft list ruleset"), "");
    assert_eq!(
        world
            .here
            .sh("cat /proc/sys/net/ipv4/conf/eth0/forwarding /proc/sys/net/ipv4/conf/dvpnp0/forwarding"),
        "0\n0\n"
    );
    assert!(!world.here.sh("ip addr show dvpnp0").contains("10.96"));
}
