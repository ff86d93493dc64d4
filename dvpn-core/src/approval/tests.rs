use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair as _};
use dvpn_common::{contract::KeyRotation, directory::rotation_bytes};
use jiff::SignedDuration;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::{
    Failure, Retry,
    payment::{Verification, judge},
};

fn now() -> Timestamp {
    Timestamp::from_second(1_800_000_000).unwrap()
}

fn paid(hours: i64) -> Subscription {
    let end = (now() + SignedDuration::from_hours(hours)).as_second();
    let body = json!({
        "active": true, "wallet": dvpn_common::limits::REQUIRED_WALLET, "interval": "monthly", "amount_usd": 9.99,
        "expires_at": end,
    });
    // Judged in the past, so that a subscription can be over by now.
    match judge(
        200,
        body.to_string().as_bytes(),
        now() - SignedDuration::from_hours(1000),
    ) {
        Verification::Paid(subscription) => subscription,
        other @ (Verification::NotPaid(_) | Verification::CannotTell(_)) => panic!("{other:?}"),
    }
}

fn key(byte: u8) -> PublicKey {
    PublicKey::from_bytes([byte; 32]).unwrap()
}

fn provider() -> Provider {
    Provider {
        id: "provider-a".parse().unwrap(),
        endpoint: "9.9.9.9:51820".parse().unwrap(),
        public_key: key(1),
        allowed_ips: vec!["0.0.0.0/0".parse().unwrap()],
        probe: None,
        region: None,
    }
}

fn networks(texts: &[&str]) -> Vec<IpNetwork> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

/// Asks as everybody does, with the changes of a test.
struct Asking {
    subscription: Subscription,
    static_addresses: Vec<IpNetwork>,
    pool_key: Option<VerifyingKey>,
    last_serial: Option<u64>,
}

impl Asking {
    fn new() -> Self {
        Self {
            subscription: paid(700),
            static_addresses: Vec::new(),
            pool_key: None,
            last_serial: None,
        }
    }
    fn answer(&self, status: u16, body: &[u8]) -> Result<Approval, Error> {
        Approval::from_pool(
            &PoolRequest {
                subscription: &self.subscription,
                provider: &provider(),
                client_key: &key(2),
                static_addresses: &self.static_addresses,
                pool_key: self.pool_key.as_ref(),
                last_serial: self.last_serial,
                now: now(),
            },
            status,
            body,
        )
    }
    fn json(&self, body: &Value) -> Result<Approval, Error> {
        self.answer(200, body.to_string().as_bytes())
    }
}

fn pool() -> Ed25519KeyPair {
    Ed25519KeyPair::from_seed_unchecked(&[9; 32]).unwrap()
}

fn pool_key() -> VerifyingKey {
    VerifyingKey::from_bytes(pool().public_key().as_ref().try_into().unwrap()).unwrap()
}

fn fields() -> ApprovalFields {
    ApprovalFields {
        pool_id: "pool".into(),
        provider_id: "provider-a".parse().unwrap(),
        provider_key: key(1),
        client_key: key(2),
        addresses: networks(&["10.96.0.2/32", "fd00::2/128"]),
        issued_at: now(),
        expires_at: now() + SignedDuration::from_hours(2),
        serial: 7,
    }
}

fn signed_answer(fields: &ApprovalFields) -> Value {
    let bytes = fields.encode();
    json!({
        "approved": true, "approval": STANDARD.encode(&bytes), "signature": STANDARD.encode(pool().sign(&bytes)),
        "addresses": fields.addresses, "gateways": ["10.96.0.1"],
    })
}

#[test]
fn a_pool_that_speaks_only_the_contract_approves_with_two_hundred() {
    let mut asking = Asking::new();
    asking.static_addresses = networks(&["10.8.0.2/24"]);
    for body in ["", "{}", "{\"approved\":true}", "{\"status\":\"ok\"}", " \n"] {
        let approval = asking.answer(200, body.as_bytes()).unwrap();
        assert_eq!(approval.addresses(), networks(&["10.8.0.2/32"]));
        assert_eq!(approval.expires_at(), now() + SignedDuration::from_hours(24));
        assert_eq!((approval.client_key(), approval.signed()), (&key(2), None));
        assert_eq!(approval.provider(), &provider());
    }
    assert!(asking.answer(204, b"").is_ok());
    asking.static_addresses.clear();
    assert_eq!(asking.answer(200, b""), Err(Error::NoAddress));
}

#[test]
fn every_refusal_has_its_verdict() {
    let asking = Asking::new();
    for (status, body, retry) in [
        (200, "{\"approved\":false,\"error\":\"full\"}", Retry::Now),
        (401, "", Retry::Never),
        (402, "{\"error\":\"unpaid\"}", Retry::Never),
        (403, "{\"error\":\"not here\"}", Retry::Now),
        (404, "<html>", Retry::Now),
        (409, "", Retry::Now),
        (503, "", Retry::Now),
        (500, "", Retry::Backoff),
        (429, "", Retry::Backoff),
        (302, "", Retry::Backoff),
        (200, "<html>", Retry::Backoff),
        (200, "[]", Retry::Backoff),
        (200, "{\"approved\":\"false\"}", Retry::Backoff),
        (200, "{\"approved\":tr", Retry::Backoff),
        (200, "{\"approved\":true,\"approved\":false}", Retry::Backoff),
    ] {
        let error = asking.answer(status, body.as_bytes()).unwrap_err();
        assert_eq!(error.retry(), retry, "{status} {body}: {error}");
        assert_eq!(Failure::from(error).retry, retry);
    }
    let said = asking.answer(403, b"{\"error\":\"not\\u001b here\"}").unwrap_err();
    assert!(
        said.to_string().contains("not· here") && said.to_string().contains("provider-a"),
        "{said}"
    );
    let large = vec![b' '; MAX_BODY_BYTES + 1];
    assert!(matches!(
        asking.answer(200, &[b"{}".as_slice(), &large].concat()),
        Err(Error::Unreadable { .. })
    ));
}

#[test]
fn a_subscription_that_is_over_approves_nothing_and_shortens_the_approval() {
    let mut asking = Asking::new();
    asking.subscription = paid(0);
    assert!(matches!(
        asking.json(&json!({ "address": "10.96.0.2/32" })),
        Err(Error::SubscriptionOver(_))
    ));
    asking.subscription = paid(3);
    let approval = asking.json(&json!({ "address": "10.96.0.2/32" })).unwrap();
    assert_eq!(approval.expires_at(), asking.subscription.valid_until());
    let hour = now() + SignedDuration::from_hours(1);
    assert_eq!(
        asking
            .json(&json!({ "address": "10.96.0.2", "expires_at": hour }))
            .unwrap()
            .expires_at(),
        hour
    );
    assert!(matches!(
        asking.json(&json!({ "address": "10.96.0.2", "expires_at": now() })),
        Err(Error::Over(_))
    ));
}

#[test]
fn addresses_are_single_private_hosts_one_of_each_family() {
    let asking = Asking::new();
    let both =
        asking.json(&json!({ "addresses": ["10.96.0.2/32", "fd00::2/128"], "gateways": ["10.96.0.1", "fd00::1"] }));
    assert_eq!(
        both.as_ref().unwrap().addresses(),
        networks(&["10.96.0.2/32", "fd00::2/128"])
    );
    assert_eq!(both.unwrap().gateways().len(), 2);
    for addresses in [
        json!(["10.96.0.0/24"]),
        json!(["10.96.0.2/31"]),
        json!(["8.8.8.8/32"]),
        json!(["127.0.0.1/32"]),
        json!(["0.0.0.0/0"]),
        json!(["224.0.0.1/32"]),
        json!(["10.96.0.2/32", "10.96.0.3/32"]),
        json!(["fd00::2/64"]),
        json!(["2606:4700::1/128"]),
        json!(["fe80::1/128"]),
    ] {
        let error = asking.json(&json!({ "addresses": addresses })).unwrap_err();
        assert!(
            matches!(error, Error::Address { field: "address", .. }),
            "{addresses}: {error}"
        );
    }
    assert_eq!(asking.json(&json!({ "addresses": [] })), Err(Error::NoAddress));
    for gateways in [
        json!(["8.8.8.8"]),
        json!(["127.0.0.1"]),
        json!(["169.254.169.254"]),
        json!(vec!["10.0.0.1"; 5]),
    ] {
        let error = asking
            .json(&json!({ "address": "10.96.0.2", "gateways": gateways }))
            .unwrap_err();
        assert!(
            matches!(error, Error::Address { field: "gateway", .. }),
            "{gateways}: {error}"
        );
    }
    let other = asking.json(&json!({ "address": "10.96.0.2", "provider_id": "provider-b" }));
    assert_eq!(other, Err(Error::Mismatch { field: "provider id" }));
}

#[test]
fn a_signed_approval_is_verified_and_carried_as_it_came() {
    let mut asking = Asking::new();
    for key in [None, Some(pool_key())] {
        asking.pool_key = key;
        let approval = asking.json(&signed_answer(&fields())).unwrap();
        assert_eq!(approval.signed().unwrap().bytes, fields().encode());
        assert_eq!(approval.addresses(), fields().addresses);
        assert_eq!(approval.expires_at(), fields().expires_at);
    }
    // The signed addresses count where the answer names none.
    let mut answer = signed_answer(&fields());
    answer.as_object_mut().unwrap().remove("addresses");
    assert_eq!(asking.json(&answer).unwrap().addresses(), fields().addresses);
}

#[test]
fn a_known_pool_key_admits_nothing_unsigned_or_signed_by_another() {
    let mut asking = Asking::new();
    asking.pool_key = Some(pool_key());
    assert_eq!(asking.json(&json!({ "address": "10.96.0.2" })), Err(Error::Unsigned));
    assert_eq!(asking.answer(200, b""), Err(Error::Unsigned));
    let answer = signed_answer(&fields());
    for field in ["approval", "signature"] {
        let mut half = answer.clone();
        half.as_object_mut().unwrap().remove(field);
        assert_eq!(asking.json(&half), Err(Error::Signature), "without {field}");
    }
    let mut other = fields();
    other.serial = 8;
    let mut exchanged = signed_answer(&other);
    exchanged["signature"] = answer["signature"].clone();
    assert_eq!(asking.json(&exchanged), Err(Error::Signature));
    asking.pool_key = Some(VerifyingKey::from_bytes([5; 32]).unwrap());
    assert_eq!(asking.json(&answer), Err(Error::Signature));
}

#[test]
fn what_is_signed_must_be_what_was_asked() {
    type Change = fn(&mut ApprovalFields);
    let mut asking = Asking::new();
    let changes: [(&str, Change); 3] = [
        ("provider id", |f| f.provider_id = "provider-b".parse().unwrap()),
        ("provider key", |f| f.provider_key = key(8)),
        ("client key", |f| f.client_key = key(8)),
    ];
    for pool_key in [None, Some(pool_key())] {
        asking.pool_key = pool_key;
        for (field, change) in changes {
            let mut wrong = fields();
            change(&mut wrong);
            assert_eq!(asking.json(&signed_answer(&wrong)), Err(Error::Mismatch { field }));
        }
        let mut answer = signed_answer(&fields());
        answer["addresses"] = json!(["10.96.0.3/32"]);
        assert_eq!(asking.json(&answer), Err(Error::Mismatch { field: "addresses" }));
        for (from, to) in [(-30, -1), (1, 2), (0, 25), (2, 1)] {
            let mut wrong = fields();
            wrong.issued_at = now() + SignedDuration::from_hours(from);
            wrong.expires_at = now() + SignedDuration::from_hours(to);
            assert!(
                matches!(asking.json(&signed_answer(&wrong)), Err(Error::Signed(_))),
                "{from} to {to}"
            );
        }
    }
}

fn rotated(from: u8, to: u8, signer: u8) -> KeyRotation {
    let pair = |seed: u8| Ed25519KeyPair::from_seed_unchecked(&[seed; 32]).unwrap();
    let key = |seed: u8| VerifyingKey::from_bytes(pair(seed).public_key().as_ref().try_into().unwrap()).unwrap();
    let (from, to) = (key(from), key(to));
    let signature = STANDARD.encode(pair(signer).sign(&rotation_bytes(&from, &to)).as_ref());
    KeyRotation { from, to, signature }
}

#[test]
fn an_approval_of_a_new_key_is_believed_along_the_chain_that_comes_with_it() {
    // The pool's key of `signed_answer` is that of seed 9.
    let first = rotated(7, 8, 7);
    let pinned = first.from;
    let asking = Asking {
        pool_key: Some(pinned),
        ..Asking::new()
    };
    let mut answer = signed_answer(&fields());
    assert_eq!(
        asking.json(&answer),
        Err(Error::Signature),
        "nothing is told of another key"
    );
    answer["pool_key"] = json!(pool_key());
    let no_path = Err(Error::PoolKey(crate::pool_key::Error::NoPath {
        pinned,
        wanted: pool_key(),
    }));
    assert_eq!(asking.json(&answer), no_path, "told, and not vouched for");
    answer["rotations"] = json!([first, rotated(8, 9, 8)]);
    let approval = asking.json(&answer).unwrap();
    assert_eq!(approval.signer(), Some(&pool_key()));
    assert_eq!(approval.serial(), Some(7));

    answer["rotations"] = json!([rotated(7, 8, 7), rotated(8, 9, 7)]);
    assert!(
        matches!(
            asking.json(&answer),
            Err(Error::PoolKey(crate::pool_key::Error::Signature { .. }))
        ),
        "forged"
    );
    answer["rotations"] = json!(vec![rotated(7, 9, 7); crate::pool_key::MAX_ROTATIONS + 1]);
    assert!(matches!(
        asking.json(&answer),
        Err(Error::PoolKey(crate::pool_key::Error::TooLong(_)))
    ));
    // The chain leads to the key; the signature must still be that key's.
    answer["rotations"] = json!([rotated(7, 6, 7)]);
    answer["pool_key"] = json!(rotated(7, 6, 7).to);
    assert_eq!(asking.json(&answer), Err(Error::Signature));
    // Who knows no key learns none from an approval.
    let stranger = Asking::new().json(&signed_answer(&fields())).unwrap();
    assert_eq!(stranger.signer(), None);
}

fn provisioned(body: &Value, own: &[PublicKey]) -> Result<Approval, Error> {
    let asked = ProvisionRequest {
        subscription: &paid(700),
        client_key: &key(2),
        policy: &directory::Policy {
            own_keys: own,
            ..directory::Policy::default()
        },
        static_addresses: &networks(&["10.8.0.2/32"]),
        now: now(),
    };
    Approval::from_provision(&asked, body.to_string().as_bytes())
}

#[test]
fn an_orchestrated_provider_is_checked_as_a_listed_one() {
    let good = json!({ "id": "fallback-1", "endpoint": "9.9.9.9:51820", "public_key": key(3).to_string() });
    let approval = provisioned(&good, &[]).unwrap();
    assert_eq!(approval.provider().id.as_str(), "fallback-1");
    assert_eq!(approval.provider().allowed_ips.len(), 2);
    assert_eq!(approval.addresses(), networks(&["10.8.0.2/32"]));
    for (field, value) in [
        ("id", json!("a b")),
        ("endpoint", json!("9.9.9.9:0")),
        ("endpoint", json!("10.0.0.1:1")),
        ("public_key", json!("x")),
        ("allowed_ips", json!(["x"])),
        ("address", json!("8.8.8.8/32")),
        ("address", json!("10.0.0.0/8")),
        ("public_key", json!(key(2).to_string())),
        ("public_key", json!("AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=")),
        ("client_public_key", json!(key(3).to_string())),
        ("addresses", json!(["10.8.0.3/32", "10.8.0.4/32"])),
        ("gateways", json!(["8.8.8.8"])),
        ("lease_id", json!("../providers")),
        ("lease_id", json!("")),
        ("lease_id", json!("x".repeat(129))),
        ("lease_expires_at", json!(now() - SignedDuration::from_secs(1))),
        ("lease_expires_at", json!("soon")),
        ("id", json!(7)),
    ] {
        let mut bad = good.clone();
        bad[field] = value.clone();
        assert!(provisioned(&bad, &[]).is_err(), "{field} {value}");
    }
    assert!(matches!(provisioned(&good, &[key(3)]), Err(Error::Offer(_))));
    assert!(matches!(
        provisioned(&json!([]), &[]),
        Err(Error::Unreadable {
            from: "provisioning",
            ..
        })
    ));
}

#[test]
fn a_lease_ends_the_approval_and_its_renewal_extends_it_no_further_than_payment_and_a_day() {
    let minutes = |count| now() + SignedDuration::from_mins(count);
    let leased = json!({
        "id": "fallback-1", "endpoint": "9.9.9.9:51820", "public_key": key(3).to_string(),
        "client_public_key": key(2).to_string(), "addresses": ["10.8.0.3/32", "fd00::3/128"],
        "gateways": ["10.8.0.1"], "lease_id": "aB-_9", "lease_expires_at": minutes(10),
    });
    let mut approval = provisioned(&leased, &[]).unwrap();
    assert!(!approval.is_from_pool());
    assert_eq!(approval.addresses(), networks(&["10.8.0.3/32", "fd00::3/128"]));
    assert_eq!(approval.gateways().len(), 1);
    assert_eq!(approval.expires_at(), minutes(10));
    let lease = approval.lease().unwrap().clone();
    assert_eq!(lease.as_str(), "aB-_9");

    let answer = json!({ "lease_id": "aB-_9", "lease_expires_at": minutes(15) }).to_string();
    let until = lease.read_renewal(answer.as_bytes()).unwrap();
    approval.extend_lease(&paid(700), until, minutes(5)).unwrap();
    assert_eq!(approval.expires_at(), minutes(15));
    approval.extend_lease(&paid(700), Timestamp::MAX, minutes(5)).unwrap();
    assert_eq!(approval.expires_at(), minutes(5 + 24 * 60));
    approval.extend_lease(&paid(1), Timestamp::MAX, minutes(5)).unwrap();
    assert_eq!(approval.expires_at(), minutes(60));
    assert!(
        approval.extend_lease(&paid(1), Timestamp::MAX, minutes(61)).is_err(),
        "not paid any more"
    );
    assert!(
        approval.extend_lease(&paid(700), minutes(5), minutes(6)).is_err(),
        "over already"
    );
    assert_eq!(
        approval.expires_at(),
        minutes(60),
        "a refused extension changes nothing"
    );

    for bad in [
        json!({ "lease_id": "another", "lease_expires_at": minutes(15) }),
        json!({ "lease_id": "aB-_9" }),
        json!({}),
        json!([]),
    ] {
        assert!(lease.read_renewal(bad.to_string().as_bytes()).is_err(), "{bad}");
    }
}

proptest! {
    #[test]
    fn nothing_makes_the_readers_panic(status in 100_u16..600, body in proptest::collection::vec(any::<u8>(), 0..300)) {
        let asking = Asking { pool_key: Some(pool_key()), ..Asking::new() };
        prop_assert!(asking.answer(status, &body).is_err());
    }

    #[test]
    fn an_approval_never_outlives_subscription_day_or_answer(hours in 1_i64..800, answer in 1_i64..100) {
        let mut asking = Asking::new();
        asking.subscription = paid(hours);
        let end = now() + SignedDuration::from_hours(answer);
        let approval = asking.json(&json!({ "address": "10.96.0.2", "expires_at": end })).unwrap();
        prop_assert_eq!(approval.expires_at(), now() + SignedDuration::from_hours(hours.min(answer).min(24)));
    }
}

#[test]
fn an_approval_with_a_lower_serial_than_seen_is_refused() {
    let asking = |last| Asking {
        pool_key: Some(pool_key()),
        last_serial: last,
        ..Asking::new()
    };
    let answer = signed_answer(&fields());
    for last in [None, Some(6), Some(7)] {
        assert_eq!(asking(last).json(&answer).unwrap().serial(), Some(7));
    }
    assert_eq!(asking(Some(8)).json(&answer), Err(Error::Older { serial: 7, seen: 8 }));
}

#[test]
fn an_approval_continues_another_at_the_same_addresses_of_the_same_provider() {
    let answer = |body: Value| Asking::new().json(&body).unwrap();
    let old = answer(json!({ "address": "10.96.0.2/32" }));
    assert!(old.continues(&old), "the same key needs no hand-over");
    let other = Approval {
        client_key: key(3),
        ..answer(json!({ "address": "10.96.0.2/32" }))
    };
    assert!(!other.continues(&old), "no gateway shows that the addresses moved");
    let other = Approval {
        client_key: key(3),
        ..answer(json!({ "address": "10.96.0.2/32", "gateways": ["10.96.0.1"] }))
    };
    assert!(other.continues(&old));
    let moved = answer(json!({ "address": "10.96.0.3/32", "gateways": ["10.96.0.1"] }));
    assert!(!moved.continues(&old));
}
