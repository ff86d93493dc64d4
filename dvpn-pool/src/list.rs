//! The provider list as bytes, made when it changes and not when it is asked for.

use axum::body::Bytes;
use dvpn_common::contract::{ProviderEntry, ProviderList};
use jiff::{SignedDuration, Timestamp};

use crate::store::Node;

/// How long a copy of the list is good.
const LIFE: SignedDuration = SignedDuration::from_hours(1);
/// A copy handed out is good for at least this long.
const LEAST_LIFE: SignedDuration = SignedDuration::from_mins(30);

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
    expires_at: Timestamp,
    document: ProviderDocument,
}

impl List {
    /// Takes new providers in. The version is the time in milliseconds, so that it also grows across restarts.
    pub fn replace<'a>(&mut self, nodes: impl Iterator<Item = &'a Node>, now: Timestamp) {
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
        self.version = u64::try_from(now.as_millisecond()).unwrap_or(0).max(self.version + 1);
        self.write(now);
    }

    /// The bytes, with a fresh end if theirs is near.
    pub fn document(&mut self, now: Timestamp) -> ProviderDocument {
        if self.expires_at.duration_since(now) < LEAST_LIFE {
            self.write(now);
        }
        self.document.clone()
    }

    fn write(&mut self, now: Timestamp) {
        // Whole seconds read better; a time that cannot be added to is far beyond any clock.
        let whole = Timestamp::from_second(now.as_second()).unwrap_or(now);
        self.expires_at = whole.checked_add(LIFE).unwrap_or(Timestamp::MAX);
        let list = ProviderList::Object {
            providers: std::mem::take(&mut self.providers),
            version: Some(self.version),
            expires_at: Some(self.expires_at),
            signature: None,
            pool_key: None,
            rotations: Vec::new(),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_stay_the_same_until_something_changes_or_they_get_old() {
        let start = Timestamp::from_second(1_800_000_000).unwrap();
        let mut list = List::default();
        list.replace(std::iter::empty(), start);
        let first = list.document(start);
        assert_eq!(list.document(start + SignedDuration::from_mins(30)).etag, first.etag);
        let later = list.document(start + SignedDuration::from_mins(31));
        assert_ne!(later.etag, first.etag);
        assert_eq!(list.version, 1_800_000_000_000);
        list.replace(std::iter::empty(), start);
        assert_eq!(
            list.version, 1_800_000_000_001,
            "the version grows even if the clock stands"
        );
    }
}
