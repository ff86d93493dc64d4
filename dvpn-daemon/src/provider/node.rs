//! The provider's one loop: what the pool says and what time takes, carried out on the tunnel.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use dvpn_common::{
    contract::{Ack, RefusedPeer, Snapshot},
    keys::VerifyingKey,
    limits::APPROVE_ACK_TIMEOUT,
};
use futures::StreamExt as _;
use ipnetwork::IpNetwork;
use jiff::Timestamp;
use tokio::sync::{mpsc, watch};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use super::{
    EchoResponder, Error, Forwarder, Ground, Identity, ProviderConfig, check_networks,
    pool::{Pool, PoolEvent},
    registration::{Registration, with_sources},
    roster::Roster,
    status::{Event, Numbers},
    system_resolvers,
};
use crate::{
    host::{PROVIDER_INTERFACE, ProviderNetwork},
    tunnel::{DEFAULT_MTU_BYTES, Tunnel, TunnelConfig},
};

/// Peers are compared with what should be at least this often.
const TICK: Duration = Duration::from_secs(5);
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// How often an acknowledgement is sent before the stream's next snapshot has to carry it.
const ACK_ATTEMPTS: u32 = 3;

/// What arrives from the stream's task.
enum Arrival {
    Connected,
    Lost(String),
    Event(PoolEvent),
}

/// Is a provider until `shutdown`, or until the tunnel fails. Everything is taken down before it returns.
///
/// A pool that does not answer stops nothing: clients that are peers stay so until their approvals end.
pub async fn run(config: ProviderConfig, shutdown: CancellationToken) -> Result<(), Error> {
    let identity = Arc::new(Identity::from_seed(config.node_id.clone(), &config.identity_seed)?);
    let pool = Pool::new(config.http.clone(), config.pool_url.clone(), identity);
    let (pool_key, mut pool_key_seen) = watch::channel(config.pool_key);
    let echo = EchoResponder::bind(config.probe_port, &config.public_key).map_err(|source| Error::Echo {
        port: config.probe_port,
        source,
    })?;
    let echo_stats = echo.stats();
    let tunnel = (config.tunnel)(TunnelConfig {
        interface: PROVIDER_INTERFACE.to_owned(),
        private_key: config.private_key.clone(),
        listen_port: config.port,
        fwmark: 0,
        mtu_bytes: DEFAULT_MTU_BYTES,
        peers: Vec::new(),
        offload: true,
    })
    .await
    .map_err(Error::Tunnel)?;

    let registration = || Registration {
        pool: pool.clone(),
        public_key: config.public_key,
        endpoint: config.endpoint.clone(),
        port: config.port,
        probe_port: config.probe_port,
        public_probe: config.public_probe.clone(),
        region: config.region.clone(),
        pool_key: pool_key.clone(),
        pool_key_learned: Arc::clone(&config.pool_key_learned),
        audit: Arc::clone(&config.audit),
        status: config.status.clone(),
        observed: None,
    };
    let echo_task = AbortOnDropHandle::new(tokio::spawn(echo.run()));
    let registration_task = AbortOnDropHandle::new(tokio::spawn(registration().run()));
    let (arrivals, mut arriving) = mpsc::channel(64);
    let stream_task = {
        let (pool, mut key) = (pool.clone(), pool_key_seen.clone());
        AbortOnDropHandle::new(tokio::spawn(async move {
            // Without the pool's key nobody can be admitted.
            if key.wait_for(Option::is_some).await.is_ok() {
                follow(pool, arrivals).await;
            }
        }))
    };
    let (acks, to_acknowledge) = mpsc::channel(64);
    let ack_task = AbortOnDropHandle::new(tokio::spawn(acknowledge(pool.clone(), to_acknowledge)));

    let mut node = Node {
        config: &config,
        tunnel,
        roster: Roster::default(),
        networks: Vec::new(),
        dns: None,
        numbers: Numbers::default(),
        acks,
    };
    let ended = node
        .serve(&mut arriving, &mut pool_key_seen, &shutdown, || echo_stats.answered())
        .await;
    drop((stream_task, registration_task, ack_task, echo_task));
    let taken_down = node.take_down().await;
    registration().leave().await;
    ended.and(taken_down)
}

struct Node<'a> {
    config: &'a ProviderConfig,
    tunnel: Box<dyn Tunnel>,
    roster: Roster,
    /// What the machine is configured for; empty until the first snapshot.
    networks: Vec<IpNetwork>,
    dns: Option<AbortOnDropHandle<()>>,
    numbers: Numbers,
    acks: mpsc::Sender<Ack>,
}

impl Node<'_> {
    async fn serve(
        &mut self,
        arriving: &mut mpsc::Receiver<Arrival>,
        pool_key: &mut watch::Receiver<Option<VerifyingKey>>,
        shutdown: &CancellationToken,
        echoes: impl Fn() -> u64,
    ) -> Result<(), Error> {
        let mut changes = self.config.host.network_changes().await.map_err(Error::Host)?;
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let until_expiry = self.roster.next_expiry().map_or(TICK, |at| {
                Duration::try_from(at.duration_since(Timestamp::now()))
                    .unwrap_or_default()
                    .min(TICK)
            });
            tokio::select! {
                () = shutdown.cancelled() => return Ok(()),
                reason = self.tunnel.died() => return Err(Error::TunnelDied(reason)),
                Some(arrival) = arriving.recv() => {
                    let key = *pool_key.borrow_and_update();
                    if let Some(key) = key {
                        self.arrived(arrival, key).await?;
                    }
                }
                Some(()) = changes.next(), if !self.networks.is_empty() => {
                    self.config.host.provider_refresh().await.map_err(Error::Host)?;
                }
                () = tokio::time::sleep(until_expiry) => self.reconcile().await?,
                _ = tick.tick() => {
                    self.reconcile().await?;
                    self.report(echoes()).await?;
                }
            }
        }
    }

    async fn arrived(&mut self, arrival: Arrival, pool_key: VerifyingKey) -> Result<(), Error> {
        match arrival {
            Arrival::Connected => {
                self.config.status.send_modify(|status| status.connected = true);
                Ok(())
            }
            Arrival::Lost(problem) => {
                self.config.status.send_modify(|status| {
                    status.connected = false;
                    status.problem = Some(problem);
                });
                Ok(())
            }
            Arrival::Event(PoolEvent::Snapshot(snapshot)) => self.replace(&snapshot, pool_key).await,
            Arrival::Event(PoolEvent::Added(added)) => {
                let ground = self.ground(pool_key);
                let refused = self.roster.add(&added.peer, &ground, Timestamp::now()).err();
                self.settle(added.sequence, refused.into_iter().collect()).await
            }
            Arrival::Event(PoolEvent::Removed(removed)) => {
                self.roster.remove(&removed.public_key);
                self.settle(removed.sequence, Vec::new()).await
            }
        }
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
                let reason = error.to_string();
                tracing::error!("{reason}");
                self.config
                    .status
                    .send_modify(|status| status.problem = Some(reason.clone()));
                // Existing peers keep the networks they were admitted to; whom the pool names no more goes.
                self.roster.retain(&snapshot.peers);
                self.reconcile().await?;
                let refused = snapshot.peers.iter();
                let refused = refused.map(|peer| RefusedPeer {
                    public_key: peer.public_key,
                    reason: reason.clone(),
                });
                self.acknowledge(snapshot.sequence, refused.collect());
                return Ok(());
            }
            self.renumber(&snapshot.networks).await?;
        }
        let ground = self.ground(pool_key);
        let refused = self.roster.replace(&snapshot.peers, &ground, Timestamp::now());
        self.settle(snapshot.sequence, refused).await
    }

    /// Brings the machine up for these networks, without any peer.
    async fn renumber(&mut self, networks: &[IpNetwork]) -> Result<(), Error> {
        self.dns = None;
        self.roster = Roster::default();
        self.reconcile().await?;
        let network = ProviderNetwork {
            interface: PROVIDER_INTERFACE.to_owned(),
            networks: networks.to_vec(),
            mtu_bytes: DEFAULT_MTU_BYTES,
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

    async fn settle(&mut self, sequence: u64, refused: Vec<RefusedPeer>) -> Result<(), Error> {
        self.reconcile().await?;
        for peer in &refused {
            tracing::warn!("a client was refused: {}", peer.reason);
            (self.config.audit)(Event::PeerRefused {
                reason: peer.reason.clone(),
            });
        }
        self.acknowledge(sequence, refused);
        Ok(())
    }

    fn acknowledge(&self, sequence: u64, refused: Vec<RefusedPeer>) {
        if self.acks.try_send(Ack { sequence, refused }).is_err() {
            tracing::warn!("the pool takes no acknowledgements; it will ask again");
        }
    }

    /// Makes the tunnel's peers what they should be.
    async fn reconcile(&mut self) -> Result<(), Error> {
        self.roster.expire(Timestamp::now());
        let stats = self.tunnel.stats().await.map_err(Error::Tunnel)?;
        let observed: BTreeSet<_> = stats.iter().map(|peer| peer.public_key).collect();
        let plan = self.roster.plan(&observed);
        for key in &plan.remove {
            self.tunnel.remove_peer(*key).await.map_err(Error::Tunnel)?;
            if let Some(peer) = self.numbers.forget(key) {
                (self.config.audit)(Event::PeerRemoved { peer });
            }
        }
        if !plan.set.is_empty() {
            self.tunnel.set_peers(plan.set.clone()).await.map_err(Error::Tunnel)?;
        }
        for peer in plan.set.iter().filter(|peer| !observed.contains(&peer.public_key)) {
            (self.config.audit)(Event::PeerAdmitted {
                peer: self.numbers.of(peer.public_key),
            });
        }
        self.roster.applied(&plan);
        Ok(())
    }

    async fn report(&mut self, echoes: u64) -> Result<(), Error> {
        let stats = self.tunnel.stats().await.map_err(Error::Tunnel)?;
        let refused = self.config.host.provider_counters().map_err(Error::Host)?;
        // An empty answer is a table that is not there. No peer without isolation: down, and up again with it.
        if !self.networks.is_empty() && refused.is_empty() {
            return Err(Error::FirewallGone);
        }
        let peers = self.numbers.status(&stats);
        self.config.status.send_if_modified(|status| {
            let changed = status.peers != peers || status.refused != refused || status.echoes != echoes;
            status.peers = peers;
            status.refused = refused;
            status.echoes = echoes;
            changed
        });
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
        self.roster = Roster::default();
        if let Err(error) = self.reconcile().await {
            tracing::info!("removing peers: {}", with_sources(&error));
        }
        let down = self.config.host.provider_down().await.map_err(Error::Host);
        self.tunnel.close().await;
        self.config
            .status
            .send_modify(|status| *status = super::ProviderStatus::default());
        down
    }
}

/// Reads the event stream, and opens it again whenever it ends.
async fn follow(pool: Pool, arrivals: mpsc::Sender<Arrival>) {
    let mut pause = FIRST_PAUSE;
    let mut last_id: Option<String> = None;
    loop {
        let problem = match pool.events(last_id.as_deref()).await {
            Err(error) => with_sources(&error),
            Ok(mut events) => {
                if arrivals.send(Arrival::Connected).await.is_err() {
                    return;
                }
                loop {
                    match events.next().await {
                        Some(Ok((id, event))) => {
                            pause = FIRST_PAUSE;
                            last_id = Some(id).filter(|id| !id.is_empty()).or(last_id);
                            if arrivals.send(Arrival::Event(event)).await.is_err() {
                                return;
                            }
                        }
                        Some(Err(error)) => break with_sources(&error),
                        None => break "the pool closed the event stream".to_owned(),
                    }
                }
            }
        };
        tracing::info!("the pool's event stream: {problem}");
        if arrivals.send(Arrival::Lost(problem)).await.is_err() {
            return;
        }
        tokio::time::sleep(pause.mul_f64(rand::random_range(0.8..1.2))).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Sends acknowledgements in order. The pool waits two seconds for one; a lost one is repaired by the next snapshot.
async fn acknowledge(pool: Pool, mut acks: mpsc::Receiver<Ack>) {
    while let Some(ack) = acks.recv().await {
        for attempt in 1..=ACK_ATTEMPTS {
            match tokio::time::timeout(APPROVE_ACK_TIMEOUT, pool.acknowledge(&ack)).await {
                Ok(Ok(())) => break,
                Ok(Err(error)) => tracing::info!(
                    "acknowledging {}, attempt {attempt}: {}",
                    ack.sequence,
                    with_sources(&error)
                ),
                Err(_elapsed) => tracing::info!("acknowledging {}, attempt {attempt}: no answer in time", ack.sequence),
            }
        }
    }
}
