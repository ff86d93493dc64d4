//! From one key to the next while packets flow.

use std::{
    collections::HashSet,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use dvpn_common::keys::PublicKey;
use dvpn_daemon::tunnel::{PeerConfig, Renewal, Tunnel};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::{
    net::UdpSocket,
    time::{MissedTickBehavior, interval, sleep, timeout},
};

use crate::{
    bed::{Pair, SOON, Setup, config, eventually, key, pair},
    side::Side,
};

/// Seed of the client's next key.
const NEXT: u8 = 11;
/// One a millisecond and direction.
const PACKETS: u32 = 10_500;

/// A socket whose buffer holds what comes at once after a pause.
fn receiver(address: &str) -> Result<UdpSocket> {
    let address: SocketAddr = address.parse()?;
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::RcvBufForce, &(8 << 20))?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    Ok(UdpSocket::from_std(socket.into())?)
}

/// Numbered packets on their way from one side to the other, and the numbers that came.
struct Flow {
    came: Arc<Mutex<HashSet<u32>>>,
    twice: Arc<Mutex<u32>>,
}

impl Flow {
    fn begin(from: &Side, to: &Side, target: &str) -> Result<Self> {
        let flow = Self {
            came: Arc::default(),
            twice: Arc::default(),
        };
        let (came, twice) = (Arc::clone(&flow.came), Arc::clone(&flow.twice));
        let address = target.to_owned();
        let bound = to.run(async move { receiver(&address) })??;
        let target = bound.local_addr()?;
        to.spawn(async move {
            let mut bytes = [0; 64];
            while let Ok(length) = bound.recv(&mut bytes).await {
                let number = bytes.first_chunk::<4>().filter(|_| length == 32);
                let Some(number) = number.map(|number| u32::from_be_bytes(*number)) else {
                    continue;
                };
                if !came.lock().unwrap_or_else(PoisonError::into_inner).insert(number) {
                    *twice.lock().unwrap_or_else(PoisonError::into_inner) += 1;
                }
            }
        });
        from.spawn(async move {
            let any: SocketAddr = "0.0.0.0:0".parse().expect("an address");
            let socket = UdpSocket::bind(any).await.expect("a socket");
            let mut ticks = interval(Duration::from_millis(1));
            ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
            let mut bytes = [0; 32];
            for number in 0..PACKETS {
                ticks.tick().await;
                bytes[..4].copy_from_slice(&number.to_be_bytes());
                socket.send_to(&bytes, target).await.expect("the interface takes it");
            }
        });
        Ok(flow)
    }

    fn came(&self) -> usize {
        self.came.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// The numbers that did not come, as ranges.
    fn lost(&self) -> String {
        let came = self.came.lock().unwrap_or_else(PoisonError::into_inner);
        let lost: Vec<u32> = (0..PACKETS).filter(|number| !came.contains(number)).collect();
        let ranges = lost.chunk_by(|a, b| a + 1 == *b);
        ranges
            .filter_map(|range| Some(format!("{}-{} ", range.first()?, range.last()?)))
            .collect()
    }

    /// Waits until every packet has come.
    fn is_whole(&self, name: &str) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(30);
        let (mut before, mut changed) = (0, Instant::now());
        while self.came() < PACKETS as usize {
            let now = self.came();
            if now != before {
                (before, changed) = (now, Instant::now());
            }
            if changed.elapsed() > SOON || Instant::now() > deadline {
                bail!(
                    "{name}: {} of {PACKETS} packets were lost: {}",
                    PACKETS as usize - now,
                    self.lost()
                );
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let twice = *self.twice.lock().unwrap_or_else(PoisonError::into_inner);
        ensure!(twice == 0, "{name}: {twice} packets came twice");
        Ok(())
    }
}

fn client(seed: u8, allowed: bool) -> PeerConfig {
    PeerConfig {
        public_key: key(seed).1,
        allowed_ips: if allowed {
            config(2, Setup::default()).peers.remove(0).allowed_ips
        } else {
            Vec::new()
        },
        endpoint: None,
        keepalive: None,
    }
}

/// What a provider does when a client renews: the new key has no addresses until its first handshake, then it has
/// them all and the old key is gone.
pub(crate) async fn provide(tunnel: Arc<dyn Tunnel>) -> Result<()> {
    tunnel.set_peers(vec![client(NEXT, false)]).await?;
    let moved = async {
        loop {
            let stats = tunnel.stats().await?;
            let shaken = |key: PublicKey| {
                stats
                    .iter()
                    .any(|peer| peer.public_key == key && peer.last_handshake.is_some())
            };
            if shaken(key(NEXT).1) {
                tunnel.set_peers(vec![client(NEXT, true)]).await?;
                return tunnel.remove_peer(key(1).1).await;
            }
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(Duration::from_secs(30), moved)
        .await
        .context("no handshake under the new key")??;
    Ok(())
}

pub(crate) fn renewal() -> Renewal {
    Renewal {
        private_key: key(NEXT).0,
        peer: config(1, Setup::default()).peers.remove(0),
        source: "10.88.0.1".parse().expect("an address"),
        gateway: "10.88.0.2".parse().expect("an address"),
    }
}

/// Both directions at once, and the client's totals sampled meanwhile: they never run backwards.
fn flows(pair: &Pair) -> Result<[Flow; 2]> {
    pair.transfer("10.88.0.2", 1 << 16, SOON)?;
    let [client, provider] = &pair.sides;
    let there = Flow::begin(client, provider, "10.88.0.2:7000")?;
    let back = Flow::begin(provider, client, "10.88.0.1:7000")?;
    eventually("packets flow both ways", || Ok(there.came() > 500 && back.came() > 500))?;
    Ok([there, back])
}

fn watch_totals(pair: &Pair) -> Arc<Mutex<Option<String>>> {
    let wrong: Arc<Mutex<Option<String>>> = Arc::default();
    let (tunnel, seen) = (Arc::clone(&pair.tunnels[0]), Arc::clone(&wrong));
    pair.sides[0].spawn(async move {
        let (mut rx, mut tx) = (0, 0);
        while let Ok(stats) = tunnel.stats().await {
            let Some(now) = stats.iter().find(|peer| peer.public_key == key(2).1) else {
                continue;
            };
            if now.rx_bytes < rx || now.tx_bytes < tx {
                let text = format!("totals went from {rx}, {tx} to {}, {}", now.rx_bytes, now.tx_bytes);
                *seen.lock().unwrap_or_else(PoisonError::into_inner) = Some(text);
            }
            (rx, tx) = (now.rx_bytes, now.tx_bytes);
            sleep(Duration::from_millis(5)).await;
        }
    });
    wrong
}

#[test]
fn a_renewal_under_traffic_loses_no_packet_in_either_direction() -> Result<()> {
    let pair = pair(Setup::default())?;
    let flows = flows(&pair)?;
    let wrong = watch_totals(&pair);
    let provider = Arc::clone(&pair.tunnels[1]);
    let (told, moved) = std::sync::mpsc::channel();
    pair.sides[1].spawn(async move { drop(told.send(provide(provider).await)) });
    let tunnel = Arc::clone(&pair.tunnels[0]);
    let before = pair.sides[0].run(async move { tunnel.listen_port().await })??;
    let tunnel = Arc::clone(&pair.tunnels[0]);
    let sent_before = flows[0].came();
    let took = pair.sides[0].run(async move {
        let started = Instant::now();
        tunnel.renew(renewal()).await.map(|()| started.elapsed())
    })??;
    println!("renewed in {took:?} after {sent_before} packets");
    moved.recv_timeout(SOON)??;
    ensure!(
        flows[0].came() < PACKETS as usize,
        "the renewal came too late to say anything"
    );
    flows[0].is_whole("client to provider")?;
    flows[1].is_whole("provider to client")?;
    ensure!(
        wrong.lock().unwrap_or_else(PoisonError::into_inner).is_none(),
        "{wrong:?}"
    );

    let provider = Arc::clone(&pair.tunnels[1]);
    let peers = pair.sides[1].run(async move { provider.stats().await })??;
    ensure!(peers.len() == 1 && peers[0].public_key == key(NEXT).1, "{peers:?}");
    let tunnel = Arc::clone(&pair.tunnels[0]);
    let (port, stats) =
        pair.sides[0].run(async move { anyhow::Ok((tunnel.listen_port().await?, tunnel.stats().await?)) })??;
    ensure!(
        port != before && peers[0].endpoint.is_some_and(|at| at.port() == port),
        "{port} {peers:?}"
    );
    ensure!(stats[0].rx_bytes > u64::from(PACKETS) * 32 && stats[0].tx_bytes > u64::from(PACKETS) * 32);
    // The engine that took over does all that the first did: a rebind, another renewal's worth of traffic.
    let tunnel = Arc::clone(&pair.tunnels[0]);
    pair.sides[0].run(async move { tunnel.rebind().await })??;
    pair.transfer("10.88.0.2", 1 << 20, SOON)?;
    pair.transfer("fd88::2", 1 << 16, SOON)?;
    Ok(())
}

#[test]
fn a_renewal_that_the_provider_does_not_follow_changes_nothing_and_loses_nothing() -> Result<()> {
    let pair = pair(Setup::default())?;
    let flows = flows(&pair)?;
    // The provider does not know the new key.
    let tunnel = Arc::clone(&pair.tunnels[0]);
    let (failed, took) = pair.sides[0].run(async move {
        let started = Instant::now();
        (tunnel.renew(renewal()).await, started.elapsed())
    })?;
    ensure!(failed.is_err(), "a key that nobody admitted was taken");
    ensure!(took < Duration::from_secs(10), "{took:?}");
    flows[0].is_whole("client to provider")?;
    flows[1].is_whole("provider to client")?;
    pair.transfer("10.88.0.2", 1 << 16, SOON)?;
    Ok(())
}
