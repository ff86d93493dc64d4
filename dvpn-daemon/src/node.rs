//! Starts the provider side, when its owner opted in. It runs beside the client and never holds it up.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use dvpn_common::{
    ids::ProviderId,
    keys::{PrivateKey, PublicKey, VerifyingKey},
    status::{NodeStatus, Problem},
};
use dvpn_core::{
    config::Config,
    keys::public_key,
    line::Known,
    node::{Month, Usage},
};
use jiff::Timestamp;
use tokio::{sync::watch, task::JoinHandle, time::timeout};
use tokio_util::sync::CancellationToken;
use url::Url;
use zeroize::Zeroizing;

use crate::{
    audit::Audit,
    ebpf::Loader,
    host::Host,
    http,
    provider::{self, Change, Memory, ProviderConfig, ProviderStatus, Serials, TunnelFactory},
    state::{self, State},
    tunnel,
};

/// How long the end of the daemon waits for the provider side to take everything down.
const END_TIMEOUT: Duration = Duration::from_secs(5);
/// Pause before the first new try.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// Longest pause between two tries; a provider that lived longer begins with the first pause again.
const LONGEST_PAUSE: Duration = Duration::from_mins(1);

/// Why a node can not be a provider. The client side goes on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `NODE_REGISTER_ENABLED` without `NODE_ACCEPT_TERMS`.
    #[error(
        "being a provider means that other people's traffic leaves by your address, and what they do there looks like it \
         came from you; no payouts exist in this release. If that is what you want, set NODE_ACCEPT_TERMS=true"
    )]
    Terms,
    /// `NODE_REGISTER_ENABLED` without `POOL_URL`.
    #[error("NODE_REGISTER_ENABLED needs a pool: set POOL_URL")]
    NoPool,
    /// The stored keys do not open.
    #[error("opening the node's keys")]
    State(#[from] state::Error),
    /// The stored key is none.
    #[error("the provider's key is not usable: remove it from the state directory to make a new one")]
    Key(#[from] dvpn_common::keys::Error),
    /// No HTTPS client.
    #[error("making the HTTPS client")]
    Http(#[from] http::Error),
}

/// Makes this machine's WireGuard devices.
pub fn device() -> TunnelFactory {
    Arc::new(|config| Box::pin(tunnel::create(config)))
}

/// The provider side, running.
pub struct Node {
    /// Under which id.
    pub id: ProviderId,
    /// Its key on the provider interface.
    pub public_key: PublicKey,
    /// How it is.
    pub status: watch::Receiver<ProviderStatus>,
    end: CancellationToken,
    task: JoinHandle<()>,
}

impl Node {
    /// Starts it, on devices from `device`; opens two sealed keys first, which takes a moment.
    pub async fn start(
        config: &Arc<Config>,
        state: &State,
        host: &Host,
        client: &http::Client,
        audit: &Audit,
        (drained, line): (watch::Receiver<bool>, watch::Receiver<Known>),
        device: TunnelFactory,
    ) -> Result<Self, Error> {
        if !config.node.accept_terms {
            return Err(Error::Terms);
        }
        let pool_url = config.pool_url.clone().ok_or(Error::NoPool)?;
        let private_key = state.provider_key().await?;
        let key = public_key(&private_key)?;
        let id = match &config.node.id {
            Some(id) => id.clone(),
            None => state.node_id()?,
        };
        let pool_key = match config.pool_public_key {
            Some(key) => Some(key),
            None => state.pool_key()?,
        };
        let (status, status_view) = watch::channel(ProviderStatus::default());
        let plan = Plan {
            id: id.clone(),
            identity_seed: state.identity_seed().await?,
            private_key,
            public_key: key,
            http: client.inner(&pool_url).await?,
            resolvers: match client.control_plane() {
                // The machine's own may be the tunnel's.
                Some(plane) => plane.allow_servers().await.unwrap_or_default(),
                None => Vec::new(),
            },
            pool_url,
            pool_key,
            config: config.clone(),
            state: state.clone(),
            host: host.clone(),
            audit: audit.clone(),
            status,
            drained,
            line,
            loader: Loader::new(config.bpf_directory.clone()),
            device,
        };
        let end = CancellationToken::new();
        let task = tokio::spawn(serve(plan, end.clone()));
        Ok(Self {
            id,
            public_key: key,
            status: status_view,
            end,
            task,
        })
    }

    /// Takes everything down and waits for it.
    pub async fn stop(self) {
        self.end.cancel();
        if timeout(END_TIMEOUT, self.task).await.is_err() {
            tracing::warn!("the provider side did not end in time: dvpn-daemon --cleanup removes what is left");
        }
    }
}

/// Everything a provider is made from, as often as it takes.
struct Plan {
    id: ProviderId,
    identity_seed: Zeroizing<[u8; 32]>,
    private_key: PrivateKey,
    public_key: PublicKey,
    pool_url: Url,
    pool_key: Option<VerifyingKey>,
    config: Arc<Config>,
    state: State,
    http: reqwest::Client,
    /// Where clients' questions for names go; the machine's own when empty.
    resolvers: Vec<SocketAddr>,
    host: Host,
    audit: Audit,
    status: watch::Sender<ProviderStatus>,
    drained: watch::Receiver<bool>,
    line: watch::Receiver<Known>,
    loader: Loader,
    device: TunnelFactory,
}

/// The state directory, as a provider remembers in it.
struct Kept(State);

impl Memory for Kept {
    fn pool_key(&self, key: VerifyingKey) {
        if let Err(error) = self.0.store_pool_key(&key) {
            tracing::error!("pinning the pool's key: {error}: it is learned anew at the next start");
        }
    }

    fn serials(&self, change: &Change) -> bool {
        let kept = match change {
            Change::Whole(record) => self.0.store_serials(record),
            Change::More(records) => self.0.add_serials(records),
        };
        if let Err(error) = &kept {
            tracing::error!("keeping the approvals' serials: {error}: after a restart an older one may be taken");
        }
        kept.is_ok()
    }

    fn usage(&self, usage: Usage) {
        if let Err(error) = self.0.store_usage(usage) {
            tracing::error!("keeping the month's volume: {error}: after a restart less is counted");
        }
    }
}

impl Plan {
    /// What an earlier run saw. A record that does not read is the stricter answer: older approvals are refused, and
    /// with a monthly cap nothing of the month is left.
    fn serials(&self) -> Serials {
        match self.state.serials() {
            Ok(None) => Serials::default(),
            Ok(Some(record)) => Serials::decode(&record, Timestamp::now()),
            Err(error) => {
                tracing::error!("the record of serials: {error}: approvals from before this start are refused");
                Serials::decode(&[], Timestamp::now())
            }
        }
    }

    fn usage(&self) -> Option<Usage> {
        self.state.usage().unwrap_or_else(|error| {
            tracing::error!("the month's volume: {error}: counted as used up if NODE_MONTHLY_CAP_GB is set");
            Some(Usage {
                month: Month::of(Timestamp::now()),
                bytes: self.config.node.rules.monthly_cap_bytes,
            })
        })
    }

    fn provider(&self) -> ProviderConfig {
        let node = &self.config.node;
        let events = self.audit.clone();
        ProviderConfig {
            node_id: self.id.clone(),
            identity_seed: self.identity_seed.clone(),
            private_key: self.private_key.clone(),
            public_key: self.public_key,
            pool_url: self.pool_url.clone(),
            endpoint: node.public_endpoint.map(|endpoint| endpoint.to_string()),
            port: node.port,
            probe_port: node.probe_port,
            public_probe: node.public_probe.map(|probe| probe.to_string()),
            region: node.region.clone(),
            pool_key: self.pool_key,
            memory: Arc::new(Kept(self.state.clone())),
            serials: self.serials(),
            usage: self.usage(),
            max_peers: node.max_peers,
            rules: node.rules.clone(),
            limit_bits_per_second: node.limit_bits_per_second,
            loader: self.loader.clone(),
            drained: self.drained.clone(),
            line: self.line.clone(),
            http: self.http.clone(),
            host: self.host.clone(),
            tunnel: Arc::clone(&self.device),
            resolvers: self.resolvers.clone(),
            audit: Arc::new(move |event| events.record(&event)),
            status: self.status.clone(),
        }
    }
}

/// Keeps the public view of the provider side up to date until it ends.
pub async fn show(
    id: ProviderId,
    mut status: watch::Receiver<ProviderStatus>,
    view: watch::Sender<Option<NodeStatus>>,
) {
    loop {
        let now = public_view(id.clone(), &status.borrow_and_update());
        view.send_if_modified(|last| {
            let news = last.as_ref() != Some(&now);
            *last = Some(now);
            news
        });
        if status.changed().await.is_err() {
            return;
        }
    }
}

fn public_view(id: ProviderId, status: &ProviderStatus) -> NodeStatus {
    let problem = status.problem.clone().map(|what| Problem {
        what,
        how: "see the log; a failure that passes is tried again by itself".to_owned(),
    });
    NodeStatus {
        id: Some(id),
        registered: status.registered,
        listed: status.listed,
        connected: status.connected,
        up: status.up,
        admission: status.admission.clone(),
        reachability: status.reachability,
        problem: status.verdict.clone().or(problem),
        clients: u64::try_from(status.peers.len()).unwrap_or(u64::MAX),
        active: u64::try_from(status.active).unwrap_or(u64::MAX),
        max_clients: status.max_peers,
        month_bytes: status.month_bytes,
        monthly_cap_bytes: status.monthly_cap_bytes,
        limit_bits_per_second: status.limit_bits_per_second,
    }
}

/// Is a provider until told to end; what fails is taken down and begun again after a pause.
async fn serve(mut plan: Plan, end: CancellationToken) {
    let mut pause = FIRST_PAUSE;
    loop {
        let begun = Instant::now();
        match provider::run(plan.provider(), end.clone()).await {
            Ok(()) => return,
            Err(error) => tracing::error!("the provider side failed, trying again: {}", crate::run::chain(&error)),
        }
        if begun.elapsed() > LONGEST_PAUSE {
            pause = FIRST_PAUSE;
        }
        // A key learned or followed meanwhile is the pinned one from now on; a configured one is followed anew.
        if plan.config.pool_public_key.is_none() {
            plan.pool_key = plan.state.pool_key().unwrap_or_default().or(plan.pool_key);
        }
        tokio::select! {
            () = end.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}
