//! What goes into the session machine and what comes out.

use std::{net::SocketAddr, time::Duration};

use dvpn_common::{
    ids::{ProviderId, Region},
    keys::PublicKey,
    status::ProbeMethod,
};
use jiff::Timestamp;

use crate::{
    Failure,
    approval::Approval,
    audit::Event,
    directory::{Directory, Provider},
    firewall::Policy,
    payment::{Subscription, Verification},
};

/// One numbered try. Every answer carries the number of the try that asked; answers to earlier tries are dropped.
///
/// A discovery, a round of probes and each candidate (its verification, approval and tunnel) have a number of their
/// own, so that no answer meant for one candidate is ever taken for the next. Numbers only grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Attempt(pub u64);

/// Which providers the user will have.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Choice {
    /// Only these ids and regions, if any are named.
    pub only_ids: Vec<ProviderId>,
    /// See `only_ids`.
    pub only_regions: Vec<Region>,
    /// Never these.
    pub exclude_ids: Vec<ProviderId>,
    /// Never these.
    pub exclude_regions: Vec<Region>,
}

/// What the machine must know of the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionConfig {
    /// What is missing before any session can begin (no pool, no token): the problem and its cure.
    pub not_configured: Option<Failure>,
    /// Traffic outside the tunnel is blocked while a session is wanted.
    pub kill_switch: bool,
    /// Traffic stays blocked even after Stop.
    pub lockdown: bool,
    /// `MESH_SAMPLE_SIZE`, at least 1.
    pub sample_size: usize,
    /// The standing choice; `Start` may narrow it for one session.
    pub choice: Choice,
    /// `FALLBACK_ENABLED`.
    pub fallback: bool,
    /// `FALLBACK_TIMEOUT_SECONDS`: the script is killed then; an answer is missed a little later.
    pub fallback_timeout: Duration,
}

/// What outlived the last run of the daemon.
#[derive(Debug, Clone, Copy, Default)]
pub struct Restored {
    /// The stored wish: a session begins at once.
    pub wish: bool,
    /// The endpoint used last.
    pub last_endpoint: Option<SocketAddr>,
    /// The last verified subscription, opened from its sealed record.
    pub subscription: Option<Subscription>,
}

/// One measured candidate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Measurement {
    /// Who.
    pub provider: ProviderId,
    /// Median of the answered probes; nothing if too few were.
    pub latency: Option<Duration>,
    /// How.
    pub method: ProbeMethod,
}

/// Totals of the tunnel's one peer, as the device counts them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes sent, this tunnel.
    pub tx_bytes: u64,
    /// Bytes received, this tunnel.
    pub rx_bytes: u64,
}

/// A key that a pool admitted and that is used no more: told to the pool, so that what was reserved for it returns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Release {
    /// Where it was admitted.
    pub provider: ProviderId,
    /// Which.
    pub client_key: PublicKey,
}

impl Release {
    /// Of an approval, if it was the pool that gave it.
    pub(super) fn of(approval: &Approval) -> Option<Self> {
        approval.is_from_pool().then(|| Self {
            provider: approval.provider().id.clone(),
            client_key: *approval.client_key(),
        })
    }
}

/// What happened.
#[derive(Debug, Clone)]
pub enum Input {
    /// The user (or the stored wish) wants a session.
    Start(Choice),
    /// The user wants none.
    Stop,
    /// The pool answered, or did not.
    Listed(Attempt, Result<Directory, Failure>),
    /// The candidates were measured.
    Probed(Attempt, Vec<Measurement>),
    /// The payment server answered, or did not.
    Verified(Attempt, Verification),
    /// The pool approved us at the provider asked for, or did not.
    Approved(Attempt, Result<Box<Approval>, Failure>),
    /// The orchestrator made a provider, or did not. Its approval is complete: the answer was for our key.
    Provisioned(Attempt, Result<Box<Approval>, Failure>),
    /// The orchestrator renewed the lease of this try's provider: its approval lasts until then.
    LeaseExtended(Attempt, Timestamp),
    /// The tunnel interface stands, or does not.
    TunnelConfigured(Attempt, Result<(), Failure>),
    /// A handshake completed.
    HandshakeSeen(Attempt),
    /// Totals, sampled once a second while a tunnel stands.
    TrafficSampled(Attempt, Traffic),
    /// The standing tunnel goes on under the renewed approval, or still under the old one.
    TunnelRenewed(Attempt, Result<(), Failure>),
    /// The tunnel broke by itself: interface deleted, device died.
    TunnelLost(Attempt, Failure),
    /// The tunnel is gone, as asked (also when there was none).
    TornDown(Attempt),
    /// A `SetFirewall` could not be carried out: what it should block may pass.
    FirewallFailed(Failure),
    /// A token was stored, or replaced. If that ends a `not_configured`, `ConfigChanged` follows.
    TokenChanged,
    /// The configuration changed.
    ConfigChanged(Box<SessionConfig>),
    /// Addresses, routes or links changed, or the machine woke up.
    NetworkChanged,
}

/// What to do.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Fetch and check the provider list; answer `Listed`.
    Discover(Attempt),
    /// Measure these at once; answer `Probed`.
    Probe(Attempt, Vec<Provider>),
    /// Ask the payment server about the token for this provider ([`super::FALLBACK_ID`] before one is provisioned);
    /// answer `Verified`.
    Verify(Attempt, ProviderId),
    /// Ask the pool to admit a fresh key at this provider; answer `Approved`. With a key, the fresh one is to follow that
    /// one without a break; where the pool's answer to the same question is still missing, it is asked for the same fresh
    /// one, for it may have admitted that.
    Approve(Attempt, Box<Provider>, Subscription, Option<PublicKey>),
    /// Ask the orchestrator for a provider; answer `Provisioned`.
    Provision(Attempt, Subscription),
    /// Nobody waits for the answer of this try any more: end its request, probes or script.
    Cancel(Attempt),
    /// Bring up the tunnel (no other stands); answer `TunnelConfigured`, later `HandshakeSeen`, `TrafficSampled`, `TunnelLost`.
    ConfigureTunnel(Attempt, Box<Approval>),
    /// Make the tunnel's device shake hands again now.
    ForceHandshake(Attempt),
    /// Send something inside the tunnel that a living provider answers.
    ProbeTunnel(Attempt),
    /// Give the tunnel a new outer socket.
    RebindTunnel(Attempt),
    /// Let the standing tunnel go on under this approval, without losing a packet; answer `TunnelRenewed`.
    RenewTunnel(Attempt, Box<Approval>),
    /// Take the tunnel down; answer `TornDown`.
    TearDown(Attempt),
    /// Tell the pool that a key is used no more, as well as it can be told: nobody waits for it.
    Release(Release),
    /// Make the firewall this.
    SetFirewall(Policy),
    /// Store the wish, so that a restart goes on with it.
    StoreWish(bool),
    /// Remember the endpoint last used, for the next shuffle.
    StoreLastEndpoint(SocketAddr),
    /// Seal and store the last verified subscription, or forget it.
    StoreSubscription(Option<Subscription>),
    /// Record this.
    Audit(Event),
}
