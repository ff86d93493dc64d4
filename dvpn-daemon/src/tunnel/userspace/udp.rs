//! The outer side: WireGuard messages to and from the network through one dual-stack UDP socket.

use std::{
    io::{self, IoSlice, IoSliceMut},
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::AsRawFd as _,
    sync::{
        Arc, Weak,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::BytesMut;
use gotatun::{
    packet::{Packet, PacketBufPool},
    udp::{UdpRecv, UdpSend, UdpTransportFactory, UdpTransportFactoryParams},
};
use nix::{
    cmsg_space,
    errno::Errno,
    sys::socket::{
        ControlMessage, ControlMessageOwned, MsgFlags, MultiHeaders, SockaddrStorage, recvmmsg, sendmsg, setsockopt,
        sockopt,
    },
};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::{io::Interest, net::UdpSocket};

use super::{Death, confirm::Answers};

/// Asked of the kernel for each direction, as the kernel's and Go's WireGuard do.
const SOCKET_BUFFER_BYTES: usize = 7 << 20;
/// Datagrams in one `UDP_SEGMENT` message: `UDP_MAX_SEGMENTS` in include/linux/udp.h before 6.9.
const MAX_SEGMENTS: usize = 64;
/// Bytes in one message: 65,535 less IPv6's and UDP's headers, and room for options.
const MAX_MESSAGE_BYTES: usize = 65_000;
/// Messages taken from the socket at once.
const RECEIVE_MESSAGES: usize = 16;
/// A received message at its longest: what `UDP_GRO` joins is at most an IP packet.
const RECEIVE_BYTES: usize = 1 << 16;
/// How long the previous socket may take to close before its port is called taken.
const CLOSE_PATIENCE: Duration = Duration::from_millis(500);
const CLOSE_POLL: Duration = Duration::from_millis(5);
/// Pause after an error that is not the end, so that one that stays does not eat a core.
const ERROR_PAUSE: Duration = Duration::from_millis(20);

/// Binds the sockets of one device, one after the other.
pub(super) struct Factory {
    offload: bool,
    death: Death,
    answers: Answers,
    previous: Weak<UdpSocket>,
}

impl Factory {
    pub(super) fn new(offload: bool, death: Death, answers: Answers) -> Self {
        Self {
            offload,
            death,
            answers,
            previous: Weak::new(),
        }
    }
}

impl UdpTransportFactory for Factory {
    type Send = Sender;
    type Recv = Receiver;

    async fn bind(&mut self, params: &UdpTransportFactoryParams) -> io::Result<(Sender, Receiver)> {
        // The engine's tasks let go of the previous socket a moment after they are told to; until then a fixed
        // port is taken.
        let waiting = tokio::time::Instant::now();
        while self.previous.strong_count() > 0 && waiting.elapsed() < CLOSE_PATIENCE {
            tokio::time::sleep(CLOSE_POLL).await;
        }
        let v6 = open(SocketAddr::from((Ipv6Addr::UNSPECIFIED, params.port)), params.fwmark);
        let socket = match v6 {
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL)) => {
                tracing::info!("no IPv6 on this machine: the WireGuard socket is IPv4 only");
                open(SocketAddr::from((Ipv4Addr::UNSPECIFIED, params.port)), params.fwmark)?
            }
            other => other?,
        };
        let socket = Arc::new(UdpSocket::from_std(socket.into())?);
        if self.offload
            && let Err(error) = setsockopt(&socket, sockopt::UdpGroSegment, &true)
        {
            tracing::info!(%error, "no UDP_GRO on this kernel: datagrams come in one by one");
        }
        self.previous = Arc::downgrade(&socket);
        let limit = if self.offload { usize::MAX } else { 0 };
        let sender = Sender {
            socket: Arc::clone(&socket),
            largest_segment: Arc::new(AtomicUsize::new(limit)),
            answers: self.answers.clone(),
        };
        Ok((
            sender,
            Receiver {
                socket,
                death: self.death.clone(),
                answers: self.answers.clone(),
            },
        ))
    }
}

fn open(address: SocketAddr, fwmark: Option<u32>) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_nonblocking(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    // Before bind: no packet may ever leave or arrive unmarked.
    if let Some(mark) = fwmark.filter(|mark| *mark != 0) {
        socket.set_mark(mark)?;
    }
    // Beyond the administrator's limit with CAP_NET_ADMIN, else up to it; WireGuard works with any.
    if setsockopt(&socket, sockopt::RcvBufForce, &SOCKET_BUFFER_BYTES).is_err() {
        socket.set_recv_buffer_size(SOCKET_BUFFER_BYTES)?;
    }
    if setsockopt(&socket, sockopt::SndBufForce, &SOCKET_BUFFER_BYTES).is_err() {
        socket.set_send_buffer_size(SOCKET_BUFFER_BYTES)?;
    }
    socket.bind(&address.into())?;
    Ok(socket)
}

/// Datagrams to the network.
#[derive(Clone)]
pub(super) struct Sender {
    socket: Arc<UdpSocket>,
    /// Longer datagrams go one by one. Shrinks when the kernel refuses to segment, until the next bind.
    largest_segment: Arc<AtomicUsize>,
    answers: Answers,
}

impl Sender {
    /// Sends a run as one message for the kernel to cut; `Ok(false)` when it will not and each datagram has to
    /// go by itself.
    async fn send_run(&self, run: &[(Packet, SocketAddr)]) -> io::Result<bool> {
        let Some((first, destination)) = run.first() else {
            return Ok(true);
        };
        let Ok(segment) = u16::try_from(first.len()) else {
            return Ok(false);
        };
        let destination = SockaddrStorage::from(*destination);
        let mut slices = [IoSlice::new(&[]); MAX_SEGMENTS];
        for (slice, (packet, _)) in slices.iter_mut().zip(run) {
            *slice = IoSlice::new(packet);
        }
        let slices = slices.get(..run.len()).unwrap_or_default();
        let sent = self.socket.async_io(Interest::WRITABLE, || {
            let control = [ControlMessage::UdpGsoSegments(&segment)];
            sendmsg(
                self.socket.as_raw_fd(),
                slices,
                &control,
                MsgFlags::MSG_DONTWAIT,
                Some(&destination),
            )
            .map_err(io::Error::from)
        });
        match sent.await {
            Ok(_) => Ok(true),
            Err(error) => match error.raw_os_error() {
                // The device cannot checksum what it would have to cut (net/ipv4/udp.c: udp_send_skb).
                Some(libc::EIO | libc::EOPNOTSUPP | libc::ENOPROTOOPT) => {
                    self.shrink(0, &error);
                    Ok(false)
                }
                // A segment would not fit the path.
                Some(libc::EINVAL | libc::EMSGSIZE) => {
                    self.shrink(usize::from(segment) - 1, &error);
                    Ok(false)
                }
                _ => Err(error),
            },
        }
    }

    fn shrink(&self, to: usize, error: &io::Error) {
        let before = self.largest_segment.fetch_min(to, Ordering::Relaxed);
        if to < before {
            tracing::info!(%error, bytes = to, "the network device does not segment UDP: larger datagrams go one by one");
        }
    }
}

/// How many packets from the front form one message: one destination, equal length, only the last may be
/// shorter.
fn run_length(packets: &[(Packet, SocketAddr)], largest_segment: usize) -> usize {
    let Some((first, destination)) = packets.first() else {
        return 0;
    };
    let (segment, mut total) = (first.len(), first.len());
    if segment == 0 || segment > largest_segment {
        return 1;
    }
    let mut count = 1;
    for (packet, to) in packets.iter().skip(1).take(MAX_SEGMENTS - 1) {
        total += packet.len();
        if to != destination || packet.is_empty() || packet.len() > segment || total > MAX_MESSAGE_BYTES {
            break;
        }
        count += 1;
        if packet.len() < segment {
            break;
        }
    }
    count
}

impl UdpSend for Sender {
    type SendManyBuf = ();

    async fn send_to(&self, packet: Packet, destination: SocketAddr) -> io::Result<()> {
        self.answers.sent(&packet, destination);
        self.socket.send_to(&packet, destination).await.map(drop)
    }

    fn max_number_of_packets_to_send(&self) -> usize {
        2 * MAX_SEGMENTS
    }

    /// Sends all it can: what cannot reach one peer must not stop what goes to another. Reports the last error.
    async fn send_many_to(&self, (): &mut (), packets: &mut Vec<(Packet, SocketAddr)>) -> io::Result<()> {
        let mut result = Ok(());
        let mut rest = packets.as_slice();
        for (packet, to) in rest {
            self.answers.sent(packet, *to);
        }
        while !rest.is_empty() {
            let count = run_length(rest, self.largest_segment.load(Ordering::Relaxed));
            let (run, after) = rest.split_at_checked(count).unwrap_or((rest, &[]));
            rest = after;
            let sent = if count > 1 { self.send_run(run).await } else { Ok(false) };
            match sent {
                Ok(true) => {}
                Ok(false) => {
                    for (packet, destination) in run {
                        if let Err(error) = self.socket.send_to(packet, *destination).await {
                            result = Err(error);
                        }
                    }
                }
                Err(error) => result = Err(error),
            }
        }
        packets.clear();
        result
    }

    fn local_addr(&self) -> io::Result<Option<SocketAddr>> {
        self.socket.local_addr().map(Some)
    }

    fn set_fwmark(&self, mark: u32) -> io::Result<()> {
        Ok(setsockopt(&self.socket, sockopt::Mark, &mark)?)
    }
}

/// Datagrams from the network.
pub(super) struct Receiver {
    socket: Arc<UdpSocket>,
    death: Death,
    answers: Answers,
}

/// What [`Receiver`] reads into; the pages of a message that never comes are never touched.
pub(super) struct ReceiveBuffer(Vec<u8>);

impl Default for ReceiveBuffer {
    fn default() -> Self {
        Self(vec![0; RECEIVE_MESSAGES * RECEIVE_BYTES])
    }
}

impl UdpRecv for Receiver {
    type RecvManyBuf = ReceiveBuffer;

    async fn recv_from(&mut self, _pool: &mut PacketBufPool) -> io::Result<(Packet, SocketAddr)> {
        let mut bytes = vec![0; RECEIVE_BYTES];
        let (length, source) = self.socket.recv_from(&mut bytes).await?;
        let datagram = bytes.get(..length).unwrap_or_default();
        self.answers.received(datagram);
        Ok((copied(datagram), canonical(source)))
    }

    async fn recv_many_from(
        &mut self,
        buffer: &mut ReceiveBuffer,
        _pool: &mut PacketBufPool,
        packets: &mut Vec<(Packet, SocketAddr)>,
    ) -> io::Result<()> {
        loop {
            let received = self.socket.async_io(Interest::READABLE, || {
                receive(self.socket.as_raw_fd(), &mut buffer.0, packets).map_err(io::Error::from)
            });
            match received.await {
                Ok(()) => {
                    for (packet, _) in packets.iter() {
                        self.answers.received(packet);
                    }
                    return Ok(());
                }
                Err(error) if matches!(error.raw_os_error(), Some(libc::EBADF | libc::ENOTSOCK)) => {
                    self.death.report(format!("the WireGuard socket died: {error}"));
                    return Err(error);
                }
                Err(error) => {
                    tracing::debug!(%error, "receiving WireGuard messages");
                    tokio::time::sleep(ERROR_PAUSE).await;
                }
            }
        }
    }
}

fn receive(fd: i32, buffer: &mut [u8], packets: &mut Vec<(Packet, SocketAddr)>) -> Result<(), Errno> {
    let mut headers = MultiHeaders::<SockaddrStorage>::preallocate(RECEIVE_MESSAGES, Some(cmsg_space!(i32)));
    let mut slices: Vec<[IoSliceMut; 1]> = buffer
        .chunks_exact_mut(RECEIVE_BYTES)
        .map(|chunk| [IoSliceMut::new(chunk)])
        .collect();
    for message in recvmmsg(fd, &mut headers, &mut slices, MsgFlags::MSG_DONTWAIT, None)? {
        let Some(bytes) = message.iovs().next() else { continue };
        let Some(source) = message.address.as_ref().and_then(socket_address) else {
            continue;
        };
        let Ok(controls) = message.cmsgs() else { continue };
        let mut segment = bytes.len();
        for control in controls {
            if let ControlMessageOwned::UdpGroSegments(joined) = control {
                segment = usize::try_from(joined).unwrap_or_default().clamp(1, segment);
            }
        }
        packets.extend(bytes.chunks(segment).map(|datagram| (copied(datagram), source)));
    }
    Ok(())
}

fn copied(bytes: &[u8]) -> Packet {
    Packet::from_bytes(BytesMut::from(bytes))
}

fn socket_address(address: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = address.as_sockaddr_in().map(|v4| SocketAddr::from(*v4));
    v4.or_else(|| address.as_sockaddr_in6().map(|v6| canonical((*v6).into())))
}

/// A dual-stack socket sees IPv4 sources as `::ffff:a.b.c.d`.
fn canonical(mut address: SocketAddr) -> SocketAddr {
    address.set_ip(address.ip().to_canonical());
    address
}
