//! The pool itself: everything the handlers share, and its opening.

use std::{
    collections::HashSet,
    net::IpAddr,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use jiff::Timestamp;

use crate::{
    config::Config,
    limiter::{Limiter, line},
    live::{Live, NodeEvent},
    network::{Networks, UlaId},
    refusal::Refusal,
    signed::ReplayCache,
    signing::{self, PoolKey},
    store::{self, Removed, Store, TokenHash},
};

const MINUTE: Duration = Duration::from_mins(1);
/// Failures of one line a minute before it has to wait.
const FAILURES: u32 = 60;
/// Approvals of one token a minute: more than any client needs, fewer than would keep a node busy.
const APPROVALS: u32 = 240;
/// New node ids and new checkouts of one /24 or /48 an hour.
const NEW_PER_SITE: u32 = 64;
/// Keys that one limiter remembers.
const LIMITER_CAPACITY: usize = 65_536;
/// Nonces of one node that are remembered: 4 minutes of 60 requests a second.
const NONCES_PER_NODE: usize = 16_384;

/// Why the pool does not open.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no payment backend but the development one.
    #[error(
        "this version of dvpn-pool can only take development payments (no coins, `dev_` tokens): say --development \
         if that is what you want; it cannot run a paid pool"
    )]
    NoPaymentBackend,
    /// The database.
    #[error("the pool's database does not open")]
    Store(#[from] store::Error),
    /// The signing key.
    #[error("the pool's signing key does not open")]
    Key(#[from] signing::Error),
    /// The key is not the one this database was made with.
    #[error(
        "{path} is not the key this database was made with: clients and nodes have pinned the old one, so restore it \
         from a backup"
    )]
    ForeignKey {
        /// Which file.
        path: PathBuf,
    },
}

/// Everything the handlers share.
pub struct Pool {
    /// What the operator said.
    pub config: Config,
    /// What survives a restart.
    pub store: Store,
    /// Signs approvals.
    pub key: PoolKey,
    /// What is known of nodes only while they live.
    pub live: Live,
    /// Nonces of signed requests.
    pub replays: ReplayCache,
    /// Approvals a token.
    pub approvals: Limiter<TokenHash>,
    /// New nodes a site.
    pub registrations: Limiter<IpAddr>,
    /// New checkouts a site.
    pub checkouts: Limiter<IpAddr>,
    /// Held while a node's peers change and the change is put into its stream: events leave in the order of their
    /// sequence numbers, and a snapshot is of one moment.
    pub changes: tokio::sync::Mutex<()>,
    failures: Limiter<IpAddr>,
    approving: Mutex<HashSet<TokenHash>>,
    ula: UlaId,
}

impl Pool {
    /// Opens database and key.
    pub async fn open(config: Config) -> Result<Arc<Self>, Error> {
        if !config.development {
            return Err(Error::NoPaymentBackend);
        }
        let store = Store::open(&config.database).await?;
        let key_path = config.database.with_extension("key");
        let bound = store.meta("pool_key").await?;
        if bound.is_some() && !key_path.exists() {
            return Err(Error::ForeignKey { path: key_path });
        }
        let key = PoolKey::open(&key_path)?;
        if store.meta_or_insert("pool_key", &key.public().to_string()).await? != key.public().to_string() {
            return Err(Error::ForeignKey { path: key_path });
        }
        let ula = store.meta_or_insert("ula", &UlaId::random().to_hex()).await?;
        let ula = UlaId::parse(&ula).ok_or(store::Error::Corrupt("ULA prefix"))?;
        let dropped = store.remove_unacknowledged().await?;
        if dropped > 0 {
            tracing::warn!(
                dropped,
                "approvals of an earlier run were never acknowledged and are withdrawn"
            );
        }
        store.forget_silent_nodes(Timestamp::now()).await?;
        let live = Live::new(store.nodes().await?, config.open_registration, config.timing);
        Ok(Arc::new(Self {
            store,
            key,
            live,
            replays: ReplayCache::new(NONCES_PER_NODE),
            approvals: Limiter::new(APPROVALS, MINUTE, LIMITER_CAPACITY),
            registrations: Limiter::new(NEW_PER_SITE, MINUTE * 60, LIMITER_CAPACITY),
            checkouts: Limiter::new(NEW_PER_SITE * 4, MINUTE * 60, LIMITER_CAPACITY),
            changes: tokio::sync::Mutex::new(()),
            failures: Limiter::new(FAILURES, MINUTE, LIMITER_CAPACITY),
            approving: Mutex::new(HashSet::new()),
            ula,
            config,
        }))
    }

    /// The inner networks of the node with this index.
    pub fn networks(&self, index: u32) -> Networks {
        Networks::of(self.ula, index)
    }

    /// Runs one request of `source`: refused at once after too many failures, and its own failure is counted.
    pub async fn guarded<T>(
        &self,
        source: IpAddr,
        request: impl Future<Output = Result<T, Refusal>>,
    ) -> Result<T, Refusal> {
        let line = line(source);
        if let Some(wait) = self.failures.blocked(&line, Instant::now()) {
            return Err(Refusal::too_many(wait));
        }
        request.await.inspect_err(|refusal| {
            if refusal.is_senders_failure() {
                self.failures.count(&line, Instant::now());
            }
        })
    }

    /// Counts a failure that was not answered with a refusal.
    pub fn count_failure(&self, source: IpAddr) {
        self.failures.count(&line(source), Instant::now());
    }

    /// Tells nodes of peers that went. The caller holds [`Self::changes`].
    pub fn announce_removed(&self, removed: Vec<Removed>) {
        for Removed {
            node,
            sequence,
            client_key,
        } in removed
        {
            let event = dvpn_common::contract::PeerRemoved {
                sequence,
                public_key: client_key,
            };
            // A node without a stream hears of it in its next snapshot.
            self.live.send(&node, NodeEvent::Remove(event), Instant::now());
        }
    }

    /// Claims the right to approve for one token; nothing while somebody has it.
    pub fn claim_token(self: &Arc<Self>, token: TokenHash) -> Option<TokenClaim> {
        let mut approving = self.approving.lock().unwrap_or_else(PoisonError::into_inner);
        approving.insert(token).then(|| TokenClaim {
            pool: self.clone(),
            token,
        })
    }

    /// One round of what time does: ends approvals, takes silent nodes off the list.
    pub async fn sweep(&self) -> Result<(), store::Error> {
        let now = Timestamp::now();
        self.live.sweep(Instant::now());
        self.replays.sweep(now.as_second());
        let _order = self.changes.lock().await;
        let removed = self.store.remove_expired(now).await?;
        self.announce_removed(removed);
        Ok(())
    }
}

/// The right to approve for one token, until dropped.
pub struct TokenClaim {
    pool: Arc<Pool>,
    token: TokenHash,
}

impl Drop for TokenClaim {
    fn drop(&mut self) {
        self.pool
            .approving
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&self.token);
    }
}
