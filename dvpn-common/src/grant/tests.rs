//! The arithmetic over any arrivals, and the charge among any other charges.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use loom::sync::{Arc, atomic};
use proptest::prelude::*;

use super::{
    BURST_NS, Cell, Limit, MAX_BYTES, MIN_RATE, Meter, NodeLimit, SMALL_BYTES, Step, Verdict, charge, charge_node,
    charge_within, cost, step,
};
use crate::rate::Rate;

const MS: u64 = 1_000_000;
const START: u64 = 1_000_000_000_000;

fn rate(bits: u64) -> Rate {
    Rate::from_bits_per_second(bits)
}

fn at(verdict: Verdict) -> Option<u64> {
    match verdict {
        Verdict::Send { at_ns } | Verdict::Mark { at_ns } => Some(at_ns),
        Verdict::Drop => None,
    }
}

/// Whether `bytes` are no more than `rate` carries in `ns`.
fn fits(bytes: u64, rate: Rate, ns: u64) -> bool {
    u128::from(bytes) * 8_000_000_000 <= u128::from(rate.bits_per_second()) * u128::from(ns)
}

/// One that passed.
#[derive(Debug, Clone, Copy)]
struct Passed {
    at_ns: u64,
    bytes: u64,
}

/// Packets, each so long after the one before, through one limit.
fn run(meter: Meter, arrivals: &[(u64, u64)]) -> Vec<Passed> {
    let (mut now_ns, mut vtime_ns, mut passed) = (START, 0, Vec::new());
    for (wait_ns, bytes) in arrivals {
        now_ns += wait_ns;
        let next = step(meter, vtime_ns, now_ns, *bytes);
        assert!(next.vtime_ns >= vtime_ns, "time goes on");
        vtime_ns = next.vtime_ns;
        if let Some(at_ns) = at(next.verdict) {
            assert!(at_ns >= now_ns, "nothing leaves before it came");
            passed.push(Passed { at_ns, bytes: *bytes });
        }
    }
    passed
}

/// No stretch of time carries more than the rate, `slack_ns` at the rate, and its longest packet.
fn bounded(mut passed: Vec<Passed>, rate: Rate, slack_ns: u64) -> Result<(), TestCaseError> {
    passed.sort_by_key(|packet| packet.at_ns);
    for (index, first) in passed.iter().enumerate() {
        let (mut bytes, mut longest) = (0, 0);
        for packet in passed.iter().skip(index) {
            bytes += packet.bytes;
            longest = longest.max(packet.bytes);
            let ns = packet.at_ns - first.at_ns + slack_ns;
            prop_assert!(fits(bytes - longest, rate, ns), "{bytes} bytes in {ns} ns at {rate}");
        }
    }
    Ok(())
}

fn rates() -> impl Strategy<Value = Rate> {
    (13_u32..39, 0_u64..1 << 13).prop_map(|(power, rest)| rate((1 << power) + (rest << (power - 13))))
}

/// Bursts, pauses, and everything between, as fractions of what a full packet takes.
fn arrivals(rate: Rate, lengths: impl Strategy<Value = u64>) -> impl Strategy<Value = Vec<(u64, u64)>> {
    let full_ns = 12_000_000_000_000 / rate.bits_per_second().max(1) + 1;
    let waits = prop_oneof![
        4 => Just(0),
        4 => 0..full_ns,
        2 => 0..full_ns * 3,
        1 => 0..300 * MS,
    ];
    proptest::collection::vec((waits, lengths), 1..150)
}

fn with_arrivals(lengths: impl Strategy<Value = u64> + Clone) -> impl Strategy<Value = (Rate, Vec<(u64, u64)>)> {
    rates().prop_flat_map(move |rate| (Just(rate), arrivals(rate, lengths.clone())))
}

proptest! {
    #[test]
    fn no_stretch_of_time_carries_more_than_the_rate_a_burst_and_a_packet(
        (rate, arrivals) in with_arrivals(SMALL_BYTES + 1..65_576)
    ) {
        bounded(run(Meter::paced(rate), &arrivals), rate, BURST_NS)?;
    }

    #[test]
    fn small_packets_add_two_horizons_at_most(
        (rate, arrivals) in with_arrivals(prop_oneof![3 => 20..=SMALL_BYTES, 1 => 20_u64..65_576])
    ) {
        let meter = Meter::paced(rate);
        bounded(run(meter, &arrivals), rate, 2 * meter.horizon_ns)?;
    }

    #[test]
    fn packets_that_are_held_back_leave_in_the_order_they_came(
        (rate, arrivals) in with_arrivals(SMALL_BYTES + 1..65_576)
    ) {
        let passed = run(Meter::paced(rate), &arrivals);
        prop_assert!(passed.is_sorted_by_key(|packet| packet.at_ns));
    }

    #[test]
    fn small_packets_are_never_held_back((rate, arrivals) in with_arrivals(20..=SMALL_BYTES)) {
        let (meter, mut now_ns, mut vtime_ns) = (Meter::paced(rate), START, 0);
        for (wait_ns, bytes) in arrivals {
            now_ns += wait_ns;
            let next = step(meter, vtime_ns, now_ns, bytes);
            vtime_ns = next.vtime_ns;
            prop_assert!(at(next.verdict).is_none_or(|at_ns| at_ns == now_ns));
        }
    }

    #[test]
    fn more_than_the_rate_is_offered_and_the_rate_is_carried(rate in rates(), bytes in 576_u64..9000) {
        let meter = Meter::paced(rate);
        let each_ns = cost(meter.mult, bytes).div_ceil(2);
        let count = 4000;
        let arrivals: Vec<_> = (0..count).map(|_| (each_ns, bytes)).collect();
        let carried: u64 = run(meter, &arrivals).iter().map(|packet| packet.bytes).sum();
        // What a packet costs is rounded up to a nanosecond, and so is the time between two.
        let ns = each_ns * (count - 1);
        let lost_ns = count * 2 + meter.mult.div_ceil(1 << 10);
        prop_assert!(!fits(carried + bytes, rate, (ns - ns / 1000).saturating_sub(lost_ns + each_ns * 2)), "{carried}");
    }

    #[test]
    fn any_rate_and_any_time_overflow_nothing(
        bits in any::<u64>(), vtime_ns in any::<u64>(), now_ns in any::<u64>(), bytes in any::<u64>()
    ) {
        for meter in [Meter::paced(rate(bits)), Meter::policed(rate(bits)), Meter::paced(rate(bits)).backstop()] {
            let Step { verdict, .. } = step(meter, vtime_ns, now_ns, bytes);
            prop_assert!(at(verdict).is_none_or(|at_ns| at_ns >= now_ns && bytes <= MAX_BYTES));
        }
    }
}

#[test]
fn the_horizon_is_sixteen_full_packets_within_25_and_200_milliseconds() {
    for (bits, ms) in [
        (8_000, 200),
        (1_000_000, 192),
        (2_000_000, 96),
        (5_000_000, 38),
        (7_680_000, 25),
        (1_000_000_000, 25),
        (u64::MAX, 25),
    ] {
        assert_eq!(Meter::paced(rate(bits)).horizon_ns / MS, ms, "{bits}");
    }
    assert_eq!(Meter::policed(rate(1_000_000_000)).horizon_ns, 50 * MS);
}

#[test]
fn extreme_rates_cost_what_they_should() {
    for (bits, bytes, ns) in [
        (MIN_RATE.bits_per_second(), MAX_BYTES, 1_048_576_000_000),
        (8_000_000, 1500, 1_500_000),
        (94_000_000, 1500, 127_660),
        (1_000_000_000_000, 1500, 13),
        (u64::MAX, 1, 1),
    ] {
        assert_eq!(cost(Meter::paced(rate(bits)).mult, bytes), ns, "{bits}");
    }
    // The longest at the slowest still fits: 2^20 bytes at 2^40.
    assert!(Meter::paced(MIN_RATE).mult <= 1 << 40);
}

#[test]
fn what_is_slower_than_the_slowest_rate_lets_nothing_pass() {
    for bits in [0, 1, MIN_RATE.bits_per_second() - 1] {
        let meter = Meter::paced(rate(bits));
        assert_eq!(step(meter, 0, START, 60).verdict, Verdict::Drop, "{bits}");
        assert_eq!(step(meter.backstop(), 0, START, 60).verdict, Verdict::Drop, "{bits}");
        assert!(!Limit::new(meter, u64::MAX, 0).holds(START));
    }
}

#[test]
fn each_part_of_the_horizon_has_its_verdict() {
    // 8 Mbit/s: a microsecond a byte; horizon 25 ms.
    let meter = Meter::paced(rate(8_000_000));
    let verdict = |backlog_ns: u64, bytes| step(meter, START + backlog_ns, START, bytes).verdict;
    let send = |ns: u64| Verdict::Send { at_ns: START + ns };
    let mark = |ns: u64| Verdict::Mark { at_ns: START + ns };
    for (backlog_ns, full, small) in [
        (0, send(0), send(0)),
        (BURST_NS, send(0), send(0)),
        (BURST_NS + 1, send(1), send(0)),
        (25 * MS / 2, send(23 * MS / 2), send(0)),
        (25 * MS / 2 + 1, mark(23 * MS / 2 + 1), mark(0)),
        (25 * MS, mark(24 * MS), mark(0)),
        (25 * MS + 1, Verdict::Drop, mark(0)),
        (50 * MS, Verdict::Drop, mark(0)),
        (50 * MS + 1, Verdict::Drop, Verdict::Drop),
    ] {
        assert_eq!(
            [verdict(backlog_ns, SMALL_BYTES + 1), verdict(backlog_ns, SMALL_BYTES)],
            [full, small],
            "{backlog_ns}"
        );
    }
    assert_eq!(verdict(0, MAX_BYTES), send(0));
    assert_eq!(verdict(0, MAX_BYTES + 1), Verdict::Drop);
}

#[test]
fn a_virtual_time_of_another_limit_is_forgotten_and_not_served() {
    let meter = Meter::paced(rate(8_000_000));
    for stale_ns in [START + 10_000 * MS, u64::MAX] {
        let next = step(meter, stale_ns, START, 1500);
        assert_eq!((next.verdict, next.vtime_ns), (Verdict::Drop, START + 50 * MS));
    }
    // The longest buffer at this rate is no such time.
    let longest = step(meter, START + 25 * MS, START, MAX_BYTES).vtime_ns;
    assert_eq!(step(meter, longest, START, 1500).vtime_ns, longest);
}

#[test]
fn a_lease_holds_until_its_end_and_an_empty_limit_never() {
    let limit = Limit::new(Meter::paced(rate(1_000_000)), START, 0);
    assert!(limit.holds(START - 1) && !limit.holds(START));
    assert!(!Limit::default().holds(0));
}

#[test]
fn the_limit_behind_a_limit_is_a_tenth_above_it() {
    let (meter, behind) = (Meter::paced(rate(1_000_000)), Meter::paced(rate(1_000_000)).backstop());
    assert_eq!(cost(meter.mult, 110_000).abs_diff(cost(behind.mult, 121_000)), 1);
    assert_eq!(behind.horizon_ns, 2 * meter.horizon_ns);
    assert_eq!(Meter::paced(rate(8_000_000)).horizon_bytes(), 25_000);
    assert_eq!(Meter::default().horizon_bytes(), 0);
}

/// A cell that nobody else has.
#[derive(Default)]
struct Own(std::cell::Cell<u64>);

impl Cell for Own {
    fn load(&self) -> u64 {
        self.0.get()
    }
    fn exchange(&self, current: u64, new: u64) -> Result<(), u64> {
        if self.0.get() != current {
            return Err(self.0.get());
        }
        self.0.set(new);
        Ok(())
    }
    fn add(&self, value: u64) -> u64 {
        self.0.replace(self.0.get() + value)
    }
}

#[test]
fn the_nodes_limit_is_taken_in_quanta_and_never_exceeded() {
    let limit = NodeLimit::new(Meter::paced(rate(80_000_000)));
    assert_eq!(limit.quantum, 2500);
    let (cell, mut credits) = (Own::default(), [0, 0]);
    let mut bytes = 0;
    for packet in 0..20_000_u64 {
        let now_ns = START + packet * 50_000;
        let index = usize::from(packet % 3 == 0);
        if at(charge_node(&cell, &mut credits[index], limit, now_ns, 1000)).is_some() {
            bytes += 1000;
        }
    }
    // 160 Mbit/s were offered for a second; a horizon of 25 ms may be booked ahead.
    let (least, most) = (10_000_000, 10_250_000 + 2 * limit.quantum + 1000);
    assert!((least..=most).contains(&bytes), "{bytes}");
}

#[test]
fn a_node_without_a_limit_charges_nothing() {
    let (cell, mut credit) = (Own::default(), 0);
    let verdict = charge_node(&cell, &mut credit, NodeLimit::default(), START, MAX_BYTES);
    assert_eq!((verdict, cell.load(), credit), (Verdict::Send { at_ns: START }, 0, 0));
}

struct Shared(atomic::AtomicU64);

impl Cell for Shared {
    fn load(&self) -> u64 {
        self.0.load(atomic::Ordering::Relaxed)
    }
    fn exchange(&self, current: u64, new: u64) -> Result<(), u64> {
        self.0
            .compare_exchange(current, new, atomic::Ordering::Relaxed, atomic::Ordering::Relaxed)
            .map(|_| ())
    }
    fn add(&self, value: u64) -> u64 {
        self.0.fetch_add(value, atomic::Ordering::Relaxed)
    }
}

/// Interleavings of threads that charge one cell, all with as many switches: what each packet pays for is its own.
fn own_stretches(threads: u64, each: u64, tries: u32, switches: Option<usize>) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = switches;
    model.check(move || {
        // 8 Mbit/s; busy for 5 ms already, so that every departure shows where its stretch begins.
        let meter = Meter::paced(rate(8_000_000));
        let begin_ns = START + 5 * MS;
        let cell = Arc::new(Shared(atomic::AtomicU64::new(begin_ns)));
        let handles: Vec<_> = (0..threads)
            .map(|thread| {
                let cell = Arc::clone(&cell);
                loom::thread::spawn(move || {
                    let lengths = (0..each).map(|packet| 1000 + thread * 100 + packet);
                    lengths
                        .map(|bytes| (at(charge_within(&*cell, meter, START, bytes, tries)).unwrap(), bytes))
                        .collect::<Vec<_>>()
                })
            })
            .collect();
        let mut stretches: Vec<_> = handles.into_iter().flat_map(|handle| handle.join().unwrap()).collect();
        stretches.sort_unstable();
        let mut next_ns = begin_ns;
        for (at_ns, bytes) in stretches {
            assert_eq!(at_ns + BURST_NS, next_ns);
            next_ns += cost(meter.mult, bytes);
        }
        assert_eq!(cell.load(), next_ns);
    });
}

#[test]
fn two_cpus_never_sell_the_same_time_twice() {
    own_stretches(2, 2, super::TRIES, None);
}

#[test]
fn three_cpus_never_sell_the_same_time_twice_even_when_each_loses_every_try() {
    own_stretches(3, 1, 1, Some(3));
    own_stretches(2, 2, 1, None);
}

#[test]
fn a_packet_that_is_dropped_moves_nothing() {
    let meter = Meter::paced(rate(8_000_000));
    let cell = Own(std::cell::Cell::new(START + 26 * MS));
    assert_eq!(charge(&cell, meter, START, 1500), Verdict::Drop);
    assert_eq!(cell.load(), START + 26 * MS);
}

#[test]
fn of_two_cpus_at_the_edge_of_the_horizon_only_as_many_pass_as_there_is_room() {
    loom::model(|| {
        let meter = Meter::paced(rate(8_000_000));
        let cell = Arc::new(Shared(atomic::AtomicU64::new(START + 25 * MS)));
        let handles: Vec<_> = (0..2)
            .map(|_| {
                let cell = Arc::clone(&cell);
                loom::thread::spawn(move || charge(&*cell, meter, START, 1500))
            })
            .collect();
        let verdicts: Vec<_> = handles.into_iter().map(|handle| handle.join().unwrap()).collect();
        assert_eq!(verdicts.iter().filter(|verdict| **verdict == Verdict::Drop).count(), 1);
        assert_eq!(cell.load(), START + 25 * MS + 1_500_000);
    });
}
