//! The lease of a provider that the orchestrator made.

use jiff::Timestamp;
use serde::Deserialize;

use super::{Error, read};

/// Longest lease id that is taken.
const MAX_ID_BYTES: usize = 128;

/// Names a lease to the orchestrator: 1 to 128 letters, digits, `-` and `_`, because it becomes part of a path.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Lease(String);

impl Lease {
    pub(super) fn parse(id: String) -> Result<Self, Error> {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
        if (1..=MAX_ID_BYTES).contains(&id.len()) && id.bytes().all(plain) {
            Ok(Self(id))
        } else {
            Err(Error::LeaseId)
        }
    }

    /// As the orchestrator wrote it.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Reads the orchestrator's answer to the renewal of this lease: when it ends now.
    pub fn read_renewal(&self, body: &[u8]) -> Result<Timestamp, Error> {
        let answer: Renewed = read("lease renewal", body)?;
        if answer.lease_id.is_some_and(|id| id != self.0) {
            return Err(Error::Mismatch { field: "lease id" });
        }
        answer.lease_expires_at.ok_or(Error::Unreadable {
            from: "lease renewal",
            reason: "no lease_expires_at".to_owned(),
        })
    }
}

/// Shape only; more of [`dvpn_common::contract::ProvisionResponse`] may come and is not needed.
#[derive(Deserialize)]
struct Renewed {
    #[serde(default)]
    lease_id: Option<String>,
    #[serde(default)]
    lease_expires_at: Option<Timestamp>,
}
