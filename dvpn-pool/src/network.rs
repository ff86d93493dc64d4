//! Inner addresses. Each node has a /19 of 10.96.0.0/11 and a /64 of the pool's own ULA prefix (RFC 4193), both by its
//! index; its own address is the first of each.
//!
//! There are 256 IPv4 networks; from the 257th node on they are used again. Peers of two nodes never meet on one
//! interface, and the IPv6 networks stay unique.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};

/// The first host number that a client may have: 0 is the network, 1 the node.
pub const FIRST_HOST: u32 = 2;
/// How many clients one node's networks hold: a /19 without network, node and broadcast address.
pub const HOSTS: u32 = (1 << (32 - V4_PREFIX as u32)) - 3;

const V4_BASE: u32 = Ipv4Addr::new(10, 96, 0, 0).to_bits();
const V4_PREFIX: u8 = 19;
const V4_NETWORKS: u32 = 1 << (V4_PREFIX - 11);
const V6_PREFIX: u8 = 64;

/// The 40 random bits of the pool's ULA prefix, made once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UlaId([u8; 5]);

impl UlaId {
    /// Fresh random bits.
    pub fn random() -> Self {
        Self(rand::random())
    }

    /// Ten hexadecimal digits.
    pub fn to_hex(self) -> String {
        crate::hex::encode(&self.0)
    }

    /// Reads what [`Self::to_hex`] wrote.
    pub fn parse(text: &str) -> Option<Self> {
        crate::hex::decode::<5>(text).map(Self)
    }
}

/// The networks of one node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Networks {
    v4: u32,
    v6: u128,
}

impl Networks {
    /// The networks of the node with this index.
    pub fn of(ula: UlaId, index: u32) -> Self {
        let v4 = V4_BASE + ((index % V4_NETWORKS) << (32 - u32::from(V4_PREFIX)));
        // fd, 40 bits of the pool, 16 bits of the node, 64 bits of the host.
        let pool = ula
            .0
            .iter()
            .fold(0xfd_u128, |prefix, byte| (prefix << 8) | u128::from(*byte));
        let v6 = (pool << 80) | (u128::from(index & 0xffff) << 64);
        Self { v4, v6 }
    }

    /// The node's own address in each, with the prefix length of the network: `10.96.0.1/19`, `fd…::1/64`.
    pub fn of_node(self) -> Vec<IpNetwork> {
        let (v4, v6) = self.addresses(1);
        networks(v4, V4_PREFIX, v6, V6_PREFIX)
    }

    /// The node's own addresses, where it answers DNS.
    pub fn gateways(self) -> Vec<IpAddr> {
        let (v4, v6) = self.addresses(1);
        vec![IpAddr::V4(v4), IpAddr::V6(v6)]
    }

    /// The addresses of one client: a /32 and a /128.
    pub fn of_client(self, host: u32) -> Vec<IpNetwork> {
        let (v4, v6) = self.addresses(host);
        networks(v4, 32, v6, 128)
    }

    fn addresses(self, host: u32) -> (Ipv4Addr, Ipv6Addr) {
        (
            Ipv4Addr::from_bits(self.v4 | host),
            Ipv6Addr::from_bits(self.v6 | u128::from(host)),
        )
    }
}

fn networks(v4: Ipv4Addr, v4_prefix: u8, v6: Ipv6Addr, v6_prefix: u8) -> Vec<IpNetwork> {
    // The prefixes are constants within their families, so neither is ever left out.
    let v4 = Ipv4Network::new(v4, v4_prefix).ok().map(IpNetwork::V4);
    let v6 = Ipv6Network::new(v6, v6_prefix).ok().map(IpNetwork::V6);
    v4.into_iter().chain(v6).collect()
}

/// Whether clients anywhere can reach `address`: global unicast by the IANA special-purpose registries (RFC 6890).
pub fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => {
            let [a, b, c, _] = v4.octets();
            !(v4.is_private()
                || v4.is_loopback()
                || v4.is_link_local()
                || v4.is_documentation()
                || v4.is_multicast()
                || a == 0
                || a >= 240
                || (a == 100 && (64..128).contains(&b))
                || (a == 192 && b == 0 && c == 0)
                || (a == 192 && b == 88 && c == 99)
                || (a == 198 && (18..20).contains(&b)))
        }
        IpAddr::V6(v6) => {
            let [first, second, ..] = v6.segments();
            // Global unicast is 2000::/3; within it 2001::/23 is for protocols, 2001:db8::/32 and 3fff::/20 for books,
            // and 2002::/16 (6to4) hides an IPv4 address that this check would not see.
            first & 0xe000 == 0x2000
                && !(first == 0x2001 && (second < 0x0200 || second == 0x0db8))
                && first != 0x2002
                && !(first == 0x3fff && second < 0x1000)
        }
    }
}

/// Whether `address` can be one machine's at all, on a private network too.
pub fn is_unicast(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => !(v4.is_unspecified() || v4.is_multicast() || v4.octets().first().is_none_or(|a| *a >= 240)),
        IpAddr::V6(v6) => {
            !(v6.is_unspecified() || v6.is_multicast() || v6.is_unicast_link_local() || v6.to_ipv4_mapped().is_some())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    const ULA: UlaId = UlaId([1, 2, 3, 4, 5]);

    #[test]
    fn every_node_has_its_own_networks_inside_the_two_ranges() {
        let outer: IpNetwork = "10.96.0.0/11".parse().unwrap();
        let mut seen = HashSet::new();
        for index in 0..10_000 {
            let [v4, v6] = Networks::of(ULA, index).of_node()[..] else {
                panic!("two networks")
            };
            assert!(outer.contains(v4.network()) && outer.contains(v4.broadcast()), "{v4}");
            assert_eq!((v4.prefix(), v6.prefix()), (19, 64));
            assert!(seen.insert(v6.network()));
            assert_eq!(seen.insert(v4.network()), index < 256);
        }
    }

    #[test]
    fn the_node_is_first_and_clients_stay_inside_its_networks() {
        let networks = Networks::of(ULA, 1);
        assert_eq!(networks.of_node()[0].to_string(), "10.96.32.1/19");
        assert_eq!(networks.of_node()[1].to_string(), "fd01:203:405:1::1/64");
        for host in FIRST_HOST..FIRST_HOST + HOSTS {
            for (client, node) in networks.of_client(host).iter().zip(networks.of_node()) {
                assert!(node.contains(client.ip()) && client.ip() != node.ip() && client.ip() != node.broadcast());
            }
        }
        assert_eq!(
            networks.of_client(FIRST_HOST + HOSTS - 1)[0].to_string(),
            "10.96.63.254/32"
        );
    }

    #[test]
    fn only_global_unicast_is_public() {
        for text in [
            "1.1.1.1",
            "100.63.0.1",
            "192.0.1.1",
            "198.20.0.1",
            "2001:4860::1",
            "2a00::1",
        ] {
            assert!(is_public(text.parse().unwrap()), "{text}");
        }
        for text in [
            "0.1.2.3",
            "10.0.0.1",
            "100.64.0.1",
            "127.0.0.1",
            "169.254.1.1",
            "172.16.0.1",
            "192.0.0.8",
            "192.0.2.1",
            "192.88.99.1",
            "192.168.1.1",
            "198.18.0.1",
            "203.0.113.9",
            "224.0.0.1",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::ffff:1.1.1.1",
            "64:ff9b::1",
            "2001::1",
            "2001:db8::1",
            "2002:101:101::1",
            "3fff::1",
            "fc00::1",
            "fe80::1",
            "ff02::1",
        ] {
            assert!(!is_public(text.parse().unwrap()), "{text}");
        }
        for text in [
            "0.0.0.0",
            "224.0.0.1",
            "255.255.255.255",
            "::",
            "ff02::1",
            "fe80::1",
            "::ffff:1.1.1.1",
        ] {
            assert!(!is_unicast(text.parse().unwrap()), "{text}");
        }
        assert!(is_unicast("127.0.0.2".parse().unwrap()) && is_unicast("fd00::1".parse().unwrap()));
    }
}
