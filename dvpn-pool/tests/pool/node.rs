//! A node as the pool meets it: an identity, a latency echo, signed requests, an event stream.

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
    contract::{Ack, PeerAdded, PeerEntry, PeerRemoved, RefusedPeer, RegisterResponse, Snapshot},
    echo::EchoKey,
    keys::{PublicKey, VerifyingKey},
    node::{HEADER_NODE, HEADER_NONCE, HEADER_SIGNATURE, HEADER_TIME, SignedRequest},
};
use dvpn_pool::signing::sha256;
use futures::StreamExt as _;
use serde_json::{Value, json};
use tokio::{net::UdpSocket, sync::mpsc};

use crate::support::{Access, DEADLINE};

/// One event as it was received.
#[derive(Debug, Clone, PartialEq)]
pub enum Seen {
    Snapshot(Snapshot),
    Add(PeerAdded),
    Remove(PeerRemoved),
}

impl Seen {
    pub fn sequence(&self) -> u64 {
        match self {
            Self::Snapshot(event) => event.sequence,
            Self::Add(event) => event.sequence,
            Self::Remove(event) => event.sequence,
        }
    }
}

pub struct TestNode {
    pub id: String,
    pub key: PublicKey,
    pub address: SocketAddr,
    pub echoes: Arc<AtomicUsize>,
    pub answers_echo: Arc<AtomicBool>,
    identity: Ed25519KeyPair,
    access: Access,
}

impl TestNode {
    /// A node whose echo answers on a free loopback port.
    pub async fn new(access: &Access, id: &str, number: u8) -> Self {
        let key = PublicKey::from_bytes([number; 32]).unwrap();
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        let (echoes, answers_echo) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(true)));
        let (count, answers) = (echoes.clone(), answers_echo.clone());
        tokio::spawn(async move {
            let echo = EchoKey::new(&key);
            let mut buffer = [0; 128];
            while let Ok((length, from)) = socket.recv_from(&mut buffer).await {
                count.fetch_add(1, Ordering::SeqCst);
                if let Some(nonce) = echo
                    .open_request(&buffer[..length])
                    .filter(|_| answers.load(Ordering::SeqCst))
                {
                    socket.send_to(&echo.reply(nonce), from).await.unwrap();
                }
            }
        });
        let identity = Ed25519KeyPair::generate().unwrap();
        Self {
            id: id.into(),
            key,
            address,
            echoes,
            answers_echo,
            identity,
            access: access.clone(),
        }
    }

    /// The same node at a restarted pool.
    pub fn at(self, access: &Access) -> Self {
        Self {
            access: access.clone(),
            ..self
        }
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
        let mut request = self
            .access
            .client
            .post(format!("{}{path}", self.access.base))
            .body(body.to_owned());
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
        let response = self.post("/providers/register", &self.registration()).await;
        let status = response.status();
        assert_eq!(status, 200, "{}", response.text().await.unwrap());
        response.json().await.unwrap()
    }

    pub fn events_path(&self) -> String {
        format!("/providers/nodes/{}/events", self.id)
    }

    /// Opens the event stream; it ends when the receiver is dropped or the pool ends it.
    pub async fn open_stream(&self) -> mpsc::Receiver<Seen> {
        let path = self.events_path();
        let mut request = self
            .access
            .client
            .get(format!("{}{path}", self.access.base))
            .timeout(DEADLINE * 10);
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

    pub async fn ack(&self, sequence: u64, refused: Vec<RefusedPeer>) -> reqwest::Response {
        let body = serde_json::to_value(Ack { sequence, refused }).unwrap();
        self.post(&format!("/providers/nodes/{}/ack", self.id), &body).await
    }

    /// Registers, opens the stream, is listed, and from then on applies and acknowledges every event.
    pub async fn serve(self) -> ServingNode {
        self.register().await;
        let mut events = self.open_stream().await;
        let first = next(&mut events).await;
        let Seen::Snapshot(snapshot) = &first else {
            panic!("a stream begins with a snapshot, not {first:?}")
        };
        let node = Arc::new(self);
        let networks = snapshot.networks.clone();
        let peers = Arc::new(Mutex::new(BTreeMap::new()));
        let log = Arc::new(Mutex::new(Vec::new()));
        apply(&peers, &first);
        node.ack(first.sequence(), Vec::new()).await;
        let (applied, acking, kept) = (peers.clone(), node.clone(), log.clone());
        tokio::spawn(async move {
            while let Some(event) = events.recv().await {
                apply(&applied, &event);
                kept.lock().unwrap().push(event.clone());
                let response = acking.ack(event.sequence(), Vec::new()).await;
                assert_eq!(response.status(), 204);
            }
        });
        let listed = node.register().await;
        assert!(listed.listed, "{:?}", listed.reason);
        ServingNode {
            node,
            peers,
            networks,
            log,
        }
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
    pub fn peer(&self, key: PublicKey) -> Option<PeerEntry> {
        self.peers.lock().unwrap().get(&key).cloned()
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
