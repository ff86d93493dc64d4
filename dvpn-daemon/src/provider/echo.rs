//! The latency echo responder ([`dvpn_common::echo`]).

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use dvpn_common::{
    echo::{EchoKey, REQUEST_BYTES},
    keys::PublicKey,
};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::UdpSocket;

use super::limiter::{Limiter, Rate};
use crate::control_plane::mark;

/// Three probes a candidate, a few clients behind one address.
const EACH: Rate = Rate {
    per_second: 10.0,
    burst: 30.0,
};
const ALL: Rate = Rate {
    per_second: 2000.0,
    burst: 4000.0,
};
const SOURCES: usize = 16_384;

/// What the responder did.
#[derive(Debug, Default)]
pub struct EchoStats {
    answered: AtomicU64,
    ignored: AtomicU64,
    limited: AtomicU64,
}

impl EchoStats {
    /// Requests answered.
    pub fn answered(&self) -> u64 {
        self.answered.load(Relaxed)
    }
    /// Datagrams of strangers: no answer.
    pub fn ignored(&self) -> u64 {
        self.ignored.load(Relaxed)
    }
    /// Valid requests beyond the rate: no answer.
    pub fn limited(&self) -> u64 {
        self.limited.load(Relaxed)
    }
}

/// A bound responder.
pub struct EchoResponder {
    socket: UdpSocket,
    key: EchoKey,
    stats: Arc<EchoStats>,
}

impl EchoResponder {
    /// Binds `port` (0: any) on every address of both families, or of IPv4 where there is no IPv6.
    pub fn bind(port: u16, provider_key: &PublicKey) -> io::Result<Self> {
        let socket = both_families(port).or_else(|_| ipv4_only(port))?;
        Ok(Self {
            socket,
            key: EchoKey::new(provider_key),
            stats: Arc::default(),
        })
    }

    /// Where it listens.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// What it did so far.
    pub fn stats(&self) -> Arc<EchoStats> {
        Arc::clone(&self.stats)
    }

    /// Answers until dropped. Only requests that carry the right MAC are answered, never by more than they were long.
    pub async fn run(self) {
        let mut limiter = Limiter::new(EACH, ALL, SOURCES, Instant::now());
        // One byte more than a request, so that a longer datagram is not mistaken for one.
        let mut buffer = [0; REQUEST_BYTES + 1];
        loop {
            let Ok((length, source)) = self.socket.recv_from(&mut buffer).await else {
                // The network is going or coming back.
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            };
            let Some(nonce) = buffer.get(..length).and_then(|packet| self.key.open_request(packet)) else {
                self.stats.ignored.fetch_add(1, Relaxed);
                continue;
            };
            if !limiter.allows(source.ip(), Instant::now()) {
                self.stats.limited.fetch_add(1, Relaxed);
                continue;
            }
            // A full socket buffer loses the reply, as the network might.
            if self.socket.try_send_to(&self.key.reply(nonce), source).is_ok() {
                self.stats.answered.fetch_add(1, Relaxed);
            }
        }
    }
}

fn both_families(port: u16) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::IPV6, Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_only_v6(false)?;
    start(socket, (Ipv6Addr::UNSPECIFIED.into(), port))
}

fn ipv4_only(port: u16) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP))?;
    start(socket, (Ipv4Addr::UNSPECIFIED.into(), port))
}

fn start(socket: Socket, address: (IpAddr, u16)) -> io::Result<UdpSocket> {
    socket.set_nonblocking(true)?;
    mark(&socket);
    socket.bind(&SocketAddr::from(address).into())?;
    UdpSocket::from_std(socket.into())
}
