//! What holds whatever connections do.

use std::time::{Duration, Instant};

use dvpn_common::rate::Rate;
use proptest::prelude::*;

use super::{Allocator, Budget, Counters, INTERVAL};

/// Rounds after which nobody waits for what is there.
const ROUNDS: usize = 16;

#[derive(Debug, Clone)]
enum Op {
    Connect {
        key: u8,
        approved: Option<u64>,
    },
    Disconnect {
        key: u8,
    },
    Budget {
        total: u64,
        limit: Option<u64>,
    },
    /// Counters may say anything, also less than before.
    Observe {
        counted: Vec<(u8, u64, u64, u64, u64)>,
        after_ms: u64,
    },
    /// Carries out as much of a plan.
    Carry {
        out: usize,
    },
}

fn bits() -> impl Strategy<Value = u64> {
    prop_oneof![0..1000_u64, 0..2_000_000_000_u64, any::<u64>(), Just(u64::MAX)]
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => (any::<u8>(), proptest::option::of(bits())).prop_map(|(key, approved)| Op::Connect { key, approved }),
        1 => any::<u8>().prop_map(|key| Op::Disconnect { key }),
        1 => (bits(), proptest::option::of(bits())).prop_map(|(total, limit)| Op::Budget { total, limit }),
        3 => (proptest::collection::vec((any::<u8>(), bits(), bits(), bits(), bits()), 0..8), 0..5000_u64)
            .prop_map(|(counted, after_ms)| Op::Observe { counted, after_ms }),
        4 => (0..300_usize).prop_map(|out| Op::Carry { out }),
    ]
}

fn budget(total: u64, limit: Option<u64>) -> Budget {
    Budget::new(Rate::from_bits_per_second(total), limit.map(Rate::from_bits_per_second))
}

fn enforced_sum(allocator: &Allocator<u8>) -> u128 {
    let all = allocator
        .shares()
        .map(|share| u128::from(share.enforced.bits_per_second()));
    all.sum()
}

/// Connections that offer constant rates, seen round after round.
struct Constant {
    allocator: Allocator<u32>,
    offered: Vec<u64>,
    counters: Vec<Counters>,
    now: Instant,
}

impl Constant {
    fn new(budget: Budget, offered: Vec<u64>) -> Self {
        let mut allocator = Allocator::new(budget);
        for key in 0..u32::try_from(offered.len()).unwrap() {
            allocator.connect(key, None);
        }
        Self {
            counters: vec![Counters::default(); offered.len()],
            allocator,
            offered,
            now: super::beginning(),
        }
    }

    fn enforced(&self) -> Vec<u64> {
        self.allocator
            .shares()
            .map(|share| share.enforced.bits_per_second())
            .collect()
    }

    fn round(&mut self) {
        let counted = (0..).zip(self.counters.iter().copied());
        self.allocator.observe(counted, self.now);
        for change in self.allocator.plan() {
            self.allocator.applied(change);
        }
        self.now += INTERVAL;
        let enforced = self.enforced();
        for ((counters, offered), enforced) in self.counters.iter_mut().zip(&self.offered).zip(enforced) {
            let bytes = |rate: u64| rate / 8 * u64::try_from(INTERVAL.as_millis()).unwrap() / 1000;
            counters.bytes += bytes(enforced.min(*offered));
            counters.packets += bytes(enforced.min(*offered)) / 1000;
            counters.drops += u64::from(*offered > enforced);
        }
    }

    fn rounds(&mut self, count: usize) {
        for _ in 0..count {
            self.round();
        }
    }
}

fn offers() -> impl Strategy<Value = Vec<u64>> {
    let one = prop_oneof![Just(0), 0..200_000_u64, 0..200_000_000_u64, Just(1_000_000_000_u64),];
    proptest::collection::vec(one, 1..40)
}

proptest! {
    #[test]
    fn never_above_a_grant_nor_above_the_line_at_any_moment(ops in proptest::collection::vec(op(), 1..60)) {
        let mut allocator = Allocator::new(budget(100_000_000, None));
        let mut now = super::beginning();
        for op in ops {
            match op {
                Op::Connect { key, approved } => allocator.connect(key, approved.map(Rate::from_bits_per_second)),
                Op::Disconnect { key } => drop(allocator.disconnect(key)),
                Op::Budget { total, limit } => allocator.set_budget(budget(total, limit)),
                Op::Observe { counted, after_ms } => {
                    now += Duration::from_millis(after_ms);
                    let counted = counted.into_iter().map(|(key, bytes, packets, drops, ms)| {
                        (key, Counters { bytes, packets, drops, held_back: Duration::from_millis(ms) })
                    });
                    allocator.observe(counted, now);
                }
                Op::Carry { out } => {
                    let capacity = u128::from(allocator.budget().capacity().bits_per_second());
                    // A line that became slower leaves more enforced than there is, until the decreases are carried out.
                    let mut most = enforced_sum(&allocator).max(capacity);
                    let plan = allocator.plan();
                    let whole = out >= plan.len();
                    for change in plan.into_iter().take(out) {
                        allocator.applied(change);
                        let sum = enforced_sum(&allocator);
                        prop_assert!(sum <= most, "{sum} of {most}");
                        most = sum.max(capacity);
                    }
                    if whole {
                        prop_assert!(enforced_sum(&allocator) <= capacity);
                        prop_assert_eq!(allocator.plan(), vec![]);
                        for share in allocator.shares() {
                            prop_assert!(share.enforced <= share.grant, "{share:?}");
                            prop_assert!(share.grant <= allocator.budget().grant(), "{share:?}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn who_wants_more_gets_it_while_there_is_more(offered in offers(), total in 1_000_000..1_000_000_000_u64) {
        let budget = budget(total, None);
        let (capacity, grant) = (budget.capacity().bits_per_second(), budget.grant().bits_per_second());
        let mut world = Constant::new(budget, offered);
        world.rounds(ROUNDS);
        for _ in 0..8 {
            world.round();
            let enforced = world.enforced();
            let used: u64 = enforced.iter().zip(&world.offered).map(|(enforced, offered)| enforced.min(offered)).sum();
            // Margins and floors are all that may lie idle beside somebody who wants more.
            let used_up = used >= capacity - capacity / 16 - capacity / 32 - capacity / 64;
            let fair = capacity / enforced.len() as u64;
            for (enforced, offered) in enforced.iter().zip(&world.offered) {
                let wants = (*offered).min(grant);
                prop_assert!(used_up || *enforced >= wants, "{enforced} of {offered}; {used} of {capacity} used");
                // And nobody starves: an even share is everybody's who wants it.
                prop_assert!(*enforced >= wants.min(fair), "{enforced} of {offered}, fair {fair}");
            }
        }
    }

    #[test]
    fn names_and_their_order_decide_nothing(offered in offers(), turn in 0..40_usize) {
        let budget = budget(100_000_000, None);
        let mut turned = offered.clone();
        let turn = turn % offered.len();
        turned.rotate_left(turn);
        let (mut one, mut other) = (Constant::new(budget, offered), Constant::new(budget, turned));
        for _ in 0..ROUNDS {
            one.round();
            other.round();
            let mut expected = one.enforced();
            expected.rotate_left(turn);
            prop_assert_eq!(expected, other.enforced());
        }
    }
}
