//! Registration and heartbeats: best effort, with a growing pause, in the way of nothing else.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use dvpn_common::{
    contract::{RegisterRequest, RegisterResponse},
    keys::{PublicKey, VerifyingKey},
};
use dvpn_core::node::Admission;
use tokio::sync::watch;

use super::{
    Memory, pinned,
    pool::Pool,
    status::{Event, ProviderStatus},
    verdict::{Facts, verdict},
};
use crate::control_plane::Marked;
use dvpn_common::ids::Region;

/// Heartbeat when the pool does not say.
const HEARTBEAT: Duration = Duration::from_secs(30);
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_mins(1);
/// For the last word.
const LEAVE_WITHIN: Duration = Duration::from_secs(2);

/// What the pool's answers mean for the node's loop.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Told {
    /// The pool's key for its own handshakes.
    pub(super) prober: Option<PublicKey>,
    /// Where the pool sees us.
    pub(super) observed: Option<IpAddr>,
}

/// What is announced.
pub(super) struct Registration {
    pub(super) pool: Pool,
    pub(super) public_key: PublicKey,
    pub(super) endpoint: Option<String>,
    pub(super) port: u16,
    pub(super) probe_port: u16,
    pub(super) public_probe: Option<String>,
    pub(super) region: Option<Region>,
    pub(super) pool_key: watch::Sender<Option<VerifyingKey>>,
    pub(super) memory: Arc<dyn Memory>,
    pub(super) max_peers: u32,
    pub(super) admission: watch::Receiver<Admission>,
    pub(super) told: watch::Sender<Told>,
    pub(super) audit: Arc<dyn Fn(Event) + Send + Sync>,
    pub(super) status: watch::Sender<ProviderStatus>,
    /// What the pool saw us come from.
    pub(super) observed: Option<IpAddr>,
}

impl Registration {
    /// Registers again and again until dropped.
    pub(super) async fn run(mut self) {
        let mut pause = FIRST_PAUSE;
        let mut was_listed = None;
        loop {
            match self.attempt(false).await {
                Ok(response) => {
                    pause = FIRST_PAUSE;
                    if was_listed.replace(response.listed) != Some(response.listed) {
                        (self.audit)(Event::NodeRegistered {
                            listed: response.listed,
                        });
                    }
                    let moved = self.endpoint.is_none() && response.observed_address != self.observed;
                    self.observed = response.observed_address;
                    let heartbeat = response
                        .heartbeat_seconds
                        .map_or(HEARTBEAT, |s| Duration::from_secs(s.clamp(1, 3600)));
                    // Not listed yet usually means that the pool is still probing us.
                    let wait = if moved || !response.listed {
                        heartbeat.min(Duration::from_secs(2))
                    } else {
                        heartbeat
                    };
                    tokio::select! {
                        () = tokio::time::sleep(wait) => {}
                        // The pool is to hear at once that no more clients are taken, or that they are again. A sender
                        // that is gone is the node's end.
                        changed = self.admission.changed() => if changed.is_err() { return },
                    }
                }
                Err(problem) => {
                    tracing::warn!("registering this node: {problem}");
                    self.status.send_modify(|status| {
                        status.registered = false;
                        status.problem = Some(problem);
                    });
                    tokio::time::sleep(pause.mul_f64(rand::random_range(0.8..1.2))).await;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
            }
        }
    }

    /// Takes the node off the list, if the pool hears it.
    pub(super) async fn leave(self) {
        match tokio::time::timeout(LEAVE_WITHIN, self.attempt(true)).await {
            Ok(Ok(_)) => {}
            Ok(Err(problem)) => tracing::info!("leaving the pool's list: {problem}"),
            Err(_elapsed) => tracing::info!("leaving the pool's list: no answer in time"),
        }
    }

    async fn attempt(&self, leaving: bool) -> Result<RegisterResponse, String> {
        let address = self.address();
        let endpoint = match (&self.endpoint, address) {
            (Some(endpoint), _) => endpoint.clone(),
            (None, Some(address)) => SocketAddr::new(address, self.port).to_string(),
            (None, None) => return Err("this machine has no address for clients: set NODE_PUBLIC_ENDPOINT".to_owned()),
        };
        let request = RegisterRequest {
            node_id: self.pool.identity().node().clone(),
            probe: self
                .public_probe
                .clone()
                .or_else(|| probe_beside(&endpoint, self.probe_port)),
            endpoint: endpoint.clone(),
            public_key: self.public_key,
            region: self.region.clone(),
            identity: Some(self.pool.identity().key()),
            leaving,
            draining: *self.admission.borrow() != Admission::Open,
            max_peers: Some(self.max_peers),
        };
        let asked_under = *self.pool_key.borrow();
        let response = self
            .pool
            .register(&request)
            .await
            .map_err(|error| with_sources(&error))?;
        if !leaving {
            let key_problem = response.pool_key.and_then(|key| {
                let (memory, audit) = (&*self.memory, &*self.audit);
                pinned::learn(&self.pool_key, memory, audit, key, &response.rotations, asked_under)
            });
            let verdict = verdict(&Facts {
                reachability: response.reachability,
                reason: response.reason.as_deref(),
                listed: response.listed,
                endpoint: &endpoint,
                observed: response.observed_address,
                port: self.port,
                probe_port: self.probe_port,
            });
            self.status.send_modify(|status| {
                if status.verdict != verdict {
                    if let Some(problem) = &verdict {
                        tracing::warn!("{}: {}", problem.what, problem.how);
                    } else {
                        tracing::info!("clients reach this node again");
                    }
                }
                status.registered = true;
                status.listed = response.listed;
                status.reachability = response.reachability;
                status.verdict = verdict;
                status.problem = key_problem.or_else(|| response.reason.clone().filter(|_| !response.listed));
            });
            let told = Told {
                prober: response.prober_key,
                observed: response.observed_address,
            };
            self.told.send_if_modified(|last| std::mem::replace(last, told) != told);
        }
        Ok(response)
    }

    /// What the pool saw, or the address that this machine would send from.
    fn address(&self) -> Option<IpAddr> {
        self.observed.or_else(|| {
            // Connecting a UDP socket sends nothing; it only asks the routing table.
            let elsewhere = SocketAddr::from(([192, 0, 2, 1], 9));
            let socket = Marked::unconnected(elsewhere).ok()?;
            socket.connect(elsewhere).ok()?;
            Some(socket.local_addr().ok()?.ip()).filter(|ip| !ip.is_unspecified())
        })
    }
}

/// The same address, another port.
fn probe_beside(endpoint: &str, port: u16) -> Option<String> {
    let (address, _) = endpoint.rsplit_once(':')?;
    Some(format!("{address}:{port}"))
}

/// An error with its reasons, for people.
pub(super) fn with_sources(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(reason) = source {
        text = format!("{text}: {reason}");
        source = reason.source();
    }
    text
}
