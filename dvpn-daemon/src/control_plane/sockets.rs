//! Sockets whose packets carry our mark: they go by the machine's own routes, and the firewall lets them pass to where it
//! was told to.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpSocket, TcpStream, UdpSocket};

use crate::{resolve::Sockets, tunnel::FWMARK};

/// Makes them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Marked;

/// Puts our mark on what a socket sends. Without `CAP_NET_ADMIN` it cannot be put there, but then no firewall of ours
/// stands either.
pub(crate) fn mark(socket: &Socket) {
    if let Err(error) = socket.set_mark(FWMARK) {
        tracing::debug!(%error, "a socket's packets go unmarked");
    }
}

impl Marked {
    /// A blocking UDP socket that may be connected to an address like this, to learn what the machine's routes say.
    pub(crate) fn unconnected(to: SocketAddr) -> io::Result<std::net::UdpSocket> {
        let socket = Self::socket(to.ip(), Type::DGRAM, Protocol::UDP)?;
        Ok(socket.into())
    }

    fn socket(to: IpAddr, kind: Type, protocol: Protocol) -> io::Result<Socket> {
        let socket = Socket::new(Domain::for_address((to, 0).into()), kind, Some(protocol))?;
        mark(&socket);
        socket.set_nonblocking(true)?;
        if to.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        Ok(socket)
    }
}

impl Sockets for Marked {
    fn carries_v4(&self) -> bool {
        true
    }

    fn carries_v6(&self) -> bool {
        true
    }

    async fn connect(&self, to: SocketAddr) -> io::Result<TcpStream> {
        let socket = Self::socket(to.ip(), Type::STREAM, Protocol::TCP)?;
        let stream = TcpSocket::from_std_stream(socket.into()).connect(to).await?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    fn udp(&self, to: IpAddr, port: u16) -> io::Result<UdpSocket> {
        let socket = Self::socket(to, Type::DGRAM, Protocol::UDP)?;
        let any = match to {
            IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        };
        socket.bind(&SocketAddr::new(any, port).into())?;
        UdpSocket::from_std(socket.into())
    }
}
