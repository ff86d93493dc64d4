//! WireGuard in this process: gotatun's protocol engine between our own TUN and UDP transports.
//!
//! ```text
//! kernel ── tun::TunReader ──► gotatun: encrypt ──► udp::Sender ── network
//! kernel ◄── tun::TunWriter ── gotatun: decrypt ◄── udp::Receiver ── network
//! ```
//! With [`TunnelConfig::offload`] both edges move up to 64 KB at a time: the kernel hands over and takes TCP
//! super-packets, and UDP datagrams of one peer go out and come in as one message.

mod confirm;
mod handover;
mod headers;
mod join;
mod link;
mod ping;
mod split;
mod tun;
mod udp;

use std::{
    collections::{HashMap, HashSet},
    pin::pin,
    sync::{Arc, Mutex as StdMutex, PoisonError},
    time::Duration,
};

use dvpn_common::{
    keys::{PrivateKey, PublicKey},
    status::TunnelBackend,
};
use futures::future::BoxFuture;
use gotatun::{
    device::{
        Device, DeviceBuilder, Error as DeviceError, Peer,
        configure::{DeviceWrite, PeerMut},
    },
    noise::TimerParams,
    x25519,
};
use tokio::sync::{Mutex, oneshot, watch};
use tokio_util::task::AbortOnDropHandle;

use self::handover::{Engines, Line, counted};
use super::{Error, PeerConfig, PeerStats, Renewal, Tunnel, TunnelConfig};

type Transports = (udp::Factory, tun::TunWriter, tun::TunReader);

/// How soon an unanswered initiation is repeated while somebody waits for a handshake; by itself WireGuard
/// repeats after 5 s. Responders take 50 a second from one peer (Linux, drivers/net/wireguard/messages.h).
const IMPATIENT_RETRY: Duration = Duration::from_secs(1);

/// Number of the engine that a tunnel begins with.
const FIRST: u64 = 1;

/// How many peers are added before packets pass again: some 5 ms.
const PEERS_AT_ONCE: usize = 64;

/// Where a transport leaves the reason why it can go on no more; the first one stays.
#[derive(Clone)]
struct Death(Arc<watch::Sender<Option<String>>>);

impl Death {
    fn report(&self, reason: String) {
        self.0.send_if_modified(|slot| {
            let first = slot.is_none();
            if first {
                *slot = Some(reason);
            }
            first
        });
    }
}

/// A WireGuard device in userspace.
pub struct UserspaceTunnel {
    interface: String,
    /// As configured: 0 takes another port at each [`Tunnel::rebind`].
    listen_port: u16,
    fwmark: u32,
    offload: bool,
    tun: Arc<tun::Tun>,
    mtu: watch::Receiver<u16>,
    engines: Engines,
    /// Number of the engine that reads the interface.
    turn: watch::Sender<u64>,
    /// To the engine that reads the interface; held while another takes over from it.
    line: Mutex<Line>,
    /// What the device was told, so that telling it again is free: changing a peer costs a walk over all.
    peers: Mutex<HashMap<PublicKey, PeerConfig>>,
    death: Death,
    died: watch::Receiver<Option<String>>,
    answers: confirm::Answers,
    /// Peers with a completed handshake behind them: a later one that is not complete yet takes nothing back.
    met: StdMutex<HashSet<PublicKey>>,
    /// Resolves when the last user of the TUN has closed it.
    closed: oneshot::Receiver<()>,
    _link: AbortOnDropHandle<()>,
}

impl UserspaceTunnel {
    /// Makes the interface with its MTU, binds the outer socket and starts the protocol. The link is left
    /// down and without addresses: routes and policy come first. Needs `CAP_NET_ADMIN` and /dev/net/tun.
    pub async fn create(config: TunnelConfig) -> Result<Box<dyn Tunnel>, Error> {
        let TunnelConfig {
            interface,
            private_key,
            listen_port,
            fwmark,
            mtu_bytes,
            peers,
            offload,
        } = config;
        let (death, died) = watch::channel(None);
        let death = Death(Arc::new(death));
        let (mtu, mtu_seen) = watch::channel(mtu_bytes);
        let create_error = |source| Error::Create {
            interface: interface.clone(),
            source,
        };
        let (tun, closed) = tun::open(&interface, mtu_bytes, offload).map_err(create_error)?;
        let index = tun.index().map_err(create_error)?;
        let link = link::watch(index, mtu, death.clone())
            .await
            .map_err(|source| Error::Link {
                interface: interface.clone(),
                source,
            })?;
        let answers = confirm::Answers::default();
        let reading = watch::Sender::new(FIRST);
        let outside = Outside {
            interface: &interface,
            fwmark,
            offload,
            death: &death,
            answers: &answers,
        };
        let (first_line, reads, watched) = Line::open(FIRST, &reading);
        let inside = (Arc::clone(&tun), mtu_seen.clone(), reads, watched);
        let device = engine(&private_key, listen_port, inside, &outside).await?;
        let tunnel = Self {
            interface,
            listen_port,
            fwmark,
            offload,
            tun,
            mtu: mtu_seen,
            engines: Engines::new(device),
            turn: reading,
            line: Mutex::new(first_line),
            peers: Mutex::default(),
            death,
            died,
            answers,
            met: StdMutex::default(),
            closed,
            _link: link,
        };
        tunnel.set_peers(peers).await?;
        Ok(Box::new(tunnel))
    }

    /// Another engine on the same interface.
    async fn engine(
        &self,
        private_key: &PrivateKey,
        listen_port: u16,
        turn: tun::Turn,
        watched: Arc<tun::Watched>,
    ) -> Result<Device<Transports>, Error> {
        let outside = Outside {
            interface: &self.interface,
            fwmark: self.fwmark,
            offload: self.offload,
            death: &self.death,
            answers: &self.answers,
        };
        let inside = (Arc::clone(&self.tun), self.mtu.clone(), turn, watched);
        engine(private_key, listen_port, inside, &outside).await
    }

    async fn apply_peers(&self, peers: Vec<PeerConfig>) -> Result<(), Error> {
        let device = self.engines.current();
        let mut known = self.peers.lock().await;
        let wanted: HashMap<PublicKey, PeerConfig> = peers.into_iter().map(|peer| (peer.public_key, peer)).collect();
        let (mut new, mut changed) = (Vec::new(), Vec::new());
        for peer in wanted.values() {
            match known.get(&peer.public_key) {
                None => new.push(device_peer(peer)),
                Some(same) if same == peer => {}
                Some(_) => changed.push(peer.clone()),
            }
        }
        let stopped = |error| stopped(&self.interface, self.listen_port, error);
        // The device stands still while it is changed, and each new peer costs a key agreement.
        while !new.is_empty() {
            let chunk = new.split_off(new.len().saturating_sub(PEERS_AT_ONCE));
            device.add_peers(chunk).await.map_err(stopped)?;
            tokio::task::yield_now().await;
        }
        for peer in changed {
            let change = async move |device: &mut DeviceWrite<'_, Transports>| {
                device
                    .modify_peer(&device_key(peer.public_key), |slot| change_peer(slot, peer))
                    .await
            };
            device.write(change).await.map_err(stopped)?;
        }
        known.extend(wanted);
        Ok(())
    }

    async fn drop_peer(&self, peer: PublicKey) -> Result<(), Error> {
        let mut known = self.peers.lock().await;
        self.engines
            .current()
            .remove_peer(&device_key(peer))
            .await
            .map_err(|error| stopped(&self.interface, self.listen_port, error))?;
        known.remove(&peer);
        self.met.lock().unwrap_or_else(PoisonError::into_inner).remove(&peer);
        Ok(())
    }

    async fn set_timers(
        &self,
        device: &Device<Transports>,
        peer: PublicKey,
        timers: Option<TimerParams>,
    ) -> Result<(), Error> {
        let known = device
            .write(async move |device| {
                device
                    .modify_peer(&device_key(peer), |slot| slot.dangerously_set_timer_params(timers))
                    .await
            })
            .await
            .map_err(|error| stopped(&self.interface, self.listen_port, error))?;
        if known { Ok(()) } else { Err(Error::NoPeer(peer)) }
    }

    /// gotatun shakes hands only when the session is due for it. So the session is declared overdue, the
    /// handshake started, and the session's ordinary age limit put back while the answer is on its way.
    async fn shake_hands(&self, device: &Device<Transports>, peer: PublicKey, timeout: Duration) -> Result<(), Error> {
        let impatient = TimerParams {
            rekey_timeout: IMPATIENT_RETRY..=IMPATIENT_RETRY,
            ..TimerParams::default()
        };
        let overdue = TimerParams {
            rekey_after_time: Duration::ZERO..=Duration::ZERO,
            ..impatient.clone()
        };
        self.set_timers(device, peer, Some(overdue)).await?;
        let key = device_key(peer);
        let shaken = tokio::time::timeout(timeout, async {
            let mut handshake = pin!(device.force_handshake(&key));
            tokio::select! {
                biased;
                done = &mut handshake => return done,
                _ = self.set_timers(device, peer, Some(impatient)) => {}
            }
            handshake.await
        })
        .await;
        // A peer that was removed meanwhile needs no timers; the handshake's own result says so.
        self.set_timers(device, peer, None).await.ok();
        match shaken {
            Ok(Ok(())) => Ok(()),
            Ok(Err(DeviceError::PeerNotFound)) => Err(Error::NoPeer(peer)),
            Ok(Err(DeviceError::NoEndpoint)) => Err(Error::NoEndpoint(peer)),
            Ok(Err(DeviceError::NotConnected)) => Err(Error::Stopped(self.interface.clone())),
            Ok(Err(error)) => {
                tracing::debug!(interface = self.interface, %error, "the handshake could not be sent");
                Err(Error::NoHandshake(peer, timeout))
            }
            Err(_elapsed) => Err(Error::NoHandshake(peer, timeout)),
        }
    }

    async fn replace_socket(&self) -> Result<(), Error> {
        let wanted = self.listen_port;
        // The engine opens a new socket when the port changes, sessions stay: change it away and back.
        let away = if wanted == u16::MAX { 1 } else { u16::MAX };
        self.engines
            .current()
            .write(async move |device| {
                device.set_listen_port(away);
                device.set_listen_port(wanted);
            })
            .await
            .map_err(|error| stopped(&self.interface, wanted, error))
    }

    async fn peer_stats(&self) -> Vec<PeerStats> {
        let (engines, spent) = self.engines.all();
        let mut engines = engines.into_iter();
        let Some(current) = engines.next() else {
            return Vec::new();
        };
        let mut earlier = spent;
        for previous in engines {
            earlier.extend(counted(&previous).await);
        }
        let before = |key: &PublicKey| {
            let same = earlier.iter().filter(|(of, ..)| of == key);
            same.fold((0, 0), |(rx, tx), (_, more_rx, more_tx)| (rx + more_rx, tx + more_tx))
        };
        let seen = current.peers().await;
        let mut met = self.met.lock().unwrap_or_else(PoisonError::into_inner);
        seen.into_iter()
            .filter_map(|peer| {
                let public_key = PublicKey::from_bytes(*peer.peer.public_key.as_bytes()).ok()?;
                let endpoint = peer.peer.endpoint;
                let complete = |_: &Duration| {
                    let complete =
                        met.contains(&public_key) || !endpoint.is_some_and(|address| self.answers.open_to(address));
                    if complete {
                        met.insert(public_key);
                    }
                    complete
                };
                let (rx_bytes, tx_bytes) = before(&public_key);
                Some(PeerStats {
                    public_key,
                    endpoint,
                    last_handshake: peer.stats.last_handshake.filter(complete),
                    rx_bytes: rx_bytes + peer.stats.rx_bytes as u64,
                    tx_bytes: tx_bytes + peer.stats.tx_bytes as u64,
                })
            })
            .collect()
    }
}

impl Tunnel for UserspaceTunnel {
    fn interface(&self) -> &str {
        &self.interface
    }

    fn backend(&self) -> TunnelBackend {
        TunnelBackend::Userspace
    }

    fn set_peers(&self, peers: Vec<PeerConfig>) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(self.apply_peers(peers))
    }

    fn remove_peer(&self, peer: PublicKey) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(self.drop_peer(peer))
    }

    fn stats(&self) -> BoxFuture<'_, Result<Vec<PeerStats>, Error>> {
        Box::pin(async { Ok(self.peer_stats().await) })
    }

    fn force_handshake(&self, peer: PublicKey, timeout: Duration) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(async move { self.shake_hands(&self.engines.current(), peer, timeout).await })
    }

    fn rebind(&self) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(self.replace_socket())
    }

    fn renew(&self, renewal: Renewal) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(self.hand_over(renewal))
    }

    fn listen_port(&self) -> BoxFuture<'_, Result<u16, Error>> {
        Box::pin(async { Ok(self.engines.current().read(async |device| device.listen_port()).await) })
    }

    fn died(&self) -> BoxFuture<'_, String> {
        Box::pin(crate::tunnel::reason_of_death(self.died.clone()))
    }

    fn close(self: Box<Self>) -> BoxFuture<'static, ()> {
        Box::pin(async move {
            let Self {
                engines, closed, tun, ..
            } = *self;
            engines.stop().await;
            drop(tun);
            // Nothing is ever sent: the sender is dropped after the TUN's descriptor is closed.
            closed.await.ok();
        })
    }
}

/// What all engines of a tunnel share on their outer side.
struct Outside<'a> {
    interface: &'a str,
    fwmark: u32,
    offload: bool,
    death: &'a Death,
    answers: &'a confirm::Answers,
}

type Inside = (Arc<tun::Tun>, watch::Receiver<u16>, tun::Turn, Arc<tun::Watched>);

/// A protocol engine with an outer socket of its own, and no peers.
async fn engine(
    private_key: &PrivateKey,
    listen_port: u16,
    (tun, mtu, reads, watched): Inside,
    outside: &Outside<'_>,
) -> Result<Device<Transports>, Error> {
    let death = outside.death;
    let failed = |error| stopped(outside.interface, listen_port, error);
    let device = DeviceBuilder::new()
        .with_udp(udp::Factory::new(
            outside.offload,
            death.clone(),
            outside.answers.clone(),
        ))
        .with_ip_pair(
            tun::TunWriter::spawn(Arc::clone(&tun), watched, death.clone()),
            tun::TunReader::new(tun, reads, mtu, death.clone()),
        )
        .with_private_key(x25519::StaticSecret::from(*private_key.expose()))
        .with_listen_port(listen_port)
        .with_fwmark(outside.fwmark)
        .build()
        .await
        .map_err(failed)?;
    // A device built without peers has no socket until something asks for one; this asks.
    device.clear_peers().await.map_err(failed)?;
    Ok(device)
}

fn device_key(key: PublicKey) -> x25519::PublicKey {
    x25519::PublicKey::from(*key.as_bytes())
}

fn keepalive_seconds(keepalive: Duration) -> u16 {
    u16::try_from(keepalive.as_secs()).unwrap_or(u16::MAX)
}

fn change_peer(slot: &mut PeerMut, peer: PeerConfig) {
    slot.clear_allowed_ips();
    slot.add_allowed_ips(peer.allowed_ips);
    slot.set_keepalive(peer.keepalive.map(keepalive_seconds));
    // A peer without a configured endpoint keeps the one it was last heard from.
    if peer.endpoint.is_some() {
        slot.set_endpoint(peer.endpoint);
    }
}

fn device_peer(config: &PeerConfig) -> Peer {
    let mut peer = Peer::new(device_key(config.public_key)).with_allowed_ips(config.allowed_ips.iter().copied());
    peer.endpoint = config.endpoint;
    peer.keepalive = config.keepalive.map(keepalive_seconds);
    peer
}

fn stopped(interface: &str, port: u16, error: DeviceError) -> Error {
    if let DeviceError::Bind(source, _) = error {
        return Error::Socket { port, source };
    }
    tracing::warn!(interface, %error, "the tunnel device refused a change");
    Error::Stopped(interface.to_owned())
}
