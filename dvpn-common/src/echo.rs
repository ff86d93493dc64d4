//! The latency echo: a UDP request of 64 bytes that only somebody who knows the provider's public key can make, and a
//! reply that is never longer than the request.
//!
//! ```text
//! request:  mac[16] | "dvpn-echo-v1" [12] | nonce[8] | zero[28]        64 bytes
//! reply:    mac[16] | "dvpn-echo-r1" [12] | nonce[8]                   36 bytes
//! mac = BLAKE2s-128(key = BLAKE2s-256("mac1----" | provider public key), everything after the mac)
//! ```
//! The key derivation is that of WireGuard's mac1 (whitepaper, section 5.4.4).

use blake2::{
    Blake2s256, Blake2sMac,
    digest::{Digest, KeyInit, Mac, consts::U16},
};

use crate::keys::PublicKey;

/// Bytes in a request.
pub const REQUEST_BYTES: usize = 64;
/// Bytes in a reply.
pub const REPLY_BYTES: usize = 36;

const MAC_BYTES: usize = 16;
const REQUEST_LABEL: &[u8; 12] = b"dvpn-echo-v1";
const REPLY_LABEL: &[u8; 12] = b"dvpn-echo-r1";

/// The MAC key of one provider.
#[derive(Clone)]
pub struct EchoKey([u8; 32]);

impl EchoKey {
    /// Derives the key from the provider's WireGuard public key.
    pub fn new(provider: &PublicKey) -> Self {
        let mut hash = Blake2s256::new();
        hash.update(b"mac1----");
        hash.update(provider.as_bytes());
        Self(hash.finalize().into())
    }

    /// A request that carries `nonce`.
    pub fn request(&self, nonce: [u8; 8]) -> [u8; REQUEST_BYTES] {
        let mut packet = [0; REQUEST_BYTES];
        self.fill(&mut packet, REQUEST_LABEL, nonce);
        packet
    }

    /// The nonce of a valid request, or nothing: a stranger gets no answer.
    pub fn open_request(&self, packet: &[u8]) -> Option<[u8; 8]> {
        if packet.len() == REQUEST_BYTES {
            self.open(packet, REQUEST_LABEL)
        } else {
            None
        }
    }

    /// The reply to the request that carried `nonce`.
    pub fn reply(&self, nonce: [u8; 8]) -> [u8; REPLY_BYTES] {
        let mut packet = [0; REPLY_BYTES];
        self.fill(&mut packet, REPLY_LABEL, nonce);
        packet
    }

    /// The nonce of a valid reply.
    pub fn open_reply(&self, packet: &[u8]) -> Option<[u8; 8]> {
        if packet.len() == REPLY_BYTES {
            self.open(packet, REPLY_LABEL)
        } else {
            None
        }
    }

    fn fill(&self, packet: &mut [u8], label: &[u8; 12], nonce: [u8; 8]) {
        let (mac, body) = packet.split_at_mut(MAC_BYTES);
        let (head, rest) = body.split_at_mut(label.len());
        head.copy_from_slice(label);
        rest.iter_mut().zip(nonce).for_each(|(to, from)| *to = from);
        if let Some(state) = self.mac(body) {
            mac.copy_from_slice(&state.finalize().into_bytes());
        }
    }

    fn open(&self, packet: &[u8], label: &[u8; 12]) -> Option<[u8; 8]> {
        let (mac, body) = packet.split_at_checked(MAC_BYTES)?;
        self.mac(body)?.verify_slice(mac).ok()?;
        let (head, rest) = body.split_at_checked(label.len())?;
        if head != label {
            return None;
        }
        rest.first_chunk::<8>().copied()
    }

    fn mac(&self, body: &[u8]) -> Option<Blake2sMac<U16>> {
        // A 32-byte key is always accepted by BLAKE2s; `None` can not happen and denies if it did.
        let mut state = <Blake2sMac<U16> as KeyInit>::new_from_slice(&self.0).ok()?;
        state.update(body);
        Some(state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(byte: u8) -> EchoKey {
        EchoKey::new(&PublicKey::from_bytes([byte; 32]).unwrap())
    }

    #[test]
    fn a_reply_answers_its_request_and_is_shorter() {
        let nonce = *b"12345678";
        let request = key(1).request(nonce);
        assert_eq!(key(1).open_request(&request), Some(nonce));
        let reply = key(1).reply(nonce);
        assert_eq!(key(1).open_reply(&reply), Some(nonce));
        assert!(reply.len() < request.len());
    }

    #[test]
    fn strangers_bit_flips_and_wrong_sizes_get_nothing() {
        let request = key(1).request([9; 8]);
        assert_eq!(key(2).open_request(&request), None);
        for bit in 0..request.len() * 8 {
            let mut bad = request;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(key(1).open_request(&bad), None, "bit {bit}");
        }
        for size in 0..request.len() {
            assert_eq!(key(1).open_request(&request[..size]), None);
        }
        assert_eq!(key(1).open_reply(&request[..REPLY_BYTES]), None);
    }
}
