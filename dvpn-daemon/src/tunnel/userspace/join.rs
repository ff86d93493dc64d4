//! Finds, among packets from the network, runs of TCP segments and equal UDP datagrams that the kernel takes as one
//! (what its own receive offload does, `net/ipv4/tcp_offload.c` and `udp_offload.c`). Payloads stay where they are;
//! only the first packet's headers are written anew.
//!
//! Checksums of joined packets are not verified: the message's authenticator was, and the kernel's WireGuard
//! takes that as proof too (drivers/net/wireguard/receive.c).

use tun_rs::{
    VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6, VIRTIO_NET_HDR_GSO_UDP_L4, VIRTIO_NET_HDR_LEN, VirtioNetHdr,
};

use super::headers::{Headers, MAX_HEADER_BYTES, Transport, long, word};

const NEEDS_CHECKSUM: u8 = 1;
const TCP_ACK: u8 = 0x10;
const TCP_PSH: u8 = 0x08;
const TCP_ECE: u8 = 0x40;
/// The longest IP packet.
const MAX_BYTES: usize = u16::MAX as usize;
/// How many runs back a packet looks for its flow; beyond, it begins a run of its own.
const LOOK_BACK: usize = 16;

/// Packets that go to the kernel in one write.
#[derive(Debug, Default)]
pub(super) struct Run {
    /// Indices into the batch, in order.
    pub(super) members: Vec<usize>,
    /// Headers of the first, unless it stays alone whatever follows.
    headers: Option<Headers>,
    /// Payload of each member but the last, in bytes.
    segment: usize,
    /// All of it so far, in bytes.
    length: usize,
    /// Of the byte after the last.
    next_sequence: u32,
    closed: bool,
}

/// A run's virtio header and, when it has several members, the headers that replace the first one's.
pub(super) struct Lead {
    bytes: [u8; VIRTIO_NET_HDR_LEN + MAX_HEADER_BYTES],
    length: usize,
    /// How much of every member the lead stands for.
    pub(super) skip: usize,
}

impl Lead {
    pub(super) fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or_default()
    }
}

/// Plans the writes of a batch. Packets of one flow keep their order.
pub(super) struct Joiner {
    /// Whether the kernel cuts UDP again (since 6.2).
    udp: bool,
    runs: Vec<Run>,
    used: usize,
}

impl Joiner {
    pub(super) fn new(udp: bool) -> Self {
        Self {
            udp,
            runs: Vec::new(),
            used: 0,
        }
    }

    /// The runs of `packets`.
    pub(super) fn plan(&mut self, packets: &[impl AsRef<[u8]>]) -> &[Run] {
        self.used = 0;
        for (index, packet) in packets.iter().map(AsRef::as_ref).enumerate() {
            let headers = Headers::parse(packet).filter(|headers| self.udp || headers.transport == Transport::Tcp);
            let Some(headers) = headers else {
                self.begin(index, None, packet);
                continue;
            };
            let from = self.used.saturating_sub(LOOK_BACK);
            let mut joined = false;
            for run in self.runs.get_mut(from..self.used).unwrap_or_default().iter_mut().rev() {
                let Some(of_first) = run.headers else { continue };
                let Some(first) = run.members.first().and_then(|first| packets.get(*first)) else {
                    continue;
                };
                let first = first.as_ref();
                if (of_first.v6, of_first.transport) != (headers.v6, headers.transport)
                    || !same_flow(headers, first, packet)
                {
                    continue;
                }
                joined = !run.closed && of_first == headers && continues(run, headers, first, packet);
                if joined {
                    run.push(index, headers, packet);
                }
                break;
            }
            if !joined {
                self.begin(index, Some(headers), packet);
            }
        }
        self.runs.get(..self.used).unwrap_or_default()
    }

    fn begin(&mut self, index: usize, headers: Option<Headers>, packet: &[u8]) {
        if self.used == self.runs.len() {
            self.runs.push(Run::default());
        }
        let Some(run) = self.runs.get_mut(self.used) else {
            return;
        };
        self.used += 1;
        run.members.clear();
        run.members.push(index);
        run.headers = headers;
        run.length = packet.len();
        if let Some(headers) = headers {
            run.segment = packet.len() - headers.bytes;
            run.next_sequence = after(headers, packet);
            run.closed = !joinable(headers, packet) || ends(headers, packet);
        } else {
            run.closed = true;
        }
    }
}

impl Run {
    fn push(&mut self, index: usize, headers: Headers, packet: &[u8]) {
        let payload = packet.len() - headers.bytes;
        self.members.push(index);
        self.length += payload;
        self.next_sequence = after(headers, packet);
        self.closed = payload < self.segment || ends(headers, packet);
    }

    /// What goes before the payloads.
    pub(super) fn lead(&self, first: &[u8], last: &[u8]) -> Lead {
        let mut lead = Lead {
            bytes: [0; VIRTIO_NET_HDR_LEN + MAX_HEADER_BYTES],
            length: VIRTIO_NET_HDR_LEN,
            skip: 0,
        };
        let Some(headers) = self.headers.filter(|_| self.members.len() > 1) else {
            return lead;
        };
        let (Some((virtio, rest)), Some(head)) = (
            lead.bytes.split_at_mut_checked(VIRTIO_NET_HDR_LEN),
            first.get(..headers.bytes),
        ) else {
            return lead;
        };
        let Some(copy) = rest.get_mut(..headers.bytes) else {
            return lead;
        };
        copy.copy_from_slice(head);
        headers.set_length(copy, self.length);
        headers.set_partial_checksum(copy, self.length);
        if headers.transport == Transport::Tcp
            && let (Some(flags), Some(of_last)) = (copy.get_mut(headers.ip_bytes + 13), last.get(headers.ip_bytes + 13))
        {
            *flags |= of_last & TCP_PSH;
        }
        let clamp = |bytes: usize| u16::try_from(bytes).unwrap_or(u16::MAX);
        let header = VirtioNetHdr {
            flags: NEEDS_CHECKSUM,
            gso_type: match (headers.transport, headers.v6) {
                (Transport::Tcp, false) => VIRTIO_NET_HDR_GSO_TCPV4,
                (Transport::Tcp, true) => VIRTIO_NET_HDR_GSO_TCPV6,
                (Transport::Udp, _) => VIRTIO_NET_HDR_GSO_UDP_L4,
            },
            hdr_len: clamp(headers.bytes),
            gso_size: clamp(self.segment),
            csum_start: clamp(headers.ip_bytes),
            csum_offset: clamp(headers.checksum_offset()),
        };
        // Cannot fail: the slice has the header's length.
        header.encode(virtio).ok();
        lead.length = VIRTIO_NET_HDR_LEN + headers.bytes;
        lead.skip = headers.bytes;
        lead
    }
}

fn after(headers: Headers, packet: &[u8]) -> u32 {
    long(packet, headers.ip_bytes + 4).wrapping_add(u32::try_from(packet.len() - headers.bytes).unwrap_or(u32::MAX))
}

fn tcp_flags(headers: Headers, packet: &[u8]) -> u8 {
    packet.get(headers.ip_bytes + 13).copied().unwrap_or_default()
}

/// Whether the packet can be part of a run at all.
fn joinable(headers: Headers, packet: &[u8]) -> bool {
    packet.len() > headers.bytes
        && match headers.transport {
            Transport::Tcp => tcp_flags(headers, packet) & !(TCP_PSH | TCP_ECE) == TCP_ACK,
            // Without a checksum it has to stay without; what follows the datagram in its packet is no part of it.
            Transport::Udp => {
                let datagram = packet.len() - headers.ip_bytes;
                word(packet, headers.ip_bytes + 6) != 0 && usize::from(word(packet, headers.ip_bytes + 4)) == datagram
            }
        }
}

/// Whether nothing may follow the packet in its run: the receiver is to be woken.
fn ends(headers: Headers, packet: &[u8]) -> bool {
    headers.transport == Transport::Tcp && tcp_flags(headers, packet) & TCP_PSH != 0
}

fn same_flow(headers: Headers, first: &[u8], packet: &[u8]) -> bool {
    let ports = headers.ip_bytes..headers.ip_bytes + 4;
    headers.addresses(first) == headers.addresses(packet) && first.get(ports.clone()) == packet.get(ports)
}

fn continues(run: &Run, headers: Headers, first: &[u8], packet: &[u8]) -> bool {
    let payload = packet.len() - headers.bytes;
    let same = |range: std::ops::Range<usize>| first.get(range.clone()) == packet.get(range);
    // Traffic class, flow label, don't-fragment, hop limit.
    let same_ip = if headers.v6 {
        same(0..4) && same(7..8)
    } else {
        same(1..2) && same(6..9)
    };
    let at = headers.ip_bytes;
    same_ip
        && joinable(headers, packet)
        && payload <= run.segment
        && run.length + payload <= MAX_BYTES
        && match headers.transport {
            Transport::Tcp => {
                long(packet, at + 4) == run.next_sequence
                    && tcp_flags(headers, first) | TCP_PSH == tcp_flags(headers, packet) | TCP_PSH
                    // Acknowledgement and data offset; window; urgent pointer and options.
                    && same(at + 8..at + 13)
                    && same(at + 14..at + 16)
                    && same(at + 18..headers.bytes)
            }
            Transport::Udp => true,
        }
}

#[cfg(test)]
mod tests {
    use gotatun::packet::Packet;
    use proptest::prelude::*;

    use super::{super::split::split, *};

    /// One super-packet as the kernel hands it over, before its checksum is finished.
    #[derive(Debug, Clone)]
    struct Flow {
        v6: bool,
        tcp: bool,
        port: u16,
        sequence: u32,
        option_words: usize,
        flags: u8,
        segment: u16,
        payload: Vec<u8>,
    }

    impl Flow {
        fn frame(&self) -> (VirtioNetHdr, Vec<u8>) {
            let mut frame = if self.v6 {
                let mut ip = vec![0x60, 1, 2, 3, 0, 0, if self.tcp { 6 } else { 17 }, 64];
                ip.extend([[0xfd; 16], [0xfe; 16]].concat());
                ip
            } else {
                vec![
                    0x45,
                    4,
                    0,
                    0,
                    9,
                    9,
                    0x40,
                    0,
                    64,
                    if self.tcp { 6 } else { 17 },
                    0,
                    0,
                    10,
                    0,
                    0,
                    1,
                    10,
                    0,
                    0,
                    2,
                ]
            };
            let start = frame.len();
            frame.extend(self.port.to_be_bytes());
            frame.extend(443_u16.to_be_bytes());
            if self.tcp {
                frame.extend(self.sequence.to_be_bytes());
                frame.extend(77_u32.to_be_bytes());
                frame.extend([
                    u8::try_from((5 + self.option_words) << 4).unwrap(),
                    self.flags,
                    1,
                    0,
                    0,
                    0,
                    0,
                    0,
                ]);
                frame.extend(vec![1; self.option_words * 4]);
            } else {
                frame.extend([0; 4]);
            }
            frame.extend(&self.payload);
            let header = VirtioNetHdr {
                flags: NEEDS_CHECKSUM,
                gso_type: match (self.tcp, self.v6) {
                    (true, false) => VIRTIO_NET_HDR_GSO_TCPV4,
                    (true, true) => VIRTIO_NET_HDR_GSO_TCPV6,
                    (false, _) => VIRTIO_NET_HDR_GSO_UDP_L4,
                },
                hdr_len: 0,
                gso_size: self.segment,
                csum_start: u16::try_from(start).unwrap(),
                csum_offset: if self.tcp { 16 } else { 6 },
            };
            (header, frame)
        }

        fn packets(&self) -> Vec<Vec<u8>> {
            let (header, mut frame) = self.frame();
            cut(&header, &mut frame)
        }
    }

    fn cut(header: &VirtioNetHdr, frame: &mut [u8]) -> Vec<Vec<u8>> {
        let mut packets = Vec::new();
        let take = |bytes| {
            // As the engine takes them.
            let packet = Packet::from_bytes(bytes).try_into_ip().unwrap();
            packets.push(packet.into_bytes().to_vec());
            Some(())
        };
        split(header, frame, take).unwrap();
        packets
    }

    /// What the kernel would read from the write of `run`.
    fn written(run: &Run, packets: &[Vec<u8>]) -> (VirtioNetHdr, Vec<u8>) {
        let (first, last) = (&packets[run.members[0]], &packets[*run.members.last().unwrap()]);
        let lead = run.lead(first, last);
        let mut bytes = lead.bytes().to_vec();
        for member in &run.members {
            bytes.extend(&packets[*member][lead.skip..]);
        }
        let frame = bytes.split_off(VIRTIO_NET_HDR_LEN);
        (VirtioNetHdr::decode(&bytes).unwrap(), frame)
    }

    /// RFC 1071, the slow way.
    fn plain_sum(bytes: &[u8], start: u32) -> u16 {
        let mut sum = start;
        for pair in bytes.chunks(2) {
            sum += u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
            sum = (sum & 0xffff) + (sum >> 16);
        }
        u16::try_from(sum).unwrap()
    }

    fn assert_checksums(packet: &[u8]) {
        let headers = Headers::parse(packet).unwrap();
        if !headers.v6 {
            assert_eq!(plain_sum(&packet[..20], 0), 0xffff, "IPv4 header");
        }
        let protocol = if headers.transport == Transport::Tcp { 6 } else { 17 };
        let length = u32::try_from(packet.len() - headers.ip_bytes).unwrap();
        let pseudo = u32::from(plain_sum(headers.addresses(packet), protocol + length));
        assert_eq!(plain_sum(&packet[headers.ip_bytes..], pseudo), 0xffff, "transport");
    }

    fn flow() -> impl Strategy<Value = Flow> {
        let payload = prop::collection::vec(any::<u8>(), 1..6000);
        (any::<(bool, bool, u32, bool)>(), 0_usize..=10, 1_u16..1400, payload).prop_map(
            |((v6, tcp, sequence, psh), option_words, segment, payload)| {
                // At most 100 segments.
                let segment = segment.max(u16::try_from(payload.len() / 100 + 1).unwrap());
                let flags = TCP_ACK | if psh { TCP_PSH } else { 0 };
                Flow {
                    v6,
                    tcp,
                    port: 1000,
                    sequence,
                    option_words,
                    flags,
                    segment,
                    payload,
                }
            },
        )
    }

    proptest! {
        #[test]
        fn what_is_cut_is_whole_and_joins_to_what_it_was(flow in flow()) {
            let packets = flow.packets();
            let (header, frame) = flow.frame();
            prop_assert_eq!(packets.len(), flow.payload.len().div_ceil(usize::from(flow.segment)));
            for packet in &packets {
                assert_checksums(packet);
            }
            let mut joiner = Joiner::new(true);
            let runs = joiner.plan(&packets);
            prop_assert_eq!(runs.len(), 1);
            let (joined_header, mut joined) = written(&runs[0], &packets);
            let payload_at = frame.len() - flow.payload.len();
            if packets.len() > 1 {
                prop_assert_eq!(joined_header.gso_size, flow.segment);
                prop_assert_eq!(joined_header.gso_type, header.gso_type);
                prop_assert_eq!(usize::from(joined_header.hdr_len), payload_at);
                prop_assert_eq!(&joined[payload_at..], &flow.payload[..]);
            }
            prop_assert_eq!(cut(&joined_header, &mut joined), packets);
        }

        #[test]
        fn interleaved_flows_keep_their_order_and_their_bytes(
            flows in prop::collection::vec(flow(), 1..5), picks in prop::collection::vec(0_usize..5, 500)
        ) {
            let mut queues: Vec<_> = flows.into_iter().zip(1000..).map(|(flow, port)| {
                Flow { port, ..flow }.packets().into_iter().collect::<std::collections::VecDeque<_>>()
            }).collect();
            let mut batch = Vec::new();
            for pick in picks {
                let count = queues.len();
                batch.extend(queues[pick % count].pop_front());
            }
            let mut joiner = Joiner::new(true);
            let mut out: Vec<Vec<u8>> = Vec::new();
            for run in joiner.plan(&batch) {
                let (header, mut frame) = written(run, &batch);
                out.extend(cut(&header, &mut frame));
            }
            let of_flow = |packets: &[Vec<u8>], port: u16| -> Vec<Vec<u8>> {
                let wanted = |packet: &&Vec<u8>| {
                    let headers = Headers::parse(packet).unwrap();
                    word(packet, headers.ip_bytes) == port
                };
                packets.iter().filter(wanted).cloned().collect()
            };
            prop_assert_eq!(out.len(), batch.len());
            for port in 1000..1005 {
                prop_assert_eq!(of_flow(&out, port), of_flow(&batch, port));
            }
        }

        #[test]
        fn garbage_is_refused_or_passed_on_but_never_a_panic(
            mut frame in prop::collection::vec(any::<u8>(), 0..200), numbers: (u8, u8, u16, u16, u16, u16)
        ) {
            let header = VirtioNetHdr {
                flags: numbers.0, gso_type: numbers.1 % 8, hdr_len: numbers.2,
                gso_size: numbers.3, csum_start: numbers.4 % 200, csum_offset: numbers.5 % 32,
            };
            let mut joiner = Joiner::new(true);
            joiner.plan(&[&frame, &frame]);
            split(&header, &mut frame, |_packet| Some(()));
        }
    }

    #[test]
    fn a_datagram_shorter_than_its_packet_stays_as_it_is() {
        let flow = Flow {
            v6: false,
            tcp: false,
            port: 1000,
            sequence: 0,
            option_words: 0,
            flags: 0,
            segment: 100,
            payload: vec![7; 300],
        };
        let mut packets = flow.packets();
        let mut joiner = Joiner::new(true);
        assert_eq!(joiner.plan(&packets).len(), 1);
        packets[1][20 + 5] -= 1;
        let lengths: Vec<usize> = joiner.plan(&packets).iter().map(|run| run.members.len()).collect();
        assert_eq!(lengths, [1, 1, 1]);
    }

    #[test]
    fn a_segment_that_does_not_follow_begins_a_new_run() {
        let flow = Flow {
            v6: false,
            tcp: true,
            port: 1000,
            sequence: 5,
            option_words: 3,
            flags: TCP_ACK,
            segment: 100,
            payload: vec![7; 400],
        };
        let packets = flow.packets();
        let other_options = Flow {
            option_words: 2,
            sequence: 405,
            ..flow.clone()
        }
        .packets();
        let with_fin = Flow {
            flags: TCP_ACK | 1,
            sequence: 405,
            ..flow.clone()
        }
        .packets();
        let mut joiner = Joiner::new(true);
        let lengths = |joiner: &mut Joiner, batch: &[&Vec<u8>]| -> Vec<usize> {
            joiner.plan(batch).iter().map(|run| run.members.len()).collect()
        };
        let [a, b, c, d] = &packets[..] else {
            panic!("four segments")
        };
        assert_eq!(lengths(&mut joiner, &[a, b, c, d]), [4]);
        assert_eq!(lengths(&mut joiner, &[a, c, d]), [1, 2], "a gap");
        assert_eq!(
            lengths(&mut joiner, &[a, b, b, c]),
            [2, 2],
            "a repetition, after which the flow goes on"
        );
        assert_eq!(lengths(&mut joiner, &[a, b, c, d, &other_options[0]]), [4, 1]);
        assert_eq!(
            lengths(&mut joiner, &[a, b, c, d, &with_fin[3]]),
            [4, 1],
            "FIN goes by itself"
        );
        let mut fragment = b.clone();
        fragment[6] = 0x20;
        assert_eq!(lengths(&mut joiner, &[a, &fragment, c]), [1, 1, 1]);
        let mut other_window = b.clone();
        other_window[20 + 14] ^= 1;
        assert_eq!(lengths(&mut joiner, &[a, &other_window]), [1, 1]);
    }
}
