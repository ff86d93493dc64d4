//! The rates that are enforced in one direction.

use std::{collections::BTreeMap, time::Instant};

use dvpn_common::rate::Rate;

use super::{Budget, Counters, demand::Demand, fill};

/// Part of the capacity that idle connections hold, all together: what lets each begin at once.
const FLOORS: u64 = 32;
/// Part of the capacity that one idle connection holds at most.
const FLOOR: u64 = 128;
/// Part of the capacity that a connection that is held down wants at least.
const STEP: u64 = 64;
/// Rates that are only lent from what nobody wants have this many significant bits: they need not move with every packet.
const LENT_BITS: u32 = 3;

/// Shares a line in one direction among connections.
///
/// It decides, its caller acts: [`Allocator::plan`] says what is to change, in order, and [`Allocator::applied`] is told what
/// has. Nothing is taken for done that was not, so what failed is asked for again.
#[derive(Debug, Clone)]
pub struct Allocator<K> {
    budget: Budget,
    connections: BTreeMap<K, Connection>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Connection {
    /// What its approval allows.
    approved: Option<Rate>,
    /// What the kernel was last told.
    enforced: u64,
    demand: Demand,
}

/// One rate to be set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Change<K> {
    /// Whose.
    pub connection: K,
    /// To what.
    pub enforced: Rate,
}

/// How a connection stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share<K> {
    /// Whose.
    pub connection: K,
    /// The most it ever gets.
    pub grant: Rate,
    /// What it has now.
    pub enforced: Rate,
    /// What it seems to want.
    pub wanted: Rate,
}

impl<K: Copy + Ord> Allocator<K> {
    /// With nobody connected.
    pub fn new(budget: Budget) -> Self {
        Self {
            budget,
            connections: BTreeMap::new(),
        }
    }

    /// What is shared.
    pub fn budget(&self) -> Budget {
        self.budget
    }

    /// The line, or what its owner lends of it, is another one. The next plan fits it.
    pub fn set_budget(&mut self, budget: Budget) {
        self.budget = budget;
    }

    /// A connection begins, or begins anew: what it had is released, what it wants is unknown. `approved` is the most that
    /// its approval allows. It has nothing until a plan is carried out: that comes before its first packet.
    pub fn connect(&mut self, connection: K, approved: Option<Rate>) {
        let held = self.connections.entry(connection).or_default();
        held.approved = approved;
        held.demand = Demand::default();
    }

    /// A connection has ended; its grant returns. False if there was none. To be called once the kernel passes nothing of it
    /// any more: the next plan gives what it had to others.
    pub fn disconnect(&mut self, connection: K) -> bool {
        self.connections.remove(&connection).is_some()
    }

    /// Takes in what the kernel counted until `now`. Who is not connected is passed over.
    pub fn observe(&mut self, counted: impl IntoIterator<Item = (K, Counters)>, now: Instant) {
        let step = self.capacity() / STEP;
        for (key, counters) in counted {
            let Some(connection) = self.connections.get_mut(&key) else {
                continue;
            };
            let grant = connection.grant(self.budget);
            connection
                .demand
                .observe(now, counters, connection.enforced, grant, step);
        }
    }

    /// What is to change now: decreases first, so that all together never have more than there is, at no moment of carrying
    /// it out. When one fails, those after it must not be carried out: the next plan has them again.
    pub fn plan(&self) -> Vec<Change<K>> {
        let targets = self.targets();
        let changes = |up: bool| {
            let changed = self.connections.iter().zip(&targets);
            changed
                .filter(move |((_, connection), target)| {
                    **target != connection.enforced && (**target > connection.enforced) == up
                })
                .map(|((key, _), target)| Change {
                    connection: *key,
                    enforced: Rate::from_bits_per_second(*target),
                })
        };
        changes(false).chain(changes(true)).collect()
    }

    /// The kernel was told.
    pub fn applied(&mut self, change: Change<K>) {
        if let Some(connection) = self.connections.get_mut(&change.connection) {
            connection.enforced = change.enforced.bits_per_second();
        }
    }

    /// Every connection.
    pub fn shares(&self) -> impl Iterator<Item = Share<K>> {
        self.connections.iter().map(|(key, connection)| Share {
            connection: *key,
            grant: Rate::from_bits_per_second(connection.grant(self.budget)),
            enforced: Rate::from_bits_per_second(connection.enforced),
            wanted: Rate::from_bits_per_second(connection.demand.wanted()),
        })
    }

    fn capacity(&self) -> u64 {
        self.budget.capacity.bits_per_second()
    }

    /// What an idle connection holds.
    fn floor(&self) -> u64 {
        let count = u64::try_from(self.connections.len()).unwrap_or(u64::MAX);
        let all = self.capacity() / FLOORS;
        all.checked_div(count).unwrap_or(all).min(self.capacity() / FLOOR)
    }

    /// The rate of each, in the order of the connections.
    fn targets(&self) -> Vec<u64> {
        let floor = self.floor();
        let claims: Vec<Claim> = self
            .connections
            .values()
            .map(|connection| {
                let grant = connection.grant(self.budget);
                Claim {
                    grant,
                    want: connection.demand.wanted().max(floor).min(grant),
                }
            })
            .collect();
        let capacity = self.capacity();
        if let Some(level) = fill::level(claims.iter().map(|claim| claim.want), capacity) {
            return claims.iter().map(|claim| claim.want.min(level)).collect();
        }
        // Everybody has what he wants: the rest is lent evenly, so that who begins is not slow even for a moment.
        let wanted: u64 = claims.iter().map(|claim| claim.want).sum();
        let lent = fill::level(claims.iter().map(Claim::headroom), capacity - wanted).map_or(u64::MAX, coarse);
        claims
            .iter()
            .map(|claim| claim.want + claim.headroom().min(lent))
            .collect()
    }
}

impl Connection {
    fn grant(&self, budget: Budget) -> u64 {
        let grant = budget.grant();
        self.approved
            .map_or(grant, |approved| approved.min(grant))
            .bits_per_second()
    }
}

struct Claim {
    grant: u64,
    want: u64,
}

impl Claim {
    fn headroom(&self) -> u64 {
        self.grant - self.want
    }
}

/// Rounded down to its first [`LENT_BITS`] bits.
fn coarse(rate: u64) -> u64 {
    let dropped = (u64::BITS - rate.leading_zeros()).saturating_sub(LENT_BITS);
    rate >> dropped << dropped
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rate(bits: u64) -> Rate {
        Rate::from_bits_per_second(bits)
    }

    fn settle(allocator: &mut Allocator<u32>) -> Vec<u64> {
        for change in allocator.plan() {
            allocator.applied(change);
        }
        allocator
            .shares()
            .map(|share| share.enforced.bits_per_second())
            .collect()
    }

    #[test]
    fn the_grant_is_half_of_the_line_or_less_by_the_approval_or_the_owner() {
        for (total, limit, approved, grant) in [
            (100, None, None, 50),
            (101, None, None, 50),
            (100, Some(70), None, 50),
            (100, Some(30), None, 30),
            (100, Some(500), None, 50),
            (100, None, Some(10), 10),
            (100, None, Some(90), 50),
            (0, None, Some(90), 0),
        ] {
            let mut allocator = Allocator::new(Budget::new(rate(total), limit.map(rate)));
            allocator.connect(1, approved.map(rate));
            let share = allocator.shares().next().unwrap();
            assert_eq!(share.grant, rate(grant), "{total} {limit:?} {approved:?}");
            let alone = settle(&mut allocator);
            // Alone, it is lent all of its grant at once; small numbers are rounded down.
            assert!(
                alone[0] <= grant && alone[0] + grant / 4 >= grant,
                "{alone:?} of {grant}"
            );
        }
    }

    #[test]
    fn a_grant_returns_when_its_connection_ends_or_begins_anew() {
        let mut allocator = Allocator::new(Budget::new(rate(1000), None));
        for key in 0..4 {
            allocator.connect(key, None);
        }
        let four = settle(&mut allocator);
        assert!(four.iter().all(|enforced| *enforced <= 250), "{four:?}");
        assert!(allocator.disconnect(3) && !allocator.disconnect(3) && allocator.disconnect(2));
        assert_eq!(settle(&mut allocator), [500, 500]);
        allocator.connect(1, Some(rate(100)));
        assert_eq!(settle(&mut allocator), [500, 100]);
    }

    #[test]
    fn what_was_not_carried_out_is_planned_again() {
        let mut allocator = Allocator::new(Budget::new(rate(1000), None));
        allocator.connect(1, None);
        let plan = allocator.plan();
        assert_eq!(plan, allocator.plan());
        allocator.applied(plan[0]);
        assert_eq!(allocator.plan(), []);
        // Who is told for somebody that left changes nothing.
        allocator.disconnect(1);
        allocator.applied(plan[0]);
        assert_eq!(allocator.shares().count(), 0);
    }

    #[test]
    fn decreases_come_before_increases() {
        let mut allocator = Allocator::new(Budget::new(rate(1000), None));
        allocator.connect(5, None);
        allocator.connect(6, None);
        settle(&mut allocator);
        allocator.connect(1, None);
        let plan = allocator.plan();
        let first_rise = plan.iter().position(|change| change.connection == 1).unwrap();
        assert_eq!(first_rise, plan.len() - 1, "{plan:?}");
    }

    #[test]
    fn lent_rates_are_coarse() {
        for (rate, wanted) in [(0, 0), (7, 7), (9, 8), (1000, 896), (u64::MAX, 7 << 61)] {
            assert_eq!(coarse(rate), wanted);
        }
    }

    #[test]
    fn a_plan_for_4096_connections_takes_a_few_comparisons_each() {
        let mut allocator = Allocator::new(Budget::new(rate(10_000_000_000), None));
        let start = super::super::beginning();
        for key in 0..4096_u32 {
            allocator.connect(key, None);
        }
        let look = |bytes: u64| {
            (0..4096_u32).map(move |key| {
                let counters = Counters {
                    bytes: bytes * u64::from(key.wrapping_mul(2_654_435_761) % 1000),
                    ..Counters::default()
                };
                (key, counters)
            })
        };
        settle(&mut allocator);
        allocator.observe(look(0), start);
        allocator.observe(look(1000), start + super::super::INTERVAL);
        fill::COMPARISONS.set(0);
        assert!(!allocator.plan().is_empty());
        // Two sorts of n numbers: n log2 n is 49,152.
        let comparisons = fill::COMPARISONS.get();
        assert!(comparisons > 4096 && comparisons < 2 * 2 * 49_152, "{comparisons}");
    }
}
