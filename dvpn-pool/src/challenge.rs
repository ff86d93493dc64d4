//! Proof of possession: the pool's ephemeral keys, and whether a proof is one. See [`dvpn_common::possession`].

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use aws_lc_rs::{agreement, hmac};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use dvpn_common::{
    contract::{ChallengeResponse, PossessionProof},
    keys::PublicKey,
    possession,
};
use jiff::Timestamp;

use crate::store::TokenHash;

/// Why a proof proves nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The challenge is not one of the last two.
    #[error("the proof's challenge is over or was never this pool's: fetch approve/challenge again")]
    Challenge,
    /// The HMAC is wrong: another key, token or provider, or not the holder of the private key.
    #[error(
        "the proof does not show that you hold the private key of `client_public_key`, for this provider and token"
    )]
    Mac,
}

struct Challenge {
    // AWS-LC wipes it when it is dropped.
    private: agreement::PrivateKey,
    public: PublicKey,
    made: Instant,
    expires_at: Timestamp,
}

#[derive(Default)]
struct Known {
    current: Option<Arc<Challenge>>,
    last: Option<Arc<Challenge>>,
}

/// The current challenge and the one before it. Their private halves exist only here.
pub struct Challenges {
    life: Duration,
    known: Mutex<Known>,
}

impl Challenges {
    /// Makes a new key every `life`; each is good for two of them.
    pub fn new(life: Duration) -> Self {
        Self {
            life,
            known: Mutex::default(),
        }
    }

    fn known(&self, now: Instant) -> MutexGuard<'_, Known> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let age = |challenge: &Arc<Challenge>| now.saturating_duration_since(challenge.made);
        known.last.take_if(|last| age(last) >= self.life * 2);
        if known.current.as_ref().is_some_and(|current| age(current) >= self.life) {
            known.last = known.current.take().filter(|current| age(current) < self.life * 2);
        }
        known
    }

    /// The challenge to answer now; nothing without random numbers.
    pub fn current(&self, now: Instant) -> Option<ChallengeResponse> {
        let mut known = self.known(now);
        if known.current.is_none() {
            known.current = make(self.life, now).map(Arc::new);
        }
        known.current.as_ref().map(|challenge| ChallengeResponse {
            public_key: challenge.public,
            expires_at: challenge.expires_at,
        })
    }

    /// Whether `proof` is of the holder of `client`'s private half, for this provider and token.
    pub fn check(
        &self,
        proof: &PossessionProof,
        provider_id: &str,
        client: &PublicKey,
        token: &TokenHash,
        now: Instant,
    ) -> Result<(), Error> {
        let challenge = {
            let known = self.known(now);
            [&known.current, &known.last]
                .into_iter()
                .flatten()
                .find(|challenge| challenge.public == proof.challenge)
                .cloned()
                .ok_or(Error::Challenge)?
        };
        let mac = STANDARD.decode(&proof.mac).map_err(|_not_base64| Error::Mac)?;
        let bytes = possession::bytes(provider_id, client, &proof.challenge, token);
        let public = agreement::UnparsedPublicKey::new(&agreement::X25519, client.as_bytes());
        // A point of low order has no key agreement, and so no proof.
        agreement::agree(&challenge.private, public, Error::Mac, |shared| {
            hmac::verify(&hmac::Key::new(hmac::HMAC_SHA256, shared), &bytes, &mac).map_err(|_differs| Error::Mac)
        })
    }

    /// Forgets what is over, also while nobody asks.
    pub fn sweep(&self, now: Instant) {
        drop(self.known(now));
    }
}

fn make(life: Duration, now: Instant) -> Option<Challenge> {
    let private = agreement::PrivateKey::generate(&agreement::X25519).ok()?;
    let public = <[u8; 32]>::try_from(private.compute_public_key().ok()?.as_ref()).ok()?;
    let start = Timestamp::now();
    Some(Challenge {
        private,
        public: PublicKey::from_bytes(public).ok()?,
        made: now,
        expires_at: start.checked_add(life * 2).unwrap_or(start),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIFE: Duration = Duration::from_mins(1);
    const TOKEN: TokenHash = [5; 32];

    struct Client(agreement::PrivateKey);

    impl Client {
        fn new() -> Self {
            Self(agreement::PrivateKey::generate(&agreement::X25519).unwrap())
        }
        fn public(&self) -> PublicKey {
            PublicKey::from_bytes(self.0.compute_public_key().unwrap().as_ref().try_into().unwrap()).unwrap()
        }
        fn proof(&self, challenge: PublicKey) -> PossessionProof {
            let bytes = possession::bytes("node-a", &self.public(), &challenge, &TOKEN);
            let public = agreement::UnparsedPublicKey::new(&agreement::X25519, challenge.as_bytes());
            let mac = agreement::agree(&self.0, public, (), |shared| {
                Ok(hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, shared), &bytes))
            });
            PossessionProof {
                challenge,
                mac: STANDARD.encode(mac.unwrap()),
            }
        }
    }

    #[test]
    fn a_proof_is_good_for_its_key_provider_and_token_only() {
        let (challenges, client, now) = (Challenges::new(LIFE), Client::new(), Instant::now());
        let proof = client.proof(challenges.current(now).unwrap().public_key);
        let check =
            |provider: &str, key: PublicKey, token: &TokenHash| challenges.check(&proof, provider, &key, token, now);
        assert_eq!(check("node-a", client.public(), &TOKEN), Ok(()));
        assert_eq!(check("node-b", client.public(), &TOKEN), Err(Error::Mac));
        assert_eq!(check("node-a", Client::new().public(), &TOKEN), Err(Error::Mac));
        assert_eq!(check("node-a", client.public(), &[6; 32]), Err(Error::Mac));
        let mut low_order = [0; 32];
        low_order[0] = 1;
        assert_eq!(
            check("node-a", PublicKey::from_bytes(low_order).unwrap(), &TOKEN),
            Err(Error::Mac)
        );
        for mac in ["", "AAAA", "not base64"] {
            let bad = PossessionProof {
                challenge: proof.challenge,
                mac: mac.into(),
            };
            assert_eq!(
                challenges.check(&bad, "node-a", &client.public(), &TOKEN, now),
                Err(Error::Mac)
            );
        }
    }

    #[test]
    fn a_challenge_is_current_for_a_minute_and_good_for_two() {
        let (challenges, client, start) = (Challenges::new(LIFE), Client::new(), Instant::now());
        let check = |proof: &PossessionProof, now| challenges.check(proof, "node-a", &client.public(), &TOKEN, now);
        let first = client.proof(challenges.current(start).unwrap().public_key);
        let almost = start + Duration::from_millis(59_999);
        assert_eq!(challenges.current(almost).unwrap().public_key, first.challenge);
        let second = client.proof(challenges.current(start + LIFE).unwrap().public_key);
        assert_ne!(second.challenge, first.challenge);
        assert_eq!(check(&first, start + LIFE), Ok(()));
        assert_eq!(check(&first, start + LIFE * 2), Err(Error::Challenge));
        assert_eq!(check(&second, start + LIFE * 2), Ok(()));
        challenges.sweep(start + LIFE * 4);
        let known = challenges.known.lock().unwrap();
        assert!(
            known.current.is_none() && known.last.is_none(),
            "nothing is kept longer than it is good"
        );
    }
}
