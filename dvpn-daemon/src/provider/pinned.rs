//! The pool's key as this node knows it: pinned at first use, changed only along rotations that the pinned key signed.
//! Registrations and snapshots both tell of it.

use dvpn_common::{contract::KeyRotation, keys::VerifyingKey};
use dvpn_core::pool_key;
use tokio::sync::watch;

use super::{Memory, status::Event};

/// Pins the first key; a different one later must be vouched for by the pinned one. What was pinned stays if it is not,
/// and the answer says why. `asked_under` is what was pinned when the pool was asked: an answer that names it while
/// another one is pinned by now was on its way during the change, and says nothing.
pub(super) fn learn(
    pinned: &watch::Sender<Option<VerifyingKey>>,
    memory: &dyn Memory,
    audit: &(dyn Fn(Event) + Send + Sync),
    key: VerifyingKey,
    rotations: &[KeyRotation],
    asked_under: Option<VerifyingKey>,
) -> Option<String> {
    let mut problem = None;
    // Decided under the channel's lock: a registration and a snapshot that come at one time follow one another.
    pinned.send_if_modified(|pinned| match *pinned {
        None => {
            memory.pool_key(key);
            audit(Event::PoolKeyLearned { key: key.to_string() });
            *pinned = Some(key);
            true
        }
        Some(before) if before == key || asked_under == Some(key) => false,
        Some(before) => match pool_key::follow(before, key, rotations) {
            Ok(key) => {
                tracing::info!("the pool changed its key to {key}, signed by the key that was pinned");
                memory.pool_key(key);
                audit(Event::PoolKeyRotated { key: key.to_string() });
                *pinned = Some(key);
                true
            }
            Err(error) => {
                audit(Event::PoolKeyRefused { key: key.to_string() });
                problem = Some(format!("{error}: check POOL_URL and POOL_PUBLIC_KEY"));
                false
            }
        },
    });
    problem
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair as _};
    use base64::{Engine as _, engine::general_purpose::STANDARD};
    use dvpn_common::directory::rotation_bytes;
    use dvpn_core::node::Usage;

    use super::*;
    use crate::provider::serials::Change;

    #[derive(Default)]
    struct Remembered(Mutex<Vec<VerifyingKey>>);

    impl Memory for Remembered {
        fn pool_key(&self, key: VerifyingKey) {
            self.0.lock().unwrap().push(key);
        }
        fn serials(&self, _: &Change) -> bool {
            true
        }
        fn usage(&self, _: Usage) {}
    }

    fn pair(seed: u8) -> Ed25519KeyPair {
        Ed25519KeyPair::from_seed_unchecked(&[seed; 32]).unwrap()
    }
    fn key(seed: u8) -> VerifyingKey {
        VerifyingKey::from_bytes(pair(seed).public_key().as_ref().try_into().unwrap()).unwrap()
    }
    fn link(from: u8, to: u8, signer: u8) -> KeyRotation {
        let (from, to) = (key(from), key(to));
        let signature = STANDARD.encode(pair(signer).sign(&rotation_bytes(&from, &to)).as_ref());
        KeyRotation { from, to, signature }
    }

    #[test]
    fn a_key_changes_along_its_chain_and_a_forged_or_broken_one_is_refused_and_audited() {
        let (pinned, memory, heard) = (watch::Sender::new(None), Remembered::default(), Mutex::new(Vec::new()));
        let audit = |event| heard.lock().unwrap().push(event);
        let told = |seed, rotations: &[KeyRotation]| learn(&pinned, &memory, &audit, key(seed), rotations, None);
        assert_eq!(told(1, &[]), None);
        assert_eq!(told(1, &[link(9, 1, 9)]), None);
        for (chain, what) in [
            (vec![], "nothing vouches"),
            (vec![link(1, 3, 3)], "forged"),
            (vec![link(2, 3, 2)], "a gap"),
            (vec![link(1, 3, 1); pool_key::MAX_ROTATIONS + 1], "too long"),
        ] {
            assert!(told(3, &chain).is_some(), "{what}");
            assert_eq!(*pinned.borrow(), Some(key(1)), "{what}");
        }
        assert_eq!(told(3, &[link(9, 1, 9), link(1, 2, 1), link(2, 3, 2)]), None);
        assert_eq!(*pinned.borrow(), Some(key(3)));
        assert!(told(1, &[link(1, 2, 1), link(2, 3, 2)]).is_some(), "no way back");
        assert_eq!(*memory.0.lock().unwrap(), [key(1), key(3)], "what outlives a restart");
        let refused = |event: &&Event| matches!(event, Event::PoolKeyRefused { .. });
        let count = || heard.lock().unwrap().iter().filter(refused).count();
        assert_eq!(count(), 5);
        // An answer that was asked for before the change, and comes after it, is none of those.
        let chain = [link(3, 4, 3)];
        let asked_under = Some(key(3));
        assert_eq!(told(4, &chain), None);
        assert_eq!(learn(&pinned, &memory, &audit, key(3), &[], asked_under), None);
        assert_eq!(*pinned.borrow(), Some(key(4)), "and changes nothing back");
        assert_eq!(count(), 5);
        let (now, before) = (Some(key(4)), Some(key(1)));
        for asked_under in [now, before] {
            assert!(learn(&pinned, &memory, &audit, key(3), &[], asked_under).is_some());
        }
        assert_eq!(count(), 7, "asked for later, or under yet another key, it is one");
    }
}
