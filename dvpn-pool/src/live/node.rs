//! One node while it lives, and what keeps it off the list.

use std::{
    net::IpAddr,
    time::{Duration, Instant},
};

use dvpn_common::{contract::Reachability, keys::PublicKey};
use tokio::sync::{mpsc, oneshot, watch};

use super::{AckResult, NodeEvent, standby};
use crate::{config::Timing, reach::Unreached, store::Node};

/// How long a completed check is believed.
const CHECK_LIFE: Duration = Duration::from_mins(1);
/// How long a node that was not reached is left in peace.
const CHECK_PAUSE: Duration = Duration::from_secs(1);

pub(super) struct Stream {
    pub(super) generation: u64,
    pub(super) events: mpsc::Sender<NodeEvent>,
}

pub(super) struct Waiter {
    pub(super) sequence: u64,
    pub(super) client: PublicKey,
    pub(super) done: oneshot::Sender<AckResult>,
}

#[expect(
    clippy::struct_excessive_bools,
    reason = "each holds for itself; together they are no states of one machine"
)]
pub(super) struct LiveNode {
    pub(super) node: Node,
    pub(super) leaving: bool,
    /// Where its last registration came from.
    pub(super) source: Option<IpAddr>,
    pub(super) same_address: bool,
    pub(super) heard: Option<Instant>,
    pub(super) stream: Option<Stream>,
    pub(super) stream_seen: Option<Instant>,
    pub(super) told_prober: bool,
    pub(super) checking: bool,
    pub(super) checks: watch::Sender<u64>,
    pub(super) check_not_before: Option<Instant>,
    pub(super) reached: Option<Instant>,
    pub(super) unreached: Option<Unreached>,
    /// A change that was not acknowledged in time; cleared by an acknowledgement of it, or by a new stream.
    pub(super) stalled_at: Option<u64>,
    pub(super) waiters: Vec<Waiter>,
    /// The operator keeps it for the orchestrator.
    pub(super) standby: bool,
    pub(super) listed: bool,
    pub(super) was_listed: bool,
}

impl LiveNode {
    pub(super) fn new(node: Node) -> Self {
        Self {
            node,
            leaving: false,
            source: None,
            same_address: false,
            heard: None,
            stream: None,
            stream_seen: None,
            told_prober: false,
            checking: false,
            checks: watch::Sender::new(0),
            check_not_before: None,
            reached: None,
            unreached: None,
            stalled_at: None,
            waiters: Vec::new(),
            standby: false,
            listed: false,
            was_listed: false,
        }
    }

    /// Why clients are not shown this node; nothing if they are.
    pub(super) fn obstacle(&self, open_registration: bool, timing: &Timing, now: Instant) -> Option<String> {
        self.closed(open_registration, timing, now)
            .or_else(|| self.standby.then(|| standby::REASON.to_owned()))
    }

    /// Why no new client can be brought to this node, on standby or not.
    pub(super) fn closed(&self, open_registration: bool, timing: &Timing, now: Instant) -> Option<String> {
        self.unready(open_registration, timing, now).or_else(|| {
            self.node
                .draining
                .then(|| "the node is draining: it keeps its clients and takes no new ones".into())
        })
    }

    /// Why no client can be brought to this node, not even one that is there.
    pub(super) fn unready(&self, open_registration: bool, timing: &Timing, now: Instant) -> Option<String> {
        let within = |since: Option<Instant>, limit| since.is_some_and(|at| now.saturating_duration_since(at) < limit);
        if self.leaving {
            Some("the node is leaving; register again without `leaving` to come back".into())
        } else if let Some(reason) = self.may_be_reached(open_registration) {
            Some(reason)
        } else if self.node.probe.is_none() {
            Some("send `probe`, the address of the node's latency echo: unreachable nodes are not listed".into())
        } else if let Some(unreached) = &self.unreached {
            Some(unreached.reason.clone())
        } else if self.reached.is_none() {
            Some("the pool has not yet completed an echo and a handshake with the node: it is trying".into())
        } else if !within(self.heard, timing.heartbeat * 3) {
            Some(format!("no heartbeat: register every {} s", timing.heartbeat.as_secs()))
        } else if self.stream.is_none() && !within(self.stream_seen, timing.stream_grace) {
            Some("open the node's event stream: approvals reach it there".into())
        } else if self.stalled_at.is_some() {
            Some("the node did not acknowledge a change in time".into())
        } else {
            None
        }
    }

    /// Whether the pool may send to, and list, the node's addresses. One that is not where the registration came from
    /// could be anybody's: only the operator can vouch for it.
    fn may_be_reached(&self, open_registration: bool) -> Option<String> {
        if self.node.approved || (open_registration && self.same_address) {
            None
        } else if !open_registration {
            Some("the operator has not approved this node yet".into())
        } else {
            let endpoint = self.node.endpoint;
            let source = self
                .source
                .map_or_else(|| "elsewhere".to_owned(), |source| source.to_string());
            Some(format!(
                "the endpoint {endpoint} is not the address that the registration came from, {source}: behind a router, \
                 set NODE_PUBLIC_ENDPOINT to that address and forward UDP port {} to this machine (with carrier-grade \
                 NAT, ask the internet provider for a public address); or ask the operator to approve this node",
                endpoint.port()
            ))
        }
    }

    pub(super) fn check_is_due(&self, open_registration: bool, now: Instant) -> bool {
        let fresh = self
            .reached
            .is_some_and(|at| now.saturating_duration_since(at) < CHECK_LIFE);
        let paused = self.check_not_before.is_some_and(|until| now < until);
        let allowed = self.may_be_reached(open_registration).is_none();
        !fresh && !paused && allowed && !self.leaving && self.node.probe.is_some()
    }

    pub(super) fn note_check(&mut self, result: Result<(), Unreached>, now: Instant) {
        (self.reached, self.unreached, self.check_not_before) = match result {
            Ok(()) => (Some(now), None, None),
            Err(unreached) => (None, Some(unreached), Some(now + CHECK_PAUSE)),
        };
    }

    pub(super) fn reachability(&self, open_registration: bool) -> Reachability {
        if !self.node.approved && self.source.is_some() && !self.same_address {
            Reachability::OtherAddress
        } else if self.may_be_reached(open_registration).is_some() {
            Reachability::Untested
        } else if let Some(unreached) = &self.unreached {
            unreached.found
        } else if self.reached.is_some() {
            Reachability::Reachable
        } else {
            Reachability::Untested
        }
    }
}
