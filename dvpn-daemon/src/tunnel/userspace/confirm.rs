//! Which handshakes that we answered were completed.
//!
//! The engine calls a session established as soon as it answered an initiation. It is only when the initiator's first
//! transport packet comes: the answer may be lost, and the initiator then stays on its old session for seconds. The
//! kernel's WireGuard counts it that way (`wg_noise_received_with_keypair`); this makes the engine's statistics say the
//! same. The answer carries the index that the initiator's transport packets must name.
//!
//! The engine hands its answer to a queue before this sees it: whoever looks in the microseconds between takes the handshake
//! for completed. Nothing that was received could tell the two apart without trusting what a stranger can send, so a
//! renewal may take its addresses over up to a round trip early, and what is on its way under the old key is lost then.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

/// First byte of a handshake response (whitepaper, section 5.4.3) and of transport data (5.4.6).
const RESPONSE: u8 = 2;
const TRANSPORT: u8 = 4;
/// Answers remembered. Only authenticated initiations are answered, so a flood does not get here; should it be full all
/// the same, everything counts as completed, as the engine has it.
const MAX_ANSWERS: usize = 16_384;

/// Answers of one device that were not followed by a transport packet yet.
#[derive(Clone, Default)]
pub(super) struct Answers(Arc<Inner>);

#[derive(Default)]
struct Inner {
    /// How many are open, so that the usual packet costs one load.
    open: AtomicUsize,
    by_index: Mutex<HashMap<u32, SocketAddr>>,
}

impl Answers {
    /// To be shown every datagram before it is sent.
    pub(super) fn sent(&self, datagram: &[u8], to: SocketAddr) {
        if let Some([RESPONSE, _, _, _, a, b, c, d, ..]) = datagram.first_chunk::<8>() {
            let mut open = self.lock();
            if open.len() >= MAX_ANSWERS {
                open.clear();
            }
            open.insert(u32::from_le_bytes([*a, *b, *c, *d]), to);
            self.0.open.store(open.len(), Ordering::Release);
        }
    }

    /// To be shown every datagram that was received.
    pub(super) fn received(&self, datagram: &[u8]) {
        if self.0.open.load(Ordering::Acquire) == 0 {
            return;
        }
        if let Some([TRANSPORT, _, _, _, a, b, c, d, ..]) = datagram.first_chunk::<8>() {
            let mut open = self.lock();
            if let Some(from) = open.remove(&u32::from_le_bytes([*a, *b, *c, *d])) {
                // Earlier answers to the same address were lost; nobody waits for their packets.
                open.retain(|_, to| *to != from);
            }
            self.0.open.store(open.len(), Ordering::Release);
        }
    }

    /// Whether an answer to this address is still without its transport packet.
    pub(super) fn open_to(&self, address: SocketAddr) -> bool {
        self.0.open.load(Ordering::Acquire) > 0 && self.lock().values().any(|to| *to == address)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<u32, SocketAddr>> {
        self.0.by_index.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn datagram(kind: u8, index: u32) -> Vec<u8> {
        [&[kind, 0, 0, 0][..], &index.to_le_bytes(), &[9; 24]].concat()
    }

    #[test]
    fn an_answer_is_open_until_its_own_transport_packet_comes() {
        let answers = Answers::default();
        let to = "192.0.2.1:1000".parse().unwrap();
        answers.sent(&datagram(1, 7), to);
        assert!(!answers.open_to(to), "an initiation of ours is no answer");
        answers.sent(&datagram(RESPONSE, 7), to);
        answers.sent(&datagram(RESPONSE, 8), to);
        assert!(answers.open_to(to) && !answers.open_to("192.0.2.1:1001".parse().unwrap()));
        for other in [datagram(TRANSPORT, 9), datagram(1, 8), vec![TRANSPORT; 4], Vec::new()] {
            answers.received(&other);
            assert!(answers.open_to(to));
        }
        answers.received(&datagram(TRANSPORT, 8));
        assert!(!answers.open_to(to), "the lost answer before it is closed too");
    }
}
