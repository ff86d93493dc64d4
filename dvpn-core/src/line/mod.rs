//! What this machine's line carries: set by its owner, or measured. A layer-3 rate of the uplink, for each direction.
//!
//! | module | decides |
//! |---|---|
//! | [`book`] | what is remembered of each network, and what may still be spent on it today |
//! | [`samples`] | the rate, from what a transfer brought |
//! | [`rates`] | what the same traffic is at another layer |
//! | [`words`] | how it is told |

pub mod book;
pub mod rates;
pub mod samples;
pub mod words;

use std::time::Duration;

use dvpn_common::{rate::Rate, status::StateName};
use jiff::Timestamp;

use crate::{
    Failure,
    grant::{PerDirection, Total},
};
use book::{Book, NetworkId};

/// A line is not measured again before this.
pub const MEASURED_FOR: Duration = Duration::from_hours(24);
/// Bytes that a day's measurements of one network may cost on the wire, in all.
pub const DAILY_BYTES: u64 = 200_000_000;
/// Payload that is asked for in one measurement; what headers and packets in flight add stays below [`DAILY_BYTES`].
pub const PAYLOAD_BYTES: u64 = 160_000_000;
/// With less than this nothing is begun: it would not tell the rate of a fast line.
const LEAST_PAYLOAD: u64 = 40_000_000;
/// Pause after the first failure, and the longest; each one doubles it.
const FIRST_PAUSE: Duration = Duration::from_mins(1);
const LONGEST_PAUSE: Duration = Duration::from_hours(1);

/// A result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Measured {
    /// From the internet.
    pub down: Rate,
    /// To the internet; nothing where the server takes no uploads.
    pub up: Option<Rate>,
    /// When.
    pub at: Timestamp,
}

/// What is known of the line.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Known {
    /// `BANDWIDTH_TOTAL_MBPS`.
    Set(Rate),
    /// It was measured.
    Measured(Measured),
    /// Nothing.
    #[default]
    Nothing,
}

impl Known {
    /// Each direction, as far as it is known.
    pub fn rates(&self) -> PerDirection<Option<Rate>> {
        match *self {
            Self::Set(rate) => PerDirection {
                down: Some(rate),
                up: Some(rate),
            },
            Self::Measured(measured) => PerDirection {
                down: Some(measured.down),
                up: measured.up,
            },
            Self::Nothing => PerDirection::default(),
        }
    }

    /// What a client has of its own line: nothing unless both directions are known.
    pub fn own(&self) -> Option<Total> {
        let PerDirection { down, up } = self.rates();
        Some(Total { down: down?, up: up? })
    }

    /// What a provider can carry for others. Whatever it forwards passes its line twice, in and out: the slower direction
    /// is what there is, whichever way the client's traffic goes.
    pub fn forwarded(&self) -> Option<Total> {
        self.own().map(|Total { down, up }| Total::symmetric(down.min(up)))
    }
}

/// Why the line is not measured now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Hindrance {
    /// The daemon has only just started.
    NotYet,
    /// `BANDWIDTH_TEST_URL` is empty.
    NoServer,
    /// No way out of this machine.
    NoNetwork,
    /// Everything is blocked.
    Blocked,
    /// The network costs by the byte.
    Metered,
    /// A session is being made: what it measures itself would suffer.
    Connecting,
    /// Others use the line, and an older figure holds.
    Busy,
    /// The day's bytes are spent.
    Spent,
    /// The last try failed.
    Failed(Failure),
}

impl Hindrance {
    /// Whether it ends soon and by itself: nobody has to hear of it.
    pub fn is_passing(&self) -> bool {
        match self {
            Self::NotYet | Self::Connecting | Self::Busy => true,
            Self::NoServer | Self::NoNetwork | Self::Blocked | Self::Metered | Self::Spent | Self::Failed(_) => false,
        }
    }
}

/// What matters to whether the line is measured now.
#[derive(Debug, Clone)]
#[expect(clippy::struct_excessive_bools, reason = "independent facts, each read by itself")]
pub struct Facts {
    /// `BANDWIDTH_TEST_URL` is set.
    pub has_server: bool,
    /// Where this machine is.
    pub network: Option<NetworkId>,
    /// Whether that network costs by the byte. Who does not know says no.
    pub metered: bool,
    /// Of the session.
    pub state: StateName,
    /// `LOCKDOWN`: a session that rests blocks.
    pub lockdown: bool,
    /// Clients of ours use the line.
    pub has_clients: bool,
}

/// Whether to measure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// Now, with at most this much payload.
    Measure {
        /// Bytes, both directions together.
        payload: u64,
    },
    /// What is known holds.
    Keep {
        /// Until then.
        until: Timestamp,
    },
    /// Not now.
    Not {
        /// Why.
        hindrance: Hindrance,
        /// When the time alone removes that.
        until: Option<Timestamp>,
    },
}

/// The last failures, since the last success.
#[derive(Debug, Clone, Default)]
pub struct Failures {
    last: Option<(Failure, Timestamp)>,
    count: u32,
}

impl Failures {
    /// One more.
    pub fn note(&mut self, failure: Failure, now: Timestamp) {
        let pause = FIRST_PAUSE.saturating_mul(1 << self.count.min(6)).min(LONGEST_PAUSE);
        self.count = self.count.saturating_add(1);
        self.last = Some((failure, after(now, pause)));
    }
}

/// Whether to measure at `now`.
pub fn decide(book: &Book, failures: &Failures, facts: &Facts, now: Timestamp) -> Decision {
    let not = |hindrance| Decision::Not { hindrance, until: None };
    if !facts.has_server {
        return not(Hindrance::NoServer);
    }
    let Some(network) = facts.network else {
        return not(Hindrance::NoNetwork);
    };
    let known = book.measured(&network, now);
    if let Some(measured) = known {
        let until = after(measured.at, MEASURED_FOR);
        if now < until {
            return Decision::Keep { until };
        }
    }
    if facts.state == StateName::Blocked || (facts.lockdown && facts.state == StateName::Disconnected) {
        return not(Hindrance::Blocked);
    }
    if facts.metered {
        return not(Hindrance::Metered);
    }
    if !matches!(facts.state, StateName::Disconnected | StateName::Connected) {
        return not(Hindrance::Connecting);
    }
    if known.is_some() && (facts.has_clients || facts.state == StateName::Connected) {
        return not(Hindrance::Busy);
    }
    let (payload, renewed) = book.allowance(&network, now);
    if payload < LEAST_PAYLOAD {
        return Decision::Not {
            hindrance: Hindrance::Spent,
            until: Some(renewed),
        };
    }
    match &failures.last {
        Some((failure, until)) if now < *until => Decision::Not {
            hindrance: Hindrance::Failed(failure.clone()),
            until: Some(*until),
        },
        Some(_) | None => Decision::Measure { payload },
    }
}

/// A moment later; the end of time when there is none.
fn after(moment: Timestamp, pause: Duration) -> Timestamp {
    moment.saturating_add(pause).unwrap_or(Timestamp::MAX)
}

#[cfg(test)]
mod tests;
