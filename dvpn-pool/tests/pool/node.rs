//! A node as the pool meets it: an identity, a latency echo, a WireGuard responder, signed requests, an event stream.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair as _};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use dvpn_common::{
    contract::{Ack, PeerAdded, PeerEntry, PeerReleased, PeerRemoved, RefusedPeer, RegisterResponse, Snapshot},
    echo::EchoKey,
    keys::{PrivateKey, PublicKey, VerifyingKey},
    node::{HEADER_NODE, HEADER_NONCE, HEADER_SIGNATURE, HEADER_TIME, SignedRequest},
};
use dvpn_pool::signing::sha256;
use futures::StreamExt as _;
use gotatun::{
    noise::{Tunn, TunnResult, index_table::IndexTable, rate_limiter::RateLimiter},
    packet::{Packet, WgKind},
    x25519,
};
use serde_json::{Value, json};
use tokio::{net::UdpSocket, sync::mpsc};

use crate::support::{Access, DEADLINE, public_key};

/// One event as it was received.
#[derive(Debug, Clone, PartialEq)]
pub enum Seen {
    Snapshot(Snapshot),
    Add(PeerAdded),
    Remove(PeerRemoved),
    Release(PeerReleased),
}

impl Seen {
    pub fn sequence(&self) -> u64 {
        match self {
            Self::Snapshot(event) => event.sequence,
            Self::Add(event) => event.sequence,
            Self::Remove(event) => event.sequence,
            Self::Release(event) => event.sequence,
        }
    }
}

/// What the node's socket does, and has seen.
#[derive(Default)]
pub struct Responder {
    pub echoes: AtomicUsize,
    pub initiations: AtomicUsize,
    pub ignores_echo: AtomicBool,
    pub ignores_handshake: AtomicBool,
    /// The peer it admits: the pool's prober, once it was told.
    prober: Mutex<Option<Tunn>>,
}

pub struct TestNode {
    pub id: String,
    pub key: PublicKey,
    pub address: SocketAddr,
    pub responder: Arc<Responder>,
    private: PrivateKey,
    identity: Ed25519KeyPair,
    access: Mutex<Access>,
}

impl TestNode {
    /// A node whose echo and WireGuard answer on one free loopback port.
    pub async fn new(access: &Access, id: &str, number: u8) -> Self {
        let private = PrivateKey::from_bytes([number; 32]);
        let key = public_key(private.clone());
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        let responder = Arc::new(Responder::default());
        let shared = responder.clone();
        tokio::spawn(async move {
            let echo = EchoKey::new(&key);
            let mut buffer = [0; 256];
            while let Ok((length, from)) = socket.recv_from(&mut buffer).await {
                if let Some(reply) = shared.answer(&echo, &buffer[..length]) {
                    socket.send_to(&reply, from).await.unwrap();
                }
            }
        });
        Self {
            id: id.into(),
            key,
            address,
            responder,
            private,
            identity: Ed25519KeyPair::generate().unwrap(),
            access: Mutex::new(access.clone()),
        }
    }

    /// From now on it speaks to a restarted pool.
    pub fn move_to(&self, access: &Access) {
        *self.access.lock().unwrap() = access.clone();
    }

    fn access(&self) -> Access {
        self.access.lock().unwrap().clone()
    }

    pub fn identity(&self) -> VerifyingKey {
        VerifyingKey::from_bytes(self.identity.public_key().as_ref().try_into().unwrap()).unwrap()
    }

    /// The four headers over one request.
    pub fn sign(&self, method: &str, path: &str, body: &[u8], time: i64) -> Vec<(&'static str, String)> {
        let nonce = dvpn_pool::hex::encode(&rand::random::<[u8; 16]>());
        let signed = SignedRequest {
            method,
            path,
            body_sha256: &sha256(body),
            time,
            nonce: &nonce,
            node: &self.id,
        }
        .bytes();
        let signature = STANDARD.encode(self.identity.sign(&signed));
        vec![
            (HEADER_NODE, self.id.clone()),
            (HEADER_TIME, time.to_string()),
            (HEADER_NONCE, nonce.clone()),
            (HEADER_SIGNATURE, signature),
        ]
    }

    pub async fn post_with(&self, path: &str, body: &str, headers: &[(&'static str, String)]) -> reqwest::Response {
        let Access { base, client } = self.access();
        let mut request = client.post(format!("{base}{path}")).body(body.to_owned());
        for (name, value) in headers {
            request = request.header(*name, value);
        }
        request.send().await.unwrap()
    }

    pub async fn post(&self, path: &str, body: &Value) -> reqwest::Response {
        let body = body.to_string();
        let headers = self.sign("POST", path, body.as_bytes(), now());
        self.post_with(path, &body, &headers).await
    }

    pub fn registration(&self) -> Value {
        json!({
            "node_id": self.id,
            "endpoint": self.address.to_string(),
            "public_key": self.key.to_string(),
            "probe": self.address.to_string(),
            "region": "test",
            "identity": self.identity().to_string(),
        })
    }

    pub async fn register(&self) -> RegisterResponse {
        self.register_as(&self.registration()).await
    }

    /// Registers, and admits the prober that the answer names.
    pub async fn register_as(&self, body: &Value) -> RegisterResponse {
        let response = self.post("/providers/register", body).await;
        let status = response.status();
        assert_eq!(status, 200, "{}", response.text().await.unwrap());
        let response: RegisterResponse = response.json().await.unwrap();
        self.responder.admit(&self.private, &response.prober_key.unwrap());
        response
    }

    /// Registers until it is listed.
    pub async fn register_until_listed(&self) -> RegisterResponse {
        tokio::time::timeout(DEADLINE, async {
            loop {
                let answer = self.register().await;
                if answer.listed {
                    return answer;
                }
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            }
        })
        .await
        .expect("it is listed in time")
    }

    pub fn events_path(&self) -> String {
        format!("/providers/nodes/{}/events", self.id)
    }

    /// Opens the event stream; it ends when the receiver is dropped or the pool ends it.
    pub async fn open_stream(&self) -> mpsc::Receiver<Seen> {
        let path = self.events_path();
        let Access { base, client } = self.access();
        let mut request = client.get(format!("{base}{path}")).timeout(DEADLINE * 10);
        for (name, value) in self.sign("GET", &path, b"", now()) {
            request = request.header(name, value);
        }
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        let (sender, receiver) = mpsc::channel(1024);
        tokio::spawn(async move {
            let mut body = response.bytes_stream();
            let mut text = String::new();
            loop {
                let chunk = tokio::select! {
                    chunk = body.next() => chunk,
                    () = sender.closed() => None,
                };
                let Some(Ok(chunk)) = chunk else { break };
                text.push_str(std::str::from_utf8(&chunk).unwrap());
                while let Some(end) = text.find("\n\n") {
                    if let Some(event) = read_event(&text[..end]) {
                        drop(sender.send(event).await);
                    }
                    text.drain(..end + 2);
                }
            }
        });
        receiver
    }

    /// Registered and listed, with its stream, behind the first snapshot, in the caller's hands: nobody else answers for it.
    pub async fn by_hand(access: &Access, id: &str, number: u8) -> (Self, mpsc::Receiver<Seen>) {
        let node = Self::new(access, id, number).await;
        node.register().await;
        let mut events = node.open_stream().await;
        next(&mut events).await;
        node.register_until_listed().await;
        (node, events)
    }

    pub async fn ack(&self, sequence: u64, refused: Vec<RefusedPeer>) -> reqwest::Response {
        let body = serde_json::to_value(Ack { sequence, refused }).unwrap();
        self.post(&format!("/providers/nodes/{}/ack", self.id), &body).await
    }

    /// Registers, opens the stream, is listed, and from then on applies and acknowledges every event.
    pub async fn serve(self) -> ServingNode {
        self.register().await;
        let mut serving = ServingNode {
            node: Arc::new(self),
            peers: Arc::default(),
            networks: Vec::new(),
            log: Arc::default(),
        };
        serving.networks = serving.follow().await;
        serving.node.register_until_listed().await;
        serving
    }
}

impl Responder {
    /// The reply to one datagram, if it gets one.
    fn answer(&self, echo: &EchoKey, datagram: &[u8]) -> Option<Vec<u8>> {
        if let Some(nonce) = echo.open_request(datagram) {
            self.echoes.fetch_add(1, Ordering::SeqCst);
            return (!self.ignores_echo.load(Ordering::SeqCst)).then(|| echo.reply(nonce).to_vec());
        }
        let message = Packet::<[u8]>::copy_from(datagram).try_into_wg().ok()?;
        let WgKind::HandshakeInit(_) = &message else {
            return None;
        };
        self.initiations.fetch_add(1, Ordering::SeqCst);
        if self.ignores_handshake.load(Ordering::SeqCst) {
            return None;
        }
        match self.prober.lock().unwrap().as_mut()?.handle_incoming_packet(message) {
            TunnResult::WriteToNetwork(reply) => Some(Packet::from(reply).as_ref().to_vec()),
            TunnResult::Done | TunnResult::Err(_) | TunnResult::WriteToTunnel(_) => None,
        }
    }

    fn admit(&self, private: &PrivateKey, prober: &PublicKey) {
        let private = x25519::StaticSecret::from(*private.expose());
        let limiter = RateLimiter::new(&x25519::PublicKey::from(&private), 1000);
        self.prober.lock().unwrap().get_or_insert_with(|| {
            Tunn::new(
                private,
                x25519::PublicKey::from(*prober.as_bytes()),
                None,
                None,
                IndexTable::from_os_rng(),
                Arc::new(limiter),
            )
        });
    }

    /// Answers handshakes with another private key than it registered.
    pub fn answer_with(&self, private: &PrivateKey, prober: &PublicKey) {
        *self.prober.lock().unwrap() = None;
        self.admit(private, prober);
    }
}

/// A node that is listed and does its work.
pub struct ServingNode {
    pub node: Arc<TestNode>,
    pub peers: Arc<Mutex<BTreeMap<PublicKey, PeerEntry>>>,
    pub networks: Vec<ipnetwork::IpNetwork>,
    pub log: Arc<Mutex<Vec<Seen>>>,
}

impl ServingNode {
    /// Opens a stream, and applies and acknowledges what comes; returns the node's networks.
    pub async fn follow(&self) -> Vec<ipnetwork::IpNetwork> {
        let mut events = self.node.open_stream().await;
        let first = next(&mut events).await;
        let Seen::Snapshot(snapshot) = &first else {
            panic!("a stream begins with a snapshot, not {first:?}")
        };
        let networks = snapshot.networks.clone();
        apply(&self.peers, &first);
        self.node.ack(first.sequence(), Vec::new()).await;
        let (peers, node, log) = (self.peers.clone(), self.node.clone(), self.log.clone());
        tokio::spawn(async move {
            while let Some(mut event) = events.recv().await {
                // As a real node does: whatever came meanwhile is acknowledged together.
                loop {
                    apply(&peers, &event);
                    log.lock().unwrap().push(event.clone());
                    match events.try_recv() {
                        Ok(next) => event = next,
                        Err(_) => break,
                    }
                }
                let response = node.ack(event.sequence(), Vec::new()).await;
                assert_eq!(response.status(), 204);
            }
        });
        networks
    }

    pub fn peer(&self, key: PublicKey) -> Option<PeerEntry> {
        self.peers.lock().unwrap().get(&key).cloned()
    }

    pub fn keys(&self) -> Vec<PublicKey> {
        self.peers.lock().unwrap().keys().copied().collect()
    }
}

fn apply(peers: &Mutex<BTreeMap<PublicKey, PeerEntry>>, event: &Seen) {
    let mut peers = peers.lock().unwrap();
    match event {
        Seen::Snapshot(snapshot) => {
            *peers = snapshot
                .peers
                .iter()
                .map(|peer| (peer.public_key, peer.clone()))
                .collect();
        }
        Seen::Add(added) => {
            peers.insert(added.peer.public_key, added.peer.clone());
        }
        Seen::Remove(removed) => {
            peers.remove(&removed.public_key);
            // Its addresses are the follower's now.
            for peer in peers.values_mut() {
                peer.renews.take_if(|old| *old == removed.public_key);
            }
        }
        Seen::Release(released) => {
            if let Some(peer) = peers.get_mut(&released.public_key) {
                peer.released = true;
            }
        }
    }
}

fn read_event(text: &str) -> Option<Seen> {
    let field = |name: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
    };
    let data = field("data")?;
    let event = match field("event")? {
        "snapshot" => Seen::Snapshot(serde_json::from_str(data).unwrap()),
        "add" => Seen::Add(serde_json::from_str(data).unwrap()),
        "remove" => Seen::Remove(serde_json::from_str(data).unwrap()),
        "release" => Seen::Release(serde_json::from_str(data).unwrap()),
        other => panic!("unknown event {other}"),
    };
    assert_eq!(field("id").unwrap(), event.sequence().to_string());
    Some(event)
}

/// The next event, in time.
pub async fn next(events: &mut mpsc::Receiver<Seen>) -> Seen {
    tokio::time::timeout(DEADLINE, events.recv())
        .await
        .expect("an event in time")
        .expect("an open stream")
}

/// Unix seconds.
pub fn now() -> i64 {
    jiff::Timestamp::now().as_second()
}
