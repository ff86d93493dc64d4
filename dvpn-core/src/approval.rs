//! Whether a tunnel may exist. An [`Approval`] is the only thing a tunnel can be configured from.

use std::net::IpAddr;

use dvpn_common::keys::PublicKey;
use ipnetwork::IpNetwork;
use jiff::Timestamp;

use crate::directory::Provider;

/// A verified subscription plus a pool's (or orchestrator's) yes, for one key at one provider.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Approval {
    provider: Provider,
    client_key: PublicKey,
    addresses: Vec<IpNetwork>,
    gateways: Vec<IpAddr>,
    expires_at: Timestamp,
}

impl Approval {
    /// Whom it lets us use.
    pub fn provider(&self) -> &Provider {
        &self.provider
    }
    /// Our key that was approved.
    pub fn client_key(&self) -> &PublicKey {
        &self.client_key
    }
    /// Our inner addresses: single hosts.
    pub fn addresses(&self) -> &[IpNetwork] {
        &self.addresses
    }
    /// The provider's inner addresses, where it answers DNS; empty from a pool that speaks only the user's contract.
    pub fn gateways(&self) -> &[IpAddr] {
        &self.gateways
    }
    /// End of the approval, never later than the subscription's.
    pub fn expires_at(&self) -> Timestamp {
        self.expires_at
    }
}
