//! The highest serial seen of each client key, so that an older approval never comes back, also after a restart.
//!
//! Kept on disk without the keys themselves: 16 bytes of their SHA-256 tell them apart and say nothing of them.

use std::collections::BTreeMap;

use aws_lc_rs::digest::{SHA256, digest};
use dvpn_common::{
    keys::PublicKey,
    limits::{MAX_APPROVAL_LIFE, MAX_CLOCK_SKEW},
};
use jiff::Timestamp;

use super::Refusal;

/// Most client keys whose serials are remembered.
const MAX_SERIALS: usize = 65_536;
const MAGIC: &[u8; 16] = b"dvpn-serials-v1\0";
const RECORD_BYTES: usize = 32;

type Name = [u8; 16];

/// The highest serial seen of each client key, for as long as an older approval could still be valid.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Serials {
    seen: BTreeMap<Name, (u64, Timestamp)>,
    /// What was seen before this is not known any more: approvals from before are all refused.
    not_before: Option<Timestamp>,
    changed: bool,
}

impl Serials {
    /// Reads [`Serials::encode`]. A record that does not read is the stricter answer: whatever was issued before `now`
    /// may have been replaced since, and is refused.
    pub fn decode(bytes: &[u8], now: Timestamp) -> Self {
        Self::read(bytes).unwrap_or_else(|| Self {
            not_before: Some(now),
            ..Self::default()
        })
    }

    fn read(bytes: &[u8]) -> Option<Self> {
        let records = bytes.strip_prefix(MAGIC)?;
        let (records, rest) = records.as_chunks::<RECORD_BYTES>();
        if !rest.is_empty() || records.len() > MAX_SERIALS {
            return None;
        }
        let mut seen = BTreeMap::new();
        for record in records {
            let (name, numbers) = record.split_first_chunk::<16>()?;
            let (serial, until) = numbers.split_first_chunk::<8>()?;
            let until = i64::from_be_bytes(until.try_into().ok()?);
            seen.insert(
                *name,
                (u64::from_be_bytes(*serial), Timestamp::from_second(until).ok()?),
            );
        }
        Some(Self {
            seen,
            ..Self::default()
        })
    }

    /// For the disk.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        for (name, (serial, until)) in &self.seen {
            out.extend_from_slice(name);
            out.extend_from_slice(&serial.to_be_bytes());
            out.extend_from_slice(&until.as_second().to_be_bytes());
        }
        out
    }

    /// Whether there is something new to keep; asking makes it old.
    pub fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    pub(super) fn check(&self, key: &PublicKey, serial: u64, issued_at: Timestamp) -> Result<(), Refusal> {
        if self.not_before.is_some_and(|start| issued_at < start) {
            return Err(Refusal::Forgotten);
        }
        match self.seen.get(&name(key)) {
            Some((seen, _)) if serial < *seen => Err(Refusal::Serial {
                offered: serial,
                seen: *seen,
            }),
            Some(_) | None => Ok(()),
        }
    }

    pub(super) fn note(&mut self, key: &PublicKey, serial: u64, now: Timestamp) -> Result<(), Refusal> {
        let name = name(key);
        if self.seen.len() >= MAX_SERIALS && !self.seen.contains_key(&name) {
            self.seen.retain(|_, (_, forget_at)| *forget_at > now);
            if self.seen.len() >= MAX_SERIALS {
                return Err(Refusal::Full);
            }
        }
        // Whatever was signed before now has ended by then.
        let forget_at = now
            .saturating_add(MAX_APPROVAL_LIFE + 2 * MAX_CLOCK_SKEW)
            .unwrap_or(Timestamp::MAX);
        let before = self.seen.insert(name, (serial, forget_at));
        self.changed |= before.is_none_or(|(seen, _)| seen != serial);
        Ok(())
    }
}

fn name(key: &PublicKey) -> Name {
    let hash = digest(&SHA256, key.as_bytes());
    let mut name = [0; 16];
    name.iter_mut().zip(hash.as_ref()).for_each(|(to, from)| *to = *from);
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(byte: u8) -> PublicKey {
        PublicKey::from_bytes([byte; 32]).unwrap()
    }
    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn serials_outlive_a_restart_and_name_nobody() {
        let mut serials = Serials::default();
        serials.note(&key(1), 7, at(1000)).unwrap();
        serials.note(&key(2), 9, at(1000)).unwrap();
        assert!(serials.take_changed() && !serials.take_changed());
        serials.note(&key(2), 9, at(2000)).unwrap();
        assert!(!serials.take_changed(), "the same again is nothing new");
        let bytes = serials.encode();
        assert!(!bytes.windows(8).any(|window| window == [1; 8] || window == [2; 8]));
        let again = Serials::decode(&bytes, at(3000));
        assert_eq!(
            again.check(&key(1), 6, at(900)),
            Err(Refusal::Serial { offered: 6, seen: 7 })
        );
        assert_eq!(again.check(&key(1), 7, at(900)), Ok(()));
        assert_eq!(again.check(&key(3), 1, at(900)), Ok(()));
    }

    #[test]
    fn a_damaged_record_refuses_what_was_issued_before() {
        let mut serials = Serials::default();
        serials.note(&key(1), 7, at(1000)).unwrap();
        let bytes = serials.encode();
        for bad in [
            &bytes[..bytes.len() - 1],
            &[&bytes[..], &[0]].concat(),
            b"",
            b"something else",
        ] {
            let read = Serials::decode(bad, at(5000));
            assert_eq!(read.check(&key(9), 100, at(4999)), Err(Refusal::Forgotten));
            assert_eq!(read.check(&key(9), 100, at(5000)), Ok(()));
        }
    }
}
