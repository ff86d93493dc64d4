//! What one client may open, what it is counted with, and whom a provider forwards for besides.

use std::{
    net::{IpAddr, UdpSocket},
    time::{Duration, Instant},
};

use dvpn_daemon::host::{CONNECTION_BURST, CONNECTIONS_PER_SECOND, MAX_CONNECTIONS, refused};

use crate::{
    isolation::{World, ask, whoami, world_after},
    namespace::Namespace,
};

fn world() -> World {
    world_after(|_, _| {})
}

/// Begins `count` connections from the client: one datagram from a port of its own each. No answer comes.
fn begin(place: &Namespace, from: &str, ports: std::ops::Range<u16>) {
    place.run(|| {
        for port in ports {
            let socket = UdpSocket::bind((from.parse::<IpAddr>().unwrap(), port)).unwrap();
            // The node's refusal is silent; a full queue of the link is not our matter.
            drop(socket.send_to(b"x", "203.0.113.80:9"));
        }
    });
}

/// What should be reachable is, on however busy a machine: asked until it answers.
fn reaches(place: &Namespace, to: &str) -> bool {
    let deadline = Instant::now() + Duration::from_secs(10);
    while Instant::now() < deadline {
        if ask(place, to).is_some() {
            return true;
        }
    }
    false
}

fn carried(world: &World, address: &str) -> u64 {
    let all = world.host.provider_carried().unwrap();
    all.get(&address.parse().unwrap())
        .map_or(0, |carried| carried.sent.packets)
}

#[test]
fn ten_thousand_connections_at_once_are_refused_and_hurt_nobody_else() {
    let world = world();
    whoami(&world.upstream, 80);
    world.upstream.sh("nft add table inet quiet; nft 'add chain inet quiet in { type filter hook input priority 0; }'; nft add rule inet quiet in udp dport 9 drop");
    let started = Instant::now();
    begin(&world.client, "10.96.0.2", 20_000..30_000);
    let may_pass = u64::from(CONNECTION_BURST) + CONNECTIONS_PER_SECOND * (started.elapsed().as_secs() + 1);
    let (passed, refused) = (carried(&world, "10.96.0.2"), world.refused(refused::TOO_FAST));
    assert!(
        passed >= u64::from(CONNECTION_BURST) && passed <= may_pass,
        "{passed} of 10,000 passed, at most {may_pass} expected"
    );
    assert_eq!(passed + refused, 10_000, "each one is counted");
    // The client itself has to wait; the next one and the node do not.
    world.client.sh("ip route replace default via 10.96.0.1 src 10.96.0.3");
    assert_eq!(ask(&world.client, "203.0.113.80:80").as_deref(), Some("198.51.100.1"));
    assert!(reaches(&world.here, "203.0.113.80:80"));
    // Connections that stand are not asked again, however many packets they have without an answer.
    world.client.run(|| {
        let socket = UdpSocket::bind("10.96.0.3:0").unwrap();
        for _ in 0..2000 {
            drop(socket.send_to(b"x", "203.0.113.80:9"));
        }
    });
    assert!(carried(&world, "10.96.0.3") > 2000);
}

#[test]
fn a_client_has_so_many_connections_open_and_no_more() {
    let world = world();
    whoami(&world.upstream, 80);
    world.upstream.sh("nft add table inet quiet; nft 'add chain inet quiet in { type filter hook input priority 0; }'; nft add rule inet quiet in udp dport 9 drop");
    // Long enough that none of them is forgotten while the others come, on however slow a machine.
    world
        .here
        .sh("echo 600 > /proc/sys/net/netfilter/nf_conntrack_udp_timeout");
    let deadline = Instant::now() + Duration::from_mins(2);
    let mut port = 10_000;
    while world.refused(refused::TOO_MANY) == 0 {
        assert!(Instant::now() < deadline, "{} are open", carried(&world, "10.96.0.2"));
        begin(&world.client, "10.96.0.2", port..port + 40);
        port += 40;
        std::thread::sleep(Duration::from_millis(150));
    }
    assert_eq!(carried(&world, "10.96.0.2"), u64::from(MAX_CONNECTIONS));
    world.client.sh("ip route replace default via 10.96.0.1 src 10.96.0.3");
    assert!(
        reaches(&world.client, "203.0.113.80:80"),
        "another client's count is its own"
    );
}

#[test]
fn clients_connections_are_in_a_zone_of_their_own_and_counted_both_ways() {
    let world = world();
    whoami(&world.upstream, 80);
    assert!(reaches(&world.client, "203.0.113.80:80"));
    assert!(reaches(&world.client, "[2001:db8:9::80]:80"));
    assert!(reaches(&world.here, "203.0.113.80:80"));
    let tracked = world.here.sh("cat /proc/net/nf_conntrack");
    let of = |source: &str| -> Vec<&str> { tracked.lines().filter(|line| line.contains(source)).collect() };
    let (ours, own) = (of("src=10.96.0.2 "), of("src=198.51.100.1 dst=203.0.113.80 "));
    assert!(
        !ours.is_empty() && ours.iter().all(|line| line.contains("zone-orig=3409")),
        "{tracked}"
    );
    assert!(own.iter().any(|line| !line.contains("zone-orig")), "{tracked}");
    let all = world.host.provider_carried().unwrap();
    for address in ["10.96.0.2", "fd00:96::2"] {
        let carried = all[&address.parse::<IpAddr>().unwrap()];
        // SYN, ACK, FIN at the least each way; headers and the answer.
        assert!(
            carried.sent.packets >= 3 && carried.received.packets >= 3,
            "{address}: {carried:?}"
        );
        assert!(
            carried.sent.bytes >= 120 && carried.received.bytes >= 120,
            "{address}: {carried:?}"
        );
    }
    // A change of the rules keeps what was counted.
    world.runtime.block_on(world.host.provider_refresh()).unwrap();
    assert_eq!(world.host.provider_carried().unwrap().len(), all.len());
}

#[test]
fn the_nodes_public_address_is_no_way_back_to_its_services() {
    let world = world();
    whoami(&world.upstream, 80);
    // The router in front of the node has its public address and would send the packet back.
    world.upstream.sh("ip addr add 203.0.113.200/32 dev lo");
    assert!(reaches(&world.client, "203.0.113.200:80"));
    let public = vec!["203.0.113.200".parse().unwrap()];
    world.runtime.block_on(world.host.provider_public(public)).unwrap();
    world.assert_refused("203.0.113.200:80", refused::NODE);
    assert!(reaches(&world.client, "203.0.113.80:80"));
}

const LAN_V6: &str = "ip addr add 2001:db8:77::1/64 dev lan0 nodad";
const HOST_V6: &str = "ip addr add 2001:db8:77::9/64 dev host0 nodad; ip -6 route add default via 2001:db8:77::1";

#[test]
fn an_ipv6_network_that_the_node_is_on_is_refused() {
    let world = world_after(|here, lan| {
        here.sh(LAN_V6);
        lan.sh(HOST_V6);
    });
    whoami(&world.lan, 80);
    assert!(reaches(&world.here, "[2001:db8:77::9]:80"));
    world.assert_refused("[2001:db8:77::9]:80", refused::ON_LINK);
    world.assert_refused("[2001:db8:1::ff]:80", refused::ON_LINK);
}

/// Makes this thread's /proc that of a kernel before 6.17: no `force_forwarding`, one switch for all interfaces.
fn older_kernel(here: &Namespace) {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
    here.sh(
        "mount --make-rprivate /; real=$(mktemp); all=/proc/sys/net/ipv6/conf/all
         mount --bind $all/forwarding $real; mount -t tmpfs none $all; touch $all/forwarding
         mount --bind $real $all/forwarding",
    );
    assert!(!std::path::Path::new("/proc/sys/net/ipv6/conf/all/force_forwarding").exists());
}

#[test]
fn on_an_older_kernel_ipv6_is_forwarded_for_clients_and_for_nobody_else() {
    let world = world_after(|here, lan| {
        here.sh(LAN_V6);
        lan.sh(HOST_V6);
        // Being a router for IPv4 says nothing of IPv6.
        here.sh("echo 1 > /proc/sys/net/ipv4/ip_forward");
        older_kernel(here);
    });
    whoami(&world.upstream, 80);
    whoami(&world.lan, 80);
    world
        .upstream
        .sh("ip -6 route add 2001:db8:77::/64 via 2001:db8:1::1; ip route add 192.168.7.0/24 via 198.51.100.1");
    let forwarding = || std::fs::read_to_string("/proc/sys/net/ipv6/conf/all/forwarding").unwrap();
    assert_eq!(forwarding().trim(), "1", "there is no other switch");
    assert!(reaches(&world.client, "[2001:db8:9::80]:80"));
    for (place, to) in [
        (&world.lan, "[2001:db8:9::80]:80"),
        (&world.upstream, "[2001:db8:77::9]:80"),
    ] {
        let before = world.refused(refused::TRANSIT);
        assert_eq!(ask(place, to), None, "{to}");
        assert!(world.refused(refused::TRANSIT) > before, "{to}");
    }
    assert!(reaches(&world.upstream, "192.168.7.9:80"), "IPv4 it forwarded before");
    world.runtime.block_on(world.host.provider_refresh()).unwrap();
    assert_eq!(
        ask(&world.lan, "[2001:db8:9::80]:80"),
        None,
        "a refresh knows that the switch was ours"
    );
    world.runtime.block_on(world.host.provider_down()).unwrap();
    assert_eq!(forwarding().trim(), "0");
}

#[test]
fn a_machine_that_routed_ipv6_before_goes_on_routing_it() {
    let world = world_after(|here, lan| {
        here.sh(LAN_V6);
        lan.sh(HOST_V6);
        here.sh("echo 1 > /proc/sys/net/ipv6/conf/all/forwarding");
    });
    whoami(&world.lan, 80);
    whoami(&world.upstream, 80);
    world
        .upstream
        .sh("ip -6 route add 2001:db8:77::/64 via 2001:db8:1::1; ip route add 192.168.7.0/24 via 198.51.100.1");
    assert!(reaches(&world.upstream, "[2001:db8:77::9]:80"));
    assert!(reaches(&world.lan, "[2001:db8:9::80]:80"));
    assert_eq!(
        ask(&world.upstream, "192.168.7.9:80"),
        None,
        "IPv4 it did not forward before"
    );
}
