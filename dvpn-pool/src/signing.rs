//! The pool's own Ed25519 key: made once, kept beside the database, it signs every approval.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use aws_lc_rs::{
    hmac,
    signature::{Ed25519KeyPair, KeyPair as _},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use dvpn_common::keys::VerifyingKey;
use zeroize::Zeroizing;

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("the pool's key {path} cannot be read")]
    Read {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The file cannot be made.
    #[error("the pool's key {path} cannot be written")]
    Write {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Others may read it.
    #[error("the pool's key {path} is open to other users (mode {mode:o}): chmod 0600 it, and change it if in doubt")]
    Permissions {
        /// Which file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// Not a key.
    #[error("the pool's key {path} is not 32 bytes of base64: restore it from a backup")]
    Format {
        /// Which file.
        path: PathBuf,
    },
    /// No randomness.
    #[error("the system gave no random bytes for the pool's key")]
    Random,
}

/// Signs approvals and derives checkout secrets.
pub struct PoolKey {
    pair: Ed25519KeyPair,
    public: VerifyingKey,
    checkout: hmac::Key,
}

impl PoolKey {
    /// Reads the key at `path`, or makes one there (mode 0600, complete or not at all).
    pub fn open(path: &Path) -> Result<Self, Error> {
        let read = |source| Error::Read {
            path: path.to_owned(),
            source,
        };
        match fs::metadata(path) {
            Ok(metadata) => {
                let mode = metadata.permissions().mode() & 0o7777;
                if mode & 0o077 != 0 {
                    return Err(Error::Permissions {
                        path: path.to_owned(),
                        mode,
                    });
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Self::make(path)?,
            Err(source) => return Err(read(source)),
        }
        let text = Zeroizing::new(fs::read_to_string(path).map_err(read)?);
        let format = || Error::Format { path: path.to_owned() };
        let seed = Zeroizing::new(STANDARD.decode(text.trim()).ok().ok_or_else(format)?);
        let pair = Ed25519KeyPair::from_seed_unchecked(&seed).ok().ok_or_else(format)?;
        let public = <[u8; 32]>::try_from(pair.public_key().as_ref())
            .ok()
            .and_then(|bytes| VerifyingKey::from_bytes(bytes).ok())
            .ok_or_else(format)?;
        let mut label = Zeroizing::new(b"dvpn-checkout-secret-v1\0".to_vec());
        label.extend_from_slice(&seed);
        let derived = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &label);
        Ok(Self {
            pair,
            public,
            checkout: hmac::Key::new(hmac::HMAC_SHA256, derived.as_ref()),
        })
    }

    fn make(path: &Path) -> Result<(), Error> {
        let mut seed = Zeroizing::new([0_u8; 32]);
        aws_lc_rs::rand::fill(seed.as_mut_slice()).ok().ok_or(Error::Random)?;
        let text = Zeroizing::new(STANDARD.encode(seed.as_slice()) + "\n");
        let fresh = path.with_extension("key.new");
        let write = || -> io::Result<()> {
            match fs::remove_file(&fresh) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                Ok(()) | Err(_) => {}
            }
            let mut file = OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&fresh)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            // Not a rename: a key that appeared meanwhile must not be replaced.
            fs::hard_link(&fresh, path)?;
            fs::remove_file(&fresh)
        };
        write().map_err(|source| Error::Write {
            path: path.to_owned(),
            source,
        })
    }

    /// The key that approvals verify with.
    pub fn public(&self) -> VerifyingKey {
        self.public
    }

    /// How approvals name this pool: the first half of its public key, hexadecimal.
    pub fn pool_id(&self) -> String {
        let bytes = self.public.as_bytes();
        crate::hex::encode(bytes.get(..16).unwrap_or_default())
    }

    /// Ed25519 over `bytes`.
    pub fn sign(&self, bytes: &[u8]) -> [u8; 64] {
        let signature = self.pair.sign(bytes);
        let mut out = [0; 64];
        out.iter_mut()
            .zip(signature.as_ref())
            .for_each(|(to, from)| *to = *from);
        out
    }

    /// The secret of one checkout: derived, so that the database holds none and the same can be told twice.
    pub fn checkout_secret(&self, checkout: &str) -> Zeroizing<String> {
        Zeroizing::new(crate::hex::encode(
            hmac::sign(&self.checkout, checkout.as_bytes()).as_ref(),
        ))
    }
}

/// Whether `signature` over `message` is `key`'s.
pub fn verify(key: &VerifyingKey, message: &[u8], signature: &[u8]) -> bool {
    aws_lc_rs::signature::UnparsedPublicKey::new(&aws_lc_rs::signature::ED25519, key.as_bytes())
        .verify(message, signature)
        .is_ok()
}

/// SHA-256.
pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, bytes);
    let mut out = [0; 32];
    out.iter_mut().zip(digest.as_ref()).for_each(|(to, from)| *to = *from);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_is_made_once_and_only_for_its_owner() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pool.key");
        let first = PoolKey::open(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let second = PoolKey::open(&path).unwrap();
        assert_eq!(first.public(), second.public());
        assert!(verify(&first.public(), b"message", &second.sign(b"message")));
        assert!(!verify(&first.public(), b"massage", &second.sign(b"message")));
        assert_eq!(*first.checkout_secret("a"), *second.checkout_secret("a"));
        assert_ne!(*first.checkout_secret("a"), *second.checkout_secret("b"));
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_key_that_others_may_read_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pool.key");
        PoolKey::open(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        assert!(matches!(
            PoolKey::open(&path),
            Err(Error::Permissions { mode: 0o640, .. })
        ));
    }

    #[test]
    fn a_damaged_key_is_refused_and_kept() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pool.key");
        PoolKey::open(&path).unwrap();
        fs::write(&path, "short").unwrap();
        assert!(matches!(PoolKey::open(&path), Err(Error::Format { .. })));
        assert_eq!(fs::read_to_string(&path).unwrap(), "short");
    }
}
