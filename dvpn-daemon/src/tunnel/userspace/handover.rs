//! From one key to the next without losing a packet.
//!
//! A second engine with the new key, on an outer socket of its own, shares the interface with the first. Both may write
//! what they decrypt into it; one reads from it. The provider gives our tunnel addresses to the new key at its first
//! handshake, and drops what the old key sends from then on. So:
//!
//! 1. the first engine stops reading: the kernel keeps what applications send, in a queue that was long from the start;
//! 2. a ping goes after what it has taken already: its answer shows that all of that has arrived;
//! 3. the second engine shakes hands, then pings the provider's own address inside the tunnel until something comes
//!    back: the addresses have moved;
//! 4. the second engine reads on. The first still writes what was on its way, for a little while.
//!
//! Before 4 everything can be undone: the first engine reads on.

use std::{
    net::IpAddr,
    sync::{Arc, PoisonError, RwLock},
    time::{Duration, Instant},
};

use bytes::BytesMut;
use dvpn_common::keys::PublicKey;
use gotatun::{
    device::Device,
    packet::{Ip, Packet},
};
use tokio::{
    sync::{mpsc, watch},
    time::MissedTickBehavior,
};

use super::{Error, Transports, UserspaceTunnel, ping::Ping, tun};
use crate::tunnel::Renewal;

/// Longest time from the pause to the second engine's reading; it is undone then.
const LIMIT: Duration = Duration::from_secs(3);
/// Longest time that what was sent gets to arrive: usually one round trip.
const MAX_DRAIN: Duration = Duration::from_secs(1);
/// How long what was sent to the old key is waited for afterwards, at least.
const MIN_LINGER: Duration = Duration::from_millis(250);
/// How long a handshake under the old key may take: without a provider nothing needs to pause.
const REACH_TIMEOUT: Duration = Duration::from_secs(1);
const PING_EVERY: Duration = Duration::from_millis(10);

/// Bytes received and sent, by peer.
pub(super) type Counted = Vec<(PublicKey, u64, u64)>;

/// The engines of one tunnel.
pub(super) struct Engines {
    inner: RwLock<Inner>,
}

struct Inner {
    current: Arc<Device<Transports>>,
    /// Still receives what was sent to the old key.
    previous: Option<Arc<Device<Transports>>>,
    /// Bytes received and sent by engines that are gone, by peer.
    spent: Counted,
}

impl Engines {
    pub(super) fn new(device: Device<Transports>) -> Self {
        let inner = Inner {
            current: Arc::new(device),
            previous: None,
            spent: Vec::new(),
        };
        Self {
            inner: RwLock::new(inner),
        }
    }

    /// The one that reads the interface.
    pub(super) fn current(&self) -> Arc<Device<Transports>> {
        Arc::clone(&self.inner.read().unwrap_or_else(PoisonError::into_inner).current)
    }

    /// Both, and what earlier ones counted.
    pub(super) fn all(&self) -> (Vec<Arc<Device<Transports>>>, Counted) {
        let inner = self.inner.read().unwrap_or_else(PoisonError::into_inner);
        let previous = inner.previous.iter();
        let both = std::iter::once(&inner.current)
            .chain(previous)
            .map(Arc::clone)
            .collect();
        (both, inner.spent.clone())
    }

    fn succeed(&self, next: Arc<Device<Transports>>) -> Arc<Device<Transports>> {
        let mut inner = self.inner.write().unwrap_or_else(PoisonError::into_inner);
        let old = std::mem::replace(&mut inner.current, next);
        inner.previous = Some(Arc::clone(&old));
        old
    }

    /// The previous engine is gone; this is what it counted.
    fn retire(&self, counted: Counted) {
        let mut inner = self.inner.write().unwrap_or_else(PoisonError::into_inner);
        inner.previous = None;
        inner.spent.extend(counted);
    }

    /// Stops them all.
    pub(super) async fn stop(self) {
        let inner = self.inner.into_inner().unwrap_or_else(PoisonError::into_inner);
        for device in [inner.previous, Some(inner.current)].into_iter().flatten() {
            stop(device).await;
        }
    }
}

/// Stops at once; were somebody still using it, dropping it would stop it a little later.
async fn stop(device: Arc<Device<Transports>>) {
    if let Some(device) = Arc::into_inner(device) {
        device.stop().await;
    }
}

/// What one engine counted: bytes received and sent, by peer.
pub(super) async fn counted(device: &Device<Transports>) -> Counted {
    let peers = device.peers().await;
    peers
        .into_iter()
        .filter_map(|peer| {
            let key = PublicKey::from_bytes(*peer.peer.public_key.as_bytes()).ok()?;
            Some((key, peer.stats.rx_bytes as u64, peer.stats.tx_bytes as u64))
        })
        .collect()
}

/// To one engine: packets that it sends while it does not read the interface, and whether they are answered.
pub(super) struct Line {
    number: u64,
    pings: mpsc::Sender<Packet<Ip>>,
    watched: Arc<tun::Watched>,
}

impl Line {
    /// With the engine's ends of it.
    pub(super) fn open(number: u64, turn: &watch::Sender<u64>) -> (Self, tun::Turn, Arc<tun::Watched>) {
        let (pings, injected) = mpsc::channel(4);
        let watched = Arc::default();
        let reads = tun::Turn::new(number, turn.subscribe(), injected);
        let line = Self {
            number,
            pings,
            watched: Arc::clone(&watched),
        };
        (line, reads, watched)
    }

    /// Pings until a ping is answered. All that the engine took before has arrived then.
    async fn answered(&self, ping: Ping) {
        let mut answered = self.watched.expect(ping);
        let asking = async {
            let mut ticks = tokio::time::interval(PING_EVERY);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            for sequence in 0.. {
                ticks.tick().await;
                let bytes = BytesMut::from(ping.request(sequence).as_slice());
                if let Ok(packet) = Packet::from_bytes(bytes).try_into_ip()
                    && self.pings.send(packet).await.is_err()
                {
                    break;
                }
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = asking => {}
            // The sender lives as long as this line.
            _ = answered.wait_for(|answered| *answered) => {}
        }
    }
}

/// Nobody reads while this lives; then the engine that did before reads on, unless another was let in.
struct Pause<'a> {
    turn: &'a watch::Sender<u64>,
    next: u64,
}

impl<'a> Pause<'a> {
    fn begin(turn: &'a watch::Sender<u64>) -> Self {
        let next = turn.send_replace(tun::NOBODY);
        Self { turn, next }
    }
}

impl Drop for Pause<'_> {
    fn drop(&mut self) {
        self.turn.send_replace(self.next);
    }
}

impl UserspaceTunnel {
    pub(super) async fn hand_over(&self, renewal: Renewal) -> Result<(), Error> {
        let mut line = self.line.lock().await;
        let Renewal {
            private_key,
            peer,
            source,
            gateway,
        } = renewal;
        let key = peer.public_key;
        let (old_ping, new_ping) = (marked_ping(source, gateway)?, marked_ping(source, gateway)?);
        let first = self.engines.current();
        self.shake_hands(&first, key, REACH_TIMEOUT).await?;

        let number = line.number + 1;
        let (next_line, reads, watched) = Line::open(number, &self.turn);
        // A fixed port is the first engine's until it is gone.
        let second = self.engine(&private_key, 0, reads, watched).await?;
        second
            .add_peers(vec![super::device_peer(&peer)])
            .await
            .map_err(|error| super::stopped(&self.interface, 0, error))?;

        let mut pause = Pause::begin(&self.turn);
        let paused = Instant::now();
        let moving = async {
            if tokio::time::timeout(MAX_DRAIN, line.answered(old_ping)).await.is_err() {
                tracing::debug!(
                    interface = self.interface,
                    "what was sent under the old key may not have arrived"
                );
            }
            let drained = paused.elapsed();
            self.shake_hands(&second, key, LIMIT).await?;
            next_line.answered(new_ping).await;
            Ok(drained)
        };
        let drained = match tokio::time::timeout(LIMIT, moving).await {
            Ok(Ok(drained)) => drained,
            Ok(Err(error)) => return Err(error),
            Err(_elapsed) => {
                return Err(Error::NotMoved { gateway, within: LIMIT });
            }
        };
        pause.next = number;
        drop(pause);
        tracing::debug!(
            interface = self.interface,
            "the tunnel goes on under a new key; its sender paused for {:?}",
            paused.elapsed()
        );
        self.peers.lock().await.insert(key, peer);
        *line = next_line;
        drop(first);
        let old = self.engines.succeed(Arc::new(second));
        // What was sent to the old key may still come; what waited in the kernel has to be read.
        tokio::time::sleep((2 * drained).max(MIN_LINGER)).await;
        line.watched.forget();
        let counted = counted(&old).await;
        self.engines.retire(counted);
        stop(old).await;
        Ok(())
    }
}

/// Pings that nobody else's answers are taken for.
fn marked_ping(source: IpAddr, gateway: IpAddr) -> Result<Ping, Error> {
    let mut mark = [0; 8];
    aws_lc_rs::rand::fill(&mut mark)
        .ok()
        .and_then(|()| Ping::new(source, gateway, mark))
        .ok_or(Error::NoGateway { ours: source, gateway })
}
