//! What may pass in which state: a pure function of the session's state and the configuration.

/// The firewall as it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Policy {
    /// Nothing of ours in the way.
    Open,
}
