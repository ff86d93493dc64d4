//! Proof that we hold the private half of the key we want approved: see [`dvpn_common::possession`].

use aws_lc_rs::{
    agreement::{self, UnparsedPublicKey, X25519},
    digest::{SHA256, digest},
    hmac,
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use dvpn_common::{
    contract::PossessionProof,
    keys::{PrivateKey, PublicKey},
    possession,
};

use crate::{Failure, Retry, keys::public_key};

/// Why there is no proof.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Our key is none.
    #[error("the client key is not usable")]
    Key,
    /// The pool's key agrees with nobody: a point of small order.
    #[error("the pool's challenge is not usable")]
    Challenge,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let (how, retry) = match error {
            Error::Key => ("set another WG_PRIVATE_KEY", Retry::Never),
            Error::Challenge => ("tell the pool's operator", Retry::Backoff),
        };
        Self {
            what: error.to_string(),
            how: how.to_owned(),
            retry,
        }
    }
}

/// The proof for one approval: by the holder of `key`, of `token`, at one provider.
pub fn prove(
    key: &PrivateKey,
    challenge: &PublicKey,
    provider_id: &str,
    token: &str,
) -> Result<PossessionProof, Error> {
    let client_key = public_key(key).ok().ok_or(Error::Key)?;
    let token_sha256 = digest(&SHA256, token.as_bytes());
    let token_sha256: &[u8; 32] = token_sha256.as_ref().try_into().ok().ok_or(Error::Key)?;
    let bytes = possession::bytes(provider_id, &client_key, challenge, token_sha256);
    let private = agreement::PrivateKey::from_private_key(&X25519, key.expose())
        .ok()
        .ok_or(Error::Key)?;
    let theirs = UnparsedPublicKey::new(&X25519, challenge.as_bytes());
    let mac = agreement::agree(&private, theirs, Error::Challenge, |shared| {
        Ok(hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, shared), &bytes))
    })?;
    Ok(PossessionProof {
        challenge: *challenge,
        mac: STANDARD.encode(mac.as_ref()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 7748, section 6.1: Alice's and Bob's private keys and what they agree on.
    const ALICE: &str = "77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a";
    const BOB: &str = "5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb";
    const SHARED: &str = "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742";

    fn bytes(hex: &str) -> [u8; 32] {
        let byte = |at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap();
        std::array::from_fn(|n| byte(2 * n))
    }

    #[test]
    fn a_proof_is_an_hmac_keyed_by_the_agreement_over_the_contracts_bytes() {
        let (alice, bob) = (PrivateKey::from_bytes(bytes(ALICE)), PrivateKey::from_bytes(bytes(BOB)));
        let (client, challenge) = (public_key(&alice).unwrap(), public_key(&bob).unwrap());
        let proof = prove(&alice, &challenge, "provider-1", "token").unwrap();
        assert_eq!(proof.challenge, challenge);
        let token: [u8; 32] = digest(&SHA256, b"token").as_ref().try_into().unwrap();
        let wanted = hmac::sign(
            &hmac::Key::new(hmac::HMAC_SHA256, &bytes(SHARED)),
            &possession::bytes("provider-1", &client, &challenge, &token),
        );
        assert_eq!(proof.mac, STANDARD.encode(wanted.as_ref()));
        for (provider, token) in [("provider-2", "token"), ("provider-1", "other")] {
            let other = prove(&alice, &challenge, provider, token).unwrap();
            assert_ne!(other.mac, proof.mac, "{provider} {token}");
        }
    }

    #[test]
    fn a_challenge_of_small_order_is_refused() {
        let mut one = [0; 32];
        one[0] = 1;
        let small = PublicKey::from_bytes(one).unwrap();
        let refused = prove(&PrivateKey::from_bytes(bytes(ALICE)), &small, "p", "t").err();
        assert_eq!(refused, Some(Error::Challenge));
    }
}
