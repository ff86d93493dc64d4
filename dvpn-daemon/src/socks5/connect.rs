//! CONNECT: resolve, judge, connect, relay.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use fast_socks5::{
    ReplyError,
    server::{Socks5ServerProtocol, states::CommandRead},
    util::target_addr::TargetAddr,
};
use tokio::{io::copy_bidirectional_with_sizes, net::TcpStream, time::timeout};

use super::{CONNECT_TIMEOUT, Error, Metrics, TunnelPath, TunnelWatch, destination, gone, reset_on_close};
use crate::{race::race, resolve::Sockets as _};

/// One buffer each direction: together the 64 KiB a connection may cost.
const BUFFER_BYTES: usize = 32 * 1024;

/// Serves one request to its end.
pub(super) async fn serve(
    client: Socks5ServerProtocol<TcpStream, CommandRead>,
    destination: TargetAddr,
    path: &Arc<TunnelPath>,
    tunnel: &mut TunnelWatch,
    metrics: &Metrics,
) -> Result<(), Error> {
    let connected = tokio::select! {
        connected = timeout(CONNECT_TIMEOUT, open(destination, path)) => {
            connected.unwrap_or(Err(ReplyError::HostUnreachable))
        }
        () = gone(tunnel, path) => Err(ReplyError::NetworkUnreachable),
    };
    let mut remote = match connected {
        Ok(remote) => remote,
        Err(reply) => {
            Metrics::count(match reply {
                ReplyError::ConnectionNotAllowed => &metrics.refused_total,
                ReplyError::NetworkUnreachable
                | ReplyError::HostUnreachable
                | ReplyError::ConnectionRefused
                | ReplyError::Succeeded
                | ReplyError::GeneralFailure
                | ReplyError::ConnectionTimeout
                | ReplyError::TtlExpired
                | ReplyError::CommandNotSupported
                | ReplyError::AddressTypeNotSupported => &metrics.unreachable_total,
            });
            return client.reply_error(&reply).await.map_err(Error::Reply);
        }
    };
    let bound = remote.local_addr().map_err(Error::Relay)?;
    let mut client = client.reply_success(bound).await.map_err(Error::Reply)?;
    let relayed = tokio::select! {
        relayed = copy_bidirectional_with_sizes(&mut client, &mut remote, BUFFER_BYTES, BUFFER_BYTES) => relayed,
        () = gone(tunnel, path) => {
            Metrics::count(&metrics.reset_total);
            Err(io::ErrorKind::NetworkDown.into())
        }
    };
    if relayed.is_err() {
        // One side was reset, or the tunnel is gone: neither side may take it for an orderly end.
        reset_on_close(&client);
        reset_on_close(&remote);
    }
    relayed.map(|_bytes| ()).map_err(Error::Relay)
}

/// A connection to the destination, or the answer that says why not.
async fn open(destination: TargetAddr, path: &TunnelPath) -> Result<TcpStream, ReplyError> {
    let addresses = admitted(destination, path).await?;
    race(addresses, |address| path.binding.connect(address))
        .await
        .map_err(|error| reply(&error))
}

/// The addresses a destination stands for, each judged; or the answer that says why there is none.
pub(super) async fn admitted(destination: TargetAddr, path: &TunnelPath) -> Result<Vec<SocketAddr>, ReplyError> {
    let (resolved, port) = match destination {
        TargetAddr::Ip(address) => (vec![address.ip()], address.port()),
        // An address written as a name is an address.
        TargetAddr::Domain(name, port) => match name.parse::<IpAddr>() {
            Ok(address) => (vec![address], port),
            Err(_not_an_address) => (
                path.resolver
                    .resolve(&name)
                    .await
                    .map_err(|_private| ReplyError::HostUnreachable)?,
                port,
            ),
        },
    };
    if port == 0 {
        return Err(ReplyError::ConnectionNotAllowed);
    }
    let addresses: Vec<SocketAddr> = resolved
        .into_iter()
        .filter_map(|address| destination::admit(address, &path.inner))
        .map(|address| SocketAddr::new(address, port))
        .collect();
    if addresses.is_empty() {
        return Err(ReplyError::ConnectionNotAllowed);
    }
    let carried: Vec<SocketAddr> = addresses
        .into_iter()
        .filter(|address| path.binding.carries(address.ip()))
        .collect();
    if carried.is_empty() {
        Err(ReplyError::NetworkUnreachable)
    } else {
        Ok(carried)
    }
}

#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "ErrorKind is open; what is not named here has no reply of its own"
)]
pub(crate) fn reply(error: &io::Error) -> ReplyError {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => ReplyError::ConnectionRefused,
        io::ErrorKind::NetworkUnreachable | io::ErrorKind::NetworkDown => ReplyError::NetworkUnreachable,
        io::ErrorKind::HostUnreachable | io::ErrorKind::TimedOut => ReplyError::HostUnreachable,
        _ => ReplyError::GeneralFailure,
    }
}
