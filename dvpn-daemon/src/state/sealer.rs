//! Sealing keys, derived once each.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use dvpn_core::seal::{self, Key, Material};

/// The material and the keys derived from it so far.
pub(super) struct Sealer {
    material: Material,
    keys: Mutex<Vec<Arc<Key>>>,
}

impl Sealer {
    pub(super) fn new(material: Material) -> Self {
        Self {
            material,
            keys: Mutex::new(Vec::new()),
        }
    }

    /// A key to seal with: any that is there, else one with a fresh salt.
    pub(super) fn key(&self) -> Result<Arc<Key>, seal::Error> {
        // The lock is held while deriving, so that two threads never derive the same key.
        let mut keys = self.lock();
        if let Some(key) = keys.first() {
            return Ok(Arc::clone(key));
        }
        let mut salt = [0; seal::SALT_BYTES];
        aws_lc_rs::rand::fill(&mut salt).ok().ok_or(seal::Error::Crypto)?;
        self.derive(&mut keys, salt)
    }

    /// The key of this record.
    pub(super) fn key_of(&self, sealed: &[u8]) -> Result<Arc<Key>, seal::Error> {
        let salt = seal::salt_of(sealed)?;
        let mut keys = self.lock();
        match keys.iter().find(|key| key.salt() == salt) {
            Some(key) => Ok(Arc::clone(key)),
            None => self.derive(&mut keys, salt),
        }
    }

    fn derive(&self, keys: &mut Vec<Arc<Key>>, salt: [u8; seal::SALT_BYTES]) -> Result<Arc<Key>, seal::Error> {
        let key = Arc::new(Key::derive(&self.material, salt)?);
        keys.push(Arc::clone(&key));
        Ok(key)
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Key>>> {
        // A thread that panicked here left a whole list: keys are pushed complete.
        self.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
