//! A DNS message as far as the forwarder reads it: where its question is, and whether an answer is to that question.

use std::ops::Range;

const HEADER_BYTES: usize = 12;
const TYPE_AND_CLASS_BYTES: usize = 4;
/// Larger questions and UDP answers are nobody's.
pub(super) const MAX_UDP_BYTES: usize = 4096;

/// A question on its way, under an id of our own.
pub(super) struct Asked {
    pub(super) packet: Vec<u8>,
    client_id: [u8; 2],
}

impl Asked {
    /// Takes a query (RFC 1035, section 4.1.1): one question, not an answer. `id` is a random one.
    pub(super) fn new(question: &[u8], id: [u8; 2]) -> Option<Self> {
        let [i0, i1, flags, _, 0, 1, ..] = *question.first_chunk::<HEADER_BYTES>()? else {
            return None;
        };
        if flags & 0x80 != 0 || question.len() > MAX_UDP_BYTES {
            return None;
        }
        question_end(question)?;
        let mut packet = question.to_vec();
        packet.get_mut(..2)?.copy_from_slice(&id);
        Some(Self {
            packet,
            client_id: [i0, i1],
        })
    }

    /// Whether this answers that very question.
    pub(super) fn is_answered_by(&self, answer: &[u8]) -> bool {
        let Some(end) = question_end(&self.packet) else {
            return false;
        };
        let same = |range: Range<usize>| self.packet.get(range.clone()) == answer.get(range);
        let names = HEADER_BYTES..end - TYPE_AND_CLASS_BYTES;
        let same_name = self
            .packet
            .get(names.clone())
            .zip(answer.get(names.clone()))
            // Resolvers may answer in another case than was asked in.
            .is_some_and(|(asked, answered)| asked.eq_ignore_ascii_case(answered));
        same(0..2)
            && answer.get(2).is_some_and(|flags| flags & 0x80 != 0)
            && question_end(answer) == Some(end)
            && same_name
            && same(names.end..end)
    }

    /// The answer as the client expects it.
    pub(super) fn restore(&self, mut answer: Vec<u8>) -> Vec<u8> {
        if let Some(id) = answer.get_mut(..2) {
            id.copy_from_slice(&self.client_id);
        }
        answer
    }
}

/// Where the first question ends; nothing if there is none.
fn question_end(packet: &[u8]) -> Option<usize> {
    let mut at = HEADER_BYTES;
    loop {
        let length = *packet.get(at)?;
        at += 1 + usize::from(length);
        match length {
            0 => break,
            1..=63 => {}
            _ => return None,
        }
    }
    let end = at + TYPE_AND_CLASS_BYTES;
    (packet.len() >= end).then_some(end)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `example.` type A, with recursion desired.
    const QUESTION: &[u8] = b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x07example\x00\x00\x01\x00\x01";

    #[test]
    fn only_the_answer_to_the_question_asked_is_taken() {
        let asked = Asked::new(QUESTION, [9, 9]).unwrap();
        let mut answer = asked.packet.clone();
        assert!(!asked.is_answered_by(&answer), "the question is no answer");
        answer[2] |= 0x80;
        assert!(asked.is_answered_by(&answer));
        assert_eq!(asked.restore(answer.clone())[..2], [0x12, 0x34]);
        let mut other_name = answer.clone();
        other_name[14] = b'y';
        assert!(!asked.is_answered_by(&other_name));
        let mut other_id = answer.clone();
        other_id[0] ^= 1;
        assert!(!asked.is_answered_by(&other_id));
        for length in 0..answer.len() {
            assert!(!asked.is_answered_by(&answer[..length]));
        }
    }

    #[test]
    fn the_name_may_come_back_in_another_case_the_type_may_not() {
        // HTTPS records are of type 65, which is an `A`.
        let mut https = QUESTION.to_vec();
        https[22] = b'A';
        let asked = Asked::new(&https, [9, 9]).unwrap();
        let mut answer = asked.packet.clone();
        answer[2] |= 0x80;
        answer[13..20].make_ascii_uppercase();
        assert!(asked.is_answered_by(&answer));
        answer[22] = b'a';
        assert!(!asked.is_answered_by(&answer));
    }

    #[test]
    fn what_is_no_question_is_not_forwarded() {
        for length in 0..QUESTION.len() {
            assert!(Asked::new(&QUESTION[..length], [9, 9]).is_none(), "{length}");
        }
        let mut answer = QUESTION.to_vec();
        answer[2] |= 0x80;
        assert!(Asked::new(&answer, [9, 9]).is_none());
        let mut pointer = QUESTION.to_vec();
        pointer[12] = 0xc0;
        assert!(Asked::new(&pointer, [9, 9]).is_none());
    }
}
