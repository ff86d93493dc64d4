//! The whole provider side, its real WireGuard device and firewall, told by a pool that may say anything.

use std::time::{Duration, Instant};

use dvpn_common::{approval::ApprovalFields, contract::PeerEntry, keys::PublicKey};
use dvpn_core::node::Month;
use dvpn_daemon::provider::Event;
use jiff::Timestamp;

use crate::pool::{approval, entry, rotation, signer, verifying};

use crate::node::{Bed, SOON, eventually, key};

fn good(client: u8, address: &str, serial: u64) -> ApprovalFields {
    approval(key(100), key(client), address, serial)
}

const NETWORK: &[&str] = &["10.96.0.1/20"];

#[test]
fn a_renewal_takes_the_addresses_at_its_first_handshake_and_the_old_key_is_gone() {
    let bed = Bed::new(NETWORK);
    let running = bed.start();
    assert_eq!(bed.add(entry(&good(1, "10.96.0.2/32", 1))), None);
    let old = bed.client(1, "wg0");
    assert!(bed.shakes(&old, SOON));
    eventually("the old key carries", || bed.pings("wg0", "10.96.0.2"));
    let renewal = PeerEntry {
        renews: Some(key(1)),
        ..entry(&good(2, "10.96.0.2/32", 2))
    };
    assert_eq!(bed.add(renewal.clone()), None);
    assert!(
        bed.pings("wg0", "10.96.0.2"),
        "until the new key shook hands the old one carries"
    );
    // A stream that begins anew names both and changes nothing.
    let both = vec![renewal.clone(), entry(&good(1, "10.96.0.2/32", 1))];
    assert_eq!(bed.snapshot(both.clone()), [""; 0]);
    assert!(bed.pings("wg0", "10.96.0.2"));
    let new = bed.client(2, "wg1");
    assert!(bed.shakes(&new, SOON));
    let shaken = Instant::now();
    eventually("the new key carries", || bed.pings("wg1", "10.96.0.2"));
    assert!(shaken.elapsed() < Duration::from_secs(5), "{:?}", shaken.elapsed());
    assert_eq!(bed.snapshot(both), [""; 0]);
    assert!(
        bed.pings("wg1", "10.96.0.2"),
        "the pool names the old key still, and it gets nothing back"
    );
    assert!(!bed.shakes(&old, Duration::from_secs(2)), "it is no peer any more");
    let connections: Vec<Event> = bed
        .events()
        .into_iter()
        .skip_while(|e| !matches!(e, Event::PeerAdmitted { .. }))
        .collect();
    assert_eq!(
        connections,
        [Event::PeerAdmitted { peer: 1 }, Event::PeerRenewed { peer: 1 }],
        "one connection all along"
    );
    running.stop();
}

#[test]
fn whatever_is_wrong_with_an_event_makes_no_peer_and_is_recorded() {
    let bed = Bed::new(NETWORK);
    let running = bed.start();
    assert_eq!(bed.add(entry(&good(1, "10.96.0.2/32", 7))), None);
    let now = Timestamp::now().as_second();
    let at = |second| Timestamp::from_second(second).unwrap();
    let base = || good(2, "10.96.0.3/32", 8);
    let signed = |change: &dyn Fn(&mut ApprovalFields)| {
        let mut fields = base();
        change(&mut fields);
        entry(&fields)
    };
    let altered = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = base().encode();
        change(&mut bytes);
        PeerEntry {
            approval: base64::Engine::encode(&base64::engine::general_purpose::STANDARD, bytes),
            ..entry(&base())
        }
    };
    let forged = |by: u8| PeerEntry {
        signature: base64::Engine::encode(
            &base64::engine::general_purpose::STANDARD,
            signer(by).sign(&base().encode()).as_ref(),
        ),
        ..entry(&base())
    };
    let wrong: Vec<(&str, PeerEntry)> = vec![
        ("truncated", altered(&|bytes| bytes.truncate(bytes.len() - 1))),
        ("extended", altered(&|bytes| bytes.push(0))),
        ("signed by somebody else", forged(66)),
        (
            "for another provider",
            signed(&|f| f.provider_id = "node-b".parse().unwrap()),
        ),
        ("for another provider's key", signed(&|f| f.provider_key = key(101))),
        (
            "retargeted: somebody else's key",
            PeerEntry {
                public_key: key(3),
                ..entry(&base())
            },
        ),
        (
            "retargeted: other addresses",
            PeerEntry {
                addresses: vec!["10.96.0.9/32".parse().unwrap()],
                ..entry(&base())
            },
        ),
        (
            "another client's address",
            signed(&|f| f.addresses = vec!["10.96.0.2/32".parse().unwrap()]),
        ),
        (
            "our own address",
            signed(&|f| f.addresses = vec!["10.96.0.1/32".parse().unwrap()]),
        ),
        (
            "outside our networks",
            signed(&|f| f.addresses = vec!["10.97.0.2/32".parse().unwrap()]),
        ),
        (
            "outlived",
            signed(&|f| (f.issued_at, f.expires_at) = (at(now - 7200), at(now - 121))),
        ),
        (
            "from the future",
            signed(&|f| (f.issued_at, f.expires_at) = (at(now + 300), at(now + 3600))),
        ),
        ("longer than a day", signed(&|f| f.expires_at = at(now + 90_000))),
        ("replayed: an old serial", entry(&good(1, "10.96.0.2/32", 6))),
        (
            "renewing a stranger",
            PeerEntry {
                renews: Some(key(9)),
                ..signed(&|f| f.addresses = vec!["10.96.0.2/32".parse().unwrap()])
            },
        ),
    ];
    let mut reasons = Vec::new();
    for (what, peer) in wrong {
        let reason = bed.add(peer).unwrap_or_else(|| panic!("{what} was admitted"));
        reasons.push(reason);
        assert_eq!(
            bed.refusals(),
            reasons,
            "{what}: each refusal is recorded, with its reason"
        );
    }
    let stranger = bed.client(2, "wg0");
    assert!(
        !bed.shakes(&stranger, Duration::from_secs(2)),
        "none of them made a peer"
    );
    let client = bed.client(1, "wg1");
    assert!(bed.shakes(&client, SOON), "and the honest client is untouched");
    running.stop();
}

#[test]
fn an_old_serial_is_refused_after_a_restart_too() {
    let bed = Bed::new(NETWORK);
    let running = bed.start();
    let newest = entry(&good(1, "10.96.0.2/32", 9));
    assert_eq!(bed.add(newest.clone()), None);
    let kept = bed.kept.clone();
    eventually("serials are written while the node runs", move || {
        kept.serials.lock().unwrap().is_some()
    });
    running.stop();
    let running = bed.start();
    let refused = bed.snapshot(vec![entry(&good(1, "10.96.0.2/32", 8))]);
    assert_eq!(refused, ["serial 8 is older than 9"]);
    assert_eq!(bed.snapshot(vec![newest]), [""; 0]);
    running.stop();
}

#[test]
fn the_pools_own_handshake_is_answered_and_a_finding_is_told_with_its_cure() {
    let bed = Bed::new(NETWORK);
    bed.pool.answer(|answer| {
        answer.prober_key = Some(key(50));
        answer.listed = false;
        answer.reachability = Some(dvpn_common::contract::Reachability::NoHandshake);
    });
    let running = bed.start();
    running.wait("the finding", |status| {
        status
            .verdict
            .as_ref()
            .is_some_and(|problem| problem.how.contains("UDP port 51820"))
    });
    let prober = bed.client(50, "wg0");
    eventually("the prober is a peer", || bed.shakes(&prober, Duration::from_secs(2)));
    assert!(!bed.pings("wg0", "10.96.0.9"), "it has no address and reaches nothing");
    assert!(running.status.borrow().peers.is_empty(), "it is no client");
    bed.pool.answer(|answer| {
        answer.prober_key = Some(key(51));
        answer.listed = true;
        answer.reachability = Some(dvpn_common::contract::Reachability::Reachable);
    });
    let next = bed.client(51, "wg1");
    eventually("the new prober is a peer", || bed.shakes(&next, Duration::from_secs(2)));
    assert!(!bed.shakes(&prober, Duration::from_secs(2)), "the old one is not");
    running.wait("reachable", |status| status.listed && status.verdict.is_none());
    running.stop();
}

#[test]
fn a_new_pool_key_is_followed_only_when_the_old_one_signed_for_it() {
    let bed = Bed::new(NETWORK);
    let running = bed.start();
    let by = |seed: u8, fields: &ApprovalFields| PeerEntry {
        signature: base64::Engine::encode(
            &base64::engine::general_purpose::STANDARD,
            signer(seed).sign(&fields.encode()).as_ref(),
        ),
        ..entry(fields)
    };
    bed.pool.answer(|answer| {
        answer.pool_key = Some(verifying(2));
        answer.rotations = vec![rotation(1, 2, 3)];
    });
    let refused = Event::PoolKeyRefused {
        key: verifying(2).to_string(),
    };
    eventually("a forged change is recorded", || bed.events().contains(&refused));
    assert_eq!(
        bed.add(by(1, &good(1, "10.96.0.2/32", 1))),
        None,
        "the pinned key stands"
    );
    assert!(bed.add(by(2, &good(2, "10.96.0.3/32", 2))).is_some());
    bed.pool.answer(|answer| answer.rotations = vec![rotation(1, 2, 1)]);
    let kept = bed.kept.clone();
    eventually("a signed change is followed and kept", move || {
        *kept.pool_key.lock().unwrap() == Some(verifying(2))
    });
    assert_eq!(bed.add(by(2, &good(2, "10.96.0.3/32", 2))), None);
    assert!(bed.add(by(1, &good(3, "10.96.0.4/32", 3))).is_some());
    running.stop();
}

#[test]
fn a_released_connection_is_inactive_until_it_shakes_hands_again() {
    let bed = Bed::new(NETWORK);
    let running = bed.start();
    assert_eq!(bed.add(entry(&good(1, "10.96.0.2/32", 1))), None);
    let client = bed.client(1, "wg0");
    assert!(bed.shakes(&client, SOON));
    eventually("it carries", || bed.pings("wg0", "10.96.0.2"));
    running.wait("active", |status| {
        status.active == 1 && status.peers.iter().all(|peer| peer.active)
    });
    running.wait("counted", |status| {
        status
            .peers
            .iter()
            .any(|peer| peer.carried.sent.packets > 0 && peer.carried.received.packets > 0)
    });
    let pool = bed.pool.clone();
    assert_eq!(bed.told(async move { pool.release(key(1)).await }), None);
    running.wait("released", |status| status.active == 0 && status.peers.len() == 1);
    assert!(bed.events().contains(&Event::PeerReleased { peer: 1 }));
    assert!(bed.shakes(&client, SOON), "it is still a peer");
    running.wait("active again", |status| status.active == 1);
    let pool = bed.pool.clone();
    assert_eq!(bed.told(async move { pool.remove(key(1)).await }), None);
    assert!(!bed.shakes(&client, Duration::from_secs(2)));
    running.stop();
}

#[test]
fn a_drained_node_tells_the_pool_keeps_its_clients_and_takes_no_new_ones() {
    let bed = Bed::new(NETWORK);
    let running = bed.start();
    let pool = bed.pool.clone();
    bed.told(async move {
        pool.registration(|request| !request.draining && request.max_peers == Some(4096))
            .await;
    });
    assert_eq!(bed.add(entry(&good(1, "10.96.0.2/32", 1))), None);
    running.drain.send_replace(true);
    let pool = bed.pool.clone();
    bed.told(async move { pool.registration(|request| request.draining).await });
    let refused = bed.add(entry(&good(2, "10.96.0.3/32", 2)));
    assert_eq!(
        refused.as_deref(),
        Some("this node takes no new clients: drained by its owner")
    );
    let client = bed.client(1, "wg0");
    assert!(bed.shakes(&client, SOON));
    running.drain.send_replace(false);
    let pool = bed.pool.clone();
    bed.told(async move { pool.registration(|request| !request.draining).await });
    assert_eq!(bed.add(entry(&good(2, "10.96.0.3/32", 2))), None);
    running.stop();
}

#[test]
fn volume_outlives_a_restart_and_a_month_that_is_used_up_serves_nobody() {
    let mut bed = Bed::new(NETWORK);
    bed.rules.monthly_cap_bytes = 10_000;
    let running = bed.start();
    let peer = entry(&good(1, "10.96.0.2/32", 1));
    assert_eq!(bed.add(peer.clone()), None);
    let client = bed.client(1, "wg0");
    assert!(bed.shakes(&client, SOON));
    eventually("it carries", || bed.pings("wg0", "10.96.0.2"));
    bed.clients.sh("ping -c8 -i0.01 -s 1000 10.96.0.1").unwrap();
    running.wait("the month is used up, and new clients are not taken", |status| {
        status.month_bytes >= 16_000 && status.admission.starts_with("draining: the month's volume")
    });
    assert!(bed.pings("wg0", "10.96.0.2"), "whoever is there has five minutes");
    running.stop();
    let usage = bed.kept.usage.lock().unwrap().expect("kept");
    assert!(
        usage.bytes >= 16_000 && usage.month == Month::of(Timestamp::now()),
        "{usage:?}"
    );
    bed.pool.set_peers(vec![peer]);
    let running = bed.start();
    running.wait("closed", |status| {
        status.admission.starts_with("closed: the month's volume")
    });
    assert!(!bed.shakes(&client, Duration::from_secs(2)), "nobody is a peer");
    running.stop();
}

#[test]
fn four_thousand_clients_of_a_snapshot_are_peers_within_two_seconds() {
    let bed = Bed::new(&["10.96.0.1/19"]);
    let running = bed.start();
    let peers: Vec<PeerEntry> = (0..4096_u16)
        .map(|number| {
            let [high, low] = (number + 2).to_be_bytes();
            let mut bytes = [0x55; 32];
            bytes[0] = high;
            bytes[1] = low;
            let client = PublicKey::from_bytes(bytes).unwrap();
            entry(&approval(
                key(100),
                client,
                &format!("10.96.{high}.{low}/32"),
                u64::from(number),
            ))
        })
        .collect();
    let again = peers.clone();
    let started = Instant::now();
    assert_eq!(bed.snapshot(peers), [""; 0]);
    let first = started.elapsed();
    let started = Instant::now();
    assert_eq!(bed.snapshot(again), [""; 0]);
    let second = started.elapsed();
    println!("4096 clients: {first:?}, the same again: {second:?}");
    running.wait("all are peers", |status| status.peers.len() == 4096);
    // The figure is for a program as it is shipped; without optimisation cryptography alone takes longer.
    if !cfg!(debug_assertions) {
        assert!(
            first < Duration::from_secs(2) && second < Duration::from_secs(2),
            "{first:?}, {second:?}"
        );
    }
    running.stop();
}
