//! ICMP echo (RFC 792, RFC 4443) with a nonce for payload. No I/O.

/// Bytes in a request and in its reply: header and nonce.
pub(super) const BYTES: usize = 16;

const V4_REQUEST: u8 = 8;
const V4_REPLY: u8 = 0;
const V6_REQUEST: u8 = 128;
const V6_REPLY: u8 = 129;

/// An echo request. For IPv6 the kernel writes the checksum, which covers addresses.
pub(super) fn request(v6: bool, sequence: u16, nonce: [u8; 8]) -> [u8; BYTES] {
    let [s0, s1] = sequence.to_be_bytes();
    // The identifier says nothing: the nonce tells requests apart, and a ping socket writes its own.
    let mut packet = [0; BYTES];
    let head = [if v6 { V6_REQUEST } else { V4_REQUEST }, 0, 0, 0, 0xd7, 0x0a, s0, s1];
    packet
        .iter_mut()
        .zip(head.into_iter().chain(nonce))
        .for_each(|(to, byte)| *to = byte);
    if !v6 {
        let sum = checksum(&packet).to_be_bytes();
        packet.iter_mut().skip(2).zip(sum).for_each(|(to, byte)| *to = byte);
    }
    packet
}

/// The nonce of a reply; a raw IPv4 socket hands out the IP header too.
pub(super) fn open_reply(v6: bool, with_ip_header: bool, packet: &[u8]) -> Option<[u8; 8]> {
    let packet = if with_ip_header {
        let header = usize::from(packet.first()? & 0x0f) * 4;
        packet.get(header..)?
    } else {
        packet
    };
    let expected = if v6 { V6_REPLY } else { V4_REPLY };
    match packet {
        [kind, 0, _, _, _, _, _, _, nonce @ ..] if *kind == expected && nonce.len() == 8 => {
            nonce.first_chunk::<8>().copied()
        }
        _ => None,
    }
}

/// RFC 1071, for an even number of bytes.
fn checksum(packet: &[u8]) -> u16 {
    let (words, _) = packet.as_chunks::<2>();
    let sum: u32 = words.iter().map(|word| u32::from(u16::from_be_bytes(*word))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !u16::try_from((folded & 0xffff) + (folded >> 16)).unwrap_or(u16::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_request_sums_to_zero_and_its_reply_opens(v6: bool, sequence: u16, nonce: [u8; 8]) {
            let mut packet = request(v6, sequence, nonce);
            if !v6 {
                prop_assert_eq!(checksum(&packet), 0);
            }
            prop_assert_eq!(open_reply(v6, false, &packet), None, "a request is no reply");
            packet[0] = if v6 { V6_REPLY } else { V4_REPLY };
            prop_assert_eq!(open_reply(v6, false, &packet), Some(nonce));
            let mut raw = vec![0x45; 20];
            raw.extend(packet);
            prop_assert_eq!(open_reply(v6, true, &raw), Some(nonce));
        }

        #[test]
        fn no_packet_upsets_the_reader(v6: bool, header: bool, packet: Vec<u8>) {
            open_reply(v6, header, &packet);
        }
    }
}
