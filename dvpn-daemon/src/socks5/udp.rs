//! UDP ASSOCIATE: a relay for the datagrams of one client. It lives as long as the TCP connection that asked for it, or
//! until two minutes pass without a datagram.

use std::{
    future, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use fast_socks5::{
    ReplyError, parse_udp_request,
    server::{Socks5ServerProtocol, states::CommandRead},
    util::target_addr::TargetAddr,
};
use futures::{
    FutureExt, StreamExt,
    future::{BoxFuture, Either},
    stream::FuturesUnordered,
};
use tokio::{
    net::{TcpStream, UdpSocket},
    time::{Instant, sleep_until, timeout},
};

use super::{
    Error, Metrics, TunnelPath, TunnelWatch,
    connect::admitted,
    destination, gone,
    header::{MAX_HEADER, write_header},
    reset_on_close,
};
use crate::resolve::Sockets as _;

/// An association without a datagram ends after this long.
const IDLE_TIMEOUT: Duration = Duration::from_mins(2);
/// Room for the largest datagram.
const MAX_DATAGRAM: usize = 65_535;
/// Datagrams that may wait for a name at a time; more are dropped, as a full queue would.
const MAX_RESOLVING: usize = 4;
/// Longest time a datagram waits for its name.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(5);
/// Datagrams taken from one socket before the others have their turn.
const BATCH: usize = 32;

/// The two addresses of the TCP connection that asks.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ends {
    pub(super) local: SocketAddr,
    pub(super) peer: SocketAddr,
}

/// Serves one association to its end.
pub(super) async fn serve(
    client: Socks5ServerProtocol<TcpStream, CommandRead>,
    ends: Ends,
    announced: &TargetAddr,
    path: &Arc<TunnelPath>,
    tunnel: &mut TunnelWatch,
    metrics: &Metrics,
) -> Result<(), Error> {
    let opened = Relay::open(ends, announced, path, metrics).await;
    let (mut relay, bound) = match opened {
        Ok(opened) => opened,
        Err(error) => {
            client
                .reply_error(&ReplyError::GeneralFailure)
                .await
                .map_err(Error::Reply)?;
            return Err(Error::Associate(error));
        }
    };
    let client = client.reply_success(bound).await.map_err(Error::Reply)?;
    let ended = tokio::select! {
        ended = relay.run(&client) => ended,
        () = gone(tunnel, path) => {
            Metrics::count(&metrics.reset_total);
            reset_on_close(&client);
            Err(io::ErrorKind::NetworkDown.into())
        }
    };
    ended.map_err(Error::Relay)
}

struct Relay<'a> {
    path: &'a TunnelPath,
    metrics: &'a Metrics,
    /// Towards the client, on the address it reached us at.
    inside: UdpSocket,
    /// Into the tunnel, for the families it carries.
    v4: Option<UdpSocket>,
    v6: Option<UdpSocket>,
    /// The only address whose datagrams are taken: that of the TCP connection.
    client_ip: IpAddr,
    /// Its port: announced, or that of its first datagram.
    client_port: Option<u16>,
}

/// A payload whose destination's name is resolved, or was not.
type Resolved = Option<(SocketAddr, Vec<u8>)>;

impl<'a> Relay<'a> {
    async fn open(
        ends: Ends,
        announced: &TargetAddr,
        path: &'a TunnelPath,
        metrics: &'a Metrics,
    ) -> io::Result<(Self, SocketAddr)> {
        let outside = |family: IpAddr| {
            path.binding
                .carries(family)
                .then(|| path.binding.udp(family, 0))
                .transpose()
        };
        let v4 = outside(Ipv4Addr::UNSPECIFIED.into())?;
        let v6 = outside(Ipv6Addr::UNSPECIFIED.into())?;
        let inside = UdpSocket::bind((ends.local.ip(), 0)).await?;
        // Sending later is done without waiting, which a socket allows only once it is known to be writable.
        for socket in [Some(&inside), v4.as_ref(), v6.as_ref()].into_iter().flatten() {
            socket.writable().await?;
        }
        let bound = inside.local_addr()?;
        let client_port = match announced {
            TargetAddr::Ip(address) if address.port() != 0 => Some(address.port()),
            TargetAddr::Ip(_) | TargetAddr::Domain(..) => None,
        };
        let client_ip = ends.peer.ip().to_canonical();
        Ok((
            Self {
                path,
                metrics,
                inside,
                v4,
                v6,
                client_ip,
                client_port,
            },
            bound,
        ))
    }

    /// Relays until the client closes its TCP connection, sends anything on it, or falls silent.
    async fn run(&mut self, client: &TcpStream) -> io::Result<()> {
        let mut buffer = vec![0; MAX_HEADER + MAX_DATAGRAM];
        let mut resolving: FuturesUnordered<BoxFuture<'a, Resolved>> = FuturesUnordered::new();
        let mut idle_at = Instant::now() + IDLE_TIMEOUT;
        loop {
            let moved = tokio::select! {
                ready = self.inside.readable() => {
                    ready?;
                    self.outwards(&mut buffer, &mut resolving).await?
                }
                ready = readable(self.v4.as_ref()) => {
                    ready?;
                    self.inwards(self.v4.as_ref(), &mut buffer)?
                }
                ready = readable(self.v6.as_ref()) => {
                    ready?;
                    self.inwards(self.v6.as_ref(), &mut buffer)?
                }
                Some(resolved) = resolving.next(), if !resolving.is_empty() => {
                    if let Some((to, payload)) = resolved {
                        self.send(&payload, to);
                    }
                    true
                }
                // Nothing is ever said on this connection again but its end.
                ready = client.readable() => match ready.and_then(|()| client.try_read(&mut [0])) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => false,
                    Ok(_) => return Ok(()),
                    Err(error) => return Err(error),
                },
                () = sleep_until(idle_at) => return Ok(()),
            };
            if moved {
                idle_at = Instant::now() + IDLE_TIMEOUT;
            }
        }
    }

    /// Client to tunnel.
    async fn outwards(
        &mut self,
        buffer: &mut [u8],
        resolving: &mut FuturesUnordered<BoxFuture<'a, Resolved>>,
    ) -> io::Result<bool> {
        let mut moved = false;
        for _ in 0..BATCH {
            let (length, from) = match self.inside.try_recv_from(buffer) {
                Ok(received) => received,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            };
            let expected = self.client_port.is_none_or(|port| port == from.port());
            if from.ip().to_canonical() != self.client_ip || !expected {
                continue;
            }
            let Some(datagram) = buffer.get(..length) else { continue };
            // A fragment is dropped, as RFC 1928 (section 7) allows; so is what does not read.
            let Ok((0, destination, payload)) = parse_udp_request(datagram).await else {
                continue;
            };
            self.client_port = Some(from.port());
            moved = true;
            match destination {
                TargetAddr::Ip(address) => match admitted(TargetAddr::Ip(address), self.path).await.as_deref() {
                    Ok([to, ..]) => self.send(payload, *to),
                    Ok([]) | Err(_) => Metrics::count(&self.metrics.refused_total),
                },
                TargetAddr::Domain(..) if resolving.len() < MAX_RESOLVING => {
                    let (path, metrics, payload) = (self.path, self.metrics, payload.to_vec());
                    let resolved = async move {
                        match timeout(RESOLVE_TIMEOUT, admitted(destination, path)).await {
                            Ok(Ok(addresses)) => addresses.first().map(|to| (*to, payload)),
                            Ok(Err(ReplyError::ConnectionNotAllowed)) => {
                                Metrics::count(&metrics.refused_total);
                                None
                            }
                            Ok(Err(_)) | Err(_) => {
                                Metrics::count(&metrics.unreachable_total);
                                None
                            }
                        }
                    };
                    resolving.push(resolved.boxed());
                }
                TargetAddr::Domain(..) => {}
            }
        }
        Ok(moved)
    }

    /// Into the tunnel. A datagram that can not be sent now is lost, as datagrams are.
    fn send(&self, payload: &[u8], to: SocketAddr) {
        let socket = if to.is_ipv4() { &self.v4 } else { &self.v6 };
        if socket
            .as_ref()
            .is_some_and(|socket| socket.try_send_to(payload, to).is_ok())
        {
            Metrics::count(&self.metrics.datagrams_total);
        }
    }

    /// Tunnel to client. The payload is received behind room for the longest header, and the header written before it.
    fn inwards(&self, socket: Option<&UdpSocket>, buffer: &mut [u8]) -> io::Result<bool> {
        let (Some(socket), Some(port)) = (socket, self.client_port) else {
            return drain(socket, buffer);
        };
        let client = SocketAddr::new(self.client_ip, port);
        let mut moved = false;
        for _ in 0..BATCH {
            let Some((head, body)) = buffer.split_at_mut_checked(MAX_HEADER) else {
                break;
            };
            let (length, from) = match socket.try_recv_from(body) {
                Ok(received) => received,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            };
            if destination::admit(from.ip(), &self.path.inner).is_none() {
                continue;
            }
            let start = write_header(head, from);
            let Some(datagram) = buffer.get(start..MAX_HEADER + length) else {
                continue;
            };
            if self.inside.try_send_to(datagram, client).is_ok() {
                Metrics::count(&self.metrics.datagrams_total);
                moved = true;
            }
        }
        Ok(moved)
    }
}

/// Waits for a datagram; for ever on a family that the tunnel does not carry.
fn readable(socket: Option<&UdpSocket>) -> impl Future<Output = io::Result<()>> {
    match socket {
        Some(socket) => Either::Left(socket.readable()),
        None => Either::Right(future::pending()),
    }
}

/// Takes one datagram off a socket that nobody expects anything from yet.
fn drain(socket: Option<&UdpSocket>, buffer: &mut [u8]) -> io::Result<bool> {
    match socket.map(|socket| socket.try_recv_from(buffer)) {
        Some(Err(error)) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
        Some(_) | None => Ok(false),
    }
}
