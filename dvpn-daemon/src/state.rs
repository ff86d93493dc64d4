//! What survives a restart: sealed token and subscription, the wish, the last endpoint, the user id, the node's keys.
//!
//! Every file is replaced whole (written beside, synced, renamed) with mode 0600 in a directory of mode 0700. Secrets
//! are sealed ([`dvpn_core::seal`]) with `TOKEN_PASSPHRASE`, or with a random key file made once. A file that does not
//! read is an error that says what to do; it is kept beside when something new takes its place.

mod files;
mod lock;
mod sealer;

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
};

use dvpn_common::{
    ids::{ProviderId, UserId},
    keys::{PrivateKey, VerifyingKey},
};
use dvpn_core::{
    config::Secret, directory::trust::PoolRecord, line::book::Book, node::Usage, payment::Subscription, seal,
};
use zeroize::Zeroizing;

pub use self::lock::Lock;
use self::{files::Files, sealer::Sealer};

const TOKEN: &str = "token";
const SUBSCRIPTION: &str = "subscription";
const IDENTITY: &str = "identity";
const PROVIDER_KEY: &str = "provider-key";
const WISH: &str = "wish";
const LAST_ENDPOINT: &str = "last-endpoint";
const USER_ID: &str = "user-id";
const NODE_ID: &str = "node-id";
const POOL_KEY: &str = "pool-key";
const POOL_RECORD: &str = "pool";
const SERIALS: &str = "serials";
const USAGE: &str = "node-usage";
const CHECKOUT: &str = "checkout";
const NAMES: &str = "names";
const LINES: &str = "lines";
const SEALING_KEY: &str = "sealing.key";

/// Why something was not stored or not read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The directory cannot be made, or not be made private.
    #[error("the state directory {path} is not usable: give it to the daemon's user, mode 0700 (STATE_DIRECTORY)")]
    Directory {
        /// Which.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Another daemon uses the directory.
    #[error(
        "{holder} uses the state directory {path} already: end it (systemctl stop dvpn, or kill it), or give this daemon \
         another STATE_DIRECTORY"
    )]
    Taken {
        /// Which directory.
        path: PathBuf,
        /// Who has it.
        holder: String,
    },
    /// Nobody can tell whether another daemon uses the directory.
    #[error("locking {path}: check its owner and the disk")]
    Lock {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A file does not read.
    #[error("reading {path}: check its owner and the disk")]
    Read {
        /// Which.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A file cannot be written.
    #[error("writing {path}: check the owner of its directory and the space on the disk")]
    Write {
        /// Which.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A plain file that holds something else than it should.
    #[error("{path} is damaged: restore it from a backup, or remove it")]
    Damaged {
        /// Which.
        path: PathBuf,
    },
    /// A sealed record that is not ours, not whole, or newer.
    #[error("{path} is refused: {source}")]
    Sealed {
        /// Which.
        path: PathBuf,
        /// Why, and what to do.
        #[source]
        source: seal::Error,
    },
    /// The key file can be read by others than its owner.
    #[error(
        "{path} has mode {mode:03o}: others may have read it; chmod 600 it, and pay or store the token anew if in doubt"
    )]
    Exposed {
        /// Which.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The operating system gave no randomness.
    #[error("the operating system gives no random numbers")]
    Random,
    /// A background thread died.
    #[error("the thread that opens sealed files died")]
    Thread,
}

/// The state directory. Clones share it.
#[derive(Clone)]
pub struct State {
    inner: Arc<Inner>,
}

struct Inner {
    files: Files,
    sealer: Sealer,
}

/// Whether a session is wanted, as a directory of state says that is only read. A wish that does not read counts as one: a
/// daemon that forgets to connect leaves its user unprotected, one that connects unasked does not.
pub fn stored_wish(directory: &Path) -> bool {
    read_wish(files::read(&directory.join(WISH)))
}

fn read_wish(stored: Result<Option<Vec<u8>>, Error>) -> bool {
    match stored {
        Ok(None) => false,
        Ok(Some(bytes)) => bytes.trim_ascii() != b"none",
        Err(error) => {
            tracing::warn!(%error, "the stored wish does not read; connecting");
            true
        }
    }
}

impl State {
    /// Opens the directory, making it if need be. Derives no key: that happens at the first sealed read or write.
    pub fn open(directory: &Path, passphrase: Option<&Secret>) -> Result<Self, Error> {
        let files = Files::open(directory)?;
        let material = match passphrase {
            Some(passphrase) => seal::Material::Passphrase(passphrase.clone()),
            None => seal::Material::KeyFile(files.sealing_key(SEALING_KEY)?),
        };
        Ok(Self {
            inner: Arc::new(Inner {
                files,
                sealer: Sealer::new(material),
            }),
        })
    }

    /// The stored token.
    pub async fn token(&self) -> Result<Option<Secret>, Error> {
        let Some(bytes) = self.open_sealed(TOKEN).await? else {
            return Ok(None);
        };
        let text = std::str::from_utf8(&bytes).ok().ok_or_else(|| self.damaged(TOKEN))?;
        Ok(Some(Secret::new(text)))
    }

    /// Stores a token in place of the last.
    pub async fn store_token(&self, token: &Secret) -> Result<(), Error> {
        self.seal(TOKEN, Zeroizing::new(token.expose().as_bytes().to_vec()))
            .await
    }

    /// The last verified subscription, if it was for `token`.
    pub async fn subscription(&self, token: &Secret) -> Result<Option<Subscription>, Error> {
        let token = token.clone();
        self.blocking(move |inner| {
            let Some(sealed) = inner.files.read(SUBSCRIPTION)? else {
                return Ok(None);
            };
            let key = inner
                .sealer
                .key_of(&sealed)
                .map_err(|source| inner.files.sealed(SUBSCRIPTION, source))?;
            Subscription::open(&sealed, token.expose(), &key).map_err(|source| inner.files.sealed(SUBSCRIPTION, source))
        })
        .await
    }

    /// Stores what the payment server said of `token`.
    pub async fn store_subscription(&self, subscription: &Subscription, token: &Secret) -> Result<(), Error> {
        let (subscription, token) = (*subscription, token.clone());
        self.blocking(move |inner| {
            let key = inner
                .sealer
                .key()
                .map_err(|source| inner.files.sealed(SUBSCRIPTION, source))?;
            let sealed = subscription
                .seal(token.expose(), &key, random()?)
                .map_err(|source| inner.files.sealed(SUBSCRIPTION, source))?;
            inner.replace_sealed(SUBSCRIPTION, &sealed)
        })
        .await
    }

    /// Forgets what the payment server said.
    pub fn clear_subscription(&self) -> Result<(), Error> {
        self.inner.files.remove(SUBSCRIPTION)
    }

    /// The open checkout, as it was stored.
    pub async fn checkout(&self) -> Result<Option<Zeroizing<Vec<u8>>>, Error> {
        self.open_sealed(CHECKOUT).await
    }

    /// Stores the open checkout: its secret fetches the token, so it is sealed.
    pub async fn store_checkout(&self, record: &[u8]) -> Result<(), Error> {
        self.seal(CHECKOUT, Zeroizing::new(record.to_vec())).await
    }

    /// Forgets the checkout.
    pub fn clear_checkout(&self) -> Result<(), Error> {
        self.inner.files.remove(CHECKOUT)
    }

    /// Whether a session is wanted: see [`stored_wish`].
    pub fn wish(&self) -> bool {
        read_wish(self.inner.files.read(WISH))
    }

    /// Stores whether a session is wanted.
    pub fn store_wish(&self, wanted: bool) -> Result<(), Error> {
        self.inner
            .files
            .write(WISH, if wanted { b"connect\n" } else { b"none\n" })
    }

    /// The endpoint used last. One that does not read is no loss.
    pub fn last_endpoint(&self) -> Option<SocketAddr> {
        self.text(LAST_ENDPOINT).ok().flatten()?.parse().ok()
    }

    /// Where something of this name is in the state directory.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.inner.files.path(name)
    }

    /// The last addresses of the control plane's names. What does not read is no loss.
    pub fn names(&self) -> BTreeMap<String, Vec<IpAddr>> {
        let text = self.text(NAMES).ok().flatten().unwrap_or_default();
        text.lines()
            .filter_map(|line| {
                let mut words = line.split(' ');
                let name = words.next()?.to_owned();
                let addresses: Vec<IpAddr> = words.filter_map(|word| word.parse().ok()).collect();
                (!addresses.is_empty()).then_some((name, addresses))
            })
            .collect()
    }

    /// Stores them.
    pub fn store_names(&self, names: &BTreeMap<String, Vec<IpAddr>>) -> Result<(), Error> {
        let mut text = String::new();
        for (name, addresses) in names {
            text.push_str(name);
            for address in addresses {
                text.push(' ');
                text.push_str(&address.to_string());
            }
            text.push('\n');
        }
        self.inner.files.write(NAMES, text.as_bytes())
    }

    /// What was measured of the lines that this machine was on.
    pub fn lines(&self) -> Result<Book, Error> {
        let record = self.inner.files.read(LINES)?.unwrap_or_default();
        Book::decode(&record).ok().ok_or_else(|| self.damaged(LINES))
    }

    /// Remembers it.
    pub fn store_lines(&self, book: &Book) -> Result<(), Error> {
        self.inner.files.write(LINES, book.encode().as_bytes())
    }

    /// Remembers the endpoint used.
    pub fn store_last_endpoint(&self, endpoint: SocketAddr) -> Result<(), Error> {
        self.inner
            .files
            .write(LAST_ENDPOINT, format!("{endpoint}\n").as_bytes())
    }

    /// The random number that stands for this customer at checkout: 128 bits, made once.
    pub fn user_id(&self) -> Result<UserId, Error> {
        self.made_once(USER_ID, || Ok(hex(&random::<16>()?)))
    }

    /// The random id of this install as a provider, made once; no relation to the user id.
    pub fn node_id(&self) -> Result<ProviderId, Error> {
        self.made_once(NODE_ID, || Ok(format!("node-{}", hex(&random::<8>()?))))
    }

    /// The pool's key as first seen.
    pub fn pool_key(&self) -> Result<Option<VerifyingKey>, Error> {
        match self.text(POOL_KEY)? {
            None => Ok(None),
            Some(text) => text.parse().map(Some).ok().ok_or_else(|| self.damaged(POOL_KEY)),
        }
    }

    /// Pins the pool's key. The caller has checked that a new one was signed by the old.
    pub fn store_pool_key(&self, key: &VerifyingKey) -> Result<(), Error> {
        self.inner.files.write(POOL_KEY, format!("{key}\n").as_bytes())
    }

    /// What the client side knows of a pool: its key, and how far its lists and approvals have come.
    pub async fn pool_record(&self) -> Result<Option<PoolRecord>, Error> {
        self.blocking(|inner| {
            let Some(bytes) = inner.files.read(POOL_RECORD)? else {
                return Ok(None);
            };
            serde_json::from_slice(&bytes)
                .map(Some)
                .ok()
                .ok_or_else(|| Error::Damaged {
                    path: inner.files.path(POOL_RECORD),
                })
        })
        .await
    }

    /// Remembers it. Nothing in it is secret: it is plain, and replaced whole.
    pub async fn store_pool_record(&self, record: &PoolRecord) -> Result<(), Error> {
        let text = serde_json::to_vec(record).ok();
        self.blocking(move |inner| {
            let path = || inner.files.path(POOL_RECORD);
            let text = text.ok_or_else(|| Error::Damaged { path: path() })?;
            inner.files.write(POOL_RECORD, &text)
        })
        .await
    }

    /// What a provider saw of approvals' serials, as it was stored.
    pub fn serials(&self) -> Result<Option<Vec<u8>>, Error> {
        self.inner.files.read(SERIALS)
    }

    /// Stores what a provider saw of serials in place of what was there.
    pub fn store_serials(&self, record: &[u8]) -> Result<(), Error> {
        self.inner.files.write(SERIALS, record)
    }

    /// Stores more of it behind what is there.
    pub fn add_serials(&self, records: &[u8]) -> Result<(), Error> {
        self.inner.files.append(SERIALS, records)
    }

    /// What a provider's clients carried this month.
    pub fn usage(&self) -> Result<Option<Usage>, Error> {
        let Some(text) = self.text(USAGE)? else {
            return Ok(None);
        };
        let read = text.split_once(' ').and_then(|(month, bytes)| {
            Some(Usage {
                month: month.parse().ok()?,
                bytes: bytes.parse().ok()?,
            })
        });
        read.map(Some).ok_or_else(|| self.damaged(USAGE))
    }

    /// Stores it.
    pub fn store_usage(&self, usage: Usage) -> Result<(), Error> {
        self.inner
            .files
            .write(USAGE, format!("{} {}\n", usage.month, usage.bytes).as_bytes())
    }

    /// The seed of the node's Ed25519 identity, made once.
    pub async fn identity_seed(&self) -> Result<Zeroizing<[u8; 32]>, Error> {
        self.secret_once(IDENTITY).await
    }

    /// The key of the provider interface, made once.
    pub async fn provider_key(&self) -> Result<PrivateKey, Error> {
        self.secret_once(PROVIDER_KEY)
            .await
            .map(|bytes| PrivateKey::from_bytes(*bytes))
    }

    fn damaged(&self, name: &str) -> Error {
        Error::Damaged {
            path: self.inner.files.path(name),
        }
    }

    fn text(&self, name: &str) -> Result<Option<String>, Error> {
        let Some(bytes) = self.inner.files.read(name)? else {
            return Ok(None);
        };
        let text = String::from_utf8(bytes).ok().ok_or_else(|| self.damaged(name))?;
        Ok(Some(text.trim().to_owned()))
    }

    fn made_once<T: std::str::FromStr>(
        &self,
        name: &str,
        make: impl FnOnce() -> Result<String, Error>,
    ) -> Result<T, Error> {
        if self.text(name)?.is_none() {
            self.inner.files.create(name, format!("{}\n", make()?).as_bytes())?;
        }
        let text = self.text(name)?.ok_or_else(|| self.damaged(name))?;
        text.parse().ok().ok_or_else(|| self.damaged(name))
    }

    async fn secret_once(&self, name: &'static str) -> Result<Zeroizing<[u8; 32]>, Error> {
        self.blocking(move |inner| {
            if inner.files.read(name)?.is_none() {
                let fresh = Zeroizing::new(random::<32>()?);
                inner.files.create(name, &inner.seal(name, fresh.as_slice())?)?;
            }
            let bytes = inner.open_sealed(name)?;
            let bytes = bytes.ok_or_else(|| Error::Damaged {
                path: inner.files.path(name),
            })?;
            let secret: &[u8; 32] = bytes.as_slice().try_into().ok().ok_or_else(|| Error::Damaged {
                path: inner.files.path(name),
            })?;
            Ok(Zeroizing::new(*secret))
        })
        .await
    }

    async fn open_sealed(&self, name: &'static str) -> Result<Option<Zeroizing<Vec<u8>>>, Error> {
        self.blocking(move |inner| inner.open_sealed(name)).await
    }

    async fn seal(&self, name: &'static str, plaintext: Zeroizing<Vec<u8>>) -> Result<(), Error> {
        self.blocking(move |inner| {
            let sealed = inner.seal(name, &plaintext)?;
            inner.replace_sealed(name, &sealed)
        })
        .await
    }

    /// Key derivation takes tens of milliseconds and a sync some: neither belongs on the threads that carry packets.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Inner) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let inner = Arc::clone(&self.inner);
        match tokio::task::spawn_blocking(move || work(&inner)).await {
            Ok(result) => result,
            Err(_) => Err(Error::Thread),
        }
    }
}

impl Inner {
    fn seal(&self, name: &str, plaintext: &[u8]) -> Result<Vec<u8>, Error> {
        let key = self.sealer.key().map_err(|source| self.files.sealed(name, source))?;
        key.seal(name, plaintext, random()?)
            .map_err(|source| self.files.sealed(name, source))
    }

    fn open_sealed(&self, name: &str) -> Result<Option<Zeroizing<Vec<u8>>>, Error> {
        let Some(sealed) = self.files.read(name)? else {
            return Ok(None);
        };
        let key = self
            .sealer
            .key_of(&sealed)
            .map_err(|source| self.files.sealed(name, source))?;
        key.open(name, &sealed)
            .map(Some)
            .map_err(|source| self.files.sealed(name, source))
    }

    /// Replaces a sealed record; one that does not open is somebody's, so it is kept beside.
    fn replace_sealed(&self, name: &str, sealed: &[u8]) -> Result<(), Error> {
        if let Err(error) = self.open_sealed(name) {
            let kept = self.files.keep_aside(name)?;
            tracing::warn!(%error, kept = %kept.display(), "an unreadable record is kept beside the new one");
        }
        self.files.write(name, sealed)
    }
}

/// Random bytes from the operating system.
fn random<const N: usize>() -> Result<[u8; N], Error> {
    let mut bytes = [0; N];
    aws_lc_rs::rand::fill(&mut bytes).ok().ok_or(Error::Random)?;
    Ok(bytes)
}

fn hex(bytes: &[u8]) -> String {
    bytes
        .iter()
        .fold(String::new(), |out, byte| out + &format!("{byte:02x}"))
}

#[cfg(test)]
mod tests;
