//! What is known of nodes only while they live: streams, heartbeats, echoes, acknowledgements; and the provider list
//! that follows from it. Every function here is short and never waits.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use dvpn_common::{
    contract::{Ack, PeerAdded, PeerRemoved, Snapshot},
    ids::ProviderId,
    keys::PublicKey,
};
use tokio::sync::{mpsc, oneshot};

use crate::{
    config::Timing,
    list::{List, ProviderDocument},
    refusal::Refusal,
    store::Node,
};

/// Events that may wait in one stream. A node that is further behind is cut off and begins with a snapshot.
const STREAM_DEPTH: usize = 1024;
/// How long a completed echo is believed.
const ECHO_LIFE: Duration = Duration::from_mins(1);

/// One event of a node's stream.
#[derive(Debug, Clone)]
pub enum NodeEvent {
    /// All there is.
    Snapshot(Snapshot),
    /// One peer more, or one renewed.
    Add(PeerAdded),
    /// One peer less.
    Remove(PeerRemoved),
}

/// What a node said of one change: applied, or the reason why not.
pub type AckResult = Result<(), String>;

/// The receiving end of one node's stream.
pub struct StreamEnd {
    /// Its events.
    pub events: mpsc::Receiver<NodeEvent>,
    /// Which of the node's streams it is; told to [`Live::stream_ended`].
    pub generation: u64,
}

struct Stream {
    generation: u64,
    events: mpsc::Sender<NodeEvent>,
}

struct Waiter {
    sequence: u64,
    client: PublicKey,
    done: oneshot::Sender<AckResult>,
}

struct LiveNode {
    node: Node,
    leaving: bool,
    same_address: bool,
    heard: Option<Instant>,
    stream: Option<Stream>,
    stream_seen: Option<Instant>,
    reached: Option<Instant>,
    unreachable: Option<String>,
    /// A change that was not acknowledged in time; cleared by an acknowledgement of it, or by a new stream.
    stalled_at: Option<u64>,
    waiters: Vec<Waiter>,
    listed: bool,
}

impl LiveNode {
    fn new(node: Node) -> Self {
        Self {
            node,
            leaving: false,
            same_address: false,
            heard: None,
            stream: None,
            stream_seen: None,
            reached: None,
            unreachable: None,
            stalled_at: None,
            waiters: Vec::new(),
            listed: false,
        }
    }

    /// Why clients are not shown this node; nothing if they are.
    fn obstacle(&self, open_registration: bool, timing: &Timing, now: Instant) -> Option<String> {
        let within = |since: Option<Instant>, limit| since.is_some_and(|at| now.saturating_duration_since(at) < limit);
        if self.leaving {
            Some("the node is leaving; register again without `leaving` to come back".into())
        } else if let Some(reason) = may_be_reached(&self.node, self.same_address, open_registration) {
            Some(reason)
        } else if self.node.probe.is_none() {
            Some("send `probe`, the address of the node's latency echo: unreachable nodes are not listed".into())
        } else if let Some(reason) = &self.unreachable {
            Some(reason.clone())
        } else if self.reached.is_none() {
            Some("the pool has not yet completed an echo with the node".into())
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
}

/// Whether the pool may send to, and list, the node's addresses. One that is not where the registration came from could
/// be anybody's: only the operator can vouch for it.
fn may_be_reached(node: &Node, same_address: bool, open_registration: bool) -> Option<String> {
    if node.approved || (open_registration && same_address) {
        None
    } else if open_registration {
        Some(
            "the endpoint is not the address that the registration came from: register from there, or ask the \
             operator to approve this node"
                .into(),
        )
    } else {
        Some("the operator has not approved this node yet".into())
    }
}

struct State {
    nodes: BTreeMap<ProviderId, LiveNode>,
    list: List,
    list_is_old: bool,
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
    pub fn new(nodes: Vec<Node>, open_registration: bool, timing: Timing) -> Self {
        let nodes = nodes
            .into_iter()
            .map(|node| (node.id.clone(), LiveNode::new(node)))
            .collect();
        let state = State {
            nodes,
            list: List::default(),
            list_is_old: true,
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

    /// A registration or heartbeat.
    pub fn registered(&self, node: &Node, same_address: bool, leaving: bool, now: Instant) {
        let mut state = self.state();
        let live = state
            .nodes
            .entry(node.id.clone())
            .or_insert_with(|| LiveNode::new(node.clone()));
        let moved =
            (live.node.public_key, live.node.endpoint, live.node.probe) != (node.public_key, node.endpoint, node.probe);
        if moved {
            live.reached = None;
            live.unreachable = None;
        }
        let shown_otherwise = live.node != *node;
        live.node = node.clone();
        live.same_address = same_address;
        live.leaving = leaving;
        live.heard = Some(now);
        state.list_is_old |= shown_otherwise;
        self.review(&mut state, &node.id, now);
    }

    /// Where an echo is due, if one is: the probe's address and the key to expect there.
    pub fn echo_due(&self, id: &ProviderId, now: Instant) -> Option<Node> {
        let state = self.state();
        let live = state.nodes.get(id)?;
        let fresh = live
            .reached
            .is_some_and(|at| now.saturating_duration_since(at) < ECHO_LIFE);
        let allowed = may_be_reached(&live.node, live.same_address, self.open_registration).is_none();
        (!fresh && allowed && !live.leaving && live.node.probe.is_some()).then(|| live.node.clone())
    }

    /// The result of an echo with the node as it was in `probed`.
    pub fn echoed(&self, probed: &Node, result: Result<(), String>, now: Instant) {
        let mut state = self.state();
        if let Some(live) = state.nodes.get_mut(&probed.id)
            && (live.node.public_key, live.node.probe) == (probed.public_key, probed.probe)
        {
            (live.reached, live.unreachable) = match result {
                Ok(()) => (Some(now), None),
                Err(reason) => (None, Some(reason)),
            };
            self.review(&mut state, &probed.id, now);
        }
    }

    /// Why the node is not listed; nothing if it is.
    pub fn obstacle(&self, id: &ProviderId, now: Instant) -> Option<String> {
        match self.state().nodes.get(id) {
            Some(live) => live.obstacle(self.open_registration, &self.timing, now),
            None => Some("the node is not registered".into()),
        }
    }

    /// Begins a stream with `snapshot`; an older stream of the node ends. It is a sign of life like a heartbeat, and
    /// `same_address` tells as much as with a registration: a restarted pool waits for none.
    pub fn open_stream(
        &self,
        id: &ProviderId,
        snapshot: Snapshot,
        same_address: bool,
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
        live.same_address |= same_address;
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
        let (answered, waiting): (Vec<_>, Vec<_>) =
            std::mem::take(&mut live.waiters)
                .into_iter()
                .partition(|waiter: &Waiter| {
                    waiter.sequence <= ack.sequence
                        || ack.refused.iter().any(|refused| refused.public_key == waiter.client)
                });
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

    /// The list, rebuilt only if something in it changed or it gets old.
    pub fn list(&self, now: jiff::Timestamp) -> ProviderDocument {
        let mut state = self.state();
        let State {
            nodes,
            list,
            list_is_old,
            ..
        } = &mut *state;
        if std::mem::take(list_is_old) {
            list.replace(nodes.values().filter(|live| live.listed).map(|live| &live.node), now);
        }
        list.document(now)
    }

    fn review(&self, state: &mut State, id: &ProviderId, now: Instant) {
        let Some(live) = state.nodes.get_mut(id) else { return };
        let obstacle = live.obstacle(self.open_registration, &self.timing, now);
        if live.listed == obstacle.is_some() {
            live.listed = obstacle.is_none();
            state.list_is_old = true;
            match obstacle {
                None => tracing::info!(node = %id, "listed"),
                Some(reason) => tracing::info!(node = %id, reason, "not listed any more"),
            }
        }
    }
}
