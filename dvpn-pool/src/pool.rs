//! The pool itself: everything the handlers share, and its opening.

use std::{
    collections::HashSet,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::{Duration, Instant},
};

use dvpn_common::{ids::ProviderId, keys::VerifyingKey};
use jiff::Timestamp;
use tokio::sync::Notify;

use crate::{
    api::speed::Slots,
    challenge::Challenges,
    config::Config,
    connections::Gate,
    ledger::{self, Ledger, Queue},
    limiter::{Limiter, Pace, line},
    list::List,
    live::{Live, NodeEvent},
    network::{Networks, UlaId},
    orchestrator::Orchestrator,
    prober::Prober,
    refusal::Refusal,
    signed::ReplayCache,
    signing::{self, KeyRing, Signer},
    store::{self, Removed, Store, TokenHash},
};

const MINUTE: Duration = Duration::from_mins(1);
/// What an approval takes besides the wait for its node.
const CLAIM_MARGIN: Duration = Duration::from_secs(1);
/// Keys that one limiter remembers.
const LIMITER_CAPACITY: usize = 65_536;
/// Nonces of all nodes, some 60 MB of them, shared evenly.
const NONCES: usize = 1_000_000;
/// The least share of one node: 2 minutes of heartbeats, streams and a few acknowledgements. 10,000 nodes that all want
/// theirs need two and a half times what is shared.
const NONCES_OF_A_NODE: usize = 256;

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
    /// The key gives no WireGuard key.
    #[error("the pool's signing key gives no WireGuard key: restore it from a backup")]
    Prober,
}

/// Everything the handlers share.
pub struct Pool {
    /// What the operator said.
    pub config: Config,
    /// What survives a restart.
    pub store: Store,
    /// Where changes of nodes' peers are handed in.
    pub ledger: Ledger,
    /// Ephemeral keys for proofs of possession.
    pub challenges: Challenges,
    /// Shakes hands with nodes.
    pub prober: Prober,
    /// What is known of nodes only while they live.
    pub live: Live,
    /// Nonces of signed requests.
    pub replays: ReplayCache,
    /// Approvals a token, and renewals of its lease.
    pub approvals: Pace<TokenHash>,
    /// Releases a token.
    pub releases: Pace<TokenHash>,
    /// Registrations that change something, a node.
    pub node_changes: Pace<ProviderId>,
    /// New nodes a site.
    pub registrations: Limiter<IpAddr>,
    /// New checkouts a site.
    pub checkouts: Limiter<IpAddr>,
    /// Reachability checks a line.
    pub checks: Limiter<IpAddr>,
    /// Who is measuring a line.
    pub speed: Slots,
    /// The open connections.
    pub gate: Gate,
    /// Lends standby nodes, if the operator wants it.
    pub orchestrator: Option<Orchestrator>,
    /// Held while a node's peers change and the change is put into its stream: events leave in the order of their
    /// sequence numbers, and a snapshot is of one moment.
    pub changes: tokio::sync::Mutex<()>,
    signer: RwLock<Arc<Signer>>,
    failures: Limiter<IpAddr>,
    approving: Mutex<HashSet<TokenHash>>,
    /// Told whenever a claim ends.
    claim_ended: Notify,
    ula: UlaId,
}

impl Pool {
    /// Opens database and keys. Nothing that is handed in at the ledger happens before [`crate::ledger::write`] runs on
    /// the queue.
    pub async fn open(config: Config) -> Result<(Arc<Self>, Queue), Error> {
        if !config.development {
            return Err(Error::NoPaymentBackend);
        }
        let store = Store::open(&config.database).await?;
        let bound = store.pool_key().await?;
        let key_path = key_path(&config.database);
        if bound.is_some() && !key_path.exists() {
            return Err(signing::Error::Foreign { path: key_path }.into());
        }
        let ring = KeyRing::open(&key_path, bound)?;
        if bound.is_none() {
            store
                .meta_or_insert("pool_key", &ring.current().public().to_string())
                .await?;
        }
        let prober = Prober::new(ring.prober()).ok_or(Error::Prober)?;
        let rotations = store.rotations().await?;
        let ula = store.meta_or_insert("ula", &UlaId::random().to_hex()).await?;
        let ula = UlaId::parse(&ula).ok_or(store::Error::Corrupt("ULA prefix"))?;
        let dropped = store.remove_unacknowledged().await?;
        if dropped > 0 {
            tracing::warn!(
                dropped,
                "approvals of an earlier run were never acknowledged and are withdrawn"
            );
        }
        let now = Timestamp::now();
        // An operator may have changed the key while nobody served.
        if let Some(signed) = store.sign_again(ring.current(), now).await?
            && signed.approvals > 0
        {
            tracing::info!(
                approvals = signed.approvals,
                "approvals are signed again by the pool's key of now"
            );
        }
        store.forget_silent_nodes(now).await?;
        let list = List::above(store.list_version().await?);
        let live = Live::new(store.nodes().await?, list, config.open_registration, config.timing);
        live.set_standbys(&store.standbys().await?, Instant::now());
        let (ledger, queue) = ledger::open();
        let limits = config.limits;
        let limiter = |allowed, window| Limiter::new(allowed, window, LIMITER_CAPACITY);
        let pool = Arc::new(Self {
            store,
            ledger,
            challenges: Challenges::new(config.timing.challenge_life),
            prober,
            live,
            replays: ReplayCache::new(NONCES_OF_A_NODE, NONCES),
            approvals: Pace::new(limits.approvals, MINUTE, LIMITER_CAPACITY),
            releases: Pace::new(limits.approvals, MINUTE, LIMITER_CAPACITY),
            node_changes: Pace::new(limits.changes, MINUTE, LIMITER_CAPACITY),
            registrations: limiter(limits.nodes, MINUTE * 60),
            checkouts: limiter(limits.checkouts, MINUTE * 60),
            checks: limiter(limits.checks, MINUTE),
            speed: Slots::new(limits.speed_tests),
            gate: Gate::new(config.max_connections, limits.connections),
            orchestrator: config.orchestrator.map(Orchestrator::new),
            changes: tokio::sync::Mutex::new(()),
            signer: RwLock::new(Arc::new(Signer::new(ring, rotations))),
            failures: limiter(limits.failures, MINUTE),
            approving: Mutex::new(HashSet::new()),
            claim_ended: Notify::new(),
            ula,
            config,
        });
        pool.raise_ceiling(now).await?;
        Ok((pool, queue))
    }

    /// What signs now.
    pub fn signer(&self) -> Arc<Signer> {
        self.signer.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The key that approvals of now verify with.
    pub fn public_key(&self) -> VerifyingKey {
        self.signer().ring.current().public()
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

    /// Claims the right to approve for one token; waits for whoever has it, but no longer than for a node.
    pub async fn claim_token_soon(self: &Arc<Self>, token: TokenHash) -> Option<TokenClaim> {
        let claim = async {
            loop {
                let ended = self.claim_ended.notified();
                if let Some(claim) = self.claim_token(token) {
                    return claim;
                }
                ended.await;
            }
        };
        tokio::time::timeout(self.config.timing.ack_timeout + CLAIM_MARGIN, claim)
            .await
            .ok()
    }

    /// One round of what time, and an operator beside this process, do: ends approvals, takes silent nodes off the
    /// list, takes up a new key.
    pub async fn sweep(&self) -> Result<(), store::Error> {
        let now = Timestamp::now();
        self.live.sweep(Instant::now());
        self.challenges.sweep(Instant::now());
        // The operator marks nodes with another process.
        self.live.set_standbys(&self.store.standbys().await?, Instant::now());
        self.replays.sweep(now.as_second());
        self.raise_ceiling(now).await?;
        self.follow_rotation().await?;
        let listed = self.live.newly_listed();
        if !listed.is_empty() {
            self.store.mark_listed(&listed).await?;
            self.live.marked_listed(&listed);
        }
        let _order = self.changes.lock().await;
        let removed = self.store.remove_ended(now).await?;
        self.announce_removed(removed);
        Ok(())
    }

    /// Forgets what nobody asks for any more.
    pub async fn clean(&self) -> Result<(), store::Error> {
        let now = Timestamp::now();
        self.store.forget_old_payments(now).await?;
        self.store.forget_ended_leases().await?;
        // With the order of changes held, no registration comes between the database and the memory.
        let _order = self.changes.lock().await;
        let forgotten = self.store.forget_silent_nodes(now).await?;
        self.live.forget(&forgotten);
        Ok(())
    }

    async fn raise_ceiling(&self, now: Timestamp) -> Result<(), store::Error> {
        if let Some(ceiling) = self.live.ceiling_due(now) {
            self.store.raise_list_version(ceiling).await?;
            self.live.raise_ceiling(ceiling);
        }
        Ok(())
    }

    async fn follow_rotation(&self) -> Result<(), store::Error> {
        let current = self.store.pool_key().await?;
        if current.is_none_or(|key| key == self.public_key()) {
            return Ok(());
        }
        let rotations = self.store.rotations().await?;
        match KeyRing::open(&key_path(&self.config.database), current) {
            Ok(ring) => {
                let signer = Signer::new(ring, rotations);
                let key = signer.ring.current().public();
                // The key and what is signed with it change as one: nothing else is signed or told meanwhile.
                let _order = self.changes.lock().await;
                let again = self.store.sign_again(signer.ring.current(), Timestamp::now()).await?;
                let approvals = again.as_ref().map_or(0, |again| again.approvals);
                tracing::warn!(target: crate::AUDIT, pool_key = %key, approvals, "pool_key_rotated");
                *self.signer.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(signer);
                self.live.relist();
                if let Some(again) = again {
                    self.live.resync(&again.sequences, Instant::now());
                }
            }
            Err(error) => tracing::error!(%error, "the pool's new key does not open; the old one goes on"),
        }
        Ok(())
    }
}

/// Where the keys of the pool with this database are.
pub fn key_path(database: &Path) -> PathBuf {
    database.with_extension("key")
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
        self.pool.claim_ended.notify_waiters();
    }
}
