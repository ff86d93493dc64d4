//! The way through the tunnel. Every socket that carries proxied traffic is made here, bound to the tunnel's interface
//! and to its inner address before anything else is done with it. There is no other way out.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
};

use nix::sys::socket::{setsockopt, sockopt::IpBindAddressNoPort};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpSocket, TcpStream, UdpSocket};

use crate::resolve::{self, Resolver, Sockets};

/// An interface with its inner addresses, one of each family at most. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Binding(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    interface: String,
    v4: Option<Ipv4Addr>,
    v6: Option<Ipv6Addr>,
}

impl Binding {
    /// Takes the first address of each family.
    pub fn new(interface: &str, addresses: &[IpAddr]) -> Self {
        let v4 = addresses.iter().find_map(|address| match address {
            IpAddr::V4(v4) => Some(*v4),
            IpAddr::V6(_) => None,
        });
        let v6 = addresses.iter().find_map(|address| match address {
            IpAddr::V6(v6) => Some(*v6),
            IpAddr::V4(_) => None,
        });
        Self(Arc::new(Inner {
            interface: interface.to_owned(),
            v4,
            v6,
        }))
    }

    /// Whether the tunnel carries the family of this address.
    pub fn carries(&self, address: IpAddr) -> bool {
        self.source(address).is_some()
    }

    fn source(&self, to: IpAddr) -> Option<IpAddr> {
        match to {
            IpAddr::V4(_) => self.0.v4.map(IpAddr::V4),
            IpAddr::V6(_) => self.0.v6.map(IpAddr::V6),
        }
    }

    /// Device first, then address: from the moment it exists the socket can send nowhere else. The device is bound by
    /// its index, so an interface of the same name made later is not used by old sockets.
    fn bound(&self, to: IpAddr, kind: Type, protocol: Protocol, port: u16) -> io::Result<Socket> {
        let source = self.source(to).ok_or(io::ErrorKind::NetworkUnreachable)?;
        let socket = Socket::new(Domain::for_address((source, 0).into()), kind, Some(protocol))?;
        socket.bind_device(Some(self.0.interface.as_bytes()))?;
        socket.set_nonblocking(true)?;
        if source.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        if kind == Type::STREAM {
            // Else 28,000 connections, to whatever destinations, would use up the ports of the one source address.
            setsockopt(&socket, IpBindAddressNoPort, &true)?;
        }
        socket.bind(&SocketAddr::new(source, port).into())?;
        Ok(socket)
    }
}

/// By the tunnel.
impl Sockets for Binding {
    fn carries_v4(&self) -> bool {
        self.0.v4.is_some()
    }

    fn carries_v6(&self) -> bool {
        self.0.v6.is_some()
    }

    async fn connect(&self, to: SocketAddr) -> io::Result<TcpStream> {
        let socket = self.bound(to.ip(), Type::STREAM, Protocol::TCP, 0)?;
        let socket = TcpSocket::from_std_stream(socket.into());
        let stream = socket.connect(to).await?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    fn udp(&self, to: IpAddr, port: u16) -> io::Result<UdpSocket> {
        UdpSocket::from_std(self.bound(to, Type::DGRAM, Protocol::UDP, port)?.into())
    }
}

/// A standing tunnel, as the proxy needs to know it.
#[derive(Debug, Clone)]
pub struct TunnelPath {
    /// Makes the sockets.
    pub binding: Binding,
    /// Asks through the tunnel.
    pub resolver: Resolver<Binding>,
    /// Inner addresses that are no destinations: ours and the provider's.
    pub(super) inner: Vec<IpAddr>,
}

impl TunnelPath {
    /// Of an interface with these inner addresses, whose provider has these `gateways`. `dns` are the name servers:
    /// `TUNNEL_DNS`, or the gateways' port 53.
    pub fn new(
        interface: &str,
        addresses: &[IpAddr],
        gateways: &[IpAddr],
        dns: &[SocketAddr],
    ) -> Result<Self, resolve::Error> {
        let binding = Binding::new(interface, addresses);
        let resolver = Resolver::new(&binding, dns)?;
        Ok(Self {
            binding,
            resolver,
            inner: addresses.iter().chain(gateways).copied().collect(),
        })
    }
}
