//! Whether a provider list is believed. The pool is hostile until proven otherwise.

use std::net::SocketAddr;

use dvpn_common::{
    ids::{ProviderId, Region},
    keys::PublicKey,
};
use ipnetwork::IpNetwork;
use jiff::Timestamp;

/// One offer, every field checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Provider {
    /// Its id.
    pub id: ProviderId,
    /// Outer address and port of its WireGuard socket.
    pub endpoint: SocketAddr,
    /// Its WireGuard key.
    pub public_key: PublicKey,
    /// What it carries; never empty.
    pub allowed_ips: Vec<IpNetwork>,
    /// Where its latency echo answers.
    pub probe: Option<SocketAddr>,
    /// Where it stands.
    pub region: Option<Region>,
}

/// A believed list.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Directory {
    /// The offers, in the pool's order; ids and keys are unique.
    pub providers: Vec<Provider>,
    /// The pool's version of the list.
    pub version: Option<u64>,
    /// When this copy stops being good.
    pub expires_at: Option<Timestamp>,
}

/// What a list is checked against.
#[derive(Debug, Clone, Copy)]
pub struct Policy<'a> {
    /// Our own WireGuard keys: a list that offers us ourselves is refused.
    pub own_keys: &'a [PublicKey],
    /// True for a pool configured as private: endpoints may be private or loopback addresses.
    pub private_endpoints: bool,
}
