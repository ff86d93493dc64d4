//! The event stream of one node, and its acknowledgements.

use std::{convert::Infallible, sync::Arc, time::Instant};

use axum::{
    extract::{Path, State},
    http::StatusCode,
    response::{
        Sse,
        sse::{Event, KeepAlive},
    },
};
use dvpn_common::{
    contract::{Ack, Snapshot, event},
    ids::ProviderId,
    limits::STREAM_PING,
};
use futures::Stream;
use jiff::Timestamp;
use tokio::sync::mpsc::Receiver;

use super::providers::start_check;
use crate::{
    live::{NodeEvent, StreamEnd},
    pool::Pool,
    refusal::Refusal,
    request::Incoming,
    signed::Claim,
    store::{self, Node},
};

/// `GET /providers/nodes/{id}/events`
pub async fn events(
    State(pool): State<Arc<Pool>>,
    Path(id): Path<String>,
    request: Incoming,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, Refusal> {
    let stream = pool
        .guarded(request.source, async {
            let node = signed_node(&pool, &id, &request)?;
            let order = pool.changes.lock().await;
            let snapshot = snapshot(&pool, &node).await?;
            let end = pool
                .live
                .open_stream(&node.id, snapshot, request.source, Instant::now())?;
            drop(order);
            // After a restart of the pool the node is checked now, and not only at its next heartbeat.
            start_check(&pool, &node.id);
            Ok(stream(pool.clone(), node.id, end))
        })
        .await?;
    Ok(Sse::new(stream).keep_alive(KeepAlive::new().interval(STREAM_PING).text("ping")))
}

/// All there is of a node. The caller holds [`Pool::changes`].
async fn snapshot(pool: &Pool, node: &Node) -> Result<Snapshot, store::Error> {
    let networks = pool.networks(node.index);
    let (sequence, peers) = pool
        .store
        .peers(node, Timestamp::now(), |host| networks.of_client(host))
        .await?;
    let signer = pool.signer();
    Ok(Snapshot {
        sequence,
        networks: networks.of_node(),
        peers,
        pool_key: Some(signer.ring.current().public()),
        rotations: signer.rotations.clone(),
    })
}

/// The event to send; in place of a [`NodeEvent::Resync`], and of everything that waits behind it, a snapshot.
async fn current(guard: &Guard, events: &mut Receiver<NodeEvent>, next: NodeEvent) -> Result<NodeEvent, Gone> {
    let NodeEvent::Resync = next else { return Ok(next) };
    let pool = &guard.pool;
    let node = pool.live.node(&guard.id).ok_or(Gone::Node)?;
    let _order = pool.changes.lock().await;
    // Events are put into the stream in the order of changes only, which is held: the snapshot covers all that wait.
    while events.try_recv().is_ok() {}
    Ok(NodeEvent::Snapshot(snapshot(pool, &node).await?))
}

/// Why a stream cannot go on.
#[derive(Debug, thiserror::Error)]
enum Gone {
    #[error("the node is forgotten")]
    Node,
    #[error(transparent)]
    Store(#[from] store::Error),
    #[error("an event cannot be written")]
    Encode(#[from] axum::Error),
}

fn stream(pool: Arc<Pool>, id: ProviderId, end: StreamEnd) -> impl Stream<Item = Result<Event, Infallible>> {
    let StreamEnd { mut events, generation } = end;
    let guard = Guard { pool, id, generation };
    async_stream::stream! {
        // Dropped with the stream, when the connection goes or a newer stream replaces this one.
        let guard = guard;
        while let Some(next) = events.recv().await {
            match current(&guard, &mut events, next).await.and_then(|next| Ok(encode(&next)?)) {
                Ok(encoded) => yield Ok(encoded),
                Err(error) => {
                    // A gap would leave the node wrong for ever; a new stream begins with a snapshot.
                    tracing::error!(node = %guard.id, %error, "the stream of a node ends");
                    break;
                }
            }
        }
    }
}

struct Guard {
    pool: Arc<Pool>,
    id: ProviderId,
    generation: u64,
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.pool.live.stream_ended(&self.id, self.generation, Instant::now());
    }
}

fn encode(next: &NodeEvent) -> Result<Event, axum::Error> {
    let (name, sequence) = match next {
        NodeEvent::Snapshot(snapshot) => (event::SNAPSHOT, snapshot.sequence),
        NodeEvent::Add(added) => (event::ADD, added.sequence),
        NodeEvent::Remove(removed) => (event::REMOVE, removed.sequence),
        NodeEvent::Release(released) => (event::RELEASE, released.sequence),
        NodeEvent::Resync => return Ok(Event::default().comment("resync")),
    };
    let encoded = Event::default().event(name).id(sequence.to_string());
    match next {
        NodeEvent::Snapshot(snapshot) => encoded.json_data(snapshot),
        NodeEvent::Add(added) => encoded.json_data(added),
        NodeEvent::Remove(removed) => encoded.json_data(removed),
        NodeEvent::Release(released) => encoded.json_data(released),
        NodeEvent::Resync => Ok(encoded),
    }
}

/// `POST /providers/nodes/{id}/ack`
pub async fn ack(
    State(pool): State<Arc<Pool>>,
    Path(id): Path<String>,
    request: Incoming,
) -> Result<StatusCode, Refusal> {
    pool.guarded(request.source, async {
        let node = signed_node(&pool, &id, &request)?;
        let ack: Ack = request.json()?;
        for refused in &ack.refused {
            tracing::warn!(node = %node.id, reason = refused.reason, "the node refused a peer");
        }
        pool.live.acknowledged(&node.id, &ack, Instant::now());
        Ok(StatusCode::NO_CONTENT)
    })
    .await
}

/// The registered node that signed `request`, which must be about itself.
fn signed_node(pool: &Pool, id: &str, request: &Incoming) -> Result<Node, Refusal> {
    let claim = Claim::read(&request.headers)?;
    if claim.node.as_str() != id {
        return Err(Refusal::forbidden("a node has access to its own events only"));
    }
    let node = pool
        .live
        .node(&claim.node)
        .ok_or_else(|| Refusal::not_found("register this node first"))?;
    claim.accept(
        &request.signed_parts(),
        &node.identity,
        &pool.replays,
        Timestamp::now().as_second(),
    )?;
    Ok(node)
}
