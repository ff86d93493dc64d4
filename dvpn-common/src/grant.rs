//! What a packet costs of a grant, and what becomes of it: one arithmetic for the tc programs and for their tests.
//!
//! A limit is one number, a virtual time: the moment at which all that it let pass will have left at its rate. A packet
//! of `n` bytes moves it on by `n` at the rate; how far it is ahead of the clock is the backlog. That is the generic cell
//! rate algorithm (ITU-T I.371), and the time before it moves is the packet's time of departure.
//!
//! - Above the **horizon** a packet is dropped. The horizon is a queue in time: 16 full packets, for with both
//!   directions busy a shorter one loses the acknowledgements of the other, but no less than 25 ms, for one flow fills
//!   the rate with that, and no more than 200 ms.
//! - A **small** packet (an acknowledgement, a question, a ping) is charged and not held back; it is dropped above twice
//!   the horizon only.
//! - Above half the horizon a packet that can carry it is **marked** instead of waiting for a loss (RFC 3168).
//!
//! Costs are rounded up, so that what passes in any stretch of time is never more than the rate, one [`BURST_NS`] and
//! one packet; with small ones, two horizons instead of the burst.

use crate::rate::Rate;

/// A cost in nanoseconds is `bytes * mult` shifted by this.
pub const SHIFT: u32 = 20;
/// The longest buffer that a limit carries: longer ones are dropped. No kernel makes them by default.
pub const MAX_BYTES: u64 = 1 << SHIFT;
/// The smallest rate that lets anything pass, 8 kbit/s; below, costs would not fit in 64 bits and a full packet would
/// take seconds.
pub const MIN_RATE: Rate = Rate::from_bits_per_second(8_000);
/// So much may leave at once: timers are no finer, and at high rates one timer for each packet is too many.
pub const BURST_NS: u64 = 1_000_000;
/// Up to this length a packet is charged and not held back.
pub const SMALL_BYTES: u64 = 128;
/// How often a charge is tried against others before it is added without looking.
pub const TRIES: u32 = 4;

const MILLISECOND_NS: u64 = 1_000_000;
const SHORTEST_HORIZON_NS: u64 = 25 * MILLISECOND_NS;
const LONGEST_HORIZON_NS: u64 = 200 * MILLISECOND_NS;
/// With nothing that holds packets back the horizon is the burst, and TCP needs it larger.
const SHORTEST_BURST_NS: u64 = 50 * MILLISECOND_NS;
const HORIZON_BYTES: u64 = 16 * 1500;
/// What the limit behind a paced one allows: 11/10 of it.
const BACKSTOP: (u64, u64) = (10, 11);
/// What a CPU takes at once of the node's limit: this long at the rate, and within these.
const QUANTUM_NS: u64 = MILLISECOND_NS / 4;
const QUANTUM_BYTES: (u64, u64) = (1500, 65_536);

/// A rate as the programs use it.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Meter {
    /// Nanoseconds that a byte takes, shifted by [`SHIFT`], rounded up; 0 lets nothing pass.
    pub mult: u64,
    /// How far ahead of the clock packets are taken.
    pub horizon_ns: u64,
}

impl Meter {
    /// For a rate that packets are paced to.
    pub fn paced(rate: Rate) -> Self {
        Self::with_horizon(rate, SHORTEST_HORIZON_NS)
    }

    /// For a rate with nothing that holds packets back.
    pub fn policed(rate: Rate) -> Self {
        Self::with_horizon(rate, SHORTEST_BURST_NS)
    }

    fn with_horizon(rate: Rate, shortest_ns: u64) -> Self {
        let mult = mult(rate);
        Self {
            mult,
            horizon_ns: cost(mult, HORIZON_BYTES).clamp(shortest_ns, LONGEST_HORIZON_NS),
        }
    }

    /// The limit behind this one, for when what should pace to it does not: a tenth more, and twice the horizon.
    #[must_use]
    pub fn backstop(self) -> Self {
        let (numerator, denominator) = BACKSTOP;
        Self {
            mult: (self.mult * numerator).div_ceil(denominator),
            horizon_ns: 2 * self.horizon_ns,
        }
    }

    /// Bytes that the limit holds within its horizon: the length of a queue that takes as much.
    pub fn horizon_bytes(self) -> u64 {
        (self.horizon_ns << SHIFT).checked_div(self.mult).unwrap_or_default()
    }
}

/// What the programs need to know of one direction of one peer. Zero is a lease that ran out.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limit {
    /// The grant.
    pub meter: Meter,
    /// The limit behind it.
    pub backstop: Meter,
    /// When the lease ends, in nanoseconds of the monotonic clock.
    pub until_ns: u64,
    /// The class of the qdisc htb, major and minor number.
    pub class: u32,
    /// Always 0.
    pub reserved: u32,
    /// Always 0.
    pub reserved2: [u64; 2],
}

impl Limit {
    /// Of these, until then.
    pub fn new(meter: Meter, until_ns: u64, class: u32) -> Self {
        Self {
            meter,
            backstop: meter.backstop(),
            until_ns,
            class,
            ..Self::default()
        }
    }

    /// Whether the lease runs and anything may pass.
    #[inline]
    pub const fn holds(&self, now_ns: u64) -> bool {
        now_ns < self.until_ns && self.meter.mult != 0
    }
}

/// What holds for all peers together in one direction. Zero is no limit.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct NodeLimit {
    /// The limit.
    pub meter: Meter,
    /// Bytes that a CPU takes at once, so that CPUs seldom meet.
    pub quantum: u64,
}

impl NodeLimit {
    /// As this meter says.
    pub fn new(meter: Meter) -> Self {
        let (least, most) = QUANTUM_BYTES;
        let quantum = (QUANTUM_NS << SHIFT).checked_div(meter.mult).unwrap_or_default();
        Self {
            meter,
            quantum: quantum.clamp(least, most),
        }
    }
}

/// Nanoseconds a byte takes at a rate, shifted by [`SHIFT`]; 0 below [`MIN_RATE`].
fn mult(rate: Rate) -> u64 {
    if rate < MIN_RATE {
        return 0;
    }
    // 8 * 10^9 << 20 is less than 2^53.
    (8_000_000_000_u64 << SHIFT).div_ceil(rate.bits_per_second())
}

/// Nanoseconds that `bytes` take, rounded up. `bytes` is at most [`MAX_BYTES`] and `mult` at most 2^40: no overflow.
#[inline]
pub const fn cost(mult: u64, bytes: u64) -> u64 {
    (bytes * mult + (MAX_BYTES - 1)) >> SHIFT
}

/// What becomes of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It leaves.
    Send {
        /// When, in nanoseconds of the monotonic clock; never before now.
        at_ns: u64,
    },
    /// It leaves with a mark of congestion, if it can carry one.
    Mark {
        /// When.
        at_ns: u64,
    },
    /// It does not.
    Drop,
}

/// Where a limit stands after a packet, and what becomes of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// The virtual time.
    pub vtime_ns: u64,
    /// What becomes of the packet.
    pub verdict: Verdict,
}

/// One packet against one limit whose virtual time is `vtime_ns`.
///
/// A virtual time that this limit cannot have come to is another's, left by a far smaller one or by who had the number
/// before: it is brought back to where the limit is free again in two horizons.
#[allow(clippy::inline_always, reason = "the verifier knows less across calls")]
#[inline(always)]
pub const fn step(meter: Meter, vtime_ns: u64, now_ns: u64, bytes: u64) -> Step {
    let backlog_ns = vtime_ns.saturating_sub(now_ns);
    let twice_ns = 2 * meter.horizon_ns;
    // The longest buffer, sent just below twice the horizon, costs `mult`.
    if backlog_ns > twice_ns + meter.mult {
        return Step {
            vtime_ns: now_ns.saturating_add(twice_ns),
            verdict: Verdict::Drop,
        };
    }
    let small = bytes <= SMALL_BYTES;
    let most_ns = if small { twice_ns } else { meter.horizon_ns };
    if backlog_ns > most_ns || bytes > MAX_BYTES || meter.mult == 0 {
        return Step {
            vtime_ns,
            verdict: Verdict::Drop,
        };
    }
    let wait_ns = if small { 0 } else { backlog_ns.saturating_sub(BURST_NS) };
    let at_ns = now_ns.saturating_add(wait_ns);
    let base_ns = now_ns.saturating_add(backlog_ns);
    Step {
        vtime_ns: base_ns.saturating_add(cost(meter.mult, bytes)),
        verdict: if backlog_ns > meter.horizon_ns / 2 {
            Verdict::Mark { at_ns }
        } else {
            Verdict::Send { at_ns }
        },
    }
}

/// A virtual time that several CPUs move on.
pub trait Cell {
    /// Reads it.
    fn load(&self) -> u64;
    /// Writes `new` if it still is `current`; else says what it is.
    fn exchange(&self, current: u64, new: u64) -> Result<(), u64>;
    /// Adds to it and says what it was.
    fn add(&self, value: u64) -> u64;
}

/// One packet against one limit that others use too. Every packet that passes has its own stretch of virtual time.
#[allow(clippy::inline_always, reason = "the verifier knows less across calls")]
#[inline(always)]
pub fn charge(cell: &impl Cell, meter: Meter, now_ns: u64, bytes: u64) -> Verdict {
    charge_within(cell, meter, now_ns, bytes, TRIES)
}

#[allow(clippy::inline_always, reason = "the verifier knows less across calls")]
#[inline(always)]
fn charge_within(cell: &impl Cell, meter: Meter, now_ns: u64, bytes: u64, tries: u32) -> Verdict {
    let mut vtime_ns = cell.load();
    let mut attempt = 0;
    while attempt < tries {
        let next = step(meter, vtime_ns, now_ns, bytes);
        if next.vtime_ns == vtime_ns {
            return next.verdict;
        }
        match cell.exchange(vtime_ns, next.vtime_ns) {
            Ok(()) => return next.verdict,
            Err(seen_ns) => vtime_ns = seen_ns,
        }
        attempt += 1;
    }
    // Others were always quicker. It is not this packet's fault: if it would have passed, it passes, and pays.
    match step(meter, vtime_ns, now_ns, bytes).verdict {
        Verdict::Drop => Verdict::Drop,
        Verdict::Send { .. } | Verdict::Mark { .. } => {
            let before_ns = cell.add(cost(meter.mult, bytes));
            let backlog_ns = before_ns.saturating_sub(now_ns);
            let small = bytes <= SMALL_BYTES;
            let wait_ns = if small { 0 } else { backlog_ns.saturating_sub(BURST_NS) };
            Verdict::Send {
                at_ns: now_ns.saturating_add(wait_ns),
            }
        }
    }
}

/// One packet against the node's limit. `credit` is what this CPU took and has not used yet, in bytes.
#[allow(clippy::inline_always, reason = "the verifier knows less across calls")]
#[inline(always)]
pub fn charge_node(cell: &impl Cell, credit: &mut u64, limit: NodeLimit, now_ns: u64, bytes: u64) -> Verdict {
    let free = Verdict::Send { at_ns: now_ns };
    if limit.meter.mult == 0 {
        return free;
    }
    if *credit >= bytes {
        *credit -= bytes;
        return free;
    }
    let missing = bytes - *credit;
    let taken = if missing > limit.quantum {
        missing
    } else {
        limit.quantum
    };
    let verdict = charge(cell, limit.meter, now_ns, taken);
    match verdict {
        Verdict::Drop => return Verdict::Drop,
        Verdict::Send { .. } | Verdict::Mark { .. } => *credit = *credit + taken - bytes,
    }
    if bytes <= SMALL_BYTES { free } else { verdict }
}

#[cfg(all(test, feature = "std"))]
mod tests;
