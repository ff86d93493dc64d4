//! Which addresses are reachable by everybody, which only inside a private network, and which by nobody.
//!
//! Sources: the IANA special-purpose registries for IPv4 and IPv6 (RFC 6890 and its updates).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Whether `address` is a unicast address of the public Internet.
pub fn is_global_unicast(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(v4) => is_global_v4(v4),
        IpAddr::V6(v6) => is_global_v6(v6),
    }
}

/// Whether `address` belongs to a private network: RFC 1918, shared space (RFC 6598) or unique-local (RFC 4193).
pub fn is_private(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(v4) => v4.is_private() || is_shared(v4),
        IpAddr::V6(v6) => v6.is_unique_local(),
    }
}

/// Whether one host can have `address`: no multicast, unspecified, broadcast or reserved one.
pub fn is_unicast(address: IpAddr) -> bool {
    match address.to_canonical() {
        // 0.0.0.0/8 is "this network", 240.0.0.0/4 is reserved and ends in the broadcast address.
        IpAddr::V4(v4) => !v4.is_multicast() && !matches!(v4.octets(), [0 | 240..=255, ..]),
        IpAddr::V6(v6) => !v6.is_multicast() && !v6.is_unspecified(),
    }
}

fn is_shared(address: Ipv4Addr) -> bool {
    matches!(address.octets(), [100, 64..=127, _, _])
}

fn is_global_v4(address: Ipv4Addr) -> bool {
    is_unicast(address.into())
        && !address.is_private()
        && !is_shared(address)
        && !address.is_loopback()
        && !address.is_link_local()
        && !address.is_documentation()
        // Protocol assignments (RFC 6890), 6to4 relays (RFC 7526) and benchmarking (RFC 2544).
        && !matches!(address.octets(), [192, 0, 0, _] | [192, 88, 99, _] | [198, 18..=19, _, _])
}

fn is_global_v6(address: Ipv6Addr) -> bool {
    let [first, second, ..] = address.segments();
    // Global unicast is 2000::/3 (RFC 4291); within it: protocol assignments with Teredo (2001::/23), documentation
    // (2001:db8::/32, 3fff::/20) and 6to4 (2002::/16), which carries an IPv4 address that nobody checked.
    (0x2000..=0x3fff).contains(&first)
        && !(first == 0x2001 && (second < 0x0200 || second == 0x0db8))
        && first != 0x2002
        && !(first == 0x3fff && second < 0x1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn only_public_unicast_addresses_are_global() {
        for good in [
            "1.1.1.1",
            "203.0.114.1",
            "100.63.255.255",
            "100.128.0.1",
            "2606:4700::1",
            "2a01:4f8::1",
            "::ffff:8.8.8.8",
        ] {
            assert!(is_global_unicast(ip(good)), "{good}");
        }
        for bad in [
            "0.0.0.0",
            "0.1.2.3",
            "10.0.0.1",
            "100.64.0.1",
            "127.0.0.1",
            "169.254.1.1",
            "172.16.0.1",
            "192.0.0.1",
            "192.0.2.1",
            "192.88.99.1",
            "192.168.1.1",
            "198.18.0.1",
            "198.51.100.1",
            "203.0.113.1",
            "224.0.0.1",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "fe80::1",
            "fc00::1",
            "fd00::1",
            "ff02::1",
            "2001::1",
            "2001:db8::1",
            "2002:a00:1::",
            "3fff::1",
            "64:ff9b::a00:1",
            "::ffff:10.0.0.1",
            "::127.0.0.1",
        ] {
            assert!(!is_global_unicast(ip(bad)), "{bad}");
        }
    }

    #[test]
    fn private_and_unicast_are_told_apart() {
        for private in [
            "10.96.0.1",
            "172.31.0.1",
            "192.168.0.1",
            "100.64.0.1",
            "fd12::1",
            "::ffff:10.0.0.1",
        ] {
            assert!(is_private(ip(private)), "{private}");
        }
        for other in ["8.8.8.8", "127.0.0.1", "169.254.0.1", "fe80::1", "::1", "2606:4700::1"] {
            assert!(!is_private(ip(other)), "{other}");
        }
        for nobody in [
            "0.0.0.0",
            "255.255.255.255",
            "224.0.0.1",
            "::",
            "ff02::1",
            "::ffff:224.0.0.1",
        ] {
            assert!(!is_unicast(ip(nobody)), "{nobody}");
        }
        assert!(is_unicast(ip("127.0.0.1")));
    }
}
