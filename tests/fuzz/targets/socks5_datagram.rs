//! A datagram from a SOCKS5 client, the header of an answer from where it went, and whether it may go there.
#![no_main]
#![allow(dead_code, reason = "the files are the daemon's")]

#[path = "../../../dvpn-daemon/src/socks5/destination.rs"]
mod destination;
#[path = "../../../dvpn-daemon/src/socks5/header.rs"]
mod header;

use std::net::{IpAddr, Ipv6Addr};

use fast_socks5::{parse_udp_request, util::target_addr::TargetAddr};
use futures::FutureExt;
use header::{MAX_HEADER, write_header};
use libfuzzer_sys::fuzz_target;

/// Every way an IPv4 address is written as an IPv6 one that a router may undo (RFC 4291, 6052, 3056).
fn hidden(v6: Ipv6Addr) -> Option<IpAddr> {
    let bytes = v6.octets();
    let at = match v6.segments() {
        [0, 0, 0, 0, 0, 0 | 0xffff, ..] | [0x64, 0xff9b, 0, 0, 0, 0, ..] => 12,
        [0x2002, ..] => 2,
        _ => return None,
    };
    let four: [u8; 4] = bytes[at..at + 4].try_into().expect("four bytes");
    Some(four.into())
}

fn is_inside(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => {
            let [first, second, ..] = v4.octets();
            v4.is_private()
                || v4.is_loopback()
                || v4.is_link_local()
                || v4.is_multicast()
                || v4.is_broadcast()
                || first == 0
                || first >= 240
                || first == 100 && second & 0xc0 == 64
        }
        IpAddr::V6(v6) => {
            v6.is_unique_local()
                || v6.is_loopback()
                || v6.is_unicast_link_local()
                || v6.is_multicast()
                || v6.is_unspecified()
                || hidden(v6).is_some_and(is_inside)
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let read = parse_udp_request(data).now_or_never().expect("memory is always ready");
    let Ok((fragment, destination, payload)) = read else {
        return;
    };
    let again = [
        &[0, 0, fragment][..],
        &destination.to_be_bytes().expect("it was read"),
        payload,
    ]
    .concat();
    assert_eq!(again, data, "not a byte less or more");
    let TargetAddr::Ip(address) = destination else { return };

    let mut head = [0xff; MAX_HEADER];
    let start = write_header(&mut head, address);
    let answer = [&head[start..], payload].concat();
    assert_eq!(
        answer[3..],
        data[3..],
        "an answer names its source as the question did its destination"
    );
    assert_eq!(answer[..3], [0; 3]);

    let inner = [
        "11.0.0.1".parse().expect("an address"),
        "2600::1".parse().expect("an address"),
    ];
    if let Some(admitted) = destination::admit(address.ip(), &inner) {
        assert!(!is_inside(admitted) && !inner.contains(&admitted));
        assert_eq!(admitted, address.ip().to_canonical());
        assert_eq!(destination::admit(admitted, &inner), Some(admitted));
        assert_eq!(destination::admit(admitted, &[admitted]), None);
    } else {
        assert!(is_inside(address.ip().to_canonical()) || !may_be_refused(address.ip().to_canonical()).is_empty());
    }
});

/// Why an address that is not inside is refused all the same.
fn may_be_refused(address: IpAddr) -> &'static str {
    match address {
        IpAddr::V4(v4) => match v4.octets() {
            [11, 0, 0, 1] => "an end of the tunnel",
            [192, 0, 0, _] => "protocol assignments",
            [198, 18 | 19, ..] => "benchmarking",
            _ => "",
        },
        IpAddr::V6(v6) => match v6.segments() {
            [0x2600, 0, 0, 0, 0, 0, 0, 1] => "an end of the tunnel",
            [0x2001, 0..=0x1ff, ..] => "protocol assignments",
            [0x2000..=0x3fff, ..] | [0x64, 0xff9b, 0, 0, 0, 0, ..] => hidden(v6).map_or("", |v4| may_be_refused(v4)),
            _ => "not global",
        },
    }
}
