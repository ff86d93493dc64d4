//! What the pool's signature on its provider list covers, and how one key of the pool vouches for the next.
//!
//! The list is signed over its fields as they stand in the JSON, so neither side has to agree on white space or the order
//! of members: `dvpn-directory-v2\0`, the version (u64), the expiry (nanoseconds since 1970, i128), the number of
//! providers (u32), and for every provider in the order of the list its id, endpoint, public key, `allowed_ips`, probe
//! and region. Numbers are big-endian. A text has its length (u32) before it; what may be left out has one byte before
//! it, 0 for absent and nothing more, 1 for present; `allowed_ips` has the number of its prefixes (u32) before them. So
//! the bytes read back in one way only, and no two lists share them.

use jiff::Timestamp;

use crate::{approval::push_field, contract::ProviderEntry, keys::VerifyingKey};

const MAGIC: &[u8] = b"dvpn-directory-v2\0";
const ABSENT: u8 = 0;
const PRESENT: u8 = 1;

/// The bytes under the signature of a provider list.
pub fn signed_bytes(version: u64, expires_at: Timestamp, providers: &[ProviderEntry]) -> Vec<u8> {
    let mut out = MAGIC.to_vec();
    out.extend_from_slice(&version.to_be_bytes());
    out.extend_from_slice(&expires_at.as_nanosecond().to_be_bytes());
    push_count(&mut out, providers.len());
    for entry in providers {
        for text in [&entry.id, &entry.endpoint, &entry.public_key] {
            push_field(&mut out, text.as_bytes());
        }
        match &entry.allowed_ips {
            None => out.push(ABSENT),
            Some(prefixes) => {
                out.push(PRESENT);
                push_count(&mut out, prefixes.len());
                for prefix in prefixes {
                    push_field(&mut out, prefix.as_bytes());
                }
            }
        }
        for optional in [&entry.probe, &entry.region] {
            match optional {
                None => out.push(ABSENT),
                Some(text) => {
                    out.push(PRESENT);
                    push_field(&mut out, text.as_bytes());
                }
            }
        }
    }
    out
}

fn push_count(out: &mut Vec<u8>, count: usize) {
    // A list that is read has 4 MiB at most, far fewer of anything than a u32 counts.
    out.extend_from_slice(&u32::try_from(count).unwrap_or(u32::MAX).to_be_bytes());
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
    use proptest::prelude::*;

    fn entry(allowed_ips: Option<&[&str]>, probe: Option<&str>) -> ProviderEntry {
        ProviderEntry {
            id: "a".into(),
            endpoint: "203.0.113.1:51820".into(),
            public_key: "k".into(),
            allowed_ips: allowed_ips.map(|all| all.iter().map(ToString::to_string).collect()),
            probe: probe.map(Into::into),
            region: None,
        }
    }

    #[test]
    fn every_field_of_a_list_is_under_its_signature() {
        let at = Timestamp::from_second(1_000).unwrap();
        let signed = signed_bytes(1, at, &[entry(None, None)]);
        assert_ne!(signed, signed_bytes(2, at, &[entry(None, None)]));
        let later = Timestamp::new(1_000, 1).unwrap();
        assert_ne!(
            signed,
            signed_bytes(1, later, &[entry(None, None)]),
            "to the last digit"
        );
        assert_ne!(signed, signed_bytes(1, at, &[]));
        assert_ne!(signed, signed_bytes(1, at, &[entry(None, None), entry(None, None)]));
    }

    #[test]
    fn absent_empty_and_joined_are_three_things() {
        let at = Timestamp::from_second(1_000).unwrap();
        let bytes = |entry: ProviderEntry| signed_bytes(1, at, &[entry]);
        let none: &[&str] = &[];
        let all = [
            bytes(entry(None, None)),
            bytes(entry(None, Some(""))),
            bytes(entry(None, Some("\0"))),
            bytes(entry(Some(none), None)),
            bytes(entry(Some(&[""]), None)),
            bytes(entry(Some(&["\0"]), None)),
            bytes(entry(Some(&["a,b"]), None)),
            bytes(entry(Some(&["a", "b"]), None)),
            bytes(entry(Some(&["ab"]), None)),
        ];
        let different: std::collections::BTreeSet<_> = all.iter().collect();
        assert_eq!(different.len(), all.len());
    }

    /// Reads the bytes back. That this gives every list again is what makes them its own.
    struct Reader<'a>(&'a [u8]);

    impl Reader<'_> {
        fn take<const N: usize>(&mut self) -> [u8; N] {
            let (taken, rest) = self.0.split_first_chunk().expect("enough bytes");
            self.0 = rest;
            *taken
        }
        fn count(&mut self) -> usize {
            u32::from_be_bytes(self.take()) as usize
        }
        fn text(&mut self) -> String {
            let length = self.count();
            let (text, rest) = self.0.split_at(length);
            self.0 = rest;
            String::from_utf8(text.to_vec()).unwrap()
        }
        fn optional<T>(&mut self, read: impl FnOnce(&mut Self) -> T) -> Option<T> {
            match self.take() {
                [ABSENT] => None,
                [PRESENT] => Some(read(self)),
                [other] => panic!("{other} is neither"),
            }
        }
        fn list(mut self) -> (u64, i128, Vec<ProviderEntry>) {
            self.0 = self.0.strip_prefix(MAGIC).expect("our magic");
            let version = u64::from_be_bytes(self.take());
            let expires_at = i128::from_be_bytes(self.take());
            let count = self.count();
            let providers = (0..count)
                .map(|_| ProviderEntry {
                    id: self.text(),
                    endpoint: self.text(),
                    public_key: self.text(),
                    allowed_ips: self.optional(|reader| (0..reader.count()).map(|_| reader.text()).collect()),
                    probe: self.optional(Self::text),
                    region: self.optional(Self::text),
                })
                .collect();
            assert!(self.0.is_empty(), "{} bytes too many", self.0.len());
            (version, expires_at, providers)
        }
    }

    /// Short texts of what could be mistaken for something else.
    fn text() -> impl Strategy<Value = String> {
        prop::collection::vec(
            prop::sample::select(vec!["", ",", "\0", "\u{1}", "a", "b", "a,b", "\0\0\0\u{1}a"]),
            0..4,
        )
        .prop_map(|parts| parts.concat())
    }

    fn provider() -> impl Strategy<Value = ProviderEntry> {
        let prefixes = prop::option::of(prop::collection::vec(text(), 0..4));
        let optional = || prop::option::of(text());
        (text(), text(), text(), prefixes, optional(), optional()).prop_map(
            |(id, endpoint, public_key, allowed_ips, probe, region)| ProviderEntry {
                id,
                endpoint,
                public_key,
                allowed_ips,
                probe,
                region,
            },
        )
    }

    proptest! {
        #[test]
        fn the_bytes_of_a_list_read_back_as_that_list_alone(
            version: u64,
            nanosecond in -1_000_000_000_000_000_000_i128..4_000_000_000_000_000_000,
            providers in prop::collection::vec(provider(), 0..4),
        ) {
            let at = Timestamp::from_nanosecond(nanosecond).unwrap();
            let bytes = signed_bytes(version, at, &providers);
            prop_assert_eq!(Reader(&bytes).list(), (version, nanosecond, providers));
        }
    }
}
