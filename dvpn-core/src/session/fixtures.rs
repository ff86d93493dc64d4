//! What several tests need: providers, subscriptions and approvals made from numbers.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use dvpn_common::keys::PublicKey;

use crate::directory::Provider;

/// Provider number `n`: `provider-n` at 192.0.2.n:51820, region `even` or `odd`, echo one port above.
pub(crate) fn provider(n: u8) -> Provider {
    let address = IpAddr::V4(Ipv4Addr::new(192, 0, 2, n));
    Provider {
        id: format!("provider-{n}").parse().unwrap(),
        endpoint: SocketAddr::new(address, 51820),
        public_key: PublicKey::from_bytes([n.max(1); 32]).unwrap(),
        allowed_ips: vec!["0.0.0.0/0".parse().unwrap()],
        probe: Some(SocketAddr::new(address, 51821)),
        region: Some(if n.is_multiple_of(2) { "even" } else { "odd" }.parse().unwrap()),
    }
}
