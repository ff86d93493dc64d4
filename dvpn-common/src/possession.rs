//! Proof that a client holds the private half of the key it wants approved.
//!
//! The pool shows an ephemeral X25519 key; the client answers with HMAC-SHA256, keyed by the key agreement of its own
//! key and that one, over `dvpn-possession-v1\0` and then, each with its length as a big-endian u32 before it: the
//! provider's id, the client's key (32 bytes), the challenge (32 bytes), SHA-256 of the token. Whoever overhears a proof
//! can use it for nothing but the very approval it was made for.

use crate::{approval::push_field, keys::PublicKey};

/// Stands for the provider's id where the client cannot know it yet: it asks an orchestrator for one. No id has a slash.
pub const PROVISION: &str = "provision/any";

/// The bytes under the proof's HMAC.
pub fn bytes(provider_id: &str, client_key: &PublicKey, challenge: &PublicKey, token_sha256: &[u8; 32]) -> Vec<u8> {
    let mut out = b"dvpn-possession-v1\0".to_vec();
    for field in [
        provider_id.as_bytes(),
        client_key.as_bytes(),
        challenge.as_bytes(),
        token_sha256,
    ] {
        push_field(&mut out, field);
    }
    out
}
