//! Where things are in a TCP or UDP packet, as far as cutting and joining segments needs it (RFC 791, 8200, 9293,
//! 768).

use tun_rs::{checksum, checksum_no_fold};

/// IPv4 and TCP options at their longest.
pub(super) const MAX_HEADER_BYTES: usize = 60 + 60;

const IPV4_BYTES: usize = 20;
const IPV6_BYTES: usize = 40;
const TCP_BYTES: usize = 20;
const UDP_BYTES: usize = 8;
const PROTOCOL_TCP: u8 = 6;
const PROTOCOL_UDP: u8 = 17;

/// What the segments belong to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Transport {
    Tcp,
    Udp,
}

/// The shape of one packet's headers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Headers {
    pub(super) v6: bool,
    pub(super) transport: Transport,
    /// Where the transport header begins.
    pub(super) ip_bytes: usize,
    /// Where the payload begins.
    pub(super) bytes: usize,
}

impl Headers {
    /// Of a packet from a tunnel peer; `None` for one that stays as it is: neither TCP nor UDP, a fragment, with
    /// IP options or extension headers, or shorter or longer than it says.
    pub(super) fn parse(packet: &[u8]) -> Option<Self> {
        let (v6, ip_bytes, protocol, length) = match packet.first()? {
            0x45 => {
                // More fragments, or not the first.
                if word(packet, 6) & 0x3fff != 0 {
                    return None;
                }
                (false, IPV4_BYTES, *packet.get(9)?, usize::from(word(packet, 2)))
            }
            first if first >> 4 == 6 => (
                true,
                IPV6_BYTES,
                *packet.get(6)?,
                IPV6_BYTES + usize::from(word(packet, 4)),
            ),
            _ => return None,
        };
        let transport = match protocol {
            PROTOCOL_TCP => Transport::Tcp,
            PROTOCOL_UDP => Transport::Udp,
            _ => return None,
        };
        if length != packet.len() {
            return None;
        }
        Self::at(packet, v6, transport, ip_bytes)
    }

    /// Of a packet whose transport header is known to begin at `ip_bytes`.
    pub(super) fn at(packet: &[u8], v6: bool, transport: Transport, ip_bytes: usize) -> Option<Self> {
        let least_ip = if v6 { IPV6_BYTES } else { IPV4_BYTES };
        let transport_bytes = match transport {
            Transport::Tcp => usize::from(packet.get(ip_bytes + 12)? >> 4) * 4,
            Transport::Udp => UDP_BYTES,
        };
        let least_transport = if transport == Transport::Tcp {
            TCP_BYTES
        } else {
            UDP_BYTES
        };
        let bytes = ip_bytes + transport_bytes;
        let fits = ip_bytes >= least_ip && transport_bytes >= least_transport && bytes <= packet.len();
        fits.then_some(Self {
            v6,
            transport,
            ip_bytes,
            bytes,
        })
    }

    /// Where the transport checksum is, from the transport header.
    pub(super) fn checksum_offset(self) -> usize {
        match self.transport {
            Transport::Tcp => 16,
            Transport::Udp => 6,
        }
    }

    /// Source and destination address.
    pub(super) fn addresses(self, packet: &[u8]) -> &[u8] {
        let range = if self.v6 { 8..40 } else { 12..20 };
        packet.get(range).unwrap_or_default()
    }

    /// The pseudo-header's sum for a packet of `length` bytes in all.
    fn pseudo_sum(self, packet: &[u8], length: usize) -> u64 {
        let protocol = if self.transport == Transport::Tcp {
            PROTOCOL_TCP
        } else {
            PROTOCOL_UDP
        };
        let transport_length = (length - self.ip_bytes) as u64;
        checksum_no_fold(self.addresses(packet), u64::from(protocol) + transport_length)
    }

    /// Writes the lengths, and IPv4's header checksum, for a packet of `length` bytes in all. `header` may be the
    /// headers alone.
    pub(super) fn set_length(self, header: &mut [u8], length: usize) {
        let clamp = |bytes: usize| u16::try_from(bytes).unwrap_or(u16::MAX);
        if self.v6 {
            put_word(header, 4, clamp(length - IPV6_BYTES));
        } else {
            put_word(header, 2, clamp(length));
            put_word(header, 10, 0);
            let sum = header.get(..self.ip_bytes).map_or(0, |ip| checksum(ip, 0));
            put_word(header, 10, !sum);
        }
        if self.transport == Transport::Udp {
            put_word(header, self.ip_bytes + 4, clamp(length - self.ip_bytes));
        }
    }

    /// Writes the transport checksum over the whole packet.
    pub(super) fn set_checksum(self, packet: &mut [u8]) {
        let at = self.ip_bytes + self.checksum_offset();
        put_word(packet, at, 0);
        let pseudo = self.pseudo_sum(packet, packet.len());
        let sum = !packet
            .get(self.ip_bytes..)
            .map_or(0, |transport| checksum(transport, pseudo));
        // For UDP zero means "none" (RFC 768).
        put_word(
            packet,
            at,
            if sum == 0 && self.transport == Transport::Udp {
                u16::MAX
            } else {
                sum
            },
        );
    }

    /// Writes what the kernel expects in place of a checksum that it has to finish: the pseudo-header's sum.
    pub(super) fn set_partial_checksum(self, header: &mut [u8], length: usize) {
        let sum = checksum(&[], self.pseudo_sum(header, length));
        put_word(header, self.ip_bytes + self.checksum_offset(), sum);
    }
}

/// The big-endian number at `at`; 0 beyond the end.
pub(super) fn word(bytes: &[u8], at: usize) -> u16 {
    bytes
        .get(at..at + 2)
        .and_then(|two| two.try_into().ok())
        .map_or(0, u16::from_be_bytes)
}

/// The big-endian number at `at`; 0 beyond the end.
pub(super) fn long(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..at + 4)
        .and_then(|four| four.try_into().ok())
        .map_or(0, u32::from_be_bytes)
}

/// Writes a big-endian number; nothing beyond the end.
pub(super) fn put_word(bytes: &mut [u8], at: usize, value: u16) {
    if let Some(two) = bytes.get_mut(at..at + 2) {
        two.copy_from_slice(&value.to_be_bytes());
    }
}

/// Writes a big-endian number; nothing beyond the end.
pub(super) fn put_long(bytes: &mut [u8], at: usize, value: u32) {
    if let Some(four) = bytes.get_mut(at..at + 4) {
        four.copy_from_slice(&value.to_be_bytes());
    }
}
