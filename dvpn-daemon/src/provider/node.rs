//! The provider's one loop: what the pool says, what the owner allows and what time takes, carried out on the tunnel.

mod arrivals;
mod grants;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use dvpn_common::{
    contract::{RefusedPeer, Snapshot},
    keys::VerifyingKey,
};
use dvpn_core::{
    Now,
    line::Known,
    node::{Admission, Month, Standing, Usage, admission},
};
use futures::StreamExt as _;
use ipnetwork::IpNetwork;
use jiff::Timestamp;
use tokio::sync::{mpsc, watch};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use super::{
    EchoResponder, Error, Forwarder, Ground, Identity, PeerStatus, ProviderConfig, ProviderStatus,
    acks::{self, Acks},
    check_networks,
    grants::{Grants, addresses},
    memory::Keeper,
    network::public_addresses,
    pinned,
    pool::Pool,
    registration::{Registration, Told, with_sources},
    roster::{Plan, Roster},
    status::{Event, Numbers},
    stream::{Arrival, follow},
    system_resolvers,
    volume::Volume,
};
use crate::{
    host::{PROVIDER_INTERFACE, ProviderNetwork},
    tunnel::{DEFAULT_MTU_BYTES, FWMARK, PeerStats, Tunnel, TunnelConfig},
};

/// Changes that are carried out together at most.
const MAX_AT_ONCE: usize = 256;
/// Peers are compared with what should be at least this often.
const TICK: Duration = Duration::from_secs(5);
/// What this node says of itself follows a change of its clients within this: reading the counters of all is not free.
const REPORT_WITHIN: Duration = Duration::from_millis(500);
/// How often the month's volume is kept.
const KEEP_USAGE_EVERY: Duration = Duration::from_secs(20);

/// Is a provider until `shutdown`, or until the tunnel fails. Everything is taken down before it returns.
///
/// A pool that does not answer stops nothing: clients that are peers stay so until their approvals end.
pub async fn run(config: ProviderConfig, shutdown: CancellationToken) -> Result<(), Error> {
    let identity = Arc::new(Identity::from_seed(config.node_id.clone(), &config.identity_seed)?);
    let pool = Pool::new(config.http.clone(), config.pool_url.clone(), identity);
    let (pool_key, mut pool_key_seen) = watch::channel(config.pool_key);
    let (told, mut told_seen) = watch::channel(Told::default());
    let echo = EchoResponder::bind(config.probe_port, &config.public_key).map_err(|source| Error::Echo {
        port: config.probe_port,
        source,
    })?;
    let echo_stats = echo.stats();
    let tunnel = (config.tunnel)(TunnelConfig {
        interface: PROVIDER_INTERFACE.to_owned(),
        private_key: config.private_key.clone(),
        listen_port: config.port,
        fwmark: FWMARK,
        mtu_bytes: DEFAULT_MTU_BYTES,
        peers: Vec::new(),
        offload: true,
    })
    .await
    .map_err(Error::Tunnel)?;

    let acks = Acks::default();
    let mut node = Node::new(&config, tunnel, acks.clone(), pool_key.clone());
    node.prepare_grants().await;
    node.decide(Timestamp::now());
    let admission_seen = node.admission.subscribe();
    let registration = || Registration {
        pool: pool.clone(),
        public_key: config.public_key,
        endpoint: config.endpoint.clone(),
        port: config.port,
        probe_port: config.probe_port,
        public_probe: config.public_probe.clone(),
        region: config.region.clone(),
        pool_key: pool_key.clone(),
        memory: Arc::clone(&config.memory),
        max_peers: config.max_peers,
        admission: admission_seen.clone(),
        told: told.clone(),
        audit: Arc::clone(&config.audit),
        status: config.status.clone(),
        observed: None,
    };
    let echo_task = AbortOnDropHandle::new(tokio::spawn(echo.run()));
    let registration_task = AbortOnDropHandle::new(tokio::spawn(registration().run()));
    let (arrivals, mut arriving) = mpsc::channel(MAX_AT_ONCE);
    let stream_task = {
        let (pool, mut key) = (pool.clone(), pool_key_seen.clone());
        AbortOnDropHandle::new(tokio::spawn(async move {
            // Without the pool's key nobody can be admitted.
            if key.wait_for(Option::is_some).await.is_ok() {
                follow(pool, arrivals).await;
            }
        }))
    };
    let ack_task = {
        let pool = pool.clone();
        AbortOnDropHandle::new(tokio::spawn(acks::tell(acks, move |ack| {
            let pool = pool.clone();
            async move { pool.acknowledge(&ack).await }
        })))
    };

    let channels = Channels {
        arriving: &mut arriving,
        pool_key: &mut pool_key_seen,
        told: &mut told_seen,
        drained: config.drained.clone(),
        line: config.line.clone(),
    };
    let ended = node.serve(channels, &shutdown, || echo_stats.answered()).await;
    drop((stream_task, registration_task, ack_task, echo_task));
    let taken_down = node.take_down().await;
    registration().leave().await;
    ended.and(taken_down)
}

/// What the loop listens to.
struct Channels<'a> {
    arriving: &'a mut mpsc::Receiver<Arrival>,
    pool_key: &'a mut watch::Receiver<Option<VerifyingKey>>,
    told: &'a mut watch::Receiver<Told>,
    drained: watch::Receiver<bool>,
    line: watch::Receiver<Known>,
}

struct Node<'a> {
    config: &'a ProviderConfig,
    tunnel: Box<dyn Tunnel>,
    roster: Roster,
    /// None on a machine that cannot enforce any: then nobody is a peer.
    grants: Option<Grants>,
    /// What the machine is configured for; empty until the first snapshot.
    networks: Vec<IpNetwork>,
    /// Addresses that others know this node by.
    public: Vec<IpAddr>,
    dns: Option<AbortOnDropHandle<()>>,
    numbers: Numbers,
    volume: Volume,
    usage: Usage,
    usage_kept: Instant,
    cap_reached: Option<Timestamp>,
    report_at: Option<Instant>,
    admission: watch::Sender<Admission>,
    keeper: Keeper,
    acks: Acks,
    pool_key: watch::Sender<Option<VerifyingKey>>,
}

impl<'a> Node<'a> {
    fn new(
        config: &'a ProviderConfig,
        tunnel: Box<dyn Tunnel>,
        acks: Acks,
        pool_key: watch::Sender<Option<VerifyingKey>>,
    ) -> Self {
        let empty = Usage {
            month: Month::of(Timestamp::now()),
            bytes: 0,
        };
        let max_clients = usize::try_from(config.max_peers).unwrap_or(usize::MAX);
        Self {
            config,
            tunnel,
            roster: Roster::new(config.serials.clone(), max_clients),
            grants: None,
            networks: Vec::new(),
            public: public_addresses(config.endpoint.as_deref(), None),
            dns: None,
            numbers: Numbers::default(),
            volume: Volume::default(),
            usage: config.usage.unwrap_or(empty),
            usage_kept: Instant::now(),
            cap_reached: None,
            report_at: None,
            admission: watch::Sender::new(Admission::Open),
            keeper: Keeper::spawn(Arc::clone(&config.memory)),
            acks,
            pool_key,
        }
    }

    async fn serve(
        &mut self,
        channels: Channels<'_>,
        shutdown: &CancellationToken,
        echoes: impl Fn() -> u64,
    ) -> Result<(), Error> {
        let Channels {
            arriving,
            pool_key,
            told,
            mut drained,
            mut line,
        } = channels;
        let mut changes = self.config.host.network_changes().await.map_err(Error::Host)?;
        let left = self.config.host.provider_carried().map_err(Error::Host)?;
        self.volume.begin(left);
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut arrived = Vec::new();
        loop {
            let until_expiry = self.roster.next_expiry().map_or(TICK, |at| {
                Duration::try_from(at.duration_since(Timestamp::now()))
                    .unwrap_or_default()
                    .min(TICK)
            });
            let look_again = self.roster.watches(Instant::now());
            let unsettled = self.grants.as_ref().is_some_and(|grants| !grants.is_settled());
            let until_report = self.report_at.map(|at| at.saturating_duration_since(Instant::now()));
            tokio::select! {
                () = shutdown.cancelled() => return Ok(()),
                reason = self.tunnel.died() => return Err(Error::TunnelDied(reason)),
                1.. = arriving.recv_many(&mut arrived, MAX_AT_ONCE) => {
                    let key = *pool_key.borrow_and_update();
                    let arrived = std::mem::take(&mut arrived);
                    if let Some(key) = key {
                        self.arrived(arrived, key).await?;
                    }
                }
                Ok(()) = told.changed() => {
                    let now = *told.borrow_and_update();
                    self.told(now).await?;
                }
                Some(()) = changes.next(), if !self.networks.is_empty() => {
                    self.config.host.provider_refresh().await.map_err(Error::Host)?;
                }
                () = std::future::ready(()), if unsettled => self.settle_grants().await?,
                () = tokio::time::sleep(look_again.unwrap_or_default()), if look_again.is_some() => self.look().await?,
                () = tokio::time::sleep(until_expiry) => self.reconcile().await?,
                () = tokio::time::sleep(until_report.unwrap_or(TICK)), if until_report.is_some() => self.report(echoes())?,
                Ok(()) = line.changed() => {
                    self.size_grants().await?;
                    self.decide(Timestamp::now());
                    self.reconcile().await?;
                }
                Ok(()) = drained.changed() => {
                    self.decide(Timestamp::now());
                    self.reconcile().await?;
                }
                _ = tick.tick() => {
                    if let Some(grants) = &mut self.grants {
                        grants.reconcile().await.map_err(Error::Host)?;
                    }
                    self.decide(Timestamp::now());
                    self.reconcile().await?;
                    self.report(echoes())?;
                }
            }
        }
    }

    /// What the pool's answer to a registration means here.
    async fn told(&mut self, told: Told) -> Result<(), Error> {
        let public = public_addresses(self.config.endpoint.as_deref(), told.observed);
        if public != self.public {
            self.public = public;
            if !self.networks.is_empty() {
                let public = self.public.clone();
                self.config.host.provider_public(public).await.map_err(Error::Host)?;
            }
        }
        if self
            .roster
            .set_prober(told.prober.filter(|key| *key != self.config.public_key))
        {
            self.reconcile().await?;
        }
        Ok(())
    }

    /// What the node does with clients now; the pool hears of a change at once.
    fn decide(&mut self, at: Timestamp) {
        let rules = &self.config.rules;
        let capped = rules.monthly_cap_bytes > 0 && self.usage.bytes >= rules.monthly_cap_bytes;
        if !capped || Month::of(at) > self.usage.month {
            self.usage = self.usage.plus(0, at);
            self.cap_reached = None;
        }
        let standing = Standing {
            unenforced: self.grants.is_none(),
            drained: *self.config.drained.borrow(),
            unmeasured: self.config.line.borrow().forwarded().is_none(),
            month_bytes: self.usage.bytes,
            cap_reached: self.cap_reached,
        };
        let decided = admission(rules, &standing, at);
        self.roster.draining = decided.reason().map(dvpn_core::node::Reason::as_str);
        // Nobody is a peer without a grant.
        let granted = self.grants.as_ref().is_some_and(|grants| grants.share().is_some());
        self.roster.closed = matches!(decided, Admission::Closed(_)) || !granted;
        let changed = self
            .admission
            .send_if_modified(|last| std::mem::replace(last, decided) != decided);
        let text = decided.to_string();
        if changed {
            tracing::info!("this node is {text}");
            (self.config.audit)(Event::AdmissionChanged {
                admission: text.clone(),
            });
        }
        let (month_bytes, config) = (self.usage.bytes, self.config);
        config.status.send_if_modified(|status| {
            let news = status.admission != text || status.month_bytes != month_bytes;
            status.admission = text;
            status.month_bytes = month_bytes;
            status.max_peers = config.max_peers;
            status.monthly_cap_bytes = config.rules.monthly_cap_bytes;
            status.limit_bits_per_second = config.limit_bits_per_second;
            news
        });
    }

    /// The key that a snapshot is signed with: the pinned one, or where its chain of rotations leads from there.
    fn follow_key(&self, snapshot: &Snapshot, pinned: VerifyingKey) -> Result<VerifyingKey, String> {
        let Some(key) = snapshot.pool_key else {
            return Ok(pinned);
        };
        let (memory, audit) = (&*self.config.memory, &*self.config.audit);
        match pinned::learn(&self.pool_key, memory, audit, key, &snapshot.rotations, None) {
            None => Ok(key),
            Some(problem) => Err(problem),
        }
    }

    /// Takes nobody in from a snapshot that is not believed. Existing peers keep what they were admitted to; whom the
    /// pool names no more goes.
    async fn keep_only(&mut self, snapshot: &Snapshot, reason: &str) -> Result<(), Error> {
        tracing::error!("{reason}");
        self.config
            .status
            .send_modify(|status| status.problem = Some(reason.to_owned()));
        self.roster.retain(&snapshot.peers);
        self.reconcile().await?;
        let refused = snapshot.peers.iter();
        let refused = refused.map(|peer| RefusedPeer {
            public_key: peer.public_key,
            reason: reason.to_owned(),
        });
        self.acks.snapshot(snapshot.sequence, refused.collect());
        Ok(())
    }

    /// A snapshot: first the machine, then the peers. Networks that cannot be are refused with everything in them.
    async fn replace(&mut self, snapshot: &Snapshot, pool_key: VerifyingKey) -> Result<(), Error> {
        if snapshot.networks != self.networks {
            let on_link = self
                .config
                .host
                .foreign_prefixes(PROVIDER_INTERFACE)
                .await
                .map_err(Error::Host)?;
            if let Err(error) = check_networks(&snapshot.networks, &on_link) {
                return self.keep_only(snapshot, &error.to_string()).await;
            }
            self.renumber(&snapshot.networks).await?;
        }
        let ground = self.ground(pool_key);
        let refused = self.roster.replace(&snapshot.peers, &ground, now());
        self.settle(&refused).await?;
        self.acks.snapshot(snapshot.sequence, refused);
        Ok(())
    }

    /// Brings the machine up for these networks, without any peer.
    async fn renumber(&mut self, networks: &[IpNetwork]) -> Result<(), Error> {
        self.dns = None;
        self.roster.clear();
        self.reconcile().await?;
        let network = ProviderNetwork {
            interface: PROVIDER_INTERFACE.to_owned(),
            networks: networks.to_vec(),
            mtu_bytes: DEFAULT_MTU_BYTES,
            public: self.public.clone(),
        };
        self.config.host.provider_up(&network).await.map_err(Error::Host)?;
        networks.clone_into(&mut self.networks);
        self.config.status.send_modify(|status| status.up = true);
        self.serve_dns().await;
        Ok(())
    }

    /// Names are a convenience; a node whose port 53 is taken still carries traffic, and says so.
    async fn serve_dns(&mut self) {
        let resolvers = if self.config.resolvers.is_empty() {
            system_resolvers().unwrap_or_default()
        } else {
            self.config.resolvers.clone()
        };
        match Forwarder::bind(self.networks.clone(), resolvers).await {
            Ok(forwarder) => self.dns = Some(AbortOnDropHandle::new(tokio::spawn(forwarder.run()))),
            Err(error) => {
                let problem = format!("no DNS for clients: port 53 at the gateway: {error}: give CAP_NET_BIND_SERVICE");
                tracing::error!("{problem}");
                self.config.status.send_modify(|status| status.problem = Some(problem));
            }
        }
    }

    /// Whether a renewal has shaken hands.
    async fn look(&mut self) -> Result<(), Error> {
        let stats = self.tunnel.stats().await.map_err(Error::Tunnel)?;
        if self.roster.observe(&stats, Instant::now()) {
            self.carry_out(&stats).await?;
        }
        Ok(())
    }

    /// Makes the tunnel's peers what they should be.
    async fn reconcile(&mut self) -> Result<(), Error> {
        self.roster.expire(Timestamp::now());
        let stats = self.tunnel.stats().await.map_err(Error::Tunnel)?;
        self.roster.observe(&stats, Instant::now());
        self.carry_out(&stats).await
    }

    async fn carry_out(&mut self, stats: &[PeerStats]) -> Result<(), Error> {
        let observed: BTreeSet<_> = stats.iter().map(|peer| peer.public_key).collect();
        let plan = self.roster.plan(&observed);
        if let Some(grants) = &mut self.grants
            && !self.roster.closed
        {
            grants.give(self.roster.holding_clients()).await.map_err(Error::Host)?;
        }
        // An address that moves from one peer to another moves with this; the other is taken off after it.
        if !plan.set.is_empty() {
            self.tunnel.set_peers(plan.set.clone()).await.map_err(Error::Tunnel)?;
        }
        for key in &plan.remove {
            self.tunnel.remove_peer(*key).await.map_err(Error::Tunnel)?;
        }
        if let Some(grants) = &mut self.grants {
            let holders = self.roster.holding_clients().filter(|_| !self.roster.closed);
            grants.keep_only(holders).await.map_err(Error::Host)?;
        }
        self.record(&plan);
        self.roster.applied(&plan);
        if plan != Plan::default() {
            self.report_soon();
        }
        Ok(())
    }

    fn report_soon(&mut self) {
        self.report_at.get_or_insert_with(|| Instant::now() + REPORT_WITHIN);
    }

    fn record(&mut self, plan: &Plan) {
        let audit = &self.config.audit;
        for (old, new) in self.roster.take_handed_over() {
            if let Some(peer) = self.numbers.inherit(&old, new) {
                audit(Event::PeerRenewed { peer });
            }
        }
        for key in &plan.remove {
            if let Some(peer) = self.numbers.forget(key) {
                self.volume.forget(peer);
                audit(Event::PeerRemoved { peer });
            }
        }
        // Who has no addresses is no client yet, or the pool's prober.
        for peer in plan.set.iter().filter(|peer| !peer.allowed_ips.is_empty()) {
            if self.numbers.known(&peer.public_key).is_none() {
                audit(Event::PeerAdmitted {
                    peer: self.numbers.of(peer.public_key),
                });
            }
        }
    }

    fn report(&mut self, echoes: u64) -> Result<(), Error> {
        self.report_at = None;
        let refused = self.config.host.provider_counters().map_err(Error::Host)?;
        // An empty answer is a table that is not there. No peer without isolation: down, and up again with it.
        if !self.networks.is_empty() && refused.is_empty() {
            return Err(Error::FirewallGone);
        }
        self.count(Timestamp::now())?;
        let active: BTreeSet<_> = self.roster.active(Instant::now()).map(|client| client.key).collect();
        let (shaped, enforcement) = match &self.grants {
            Some(grants) => (
                grants.traffic().map_err(Error::Host)?,
                Some(grants.enforcement().map_err(Error::Host)?),
            ),
            None => (BTreeMap::new(), None),
        };
        let peers: Vec<PeerStatus> = self
            .roster
            .holding_clients()
            .filter_map(|client| {
                let peer = self.numbers.known(&client.key)?;
                Some(PeerStatus {
                    peer,
                    active: active.contains(&client.key),
                    carried: self.volume.of(peer),
                    shaped: shaped.get(&addresses(client)).copied().unwrap_or_default(),
                })
            })
            .collect();
        self.config.status.send_if_modified(|status| {
            let changed = status.peers != peers
                || status.refused != refused
                || status.echoes != echoes
                || status.enforcement != enforcement;
            status.enforcement = enforcement;
            status.active = active.len();
            status.peers = peers;
            status.refused = refused;
            status.echoes = echoes;
            changed
        });
        Ok(())
    }

    /// What clients carried since the last time goes to them and to the month.
    fn count(&mut self, at: Timestamp) -> Result<(), Error> {
        let carried = self.config.host.provider_carried().map_err(Error::Host)?;
        let bytes = self.volume.add(carried, self.roster.holding_clients(), &self.numbers);
        let before = self.usage;
        self.usage = self.usage.plus(bytes, at);
        let cap = self.config.rules.monthly_cap_bytes;
        let reached = cap > 0 && before.bytes < cap && self.usage.bytes >= cap;
        if reached {
            self.cap_reached = Some(at);
        }
        if reached || self.usage_kept.elapsed() >= KEEP_USAGE_EVERY {
            self.usage_kept = Instant::now();
            self.keeper.usage(self.usage);
        }
        Ok(())
    }

    fn ground(&self, pool_key: VerifyingKey) -> Ground {
        Ground {
            pool_key,
            provider_id: self.config.node_id.clone(),
            provider_key: self.config.public_key,
            networks: self.networks.clone(),
        }
    }

    /// Peers, then the machine, then the device; then nothing of ours is left.
    async fn take_down(mut self) -> Result<(), Error> {
        self.dns = None;
        if let Err(error) = self.count(Timestamp::now()) {
            tracing::info!("counting for the last time: {}", with_sources(&error));
        }
        self.keeper.usage(self.usage);
        // Nobody's grant is taken back one by one: when the peers are gone all of it goes.
        let grants = self.grants.take();
        self.roster.set_prober(None);
        self.roster.clear();
        if let Err(error) = self.reconcile().await {
            tracing::info!("removing peers: {}", with_sources(&error));
        }
        let mut down = self.config.host.provider_down().await.map_err(Error::Host);
        if let Some(grants) = grants {
            down = down.and(grants.close().await.map_err(Error::Host));
        }
        self.tunnel.close().await;
        self.keeper.finish().await;
        self.config
            .status
            .send_modify(|status| *status = ProviderStatus::default());
        down
    }
}

fn now() -> Now {
    Now {
        instant: Instant::now(),
        wall: Timestamp::now(),
    }
}
