//! Whose list it is: the pool's signature, and how the pool's key changes.
//!
//! The key of a pool is configured, or pinned when its first correctly self-signed list is seen. From then on a list
//! without that key's signature is nobody's. The key changes only over a chain of rotations, each signed by the key it
//! replaces.

use aws_lc_rs::signature::{ED25519, UnparsedPublicKey};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use dvpn_common::{
    contract::{KeyRotation, ProviderEntry},
    directory::signed_bytes,
    keys::VerifyingKey,
    limits::MAX_CLOCK_SKEW,
};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::Error;
use crate::pool_key;

/// What is known of one pool from earlier, kept across restarts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolRecord {
    /// Whose record this is: `POOL_URL`.
    pub url: String,
    /// `POOL_PUBLIC_KEY` when the key was learned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub configured: Option<VerifyingKey>,
    /// The pool's key: configured, or pinned, or where a chain of rotations led.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<VerifyingKey>,
    /// The highest version of a signed list that was taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub list_version: Option<u64>,
    /// The highest serial of a signed approval that was taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub approval_serial: Option<u64>,
}

impl PoolRecord {
    /// The record as it holds for this pool and this setting: another pool's says nothing, and a key that was
    /// configured anew is where the chain begins.
    #[must_use]
    pub fn applied_to(self, url: &str, configured: Option<VerifyingKey>) -> Self {
        let fresh = Self {
            url: url.to_owned(),
            configured,
            key: configured,
            ..Self::default()
        };
        if self.url != url {
            return fresh;
        }
        match configured {
            Some(_) if self.configured != configured => fresh,
            Some(_) | None => Self { configured, ..self },
        }
    }

    /// Takes note of a list that was believed. True if the record changed.
    pub fn saw_list(&mut self, signer: VerifyingKey, version: u64) -> bool {
        let changed = self.key != Some(signer) || self.list_version != Some(version);
        self.key = Some(signer);
        self.list_version = Some(version);
        changed
    }

    /// Takes note of a signed approval that was believed. True if the record changed.
    pub fn saw_approval(&mut self, signer: VerifyingKey, serial: u64) -> bool {
        let before = (self.key, self.approval_serial);
        self.key = Some(signer);
        self.approval_serial = self.approval_serial.max(Some(serial));
        before != (self.key, self.approval_serial)
    }
}

/// The signed parts of a list, as they stand in it.
pub(super) struct Claim<'a> {
    pub(super) providers: &'a [ProviderEntry],
    pub(super) version: Option<u64>,
    pub(super) expires_at: Option<Timestamp>,
    pub(super) signature: Option<&'a str>,
    pub(super) pool_key: Option<VerifyingKey>,
    pub(super) rotations: &'a [KeyRotation],
}

impl Claim<'_> {
    /// Who signed the list: nobody for a pool whose key was never seen and that signs nothing.
    pub(super) fn check(&self, known: &PoolRecord, now: Timestamp) -> Result<Option<VerifyingKey>, Error> {
        let signer = match (known.key, self.pool_key, self.signature) {
            (Some(known), announced, _) => {
                let announced = announced.unwrap_or(known);
                pool_key::follow(known, announced, self.rotations)
                    .ok()
                    .ok_or(Error::OtherKey { known, announced })?
            }
            // First use: what the list calls the pool's key is believed if the list is signed with it.
            (None, Some(announced), Some(_)) => announced,
            (None, None, _) | (None, Some(_), None) => return self.unsigned(now),
        };
        let signature = self.signature.ok_or(Error::Unsigned)?;
        let (Some(version), Some(expires_at)) = (self.version, self.expires_at) else {
            return Err(Error::Unsigned);
        };
        if !is_signed(&signer, &signed_bytes(version, expires_at, self.providers), signature) {
            return Err(Error::Signature);
        }
        if expires_at.saturating_add(MAX_CLOCK_SKEW).is_ok_and(|end| end <= now) {
            return Err(Error::Expired { expires_at });
        }
        if let Some(seen) = known.list_version.filter(|seen| version < *seen) {
            return Err(Error::Older { version, seen });
        }
        Ok(Some(signer))
    }

    fn unsigned(&self, now: Timestamp) -> Result<Option<VerifyingKey>, Error> {
        match self.expires_at.filter(|end| *end <= now) {
            Some(expires_at) => Err(Error::Expired { expires_at }),
            None => Ok(None),
        }
    }
}

fn is_signed(key: &VerifyingKey, bytes: &[u8], signature: &str) -> bool {
    let Ok(signature) = STANDARD.decode(signature) else {
        return false;
    };
    UnparsedPublicKey::new(&ED25519, key.as_bytes())
        .verify(bytes, &signature)
        .is_ok()
}

#[cfg(test)]
mod tests;
