//! Cuts what the kernel hands over with an offloading TUN, a packet of up to 64 KB, into packets that fit the
//! link (Linux, `include/uapi/linux/virtio_net.h`; `net/ipv4/tcp_offload.c` does the same for the kernel's drivers).

use bytes::BytesMut;
use tun_rs::{VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6, VIRTIO_NET_HDR_GSO_UDP_L4, VirtioNetHdr, checksum};

use super::headers::{Headers, Transport, long, put_long, put_word, word};

const NEEDS_CHECKSUM: u8 = 1;
const GSO_NONE: u8 = 0;
/// Beside a TCP type: the first segment keeps CWR alone. All of ours do.
const GSO_ECN: u8 = 0x80;
const TCP_CWR: u8 = 0x80;
const TCP_FIN_PSH: u8 = 0x09;
/// The engine pads packets to a multiple of this; room for it spares another allocation.
const PADDING: usize = 16;

/// Hands the packets in `frame` to `take`, in order; `None` when header and frame contradict each other or `take` wants
/// no more.
pub(super) fn split(
    header: &VirtioNetHdr,
    frame: &mut [u8],
    mut take: impl FnMut(BytesMut) -> Option<()>,
) -> Option<()> {
    let start = usize::from(header.csum_start);
    let transport = match header.gso_type & !GSO_ECN {
        GSO_NONE => {
            if header.flags & NEEDS_CHECKSUM != 0 {
                finish_checksum(frame, start, usize::from(header.csum_offset))?;
            }
            return take(BytesMut::from(&*frame));
        }
        VIRTIO_NET_HDR_GSO_TCPV4 | VIRTIO_NET_HDR_GSO_TCPV6 => Transport::Tcp,
        VIRTIO_NET_HDR_GSO_UDP_L4 => Transport::Udp,
        _ => return None,
    };
    let headers = Headers::at(frame, frame.first()? >> 4 == 6, transport, start)?;
    let segment = usize::from(header.gso_size);
    let (head, payload) = frame.split_at_checked(headers.bytes)?;
    if segment == 0 {
        return None;
    }
    let count = payload.len().div_ceil(segment);
    // One allocation for all: they leave together, so none keeps it for long.
    let mut room = BytesMut::with_capacity(payload.len() + count * (head.len() + PADDING));
    let (mut id, mut sequence, flags_at) = (word(head, 4), long(head, start + 4), start + 13);
    for (number, part) in payload.chunks(segment).enumerate() {
        let length = head.len() + part.len();
        room.extend_from_slice(head);
        room.extend_from_slice(part);
        room.resize(length.next_multiple_of(PADDING), 0);
        let mut packet = room.split();
        packet.truncate(length);
        if !headers.v6 {
            put_word(&mut packet, 4, id);
            id = id.wrapping_add(1);
        }
        if transport == Transport::Tcp {
            put_long(&mut packet, start + 4, sequence);
            sequence = sequence.wrapping_add(u32::from(header.gso_size));
            let flags = packet.get_mut(flags_at)?;
            if number > 0 {
                *flags &= !TCP_CWR;
            }
            if number + 1 < count {
                *flags &= !TCP_FIN_PSH;
            }
        }
        headers.set_length(&mut packet, length);
        headers.set_checksum(&mut packet);
        take(packet)?;
    }
    Some(())
}

/// The kernel left the pseudo-header's sum in the field; the rest is ours.
fn finish_checksum(frame: &mut [u8], start: usize, offset: usize) -> Option<()> {
    let at = start.checked_add(offset)?;
    let partial = u64::from(word(frame, at));
    frame.get(at..at + 2)?;
    put_word(frame, at, 0);
    let sum = !checksum(frame.get(start..)?, partial);
    put_word(frame, at, if sum == 0 { u16::MAX } else { sum });
    Some(())
}
