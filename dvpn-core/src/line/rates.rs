//! The same traffic, counted at different layers.

use std::net::IpAddr;

use dvpn_common::rate::Rate;

/// Part of a layer-3 rate that TLS over TCP delivers, in ten-thousandths, as measured.
const GOODPUT: u128 = 9634;
/// What WireGuard adds to a packet: its header (16) and tag (16), UDP (8) and IP. Padding to 16 bytes is left out.
const OVERHEAD_V4: u64 = 60;
const OVERHEAD_V6: u64 = 80;

/// The layer-3 rate of a line that delivers `goodput` over TCP.
pub fn of_goodput(goodput: Rate) -> Rate {
    scaled(goodput, 10_000, GOODPUT)
}

/// What `inner` costs outside of a tunnel when all its packets have `packet_bytes` (layer 3, at least 1); `underlay` is the
/// other end's outer address.
pub fn outer(inner: Rate, packet_bytes: u64, underlay: IpAddr) -> Rate {
    let packet = packet_bytes.max(1);
    scaled(
        inner,
        u128::from(packet) + u128::from(overhead(underlay)),
        packet.into(),
    )
}

/// What fits into a tunnel of `outer` when all packets inside have `packet_bytes`: never more than [`outer()`] would cost.
pub fn inner(outer: Rate, packet_bytes: u64, underlay: IpAddr) -> Rate {
    let packet = u128::from(packet_bytes.max(1));
    scaled(outer, packet, packet + u128::from(overhead(underlay)))
}

/// What a tunnel adds to each packet, in bytes.
pub fn overhead(underlay: IpAddr) -> u64 {
    match underlay {
        IpAddr::V4(_) => OVERHEAD_V4,
        IpAddr::V6(_) => OVERHEAD_V6,
    }
}

/// Rounded down; the greatest rate when it is greater.
fn scaled(rate: Rate, times: u128, by: u128) -> Rate {
    let bits = u128::from(rate.bits_per_second()).saturating_mul(times) / by;
    Rate::from_bits_per_second(u64::try_from(bits).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use super::*;

    const V4: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
    const V6: IpAddr = IpAddr::V6(Ipv6Addr::LOCALHOST);

    fn rate(bits: u64) -> Rate {
        Rate::from_bits_per_second(bits)
    }

    #[test]
    fn goodput_is_less_than_what_the_line_carries() {
        assert_eq!(of_goodput(rate(96_340_000)), rate(100_000_000));
        assert_eq!(of_goodput(rate(0)), rate(0));
        assert_eq!(of_goodput(rate(u64::MAX)), rate(u64::MAX));
    }

    #[test]
    fn a_tunnel_costs_60_or_80_bytes_a_packet() {
        for (inner_bits, packet, underlay, wanted) in [
            (142_000_000, 1420, V4, 148_000_000),
            (142_000_000, 1420, V6, 150_000_000),
            (60_000, 60, V4, 120_000),
            (80_000, 80, V6, 160_000),
            (1, 0, V4, 61),
            (u64::MAX, 1, V6, u64::MAX),
        ] {
            assert_eq!(outer(rate(inner_bits), packet, underlay), rate(wanted));
        }
    }

    #[test]
    fn what_fits_inside_costs_no_more_than_there_is_outside() {
        for bits in [0, 1, 59, 1_000_003, 148_000_000, u64::MAX / 100] {
            for packet in [1, 40, 576, 1420, 65_535] {
                for underlay in [V4, V6] {
                    let inside = inner(rate(bits), packet, underlay);
                    assert!(outer(inside, packet, underlay) <= rate(bits));
                    let more = rate(inside.bits_per_second() + 2);
                    assert!(outer(more, packet, underlay) >= rate(bits));
                }
            }
        }
    }
}
