//! What is known of nodes only while they live: streams, heartbeats, echoes, acknowledgements; and the provider list
//! that follows from it. Every function here is short and never waits.

mod node;
mod standby;

use std::{
    collections::BTreeMap,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use dvpn_common::{
    contract::{Ack, PeerAdded, PeerReleased, PeerRemoved, Reachability, Snapshot},
    ids::ProviderId,
    keys::PublicKey,
};
use node::{LiveNode, Stream, Waiter};
use tokio::sync::{mpsc, oneshot, watch};

use crate::{
    config::Timing,
    list::{List, ProviderDocument},
    reach::Unreached,
    refusal::Refusal,
    signing::Signer,
    store::Node,
};

/// Events that may wait in one stream: more than a batch of approvals for every place a node has. A node that is further
/// behind is cut off and begins with a snapshot.
const STREAM_DEPTH: usize = 8192;

/// One event of a node's stream.
#[derive(Debug, Clone)]
pub enum NodeEvent {
    /// All there is.
    Snapshot(Snapshot),
    /// One peer more, or one renewed.
    Add(PeerAdded),
    /// One peer less.
    Remove(PeerRemoved),
    /// One peer whose connection is over.
    Release(PeerReleased),
    /// What was sent is signed by a key that is over: the stream makes a snapshot here, and skips what it covers.
    Resync,
}

/// What a node said of one change: applied, or the reason why not.
pub type AckResult = Result<(), String>;

/// What [`Live::begin_check`] says. The receivers change when the check has its result.
pub enum Check {
    /// The last result is fresh, or this node may not be sent to (yet).
    NotDue,
    /// Somebody is at it.
    Running(watch::Receiver<u64>),
    /// Make it now, with the node as it is here.
    Due(Node, watch::Receiver<u64>),
}

/// The receiving end of one node's stream.
pub struct StreamEnd {
    /// Its events.
    pub events: mpsc::Receiver<NodeEvent>,
    /// Which of the node's streams it is; told to [`Live::stream_ended`].
    pub generation: u64,
}

struct State {
    nodes: BTreeMap<ProviderId, LiveNode>,
    list: List,
    list_is_old: bool,
    /// Listed for the first time since the start, and not yet stored as such.
    newly_listed: Vec<ProviderId>,
    generations: u64,
    closed: bool,
}

/// All nodes.
pub struct Live {
    open_registration: bool,
    timing: Timing,
    state: Mutex<State>,
}

impl Live {
    /// Begins with what the database knows; nothing of it is listed before it shows life.
    pub fn new(nodes: Vec<Node>, list: List, open_registration: bool, timing: Timing) -> Self {
        let nodes = nodes
            .into_iter()
            .map(|node| (node.id.clone(), LiveNode::new(node)))
            .collect();
        let state = State {
            nodes,
            list,
            list_is_old: true,
            newly_listed: Vec::new(),
            generations: 0,
            closed: false,
        };
        Self {
            open_registration,
            timing,
            state: Mutex::new(state),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The node as last registered.
    pub fn node(&self, id: &ProviderId) -> Option<Node> {
        self.state().nodes.get(id).map(|live| live.node.clone())
    }

    /// A registration or heartbeat, from `source`.
    pub fn registered(&self, node: &Node, source: IpAddr, leaving: bool, now: Instant) {
        let mut state = self.state();
        let live = state
            .nodes
            .entry(node.id.clone())
            .or_insert_with(|| LiveNode::new(node.clone()));
        let moved =
            (live.node.public_key, live.node.endpoint, live.node.probe) != (node.public_key, node.endpoint, node.probe);
        if moved {
            live.reached = None;
            live.unreached = None;
            live.check_not_before = None;
        }
        let shown_otherwise = live.node != *node;
        live.node = node.clone();
        live.source = Some(source);
        live.same_address = node.endpoint.ip() == source;
        live.leaving = leaving;
        live.heard = Some(now);
        state.list_is_old |= shown_otherwise;
        self.review(&mut state, &node.id, now);
    }

    /// The node was told of the pool's WireGuard key; true if it had been before.
    pub fn told_prober(&self, id: &ProviderId) -> bool {
        let mut state = self.state();
        state
            .nodes
            .get_mut(id)
            .is_some_and(|live| std::mem::replace(&mut live.told_prober, true))
    }

    /// Whether a check of the node's reachability is due. Who is told to make it must report to [`Self::checked`].
    pub fn begin_check(&self, id: &ProviderId, now: Instant) -> Check {
        let mut state = self.state();
        let Some(live) = state.nodes.get_mut(id) else {
            return Check::NotDue;
        };
        if live.checking {
            return Check::Running(live.checks.subscribe());
        }
        if !live.check_is_due(self.open_registration, now) {
            return Check::NotDue;
        }
        live.checking = true;
        Check::Due(live.node.clone(), live.checks.subscribe())
    }

    /// The result of a check of the node as it was in `probed`.
    pub fn checked(&self, probed: &Node, result: Result<(), Unreached>, now: Instant) {
        let mut state = self.state();
        let Some(live) = state.nodes.get_mut(&probed.id) else {
            return;
        };
        live.checking = false;
        let seen = |node: &Node| (node.public_key, node.endpoint, node.probe);
        if seen(&live.node) == seen(probed) {
            live.note_check(result, now);
        }
        live.checks.send_modify(|count| *count += 1);
        self.review(&mut state, &probed.id, now);
    }

    /// Why the node is not listed; nothing if it is.
    pub fn obstacle(&self, id: &ProviderId, now: Instant) -> Option<String> {
        match self.state().nodes.get(id) {
            Some(live) => live.obstacle(self.open_registration, &self.timing, now),
            None => Some("the node is not registered".into()),
        }
    }

    /// Why the node cannot be told of a client now. One that takes no new clients can: it is asked for renewals.
    pub fn unready(&self, id: &ProviderId, now: Instant) -> Option<String> {
        match self.state().nodes.get(id) {
            Some(live) => live.unready(self.open_registration, &self.timing, now),
            None => Some("the node is not registered".into()),
        }
    }

    /// What the pool found when it tried to reach the node.
    pub fn reachability(&self, id: &ProviderId) -> Reachability {
        self.state()
            .nodes
            .get(id)
            .map_or(Reachability::Untested, |live| live.reachability(self.open_registration))
    }

    /// Forgets nodes that the database forgot.
    pub fn forget(&self, ids: &[ProviderId]) {
        let mut state = self.state();
        for id in ids {
            if state.nodes.remove(id).is_some_and(|live| live.listed) {
                state.list_is_old = true;
            }
        }
    }

    /// Nodes that were listed for the first time, to be stored as once listed.
    pub fn newly_listed(&self) -> Vec<ProviderId> {
        self.state().newly_listed.clone()
    }

    /// These are stored: only now they are news no more.
    pub fn marked_listed(&self, ids: &[ProviderId]) {
        self.state().newly_listed.retain(|id| !ids.contains(id));
    }

    /// The next ceiling of list versions to store, if it is time.
    pub fn ceiling_due(&self, now: jiff::Timestamp) -> Option<u64> {
        self.state().list.ceiling_due(now)
    }

    /// The ceiling is stored.
    pub fn raise_ceiling(&self, ceiling: u64) {
        self.state().list.raise_ceiling(ceiling);
    }

    /// The list must be signed anew.
    pub fn relist(&self) {
        self.state().list_is_old = true;
    }

    /// Begins a stream with `snapshot`; an older stream of the node ends. It is a sign of life like a heartbeat, and
    /// `source` tells as much as with a registration: a restarted pool waits for none.
    pub fn open_stream(
        &self,
        id: &ProviderId,
        snapshot: Snapshot,
        source: IpAddr,
        now: Instant,
    ) -> Result<StreamEnd, Refusal> {
        let mut state = self.state();
        if state.closed {
            return Err(Refusal::unavailable("the pool is stopping"));
        }
        state.generations += 1;
        let generation = state.generations;
        let Some(live) = state.nodes.get_mut(id) else {
            return Err(Refusal::not_found("register this node first"));
        };
        let (events, receiver) = mpsc::channel(STREAM_DEPTH);
        // The channel is new and empty, so the first event always fits.
        if events.try_send(NodeEvent::Snapshot(snapshot)).is_err() {
            return Err(Refusal::unavailable("the stream could not begin"));
        }
        live.stream = Some(Stream { generation, events });
        live.stream_seen = Some(now);
        live.heard = Some(now);
        live.stalled_at = None;
        live.same_address |= live.node.endpoint.ip() == source;
        live.source.get_or_insert(source);
        self.review(&mut state, id, now);
        Ok(StreamEnd {
            events: receiver,
            generation,
        })
    }

    /// The node's connection went.
    pub fn stream_ended(&self, id: &ProviderId, generation: u64, now: Instant) {
        let mut state = self.state();
        if let Some(live) = state.nodes.get_mut(id)
            && live.stream.take_if(|stream| stream.generation == generation).is_some()
        {
            live.stream_seen = Some(now);
            self.review(&mut state, id, now);
        }
    }

    /// Sends `event`. False if the node has no stream, or is so far behind that its stream was cut.
    pub fn send(&self, id: &ProviderId, event: NodeEvent, now: Instant) -> bool {
        let mut state = self.state();
        let Some(live) = state.nodes.get_mut(id) else {
            return false;
        };
        let Some(stream) = &live.stream else { return false };
        if stream.events.try_send(event).is_ok() {
            return true;
        }
        live.stream = None;
        live.stream_seen = Some(now);
        self.review(&mut state, id, now);
        false
    }

    /// Everything that nodes know is signed anew, and stands at these sequence numbers. Whoever waits for an
    /// acknowledgement waits for one of that: what a node says of the old signatures counts no more.
    pub fn resync(&self, sequences: &[(ProviderId, u64)], now: Instant) {
        for (id, sequence) in sequences {
            let mut state = self.state();
            if let Some(live) = state.nodes.get_mut(id) {
                for waiter in &mut live.waiters {
                    waiter.sequence = waiter.sequence.max(*sequence);
                }
            }
            drop(state);
            // A node without a stream begins its next one with a snapshot anyway.
            self.send(id, NodeEvent::Resync, now);
        }
    }

    /// Waits for the acknowledgement of `sequence`. Called before the event is sent, so that none is missed.
    pub fn expect_ack(&self, id: &ProviderId, sequence: u64, client: PublicKey) -> oneshot::Receiver<AckResult> {
        let (done, receiver) = oneshot::channel();
        if let Some(live) = self.state().nodes.get_mut(id) {
            live.waiters.push(Waiter { sequence, client, done });
        }
        receiver
    }

    /// An acknowledgement came.
    pub fn acknowledged(&self, id: &ProviderId, ack: &Ack, now: Instant) {
        let mut state = self.state();
        let Some(live) = state.nodes.get_mut(id) else { return };
        live.heard = Some(now);
        live.stalled_at.take_if(|sequence| *sequence <= ack.sequence);
        let (answered, waiting): (Vec<_>, Vec<_>) = std::mem::take(&mut live.waiters)
            .into_iter()
            .partition(|waiter: &Waiter| waiter.sequence <= ack.sequence);
        live.waiters = waiting;
        for waiter in answered {
            let refused = ack.refused.iter().find(|refused| refused.public_key == waiter.client);
            let result = refused.map_or(Ok(()), |refused| Err(refused.reason.clone()));
            // Nobody waits any more when the time was up.
            drop(waiter.done.send(result));
        }
        self.review(&mut state, id, now);
    }

    /// No acknowledgement of `sequence` came in time: the node is not shown until it answers again.
    pub fn stalled(&self, id: &ProviderId, sequence: u64, now: Instant) {
        let mut state = self.state();
        if let Some(live) = state.nodes.get_mut(id) {
            live.stalled_at = Some(sequence);
            live.waiters.retain(|waiter| !waiter.done.is_closed());
            self.review(&mut state, id, now);
        }
    }

    /// Looks at every node again, because time passed.
    pub fn sweep(&self, now: Instant) {
        let mut state = self.state();
        let late: Vec<ProviderId> = state
            .nodes
            .values()
            .filter(|live| live.listed && live.obstacle(self.open_registration, &self.timing, now).is_some())
            .map(|live| live.node.id.clone())
            .collect();
        for id in late {
            self.review(&mut state, &id, now);
        }
    }

    /// Ends every stream and takes no new one.
    pub fn close(&self) {
        let mut state = self.state();
        state.closed = true;
        for live in state.nodes.values_mut() {
            live.stream = None;
        }
    }

    /// The list, rebuilt only if something in it changed or it gets old. `signer` is asked when nobody else looks at the
    /// list: a key that was given up meanwhile signs it no more.
    pub fn list(&self, signer: impl FnOnce() -> Arc<Signer>, now: jiff::Timestamp) -> ProviderDocument {
        let mut state = self.state();
        let signer = &*signer();
        let State {
            nodes,
            list,
            list_is_old,
            ..
        } = &mut *state;
        if std::mem::take(list_is_old) {
            list.replace(
                nodes.values().filter(|live| live.listed).map(|live| &live.node),
                signer,
                now,
            );
        }
        list.document(signer, now)
    }

    fn review(&self, state: &mut State, id: &ProviderId, now: Instant) {
        let Some(live) = state.nodes.get_mut(id) else { return };
        let obstacle = live.obstacle(self.open_registration, &self.timing, now);
        if live.listed == obstacle.is_some() {
            live.listed = obstacle.is_none();
            let first = live.listed && !live.was_listed;
            live.was_listed |= live.listed;
            state.list_is_old = true;
            if first {
                state.newly_listed.push(id.clone());
            }
            match obstacle {
                None => tracing::info!(node = %id, "listed"),
                Some(reason) => tracing::info!(node = %id, reason, "not listed any more"),
            }
        }
    }
}
