//! Whether a new key of the pool is believed: only along a chain of signatures that begins at the pinned one.

use aws_lc_rs::signature::{ED25519, UnparsedPublicKey};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use dvpn_common::{contract::KeyRotation, directory::rotation_bytes, keys::VerifyingKey};

pub use dvpn_common::limits::MAX_ROTATIONS;

/// Why a key is not followed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// More links than anybody needs.
    #[error("the pool shows {0} changes of its key: more than {MAX_ROTATIONS} are not read")]
    TooLong(usize),
    /// A link from a key we trust that its own signature does not cover.
    #[error("the change of the pool's key from {from} to {to} is not signed by the old key")]
    Signature {
        /// Signed, allegedly.
        from: VerifyingKey,
        /// Named next.
        to: VerifyingKey,
    },
    /// The chain ends elsewhere.
    #[error("the pool shows the key {wanted}, pinned is {pinned}, and no signed change leads from one to the other")]
    NoPath {
        /// What we trust.
        pinned: VerifyingKey,
        /// What was shown.
        wanted: VerifyingKey,
    },
}

/// Follows the pool from the `pinned` key to the `wanted` one along `rotations`, oldest first. Links before the pinned
/// key are passed over; every link after it must be signed by its own `from`. The answer is `wanted`, now to be pinned.
pub fn follow(pinned: VerifyingKey, wanted: VerifyingKey, rotations: &[KeyRotation]) -> Result<VerifyingKey, Error> {
    // Whoever stands there already follows nothing, however long the way was.
    if pinned == wanted {
        return Ok(wanted);
    }
    if rotations.len() > MAX_ROTATIONS {
        return Err(Error::TooLong(rotations.len()));
    }
    let mut trusted = pinned;
    for link in rotations {
        if trusted == wanted {
            break;
        }
        if link.from != trusted {
            continue;
        }
        let signature = STANDARD.decode(&link.signature).unwrap_or_default();
        UnparsedPublicKey::new(&ED25519, trusted.as_bytes())
            .verify(&rotation_bytes(&link.from, &link.to), &signature)
            .ok()
            .ok_or(Error::Signature {
                from: link.from,
                to: link.to,
            })?;
        trusted = link.to;
    }
    if trusted == wanted {
        Ok(wanted)
    } else {
        Err(Error::NoPath { pinned, wanted })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair as _};

    fn pair(seed: u8) -> Ed25519KeyPair {
        Ed25519KeyPair::from_seed_unchecked(&[seed; 32]).unwrap()
    }
    fn key(seed: u8) -> VerifyingKey {
        VerifyingKey::from_bytes(pair(seed).public_key().as_ref().try_into().unwrap()).unwrap()
    }
    fn link(from: u8, to: u8, signer: u8) -> KeyRotation {
        let (from, to) = (key(from), key(to));
        KeyRotation {
            from,
            to,
            signature: STANDARD.encode(pair(signer).sign(&rotation_bytes(&from, &to)).as_ref()),
        }
    }

    #[test]
    fn a_chain_signed_link_by_link_is_followed_from_wherever_we_stand() {
        let chain = [link(1, 2, 1), link(2, 3, 2), link(3, 4, 3)];
        for pinned in 1..=4 {
            assert_eq!(follow(key(pinned), key(4), &chain), Ok(key(4)), "pinned {pinned}");
        }
        assert_eq!(follow(key(1), key(1), &[]), Ok(key(1)), "nothing changed");
    }

    #[test]
    fn a_gap_a_forged_link_and_a_way_back_lead_nowhere() {
        let no_path = |pinned: u8, wanted: u8| {
            Err(Error::NoPath {
                pinned: key(pinned),
                wanted: key(wanted),
            })
        };
        assert_eq!(follow(key(1), key(2), &[]), no_path(1, 2));
        assert_eq!(follow(key(1), key(4), &[link(1, 2, 1), link(3, 4, 3)]), no_path(1, 4));
        assert_eq!(
            follow(key(2), key(1), &[link(1, 2, 1)]),
            no_path(2, 1),
            "an old key does not come back"
        );
        assert_eq!(
            follow(key(1), key(2), &[link(1, 2, 9)]),
            Err(Error::Signature {
                from: key(1),
                to: key(2)
            })
        );
        let unsigned = KeyRotation {
            signature: "@".into(),
            ..link(1, 2, 1)
        };
        assert!(matches!(
            follow(key(1), key(2), &[unsigned]),
            Err(Error::Signature { .. })
        ));
        let long = vec![link(1, 2, 1); MAX_ROTATIONS + 1];
        assert_eq!(follow(key(1), key(2), &long), Err(Error::TooLong(MAX_ROTATIONS + 1)));
        assert_eq!(follow(key(2), key(2), &long), Ok(key(2)), "nothing to follow");
    }
}
