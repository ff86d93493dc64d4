//! Which approvals make a peer: one good one, and every way to be wrong.

use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair as _};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use dvpn_common::{
    approval::ApprovalFields,
    contract::PeerEntry,
    keys::{PublicKey, VerifyingKey},
};
use dvpn_daemon::provider::{Change, Ground, Refusal, Serials};
use jiff::Timestamp;

const NOW: i64 = 1_800_000_000;

fn now() -> Timestamp {
    Timestamp::from_second(NOW).unwrap()
}

fn key(byte: u8) -> PublicKey {
    PublicKey::from_bytes([byte; 32]).unwrap()
}

struct Pool(Ed25519KeyPair);

impl Pool {
    fn new(seed: u8) -> Self {
        Self(Ed25519KeyPair::from_seed_unchecked(&[seed; 32]).unwrap())
    }
    fn key(&self) -> VerifyingKey {
        VerifyingKey::from_bytes(self.0.public_key().as_ref().try_into().unwrap()).unwrap()
    }
    fn sign(&self, bytes: &[u8]) -> String {
        STANDARD.encode(self.0.sign(bytes).as_ref())
    }
    fn entry(&self, fields: &ApprovalFields) -> PeerEntry {
        PeerEntry {
            public_key: fields.client_key,
            addresses: fields.addresses.clone(),
            expires_at: fields.expires_at,
            approval: STANDARD.encode(fields.encode()),
            signature: self.sign(&fields.encode()),
            renews: None,
            released: false,
        }
    }
}

fn fields() -> ApprovalFields {
    ApprovalFields {
        pool_id: "pool".into(),
        provider_id: "node-a".parse().unwrap(),
        provider_key: key(1),
        client_key: key(2),
        addresses: vec!["10.96.0.2/32".parse().unwrap(), "fd00:96::2/128".parse().unwrap()],
        issued_at: Timestamp::from_second(NOW - 60).unwrap(),
        expires_at: Timestamp::from_second(NOW + 3600).unwrap(),
        serial: 7,
    }
}

fn ground(pool: &Pool) -> Ground {
    Ground {
        pool_key: pool.key(),
        provider_id: "node-a".parse().unwrap(),
        provider_key: key(1),
        networks: vec!["10.96.0.1/20".parse().unwrap(), "fd00:96::1/64".parse().unwrap()],
    }
}

fn admit(entry: &PeerEntry, serials: &mut Serials) -> Result<(), Refusal> {
    ground(&Pool::new(9)).admit(entry, serials, |_| None, now()).map(drop)
}

#[test]
fn a_good_approval_is_admitted_again_and_again_and_its_renewal_too() {
    let pool = Pool::new(9);
    let mut serials = Serials::default();
    assert_eq!(admit(&pool.entry(&fields()), &mut serials), Ok(()));
    assert_eq!(
        admit(&pool.entry(&fields()), &mut serials),
        Ok(()),
        "a snapshot repeats what was added"
    );
    let renewed = ApprovalFields { serial: 8, ..fields() };
    assert_eq!(admit(&pool.entry(&renewed), &mut serials), Ok(()));
    assert_eq!(
        admit(&pool.entry(&fields()), &mut serials),
        Err(Refusal::Serial { offered: 7, seen: 8 })
    );
    let Some(Change::Whole(record)) = serials.take_change() else {
        panic!("there is something to keep");
    };
    let mut restarted = Serials::decode(&record, now());
    assert_eq!(
        admit(&pool.entry(&fields()), &mut restarted),
        Err(Refusal::Serial { offered: 7, seen: 8 }),
        "a restart forgets no serial"
    );
}

#[test]
fn truncated_extended_and_altered_approvals_are_refused() {
    let pool = Pool::new(9);
    let good = fields().encode();
    let signature = pool.sign(&good);
    let refused = |bytes: &[u8]| {
        let entry = PeerEntry {
            approval: STANDARD.encode(bytes),
            signature: signature.clone(),
            ..pool.entry(&fields())
        };
        assert_eq!(admit(&entry, &mut Serials::default()), Err(Refusal::Signature));
        // Signed as well: then it must not read.
        let entry = PeerEntry {
            signature: pool.sign(bytes),
            ..entry
        };
        admit(&entry, &mut Serials::default()).expect_err("neither signed nor whole")
    };
    for length in 0..good.len() {
        refused(&good[..length]);
    }
    refused(&[&good[..], &[0]].concat());
    for byte in 0..good.len() {
        let mut bad = good.clone();
        bad[byte] ^= 1;
        let entry = PeerEntry {
            approval: STANDARD.encode(&bad),
            signature: signature.clone(),
            ..pool.entry(&fields())
        };
        assert_eq!(
            admit(&entry, &mut Serials::default()),
            Err(Refusal::Signature),
            "byte {byte}"
        );
    }
}

#[test]
fn every_other_way_to_be_wrong_is_refused_by_name() {
    let pool = Pool::new(9);
    let expect = |entry: PeerEntry, refusal: Refusal| assert_eq!(admit(&entry, &mut Serials::default()), Err(refusal));
    let good = || pool.entry(&fields());

    expect(Pool::new(8).entry(&fields()), Refusal::Signature);
    expect(
        PeerEntry {
            approval: "@".into(),
            ..good()
        },
        Refusal::Encoding,
    );
    expect(
        PeerEntry {
            approval: "A".repeat(4096),
            ..good()
        },
        Refusal::Encoding,
    );
    let other = ApprovalFields {
        provider_id: "node-b".parse().unwrap(),
        ..fields()
    };
    expect(pool.entry(&other), Refusal::OtherProvider);
    expect(
        pool.entry(&ApprovalFields {
            provider_key: key(3),
            ..fields()
        }),
        Refusal::OtherProviderKey,
    );
    expect(
        PeerEntry {
            public_key: key(3),
            ..good()
        },
        Refusal::OtherClient,
    );
    expect(
        pool.entry(&ApprovalFields {
            client_key: key(1),
            ..fields()
        }),
        Refusal::OtherClient,
    );
    let stolen = vec!["10.96.0.9/32".parse().unwrap()];
    expect(
        PeerEntry {
            addresses: stolen,
            ..good()
        },
        Refusal::OtherAddresses,
    );
    for outside in [
        "10.97.0.2/32",
        "10.96.0.1/32",
        "10.96.0.0/32",
        "10.96.15.255/32",
        "8.8.8.8/32",
        "fd00:96::1/128",
    ] {
        let address = outside.parse().unwrap();
        expect(
            pool.entry(&ApprovalFields {
                addresses: vec![address],
                ..fields()
            }),
            Refusal::Address(address),
        );
    }
}

#[test]
fn an_approval_holds_only_in_its_time() {
    let pool = Pool::new(9);
    let second = |s: i64| Timestamp::from_second(s).unwrap();
    let late = ApprovalFields {
        issued_at: second(NOW - 7200),
        expires_at: second(NOW - 3600),
        ..fields()
    };
    assert!(matches!(
        admit(&pool.entry(&late), &mut Serials::default()),
        Err(Refusal::Approval(_))
    ));
    let early = ApprovalFields {
        issued_at: second(NOW + 600),
        ..fields()
    };
    assert!(matches!(
        admit(&pool.entry(&early), &mut Serials::default()),
        Err(Refusal::Approval(_))
    ));
    let long = ApprovalFields {
        expires_at: second(NOW + 90_000),
        ..fields()
    };
    assert!(matches!(
        admit(&pool.entry(&long), &mut Serials::default()),
        Err(Refusal::Approval(_))
    ));
    // Our clock may be ahead by the allowed skew, and a peer outlives its approval by no more than that.
    let ends = |end: i64| {
        let entry = PeerEntry {
            expires_at: second(end),
            ..pool.entry(&fields())
        };
        let admitted = ground(&pool).admit(&entry, &mut Serials::default(), |_| None, now());
        admitted.map(|client| client.ends_at)
    };
    assert_eq!(ends(NOW - 119), Ok(second(NOW + 1)));
    assert_eq!(ends(NOW - 120), Err(Refusal::Over(second(NOW - 120))));
    assert_eq!(
        ends(NOW + 7200),
        Ok(second(NOW + 3600 + 120)),
        "the approval's own end counts"
    );
}

#[test]
fn an_address_has_one_holder() {
    let pool = Pool::new(9);
    let holder = |address: &ipnetwork::IpNetwork| (address.to_string() == "10.96.0.2/32").then(|| key(7));
    let result = ground(&pool).admit(&pool.entry(&fields()), &mut Serials::default(), holder, now());
    assert_eq!(result, Err(Refusal::Taken("10.96.0.2/32".parse().unwrap())));
}
