//! A frame as an offloading TUN hands it over: ten bytes of virtio header, then up to 64 KB of packet. Refused, or cut
//! into packets that together carry its payload.
#![no_main]
#![allow(dead_code, reason = "the files are the daemon's")]

#[path = "../../../dvpn-daemon/src/tunnel/userspace/headers.rs"]
mod headers;
#[path = "../../../dvpn-daemon/src/tunnel/userspace/join.rs"]
mod join;
#[path = "../../../dvpn-daemon/src/tunnel/userspace/split.rs"]
mod split;

use headers::{Headers, Transport};
use libfuzzer_sys::fuzz_target;
use tun_rs::{VIRTIO_NET_HDR_GSO_UDP_L4, VIRTIO_NET_HDR_LEN, VirtioNetHdr};

const GSO_ECN: u8 = 0x80;

fuzz_target!(|data: &[u8]| {
    let Some((header, frame)) = data.split_at_checked(VIRTIO_NET_HDR_LEN) else {
        return;
    };
    let Ok(header) = VirtioNetHdr::decode(header) else {
        return;
    };
    let mut packets: Vec<Vec<u8>> = Vec::new();
    let take = |packet: bytes::BytesMut| {
        packets.push(packet.to_vec());
        Some(())
    };
    let cut = split::split(&header, &mut frame.to_vec(), take);

    // Whatever they are, planning their way back touches each once and in order.
    let mut joiner = join::Joiner::new(true);
    let runs = joiner.plan(&packets);
    let mut seen: Vec<usize> = runs.iter().flat_map(|run| run.members.iter().copied()).collect();
    assert!(runs.iter().all(|run| run.members.is_sorted()));
    seen.sort_unstable();
    assert!(seen.iter().copied().eq(0..packets.len()));

    if cut.is_none() {
        return;
    }
    let start = usize::from(header.csum_start);
    if header.gso_type & !GSO_ECN == 0 {
        assert_eq!(packets.len(), 1);
        let field = start + usize::from(header.csum_offset);
        let kept = |packet: &[u8]| -> Vec<u8> {
            let outside = packet
                .iter()
                .enumerate()
                .filter(|(at, _)| !(field..field + 2).contains(at));
            outside.map(|(_, byte)| *byte).collect()
        };
        assert_eq!(kept(&packets[0]), kept(frame), "only the checksum changes");
        return;
    }
    let udp = header.gso_type & !GSO_ECN == VIRTIO_NET_HDR_GSO_UDP_L4;
    let transport = if udp { Transport::Udp } else { Transport::Tcp };
    let headers = Headers::at(frame, frame[0] >> 4 == 6, transport, start).expect("it was cut");
    let segment = usize::from(header.gso_size);
    let payload = &frame[headers.bytes..];
    assert_eq!(packets.len(), payload.len().div_ceil(segment));
    let mut together = Vec::new();
    for (number, packet) in packets.iter().enumerate() {
        let part = &packet[headers.bytes..];
        assert!(part.len() == segment || number + 1 == packets.len() && !part.is_empty() && part.len() < segment);
        if !udp {
            let sequence = |packet: &[u8]| headers::long(packet, start + 4);
            let behind = u32::try_from(number * segment).expect("less than 64 KB");
            assert_eq!(sequence(packet), sequence(frame).wrapping_add(behind));
        }
        together.extend_from_slice(part);
    }
    assert_eq!(together, payload, "not a byte less or more, and in order");
});
