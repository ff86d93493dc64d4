//! Who gets how much of the line.
//!
//! Two numbers belong to each connection and direction. Its **grant** is half of the line, or less where its approval or the
//! node's owner says so: no connection ever has more. What is **enforced** at a moment is what the kernel lets through then;
//! it never sums to more than the line, and three busy connections get a third each. An [`Allocator`] moves the enforced
//! rates every [`INTERVAL`], from what the kernel counted since the last look.
//!
//! Both directions are alike and know nothing of each other: a node has two allocators.

mod allocator;
mod demand;
mod fill;

use std::time::Duration;

pub use allocator::{Allocator, Change, Share};
use dvpn_common::rate::Rate;

/// How often the enforced rates are to be moved.
pub const INTERVAL: Duration = Duration::from_millis(125);

/// One value for each direction, as the clients of a provider see them: down is towards the client.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PerDirection<T> {
    /// From the internet.
    pub down: T,
    /// To the internet.
    pub up: T,
}

/// What the line carries: layer-3 rates of the uplink.
pub type Total = PerDirection<Rate>;

impl Total {
    /// The same both ways.
    pub fn symmetric(rate: Rate) -> Self {
        Self { down: rate, up: rate }
    }

    /// What one connection is granted of it.
    #[must_use]
    pub fn grant(self) -> Self {
        Self {
            down: self.down.half(),
            up: self.up.half(),
        }
    }
}

/// What there is to share in one direction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Budget {
    capacity: Rate,
    grant: Rate,
}

impl Budget {
    /// Of a line of `total`, of which its owner lends at most `limit` (`NODE_LIMIT_MBPS`).
    pub fn new(total: Rate, limit: Option<Rate>) -> Self {
        let capacity = limit.map_or(total, |limit| limit.min(total));
        Self {
            capacity,
            grant: total.half().min(capacity),
        }
    }

    /// What all connections together may use.
    pub fn capacity(&self) -> Rate {
        self.capacity
    }

    /// What one connection may use, if nothing of its own says less.
    pub fn grant(&self) -> Rate {
        self.grant
    }
}

/// What the kernel counted for one connection in one direction. Each number only grows; one that is smaller than before
/// means that the kernel's counters began anew, and says nothing of the time between.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Layer-3 bytes that passed.
    pub bytes: u64,
    /// Packets that passed.
    pub packets: u64,
    /// Packets that were dropped because they were too many.
    pub drops: u64,
    /// How long the packets that passed were held back, all together.
    pub held_back: Duration,
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "a test's clock begins somewhere")]
fn beginning() -> std::time::Instant {
    std::time::Instant::now()
}

#[cfg(test)]
mod properties;
#[cfg(test)]
mod simulation;
