//! The pool's own Ed25519 keys: the first is made once, each rotation adds one, all are kept beside the database, one
//! seed a line. The database says which of them signs; what earlier ones derived (secrets of checkouts, tokens) holds.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use aws_lc_rs::{
    constant_time::verify_slices_are_equal,
    hmac,
    signature::{Ed25519KeyPair, KeyPair as _},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use dvpn_common::{
    contract::KeyRotation,
    keys::{PrivateKey, VerifyingKey},
    limits::MAX_ROTATIONS,
};
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
    /// The database says that another key signs.
    #[error(
        "{path} does not hold the key this database was made with: clients and nodes have pinned that one, so restore \
         it from a backup"
    )]
    Foreign {
        /// Which file.
        path: PathBuf,
    },
    /// No randomness.
    #[error("the system gave no random bytes for the pool's key")]
    Random,
}

/// One key: signs, and derives what the database must not hold.
pub struct PoolKey {
    pair: Ed25519KeyPair,
    public: VerifyingKey,
    checkout: hmac::Key,
    token: hmac::Key,
    prober: PrivateKey,
}

impl PoolKey {
    fn from_seed(seed: &[u8]) -> Option<Self> {
        let pair = Ed25519KeyPair::from_seed_unchecked(seed).ok()?;
        let public = <[u8; 32]>::try_from(pair.public_key().as_ref()).ok()?;
        let derived = |label: &[u8]| {
            let mut labelled = Zeroizing::new(label.to_vec());
            labelled.extend_from_slice(seed);
            Zeroizing::new(sha256(&labelled))
        };
        let secret = |label: &[u8]| hmac::Key::new(hmac::HMAC_SHA256, derived(label).as_slice());
        Some(Self {
            pair,
            public: VerifyingKey::from_bytes(public).ok()?,
            checkout: secret(b"dvpn-checkout-secret-v1\0"),
            token: secret(b"dvpn-token-v1\0"),
            prober: PrivateKey::from_bytes(*derived(b"dvpn-prober-v1\0")),
        })
    }

    /// The key that its signatures verify with.
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
        hmac_hex(&self.checkout, checkout)
    }

    /// The token of one checkout, without its prefix: derived for the same reason.
    pub fn token(&self, checkout: &str) -> Zeroizing<String> {
        hmac_hex(&self.token, checkout)
    }
}

fn hmac_hex(key: &hmac::Key, text: &str) -> Zeroizing<String> {
    Zeroizing::new(crate::hex::encode(hmac::sign(key, text.as_bytes()).as_ref()))
}

/// Every key the pool ever had, and which of them signs.
pub struct KeyRing {
    first: PoolKey,
    later: Vec<PoolKey>,
    current: VerifyingKey,
}

impl KeyRing {
    /// Reads the keys at `path`; makes the first one (mode 0600, complete or not at all) if there is no file. `current`
    /// is the one that signs; without it, there must be only one.
    pub fn open(path: &Path, current: Option<VerifyingKey>) -> Result<Self, Error> {
        if current.is_none() && fs::metadata(path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
            write(path, &fresh_seed()?, false)?;
        }
        let text = read(path)?;
        let format = || Error::Format { path: path.to_owned() };
        let mut keys = Vec::new();
        for line in text.split_whitespace() {
            let seed = Zeroizing::new(STANDARD.decode(line).ok().ok_or_else(format)?);
            keys.push(PoolKey::from_seed(&seed).ok_or_else(format)?);
        }
        let mut keys = keys.into_iter();
        let first = keys.next().ok_or_else(format)?;
        let later: Vec<PoolKey> = keys.collect();
        let current = current.unwrap_or(first.public);
        let ring = Self { first, later, current };
        if ring.all().any(|key| key.public == current) {
            Ok(ring)
        } else {
            Err(Error::Foreign { path: path.to_owned() })
        }
    }

    /// Adds a key to the file at `path`, which is replaced in one step. It signs once the database says so.
    pub fn add(path: &Path) -> Result<PoolKey, Error> {
        let mut text = read(path)?;
        if !text.ends_with('\n') {
            text.push('\n');
        }
        let seed = fresh_seed()?;
        text.push_str(&seed);
        write(path, &text, true)?;
        STANDARD
            .decode(seed.trim())
            .ok()
            .map(Zeroizing::new)
            .and_then(|seed| PoolKey::from_seed(&seed))
            .ok_or_else(|| Error::Format { path: path.to_owned() })
    }

    fn all(&self) -> impl Iterator<Item = &PoolKey> {
        std::iter::once(&self.first).chain(&self.later)
    }

    /// The key that signs.
    pub fn current(&self) -> &PoolKey {
        self.all().find(|key| key.public == self.current).unwrap_or(&self.first)
    }

    /// Whether `given` is the secret of this checkout, by whichever key was current when it began.
    pub fn is_checkout_secret(&self, checkout: &str, given: &str) -> bool {
        self.all()
            .any(|key| verify_slices_are_equal(given.as_bytes(), key.checkout_secret(checkout).as_bytes()).is_ok())
    }

    /// The tokens a checkout may have been given, the newest key's first.
    pub fn tokens(&self, checkout: &str) -> impl Iterator<Item = Zeroizing<String>> {
        let others = self.all().filter(|key| key.public != self.current);
        std::iter::once(self.current())
            .chain(others)
            .map(move |key| key.token(checkout))
    }

    /// The WireGuard key that the pool shakes hands with. It is the first key's, so that nodes need not learn another.
    pub fn prober(&self) -> &PrivateKey {
        &self.first.prober
    }
}

/// The file's text, if nobody else may read it.
fn read(path: &Path) -> Result<Zeroizing<String>, Error> {
    let failed = |source| Error::Read {
        path: path.to_owned(),
        source,
    };
    let mode = fs::metadata(path).map_err(failed)?.permissions().mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(Error::Permissions {
            path: path.to_owned(),
            mode,
        });
    }
    fs::read_to_string(path).map(Zeroizing::new).map_err(failed)
}

fn fresh_seed() -> Result<Zeroizing<String>, Error> {
    let mut seed = Zeroizing::new([0_u8; 32]);
    aws_lc_rs::rand::fill(seed.as_mut_slice()).ok().ok_or(Error::Random)?;
    Ok(Zeroizing::new(STANDARD.encode(seed.as_slice()) + "\n"))
}

fn write(path: &Path, text: &str, replace: bool) -> Result<(), Error> {
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
        if replace {
            fs::rename(&fresh, path)?;
        } else {
            // Not a rename: a key that appeared meanwhile must not be replaced.
            fs::hard_link(&fresh, path)?;
            fs::remove_file(&fresh)?;
        }
        // The database must never name a key whose file a power cut takes away.
        match path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            Some(directory) => fs::File::open(directory)?.sync_all(),
            None => fs::File::open(".")?.sync_all(),
        }
    };
    write().map_err(|source| Error::Write {
        path: path.to_owned(),
        source,
    })
}

/// What the pool signs with at one time, and how it came to that.
pub struct Signer {
    /// The keys.
    pub ring: KeyRing,
    /// How earlier keys led to the current one, oldest first: as many as are read.
    pub rotations: Vec<KeyRotation>,
}

impl Signer {
    /// Signs with the ring's current key; of `rotations`, oldest first, the last [`MAX_ROTATIONS`] are told.
    pub fn new(ring: KeyRing, mut rotations: Vec<KeyRotation>) -> Self {
        rotations.drain(..rotations.len().saturating_sub(MAX_ROTATIONS));
        Self { ring, rotations }
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

    fn open(path: &Path) -> Result<KeyRing, Error> {
        KeyRing::open(path, None)
    }

    #[test]
    fn the_key_is_made_once_and_only_for_its_owner() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pool.key");
        let (first, second) = (open(&path).unwrap(), open(&path).unwrap());
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let (first, second) = (first.current(), second.current());
        assert_eq!(first.public(), second.public());
        assert!(verify(&first.public(), b"message", &second.sign(b"message")));
        assert!(!verify(&first.public(), b"massage", &second.sign(b"message")));
        assert_eq!(*first.checkout_secret("a"), *second.checkout_secret("a"));
        assert_ne!(*first.checkout_secret("a"), *second.checkout_secret("b"));
        assert_ne!(*first.checkout_secret("a"), *first.token("a"));
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn an_added_key_signs_when_it_is_told_to_and_the_first_one_stays() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pool.key");
        let before = open(&path).unwrap();
        let added = KeyRing::add(&path).unwrap().public();
        assert_eq!(open(&path).unwrap().current().public(), before.current().public());
        let after = KeyRing::open(&path, Some(added)).unwrap();
        assert_eq!(after.current().public(), added);
        assert_ne!(added, before.current().public());
        assert_eq!(after.prober().expose(), before.prober().expose());
        let old_secret = before.current().checkout_secret("a");
        assert!(after.is_checkout_secret("a", &old_secret) && !after.is_checkout_secret("b", &old_secret));
        assert!(after.is_checkout_secret("a", &after.current().checkout_secret("a")));
        assert_eq!(after.tokens("a").count(), 2);
        assert!(after.tokens("a").any(|token| *token == *before.current().token("a")));
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let stranger = VerifyingKey::from_bytes([7; 32]).unwrap();
        assert!(matches!(
            KeyRing::open(&path, Some(stranger)),
            Err(Error::Foreign { .. })
        ));
    }

    #[test]
    fn a_key_that_others_may_read_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pool.key");
        open(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        assert!(matches!(open(&path), Err(Error::Permissions { mode: 0o640, .. })));
    }

    #[test]
    fn a_damaged_key_is_refused_and_kept() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pool.key");
        open(&path).unwrap();
        fs::write(&path, "short").unwrap();
        assert!(matches!(open(&path), Err(Error::Format { .. })));
        assert_eq!(fs::read_to_string(&path).unwrap(), "short");
    }

    #[test]
    fn no_more_rotations_are_told_than_are_read_and_those_are_the_last() {
        let directory = tempfile::tempdir().unwrap();
        let ring = open(&directory.path().join("pool.key")).unwrap();
        let key = |number: usize| VerifyingKey::from_bytes([u8::try_from(number).unwrap(); 32]).unwrap();
        let rotations: Vec<KeyRotation> = (1..=MAX_ROTATIONS + 3)
            .map(|number| KeyRotation {
                from: key(number),
                to: key(number + 1),
                signature: String::new(),
            })
            .collect();
        let signer = Signer::new(ring, rotations.clone());
        assert_eq!(signer.rotations, rotations[3..]);
    }
}
