use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair as _};
use dvpn_common::directory::rotation_bytes;
use serde_json::{Value, json};

use super::*;
use crate::directory::{Directory, Policy, parse};

const URL: &str = "https://pool.example/providers";

fn now() -> Timestamp {
    Timestamp::from_second(1_800_000_000).unwrap()
}

fn pair(seed: u8) -> Ed25519KeyPair {
    Ed25519KeyPair::from_seed_unchecked(&[seed; 32]).unwrap()
}

fn key(seed: u8) -> VerifyingKey {
    VerifyingKey::from_bytes(pair(seed).public_key().as_ref().try_into().unwrap()).unwrap()
}

fn rotation(from: u8, to: u8, signer: u8) -> Value {
    let signature = pair(signer).sign(&rotation_bytes(&key(from), &key(to)));
    json!({ "from": key(from).to_string(), "to": key(to).to_string(), "signature": STANDARD.encode(signature.as_ref()) })
}

/// A list of one provider, signed by the key of this seed.
fn signed(seed: u8, version: u64, seconds_left: i64) -> Value {
    let expires_at = Timestamp::from_second(now().as_second() + seconds_left).unwrap();
    let entry = ProviderEntry {
        id: "a".into(),
        endpoint: "9.9.9.9:51820".into(),
        public_key: STANDARD.encode([7; 32]),
        allowed_ips: Some(vec!["0.0.0.0/0".into(), "::/0".into()]),
        probe: None,
        region: Some("eu".into()),
    };
    let signature = pair(seed).sign(&signed_bytes(version, expires_at, std::slice::from_ref(&entry)));
    json!({
        "providers": [entry], "version": version, "expires_at": expires_at.to_string(),
        "signature": STANDARD.encode(signature.as_ref()), "pool_key": key(seed).to_string(),
    })
}

fn with(mut list: Value, field: &str, value: Value) -> Value {
    list[field] = value;
    list
}

fn without(mut list: Value, field: &str) -> Value {
    list.as_object_mut().unwrap().remove(field);
    list
}

fn read(list: &Value, known: &PoolRecord) -> Result<Directory, Error> {
    parse(list.to_string().as_bytes(), &Policy::default(), known, now())
}

fn pinned(seed: u8, version: Option<u64>) -> PoolRecord {
    PoolRecord {
        url: URL.to_owned(),
        key: Some(key(seed)),
        list_version: version,
        ..PoolRecord::default()
    }
}

#[test]
fn a_list_that_signs_itself_tells_the_key_to_pin() {
    let directory = read(&signed(1, 5, 600), &PoolRecord::default()).unwrap();
    assert_eq!((directory.signer, directory.version), (Some(key(1)), Some(5)));
    let wrong = with(signed(1, 5, 600), "pool_key", json!(key(2).to_string()));
    assert_eq!(read(&wrong, &PoolRecord::default()), Err(Error::Signature));
}

#[test]
fn a_pool_that_never_signed_is_believed_as_before() {
    let bare = without(without(signed(1, 5, 600), "signature"), "pool_key");
    assert_eq!(read(&bare, &PoolRecord::default()).unwrap().signer, None);
}

#[test]
fn a_known_pool_must_sign_every_list() {
    let known = pinned(1, None);
    assert_eq!(read(&signed(1, 5, 600), &known).unwrap().signer, Some(key(1)));
    for (missing, wanted) in [
        ("signature", Err(Error::Unsigned)),
        ("version", Err(Error::Unsigned)),
        ("expires_at", Err(Error::Unsigned)),
        // Which key it is, the client knows by itself.
        ("pool_key", Ok(Some(key(1)))),
    ] {
        let read = read(&without(signed(1, 5, 600), missing), &known);
        assert_eq!(read.map(|directory| directory.signer), wanted, "{missing}");
    }
    assert_eq!(read(&json!([]), &known), Err(Error::Unsigned));
}

#[test]
fn a_change_of_any_signed_field_is_seen() {
    let known = pinned(1, None);
    let list = signed(1, 5, 600);
    assert_eq!(
        read(&with(list.clone(), "version", json!(6)), &known),
        Err(Error::Signature)
    );
    let later = json!("2100-01-01T00:00:00Z");
    assert_eq!(
        read(&with(list.clone(), "expires_at", later), &known),
        Err(Error::Signature)
    );
    for (field, value) in [
        ("endpoint", json!("8.8.8.8:51820")),
        ("public_key", json!(STANDARD.encode([8; 32]))),
        ("id", json!("b")),
        ("region", json!("us")),
        ("probe", json!("9.9.9.9:1")),
        ("allowed_ips", json!(["0.0.0.0/0"])),
    ] {
        let mut changed = list.clone();
        changed["providers"][0][field] = value;
        assert_eq!(read(&changed, &known), Err(Error::Signature), "{field}");
    }
}

#[test]
fn a_signed_list_is_over_two_minutes_after_its_end() {
    let known = pinned(1, None);
    assert!(read(&signed(1, 5, -119), &known).is_ok());
    assert!(matches!(read(&signed(1, 5, -120), &known), Err(Error::Expired { .. })));
}

#[test]
fn an_older_list_is_refused_and_the_same_is_taken_again() {
    let known = pinned(1, Some(5));
    assert!(read(&signed(1, 5, 600), &known).is_ok());
    assert!(read(&signed(1, 6, 600), &known).is_ok());
    let refused = read(&signed(1, 4, 600), &known);
    assert_eq!(refused, Err(Error::Older { version: 4, seen: 5 }));
}

#[test]
fn another_key_needs_a_chain_from_the_known_one() {
    let chained = |rotations: Value| read(&with(signed(3, 5, 600), "rotations", rotations), &pinned(1, Some(4)));
    assert_eq!(
        chained(json!([rotation(1, 2, 1), rotation(2, 3, 2)])).unwrap().signer,
        Some(key(3))
    );
    // Older links than ours are passed over.
    let longer = json!([rotation(9, 1, 9), rotation(1, 2, 1), rotation(2, 3, 2)]);
    assert!(chained(longer).is_ok());
    let refused = Error::OtherKey {
        known: key(1),
        announced: key(3),
    };
    for broken in [
        json!([]),
        json!([rotation(1, 2, 1)]),
        json!([rotation(2, 3, 2)]),
        json!([rotation(2, 3, 2), rotation(1, 2, 1)]),
        json!([rotation(1, 3, 3)]),
        json!([rotation(1, 2, 2), rotation(2, 3, 2)]),
    ] {
        assert_eq!(chained(broken.clone()), Err(refused.clone()), "{broken}");
    }
    // The chain says which key signs; the old one signs no more.
    let old = with(signed(1, 5, 600), "pool_key", json!(key(2).to_string()));
    let old = with(old, "rotations", json!([rotation(1, 2, 1)]));
    assert_eq!(read(&old, &pinned(1, None)), Err(Error::Signature));
}

#[test]
fn a_record_holds_for_its_pool_and_its_setting() {
    let mut record = pinned(1, Some(7));
    record.approval_serial = Some(9);
    assert_eq!(record.clone().applied_to(URL, None), record);
    let other = record.clone().applied_to("https://other/providers", None);
    assert_eq!(
        (other.key, other.list_version, other.approval_serial),
        (None, None, None)
    );
    // A key configured later begins anew; the key reached from it by rotations stays.
    let mut configured = record.applied_to(URL, Some(key(2)));
    assert_eq!((configured.key, configured.list_version), (Some(key(2)), None));
    assert!(configured.saw_list(key(3), 8));
    let again = configured.clone().applied_to(URL, Some(key(2)));
    assert_eq!(again.key, Some(key(3)));
    let text = serde_json::to_string(&again).unwrap();
    assert_eq!(serde_json::from_str::<PoolRecord>(&text).unwrap(), again);
}

#[test]
fn serials_only_grow() {
    let mut record = PoolRecord::default();
    assert!(record.saw_approval(key(1), 3));
    assert!(!record.saw_approval(key(1), 3) && !record.saw_approval(key(1), 2));
    assert_eq!(record.approval_serial, Some(3));
}
