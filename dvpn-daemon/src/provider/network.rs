//! Whether the inner networks that a pool names may be put on this machine, and what it is known by outside.

use std::net::{IpAddr, SocketAddr};

use ipnetwork::IpNetwork;

/// Most networks of one node: one a family, and room for a renumbering.
const MAX_NETWORKS: usize = 4;
/// What inner networks may be cut from.
const INNER: [&str; 5] = [
    "10.0.0.0/8",
    "172.16.0.0/12",
    "192.168.0.0/16",
    "100.64.0.0/10",
    "fc00::/7",
];

/// Why a network is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NetworkError {
    /// None, or too many.
    #[error("the pool named {0} inner networks: between 1 and {MAX_NETWORKS} make sense")]
    Count(usize),
    /// Public, or larger than private ranges are.
    #[error("the inner network {0} is not private: the pool must choose another")]
    NotPrivate(IpNetwork),
    /// No room for a client beside us, or our own address is not one.
    #[error("the inner network {0} has no address for this node and its clients")]
    NoRoom(IpNetwork),
    /// It covers a network this machine is on.
    #[error("the inner network {inner} overlaps {other}, which this machine is on: ask the pool for another")]
    Overlap {
        /// The pool's.
        inner: IpNetwork,
        /// Ours.
        other: IpNetwork,
    },
}

/// Checks networks (our own address in each) against what the machine is on.
pub fn check_networks(networks: &[IpNetwork], on_link: &[IpNetwork]) -> Result<(), NetworkError> {
    if networks.is_empty() || networks.len() > MAX_NETWORKS {
        return Err(NetworkError::Count(networks.len()));
    }
    for inner in networks {
        let private = INNER.iter().filter_map(|text| text.parse::<IpNetwork>().ok());
        if !private
            .into_iter()
            .any(|range| range.contains(inner.network()) && range.prefix() <= inner.prefix())
        {
            return Err(NetworkError::NotPrivate(*inner));
        }
        let widest = if inner.is_ipv4() { 30 } else { 126 };
        let edge = inner.ip() == inner.network() || (inner.is_ipv4() && inner.ip() == inner.broadcast());
        if inner.prefix() > widest || edge {
            return Err(NetworkError::NoRoom(*inner));
        }
        if let Some(other) = on_link.iter().find(|other| overlap(inner, other)) {
            return Err(NetworkError::Overlap {
                inner: *inner,
                other: *other,
            });
        }
    }
    Ok(())
}

fn overlap(one: &IpNetwork, other: &IpNetwork) -> bool {
    one.is_ipv4() == other.is_ipv4() && (one.contains(other.network()) || other.contains(one.network()))
}

/// Global addresses that this node is known by.
pub(super) fn public_addresses(endpoint: Option<&str>, observed: Option<IpAddr>) -> Vec<IpAddr> {
    let configured = endpoint.and_then(|text| text.parse::<SocketAddr>().ok());
    let mut all: Vec<IpAddr> = configured
        .map(|endpoint| endpoint.ip())
        .into_iter()
        .chain(observed)
        .collect();
    all.sort();
    all.dedup();
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(texts: &[&str]) -> Vec<IpNetwork> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn only_private_networks_with_room_and_beside_ours_are_taken() {
        let on_link = parse(&["192.168.1.0/24", "fe80::/64"]);
        let check = |texts: &[&str]| check_networks(&parse(texts), &on_link);
        assert_eq!(check(&["10.96.0.1/20", "fd00:96::1/64"]), Ok(()));
        assert_eq!(check(&[]), Err(NetworkError::Count(0)));
        for public in [
            "0.0.0.1/0",
            "0.0.0.1/1",
            "8.8.8.1/24",
            "10.0.0.1/7",
            "2001:db8::1/64",
            "::1/0",
        ] {
            assert!(matches!(check(&[public]), Err(NetworkError::NotPrivate(_))), "{public}");
        }
        for cramped in [
            "10.96.0.0/20",
            "10.96.15.255/20",
            "10.96.0.1/31",
            "10.96.0.1/32",
            "fd00::/64",
            "fd00::1/127",
        ] {
            assert!(matches!(check(&[cramped]), Err(NetworkError::NoRoom(_))), "{cramped}");
        }
        for covering in ["192.168.0.1/16", "192.168.1.129/25"] {
            assert!(
                matches!(check(&[covering]), Err(NetworkError::Overlap { .. })),
                "{covering}"
            );
        }
    }
}
