//! What needs no kernel: messages within their limits, and dumps put together again.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use dvpn_common::keys::{PrivateKey, PublicKey};
use ipnetwork::IpNetwork;
use netlink_packet_core::{Emitable as _, NlasIterator};
use netlink_packet_wireguard::{
    WireguardAttribute, WireguardPeer, WireguardPeerAttribute, WireguardPeerFlags, WireguardTimeSpec,
};
use proptest::prelude::*;

use super::{
    dump::{Device, Peer},
    message::{PeerChange, Target, chunks},
};
use crate::tunnel::PeerConfig;

const HEADERS: usize = 16;
const TARGET: Target = Target { family: 33, index: 7 };

fn key(number: u16) -> PublicKey {
    let mut bytes = [0x55; 32];
    bytes[..2].copy_from_slice(&number.to_be_bytes());
    PublicKey::from_bytes(bytes).expect("not zero")
}

fn prefix(number: u32, v6: bool) -> IpNetwork {
    if v6 {
        IpNetwork::from(IpAddr::from(Ipv6Addr::from_bits((0xfd << 120) + u128::from(number))))
    } else {
        IpNetwork::from(IpAddr::from(Ipv4Addr::from_bits((10 << 24) + number)))
    }
}

/// Peers whose prefixes are their own, as far as `counts` says.
fn peers(counts: &[(usize, bool)]) -> Vec<PeerConfig> {
    let mut used = 0;
    let mut peer = |(number, (count, v6)): (u16, &(usize, bool))| PeerConfig {
        public_key: key(number),
        endpoint: v6.then(|| SocketAddr::from(([192, 0, 2, 1], number))),
        allowed_ips: (0..*count)
            .map(|_| {
                used += 1;
                prefix(used, *v6)
            })
            .collect(),
        keepalive: (!v6).then_some(Duration::from_secs(25)),
    };
    (0_u16..).zip(counts).map(&mut peer).collect()
}

fn set(peers: &[PeerConfig]) -> Vec<PeerChange> {
    peers
        .iter()
        .map(|peer| PeerChange::Set {
            peer: peer.clone(),
            replace_prefixes: true,
        })
        .collect()
}

/// The bytes that the kernel would read: after the netlink header, as a dump has them too.
fn sent(chunk: Vec<WireguardPeer>) -> Vec<u8> {
    TARGET.set(vec![WireguardAttribute::Peers(chunk)])[HEADERS..].to_vec()
}

fn replaces(peer: &WireguardPeer) -> bool {
    peer.contains(&WireguardPeerAttribute::Flags(WireguardPeerFlags::ReplaceAllowedIps))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn peers_of_any_size_arrive_whole_in_messages_within_the_limits(
        counts in prop::collection::vec((prop_oneof![60 => 0..4_usize, 1 => 900..3500_usize], any::<bool>()), 0..500)
    ) {
        let wanted = peers(&counts);
        let mut device = Device::default();
        let mut replaced = HashMap::new();
        for chunk in chunks(set(&wanted)) {
            prop_assert!(!chunk.is_empty() && chunk.len() <= 200, "{} peers in a message", chunk.len());
            prop_assert!(u16::try_from(chunk.as_slice().buffer_len() + 4).is_ok(), "nla_len wraps");
            for peer in &chunk {
                let Some(WireguardPeerAttribute::PublicKey(key)) = peer.first() else {
                    return Err(TestCaseError::fail("a peer begins with its key"));
                };
                let first = !replaced.contains_key(key);
                *replaced.entry(*key).or_insert(0) += usize::from(replaces(peer));
                prop_assert!(replaces(peer) == first, "only the first piece takes prefixes away");
            }
            device.merge(&sent(chunk)).expect("what we write we can read");
        }
        prop_assert_eq!(device.peers.len(), wanted.len());
        for (seen, wanted) in device.peers.iter().zip(&wanted) {
            prop_assert_eq!(seen.public_key, wanted.public_key);
            prop_assert_eq!(seen.endpoint, wanted.endpoint);
            prop_assert_eq!(&seen.allowed_ips, &wanted.allowed_ips);
        }
    }

    #[test]
    fn a_dump_cut_anywhere_reads_like_an_uncut_one(
        counts in prop::collection::vec((0..6_usize, any::<bool>()), 1..40),
        cuts in prop::collection::vec((0..40_usize, 0..6_usize), 0..6),
    ) {
        let wanted = peers(&counts);
        let mut whole = Device::default();
        whole.merge(&sent(wanted.iter().map(dumped).collect())).expect("it reads");
        let mut parts: Vec<Vec<WireguardPeer>> = vec![Vec::new()];
        for (number, peer) in wanted.iter().enumerate() {
            let mut rest = dumped(peer);
            for (_, at) in cuts.iter().filter(|(cut, _)| *cut == number) {
                let tail = split(&mut rest, *at);
                parts.last_mut().expect("one").push(std::mem::replace(&mut rest, tail));
                parts.push(Vec::new());
            }
            parts.last_mut().expect("one").push(rest);
        }
        let mut merged = Device::default();
        for part in parts {
            merged.merge(&sent(part)).expect("it reads");
        }
        prop_assert_eq!(merged, whole);
    }
}

/// A peer as the kernel lists it.
fn dumped(peer: &PeerConfig) -> WireguardPeer {
    let mut attributes = vec![
        WireguardPeerAttribute::PublicKey(*peer.public_key.as_bytes()),
        WireguardPeerAttribute::PresharedKey([0; 32]),
        WireguardPeerAttribute::LastHandshake(WireguardTimeSpec {
            seconds: 1_700_000_000,
            nano_seconds: 5,
        }),
        WireguardPeerAttribute::RxBytes(1 << 40),
        WireguardPeerAttribute::TxBytes(3),
    ];
    attributes.extend(peer.endpoint.map(WireguardPeerAttribute::Endpoint));
    let WireguardPeer(prefixes) = chunks(set(std::slice::from_ref(peer))).remove(0).remove(0);
    attributes.extend(
        prefixes
            .into_iter()
            .filter(|attribute| matches!(attribute, WireguardPeerAttribute::AllowedIps(_))),
    );
    WireguardPeer(attributes)
}

/// Cuts a peer after `at` prefixes, as the kernel does: the rest has the key again, and nothing else but prefixes.
fn split(peer: &mut WireguardPeer, at: usize) -> WireguardPeer {
    let mut tail = vec![peer.0[0].clone()];
    for attribute in &mut peer.0 {
        if let WireguardPeerAttribute::AllowedIps(prefixes) = attribute {
            let rest = prefixes.split_off(at.min(prefixes.len()));
            tail.push(WireguardPeerAttribute::AllowedIps(rest));
        }
    }
    WireguardPeer(tail)
}

#[test]
fn a_dump_says_what_the_kernel_counted() {
    let config = peers(&[(2, true)]).remove(0);
    let mut device = Device::default();
    device.merge(&sent(vec![dumped(&config)])).expect("it reads");
    assert_eq!(
        device.peers,
        [Peer {
            public_key: config.public_key,
            endpoint: config.endpoint,
            allowed_ips: config.allowed_ips,
            last_handshake: Some(Duration::new(1_700_000_000, 5)),
            rx_bytes: 1 << 40,
            tx_bytes: 3,
        }]
    );
}

#[test]
fn a_peer_that_never_shook_hands_has_no_age() {
    let never = WireguardPeer(vec![
        WireguardPeerAttribute::PublicKey(*key(1).as_bytes()),
        WireguardPeerAttribute::LastHandshake(WireguardTimeSpec::default()),
    ]);
    let mut device = Device::default();
    device.merge(&sent(vec![never])).expect("it reads");
    assert_eq!(device.peers[0].last_handshake, None);
}

#[test]
fn the_private_key_is_sent_as_it_is_and_taken_away_as_zeros() {
    const PRIVATE_KEY: u16 = 3;
    let private = PrivateKey::from_bytes([0x77; 32]);
    for (given, wanted) in [(Some(&private), *private.expose()), (None, [0; 32])] {
        let message = TARGET.set_key(given);
        let values: Vec<Vec<u8>> = NlasIterator::new(&message[HEADERS + 4..])
            .map(|attribute| attribute.expect("it reads"))
            .filter(|attribute| attribute.kind() == PRIVATE_KEY)
            .map(|attribute| attribute.value().to_vec())
            .collect();
        assert_eq!(values, [wanted.to_vec()]);
    }
}

#[test]
fn waking_a_peer_leaves_its_keepalive_as_it_was() {
    for keepalive in [0, 25] {
        let wake = PeerChange::Wake {
            public_key: key(1),
            keepalive,
        };
        let intervals: Vec<u16> = chunks([wake])
            .concat()
            .iter()
            .flat_map(|peer| peer.0.clone())
            .filter_map(|attribute| {
                if let WireguardPeerAttribute::PersistentKeepalive(seconds) = attribute {
                    Some(seconds)
                } else {
                    None
                }
            })
            .collect();
        assert_eq!(intervals, [0, keepalive.max(1), keepalive]);
    }
}
