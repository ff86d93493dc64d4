//! What is left after `kill -9`, and its removal.

use std::path::Path;

use dvpn_daemon::host::{CLIENT_INTERFACE, ClientNetwork, Error, Host, PROVIDER_INTERFACE, ProviderNetwork};

use crate::namespace::Namespace;

fn run<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(work)
}

#[test]
fn cleanup_removes_all_that_a_killed_daemon_left_and_nothing_else() {
    let here = Namespace::enter_new();
    here.sh(
        "ip link add eth0 type veth peer name peer0; ip addr add 192.0.2.1/24 dev eth0; ip link set eth0 up; \
         ip link set peer0 up; ip route add default via 192.0.2.254; ip rule add from 10.1.1.1 lookup 99; \
         nft add table inet somebody; ip addr add 2001:db8::1/64 dev eth0 nodad",
    );
    let before = here.snapshot();
    // A daemon that does not come to its end: its descriptors are closed, and nothing else.
    run(async {
        here.sh("ip tuntap add dvpn0 mode tun; ip tuntap add dvpnp0 mode tun");
        let host = Host::open().unwrap();
        let network = ClientNetwork {
            interface: CLIENT_INTERFACE.into(),
            addresses: vec!["10.96.0.2/32".parse().unwrap(), "fd00:96::2/128".parse().unwrap()],
            mtu_bytes: 1420,
            routes: vec!["0.0.0.0/0".parse().unwrap(), "::/0".parse().unwrap()],
        };
        let addresses: Vec<_> = network.addresses.iter().map(ipnetwork::IpNetwork::ip).collect();
        host.set_client_guard(&addresses).await.unwrap();
        host.client_up(&network).await.unwrap();
        let network = ProviderNetwork {
            interface: PROVIDER_INTERFACE.into(),
            networks: vec!["10.96.16.1/20".parse().unwrap(), "fd00:97::1/64".parse().unwrap()],
            mtu_bytes: 1420,
            public: Vec::new(),
        };
        host.provider_up(&network).await.unwrap();
        drop(host);
    });
    assert!(here.sh("cat /proc/sys/net/ipv4/conf/eth0/forwarding").starts_with('1'));
    assert!(
        here.sh("cat /proc/sys/net/ipv4/ip_forward").starts_with('0'),
        "the machine as a whole is no router"
    );
    assert_ne!(here.snapshot(), before);
    run(async {
        let host = Host::open().unwrap();
        let report = host.cleanup(Path::new("/sys/fs/bpf/dvpn-absent")).await;
        let said: Vec<String> = report.into_iter().map(Result::unwrap).collect();
        for part in [
            "interface dvpn0",
            "interface dvpnp0",
            "rules",
            "routes",
            "setting",
            "inet dvpn",
            "inet dvpn_provider",
        ] {
            assert!(said.iter().any(|line| line.contains(part)), "{part} in {said:?}");
        }
        assert_eq!(here.snapshot(), before);
        assert!(
            host.cleanup(Path::new("/sys/fs/bpf/dvpn-absent")).await.is_empty(),
            "a second cleanup finds nothing"
        );
    });
}

#[test]
fn cleanup_leaves_a_stranger_by_our_name_alone_and_still_does_the_rest() {
    let here = Namespace::enter_new();
    here.sh("ip link add dvpn0 type veth peer name other; nft add table inet dvpn");
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("file"), "not a pin").unwrap();
    run(async {
        let report = Host::open().unwrap().cleanup(folder.path()).await;
        assert!(
            matches!(&report[0], Err(Error::ForeignInterface { kind, .. }) if kind == "veth"),
            "{report:?}"
        );
        assert!(
            matches!(&report[1], Ok(line) if line.contains("inet dvpn")),
            "{report:?}"
        );
        assert!(matches!(&report[2], Err(Error::NotBpf(_))), "{report:?}");
    });
    assert!(here.sh("ip link").contains("dvpn0"));
    assert!(folder.path().join("file").exists());
}

#[test]
fn a_setting_that_somebody_else_changed_meanwhile_is_not_put_back() {
    let here = Namespace::enter_new();
    here.sh(
        "ip link add eth0 type veth peer name peer0; ip addr add 192.0.2.1/24 dev eth0; ip link set eth0 up; \
         ip route add default via 192.0.2.254; ip tuntap add dvpnp0 mode tun",
    );
    run(async {
        let host = Host::open().unwrap();
        let network = ProviderNetwork {
            interface: PROVIDER_INTERFACE.into(),
            networks: vec!["10.96.16.1/20".parse().unwrap()],
            mtu_bytes: 1420,
            public: Vec::new(),
        };
        host.provider_up(&network).await.unwrap();
        here.sh("echo 1 > /proc/sys/net/ipv4/ip_forward");
        host.provider_refresh().await.unwrap();
        assert!(
            !here
                .sh("nft list table inet dvpn_provider")
                .contains("\"transit\" drop"),
            "a router forwards for others"
        );
        host.provider_down().await.unwrap();
    });
    assert!(here.sh("cat /proc/sys/net/ipv4/conf/eth0/forwarding").starts_with('1'));
}
