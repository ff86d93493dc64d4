//! What a connection wants, guessed from what the kernel counted.
//!
//! Nobody says how much he would send. A connection that is held down (packets dropped or held back, or the rate used up) is
//! taken to want a multiple of what it has: that is the probe upward, and it ends at the grant. One that is not held down
//! wants a little more than it uses; the little is what others may have to do without, and so it is little. A pause is
//! believed slowly: what nothing is asked of any more halves every tenth of a second.

use std::time::{Duration, Instant};

use super::Counters;

/// Looks closer together than this say nothing.
const LEAST: Duration = Duration::from_millis(20);
/// A packet that waited longer than this on average was held back, and not only spaced.
const HELD_BACK: Duration = Duration::from_millis(5);
/// What a connection is taken to want whose packets wait or are lost, as a multiple of what it has.
const PROBE: u64 = 32;
/// And one that uses what it has and shows nothing else.
const GENTLE_PROBE: u64 = 2;
/// Part of its rate that a connection may leave unused and still have used it up.
const UNUSED: u64 = 32;
/// Part that is added to what is used where nothing is held down. Twice [`UNUSED`], so that the two cannot be mistaken for
/// each other.
const MARGIN: u64 = 16;
/// In how long a demand halves that nothing shows any more, in milliseconds.
const HALF_LIFE_MS: u128 = 100;

/// The guess, in bits per second.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Demand {
    wanted: u64,
    last: Option<(Instant, Counters)>,
}

impl Demand {
    pub(super) fn wanted(&self) -> u64 {
        self.wanted
    }

    /// A look at the counters of a connection that had `enforced` since the last one and is granted `grant`. `step` is what
    /// a connection that is held down wants at least: with many connections a multiple of what it has may be next to nothing.
    pub(super) fn observe(&mut self, now: Instant, counters: Counters, enforced: u64, grant: u64, step: u64) {
        let Some((then, before)) = self.last else {
            self.last = Some((now, counters));
            return;
        };
        let elapsed = now.saturating_duration_since(then);
        if elapsed < LEAST {
            return;
        }
        self.last = Some((now, counters));
        let Some(seen) = Seen::between(&before, &counters, elapsed) else {
            return;
        };
        self.wanted = match seen.pressure(enforced) {
            Pressure::None => {
                let ample = seen.rate.saturating_add(seen.rate / MARGIN);
                decayed(self.wanted.min(enforced), elapsed).max(ample)
            }
            // Losses with little traffic are what a policer does to a sender: taking more from it would make it worse.
            Pressure::Held if seen.rate < enforced / 2 => self.wanted,
            Pressure::Held => enforced.saturating_mul(PROBE).max(step).max(self.wanted),
            Pressure::UsedUp => enforced.saturating_mul(GENTLE_PROBE).max(self.wanted),
        }
        .min(grant);
    }
}

/// What happened between two looks.
struct Seen {
    /// Bits per second that passed.
    rate: u64,
    drops: u64,
    mean_wait: Duration,
}

impl Seen {
    /// Nothing when the counters began anew.
    fn between(before: &Counters, now: &Counters, elapsed: Duration) -> Option<Self> {
        let bytes = now.bytes.checked_sub(before.bytes)?;
        let packets = now.packets.checked_sub(before.packets)?;
        let held_back = now.held_back.checked_sub(before.held_back)?;
        let bits = u128::from(bytes) * 8 * 1_000_000;
        Some(Self {
            rate: u64::try_from(bits / elapsed.as_micros().max(1)).unwrap_or(u64::MAX),
            drops: now.drops.checked_sub(before.drops)?,
            mean_wait: held_back / u32::try_from(packets.max(1)).unwrap_or(u32::MAX),
        })
    }

    fn pressure(&self, enforced: u64) -> Pressure {
        if self.drops > 0 || self.mean_wait >= HELD_BACK {
            Pressure::Held
        } else if self.rate > 0 && self.rate >= enforced - enforced / UNUSED {
            Pressure::UsedUp
        } else {
            Pressure::None
        }
    }
}

/// What keeps a connection from sending more.
enum Pressure {
    /// Nothing of ours.
    None,
    /// Its rate is used up.
    UsedUp,
    /// Its packets wait or are lost.
    Held,
}

/// `wanted` after this long without a sign of it; between two halvings along a line.
fn decayed(wanted: u64, elapsed: Duration) -> u64 {
    let ms = elapsed.as_millis();
    let halvings = u32::try_from(ms / HALF_LIFE_MS).unwrap_or(u32::MAX);
    let halved = wanted.checked_shr(halvings).unwrap_or(0);
    let rest = u64::try_from(ms % HALF_LIFE_MS).unwrap_or(0);
    halved
        - (u128::from(halved) * u128::from(rest) / (2 * HALF_LIFE_MS))
            .try_into()
            .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRANT: u64 = 50_000_000;

    /// A demand that was `wanted`, after one look 125 ms later; `bits` passed per second.
    fn after(wanted: u64, enforced: u64, bits: u64, drops: u64, wait: Duration) -> u64 {
        let start = super::super::beginning();
        let mut demand = Demand { wanted, last: None };
        demand.observe(start, Counters::default(), enforced, GRANT, GRANT / 32);
        let bytes = bits / 8 / 8;
        let packets = bytes / 1000;
        let counters = Counters {
            bytes,
            packets,
            drops,
            held_back: wait * u32::try_from(packets).unwrap(),
        };
        demand.observe(
            start + Duration::from_millis(125),
            counters,
            enforced,
            GRANT,
            GRANT / 32,
        );
        demand.wanted()
    }

    #[test]
    fn who_is_held_down_wants_more_and_who_is_not_wants_a_little_more_than_he_uses() {
        let (quick, slow) = (Duration::ZERO, Duration::from_millis(9));
        for (what, wanted, expected) in [
            ("used up", after(0, 4_000_000, 4_000_000, 0, quick), 8_000_000),
            (
                "the grant is the end",
                after(0, 40_000_000, 40_000_000, 0, quick),
                GRANT,
            ),
            ("next to nothing", after(0, 10_000, 10_000, 1, quick), GRANT / 32),
            ("dropped", after(0, 1_000_000, 750_000, 1, quick), 32_000_000),
            ("held back", after(0, 1_000_000, 750_000, 0, slow), 32_000_000),
            (
                "policed to little",
                after(9_000_000, 4_000_000, 1_000_000, 7, quick),
                9_000_000,
            ),
            ("not held down", after(0, 10_000_000, 4_000_000, 0, quick), 4_250_000),
            ("silent", after(8_000_000, 8_000_000, 0, 0, quick), 3_500_000),
            ("silent with nothing", after(0, 0, 0, 0, quick), 0),
        ] {
            assert_eq!(wanted, expected, "{what}");
        }
    }

    #[test]
    fn counters_that_begin_anew_and_looks_too_close_say_nothing() {
        let start = super::super::beginning();
        let at = |ms| start + Duration::from_millis(ms);
        let mut demand = Demand::default();
        let some = Counters {
            bytes: 1_000_000,
            packets: 1000,
            drops: 5,
            held_back: Duration::from_secs(1),
        };
        demand.observe(at(0), some, 1000, GRANT, 0);
        demand.observe(at(125), Counters::default(), 1000, GRANT, 0);
        assert_eq!(demand.wanted(), 0);
        demand.observe(at(126), some, 1000, GRANT, 0);
        assert_eq!(demand.wanted(), 0);
        demand.observe(at(250), some, 1000, GRANT, 0);
        assert_eq!(demand.wanted(), 32_000);
    }

    #[test]
    fn a_demand_that_nothing_shows_is_gone_within_a_second() {
        assert_eq!(decayed(1 << 20, Duration::from_millis(100)), 1 << 19);
        assert_eq!(decayed(1 << 20, Duration::from_millis(150)), (1 << 18) + (1 << 17));
        assert_eq!(decayed(1 << 20, Duration::from_secs(1)), 1 << 10);
        assert_eq!(decayed(u64::MAX, Duration::from_hours(1)), 0);
    }
}
