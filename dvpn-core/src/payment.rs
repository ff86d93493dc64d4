//! Paid, not paid, or cannot tell: three answers that are never mixed up.

use dvpn_common::limits::DEVELOPMENT_TOKEN_PREFIX;
use jiff::Timestamp;

use crate::Failure;

/// Proof that a payment was verified. It is made only by reading a verify answer, or by opening a sealed record of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Subscription {
    valid_until: Timestamp,
    verified_at: Timestamp,
}

impl Subscription {
    /// End of access.
    pub fn valid_until(&self) -> Timestamp {
        self.valid_until
    }
    /// When the payment server last said yes.
    pub fn verified_at(&self) -> Timestamp {
        self.verified_at
    }
    /// Whether access holds at `now`.
    pub fn is_valid(&self, now: Timestamp) -> bool {
        now < self.valid_until
    }
}

/// What one verify request told us.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verification {
    /// All four rules hold.
    Paid(Subscription),
    /// The payment server answered, and a rule does not hold: the failure names it.
    NotPaid(Failure),
    /// No answer, or none that reads: says nothing about the payment.
    CannotTell(Failure),
}

/// Whether a token was made without a payment.
pub fn is_development_token(token: &str) -> bool {
    token.starts_with(DEVELOPMENT_TOKEN_PREFIX)
}
