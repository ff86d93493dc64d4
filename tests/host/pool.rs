//! A pool that says what a test tells it to, also what no honest pool would. It speaks the node's contract over loopback.

use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair as _};
use axum::{
    Json, Router,
    extract::State,
    response::sse::{Event, Sse},
    routing::{get, post},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use dvpn_common::{
    approval::ApprovalFields,
    contract::{
        Ack, KeyRotation, PeerAdded, PeerEntry, PeerReleased, PeerRemoved, Reachability, RegisterRequest,
        RegisterResponse, Snapshot, event,
    },
    directory::rotation_bytes,
    keys::{PublicKey, VerifyingKey},
};
use futures::StreamExt as _;
use ipnetwork::IpNetwork;
use jiff::Timestamp;
use serde_json::Value;
use tokio::sync::{broadcast, watch};

/// The pool's signing key with this number.
pub(crate) fn signer(seed: u8) -> Ed25519KeyPair {
    Ed25519KeyPair::from_seed_unchecked(&[seed; 32]).unwrap()
}

pub(crate) fn verifying(seed: u8) -> VerifyingKey {
    VerifyingKey::from_bytes(signer(seed).public_key().as_ref().try_into().unwrap()).unwrap()
}

pub(crate) fn rotation(from: u8, to: u8, by: u8) -> KeyRotation {
    let (from, to) = (verifying(from), verifying(to));
    KeyRotation {
        from,
        to,
        signature: STANDARD.encode(signer(by).sign(&rotation_bytes(&from, &to)).as_ref()),
    }
}

/// A good approval of `client` at the node with `provider_key`, good for an hour.
pub(crate) fn approval(provider_key: PublicKey, client: PublicKey, address: &str, serial: u64) -> ApprovalFields {
    let now = Timestamp::now().as_second();
    ApprovalFields {
        pool_id: "pool".into(),
        provider_id: "node-a".parse().unwrap(),
        provider_key,
        client_key: client,
        addresses: vec![address.parse().unwrap()],
        issued_at: Timestamp::from_second(now - 5).unwrap(),
        expires_at: Timestamp::from_second(now + 3600).unwrap(),
        serial,
    }
}

pub(crate) fn entry(fields: &ApprovalFields) -> PeerEntry {
    PeerEntry {
        public_key: fields.client_key,
        addresses: fields.addresses.clone(),
        expires_at: fields.expires_at,
        approval: STANDARD.encode(fields.encode()),
        signature: STANDARD.encode(signer(1).sign(&fields.encode()).as_ref()),
        renews: None,
        released: false,
    }
}

struct Said {
    networks: Vec<IpNetwork>,
    peers: Vec<PeerEntry>,
    sequence: u64,
    answer: RegisterResponse,
}

/// The pool. Clones are the same one.
#[derive(Clone)]
pub(crate) struct Pool(Arc<Inner>);

struct Inner {
    said: Mutex<Said>,
    events: broadcast::Sender<(&'static str, String)>,
    acks: watch::Sender<Vec<Ack>>,
    registered: watch::Sender<Vec<RegisterRequest>>,
}

impl Pool {
    /// Listens on a free port of 127.0.0.1; the address is the answer's second part.
    pub(crate) async fn serve(networks: &[&str]) -> (Self, SocketAddr) {
        let said = Said {
            networks: networks.iter().map(|text| text.parse().unwrap()).collect(),
            peers: Vec::new(),
            sequence: 1,
            answer: RegisterResponse {
                listed: true,
                reason: None,
                observed_address: None,
                heartbeat_seconds: Some(1),
                pool_key: Some(verifying(1)),
                rotations: Vec::new(),
                prober_key: None,
                reachability: Some(Reachability::Reachable),
            },
        };
        let pool = Self(Arc::new(Inner {
            said: Mutex::new(said),
            events: broadcast::Sender::new(64),
            acks: watch::Sender::new(Vec::new()),
            registered: watch::Sender::new(Vec::new()),
        }));
        let router = Router::new()
            .route("/providers/register", post(register))
            .route("/providers/nodes/node-a/events", get(events))
            .route("/providers/nodes/node-a/ack", post(acknowledge))
            .with_state(pool.clone());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move { axum::serve(listener, router).await });
        (pool, address)
    }

    /// Changes what a registration is answered with, from the next one on.
    pub(crate) fn answer(&self, change: impl FnOnce(&mut RegisterResponse)) {
        change(&mut self.0.said.lock().unwrap().answer);
    }

    /// What the next snapshot names.
    pub(crate) fn set_peers(&self, peers: Vec<PeerEntry>) {
        self.0.said.lock().unwrap().peers = peers;
    }

    /// Sends an event and waits until it is acknowledged; the answer is why the peer was refused, if it was.
    pub(crate) async fn add(&self, peer: PeerEntry) -> Option<String> {
        let sequence = self.next();
        self.send(event::ADD, &serde_json::to_value(PeerAdded { sequence, peer }).unwrap());
        self.acknowledged(sequence).await
    }

    pub(crate) async fn remove(&self, public_key: PublicKey) -> Option<String> {
        let sequence = self.next();
        let removed = PeerRemoved { sequence, public_key };
        self.send(event::REMOVE, &serde_json::to_value(removed).unwrap());
        self.acknowledged(sequence).await
    }

    pub(crate) async fn release(&self, public_key: PublicKey) -> Option<String> {
        let sequence = self.next();
        let released = PeerReleased { sequence, public_key };
        self.send(event::RELEASE, &serde_json::to_value(released).unwrap());
        self.acknowledged(sequence).await
    }

    /// Sends the snapshot anew on the stream that stands.
    pub(crate) async fn snapshot(&self) -> Vec<String> {
        let sequence = self.next();
        let text = self.current();
        drop(self.0.events.send((event::SNAPSHOT, text)));
        let ack = self.ack(sequence).await;
        ack.refused.into_iter().map(|peer| peer.reason).collect()
    }

    /// Waits for the acknowledgement of this or a later change.
    pub(crate) async fn ack(&self, sequence: u64) -> Ack {
        let mut acks = self.0.acks.subscribe();
        let found = acks
            .wait_for(|acks| acks.iter().any(|ack| ack.sequence >= sequence))
            .await
            .unwrap();
        found.iter().find(|ack| ack.sequence >= sequence).unwrap().clone()
    }

    /// Waits for a registration like this.
    pub(crate) async fn registration(&self, like: impl Fn(&RegisterRequest) -> bool) {
        let mut registered = self.0.registered.subscribe();
        registered.wait_for(|all| all.last().is_some_and(&like)).await.unwrap();
    }

    async fn acknowledged(&self, sequence: u64) -> Option<String> {
        self.ack(sequence)
            .await
            .refused
            .into_iter()
            .next()
            .map(|peer| peer.reason)
    }

    fn next(&self) -> u64 {
        let mut said = self.0.said.lock().unwrap();
        said.sequence += 1;
        said.sequence
    }

    fn send(&self, name: &'static str, data: &Value) {
        self.0.events.send((name, data.to_string())).expect("a node listens");
    }

    fn current(&self) -> String {
        let said = self.0.said.lock().unwrap();
        let snapshot = Snapshot {
            sequence: said.sequence,
            networks: said.networks.clone(),
            peers: said.peers.clone(),
            pool_key: None,
            rotations: Vec::new(),
        };
        serde_json::to_string(&snapshot).unwrap()
    }
}

async fn register(State(pool): State<Pool>, Json(request): Json<RegisterRequest>) -> Json<RegisterResponse> {
    pool.0.registered.send_modify(|all| all.push(request));
    Json(pool.0.said.lock().unwrap().answer.clone())
}

async fn acknowledge(State(pool): State<Pool>, Json(ack): Json<Ack>) {
    pool.0.acks.send_modify(|acks| acks.push(ack));
}

async fn events(State(pool): State<Pool>) -> Sse<impl futures::Stream<Item = Result<Event, Infallible>>> {
    let later = pool.0.events.subscribe();
    let first = Event::default().event(event::SNAPSHOT).data(pool.current());
    let rest = futures::stream::unfold(later, async |mut later| {
        let (name, data) = later.recv().await.ok()?;
        Some((Event::default().event(name).data(data), later))
    });
    Sse::new(futures::stream::once(async { first }).chain(rest).map(Ok))
}
