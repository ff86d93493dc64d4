//! What the pool's signature on its provider list covers, and how one key of the pool vouches for the next.
//!
//! The list is signed over its fields as they stand in the JSON, so neither side has to agree on white space or the order
//! of members: `dvpn-directory-v1\0` and then, each with its length as a big-endian u32 before it: the version (u64
//! big-endian), the expiry (Unix seconds, i64 big-endian), and for every provider in the order of the list its id,
//! endpoint, public key, `allowed_ips` (comma-separated), probe and region, all as text. A field that is left out is signed
//! as one byte 0, which no text is.

use jiff::Timestamp;

use crate::{approval::push_field, contract::ProviderEntry, keys::VerifyingKey};

const ABSENT: &[u8] = b"\0";

/// The bytes under the signature of a provider list.
pub fn signed_bytes(version: u64, expires_at: Timestamp, providers: &[ProviderEntry]) -> Vec<u8> {
    let mut out = b"dvpn-directory-v1\0".to_vec();
    push_field(&mut out, &version.to_be_bytes());
    push_field(&mut out, &expires_at.as_second().to_be_bytes());
    for entry in providers {
        let allowed_ips = entry.allowed_ips.as_ref().map(|prefixes| prefixes.join(","));
        push_field(&mut out, entry.id.as_bytes());
        push_field(&mut out, entry.endpoint.as_bytes());
        push_field(&mut out, entry.public_key.as_bytes());
        for optional in [&allowed_ips, &entry.probe, &entry.region] {
            push_field(&mut out, optional.as_ref().map_or(ABSENT, |text| text.as_bytes()));
        }
    }
    out
}

/// The bytes that the old key signs when the pool changes its key.
pub fn rotation_bytes(from: &VerifyingKey, to: &VerifyingKey) -> Vec<u8> {
    let mut out = b"dvpn-pool-key-v1\0".to_vec();
    push_field(&mut out, from.as_bytes());
    push_field(&mut out, to.as_bytes());
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(probe: Option<&str>) -> ProviderEntry {
        ProviderEntry {
            id: "a".into(),
            endpoint: "203.0.113.1:51820".into(),
            public_key: "k".into(),
            allowed_ips: None,
            probe: probe.map(Into::into),
            region: None,
        }
    }

    #[test]
    fn every_field_of_a_list_is_under_its_signature() {
        let at = Timestamp::from_second(1_000).unwrap();
        let signed = signed_bytes(1, at, &[entry(None)]);
        assert_ne!(signed, signed_bytes(2, at, &[entry(None)]));
        assert_ne!(
            signed,
            signed_bytes(1, Timestamp::from_second(1_001).unwrap(), &[entry(None)])
        );
        assert_ne!(signed, signed_bytes(1, at, &[]));
        assert_ne!(signed, signed_bytes(1, at, &[entry(Some(""))]), "left out is not empty");
        assert_ne!(signed, signed_bytes(1, at, &[entry(None), entry(None)]));
    }
}
