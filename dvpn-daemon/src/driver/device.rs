//! The one task that owns the client's tunnel device.
//!
//! Orders are carried out one after the other, so that a tear-down never overtakes the set-up it undoes. What the device
//! does by itself — counts, handshakes, death — goes to the driver as inputs tagged with the attempt that made it.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use dvpn_common::{
    keys::{PrivateKey, PublicKey},
    status::TunnelBackend,
};
use dvpn_core::{
    Failure, Retry,
    approval::Approval,
    session::{Attempt, Input, Traffic},
};
use ipnetwork::IpNetwork;
use tokio::{
    net::UdpSocket,
    sync::{mpsc, oneshot, watch},
    task::JoinSet,
    time::{MissedTickBehavior, interval, timeout},
};

use crate::{
    control::metrics::Metrics,
    control_plane::Marked,
    ebpf,
    host::{ClientNetwork, Host, dns::Dns},
    run::chain,
    socks5::TunnelPath,
    tunnel::{
        self, CLIENT_INTERFACE, DEFAULT_MTU_BYTES, FWMARK, MIN_MTU_BYTES, PeerConfig, Renewal, Tunnel, TunnelConfig,
    },
};

/// What helps when the machine refuses to be configured.
const CURE: &str = "the daemon needs CAP_NET_ADMIN; dvpn-daemon --cleanup removes what an earlier run left";
/// How often the device's counters are read.
const SAMPLE_INTERVAL: Duration = Duration::from_secs(1);
/// How long one forced handshake may take before the next is sent.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(1);
/// A DNS query for the root's name servers: any answer, even a refusal, shows that the provider forwards (RFC 1035, 4.1).
const PROBE_QUERY: [u8; 17] = [0x64, 0x76, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 1];

/// What the device task is told.
pub(super) enum Order {
    /// Make the device for this approval, with the key that was approved.
    Configure(Attempt, Box<Approval>, PrivateKey),
    /// Go over to this approval, with the key that was approved, without losing a packet.
    Renew(Attempt, Box<Approval>, PrivateKey),
    /// Shake hands now.
    Handshake(Attempt),
    /// Send something that a living provider answers.
    Probe(Attempt),
    /// Take a new outer socket.
    Rebind(Attempt),
    /// Take the device down. What guards its addresses stays: a session that goes on elsewhere leaves sockets behind
    /// that still send from them.
    TearDown(Attempt),
    /// Make the machine's name resolution go through the device, if one stands.
    Names,
    /// Answer, to show that the orders before this were carried out.
    Ping(oneshot::Sender<()>),
    /// No session goes on: take away the guard, rules and routes as well.
    Clear(oneshot::Sender<()>),
}

/// What the device task needs of the daemon.
pub(super) struct Surroundings {
    pub host: Arc<Host>,
    pub metrics: Metrics,
    /// Configured name servers, reached through the tunnel; the provider's own when empty.
    pub dns: Vec<SocketAddr>,
    /// The machine's own name resolution, in device mode.
    pub names: Option<Dns>,
    /// Attaches the programs of this interface.
    pub loader: ebpf::Loader,
    /// The counting programs on the interface, read by `/metrics`.
    pub counters: Arc<std::sync::Mutex<Option<ebpf::Counters>>>,
    /// Where the tunnel's WireGuard runs, told before the tunnel's path.
    pub backend: watch::Sender<Option<TunnelBackend>>,
}

struct Device {
    attempt: Attempt,
    peer: PublicKey,
    tunnel: Arc<Box<dyn Tunnel>>,
    addresses: Vec<IpAddr>,
    probe: Option<SocketAddr>,
    /// The name servers inside.
    servers: Vec<IpAddr>,
    path: Arc<TunnelPath>,
    /// Everything that uses the device; ended before it is closed.
    tasks: JoinSet<()>,
}

/// Starts the task. `path` carries what the proxy may use while a device stands.
pub(super) fn spawn(
    surroundings: Surroundings,
    inputs: mpsc::Sender<Input>,
    path: watch::Sender<Option<(Attempt, Arc<TunnelPath>)>>,
) -> mpsc::Sender<Order> {
    let (orders, mut queue) = mpsc::channel(32);
    tokio::spawn(async move {
        let mut device: Option<Device> = None;
        let mut guarded = BTreeSet::new();
        while let Some(order) = queue.recv().await {
            match order {
                Order::Configure(attempt, approval, key) => {
                    tear_down(&path, device.take()).await;
                    guarded.extend(approval.addresses().iter().map(IpNetwork::ip));
                    let answer = match configure(&surroundings, &inputs, attempt, &approval, key, &guarded).await {
                        Ok(made) => {
                            path.send_replace(Some((attempt, Arc::clone(&made.path))));
                            device = Some(made);
                            Ok(())
                        }
                        Err(failure) => Err(failure),
                    };
                    tell(&inputs, Input::TunnelConfigured(attempt, answer)).await;
                }
                Order::Renew(attempt, approval, key) => {
                    if let Some(device) = device.as_mut() {
                        renew(device, &inputs, attempt, &approval, key);
                    }
                }
                Order::Handshake(attempt) => {
                    if let Some(device) = device.as_mut().filter(|device| device.attempt == attempt) {
                        let (tunnel, peer, inputs) = (Arc::clone(&device.tunnel), device.peer, inputs.clone());
                        device.spawn(async move {
                            if tunnel.force_handshake(peer, HANDSHAKE_TIMEOUT).await.is_ok() {
                                tell(&inputs, Input::HandshakeSeen(attempt)).await;
                            }
                        });
                    }
                }
                Order::Probe(attempt) => {
                    if let Some(device) = device.as_mut().filter(|device| device.attempt == attempt) {
                        probe(device);
                    }
                }
                Order::Rebind(attempt) => {
                    if let Some(device) = device.as_ref().filter(|device| device.attempt == attempt)
                        && let Err(error) = device.tunnel.rebind().await
                    {
                        tracing::warn!("taking a new outer socket for the tunnel: {error}");
                    }
                }
                Order::TearDown(attempt) => {
                    tear_down(&path, device.take()).await;
                    tell(&inputs, Input::TornDown(attempt)).await;
                }
                Order::Names => {
                    if let Some(device) = &device {
                        resolve_through(&surroundings, &device.servers).await;
                    }
                }
                Order::Ping(done) => {
                    if done.send(()).is_err() {
                        tracing::debug!("nobody waits for the tunnel task's sign of life");
                    }
                }
                Order::Clear(done) => {
                    // While the link is there that a service was told of.
                    resolve_as_before(&surroundings).await;
                    tear_down(&path, device.take()).await;
                    undo(&surroundings).await;
                    guarded.clear();
                    if done.send(()).is_err() {
                        tracing::debug!("nobody waits for the end of the tunnel's configuration");
                    }
                }
            }
        }
        tear_down(&path, device.take()).await;
    });
    orders
}

async fn tell(inputs: &mpsc::Sender<Input>, input: Input) {
    if inputs.send(input).await.is_err() {
        tracing::debug!("the driver has ended; a tunnel event is dropped");
    }
}

fn failure(what: &str, error: &dyn std::error::Error, how: &str) -> Failure {
    let mut what = format!("{what}: {error}");
    let mut source = error.source();
    while let Some(cause) = source {
        what.push_str(": ");
        what.push_str(&cause.to_string());
        source = cause.source();
    }
    Failure {
        what,
        how: how.to_owned(),
        retry: Retry::Backoff,
    }
}

/// The MTU of the route to `endpoint`, as the kernel tells a connected socket (`IP_MTU`, ip(7)); nothing for IPv6, where
/// the usual value is used.
fn route_mtu(endpoint: SocketAddr) -> Option<u32> {
    if endpoint.is_ipv6() {
        return None;
    }
    let socket = Marked::unconnected(endpoint).ok()?;
    socket.connect(endpoint).ok()?;
    nix::sys::socket::getsockopt(&socket, nix::sys::socket::sockopt::IpMtu)
        .ok()?
        .try_into()
        .ok()
}

/// The tunnel's MTU: the route's, less WireGuard's 60 or 80 bytes, between the floor and the usual 1420.
fn mtu(route_mtu_bytes: Option<u32>, endpoint: SocketAddr) -> u16 {
    let overhead = if endpoint.is_ipv4() { 60 } else { 80 };
    route_mtu_bytes
        .and_then(|route| u16::try_from(route.saturating_sub(overhead)).ok())
        .unwrap_or(DEFAULT_MTU_BYTES)
        .clamp(MIN_MTU_BYTES, DEFAULT_MTU_BYTES)
}

async fn configure(
    surroundings: &Surroundings,
    inputs: &mpsc::Sender<Input>,
    attempt: Attempt,
    approval: &Approval,
    private_key: PrivateKey,
    guarded: &BTreeSet<IpAddr>,
) -> Result<Device, Failure> {
    let provider = approval.provider();
    let mtu_bytes = mtu(route_mtu(provider.endpoint), provider.endpoint);
    let config = TunnelConfig {
        interface: CLIENT_INTERFACE.to_owned(),
        private_key,
        listen_port: 0,
        fwmark: FWMARK,
        mtu_bytes,
        offload: true,
        peers: vec![peer_of(approval)],
    };
    let tunnel = tunnel::create(config)
        .await
        .map_err(|error| failure("making the tunnel", &error, CURE))?;
    surroundings.backend.send_replace(Some(tunnel.backend()));
    let tunnel = Arc::new(tunnel);
    // Only now is the interface ours: before, there is nothing to undo.
    let made = finish(
        surroundings,
        inputs,
        attempt,
        approval,
        Arc::clone(&tunnel),
        mtu_bytes,
        guarded,
    )
    .await;
    if made.is_err() {
        resolve_as_before(surroundings).await;
        close(tunnel).await;
        undo(surroundings).await;
    }
    made
}

/// Gives the device its counters, guard, addresses and routes, in this order.
async fn finish(
    surroundings: &Surroundings,
    inputs: &mpsc::Sender<Input>,
    attempt: Attempt,
    approval: &Approval,
    tunnel: Arc<Box<dyn Tunnel>>,
    mtu_bytes: u16,
    guarded: &BTreeSet<IpAddr>,
) -> Result<Device, Failure> {
    let provider = approval.provider();
    attach_counters(surroundings).await;
    let addresses: Vec<_> = approval.addresses().iter().map(IpNetwork::ip).collect();
    let guarded: Vec<IpAddr> = guarded.iter().copied().collect();
    // The guard comes before the address it guards.
    surroundings
        .host
        .set_client_guard(&guarded)
        .await
        .map_err(|error| failure("guarding the tunnel's addresses", &error, CURE))?;
    let network = ClientNetwork {
        interface: CLIENT_INTERFACE.to_owned(),
        addresses: approval.addresses().to_vec(),
        mtu_bytes,
        routes: provider.allowed_ips.clone(),
    };
    surroundings
        .host
        .client_up(&network)
        .await
        .map_err(|error| failure("configuring the tunnel's interface", &error, CURE))?;
    let dns = if surroundings.dns.is_empty() {
        approval
            .gateways()
            .iter()
            .map(|gateway| SocketAddr::new(*gateway, 53))
            .collect()
    } else {
        surroundings.dns.clone()
    };
    let carried = |address: &SocketAddr| {
        approval
            .addresses()
            .iter()
            .any(|ours| ours.is_ipv4() == address.is_ipv4())
    };
    let dns: Vec<SocketAddr> = dns.into_iter().filter(carried).collect();
    let servers: Vec<IpAddr> = dns.iter().map(SocketAddr::ip).collect();
    resolve_through(surroundings, &servers).await;
    let path = TunnelPath::new(CLIENT_INTERFACE, &addresses, approval.gateways(), &dns)
        .map(Arc::new)
        .map_err(|error| failure("preparing name resolution through the tunnel", &error, "set TUNNEL_DNS"))?;
    let mut device = Device {
        attempt,
        peer: provider.public_key,
        tunnel: Arc::clone(&tunnel),
        addresses,
        probe: dns.first().copied(),
        servers,
        path,
        tasks: JoinSet::new(),
    };
    device.spawn(observe(
        tunnel,
        provider.public_key,
        attempt,
        inputs.clone(),
        surroundings.metrics.clone(),
    ));
    Ok(device)
}

impl Device {
    fn spawn(&mut self, work: impl Future<Output = ()> + Send + 'static) {
        // What has ended makes room.
        while self.tasks.try_join_next().is_some() {}
        self.tasks.spawn(work);
    }
}

/// Counts before the interface is up, so that no packet is missed. Without counters the tunnel is as safe.
async fn attach_counters(surroundings: &Surroundings) {
    match surroundings.loader.attach(CLIENT_INTERFACE).await {
        Ok(counters) => *lock(&surroundings.counters) = Some(counters),
        Err(error) => tracing::info!("no packet counters on {CLIENT_INTERFACE}: {error}"),
    }
}

fn lock<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Shakes hands until that works once, then reports counters once a second; ends with the device.
async fn observe(
    tunnel: Arc<Box<dyn Tunnel>>,
    peer: PublicKey,
    attempt: Attempt,
    inputs: mpsc::Sender<Input>,
    metrics: Metrics,
) {
    let watching = async {
        while tunnel.force_handshake(peer, HANDSHAKE_TIMEOUT).await.is_err() {
            // A dead device answers at once: the pause keeps this from spinning until its death is reported.
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        tell(&inputs, Input::HandshakeSeen(attempt)).await;
        let mut before = Traffic::default();
        let mut ticks = interval(SAMPLE_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let Ok(stats) = tunnel.stats().await else { continue };
            let Some(stats) = stats.iter().find(|stats| stats.public_key == peer) else {
                continue;
            };
            let now = Traffic {
                tx_bytes: stats.tx_bytes,
                rx_bytes: stats.rx_bytes,
            };
            metrics.count_traffic(before, now);
            before = now;
            tell(&inputs, Input::TrafficSampled(attempt, now)).await;
        }
    };
    tokio::select! {
        () = watching => {}
        why = tunnel.died() => {
            let failure = Failure {
                what: format!("the tunnel interface {CLIENT_INTERFACE} is gone: {why}"),
                how: "it is made again; if this repeats, see what else configures interfaces here".to_owned(),
                retry: Retry::Backoff,
            };
            tell(&inputs, Input::TunnelLost(attempt, failure)).await;
        }
    }
}

/// Begins the hand-over, which ends with the device.
fn renew(device: &mut Device, inputs: &mpsc::Sender<Input>, attempt: Attempt, approval: &Approval, key: PrivateKey) {
    let (tunnel, inputs) = (Arc::clone(&device.tunnel), inputs.clone());
    let ends = approval.addresses().iter().find_map(|ours| {
        let same_family = |gateway: &&IpAddr| gateway.is_ipv4() == ours.is_ipv4();
        Some((ours.ip(), *approval.gateways().iter().find(same_family)?))
    });
    let peer = peer_of(approval);
    device.spawn(async move {
        let answer = match ends {
            None => Err(Failure {
                what: "no gateway shows when the tunnel has moved to its fresh key".to_owned(),
                how: "the tunnel is made anew".to_owned(),
                retry: Retry::Never,
            }),
            Some((source, gateway)) => {
                let renewal = Renewal {
                    private_key: key,
                    peer,
                    source,
                    gateway,
                };
                let renewed = tunnel.renew(renewal).await;
                renewed.map_err(|error| {
                    let how = "it is tried again, and the old key is used meanwhile";
                    failure("going over to a fresh key", &error, how)
                })
            }
        };
        tell(&inputs, Input::TunnelRenewed(attempt, answer)).await;
    });
}

fn peer_of(approval: &Approval) -> PeerConfig {
    let provider = approval.provider();
    PeerConfig {
        public_key: provider.public_key,
        endpoint: Some(provider.endpoint),
        allowed_ips: provider.allowed_ips.clone(),
        keepalive: None,
    }
}

/// A question inside the tunnel. Where no name server is known, the handshake is the question.
fn probe(device: &mut Device) {
    let (tunnel, peer, to) = (Arc::clone(&device.tunnel), device.peer, device.probe);
    let source = to.and_then(|to| {
        device
            .addresses
            .iter()
            .copied()
            .find(|ours| ours.is_ipv4() == to.is_ipv4())
    });
    device.spawn(async move {
        let (Some(to), Some(source)) = (to, source) else {
            drop(tunnel.force_handshake(peer, HANDSHAKE_TIMEOUT).await);
            return;
        };
        let ask = async {
            let socket = UdpSocket::bind(SocketAddr::new(source, 0)).await?;
            socket.bind_device(Some(CLIENT_INTERFACE.as_bytes()))?;
            socket.connect(to).await?;
            socket.send(&PROBE_QUERY).await?;
            // Waiting keeps the port open, so that the answer is not met by an ICMP error.
            let mut answer = [0; 512];
            socket.recv(&mut answer).await
        };
        if let Ok(Err(error)) = timeout(HANDSHAKE_TIMEOUT, ask).await {
            tracing::debug!("asking {to} inside the tunnel: {error}");
        }
    });
}

async fn tear_down(path: &watch::Sender<Option<(Attempt, Arc<TunnelPath>)>>, device: Option<Device>) {
    path.send_replace(None);
    let Some(mut device) = device else { return };
    device.tasks.shutdown().await;
    close(device.tunnel).await;
}

/// With the tasks gone this is the last handle; were it not, dropping it would end the device a little later.
async fn close(tunnel: Arc<Box<dyn Tunnel>>) {
    if let Some(tunnel) = Arc::into_inner(tunnel) {
        tunnel.close().await;
    }
}

/// Names are a convenience: the firewall keeps questions from leaving beside the tunnel whatever becomes of this.
async fn resolve_through(surroundings: &Surroundings, servers: &[IpAddr]) {
    let (Some(names), Ok(index)) = (&surroundings.names, nix::net::if_::if_nametoindex(CLIENT_INTERFACE)) else {
        return;
    };
    match names.set(CLIENT_INTERFACE, index, servers).await {
        Ok(ways) => tracing::debug!("names are resolved through the tunnel: {ways:?}"),
        Err(error) => tracing::warn!("programs of this machine may resolve no names: {}", chain(&error)),
    }
}

async fn resolve_as_before(surroundings: &Surroundings) {
    let Some(names) = &surroundings.names else { return };
    for undone in names.undo().await {
        match undone {
            Ok(what) => tracing::debug!("put back: {what}"),
            Err(error) => tracing::warn!(
                "name resolution is not yet what it was: {}: dvpn-daemon --cleanup puts it back",
                chain(&error)
            ),
        }
    }
}

/// The guard goes last, and only if what it guards is gone.
async fn undo(surroundings: &Surroundings) {
    let mut undone = surroundings.host.client_down().await;
    if undone.is_ok() {
        undone = surroundings.host.set_client_guard(&[]).await;
    }
    if let Err(error) = undone {
        tracing::warn!("undoing the configuration of {CLIENT_INTERFACE}: {error}: dvpn-daemon --cleanup removes it");
    }
}
