//! ICMP echo made by hand: what is asked inside the tunnel while nothing may be read from the interface.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use tun_rs::checksum;

use super::headers::{put_word, word};

const V4_HEADER_BYTES: usize = 20;
const V6_HEADER_BYTES: usize = 40;
/// ICMP header and payload.
const MESSAGE_BYTES: usize = 16;
const ICMP: u8 = 1;
const ICMP_V6: u8 = 58;
/// Echo request and reply, in ICMP (RFC 792) and its IPv6 kind (RFC 4443).
const V4_KINDS: [u8; 2] = [8, 0];
const V6_KINDS: [u8; 2] = [128, 129];

/// Pings from one of our addresses to one other, told apart from everybody else's by a random mark.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ping {
    source: IpAddr,
    target: IpAddr,
    mark: [u8; 8],
}

impl Ping {
    /// Nothing for addresses of two families.
    pub(super) fn new(source: IpAddr, target: IpAddr, mark: [u8; 8]) -> Option<Self> {
        (source.is_ipv4() == target.is_ipv4()).then_some(Self { source, target, mark })
    }

    /// The whole IP packet of one request.
    pub(super) fn request(&self, sequence: u16) -> Vec<u8> {
        match (self.source, self.target) {
            (IpAddr::V6(source), IpAddr::V6(target)) => self.v6(source, target, sequence),
            (IpAddr::V4(source), IpAddr::V4(target)) => self.v4(source, target, sequence),
            (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => Vec::new(),
        }
    }

    fn message(&self, kind: u8, sequence: u16) -> [u8; MESSAGE_BYTES] {
        let mut message = [0; MESSAGE_BYTES];
        let [mark_high, mark_low, ..] = self.mark;
        let [high, low] = sequence.to_be_bytes();
        let head = [kind, 0, 0, 0, mark_high, mark_low, high, low];
        for (to, from) in message.iter_mut().zip(head.into_iter().chain(self.mark)) {
            *to = from;
        }
        message
    }

    fn v4(&self, source: Ipv4Addr, target: Ipv4Addr, sequence: u16) -> Vec<u8> {
        let mut message = self.message(V4_KINDS[0], sequence);
        let sum = !checksum(&message, 0);
        put_word(&mut message, 2, sum);
        let mut header = [0; V4_HEADER_BYTES];
        let (length, dont_fragment) = (V4_HEADER_BYTES + MESSAGE_BYTES, 0x4000);
        put_word(&mut header, 0, 0x4500);
        put_word(&mut header, 2, u16::try_from(length).unwrap_or_default());
        put_word(&mut header, 6, dont_fragment);
        put_word(&mut header, 8, u16::from_be_bytes([64, ICMP]));
        for (to, from) in header
            .iter_mut()
            .skip(12)
            .zip(source.octets().into_iter().chain(target.octets()))
        {
            *to = from;
        }
        let sum = !checksum(&header, 0);
        put_word(&mut header, 10, sum);
        [&header[..], &message[..]].concat()
    }

    fn v6(&self, source: Ipv6Addr, target: Ipv6Addr, sequence: u16) -> Vec<u8> {
        let mut message = self.message(V6_KINDS[0], sequence);
        let length = u16::try_from(MESSAGE_BYTES).unwrap_or_default();
        let mut header = [0; V6_HEADER_BYTES];
        put_word(&mut header, 0, 0x6000);
        put_word(&mut header, 4, length);
        put_word(&mut header, 6, u16::from_be_bytes([ICMP_V6, 64]));
        for (to, from) in header
            .iter_mut()
            .skip(8)
            .zip(source.octets().into_iter().chain(target.octets()))
        {
            *to = from;
        }
        // Both addresses, the length and the next header are under the sum (RFC 8200, section 8.1).
        let pseudo = header
            .get(8..)
            .unwrap_or_default()
            .chunks(2)
            .map(|pair| u64::from(word(pair, 0)))
            .sum::<u64>();
        let sum = !checksum(&message, pseudo + u64::from(length) + u64::from(ICMP_V6));
        put_word(&mut message, 2, sum);
        [&header[..], &message[..]].concat()
    }

    /// Whether an IP packet is the answer to one of these requests: its marks are where ours were.
    pub(super) fn is_answered_by(&self, packet: &[u8]) -> bool {
        let (header_bytes, protocol_at, protocol, kind) = if self.source.is_ipv4() {
            (V4_HEADER_BYTES, 9, ICMP, V4_KINDS[1])
        } else {
            (V6_HEADER_BYTES, 6, ICMP_V6, V6_KINDS[1])
        };
        packet.get(protocol_at) == Some(&protocol)
            && packet.get(header_bytes) == Some(&kind)
            && packet.get(header_bytes + 8..header_bytes + MESSAGE_BYTES) == Some(&self.mark[..])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_has_the_right_sums_and_its_answer_is_known() {
        for (source, target, header) in [
            ("10.96.0.2", "10.96.0.1", V4_HEADER_BYTES),
            ("fd00::2", "fd00::1", V6_HEADER_BYTES),
        ] {
            let ping = Ping::new(source.parse().unwrap(), target.parse().unwrap(), *b"whowhere").unwrap();
            let request = ping.request(7);
            assert_eq!(request.len(), header + MESSAGE_BYTES);
            if header == V4_HEADER_BYTES {
                assert_eq!(checksum(&request[..header], 0), u16::MAX);
                assert_eq!(checksum(&request[header..], 0), u16::MAX);
            } else {
                let pseudo: u64 = request[8..40].chunks(2).map(|pair| u64::from(word(pair, 0))).sum();
                assert_eq!(checksum(&request[header..], pseudo + 16 + 58), u16::MAX);
            }
            assert!(!ping.is_answered_by(&request));
            let mut answer = request.clone();
            answer[header] = if header == V4_HEADER_BYTES { 0 } else { 129 };
            assert!(ping.is_answered_by(&answer));
            answer[header + 12] ^= 1;
            assert!(!ping.is_answered_by(&answer));
            assert!(!ping.is_answered_by(&answer[..header]));
        }
        assert!(Ping::new("10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap(), [0; 8]).is_none());
    }
}
