//! What only the kernel's WireGuard does. wg(8) and ip(8) are the witnesses.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use dvpn_common::status::TunnelBackend;
use dvpn_daemon::tunnel::{self, Error, PeerConfig, PeerStats, Renewal, Tunnel, userspace::UserspaceTunnel};
use ipnetwork::IpNetwork;

use crate::{
    bed::{INTERFACE, PORT, Pair, SOON, Setup, config, key, open, pair},
    create,
    peers::{PEERS, many},
    side::{self, Side},
};

#[test]
fn the_kernel_is_preferred_and_the_link_is_as_configured() -> Result<()> {
    let side = Side::new()?;
    let tunnel = side.run(async {
        let mut config = config(2, Setup::default());
        config.fwmark = 0x0d00_0000;
        config.mtu_bytes = 1280;
        config.peers[0].keepalive = Some(Duration::from_secs(25));
        tunnel::create(config).await
    })??;
    ensure!(tunnel.backend() == TunnelBackend::Kernel, "{:?}", tunnel.backend());
    let link = side.sh(&format!("ip -d -o link show {INTERFACE}"))?;
    ensure!(
        link.contains("wireguard") && link.contains("mtu 1280") && !link.contains(",UP"),
        "{link}"
    );
    let seen = side.sh(&format!("wg show {INTERFACE} dump"))?;
    let lines: Vec<Vec<&str>> = seen.lines().map(|line| line.split('\t').collect()).collect();
    ensure!(
        lines.len() == 2 && lines[0][2] == PORT.to_string() && lines[0][3] == "0xd000000",
        "port and mark of:\n{}",
        lines[0][1..].join(" ")
    );
    let peer = &lines[1];
    ensure!(
        peer[0] == key(1).1.to_string() && peer[3] == "10.88.0.1/32,fd88::1/128" && peer[7] == "25",
        "{peer:?}"
    );
    Ok(())
}

#[test]
fn what_a_killed_daemon_left_is_replaced_and_what_others_made_is_not() -> Result<()> {
    let side = Side::new()?;
    side.sh(&format!("ip link add {INTERFACE} type wireguard"))?;
    let before = side.sh(&format!(
        "cat /sys/class/net/{INTERFACE}/ifindex || ip -o link show {INTERFACE}"
    ))?;
    let tunnel = side.run(create(config(2, Setup::default())))??;
    let after = side.sh(&format!("ip -o link show {INTERFACE}"))?;
    ensure!(!after.starts_with(before.trim()), "the old link stayed: {after}");
    side.run(tunnel.close())?;
    side.sh(&format!("ip link add {INTERFACE} type veth peer name other"))?;
    let refused = side.run(tunnel::create(config(2, Setup::default())))?.err();
    ensure!(
        matches!(&refused, Some(Error::Create { source, .. }) if source.raw_os_error() == Some(libc::EEXIST)),
        "{refused:?}"
    );
    let left = side.sh(&format!("ip -d -o link show {INTERFACE}"))?;
    ensure!(left.contains("veth"), "{left}");
    Ok(())
}

#[test]
fn thousands_of_peers_and_of_prefixes_are_in_the_kernel_as_given() -> Result<()> {
    let side = Side::new()?;
    let tunnel: Arc<dyn Tunnel> = Arc::from(side.run(create(config(2, Setup::default())))??);
    let set = tunnel.clone();
    side.run(async move {
        let mut wide = config(2, Setup::default()).peers.remove(0);
        for number in 0..3000_u16 {
            let [high, low] = number.to_be_bytes();
            wide.allowed_ips.push(format!("10.91.{high}.{low}/32").parse()?);
        }
        set.set_peers(vec![wide]).await?;
        anyhow::Ok(set.set_peers(many()).await?)
    })??;
    let count = |what: &str| side.sh(&format!("wg show {INTERFACE} {what}"));
    ensure!(count("peers")?.lines().count() == usize::from(PEERS) + 1);
    let prefixes = |list: &str, public: &str| {
        let line = list.lines().find(|line| line.starts_with(public)).unwrap_or_default();
        line.split_whitespace().count() - 1
    };
    let list = count("allowed-ips")?;
    let wide = key(1).1.to_string();
    ensure!(prefixes(&list, &wide) == 3002, "{} prefixes", prefixes(&list, &wide));
    let all: usize = list.lines().map(|line| line.split_whitespace().count() - 1).sum();
    ensure!(all == 3002 + 2 * usize::from(PEERS), "{all} prefixes of all peers");
    // What is taken away is gone, what stays stays.
    let set = tunnel.clone();
    side.run(async move {
        let mut narrow = config(2, Setup::default()).peers.remove(0);
        narrow.allowed_ips.push("10.91.0.7/32".parse::<IpNetwork>()?);
        anyhow::Ok(set.set_peers(vec![narrow]).await?)
    })??;
    let list = count("allowed-ips")?;
    ensure!(
        prefixes(&list, &wide) == 3,
        "{} prefixes are left",
        prefixes(&list, &wide)
    );
    Ok(())
}

fn stats_of(pair: &Pair, end: usize, peer: u8) -> Result<PeerStats> {
    let tunnel = pair.tunnels[end].clone();
    let stats = pair.sides[end].run(async move { tunnel.stats().await })??;
    let found = stats.into_iter().find(|stats| stats.public_key == key(peer).1);
    Ok(found.expect("the peer"))
}

fn wg_handshake(pair: &Pair) -> Result<String> {
    let all = pair.sides[0].sh(&format!("wg show {INTERFACE} dump"))?;
    let line = all.lines().find(|line| line.starts_with(&key(2).1.to_string()));
    Ok(line
        .and_then(|line| line.split('\t').nth(4))
        .unwrap_or_default()
        .to_owned())
}

/// Forces a handshake over a session that is seconds old, which the kernel would keep for two minutes.
fn force_over_a_live_session(pair: &Pair) -> Result<()> {
    pair.transfer("10.88.0.2", 1 << 16, SOON)?;
    let (before, then) = (stats_of(pair, 0, 2)?, wg_handshake(pair)?);
    // wg(8) counts whole seconds.
    let later = Instant::now() + Duration::from_millis(1100);
    while Instant::now() < later {
        std::thread::sleep(Duration::from_millis(50));
    }
    let tunnel = pair.tunnels[0].clone();
    pair.sides[0].run(async move { tunnel.force_handshake(key(2).1, SOON).await })??;
    let (after, now) = (stats_of(pair, 0, 2)?, wg_handshake(pair)?);
    ensure!(
        then != now && now != "0",
        "the last handshake was at {then} and is at {now}"
    );
    ensure!(
        after.rx_bytes >= before.rx_bytes && after.tx_bytes >= before.tx_bytes && after.endpoint == before.endpoint,
        "{before:?} became {after:?}"
    );
    let kept = pair.sides[0].sh(&format!("wg show {INTERFACE} dump | grep '^{}'", key(2).1))?;
    let fields: Vec<&str> = kept.trim().split('\t').collect();
    ensure!(
        fields[3] == "10.88.0.2/32,fd88::2/128" && fields[7] == "off",
        "prefixes or keepalive are others: {fields:?}"
    );
    pair.transfer("10.88.0.2", 1 << 16, SOON)?;
    Ok(())
}

#[test]
fn a_handshake_can_be_forced_over_a_live_session() -> Result<()> {
    let pair = pair(Setup::default())?;
    force_over_a_live_session(&pair)?;
    force_over_a_live_session(&pair)
}

#[test]
fn a_handshake_can_be_forced_with_one_of_many_peers() -> Result<()> {
    let pair = pair(Setup::default())?;
    let tunnel = pair.tunnels[0].clone();
    pair.sides[0].run(async move { tunnel.set_peers(many().split_off(usize::from(PEERS) - 20)).await })??;
    force_over_a_live_session(&pair)?;
    force_over_a_live_session(&pair)
}

#[test]
fn a_forced_handshake_needs_a_peer_and_its_endpoint() -> Result<()> {
    let side = Side::new()?;
    let tunnel: Arc<dyn Tunnel> = Arc::from(side.run(create(config(2, Setup::default())))??);
    let first = tunnel.clone();
    let stranger = side.run(async move { first.force_handshake(key(9).1, SOON).await })?;
    ensure!(matches!(stranger, Err(Error::NoPeer(_))), "{stranger:?}");
    let silent = side.run(async move { tunnel.force_handshake(key(1).1, SOON).await })?;
    ensure!(matches!(silent, Err(Error::NoEndpoint(_))), "{silent:?}");
    Ok(())
}

#[test]
fn a_link_that_was_down_for_a_while_is_recovered_by_a_forced_handshake() -> Result<()> {
    let pair = pair(Setup::default())?;
    pair.transfer("10.88.0.2", 1 << 16, SOON)?;
    pair.sides[1].sh(&format!(
        "ip link set {INTERFACE} down; ip link set {INTERFACE} up; ip route replace 10.88.0.1/32 dev {INTERFACE}"
    ))?;
    let tunnel = pair.tunnels[0].clone();
    pair.sides[0].run(async move { tunnel.force_handshake(key(2).1, SOON).await })??;
    pair.transfer("10.88.0.2", 1 << 16, SOON)?;
    Ok(())
}

#[test]
fn both_backends_understand_each_other() -> Result<()> {
    let sides = side::joined_pair()?;
    let kernel = open(&sides[0], 1, config(1, Setup::default()))?;
    let userspace: Arc<dyn Tunnel> = Arc::from(sides[1].run(UserspaceTunnel::create(config(2, Setup::default())))??);
    sides[1].sh(&format!(
        "ip address add 10.88.0.2/32 peer 10.88.0.1 dev {INTERFACE}; ip link set {INTERFACE} up"
    ))?;
    let pair = Pair {
        sides,
        tunnels: [kernel, userspace],
    };
    pair.transfer("10.88.0.2", 1 << 18, SOON)?;
    let tunnel = pair.tunnels[0].clone();
    pair.sides[0].run(async move { tunnel.force_handshake(key(2).1, SOON).await })??;
    pair.transfer("10.88.0.2", 1 << 16, SOON)?;
    Ok(())
}

/// Seed of the client's next key.
const NEXT: u8 = 11;

fn renewal() -> Renewal {
    Renewal {
        private_key: key(NEXT).0,
        peer: config(1, Setup::default()).peers.remove(0),
        source: "10.88.0.1".parse().expect("an address"),
        gateway: "10.88.0.2".parse().expect("an address"),
    }
}

#[test]
fn a_renewal_goes_over_to_the_new_key_and_totals_go_on() -> Result<()> {
    let pair = pair(Setup::default())?;
    pair.transfer("10.88.0.2", 1 << 16, SOON)?;
    let before = stats_of(&pair, 0, 2)?;
    // A provider gives the addresses to the new key at its first handshake.
    let provider = pair.tunnels[1].clone();
    let (told, moved) = std::sync::mpsc::channel();
    pair.sides[1].spawn(async move {
        let follow = async {
            let mut next = config(2, Setup::default()).peers.remove(0);
            next.public_key = key(NEXT).1;
            let bare = PeerConfig {
                allowed_ips: Vec::new(),
                ..next.clone()
            };
            provider.set_peers(vec![bare]).await?;
            told.send(()).ok();
            loop {
                let stats = provider.stats().await?;
                let shaken = |peer: &PeerStats| peer.public_key == key(NEXT).1 && peer.last_handshake.is_some();
                if stats.iter().any(shaken) {
                    provider.set_peers(vec![next]).await?;
                    return provider.remove_peer(key(1).1).await;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        assert!(follow.await.is_ok());
        told.send(()).ok();
    });
    moved.recv_timeout(SOON)?;
    let tunnel = pair.tunnels[0].clone();
    pair.sides[0].run(async move { tunnel.renew(renewal()).await })??;
    moved.recv_timeout(SOON)?;
    pair.transfer("10.88.0.2", 1 << 16, SOON)?;
    let ours = pair.sides[0].sh(&format!("wg show {INTERFACE} public-key"))?;
    ensure!(ours.trim() == key(NEXT).1.to_string(), "the key in use is {ours}");
    let after = stats_of(&pair, 0, 2)?;
    ensure!(
        after.rx_bytes >= before.rx_bytes + (1 << 16) && after.tx_bytes >= before.tx_bytes + (1 << 16),
        "{before:?} became {after:?}"
    );
    Ok(())
}

#[test]
fn a_renewal_that_the_provider_does_not_follow_leaves_the_old_key_in_use() -> Result<()> {
    let pair = pair(Setup::default())?;
    pair.transfer("10.88.0.2", 1 << 16, SOON)?;
    let tunnel = pair.tunnels[0].clone();
    let refused = pair.sides[0].run(async move { tunnel.renew(renewal()).await })?;
    ensure!(matches!(refused, Err(Error::NoHandshake(..))), "{refused:?}");
    let ours = pair.sides[0].sh(&format!("wg show {INTERFACE} public-key"))?;
    ensure!(ours.trim() == key(1).1.to_string(), "the key in use is {ours}");
    pair.transfer("10.88.0.2", 1 << 16, SOON)?;
    Ok(())
}
