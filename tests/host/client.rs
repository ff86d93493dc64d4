//! The client's routes and guard.

use std::{
    net::{IpAddr, UdpSocket},
    time::Duration,
};

use dvpn_daemon::host::{CLIENT_INTERFACE, ClientNetwork, DESTINATION_ELSEWHERE, Host, SOURCE_ELSEWHERE};

use crate::namespace::Namespace;

const WORLD: &str = "ip link add eth0 type veth peer name peer0; ip addr add 192.0.2.1/24 dev eth0; \
    ip addr add 2001:db8::1/64 dev eth0 nodad; ip link set eth0 up; ip link set peer0 up; \
    ip route add default via 192.0.2.254; ip -6 route add default via 2001:db8::ff";

fn network() -> ClientNetwork {
    ClientNetwork {
        interface: CLIENT_INTERFACE.into(),
        addresses: vec!["10.96.0.2/32".parse().unwrap(), "fd00:96::2/128".parse().unwrap()],
        mtu_bytes: 1420,
        routes: vec!["0.0.0.0/0".parse().unwrap(), "::/0".parse().unwrap()],
    }
}

fn guarded() -> Vec<IpAddr> {
    network().addresses.iter().map(ipnetwork::IpNetwork::ip).collect()
}

fn block_on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(work)
}

#[test]
fn client_up_and_down_twice_leaves_the_machine_as_it_was() {
    let here = Namespace::enter_new();
    here.sh(WORLD);
    here.sh("ip tuntap add dvpn0 mode tun; ip rule add from 192.0.2.77 lookup 99; ip route add 198.51.100.0/24 dev eth0 table 3329");
    let before = here.snapshot();
    block_on(async {
        let host = Host::open().unwrap();
        for _ in 0..2 {
            host.set_client_guard(&guarded()).await.unwrap();
            host.client_up(&network()).await.unwrap();
            host.client_up(&network()).await.unwrap();
        }
        let rules = here.sh("ip rule; ip -6 rule");
        assert_eq!(rules.matches("lookup 3329 proto 213").count(), 4, "{rules}");
        assert!(
            here.sh("ip addr show dvpn0")
                .contains("10.96.0.2/32 scope global noprefixroute dvpn0")
        );
        host.client_down().await.unwrap();
        host.set_client_guard(&[]).await.unwrap();
        host.client_down().await.unwrap();
        host.set_client_guard(&[]).await.unwrap();
        here.sh("ip link set dvpn0 down; ip link set dvpn0 mtu 1500");
    });
    assert_eq!(here.snapshot(), before);
}

#[test]
fn only_what_is_bound_to_the_tunnel_goes_through_it_and_it_has_no_other_way_out() {
    let here = Namespace::enter_new();
    here.sh(WORLD);
    here.sh("ip tuntap add dvpn0 mode tun");
    block_on(async {
        let host = Host::open().unwrap();
        host.client_up(&network()).await.unwrap();
        let route = |rest: &str| here.sh(&format!("ip route get {rest} 2>&1 || true"));
        assert!(route("203.0.113.9").contains("dev eth0"));
        assert!(route("203.0.113.9 oif dvpn0").contains("dev dvpn0"));
        assert!(route("203.0.113.9 from 10.96.0.2").contains("dev dvpn0"));
        assert!(route("2001:db8:9::1 from fd00:96::2").contains("dev dvpn0"));
        // A narrower approval, of one family only.
        let narrow = ClientNetwork {
            addresses: vec!["10.96.0.3/32".parse().unwrap()],
            routes: vec!["203.0.113.0/24".parse().unwrap(), "::/0".parse().unwrap()],
            ..network()
        };
        host.client_up(&narrow).await.unwrap();
        assert!(route("203.0.113.9 from 10.96.0.3").contains("dev dvpn0"));
        assert!(route("198.51.100.9 from 10.96.0.3").contains("RTNETLINK answers"));
        assert!(route("2001:db8:9::1 oif dvpn0").contains("RTNETLINK answers"));
        assert!(!here.sh("ip addr show dvpn0; ip rule").contains("10.96.0.2"));
        // The interface dies by itself: still no other way.
        here.sh("ip link del dvpn0");
        here.sh("ip addr add 10.96.0.3/32 dev lo");
        assert!(route("203.0.113.9 from 10.96.0.3").contains("RTNETLINK answers"));
    });
}

/// Packets and bytes that left by `eth0`, as its other end sees them.
fn captured(socket: &UdpSocket) -> bool {
    let mut buffer = [0; 64];
    socket.recv(&mut buffer).is_ok()
}

#[test]
fn a_planted_leak_is_seen_without_the_guard_and_dropped_with_it() {
    let here = Namespace::enter_new();
    let outside = Namespace::new();
    here.sh(&format!(
        "ip link add eth0 type veth peer name out0 netns {}; ip addr add 192.0.2.1/24 dev eth0; ip link set eth0 up; \
         ip tuntap add dvpn0 mode tun; ip addr add 10.96.0.2/32 dev dvpn0; ip link set dvpn0 up",
        outside.path()
    ));
    outside.sh("ip addr add 192.0.2.9/24 dev out0; ip link set out0 up; ip route add 10.96.0.2 via 192.0.2.1");
    let sink = outside.run(|| UdpSocket::bind("192.0.2.9:5000").unwrap());
    sink.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    let leak = UdpSocket::bind("10.96.0.2:4000").unwrap();
    leak.set_read_timeout(Some(Duration::from_millis(500))).unwrap();

    leak.send_to(b"planted", "192.0.2.9:5000").unwrap();
    assert!(
        captured(&sink),
        "the capture must see a leak before its absence means anything"
    );
    sink.send_to(b"inward", "10.96.0.2:4000").unwrap();
    assert!(captured(&leak), "and the way in must be open");

    let host = block_on(async {
        let host = Host::open().unwrap();
        host.set_client_guard(&guarded()).await.unwrap();
        host
    });
    // netfilter answers EPERM to a local sender whose packet it drops.
    drop(leak.send_to(b"dropped", "192.0.2.9:5000"));
    sink.send_to(b"inward", "10.96.0.2:4000").unwrap();
    assert!(!captured(&leak));
    sink.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    assert!(!captured(&sink));
    let counters = host.client_counters().unwrap();
    assert_eq!(counters[SOURCE_ELSEWHERE].packets, 1);
    assert_eq!(counters[DESTINATION_ELSEWHERE].packets, 1);
}

#[test]
fn a_refused_transaction_does_not_spoil_the_next_one() {
    let here = Namespace::enter_new();
    here.sh(WORLD);
    block_on(async {
        let (first, second) = (Host::open().unwrap(), Host::open().unwrap());
        first.set_client_guard(&guarded()).await.unwrap();
        // The table is the first one's, where the kernel lets it be anybody's.
        let _refused = second.set_client_guard(&guarded()).await;
        first.set_client_guard(&[]).await.unwrap();
        for _ in 0..2 {
            second.set_client_guard(&guarded()).await.unwrap();
        }
        assert!(here.sh("nft list ruleset").contains("10.96.0.2"));
    });
}
