//! Non-blocking sockets whose arrivals carry the kernel's time stamp.

use std::{
    io::{self, IoSliceMut},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::AsRawFd,
    time::{Duration, SystemTime},
};

use nix::sys::{
    socket::{ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, setsockopt, sockopt::ReceiveTimestampns},
    time::TimeSpec,
};
use socket2::{Domain, Protocol, SockRef, Socket as Raw, Type};
use tokio::{io::Interest, net::UdpSocket};

/// Room for the largest reply (an IPv4 header with options and our ICMP echo) and one more byte, so that a longer packet is
/// seen to be longer.
const ROOM: usize = 96;
/// Packets taken at one waking.
const BATCH: usize = 64;

/// What a socket is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// UDP.
    Echo,
    /// ICMP. A raw socket hands out IPv4 headers.
    Icmp {
        /// Whether it is a raw one.
        raw: bool,
    },
}

/// One packet.
pub(super) struct Received {
    pub(super) kind: Kind,
    pub(super) from: SocketAddr,
    pub(super) at: SystemTime,
    bytes: [u8; ROOM],
    length: usize,
}

impl Received {
    pub(super) fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or_default()
    }
}

/// A socket of one kind and family.
pub(super) struct Socket {
    /// Of any kind: only reading, sending and waiting are used, which every datagram socket has.
    inner: UdpSocket,
    pub(super) kind: Kind,
    pub(super) v6: bool,
}

impl Socket {
    /// UDP on any port, or ICMP by a ping socket where `net.ipv4.ping_group_range` allows, else by a raw one.
    pub(super) fn open(icmp: bool, v6: bool, fwmark: u32) -> io::Result<Self> {
        let domain = if v6 { Domain::IPV6 } else { Domain::IPV4 };
        let protocol = match (icmp, v6) {
            (false, _) => Protocol::UDP,
            (true, false) => Protocol::ICMPV4,
            (true, true) => Protocol::ICMPV6,
        };
        let (socket, kind) = match (Raw::new(domain, Type::DGRAM, Some(protocol)), icmp) {
            (Ok(socket), false) => (socket, Kind::Echo),
            (Ok(socket), true) => (socket, Kind::Icmp { raw: false }),
            (Err(error), false) => return Err(error),
            (Err(_), true) => (Raw::new(domain, Type::RAW, Some(protocol))?, Kind::Icmp { raw: true }),
        };
        socket.set_nonblocking(true)?;
        if let Err(error) = socket.set_mark(fwmark) {
            // Without CAP_NET_ADMIN no firewall of ours stands either.
            tracing::debug!(%error, "probe packets go unmarked");
        }
        setsockopt(&socket, ReceiveTimestampns, &true)?;
        // A raw socket has no such option: ICMPv6 is IPv6 by itself.
        if v6 && kind == Kind::Echo {
            socket.set_only_v6(true)?;
        }
        let any = if v6 {
            IpAddr::V6(Ipv6Addr::UNSPECIFIED)
        } else {
            IpAddr::V4(Ipv4Addr::UNSPECIFIED)
        };
        socket.bind(&SocketAddr::new(any, 0).into())?;
        Ok(Self {
            inner: UdpSocket::from_std(socket.into())?,
            kind,
            v6,
        })
    }

    /// Sends at once or not at all.
    pub(super) fn send(&self, packet: &[u8], to: SocketAddr) -> io::Result<()> {
        SockRef::from(&self.inner).send_to(packet, &to.into()).map(|_| ())
    }

    /// Waits for packets and takes what there is.
    pub(super) async fn receive(&self) -> io::Result<Vec<Received>> {
        self.inner.readable().await?;
        let mut packets = Vec::new();
        while packets.len() < BATCH {
            match self.inner.try_io(Interest::READABLE, || self.take()) {
                Ok(packet) => packets.extend(packet),
                // Nothing more; or an ICMP error of an earlier packet, whose candidate simply does not answer.
                Err(_) => break,
            }
        }
        Ok(packets)
    }

    fn take(&self) -> io::Result<Option<Received>> {
        let mut bytes = [0; ROOM];
        let mut control = nix::cmsg_space!(TimeSpec);
        let (length, from, at) = {
            let mut room = [IoSliceMut::new(&mut bytes)];
            let message = recvmsg::<SockaddrStorage>(
                self.inner.as_raw_fd(),
                &mut room,
                Some(&mut control),
                MsgFlags::MSG_DONTWAIT,
            )?;
            let at = message
                .cmsgs()?
                .find_map(|control| stamp(&control))
                .unwrap_or_else(SystemTime::now);
            (message.bytes, message.address.as_ref().and_then(address), at)
        };
        Ok(from.map(|from| Received {
            kind: self.kind,
            from,
            at,
            bytes,
            length,
        }))
    }
}

#[expect(clippy::wildcard_enum_match_arm, reason = "only time stamps are asked for")]
fn stamp(control: &ControlMessageOwned) -> Option<SystemTime> {
    match control {
        ControlMessageOwned::ScmTimestampns(at) => {
            let (seconds, nanoseconds) = (u64::try_from(at.tv_sec()).ok()?, u32::try_from(at.tv_nsec()).ok()?);
            SystemTime::UNIX_EPOCH.checked_add(Duration::new(seconds, nanoseconds))
        }
        _ => None,
    }
}

fn address(storage: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = storage
        .as_sockaddr_in()
        .map(|v4| SocketAddr::new(v4.ip().into(), v4.port()));
    v4.or_else(|| {
        storage
            .as_sockaddr_in6()
            .map(|v6| SocketAddr::new(v6.ip().into(), v6.port()))
    })
}
