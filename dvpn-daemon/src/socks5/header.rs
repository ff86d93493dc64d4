//! What stands before a datagram that the relay gives to its client (RFC 1928, section 7).

use std::net::{IpAddr, SocketAddr};

/// Longest header put before a reply: reserved, fragment, type, IPv6 address, port.
pub(super) const MAX_HEADER: usize = 4 + 16 + 2;

/// Writes the header of a reply so that it ends where `head` ends; returns where it begins.
pub(super) fn write_header(head: &mut [u8], from: SocketAddr) -> usize {
    let [p0, p1] = from.port().to_be_bytes();
    let mut header = [0; MAX_HEADER];
    let length = match from.ip() {
        IpAddr::V4(v4) => {
            let [a, b, c, d] = v4.octets();
            let bytes = [0, 0, 0, 1, a, b, c, d, p0, p1];
            header.iter_mut().zip(bytes).for_each(|(to, byte)| *to = byte);
            bytes.len()
        }
        IpAddr::V6(v6) => {
            let bytes = [0, 0, 0, 4].into_iter().chain(v6.octets()).chain([p0, p1]);
            header.iter_mut().zip(bytes).for_each(|(to, byte)| *to = byte);
            MAX_HEADER
        }
    };
    let start = head.len().saturating_sub(length);
    head.iter_mut()
        .skip(start)
        .zip(header)
        .for_each(|(to, byte)| *to = byte);
    start
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use fast_socks5::{parse_udp_request, util::target_addr::TargetAddr};
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_reply_header_reads_back_as_its_source(v6: bool, bits: u128, v4: u32, port: u16, payload: Vec<u8>) {
            let ip = if v6 { IpAddr::V6(Ipv6Addr::from_bits(bits)) } else { IpAddr::V4(Ipv4Addr::from_bits(v4)) };
            let from = SocketAddr::new(ip, port);
            let mut buffer = vec![0xff; MAX_HEADER];
            let start = write_header(&mut buffer, from);
            buffer.extend(&payload);
            let (fragment, read, rest) =
                futures::executor::block_on(parse_udp_request(&buffer[start..])).unwrap();
            prop_assert_eq!(fragment, 0);
            prop_assert_eq!(read, TargetAddr::Ip(from));
            prop_assert_eq!(rest, &payload[..]);
        }
    }
}
