//! What the targets have in common: a time, a subscription, a provider, keys.

use dvpn_common::{
    approval::ApprovalFields,
    keys::{PublicKey, VerifyingKey},
    limits::REQUIRED_WALLET,
};
use dvpn_core::{
    directory::Provider,
    payment::{Subscription, Verification, judge},
    seal::Material,
};
use jiff::Timestamp;
use zeroize::Zeroizing;

/// The time at which everything is judged.
pub fn now() -> Timestamp {
    Timestamp::from_second(1_800_000_000).expect("a time in range")
}

/// The body of a yes.
pub fn paid_body() -> String {
    format!(r#"{{"active":true,"wallet":"{REQUIRED_WALLET}","interval":"monthly","amount_usd":9.99}}"#)
}

/// A verified subscription.
pub fn subscription() -> Subscription {
    match judge(200, paid_body().as_bytes(), now()) {
        Verification::Paid(subscription) => subscription,
        other => panic!("{other:?}"),
    }
}

/// Any public key.
pub fn key(byte: u8) -> PublicKey {
    PublicKey::from_bytes([byte; 32]).expect("not zero")
}

/// The pool's key. Nobody here signs with it, so nothing may verify.
pub fn pool_key() -> VerifyingKey {
    VerifyingKey::from_bytes([9; 32]).expect("not zero")
}

/// The provider that was asked for.
pub fn provider() -> Provider {
    Provider {
        id: "provider-a".parse().expect("an id"),
        endpoint: "9.9.9.9:51820".parse().expect("an endpoint"),
        public_key: key(1),
        allowed_ips: vec!["0.0.0.0/0".parse().expect("a prefix")],
        probe: None,
        region: None,
    }
}

/// An approval of `key(2)` at [`provider`].
pub fn approval() -> ApprovalFields {
    ApprovalFields {
        pool_id: "pool".into(),
        provider_id: provider().id,
        provider_key: key(1),
        client_key: key(2),
        addresses: vec!["10.96.0.2/32".parse().expect("a prefix"), "fd00::2/128".parse().expect("a prefix")],
        issued_at: now(),
        expires_at: now() + jiff::SignedDuration::from_hours(1),
        serial: 7,
    }
}

/// What sealed files are sealed with.
pub fn material() -> Material {
    Material::KeyFile(Zeroizing::new([1; 32]))
}
