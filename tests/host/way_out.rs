//! Which changes of a machine's network count as another way out.

use std::{pin::pin, time::Duration};

use dvpn_daemon::host::Host;
use futures::{Stream, StreamExt as _};
use tokio::{runtime::Runtime, time::timeout};

use crate::namespace::Namespace;

/// Longer than the machine's changes are gathered before they are reported.
const QUIET: Duration = Duration::from_millis(1500);
const PATIENCE: Duration = Duration::from_secs(5);

async fn is_reported(changes: &mut (impl Stream<Item = ()> + Unpin), within: Duration) -> bool {
    timeout(within, changes.next()).await.is_ok()
}

#[test]
fn only_another_way_to_the_internet_is_a_change_of_the_network() {
    let here = Namespace::enter_new();
    let (router, container) = (Namespace::new(), Namespace::new());
    // Without duplicate detection, whose end would come as a change of its own.
    here.sh("for f in /proc/sys/net/ipv6/conf/*/accept_dad; do echo 0 > $f; done");
    here.sh(&format!(
        "ip link add wan0 type veth peer name host0 netns {}; ip addr add 192.0.2.2/24 dev wan0; ip link set wan0 up; \
         ip link add lan0 type veth peer name host1 netns {}; ip addr add 192.0.3.2/24 dev lan0; ip link set lan0 up",
        router.path(),
        router.path()
    ));
    router.sh("ip link set host0 up; ip link set host1 up");
    here.sh("ip route add default via 192.0.2.1");
    Runtime::new().unwrap().block_on(async {
        let host = Host::open().unwrap();
        let mut changes = pin!(host.way_out_changes().await.unwrap());
        // Link-local addresses appear as carriers do.
        while is_reported(&mut changes, QUIET).await {}

        let unrelated = [
            format!(
                "ip link add docker0 type bridge; ip addr add 172.17.0.1/16 dev docker0; ip link set docker0 up; \
                 ip link add veth1 type veth peer name eth0 netns {}; ip link set veth1 master docker0 up",
                container.path()
            ),
            "ip addr add 192.0.3.3/24 dev lan0; ip route add 10.9.0.0/16 dev lan0; ip link set lan0 down".to_owned(),
            "ip link del docker0; ip link del veth1".to_owned(),
        ];
        for script in unrelated {
            here.sh(&script);
            assert!(!is_reported(&mut changes, QUIET).await, "{script}");
        }

        let another_way = [
            "ip link set lan0 up; ip route replace default via 192.0.3.1",
            "ip addr add 192.0.3.9/24 dev lan0",
            "ip route add 0.0.0.0/1 via 192.0.2.1",
            "ip route add default via 192.0.2.1 table 100",
            "ip route del default",
            "ip route add default nexthop via 192.0.2.1 nexthop via 192.0.3.1",
        ];
        for script in another_way {
            here.sh(script);
            assert!(is_reported(&mut changes, PATIENCE).await, "{script}");
            while is_reported(&mut changes, QUIET).await {}
        }
        router.sh("ip link set host0 down");
        assert!(
            is_reported(&mut changes, PATIENCE).await,
            "the cable of the uplink is pulled"
        );
    });
}

#[test]
fn a_network_is_told_by_its_interface_and_router() {
    let here = Namespace::enter_new();
    let (home, away) = (Namespace::new(), Namespace::new());
    for (number, router) in [(0, &home), (1, &away)] {
        // Two networks of the same numbers, as most homes are.
        here.sh(&format!(
            "ip link add wan{number} type veth peer name eth0 netns {}; ip link set wan{number} up",
            router.path()
        ));
        router.sh("ip link set eth0 up; ip addr add 192.0.2.1/24 dev eth0");
    }
    Runtime::new().unwrap().block_on(async {
        let network = async || Host::open().unwrap().network_id().await.unwrap();
        assert_eq!(network().await, None, "no way out");
        here.sh("ip addr add 192.0.2.2/24 dev wan0; ip route add default via 192.0.2.1 metric 100");
        let first = network().await;
        assert!(first.is_some());
        here.sh("ip neigh flush dev wan0; ip addr add 192.0.2.3/24 dev wan0; ip route add 10.0.0.0/8 via 192.0.2.9");
        assert_eq!(network().await, first, "addresses and other routes make no other network");

        // A better route by another interface, where a router has the same address.
        here.sh("ip addr add 192.0.2.2/24 dev wan1; ip route add default via 192.0.2.1 dev wan1 metric 50");
        let second = network().await;
        assert!(second.is_some() && second != first, "{second:?}");
        here.sh("ip route del default dev wan1");
        assert_eq!(network().await, first, "back");

        home.sh("ip link set eth0 down; ip link set eth0 address 02:00:00:00:00:07; ip link set eth0 up");
        here.sh("ip neigh flush dev wan0");
        let third = network().await;
        assert!(third.is_some() && third != first, "another router at the same address");

        // By IPv6 alone; a router without an answer still tells a network.
        here.sh("ip route del default; ip -6 route add default via fe80::7 dev wan0");
        let fourth = network().await;
        assert!(fourth.is_some() && fourth != third);
        here.sh("ip -6 route del default; ip link add tun0 type dummy 2>/dev/null || ip tuntap add tun0 mode tun; ip link set tun0 up");
        here.sh("ip route add default dev tun0");
        assert!(network().await.is_some(), "no router, only an interface");
    });
}
