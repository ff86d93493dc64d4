//! A client's question and a resolver's answer, one after the other; the first two bytes say where the answer begins.
#![no_main]

#[path = "../../../dvpn-daemon/src/provider/dns/question.rs"]
mod question;

use libfuzzer_sys::fuzz_target;
use question::{Asked, MAX_UDP_BYTES};

const ID: [u8; 2] = [0x5a, 0xa5];

/// Name in lower case, type and class of the first question (RFC 1035, section 4.1.2), read the plain way.
fn question_of(message: &[u8]) -> Option<(Vec<Vec<u8>>, &[u8])> {
    let mut rest = message.get(12..)?;
    let mut labels = Vec::new();
    loop {
        let (length, after) = rest.split_first()?;
        if *length > 63 {
            return None;
        }
        let (label, after) = after.split_at_checked(usize::from(*length))?;
        rest = after;
        if label.is_empty() {
            return Some((labels, rest.get(..4)?));
        }
        labels.push(label.to_ascii_lowercase());
    }
}

fuzz_target!(|data: &[u8]| {
    let Some(([high, low], messages)) = data.split_first_chunk() else {
        return;
    };
    let at = usize::from(u16::from_be_bytes([*high, *low])) % (messages.len() + 1);
    let (question, answer) = messages.split_at(at);
    let Some(asked) = Asked::new(question, ID) else { return };
    assert!(question.len() <= MAX_UDP_BYTES && question[2] & 0x80 == 0 && question[4..6] == [0, 1]);
    let wanted = question_of(question).expect("only a question is asked");
    assert_eq!(asked.packet[..2], ID);
    assert_eq!(asked.packet[2..], question[2..], "nothing but the id changes");

    // A forger who does not know the id; and one who does.
    let mut answer = answer.to_vec();
    for knows_id in [false, true] {
        if knows_id && answer.len() >= 2 {
            answer[..2].copy_from_slice(&ID);
        }
        if asked.is_answered_by(&answer) {
            assert!(answer[..2] == ID && answer[2] & 0x80 != 0);
            assert_eq!(question_of(&answer), Some(wanted.clone()));
            let restored = asked.restore(answer.clone());
            assert_eq!(restored[..2], question[..2]);
            assert_eq!(restored[2..], answer[2..]);
        }
    }
    // Its own question with the answer bit is an answer, in any case of its name.
    let mut own = asked.packet.clone();
    own[2] |= 0x80;
    assert!(asked.is_answered_by(&own));
    let name_end = 12 + wanted.0.iter().map(|label| label.len() + 1).sum::<usize>();
    own[12..name_end].make_ascii_uppercase();
    assert!(asked.is_answered_by(&own));
    own[name_end + 2] ^= 0x20;
    assert!(!asked.is_answered_by(&own), "another type");
});
