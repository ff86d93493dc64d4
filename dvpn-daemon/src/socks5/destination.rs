//! Where proxied traffic may go: global unicast that is neither end of the tunnel. The proxy is asked to reach the
//! Internet through the provider; the provider's own network, ours, and cloud metadata services are nobody's business.
//! The check is made on addresses, after resolution, so a name can not point inside.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The address to use for this destination, or nothing when it is refused. IPv4 written as IPv6 (`::ffff:a.b.c.d`)
/// becomes IPv4, so that it is judged, and routed, as what it is. `inner` are the tunnel's own two ends.
pub(super) fn admit(address: IpAddr, inner: &[IpAddr]) -> Option<IpAddr> {
    let address = address.to_canonical();
    let global = match address {
        IpAddr::V4(v4) => is_global_v4(v4),
        IpAddr::V6(v6) => is_global_v6(v6),
    };
    (global && !inner.contains(&address)).then_some(address)
}

/// By the IANA IPv4 special-purpose registry (RFC 6890), without its documentation ranges: nothing lives there that
/// would have to be protected, and test networks use them as if they were public.
#[expect(clippy::match_same_arms, reason = "one line a range, each with its reason")]
fn is_global_v4(address: Ipv4Addr) -> bool {
    match address.octets() {
        [0 | 10 | 127, ..] => false,              // this network, private, loopback
        [100, second, ..] => second & 0xc0 != 64, // shared address space (RFC 6598)
        [169, 254, ..] => false,                  // link-local, and cloud metadata at .169.254
        [172, second, ..] => second & 0xf0 != 16, // private
        [192, 168, ..] | [192, 0, 0, _] => false, // private, protocol assignments
        [198, 18 | 19, ..] => false,              // benchmarking
        [first, ..] => first < 224,               // multicast, reserved, broadcast
    }
}

/// `2000::/3` without the parts that lead back to IPv4 unseen, and NAT64 judged by the address inside.
#[expect(clippy::match_same_arms, reason = "one line a range, each with its reason")]
fn is_global_v6(address: Ipv6Addr) -> bool {
    match address.segments() {
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] => is_global_v4(v4(high, low)), // NAT64 (RFC 6052)
        [0x2002, high, low, ..] => is_global_v4(v4(high, low)),               // 6to4 (RFC 3056)
        [0x2001, 0..=0x1ff, ..] => false, // protocol assignments: Teredo, benchmarking, ORCHID
        [0x2000..=0x3fff, ..] => true,
        _ => false,
    }
}

fn v4(high: u16, low: u16) -> Ipv4Addr {
    Ipv4Addr::from_bits(u32::from(high) << 16 | u32::from(low))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn admitted(text: &str) -> bool {
        admit(text.parse().unwrap(), &["11.0.0.1".parse().unwrap()]).is_some()
    }

    #[test]
    fn the_internet_and_documentation_ranges_are_admitted() {
        for text in [
            "1.1.1.1",
            "11.0.0.2",
            "100.63.0.1",
            "100.128.0.1",
            "172.32.0.1",
            "192.0.2.1",
            "198.51.100.80",
        ] {
            assert!(admitted(text), "{text}");
        }
        for text in [
            "203.0.113.80",
            "223.255.255.255",
            "2606:4700::1111",
            "2001:db8::1",
            "2001:4860:4860::8888",
        ] {
            assert!(admitted(text), "{text}");
        }
        for text in ["64:ff9b::808:808", "2002:808:808::1", "::ffff:8.8.8.8"] {
            assert!(admitted(text), "{text}");
        }
    }

    #[test]
    fn everything_inside_is_refused_however_it_is_written() {
        for text in [
            "0.0.0.0",
            "0.1.2.3",
            "10.1.2.3",
            "127.0.0.1",
            "100.64.0.1",
            "169.254.169.254",
            "172.16.0.1",
        ] {
            assert!(!admitted(text), "{text}");
            assert!(!admitted(&format!("::ffff:{text}")), "mapped {text}");
            let [a, b, c, d] = text.parse::<Ipv4Addr>().unwrap().octets();
            assert!(
                !admitted(&format!("64:ff9b::{a:02x}{b:02x}:{c:02x}{d:02x}")),
                "NAT64 {text}"
            );
            assert!(
                !admitted(&format!("2002:{a:02x}{b:02x}:{c:02x}{d:02x}::1")),
                "6to4 {text}"
            );
        }
        for text in [
            "172.31.255.255",
            "192.168.0.1",
            "192.0.0.192",
            "198.18.0.1",
            "224.0.0.1",
            "255.255.255.255",
        ] {
            assert!(!admitted(text), "{text}");
        }
        for text in [
            "::",
            "::1",
            "fe80::1",
            "fd00:ec2::254",
            "fc00::1",
            "ff02::1",
            "2001::1",
            "2001:2::1",
            "::10.0.0.1",
        ] {
            assert!(!admitted(text), "{text}");
        }
        for text in ["11.0.0.1", "::ffff:11.0.0.1"] {
            assert!(!admitted(text), "an end of the tunnel, {text}");
        }
    }

    proptest! {
        #[test]
        fn what_is_admitted_is_never_private_to_anybody(bits: u128, v4: u32) {
            let v4 = Ipv4Addr::from_bits(v4);
            if admit(v4.into(), &[]).is_some() {
                prop_assert!(!v4.is_private() && !v4.is_loopback() && !v4.is_link_local());
                prop_assert!(!v4.is_multicast() && !v4.is_broadcast() && !v4.is_unspecified());
            }
            let v6 = Ipv6Addr::from_bits(bits);
            if let Some(IpAddr::V6(v6)) = admit(v6.into(), &[]) {
                prop_assert!(!v6.is_unique_local() && !v6.is_loopback() && !v6.is_unicast_link_local());
                prop_assert!(!v6.is_multicast() && !v6.is_unspecified());
            }
        }
    }
}
