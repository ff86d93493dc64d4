//! A small SOCKS5 client (RFC 1928, 1929): what a browser does, without a browser.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::namespace::Namespace;

/// Where a request goes.
#[derive(Debug, Clone, Copy)]
pub enum Target<'a> {
    /// A name, resolved by the proxy.
    Name(&'a str, u16),
    /// An address.
    Address(SocketAddr),
}

impl Target<'_> {
    fn write(self, out: &mut Vec<u8>) -> Result<()> {
        let port = match self {
            Self::Name(name, port) => {
                out.push(3);
                out.push(u8::try_from(name.len()).context("the name is too long for SOCKS5")?);
                out.extend_from_slice(name.as_bytes());
                port
            }
            Self::Address(address) => {
                match address.ip() {
                    IpAddr::V4(v4) => {
                        out.push(1);
                        out.extend_from_slice(&v4.octets());
                    }
                    IpAddr::V6(v6) => {
                        out.push(4);
                        out.extend_from_slice(&v6.octets());
                    }
                }
                address.port()
            }
        };
        out.extend_from_slice(&port.to_be_bytes());
        Ok(())
    }
}

const CONNECT: u8 = 1;
const UDP_ASSOCIATE: u8 = 3;

/// A stream to `target` through the proxy that listens at `proxy` inside `namespace`.
pub fn connect(namespace: &Namespace, proxy: SocketAddr, target: Target<'_>, timeout: Duration) -> Result<TcpStream> {
    request(namespace, proxy, CONNECT, target, timeout).map(|(stream, _)| stream)
}

/// A UDP association: the control stream, which must stay open, and where datagrams go.
pub fn associate(namespace: &Namespace, proxy: SocketAddr, timeout: Duration) -> Result<(TcpStream, SocketAddr)> {
    let nobody = Target::Address((Ipv4Addr::UNSPECIFIED, 0).into());
    let (stream, relay) = request(namespace, proxy, UDP_ASSOCIATE, nobody, timeout)?;
    let relay = if relay.ip().is_unspecified() {
        SocketAddr::new(proxy.ip(), relay.port())
    } else {
        relay
    };
    Ok((stream, relay))
}

/// A datagram for `target` as a relay takes it (RFC 1928, section 7).
pub fn datagram(target: Target<'_>, payload: &[u8]) -> Result<Vec<u8>> {
    let mut out = vec![0, 0, 0];
    target.write(&mut out)?;
    out.extend_from_slice(payload);
    Ok(out)
}

/// The payload of a datagram that came from a relay about an IPv4 address.
pub fn payload(datagram: &[u8]) -> Option<&[u8]> {
    match datagram.split_at_checked(4)? {
        ([0, 0, 0, 1], rest) => rest.get(6..),
        _ => None,
    }
}

fn request(
    namespace: &Namespace,
    proxy: SocketAddr,
    command: u8,
    target: Target<'_>,
    timeout: Duration,
) -> Result<(TcpStream, SocketAddr)> {
    let mut stream = namespace.connect(proxy, timeout)?;
    stream.set_read_timeout(Some(timeout)).context("setting a timeout")?;
    stream.set_write_timeout(Some(timeout)).context("setting a timeout")?;
    stream.set_nodelay(true).context("setting TCP_NODELAY")?;
    stream.write_all(&[5, 1, 0]).context("greeting the SOCKS5 proxy")?;
    let mut method = [0; 2];
    stream
        .read_exact(&mut method)
        .context("reading the SOCKS5 proxy's greeting")?;
    ensure!(method == [5, 0], "the SOCKS5 proxy wants method {method:?}");
    let mut out = vec![5, command, 0];
    target.write(&mut out)?;
    stream.write_all(&out).context("asking the SOCKS5 proxy")?;
    let mut head = [0; 4];
    stream
        .read_exact(&mut head)
        .context("reading the SOCKS5 proxy's answer")?;
    let [version, reply, _, kind] = head;
    ensure!(version == 5, "the answer is not SOCKS5: {head:?}");
    ensure!(reply == 0, "the SOCKS5 proxy refused {target:?}: {}", reply_text(reply));
    let bound: IpAddr = match kind {
        1 => read_array::<4>(&mut stream)?.into(),
        4 => read_array::<16>(&mut stream)?.into(),
        other => bail!("the SOCKS5 proxy bound an address of type {other}"),
    };
    let port = u16::from_be_bytes(read_array(&mut stream)?);
    Ok((stream, SocketAddr::new(bound, port)))
}

fn read_array<const N: usize>(stream: &mut TcpStream) -> Result<[u8; N]> {
    let mut bytes = [0; N];
    stream
        .read_exact(&mut bytes)
        .context("reading the SOCKS5 proxy's bound address")?;
    Ok(bytes)
}

fn reply_text(reply: u8) -> &'static str {
    match reply {
        1 => "general failure (1)",
        2 => "not allowed by its rules (2)",
        3 => "network unreachable (3)",
        4 => "host unreachable (4)",
        5 => "connection refused (5)",
        6 => "TTL expired (6)",
        7 => "command not supported (7)",
        8 => "address type not supported (8)",
        _ => "an unassigned reply",
    }
}
