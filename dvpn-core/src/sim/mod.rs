//! A simulated world around the real session machine: a pool, a payment server and an orchestrator that are slow, down,
//! hostile or silent in turn, providers with loss and outages, a user who changes his mind, a daemon that dies, and a
//! virtual clock. After every step the invariants of [`watch`] are checked; at the end everything heals and a session
//! that is wanted must be connected. One number, the seed, decides a run: what failed once fails again.

pub mod watch;
mod world;

use std::{fmt, ops::Range, time::Duration};

use watch::Broken;
pub use world::Counts;
use world::World;

use crate::Now;

/// How long each simulated world misbehaves.
const CHAOS: Duration = Duration::from_mins(4);
/// By when a wanted session must be connected: the longest pause, the longest lost answer, and room.
const END: Duration = Duration::from_mins(6);

/// What many runs saw.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// The seeds asked for.
    pub seeds: Range<u64>,
    /// Sums over all runs.
    pub counts: Counts,
    /// Seeds whose run broke an invariant, and which; at most [`Self::MAX_FAILURES`].
    pub failures: Vec<(u64, Broken)>,
    /// Failures beyond those listed.
    pub unlisted: u64,
}

impl Report {
    /// How many failures are listed.
    pub const MAX_FAILURES: usize = 10;

    /// Whether every invariant held in every run.
    pub fn is_good(&self) -> bool {
        self.failures.is_empty()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Counts {
            steps,
            attempts,
            tunnels,
            switches,
            provisions,
            renewals,
            regained,
            restarts,
        } = self.counts;
        let runs = self.seeds.end.saturating_sub(self.seeds.start);
        let minutes = END.as_secs() / 60;
        writeln!(
            f,
            "{runs} worlds of {minutes} simulated minutes each, seeds {}..{}",
            self.seeds.start, self.seeds.end
        )?;
        writeln!(
            f,
            "{steps} steps, {attempts} attempts, {tunnels} tunnels, {switches} unasked changes of provider"
        )?;
        writeln!(
            f,
            "{provisions} fallback providers, {renewals} renewals, {regained} of them after a lost answer, {restarts} \
             restarts of the daemon"
        )?;
        for (seed, broken) in &self.failures {
            writeln!(f, "seed {seed}: {broken}")?;
        }
        match self.failures.len() {
            0 => write!(f, "every invariant held after every step"),
            listed => write!(f, "{listed} failures listed, {} more", self.unlisted),
        }
    }
}

/// Runs a world per seed. `start` is only where the virtual clocks begin.
pub fn run(seeds: Range<u64>, start: Now) -> Report {
    let mut report = Report {
        seeds: seeds.clone(),
        counts: Counts::default(),
        failures: Vec::new(),
        unlisted: 0,
    };
    for seed in seeds {
        let mut world = World::new(seed, start);
        let result = world.run(CHAOS, END);
        let (sum, one) = (&mut report.counts, world.counts);
        sum.steps += one.steps;
        sum.attempts += one.attempts;
        sum.tunnels += one.tunnels;
        sum.switches += one.switches;
        sum.provisions += one.provisions;
        sum.renewals += one.renewals;
        sum.regained += one.regained;
        sum.restarts += one.restarts;
        match result {
            Ok(()) => {}
            Err(broken) if report.failures.len() < Report::MAX_FAILURES => {
                report.failures.push((
                    seed,
                    Broken(format!("after {:.3} s: {broken}", world.time.as_secs_f64())),
                ));
            }
            Err(_) => report.unlisted += 1,
        }
    }
    report
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::fixtures::start;

    #[test]
    fn ten_thousand_worlds_break_no_invariant() {
        let report = run(0..10_000, start());
        println!("{report}");
        assert!(report.is_good(), "{report}");
        // The worlds are worth something: all that can happen did.
        let counts = report.counts;
        for (what, count) in [
            ("attempts", counts.attempts),
            ("tunnels", counts.tunnels),
            ("switches", counts.switches),
            ("provisions", counts.provisions),
            ("renewals", counts.renewals),
            ("restarts", counts.restarts),
        ] {
            assert!(count > 4_000, "{count} {what} in 10,000 worlds");
        }
        assert!(
            counts.regained > 400,
            "{} renewals after a lost answer",
            counts.regained
        );
    }

    #[test]
    fn a_seed_decides_its_world() {
        let now = start();
        assert_eq!(run(17..20, now), run(17..20, now));
    }
}
