//! The inner side: IP packets to and from the kernel through a TUN device.

use std::{
    io::{self, IoSlice},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use gotatun::{
    packet::{Ip, Packet, PacketBufPool},
    tun::{IpRecv, IpSend, MtuWatcher},
};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::task::AbortOnDropHandle;
use tun_rs::{AsyncDevice, DeviceBuilder, VIRTIO_NET_HDR_LEN, VirtioNetHdr};

use super::{Death, join::Joiner, ping::Ping, split::split};

/// Packets between the protocol engine and the kernel; beyond it the engine waits.
const QUEUE_PACKETS: usize = 512;
/// Packets of one write round.
const BATCH_PACKETS: usize = 128;
/// Pause after an error that is not the end, so that one that stays does not eat a core.
const ERROR_PAUSE: Duration = Duration::from_millis(20);

/// An open TUN. The interface goes when the last reference does.
pub(super) struct Tun {
    device: AsyncDevice,
    /// Frames begin with a virtio header and may hold many packets.
    offload: bool,
    /// Dropped after the descriptor: tells [`super::UserspaceTunnel`] that the interface is gone.
    _closed: oneshot::Sender<()>,
}

/// Makes the interface, down. The receiver resolves (to an error) when it has been closed.
pub(super) fn open(interface: &str, mtu_bytes: u16, offload: bool) -> io::Result<(Arc<Tun>, oneshot::Receiver<()>)> {
    let (closed, seen) = oneshot::channel();
    let device = DeviceBuilder::new()
        .name(interface)
        .mtu(mtu_bytes)
        .offload(offload)
        .enable(false)
        .build_async()?;
    Ok((
        Arc::new(Tun {
            device,
            offload,
            _closed: closed,
        }),
        seen,
    ))
}

impl Tun {
    /// The interface's index.
    pub(super) fn index(&self) -> io::Result<u32> {
        self.device.if_index()
    }
}

/// Whether the interface behind the descriptor is gone for good (drivers/net/tun.c: `tun_get` fails).
fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EBADF | libc::EBADFD | libc::EFAULT | libc::ENODEV)
    )
}

/// The number of no engine.
pub(super) const NOBODY: u64 = 0;

/// Says when one of the engines that share an interface may read from it.
pub(super) struct Turn {
    number: u64,
    reads: watch::Receiver<u64>,
    /// Packets to send while it is another's turn.
    injected: mpsc::Receiver<Packet<Ip>>,
}

impl Turn {
    /// Of engine `number`; `reads` names the one that reads.
    pub(super) fn new(number: u64, reads: watch::Receiver<u64>, injected: mpsc::Receiver<Packet<Ip>>) -> Self {
        Self {
            number,
            reads,
            injected,
        }
    }

    /// Completes when it is our turn, or with a packet that is to be sent before.
    async fn come(&mut self) -> Option<Packet<Ip>> {
        while *self.reads.borrow_and_update() != self.number {
            tokio::select! {
                Ok(()) = self.reads.changed() => {}
                Some(packet) = self.injected.recv() => return Some(packet),
                // The tunnel is being closed.
                else => std::future::pending().await,
            }
        }
        None
    }

    /// Completes when it may be our turn no more.
    async fn go(&mut self) {
        if self.reads.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

/// Packets from the kernel.
pub(super) struct TunReader {
    tun: Arc<Tun>,
    turn: Turn,
    mtu: MtuWatcher,
    death: Death,
    frame: Vec<u8>,
    packets: Vec<Packet<Ip>>,
}

impl TunReader {
    pub(super) fn new(tun: Arc<Tun>, reads: Turn, mtu: watch::Receiver<u16>, death: Death) -> Self {
        let frame = vec![0; VIRTIO_NET_HDR_LEN + usize::from(u16::MAX)];
        Self {
            tun,
            turn: reads,
            mtu: mtu.into(),
            death,
            frame,
            packets: Vec::new(),
        }
    }

    /// Reads one frame and puts its packets into `self.packets`; `None` when it was none.
    async fn read(&mut self) -> io::Result<Option<()>> {
        if let Some(packet) = self.turn.come().await {
            self.packets.push(packet);
            return Ok(Some(()));
        }
        let length = tokio::select! {
            biased;
            () = self.turn.go() => return Ok(Some(())),
            length = self.tun.device.recv(&mut self.frame) => length?,
        };
        let Some(frame) = self.frame.get_mut(..length) else {
            return Ok(None);
        };
        let packets = &mut self.packets;
        let take = |bytes| {
            packets.push(Packet::from_bytes(bytes).try_into_ip().ok()?);
            Some(())
        };
        if !self.tun.offload {
            return Ok(split(&VirtioNetHdr::default(), frame, take));
        }
        let Some((header, frame)) = frame.split_at_mut_checked(VIRTIO_NET_HDR_LEN) else {
            return Ok(None);
        };
        Ok(split(&VirtioNetHdr::decode(header)?, frame, take))
    }
}

impl IpRecv for TunReader {
    async fn recv<'a>(
        &'a mut self,
        _pool: &mut PacketBufPool,
    ) -> io::Result<impl Iterator<Item = Packet<Ip>> + Send + 'a> {
        self.packets.clear();
        while self.packets.is_empty() {
            match self.read().await {
                Ok(Some(())) => {}
                Ok(None) => tracing::trace!("the TUN handed over what is no packet"),
                Err(error) if is_gone(&error) => {
                    self.death.report("the interface was deleted".to_owned());
                    return Err(io::Error::from_raw_os_error(libc::EBADFD));
                }
                Err(error) => {
                    tracing::debug!(%error, "reading the TUN");
                    tokio::time::sleep(ERROR_PAUSE).await;
                }
            }
        }
        Ok(self.packets.drain(..))
    }

    fn mtu(&self) -> MtuWatcher {
        self.mtu.clone()
    }
}

/// The pings that an engine sends of its own: their answers are not the kernel's.
#[derive(Default)]
pub(super) struct Watched {
    /// So that the usual packet costs one load.
    active: AtomicBool,
    pings: Mutex<Option<(Ping, watch::Sender<bool>)>>,
}

impl Watched {
    /// Waits for answers to these from now on. The receiver sees true at the first.
    pub(super) fn expect(&self, ping: Ping) -> watch::Receiver<bool> {
        let (answered, seen) = watch::channel(false);
        *self.pings.lock().unwrap_or_else(PoisonError::into_inner) = Some((ping, answered));
        self.active.store(true, Ordering::Release);
        seen
    }

    /// Leaves everything to the kernel again.
    pub(super) fn forget(&self) {
        self.active.store(false, Ordering::Release);
    }

    /// Whether a packet was an answer, and ours.
    fn takes(&self, packet: &[u8]) -> bool {
        match &*self.pings.lock().unwrap_or_else(PoisonError::into_inner) {
            Some((ping, answered)) if ping.is_answered_by(packet) => {
                answered.send_replace(true);
                true
            }
            Some(_) | None => false,
        }
    }
}

/// Packets to the kernel. They are queued, and a task writes what has gathered: the engine hands them over one
/// by one, the kernel takes a run of TCP segments in one write.
pub(super) struct TunWriter {
    queue: mpsc::Sender<Packet<Ip>>,
    watched: Arc<Watched>,
    _task: AbortOnDropHandle<()>,
}

impl TunWriter {
    pub(super) fn spawn(tun: Arc<Tun>, watched: Arc<Watched>, death: Death) -> Self {
        let (queue, packets) = mpsc::channel(QUEUE_PACKETS);
        Self {
            queue,
            watched,
            _task: AbortOnDropHandle::new(tokio::spawn(write_packets(tun, packets, death))),
        }
    }
}

impl IpSend for TunWriter {
    async fn send(&mut self, packet: Packet<Ip>) -> io::Result<()> {
        let packet = if self.watched.active.load(Ordering::Acquire) {
            let bytes = packet.into_bytes();
            if self.watched.takes(&bytes) {
                return Ok(());
            }
            bytes.try_into_ip().map_err(io::Error::other)?
        } else {
            packet
        };
        self.queue
            .send(packet)
            .await
            .map_err(|_closed| io::Error::from_raw_os_error(libc::EBADFD))
    }
}

async fn write_packets(tun: Arc<Tun>, mut queue: mpsc::Receiver<Packet<Ip>>, death: Death) {
    let mut joiner = Joiner::new(tun.offload && tun.device.udp_gso());
    let mut received = Vec::with_capacity(BATCH_PACKETS);
    let mut packets: Vec<Packet> = Vec::with_capacity(BATCH_PACKETS);
    while queue.recv_many(&mut received, BATCH_PACKETS).await > 0 {
        packets.extend(received.drain(..).map(Packet::into_bytes));
        if let Err(error) = write_batch(&tun, &packets, &mut joiner).await {
            death.report(format!("the interface was deleted: {error}"));
            return;
        }
        packets.clear();
    }
}

/// Fails only when the interface is gone. What the kernel refuses otherwise (the link is down, no such packet) is
/// lost, as in a network.
async fn write_batch(tun: &Tun, packets: &[Packet], joiner: &mut Joiner) -> io::Result<()> {
    let check = |written: io::Result<usize>| match written {
        Err(error) if is_gone(&error) => Err(error),
        Err(error) => {
            tracing::trace!(%error, "writing the TUN");
            Ok(())
        }
        Ok(_) => Ok(()),
    };
    if !tun.offload {
        for packet in packets {
            check(tun.device.send(packet).await)?;
        }
        return Ok(());
    }
    for run in joiner.plan(packets) {
        let mut members = run.members.iter().filter_map(|index| packets.get(*index));
        let Some(first) = members.clone().next() else { continue };
        let lead = run.lead(first, members.next_back().unwrap_or(first));
        let mut slices = [IoSlice::new(&[]); BATCH_PACKETS + 1];
        let payloads = run
            .members
            .iter()
            .filter_map(|index| packets.get(*index)?.get(lead.skip..));
        let parts = std::iter::once(lead.bytes()).chain(payloads);
        for (slice, part) in slices.iter_mut().zip(parts) {
            *slice = IoSlice::new(part);
        }
        let slices = slices.get(..=run.members.len()).unwrap_or_default();
        check(tun.device.send_vectored(slices).await)?;
    }
    Ok(())
}
