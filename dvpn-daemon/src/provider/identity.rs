//! Who this node is to the pool: an Ed25519 key, and requests signed by it ([`dvpn_common::node`]).

use aws_lc_rs::{
    digest::{SHA256, digest},
    signature::{Ed25519KeyPair, KeyPair as _},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use dvpn_common::{
    ids::ProviderId,
    keys::VerifyingKey,
    node::{HEADER_NODE, HEADER_NONCE, HEADER_SIGNATURE, HEADER_TIME, SignedRequest},
};
use jiff::Timestamp;
use zeroize::Zeroizing;

use super::Error;

/// The node's identity. It has no Debug; the seed does not leave it.
pub struct Identity {
    node: ProviderId,
    pair: Ed25519KeyPair,
    key: VerifyingKey,
}

impl Identity {
    /// Makes the key pair of a 32-byte seed (RFC 8032).
    pub fn from_seed(node: ProviderId, seed: &Zeroizing<[u8; 32]>) -> Result<Self, Error> {
        let pair = Ed25519KeyPair::from_seed_unchecked(seed.as_slice()).map_err(|_rejected| Error::Identity)?;
        let bytes: [u8; 32] = pair
            .public_key()
            .as_ref()
            .try_into()
            .map_err(|_length| Error::Identity)?;
        let key = VerifyingKey::from_bytes(bytes).map_err(|_zero| Error::Identity)?;
        Ok(Self { node, pair, key })
    }

    /// The node's id.
    pub fn node(&self) -> &ProviderId {
        &self.node
    }

    /// The key that its signatures verify with.
    pub fn key(&self) -> VerifyingKey {
        self.key
    }

    /// The headers to send with a request: name and value. `path` is path and query as sent.
    pub fn sign_request(&self, method: &str, path: &str, body: &[u8], now: Timestamp) -> [(&'static str, String); 4] {
        let hash = digest(&SHA256, body);
        let mut body_sha256 = [0; 32];
        body_sha256
            .iter_mut()
            .zip(hash.as_ref())
            .for_each(|(to, from)| *to = *from);
        let nonce = format!("{:032x}", rand::random::<u128>());
        let node = self.node.as_str();
        let time = now.as_second();
        let signed = SignedRequest {
            method,
            path,
            body_sha256: &body_sha256,
            time,
            nonce: &nonce,
            node,
        }
        .bytes();
        let signature = STANDARD.encode(self.pair.sign(&signed).as_ref());
        [
            (HEADER_NODE, node.to_owned()),
            (HEADER_TIME, time.to_string()),
            (HEADER_NONCE, nonce),
            (HEADER_SIGNATURE, signature),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use aws_lc_rs::signature::{ED25519, UnparsedPublicKey};

    #[test]
    fn a_signed_request_verifies_and_no_two_are_the_same() {
        let identity = Identity::from_seed("node-a".parse().unwrap(), &Zeroizing::new([7; 32])).unwrap();
        let now = Timestamp::from_second(1_700_000_000).unwrap();
        let headers = identity.sign_request("POST", "/providers/register", b"{}", now);
        let value = |name: &str| headers.iter().find(|(n, _)| *n == name).unwrap().1.clone();
        let hash: [u8; 32] = digest(&SHA256, b"{}").as_ref().try_into().unwrap();
        let nonce = value(HEADER_NONCE);
        let signed = SignedRequest {
            method: "POST",
            path: "/providers/register",
            body_sha256: &hash,
            time: 1_700_000_000,
            nonce: &nonce,
            node: "node-a",
        };
        let signature = STANDARD.decode(value(HEADER_SIGNATURE)).unwrap();
        let public = identity.key();
        let key = UnparsedPublicKey::new(&ED25519, public.as_bytes());
        key.verify(&signed.bytes(), &signature).unwrap();
        assert_ne!(
            headers,
            identity.sign_request("POST", "/providers/register", b"{}", now)
        );
    }
}
