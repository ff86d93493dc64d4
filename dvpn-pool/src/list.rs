//! The provider list as signed bytes, made when it changes and not when it is asked for.
//!
//! The version is the time in milliseconds, or one more than the last if the clock stands or steps back. Across
//! restarts it grows because a ceiling is stored before any version below it is used; see [`List::ceiling_due`].

use axum::body::Bytes;
use base64::{Engine as _, engine::general_purpose::STANDARD};
use dvpn_common::{
    contract::{ProviderEntry, ProviderList},
    directory::signed_bytes,
};
use jiff::{SignedDuration, Timestamp};

use crate::{signing::Signer, store::Node};

/// How long a copy of the list is good.
const LIFE: SignedDuration = SignedDuration::from_hours(1);
/// A copy handed out is good for at least this long.
const LEAST_LIFE: SignedDuration = SignedDuration::from_mins(30);

/// How far the stored ceiling is above the versions in use, in milliseconds of version.
const HEADROOM: u64 = 600_000;

/// One version of the list.
#[derive(Debug, Clone, Default)]
pub struct ProviderDocument {
    /// JSON.
    pub json: Bytes,
    /// Names these bytes, with its quotes.
    pub etag: String,
}

/// The current list.
#[derive(Default)]
pub struct List {
    providers: Vec<ProviderEntry>,
    version: u64,
    ceiling: u64,
    expires_at: Timestamp,
    document: ProviderDocument,
}

impl List {
    /// An empty list whose versions are above `used`, the ceiling of an earlier run.
    pub fn above(used: u64) -> Self {
        Self {
            version: used,
            ceiling: used,
            ..Self::default()
        }
    }

    /// The next ceiling to store, if versions come near the stored one.
    pub fn ceiling_due(&self, now: Timestamp) -> Option<u64> {
        let next = self.version.max(millis(now));
        (next.saturating_add(HEADROOM / 2) > self.ceiling).then(|| next.saturating_add(HEADROOM))
    }

    /// The ceiling is stored.
    pub fn raise_ceiling(&mut self, ceiling: u64) {
        self.ceiling = self.ceiling.max(ceiling);
    }

    /// Takes new providers in.
    pub fn replace<'a>(&mut self, nodes: impl Iterator<Item = &'a Node>, signer: &Signer, now: Timestamp) {
        self.providers = nodes
            .map(|node| ProviderEntry {
                id: node.id.to_string(),
                endpoint: node.endpoint.to_string(),
                public_key: node.public_key.to_string(),
                allowed_ips: None,
                probe: node.probe.map(|address| address.to_string()),
                region: node.region.as_ref().map(ToString::to_string),
            })
            .collect();
        // A clock that leaps ahead of the ceiling does not take the version with it.
        self.version = millis(now).min(self.ceiling).max(self.version + 1);
        self.write(signer, now);
    }

    /// The bytes, with a fresh end if theirs is near.
    pub fn document(&mut self, signer: &Signer, now: Timestamp) -> ProviderDocument {
        if self.expires_at.duration_since(now) < LEAST_LIFE {
            self.write(signer, now);
        }
        self.document.clone()
    }

    fn write(&mut self, signer: &Signer, now: Timestamp) {
        // Whole seconds read better; a time that cannot be added to is far beyond any clock.
        let whole = Timestamp::from_second(now.as_second()).unwrap_or(now);
        self.expires_at = whole.checked_add(LIFE).unwrap_or(Timestamp::MAX);
        let key = signer.ring.current();
        let signature = key.sign(&signed_bytes(self.version, self.expires_at, &self.providers));
        let list = ProviderList::Object {
            providers: std::mem::take(&mut self.providers),
            version: Some(self.version),
            expires_at: Some(self.expires_at),
            signature: Some(STANDARD.encode(signature)),
            pool_key: Some(key.public()),
            rotations: signer.rotations.clone(),
        };
        match serde_json::to_vec(&list) {
            Ok(json) => {
                let etag = format!("\"{}-{}\"", self.version, self.expires_at.as_second());
                self.document = ProviderDocument {
                    json: json.into(),
                    etag,
                };
            }
            Err(error) => tracing::error!(%error, "the provider list was not written; the old one stays"),
        }
        if let ProviderList::Object { providers, .. } = list {
            self.providers = providers;
        }
    }
}

fn millis(now: Timestamp) -> u64 {
    u64::try_from(now.as_millisecond()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::signing::KeyRing;

    fn signer() -> Signer {
        let directory = tempfile::tempdir().unwrap();
        Signer {
            ring: KeyRing::open(&directory.path().join("pool.key"), None).unwrap(),
            rotations: Vec::new(),
        }
    }

    fn list(used: u64, now: Timestamp) -> List {
        let mut list = List::above(used);
        let ceiling = list.ceiling_due(now).unwrap();
        list.raise_ceiling(ceiling);
        list
    }

    #[test]
    fn the_bytes_stay_the_same_until_something_changes_or_they_get_old() {
        let (signer, start) = (signer(), Timestamp::from_second(1_800_000_000).unwrap());
        let mut list = list(0, start);
        list.replace(std::iter::empty(), &signer, start);
        let first = list.document(&signer, start);
        let half_an_hour = start + SignedDuration::from_mins(30);
        assert_eq!(list.document(&signer, half_an_hour).etag, first.etag);
        let later = list.document(&signer, start + SignedDuration::from_mins(31));
        assert_ne!(later.etag, first.etag);
        assert_eq!(list.version, 1_800_000_000_000);
        list.replace(std::iter::empty(), &signer, start);
        assert_eq!(
            list.version, 1_800_000_000_001,
            "the version grows even if the clock stands"
        );
    }

    #[test]
    fn versions_grow_over_a_restart_with_the_clock_set_back_a_day() {
        let (signer, start) = (signer(), Timestamp::from_second(1_800_000_000).unwrap());
        let mut before = list(0, start);
        assert_eq!(before.ceiling_due(start), None, "one write lasts for minutes");
        for _ in 0..100 {
            before.replace(std::iter::empty(), &signer, start);
        }
        let yesterday = start - SignedDuration::from_hours(24);
        let mut after = list(before.ceiling, yesterday);
        after.replace(std::iter::empty(), &signer, yesterday);
        assert!(after.version > before.version);
    }

    #[test]
    fn a_leap_of_the_clock_does_not_use_versions_that_are_not_reserved() {
        let (signer, start) = (signer(), Timestamp::from_second(1_800_000_000).unwrap());
        let mut list = list(0, start);
        list.replace(std::iter::empty(), &signer, start + SignedDuration::from_hours(24));
        assert!(list.version <= list.ceiling);
        assert!(list.ceiling_due(start + SignedDuration::from_hours(24)).is_some());
    }
}
