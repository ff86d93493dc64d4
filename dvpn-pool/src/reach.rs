//! Whether a node answers where it says, as a client would meet it: the pool completes the latency echo and a WireGuard
//! handshake against the node's key.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use dvpn_common::{
    contract::Reachability,
    echo::{EchoKey, REPLY_BYTES},
    keys::PublicKey,
};
use tokio::{
    net::UdpSocket,
    time::{Instant, timeout_at},
};

use crate::{prober::Prober, store::Node};

/// Requests sent before giving up.
const TRIES: u32 = 4;
/// How long one request is waited for.
const WAIT: Duration = Duration::from_millis(350);

/// Why no echo was completed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket failed.
    #[error("the pool cannot send to {probe}")]
    Socket {
        /// Where to.
        probe: SocketAddr,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Nothing valid came back.
    #[error("no valid echo came back from {0}")]
    Silent(SocketAddr),
}

/// What a check found wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unreached {
    /// In a word.
    pub found: Reachability,
    /// For the owner, with what to do.
    pub reason: String,
}

/// Reaches `node` as a client would. Its `probe` must be known.
pub async fn check(node: &Node, prober: &Prober) -> Result<(), Unreached> {
    let unreached = |found, error: &dyn std::error::Error, port: u16, what| Unreached {
        found,
        reason: format!(
            "{error}: UDP port {port} ({what}) is closed on the way. Open it in the firewall and forward it to this \
             machine at the router; where the router's own address is not public (carrier-grade NAT), ask the internet \
             provider for a public one"
        ),
    };
    if let Some(probe) = node.probe {
        echo(probe, &node.public_key)
            .await
            .map_err(|error| unreached(Reachability::NoEcho, &error, probe.port(), "the latency echo"))?;
    }
    prober
        .handshake(node.endpoint, &node.public_key)
        .await
        .map_err(|error| unreached(Reachability::NoHandshake, &error, node.endpoint.port(), "WireGuard"))
}

/// Where to bind a socket that sends to `remote`.
pub(crate) fn local(remote: SocketAddr) -> SocketAddr {
    if remote.is_ipv4() {
        SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0))
    } else {
        SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0))
    }
}

/// Completes one echo with the holder of `key` at `probe`.
pub async fn echo(probe: SocketAddr, key: &PublicKey) -> Result<(), Error> {
    let failed = |source| Error::Socket { probe, source };
    let socket = UdpSocket::bind(local(probe)).await.map_err(failed)?;
    // A connected socket hears only this address.
    socket.connect(probe).await.map_err(failed)?;
    let echo = EchoKey::new(key);
    let nonce: [u8; 8] = rand::random();
    let request = echo.request(nonce);
    let mut buffer = [0_u8; REPLY_BYTES + 1];
    for _ in 0..TRIES {
        // An ICMP error of an earlier try shows up here; the node may still be starting, so it costs one try.
        let sent = socket.send(&request).await;
        let deadline = Instant::now() + WAIT;
        if sent.is_err() {
            tokio::time::sleep_until(deadline).await;
            continue;
        }
        while let Ok(received) = timeout_at(deadline, socket.recv(&mut buffer)).await {
            match received {
                Ok(length) if buffer.get(..length).and_then(|reply| echo.open_reply(reply)) == Some(nonce) => {
                    return Ok(());
                }
                Ok(_) => {}
                Err(_) => {
                    tokio::time::sleep_until(deadline).await;
                    break;
                }
            }
        }
    }
    Err(Error::Silent(probe))
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn responder(key: PublicKey, spoil: bool) -> SocketAddr {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        tokio::spawn(async move {
            let echo = EchoKey::new(&key);
            let mut buffer = [0; 128];
            while let Ok((length, from)) = socket.recv_from(&mut buffer).await {
                if let Some(mut nonce) = echo.open_request(&buffer[..length]) {
                    if spoil {
                        nonce[0] ^= 1;
                    }
                    socket.send_to(&echo.reply(nonce), from).await.unwrap();
                }
            }
        });
        address
    }

    #[tokio::test]
    async fn only_the_right_key_and_nonce_complete_an_echo() {
        let key = PublicKey::from_bytes([1; 32]).unwrap();
        let other = PublicKey::from_bytes([2; 32]).unwrap();
        echo(responder(key, false).await, &key).await.unwrap();
        assert!(matches!(
            echo(responder(other, false).await, &key).await,
            Err(Error::Silent(_))
        ));
        assert!(matches!(
            echo(responder(key, true).await, &key).await,
            Err(Error::Silent(_))
        ));
    }
}
