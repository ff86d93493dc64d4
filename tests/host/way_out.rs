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
