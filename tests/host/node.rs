//! A node's provider side, run with its real WireGuard device and firewall, and what it keeps, says and is told.

use std::{
    path::Path,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use dvpn_common::{
    contract::PeerEntry,
    keys::{PrivateKey, PublicKey, VerifyingKey},
    rate::Rate,
};
use dvpn_core::{
    line::Known,
    node::{Rules, Usage},
};
use dvpn_daemon::{
    ebpf::Loader,
    host::Host,
    provider::{self, Change, Event, Memory, ProviderConfig, ProviderStatus, Serials},
    tunnel::{DEFAULT_MTU_BYTES, PeerConfig, Tunnel, TunnelConfig, userspace::UserspaceTunnel},
};
use jiff::Timestamp;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    pool::Pool,
    side::{Side, joined_pair},
};

pub(crate) const PORT: u16 = 51_820;
pub(crate) const SOON: Duration = Duration::from_secs(20);

pub(crate) fn pair(seed: u8) -> (PrivateKey, PublicKey) {
    let private = PrivateKey::from_bytes([seed; 32]);
    let public = dvpn_core::keys::public_key(&private).unwrap();
    (private, public)
}

pub(crate) fn key(seed: u8) -> PublicKey {
    pair(seed).1
}

/// What a node keeps.
#[derive(Default)]
pub(crate) struct Kept {
    pub(crate) pool_key: Mutex<Option<VerifyingKey>>,
    pub(crate) serials: Mutex<Option<Vec<u8>>>,
    pub(crate) usage: Mutex<Option<Usage>>,
}

impl Memory for Kept {
    fn pool_key(&self, key: VerifyingKey) {
        *self.pool_key.lock().unwrap() = Some(key);
    }
    fn serials(&self, change: &Change) -> bool {
        let mut serials = self.serials.lock().unwrap();
        match change {
            Change::Whole(record) => *serials = Some(record.clone()),
            Change::More(records) => serials.as_mut().unwrap().extend(records),
        }
        true
    }
    fn usage(&self, usage: Usage) {
        *self.usage.lock().unwrap() = Some(usage);
    }
}

/// A BPF file system of a test's own.
struct Pins(tempfile::TempDir);

impl Pins {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        mount(Some("bpf"), folder.path(), Some("bpf"), MsFlags::empty(), None::<&str>).unwrap();
        Self(folder)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        // What is pinned goes with it.
        umount2(self.0.path(), MntFlags::MNT_DETACH).unwrap();
    }
}

/// One run of a node.
pub(crate) struct Running {
    pub(crate) status: watch::Receiver<ProviderStatus>,
    pub(crate) drain: watch::Sender<bool>,
    pub(crate) end: CancellationToken,
    pub(crate) ended: watch::Receiver<bool>,
}

pub(crate) struct Bed {
    pub(crate) node: Arc<Side>,
    pub(crate) clients: Arc<Side>,
    pub(crate) pool: Pool,
    pub(crate) pool_url: reqwest::Url,
    pub(crate) kept: Arc<Kept>,
    pub(crate) audit: Arc<Mutex<Vec<Event>>>,
    pub(crate) rules: Rules,
    pub(crate) line: watch::Sender<Known>,
    pins: Pins,
}

impl Bed {
    pub(crate) fn new(networks: &'static [&'static str]) -> Self {
        // Another test of this process may have done it already.
        drop(rustls::crypto::aws_lc_rs::default_provider().install_default());
        let [node, clients] = joined_pair().unwrap();
        node.sh("ip route add default via 10.77.0.2").unwrap();
        let (pool, address) = node.run(Pool::serve(networks)).unwrap();
        Self {
            node,
            clients,
            pool,
            pool_url: format!("http://{address}/providers").parse().unwrap(),
            kept: Arc::default(),
            audit: Arc::default(),
            rules: Rules::default(),
            line: watch::Sender::new(Known::Set(Rate::from_bits_per_second(1_000_000_000))),
            pins: Pins::new(),
        }
    }

    pub(crate) fn start(&self) -> Running {
        let (status, status_seen) = watch::channel(ProviderStatus::default());
        let (drain, drained) = watch::channel(false);
        let line = self.line.subscribe();
        let (ended, ended_seen) = watch::channel(false);
        let end = CancellationToken::new();
        let (kept, audit, rules, url) = (
            self.kept.clone(),
            self.audit.clone(),
            self.rules.clone(),
            self.pool_url.clone(),
        );
        let shutdown = end.clone();
        let bpf_directory = self.pins.path().join("dvpn");
        self.node.spawn(async move {
            let serials = kept.serials.lock().unwrap().clone();
            let (pool_key, usage) = (*kept.pool_key.lock().unwrap(), *kept.usage.lock().unwrap());
            let config = ProviderConfig {
                node_id: "node-a".parse().unwrap(),
                identity_seed: [7; 32].into(),
                private_key: pair(100).0,
                public_key: key(100),
                pool_url: url,
                endpoint: Some(format!("10.77.0.1:{PORT}")),
                port: PORT,
                probe_port: PORT + 1,
                public_probe: None,
                region: None,
                pool_key,
                memory: kept,
                serials: serials.map_or_else(Serials::default, |record| Serials::decode(&record, Timestamp::now())),
                usage,
                max_peers: 4096,
                rules,
                limit_bits_per_second: None,
                line,
                loader: Loader::new(bpf_directory),
                drained,
                http: reqwest::Client::new(),
                host: Host::open().unwrap(),
                tunnel: Arc::new(|config| Box::pin(UserspaceTunnel::create(config))),
                resolvers: vec!["127.0.0.1:5353".parse().unwrap()],
                audit: Arc::new(move |event| audit.lock().unwrap().push(event)),
                status,
            };
            provider::run(config, shutdown).await.unwrap();
            ended.send_replace(true);
        });
        let running = Running {
            status: status_seen,
            drain,
            end,
            ended: ended_seen,
        };
        running.wait("the machine is up and the stream open", |status| {
            status.up && status.connected
        });
        running
    }

    /// Waits for what the pool is to hear or to be told, within a deadline.
    pub(crate) fn told<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> T {
        let done = self.node.run(async { tokio::time::timeout(SOON, work).await }).unwrap();
        done.expect("the node answers the pool in time")
    }

    pub(crate) fn add(&self, peer: PeerEntry) -> Option<String> {
        let pool = self.pool.clone();
        self.told(async move { pool.add(peer).await })
    }

    pub(crate) fn snapshot(&self, peers: Vec<PeerEntry>) -> Vec<String> {
        let pool = self.pool.clone();
        pool.set_peers(peers);
        self.told(async move { pool.snapshot().await })
    }

    /// A client's own device, by that interface name, with the provider as its only peer.
    pub(crate) fn client(&self, seed: u8, interface: &'static str) -> Arc<dyn Tunnel> {
        let config = TunnelConfig {
            interface: interface.to_owned(),
            private_key: pair(seed).0,
            listen_port: 0,
            fwmark: 0,
            mtu_bytes: DEFAULT_MTU_BYTES,
            peers: vec![PeerConfig {
                public_key: key(100),
                endpoint: Some(format!("10.77.0.1:{PORT}").parse().unwrap()),
                allowed_ips: vec!["0.0.0.0/0".parse().unwrap()],
                keepalive: None,
            }],
            offload: true,
        };
        let tunnel = self.clients.run(UserspaceTunnel::create(config)).unwrap().unwrap();
        self.clients.sh(&format!("ip link set {interface} up")).unwrap();
        Arc::from(tunnel)
    }

    /// Whether the node answers this client's handshake.
    pub(crate) fn shakes(&self, client: &Arc<dyn Tunnel>, patience: Duration) -> bool {
        let client = client.clone();
        let shaken = async move { client.force_handshake(key(100), patience).await };
        self.clients.run(shaken).unwrap().is_ok()
    }

    pub(crate) fn pings(&self, interface: &str, from: &str) -> bool {
        let script = format!("ping -c1 -W1 -I {from} 10.96.0.1");
        self.clients
            .sh(&format!(
                "ip addr replace {from}/32 dev {interface}; ip route replace 10.96.0.1 dev {interface} src {from}"
            ))
            .unwrap();
        self.clients.sh(&script).is_ok()
    }

    pub(crate) fn events(&self) -> Vec<Event> {
        self.audit.lock().unwrap().clone()
    }

    pub(crate) fn refusals(&self) -> Vec<String> {
        let reason = |event| {
            if let Event::PeerRefused { reason } = event {
                Some(reason)
            } else {
                None
            }
        };
        self.events().into_iter().filter_map(reason).collect()
    }
}

impl Running {
    pub(crate) fn wait(&self, what: &str, like: impl Fn(&ProviderStatus) -> bool) {
        let deadline = Instant::now() + SOON;
        while !like(&self.status.borrow()) {
            assert!(Instant::now() < deadline, "{what}: {:?}", self.status.borrow());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub(crate) fn stop(self) {
        self.end.cancel();
        let deadline = Instant::now() + SOON;
        while !*self.ended.borrow() {
            assert!(Instant::now() < deadline, "the node ends");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

pub(crate) fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !holds() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
