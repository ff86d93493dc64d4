//! Every kind of packet through the programs by hand (`BPF_PROG_TEST_RUN`): each has its outcome.
//!
//! The kernel runs them on Ethernet frames; what it makes of a tunnel's packets is in the live tests.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use aya::{
    Ebpf, EbpfLoader, Pod,
    maps::{Array, HashMap, PerCpuArray},
    programs::{SchedClassifier, TestRun as _, TestRunOptions},
};
use dvpn_common::{
    abi::{self, Counter, Node, PeerAddress, State, Traffic, mapped, refused, slot},
    grant::{BURST_NS, Limit, Meter, NodeLimit},
    rate::Rate,
};
use nix::time::{ClockId, clock_gettime};

/// The tunnel that the programs believe to be on.
const TUNNEL: u32 = 77;
const PEER: u32 = 5;
const CLASS: u32 = 0x0d01_0015;
const V4: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 7);
const V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 7);
const ETHERNET: usize = 14;

const NEXT: u32 = u32::MAX;
const SHOT: u32 = 2;

const MS: u64 = 1_000_000;

/// Where things are in `__sk_buff` (`include/uapi/linux/bpf.h`).
mod context {
    pub(super) const LEN: usize = 192;
    pub(super) const PRIORITY: usize = 32;
    pub(super) const TSTAMP: usize = 152;
    pub(super) const GSO_SEGS: usize = 164;
    pub(super) const GSO_SIZE: usize = 176;
}

struct Programs(Ebpf);

/// What became of a packet.
struct Outcome {
    verdict: u32,
    data: Vec<u8>,
    priority: u32,
    tstamp_ns: u64,
}

impl Programs {
    /// In one mode for both directions, with one peer of 8 Mbit/s: a microsecond a byte, a horizon of 25 ms.
    fn new(mode: u32) -> Self {
        let object = EbpfLoader::new()
            .override_global(abi::LINK_HEADER, &14_u32, true)
            .override_global(abi::TUNNEL, &TUNNEL, true)
            .override_global(abi::DOWN_MODE, &mode, true)
            .override_global(abi::UP_MODE, &mode, true)
            .load(dvpn_daemon::ebpf::object())
            .unwrap();
        let mut programs = Self(object);
        for name in [abi::SHAPE_DOWN, abi::ADMIT_UP, abi::SHAPE_UP] {
            programs.program(name).load().unwrap();
        }
        for address in [V4.into(), V6.into()] {
            programs.name(TUNNEL, address, PEER);
        }
        programs.grant(Rate::from_bits_per_second(8_000_000), u64::MAX);
        programs
    }

    fn program(&mut self, name: &str) -> &mut SchedClassifier {
        self.0.program_mut(name).unwrap().try_into().unwrap()
    }

    fn array<T: Pod>(&mut self, name: &str) -> Array<&mut aya::maps::MapData, T> {
        Array::try_from(self.0.map_mut(name).unwrap()).unwrap()
    }

    fn name(&mut self, interface: u32, address: IpAddr, peer: u32) {
        let address = match address {
            IpAddr::V4(v4) => mapped(v4.octets()),
            IpAddr::V6(v6) => v6.octets(),
        };
        let mut map = HashMap::try_from(self.0.map_mut(abi::PEER_BY_ADDR).unwrap()).unwrap();
        map.insert(PeerAddress { interface, address }, peer, 0).unwrap();
    }

    fn grant(&mut self, rate: Rate, until_ns: u64) {
        let limit = Limit::new(Meter::paced(rate), until_ns, CLASS);
        for direction in [abi::DOWN, abi::UP] {
            self.array(abi::GRANT).set(slot(PEER, direction), limit, 0).unwrap();
        }
    }

    fn node(&mut self, node: Node) {
        self.array(abi::NODE).set(0, node, 0).unwrap();
    }

    /// The peer is so far ahead of the clock in both directions.
    fn backlog(&mut self, ns: u64) {
        let until_ns = now_ns().saturating_add(ns);
        let state = State::new(until_ns, until_ns);
        for direction in [abi::DOWN, abi::UP] {
            self.array(abi::STATE).set(slot(PEER, direction), state, 0).unwrap();
        }
    }

    fn state(&mut self, direction: u32) -> State {
        self.array(abi::STATE).get(&slot(PEER, direction), 0).unwrap()
    }

    fn run(&mut self, program: &str, frame: &[u8]) -> Outcome {
        self.run_with(program, frame, 0, 0)
    }

    fn run_with(&mut self, program: &str, frame: &[u8], gso_size: u32, gso_segs: u32) -> Outcome {
        let mut given = [0; context::LEN];
        given[context::GSO_SIZE..][..4].copy_from_slice(&gso_size.to_ne_bytes());
        given[context::GSO_SEGS..][..4].copy_from_slice(&gso_segs.to_ne_bytes());
        let (mut context, mut data) = ([0; context::LEN], vec![0; frame.len() + 64]);
        let result = self
            .program(program)
            .test_run(TestRunOptions {
                data_in: Some(frame),
                data_out: Some(&mut data),
                ctx_in: Some(&given),
                ctx_out: Some(&mut context),
                ..TestRunOptions::new()
            })
            .unwrap();
        data.truncate(result.data_size_out.try_into().unwrap());
        Outcome {
            verdict: result.return_value,
            data,
            priority: u32::from_ne_bytes(context[context::PRIORITY..][..4].try_into().unwrap()),
            tstamp_ns: u64::from_ne_bytes(context[context::TSTAMP..][..8].try_into().unwrap()),
        }
    }

    fn traffic(&self, direction: u32) -> Traffic {
        let map: PerCpuArray<_, Traffic> = PerCpuArray::try_from(self.0.map(abi::PEER_COUNTERS).unwrap()).unwrap();
        let values = map.get(&slot(PEER, direction), 0).unwrap();
        values.iter().fold(Traffic::default(), |sum, cpu| sum.plus(*cpu))
    }

    /// The reasons that packets were dropped for, with their bytes.
    fn refused(&self) -> Vec<(&'static str, u64)> {
        let map: PerCpuArray<_, Counter> = PerCpuArray::try_from(self.0.map(abi::REFUSED).unwrap()).unwrap();
        let bytes = |reason| {
            let values = map.get(&reason, 0).unwrap();
            values.iter().map(|cpu| cpu.bytes).sum::<u64>()
        };
        let all = refused::NAMES.into_iter().zip((0..refused::LEN).map(bytes));
        all.filter(|(_, bytes)| *bytes > 0).collect()
    }
}

fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap();
    u64::try_from(now.tv_sec()).unwrap() * 1_000_000_000 + u64::try_from(now.tv_nsec()).unwrap()
}

fn frame(ethertype: u16, packet: &[u8]) -> Vec<u8> {
    let mut frame = vec![0; 12];
    frame.extend(ethertype.to_be_bytes());
    frame.extend(packet);
    frame
}

/// Between the peer and somebody, both ways: the same address at both ends.
fn v4(length: usize) -> Vec<u8> {
    let mut packet = vec![0; length];
    packet[0] = 0x45;
    packet[2..4].copy_from_slice(&u16::try_from(length).unwrap().to_be_bytes());
    packet[8..10].copy_from_slice(&[64, 17]);
    packet[12..16].copy_from_slice(&V4.octets());
    packet[16..20].copy_from_slice(&V4.octets());
    packet
}

fn v6(length: usize, next_header: u8) -> Vec<u8> {
    let mut packet = vec![0; length];
    packet[0] = 0x60;
    packet[4..6].copy_from_slice(&u16::try_from(length - 40).unwrap().to_be_bytes());
    packet[6..8].copy_from_slice(&[next_header, 64]);
    packet[8..24].copy_from_slice(&V6.octets());
    packet[24..40].copy_from_slice(&V6.octets());
    packet
}

fn v4_frame(length: usize) -> Vec<u8> {
    frame(0x0800, &v4(length))
}

#[test]
fn every_kind_of_packet_of_a_peer_passes_and_is_charged_as_it_is() {
    let fragment = |flags_and_offset: u16| {
        let mut packet = v4(1000);
        packet[6..8].copy_from_slice(&flags_and_offset.to_be_bytes());
        frame(0x0800, &packet)
    };
    let mut options = v4(1000);
    options[0] = 0x4f;
    for (name, frame) in [
        ("IPv4", v4_frame(1000)),
        ("the shortest IPv4", v4_frame(20)),
        ("IPv4 options", frame(0x0800, &options)),
        ("a first fragment", fragment(0x2000)),
        ("a later fragment", fragment(0x2050)),
        ("the last fragment", fragment(0x50)),
        ("IPv6", frame(0x86dd, &v6(1000, 17))),
        ("IPv6 behind hop-by-hop options", frame(0x86dd, &v6(1000, 0))),
        ("an IPv6 fragment", frame(0x86dd, &v6(1000, 44))),
        ("IPv6 without a next header", frame(0x86dd, &v6(40, 59))),
    ] {
        let bytes = (frame.len() - ETHERNET) as u64;
        let mut programs = Programs::new(abi::mode::EDT);
        assert_eq!(programs.run(abi::SHAPE_DOWN, &frame).verdict, NEXT, "{name}");
        assert_eq!(programs.run(abi::SHAPE_UP, &frame).verdict, NEXT, "{name}");
        for direction in [abi::DOWN, abi::UP] {
            let traffic = programs.traffic(direction);
            assert_eq!((traffic.packets, traffic.bytes), (1, bytes), "{name}");
            let charged_ns = programs.state(direction).vtime_ns.saturating_sub(now_ns());
            assert!(
                charged_ns <= bytes * 1000,
                "{name}: a microsecond a byte, not {charged_ns}"
            );
        }
        assert_eq!(programs.refused(), [], "{name}");
    }
}

#[test]
fn whoever_is_not_listed_gets_nothing_and_is_counted() {
    let mut stranger = v4(1000);
    stranger[12..20].copy_from_slice(&[10, 96, 0, 8, 10, 96, 0, 8]);
    let mut mapped_address = v6(1000, 17);
    mapped_address[8..24].copy_from_slice(&[0; 16]);
    mapped_address[24..40].copy_from_slice(&[0; 16]);
    for (name, frame) in [
        ("another IPv4 address", frame(0x0800, &stranger)),
        ("another IPv6 address", frame(0x86dd, &mapped_address)),
    ] {
        let mut programs = Programs::new(abi::mode::EDT);
        // The same address on another interface is nobody here.
        programs.name(TUNNEL + 1, Ipv4Addr::new(10, 96, 0, 8).into(), PEER);
        for program in [abi::SHAPE_DOWN, abi::ADMIT_UP, abi::SHAPE_UP] {
            assert_eq!(programs.run(program, &frame).verdict, SHOT, "{name} {program}");
        }
        assert_eq!(programs.refused(), [("unknown", 3000)], "{name}");
    }
}

#[test]
fn what_is_no_ip_packet_is_dropped_as_malformed() {
    for (name, frame) in [
        ("ARP", frame(0x0806, &[0; 28])),
        ("another protocol", frame(0x88cc, &[0; 40])),
    ] {
        let bytes = (frame.len() - ETHERNET) as u64;
        let mut programs = Programs::new(abi::mode::POLICE);
        for program in [abi::SHAPE_DOWN, abi::ADMIT_UP] {
            assert_eq!(programs.run(program, &frame).verdict, SHOT, "{name} {program}");
        }
        assert_eq!(programs.refused(), [("malformed", 2 * bytes)], "{name}");
    }
}

#[test]
fn a_lease_that_ran_out_and_a_grant_of_nothing_let_nothing_pass() {
    let rate = Rate::from_bits_per_second(8_000_000);
    for (name, rate, until_ns) in [
        ("run out", rate, now_ns() - 1),
        ("never given", rate, 0),
        ("nothing granted", Rate::ZERO, u64::MAX),
        ("too little granted", Rate::from_bits_per_second(7_999), u64::MAX),
    ] {
        let mut programs = Programs::new(abi::mode::EDT);
        programs.grant(rate, until_ns);
        for program in [abi::SHAPE_DOWN, abi::ADMIT_UP, abi::SHAPE_UP] {
            assert_eq!(programs.run(program, &v4_frame(60)).verdict, SHOT, "{name} {program}");
        }
        assert_eq!(programs.refused(), [("lease", 180)], "{name}");
    }
}

#[test]
fn a_packet_leaves_when_its_turn_comes_and_small_ones_at_once() {
    for program in [abi::SHAPE_DOWN, abi::SHAPE_UP] {
        let mut programs = Programs::new(abi::mode::EDT);
        assert_eq!(
            programs.run(program, &v4_frame(1400)).tstamp_ns,
            0,
            "nothing is held back"
        );
        programs.backlog(10 * MS);
        let before = now_ns();
        let outcome = programs.run(program, &v4_frame(1400));
        let after = now_ns();
        let due = before + 10 * MS - BURST_NS;
        assert_eq!(outcome.verdict, NEXT);
        assert!(
            (due.saturating_sub(5 * MS)..=after + 10 * MS).contains(&outcome.tstamp_ns),
            "{} is not about {due}",
            outcome.tstamp_ns
        );
        let second = programs.run(program, &v4_frame(1400));
        assert_eq!(second.tstamp_ns - outcome.tstamp_ns, 1_400_000, "1400 bytes later");
        assert_eq!(programs.run(program, &v4_frame(60)).tstamp_ns, 0, "a small one");
        let traffic = programs.traffic(if program == abi::SHAPE_DOWN { abi::DOWN } else { abi::UP });
        assert_eq!((traffic.packets, traffic.delayed), (4, 2));
        assert!((10 * MS..22 * MS).contains(&traffic.delay_ns), "{}", traffic.delay_ns);
    }
}

#[test]
fn above_the_horizon_is_dropped_and_small_packets_above_twice() {
    let mut programs = Programs::new(abi::mode::EDT);
    for (backlog_ns, full, small) in [(20 * MS, NEXT, NEXT), (40 * MS, SHOT, NEXT), (90 * MS, SHOT, SHOT)] {
        programs.backlog(backlog_ns);
        assert_eq!(
            programs.run(abi::SHAPE_DOWN, &v4_frame(1400)).verdict,
            full,
            "{backlog_ns}"
        );
        programs.backlog(backlog_ns);
        assert_eq!(
            programs.run(abi::SHAPE_DOWN, &v4_frame(128)).verdict,
            small,
            "{backlog_ns}"
        );
    }
    assert_eq!(programs.refused(), [("grant", 2 * 1400 + 128)]);
    let traffic = programs.traffic(abi::DOWN);
    assert_eq!((traffic.dropped_packets, traffic.dropped_bytes), (3, 2 * 1400 + 128));
}

#[test]
fn half_a_horizon_ahead_packets_that_can_be_are_marked() {
    for (ecn, backlog_ns, marked) in [
        (0b10, 20 * MS, true),
        (0b01, 20 * MS, true),
        (0, 20 * MS, false),
        (0b10, 5 * MS, false),
    ] {
        let mut packets = [v4(1400), v6(1400, 17)];
        packets[0][1] = ecn;
        packets[1][1] = ecn << 4;
        for (ethertype, packet) in [0x0800, 0x86dd].into_iter().zip(packets) {
            let mut programs = Programs::new(abi::mode::EDT);
            programs.backlog(backlog_ns);
            let outcome = programs.run(abi::SHAPE_DOWN, &frame(ethertype, &packet));
            let field = outcome.data[ETHERNET + 1] >> if ethertype == 0x0800 { 0 } else { 4 } & 0b11;
            assert_eq!(field & 0b11, if marked { 0b11 } else { ecn }, "{ecn:b} {backlog_ns}");
            assert_eq!(programs.traffic(abi::DOWN).marks, u64::from(marked));
            assert_eq!(outcome.verdict, NEXT);
        }
    }
}

#[test]
fn a_stale_state_is_forgotten_within_two_horizons() {
    let mut programs = Programs::new(abi::mode::EDT);
    programs.backlog(u64::MAX / 2);
    assert_eq!(programs.run(abi::SHAPE_DOWN, &v4_frame(1400)).verdict, SHOT);
    let ahead = programs.state(abi::DOWN).vtime_ns.saturating_sub(now_ns());
    assert!(ahead <= 50 * MS, "{ahead}");
    crate::bed::wait(|| programs.run(abi::SHAPE_DOWN, &v4_frame(1400)).verdict == NEXT).expect("free again");
}

#[test]
fn a_super_packet_is_charged_for_all_its_packets() {
    // Three segments of 1000 bytes behind 28 bytes of headers.
    let frame = v4_frame(28 + 3000);
    for program in [abi::SHAPE_DOWN, abi::SHAPE_UP] {
        let mut programs = Programs::new(abi::mode::EDT);
        assert_eq!(programs.run_with(program, &frame, 1000, 3).verdict, NEXT);
        let traffic = programs.traffic(if program == abi::SHAPE_DOWN { abi::DOWN } else { abi::UP });
        assert_eq!((traffic.packets, traffic.bytes), (3, 3084), "{program}");
    }
}

#[test]
fn with_classes_a_packet_gets_its_class_and_what_the_class_does_not_hold_back_is_dropped() {
    let mut programs = Programs::new(abi::mode::HTB);
    for program in [abi::SHAPE_DOWN, abi::SHAPE_UP] {
        let outcome = programs.run(program, &v4_frame(1400));
        assert_eq!(
            (outcome.verdict, outcome.priority, outcome.tstamp_ns),
            (NEXT, CLASS, 0),
            "{program}"
        );
    }
    // The upload is charged where it is admitted.
    for (backlog_ns, down) in [(40 * MS, NEXT), (60 * MS, SHOT)] {
        programs.backlog(backlog_ns);
        for (program, verdict) in [(abi::SHAPE_DOWN, down), (abi::SHAPE_UP, NEXT)] {
            let outcome = programs.run(program, &v4_frame(1400));
            assert_eq!(outcome.verdict, verdict, "{program} {backlog_ns}");
        }
    }
}

#[test]
fn an_upload_is_admitted_up_to_a_tenth_above_its_grant_and_policed_where_nothing_paces_it() {
    for mode in [abi::mode::EDT, abi::mode::HTB] {
        let mut programs = Programs::new(mode);
        assert_eq!(programs.run(abi::ADMIT_UP, &v4_frame(1400)).verdict, NEXT);
        assert_eq!(programs.traffic(abi::UP).packets, 0, "it is counted where it is paced");
        let charged_ns = programs.state(abi::UP).backstop_ns - now_ns();
        assert!(charged_ns <= 1_400_000 * 10 / 11 + 1, "{charged_ns}");
        programs.backlog(60 * MS);
        assert_eq!(programs.run(abi::ADMIT_UP, &v4_frame(1400)).verdict, SHOT);
        assert_eq!(programs.refused(), [("grant", 1400)]);
    }
    let mut programs = Programs::new(abi::mode::POLICE);
    assert_eq!(programs.run(abi::ADMIT_UP, &v4_frame(1400)).verdict, NEXT);
    assert_eq!(programs.traffic(abi::UP).packets, 1);
}

#[test]
fn all_peers_together_get_no_more_than_the_node_allows() {
    for mode in [abi::mode::EDT, abi::mode::POLICE] {
        let mut programs = Programs::new(mode);
        let limit = NodeLimit::new(Meter::paced(Rate::from_bits_per_second(800_000)));
        programs.node(Node {
            down: limit,
            ..Node::default()
        });
        // A millisecond for every hundred bytes: some 200 ms may be booked ahead.
        let mut passed = 0;
        for _ in 0..40 {
            programs.backlog(0);
            if programs.run(abi::SHAPE_DOWN, &v4_frame(1000)).verdict == NEXT {
                passed += 1;
            }
        }
        assert!((20..=26).contains(&passed), "{passed} of 40");
        assert_eq!(programs.refused(), [("node", (40 - passed) * 1000)]);
    }
}
