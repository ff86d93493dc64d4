use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair as _};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use dvpn_common::{approval::ApprovalFields, keys::VerifyingKey};

use super::*;

const START: i64 = 1_800_000_000;

fn key(byte: u8) -> PublicKey {
    PublicKey::from_bytes([byte; 32]).unwrap()
}
fn pool() -> Ed25519KeyPair {
    Ed25519KeyPair::from_seed_unchecked(&[9; 32]).unwrap()
}
fn ground() -> Ground {
    Ground {
        pool_key: VerifyingKey::from_bytes(pool().public_key().as_ref().try_into().unwrap()).unwrap(),
        provider_id: "node-a".parse().unwrap(),
        provider_key: key(200),
        networks: vec!["10.96.0.1/20".parse().unwrap()],
    }
}
fn address(last: u8) -> IpNetwork {
    format!("10.96.0.{last}/32").parse().unwrap()
}

/// An approved client: its serial is its key.
fn entry(client: u8, last: u8, renews: Option<u8>) -> PeerEntry {
    let fields = ApprovalFields {
        pool_id: "pool".into(),
        provider_id: "node-a".parse().unwrap(),
        provider_key: key(200),
        client_key: key(client),
        addresses: vec![address(last)],
        issued_at: Timestamp::from_second(START).unwrap(),
        expires_at: Timestamp::from_second(START + 3600 * i64::from(client)).unwrap(),
        serial: u64::from(client),
    };
    PeerEntry {
        public_key: fields.client_key,
        addresses: fields.addresses.clone(),
        expires_at: fields.expires_at,
        approval: STANDARD.encode(fields.encode()),
        signature: STANDARD.encode(pool().sign(&fields.encode()).as_ref()),
        renews: renews.map(key),
        released: false,
    }
}

/// A roster beside the tunnel that it is carried out on.
struct Bed {
    roster: Roster,
    tunnel: BTreeMap<PublicKey, Vec<IpNetwork>>,
    shaken: BTreeMap<PublicKey, Instant>,
    now: Now,
}

impl Bed {
    fn new(max_clients: usize) -> Self {
        Self {
            roster: Roster::new(Serials::default(), max_clients),
            tunnel: BTreeMap::new(),
            shaken: BTreeMap::new(),
            now: Now {
                instant: Instant::now(),
                wall: Timestamp::from_second(START + 60).unwrap(),
            },
        }
    }
    fn pass(&mut self, time: Duration) {
        self.now.instant += time;
        self.now.wall = self.now.wall.checked_add(time).unwrap();
    }
    fn add(&mut self, entry: &PeerEntry) -> Result<(), String> {
        let added = self.roster.add(entry, &ground(), self.now);
        self.carry_out();
        added.map_err(|refused| refused.reason)
    }
    fn replace(&mut self, entries: &[PeerEntry]) -> usize {
        let refused = self.roster.replace(entries, &ground(), self.now);
        self.carry_out();
        refused.len()
    }
    fn shake(&mut self, client: u8) {
        self.shaken.insert(key(client), self.now.instant);
        self.observe();
    }
    fn observe(&mut self) {
        let stats: Vec<PeerStats> = self
            .tunnel
            .keys()
            .map(|peer| PeerStats {
                public_key: *peer,
                endpoint: None,
                last_handshake: self.shaken.get(peer).map(|at| self.now.instant - *at),
                rx_bytes: 0,
                tx_bytes: 0,
            })
            .collect();
        self.roster.observe(&stats, self.now.instant);
        self.carry_out();
    }
    /// As the node does, checking after each step that no address has two peers.
    fn carry_out(&mut self) {
        let observed = self.tunnel.keys().copied().collect();
        let plan = self.roster.plan(&observed);
        for peer in &plan.set {
            // A device gives an address to whoever was last told to have it.
            for held in self.tunnel.values_mut() {
                held.retain(|address| !peer.allowed_ips.contains(address));
            }
            self.tunnel.insert(peer.public_key, peer.allowed_ips.clone());
        }
        for peer in &plan.remove {
            self.tunnel.remove(peer);
            self.shaken.remove(peer);
        }
        self.roster.applied(&plan);
        let held: Vec<&IpNetwork> = self.tunnel.values().flatten().collect();
        let once: BTreeSet<&IpNetwork> = held.iter().copied().collect();
        assert_eq!(held.len(), once.len(), "an address has one peer: {:?}", self.tunnel);
        // Settled: the tunnel holds what was told, and nothing more is to be done.
        let observed = self.tunnel.keys().copied().collect();
        assert_eq!(self.roster.plan(&observed), Plan::default());
    }
    fn tunnel(&self) -> Vec<(u8, usize)> {
        self.tunnel
            .iter()
            .map(|(key, held)| (key.as_bytes()[0], held.len()))
            .collect()
    }
    fn active(&self) -> Vec<u8> {
        self.roster
            .active(self.now.instant)
            .map(|client| client.key.as_bytes()[0])
            .collect()
    }
}

#[test]
fn a_renewal_waits_without_addresses_and_has_them_from_its_handshake_on() {
    let mut bed = Bed::new(10);
    bed.add(&entry(1, 2, None)).unwrap();
    bed.shake(1);
    bed.add(&entry(2, 2, Some(1))).unwrap();
    assert_eq!(bed.tunnel(), [(1, 1), (2, 0)]);
    assert_eq!(bed.roster.watches(bed.now.instant), Some(Duration::from_millis(10)));
    bed.pass(Duration::from_secs(31));
    bed.observe();
    assert_eq!(bed.roster.watches(bed.now.instant), None, "watched for half a minute");
    assert_eq!(bed.active(), [1]);
    bed.shake(2);
    assert_eq!(bed.tunnel(), [(2, 1)]);
    assert_eq!(bed.roster.take_handed_over(), [(key(1), key(2))]);
    assert_eq!(bed.active(), [2]);
}

#[test]
fn a_renewed_client_that_the_pool_removes_or_that_expires_leaves_its_addresses_to_its_renewal() {
    for expires in [false, true] {
        let mut bed = Bed::new(10);
        bed.add(&entry(1, 2, None)).unwrap();
        bed.add(&entry(2, 2, Some(1))).unwrap();
        if expires {
            bed.pass(Duration::from_secs(3600 + 59));
            assert!(bed.roster.expire(bed.now.wall).is_empty(), "within the skew of clocks");
            bed.pass(Duration::from_secs(2));
            assert_eq!(bed.roster.expire(bed.now.wall), [key(1)]);
        } else {
            bed.roster.remove(&key(1));
        }
        bed.carry_out();
        assert_eq!(bed.tunnel(), [(2, 1)]);
        assert_eq!(bed.roster.take_handed_over(), [(key(1), key(2))]);
    }
}

#[test]
fn a_snapshot_with_both_keys_hands_nothing_back_whatever_its_order() {
    let (old, new, newer) = (entry(1, 2, None), entry(2, 2, Some(1)), entry(3, 2, Some(2)));
    let mut bed = Bed::new(10);
    assert_eq!(bed.replace(&[newer.clone(), new.clone(), old.clone()]), 0);
    assert_eq!(bed.tunnel(), [(1, 1), (2, 0), (3, 0)]);
    bed.shake(2);
    assert_eq!(bed.tunnel(), [(2, 1), (3, 0)]);
    for order in [[&old, &new, &newer], [&newer, &new, &old], [&new, &newer, &old]] {
        assert_eq!(bed.replace(&order.map(Clone::clone)), 0);
        assert_eq!(bed.tunnel(), [(2, 1), (3, 0)]);
    }
    bed.shake(3);
    assert_eq!(bed.replace(&[old.clone(), new, newer]), 0);
    assert_eq!(bed.tunnel(), [(3, 1)]);
    // The pool takes the renewals back: the old key is a client like any other again.
    assert_eq!(bed.replace(&[old]), 0);
    assert_eq!(bed.tunnel(), [(1, 1)]);
}

#[test]
fn only_the_renewed_clients_own_addresses_are_shared() {
    let mut bed = Bed::new(10);
    bed.add(&entry(1, 2, None)).unwrap();
    bed.add(&entry(4, 4, None)).unwrap();
    for thief in [
        entry(5, 2, None),
        entry(5, 2, Some(4)),
        entry(5, 2, Some(9)),
        entry(5, 2, Some(5)),
    ] {
        assert_eq!(
            bed.add(&thief),
            Err("the address 10.96.0.2/32 is another client's".to_owned())
        );
    }
    assert_eq!(bed.tunnel(), [(1, 1), (4, 1)]);
}

#[test]
fn a_released_connection_is_inactive_until_a_later_handshake() {
    let mut bed = Bed::new(10);
    bed.add(&entry(1, 2, None)).unwrap();
    assert_eq!(bed.active(), [0_u8; 0], "no handshake yet");
    bed.shake(1);
    assert_eq!(bed.active(), [1]);
    bed.pass(Duration::from_secs(1));
    bed.roster.release(&key(1), bed.now.instant);
    bed.observe();
    assert_eq!(bed.active(), [0_u8; 0]);
    assert_eq!(bed.tunnel(), [(1, 1)], "it stays a peer");
    bed.pass(Duration::from_secs(1));
    bed.shake(1);
    assert_eq!(bed.active(), [1]);
    // The pool does not hear of handshakes: a snapshot that still says so takes nothing back.
    let released = PeerEntry {
        released: true,
        ..entry(1, 2, None)
    };
    bed.replace(&[released]);
    bed.observe();
    assert_eq!(bed.active(), [1]);
    bed.pass(Duration::from_secs(179));
    bed.observe();
    assert_eq!(bed.active(), [1]);
    bed.pass(Duration::from_secs(1));
    bed.observe();
    assert_eq!(bed.active(), [0_u8; 0], "three minutes without a handshake");
}

#[test]
fn a_snapshot_after_a_restart_tells_of_releases_too() {
    let mut bed = Bed::new(10);
    let released = PeerEntry {
        released: true,
        ..entry(1, 2, None)
    };
    bed.replace(&[released]);
    bed.observe();
    assert_eq!(bed.active(), [0_u8; 0]);
    bed.pass(Duration::from_millis(10));
    bed.shake(1);
    assert_eq!(bed.active(), [1]);
}

#[test]
fn a_draining_node_takes_renewals_and_snapshots_only_and_a_closed_one_has_no_peers() {
    let mut bed = Bed::new(10);
    bed.add(&entry(1, 2, None)).unwrap();
    bed.roster.draining = Some("drained by its owner");
    let refused = "this node takes no new clients: drained by its owner".to_owned();
    assert_eq!(bed.add(&entry(3, 3, None)), Err(refused));
    bed.add(&entry(1, 2, None)).unwrap();
    bed.add(&entry(2, 2, Some(1))).unwrap();
    assert_eq!(
        bed.replace(&[entry(1, 2, None), entry(2, 2, Some(1)), entry(3, 3, None)]),
        0
    );
    bed.roster.set_prober(Some(key(99)));
    bed.roster.closed = true;
    bed.carry_out();
    assert_eq!(bed.tunnel(), [(99, 0)], "the pool may still knock");
    bed.roster.closed = false;
    bed.carry_out();
    assert_eq!(bed.tunnel(), [(1, 1), (2, 0), (3, 1), (99, 0)]);
}

#[test]
fn a_full_node_still_renews() {
    let mut bed = Bed::new(1);
    bed.add(&entry(1, 2, None)).unwrap();
    assert_eq!(bed.add(&entry(3, 3, None)), Err("this node is full".to_owned()));
    bed.add(&entry(2, 2, Some(1))).unwrap();
    bed.shake(2);
    assert_eq!(bed.tunnel(), [(2, 1)]);
}

#[test]
fn the_prober_is_a_peer_without_addresses_and_follows_its_key() {
    let mut bed = Bed::new(10);
    assert!(bed.roster.set_prober(Some(key(50))) && !bed.roster.set_prober(Some(key(50))));
    bed.carry_out();
    assert_eq!(bed.tunnel(), [(50, 0)]);
    assert!(bed.roster.set_prober(Some(key(51))));
    bed.carry_out();
    assert_eq!(bed.tunnel(), [(51, 0)]);
    assert_eq!(bed.active(), [0_u8; 0]);
}

#[test]
fn a_renewal_that_never_shakes_hands_is_looked_at_less_and_less_and_a_new_one_at_once() {
    let mut bed = Bed::new(10);
    bed.add(&entry(1, 2, None)).unwrap();
    bed.add(&entry(3, 3, None)).unwrap();
    assert_eq!(bed.roster.watches(bed.now.instant), None, "nobody waits");
    bed.add(&entry(2, 2, Some(1))).unwrap();
    let (mut looks, mut last) = (0, Duration::ZERO);
    while let Some(pause) = bed.roster.watches(bed.now.instant) {
        assert!(pause >= last && pause >= Duration::from_millis(10) && pause <= Duration::from_millis(250));
        (looks, last) = (looks + 1, pause);
        bed.pass(pause);
    }
    assert!((300..500).contains(&looks), "{looks} looks");
    assert_eq!(last, Duration::from_millis(250));
    bed.add(&entry(4, 3, Some(3))).unwrap();
    assert_eq!(bed.roster.watches(bed.now.instant), Some(Duration::from_millis(10)));
}

#[test]
fn who_was_renewed_is_remembered_until_the_old_approval_ends_and_no_longer() {
    let mut bed = Bed::new(10);
    bed.add(&entry(1, 2, None)).unwrap();
    bed.add(&entry(2, 2, Some(1))).unwrap();
    bed.shake(2);
    bed.pass(Duration::from_hours(1));
    bed.roster.expire(bed.now.wall);
    assert_eq!(
        bed.roster.renewed.len(),
        1,
        "within the skew of clocks the pool may name it"
    );
    bed.add(&entry(1, 2, None)).unwrap();
    assert_eq!(bed.tunnel(), [(2, 1)], "and it gets nothing back");
    bed.pass(Duration::from_secs(121));
    bed.roster.expire(bed.now.wall);
    assert!(bed.roster.renewed.is_empty());
    assert!(bed.add(&entry(1, 2, None)).is_err(), "it is over");
    assert_eq!(bed.tunnel(), [(2, 1)]);
}
