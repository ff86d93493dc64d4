//! Every decision DVPN makes, and no I/O: nothing here reads a clock, a socket, a file or a variable.
//!
//! | module | decides |
//! |---|---|
//! | [`session`] | what happens next: the state machine |
//! | [`selection`] | which providers are measured, and which is taken |
//! | [`directory`] | whether a provider list is believed |
//! | [`payment`] | paid, not paid, or cannot tell |
//! | [`approval`] | whether a tunnel may exist |
//! | [`pool_key`] | whether a new key of the pool is believed |
//! | [`node`] | whether a provider takes clients now |
//! | [`grant`] | who gets how much of the line |
//! | [`line`] | what the line carries: when it is measured, and what the samples say |
//! | [`firewall`] | what may pass in which state |
//! | [`leak`] | what a leak test on demand sends, and what follows from what was seen |
//! | [`portal`] | whether a network wants a login, and for whom and how long one is let out for it |
//! | [`dns`] | by which way programs are sent to the tunnel's name servers |
//! | [`config`] | what the operator asked for |
//! | [`seal`] | whether a stored secret is ours and whole |
//! | [`audit`] | what is worth recording |
//! | [`sim`] | nothing: it tries the machine against a world that fails in every way |
//! | [`possession`] | what shows the pool that a key is ours |
//! | [`address`], [`keys`], [`text`] | what addresses, keys and foreign texts are |

pub mod address;
pub mod approval;
pub mod audit;
pub mod config;
pub mod directory;
pub mod dns;
pub mod firewall;
pub mod grant;
pub mod keys;
pub mod leak;
pub mod line;
pub mod node;
pub mod payment;
pub mod pool_key;
pub mod portal;
pub mod possession;
pub mod rollback;
pub mod seal;
pub mod selection;
pub mod session;
pub mod sim;
pub mod text;

use std::{fmt, time::Instant};

use jiff::Timestamp;

/// The time of an input, on both clocks. The caller reads them; nothing in this crate does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Now {
    /// Monotonic: for timeouts.
    pub instant: Instant,
    /// Wall clock: for what others signed or dated.
    pub wall: Timestamp,
}

/// What to do after a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retry {
    /// At once: with the next candidate.
    Now,
    /// After a growing pause.
    Backoff,
    /// Not until somebody acts.
    Never,
}

/// A failure as the session and its users see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// What failed, on what.
    pub what: String,
    /// What to do about it.
    pub how: String,
    /// Whether trying again can help.
    pub retry: Retry,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.what, self.how)
    }
}
