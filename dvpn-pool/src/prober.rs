//! The initiator's half of a WireGuard handshake: whether the holder of a key answers at an endpoint.
//!
//! The answer is decrypted and verified as WireGuard does it, so it can only come from the holder of the private key.
//! No session follows: the pool sends no data, and nodes admit its key without allowed addresses.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use dvpn_common::keys::{PrivateKey, PublicKey};
use gotatun::{
    noise::{Tunn, TunnResult, index_table::IndexTable, rate_limiter::RateLimiter},
    packet::{Packet, WgKind},
    x25519,
};
use tokio::{
    net::UdpSocket,
    time::{Instant, timeout_at},
};

use crate::reach::local;

/// How long one initiation is waited for. A node that has only just been told of the prober's key admits it meanwhile.
const WAIT: Duration = Duration::from_millis(250);
/// Initiations of one attempt.
const TRIES: u32 = 16;
/// Longest message of a handshake is 148 bytes; one byte more shows what is no such message.
const BUFFER_BYTES: usize = 149;
/// Answers to our own initiations that are checked before a cookie would be asked for: there is no other side to flood.
const NO_LIMIT: u64 = 1 << 32;

/// Why no handshake was completed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket failed.
    #[error("the pool cannot send to {endpoint}")]
    Socket {
        /// Where to.
        endpoint: SocketAddr,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// No valid answer came.
    #[error("no WireGuard handshake with the registered key was answered at {0}")]
    Silent(SocketAddr),
}

/// Holds the pool's WireGuard key.
pub struct Prober {
    private: x25519::StaticSecret,
    public: PublicKey,
    indices: IndexTable,
    limiter: Arc<RateLimiter>,
}

impl Prober {
    /// Probes with this key; nothing if it has no public half.
    pub fn new(private: &PrivateKey) -> Option<Self> {
        let private = x25519::StaticSecret::from(*private.expose());
        let public = x25519::PublicKey::from(&private);
        Some(Self {
            public: PublicKey::from_bytes(*public.as_bytes()).ok()?,
            limiter: Arc::new(RateLimiter::new(&public, NO_LIMIT)),
            indices: IndexTable::from_os_rng(),
            private,
        })
    }

    /// What nodes admit.
    pub fn public(&self) -> PublicKey {
        self.public
    }

    /// Completes one handshake with the holder of `key` at `endpoint`.
    pub async fn handshake(&self, endpoint: SocketAddr, key: &PublicKey) -> Result<(), Error> {
        let failed = |source| Error::Socket { endpoint, source };
        let socket = UdpSocket::bind(local(endpoint)).await.map_err(failed)?;
        // A connected socket hears only this address.
        socket.connect(endpoint).await.map_err(failed)?;
        let mut attempt = Tunn::new(
            self.private.clone(),
            x25519::PublicKey::from(*key.as_bytes()),
            None,
            None,
            self.indices.clone(),
            self.limiter.clone(),
        );
        for _ in 0..TRIES {
            let deadline = Instant::now() + WAIT;
            if let Some(initiation) = attempt.format_handshake_initiation(true) {
                // An ICMP error of an earlier try shows up here, and costs one try.
                drop(socket.send(initiation.into_bytes().as_ref()).await);
            }
            match answer(&socket, &mut attempt, deadline).await {
                Answer::Completed => return Ok(()),
                // The next initiation carries the cookie that a busy node asks for.
                Answer::Cookie => {}
                Answer::Nothing => tokio::time::sleep_until(deadline).await,
            }
        }
        Err(Error::Silent(endpoint))
    }
}

enum Answer {
    Completed,
    Cookie,
    Nothing,
}

async fn answer(socket: &UdpSocket, attempt: &mut Tunn, deadline: Instant) -> Answer {
    let mut buffer = [0_u8; BUFFER_BYTES];
    while let Ok(Ok(length)) = timeout_at(deadline, socket.recv(&mut buffer)).await {
        let received = Packet::<[u8]>::copy_from(buffer.get(..length).unwrap_or_default());
        let Ok(message) = received.try_into_wg() else { continue };
        match message {
            WgKind::HandshakeResp(_) => {
                // The keepalive that would confirm the session is not sent: there shall be none.
                if let TunnResult::WriteToNetwork(_) = attempt.handle_incoming_packet(message) {
                    return Answer::Completed;
                }
            }
            WgKind::CookieReply(_) => {
                if let TunnResult::Done = attempt.handle_incoming_packet(message) {
                    return Answer::Cookie;
                }
            }
            WgKind::HandshakeInit(_) | WgKind::Data(_) => {}
        }
    }
    Answer::Nothing
}
