//! The inner side: IP packets to and from the kernel through a TUN device.

use std::{io, sync::Arc, time::Duration};

use gotatun::{
    packet::{Ip, Packet, PacketBufPool},
    tun::{IpRecv, IpSend, MtuWatcher},
};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::task::AbortOnDropHandle;
use tun_rs::{AsyncDevice, DeviceBuilder, GROTable, IDEAL_BATCH_SIZE, VIRTIO_NET_HDR_LEN};

use super::Death;

/// Packets between the protocol engine and the kernel; beyond it the engine waits.
const QUEUE_PACKETS: usize = 512;
/// Pause after an error that is not the end, so that one that stays does not eat a core.
const ERROR_PAUSE: Duration = Duration::from_millis(20);

/// An open TUN. The interface goes when the last reference does.
pub(super) struct Tun {
    device: AsyncDevice,
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

/// Packets from the kernel.
pub(super) struct TunReader {
    tun: Arc<Tun>,
    mtu: MtuWatcher,
    death: Death,
    frame: Vec<u8>,
    segments: Vec<Vec<u8>>,
    sizes: Vec<usize>,
}

impl TunReader {
    pub(super) fn new(tun: Arc<Tun>, mtu: watch::Receiver<u16>, death: Death) -> Self {
        Self {
            tun,
            mtu: mtu.into(),
            death,
            frame: vec![0; VIRTIO_NET_HDR_LEN + usize::from(u16::MAX)],
            segments: vec![vec![0; 2048]; IDEAL_BATCH_SIZE],
            sizes: vec![0; IDEAL_BATCH_SIZE],
        }
    }
}

impl IpRecv for TunReader {
    async fn recv<'a>(
        &'a mut self,
        pool: &mut PacketBufPool,
    ) -> io::Result<impl Iterator<Item = Packet<Ip>> + Send + 'a> {
        let count = loop {
            let read = self
                .tun
                .device
                .recv_multiple(&mut self.frame, &mut self.segments, &mut self.sizes, 0);
            match read.await {
                Ok(count) => break count,
                Err(error) if is_gone(&error) => {
                    self.death.report("the interface was deleted".to_owned());
                    return Err(io::Error::from_raw_os_error(libc::EBADFD));
                }
                Err(error) => {
                    tracing::debug!(%error, "reading the TUN");
                    tokio::time::sleep(ERROR_PAUSE).await;
                }
            }
        };
        let pool = pool.clone();
        Ok(self
            .segments
            .iter()
            .zip(&self.sizes)
            .take(count)
            .filter_map(move |(segment, size)| {
                let segment = segment.get(..*size)?;
                let mut packet = pool.get();
                packet.buf_mut().clear();
                packet.buf_mut().extend_from_slice(segment);
                packet.try_into_ip().ok()
            }))
    }

    fn mtu(&self) -> MtuWatcher {
        self.mtu.clone()
    }
}

/// Packets to the kernel. They are queued, and a task writes what has gathered: the engine hands them over one
/// by one, the kernel takes a run of TCP segments in one write.
pub(super) struct TunWriter {
    queue: mpsc::Sender<Packet<Ip>>,
    _task: AbortOnDropHandle<()>,
}

impl TunWriter {
    pub(super) fn spawn(tun: Arc<Tun>, death: Death) -> Self {
        let (queue, packets) = mpsc::channel(QUEUE_PACKETS);
        Self {
            queue,
            _task: AbortOnDropHandle::new(tokio::spawn(write_packets(tun, packets, death))),
        }
    }
}

impl IpSend for TunWriter {
    async fn send(&mut self, packet: Packet<Ip>) -> io::Result<()> {
        self.queue
            .send(packet)
            .await
            .map_err(|_closed| io::Error::from_raw_os_error(libc::EBADFD))
    }
}

async fn write_packets(tun: Arc<Tun>, mut queue: mpsc::Receiver<Packet<Ip>>, death: Death) {
    let mut table = GROTable::default();
    let mut packets = Vec::new();
    let mut frames: Vec<Vec<u8>> = Vec::new();
    let mut spare: Vec<Vec<u8>> = Vec::new();
    while queue.recv_many(&mut packets, IDEAL_BATCH_SIZE).await > 0 {
        for packet in packets.drain(..) {
            let mut frame = spare.pop().unwrap_or_default();
            frame.clear();
            frame.resize(VIRTIO_NET_HDR_LEN, 0);
            frame.extend_from_slice(&packet.into_bytes());
            frames.push(frame);
        }
        if let Err(error) = tun
            .device
            .send_multiple(&mut table, &mut frames, VIRTIO_NET_HDR_LEN)
            .await
        {
            if is_gone(&error) {
                death.report("the interface was deleted".to_owned());
                return;
            }
            // The link is down, or the packet is none: the kernel dropped it, as a network would.
            tracing::trace!(%error, "writing the TUN");
        }
        spare.append(&mut frames);
    }
}
