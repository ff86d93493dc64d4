//! What is worth recording: one typed event per fact an auditor asks for.

use serde::Serialize;

/// An audit event. It never holds a secret, a token or a destination.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The session's state changed.
    StateChanged {
        /// Name of the state left.
        from: String,
        /// Name of the state entered.
        to: String,
    },
}
