//! A batch of packets from the network on its way to an offloading TUN: up to three flows, interleaved and damaged as
//! the input says, joined into runs. What the kernel cuts from the runs are the packets there were.
#![no_main]
#![allow(dead_code, reason = "the files are the daemon's")]

#[path = "../../../dvpn-daemon/src/tunnel/userspace/headers.rs"]
mod headers;
#[path = "../../../dvpn-daemon/src/tunnel/userspace/join.rs"]
mod join;
#[path = "../../../dvpn-daemon/src/tunnel/userspace/split.rs"]
mod split;

use std::collections::VecDeque;

use headers::{Headers, Transport, put_long, put_word, word};
use libfuzzer_sys::fuzz_target;
use tun_rs::{VIRTIO_NET_HDR_LEN, VirtioNetHdr};

const MAX_PACKETS: usize = 128;

struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }
}

/// One packet of a flow, its checksum left out.
fn packet(flow: u8, kind: u8, sequence: u32, payload: &[u8]) -> Vec<u8> {
    let (v6, tcp, option_words) = (kind & 1 != 0, kind & 2 != 0, kind >> 2 & 3);
    let mut packet = if v6 {
        vec![0x60, 1, 2, 3, 0, 0, 17, 64]
    } else {
        vec![0x45, 4, 0, 0, 0, 0, 0x40, 0, 64, 17]
    };
    if v6 {
        packet.extend([[0xfd; 16], [0xfe; 16]].concat());
    } else {
        packet.extend([0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    }
    let start = packet.len();
    packet.extend([3, flow, 1, 187]);
    if tcp {
        packet[if v6 { 6 } else { 9 }] = 6;
        packet.extend([0, 0, 0, 0, 0, 0, 0, 77, (5 + option_words) << 4, 0x10, 1, 0, 0, 0, 0, 0]);
        put_long(&mut packet, start + 4, sequence);
        packet.resize(packet.len() + 4 * usize::from(option_words), 1);
    } else {
        packet.extend([0, 0, 1, 1]);
    }
    packet.extend_from_slice(payload);
    let length = packet.len();
    let transport = if tcp { Transport::Tcp } else { Transport::Udp };
    let headers = Headers::at(&packet, v6, transport, start).expect("headers of our own");
    headers.set_length(&mut packet, length);
    packet
}

/// Flows, each as its packets; their payloads count on, so that a lost or moved byte shows.
fn flows(input: &mut Input<'_>) -> Option<Vec<VecDeque<Vec<u8>>>> {
    let count = input.byte()? % 3 + 1;
    let mut flows = Vec::new();
    for flow in 0..count {
        let (kind, segment, packets, last) = (
            input.byte()?,
            usize::from(input.byte()?) + 1,
            input.byte()? % 48 + 1,
            usize::from(input.byte()?),
        );
        let mut sequence = u32::from_be_bytes([0xff, 0xff, 0xf0, input.byte()?]);
        let mut counter = 0_u32;
        let mut made = VecDeque::new();
        for number in 1..=packets {
            let length = if number == packets {
                last % (segment + 2)
            } else {
                segment
            };
            let payload: Vec<u8> = (0..length).map(|at| ((counter as usize + at) % 251) as u8).collect();
            counter += length as u32;
            made.push_back(packet(flow, kind, sequence, &payload));
            sequence = sequence.wrapping_add(length as u32);
        }
        flows.push(made);
    }
    Some(flows)
}

/// Without what joining may lose: IPv4's id and the checksums, which the kernel makes anew.
fn settled(packet: &[u8]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    if let Some(headers) = Headers::parse(&packet) {
        if !headers.v6 {
            put_word(&mut packet, 4, 0);
            put_word(&mut packet, 10, 0);
        }
        put_word(&mut packet, headers.ip_bytes + headers.checksum_offset(), 0);
    }
    packet
}

/// Addresses, transport and ports; packets that are none of a flow are a flow together.
fn flow_of(packet: &[u8]) -> Option<(bool, Vec<u8>, u16, u16)> {
    let headers = Headers::parse(packet)?;
    let ports = (word(packet, headers.ip_bytes), word(packet, headers.ip_bytes + 2));
    Some((
        headers.transport == Transport::Tcp,
        headers.addresses(packet).to_vec(),
        ports.0,
        ports.1,
    ))
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let Some(udp) = input.byte().map(|byte| byte & 1 != 0) else {
        return;
    };
    let Some(mut queues) = flows(&mut input) else { return };
    let mut batch: Vec<Vec<u8>> = Vec::new();
    while batch.len() < MAX_PACKETS && queues.iter().any(|queue| !queue.is_empty()) {
        let pick = input.byte().unwrap_or(0);
        let count = queues.len();
        let Some(next) = (0..count).find_map(|more| queues[(usize::from(pick) + more) % count].pop_front()) else {
            break;
        };
        batch.push(next);
        // Damage, repetition, loss.
        let Some(packet) = batch.last_mut() else { break };
        match pick >> 4 {
            15 => {
                let (Some(at), Some(change)) = (input.byte(), input.byte()) else {
                    break;
                };
                let at = usize::from(at) % packet.len();
                packet[at] ^= change;
            }
            14 => {
                let copy = packet.clone();
                batch.push(copy);
            }
            13 => drop(batch.pop()),
            12 => packet.push(0),
            _ => {}
        }
    }
    batch.truncate(MAX_PACKETS);

    let mut joiner = join::Joiner::new(udp);
    let runs = joiner.plan(&batch);
    let mut out: Vec<(usize, Vec<u8>)> = Vec::new();
    for run in runs {
        let (Some(first), Some(last)) = (run.members.first(), run.members.last()) else {
            panic!("a run of none")
        };
        let lead = run.lead(&batch[*first], &batch[*last]);
        let mut bytes = lead.bytes().to_vec();
        for member in &run.members {
            bytes.extend_from_slice(&batch[*member][lead.skip..]);
        }
        let mut frame = bytes.split_off(VIRTIO_NET_HDR_LEN);
        assert!(frame.len() <= usize::from(u16::MAX));
        let header = VirtioNetHdr::decode(&bytes).expect("a header of our own");
        let mut members = run.members.iter();
        let take = |packet: bytes::BytesMut| {
            out.push((
                *members.next().expect("no packet more than there were"),
                packet.to_vec(),
            ));
            Some(())
        };
        split::split(&header, &mut frame, take).expect("what we joined can be cut");
        assert!(members.next().is_none(), "no packet less");
    }
    assert_eq!(out.len(), batch.len());
    for (index, packet) in &out {
        assert_eq!(settled(packet), settled(&batch[*index]));
    }
    // Joining or not, no packet overtakes another of its flow.
    let mut flows: Vec<_> = batch.iter().filter_map(|packet| flow_of(packet)).collect();
    flows.sort_unstable();
    flows.dedup();
    for flow in flows {
        assert!(
            out.iter()
                .filter(|(index, _)| flow_of(&batch[*index]).as_ref() == Some(&flow))
                .is_sorted_by_key(|(index, _)| index)
        );
    }
});
