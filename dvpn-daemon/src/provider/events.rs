//! The pool's event stream, from bytes to what they tell the node: server-sent events (WHATWG HTML, section 9.2), each
//! with the JSON of one contract type.
//!
//! The pool is believed to be neither gentle nor well. Every byte is looked at once, what is kept has one limit, and what
//! is no text ends the stream, so that no chunk can make the node deaf, slow or large.

use std::mem;

use dvpn_common::{
    contract::{PeerAdded, PeerReleased, PeerRemoved, Snapshot, event},
    limits::MAX_LIST_BYTES,
};

/// A longer id is no sequence number.
const MAX_ID_BYTES: usize = 64;
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// Why nothing more can be read from a stream.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    /// An event beyond the limit.
    #[error("an event is longer than {MAX_LIST_BYTES} bytes")]
    TooLong,
    /// Not UTF-8.
    #[error("it is not an event stream")]
    Garbled,
    /// A known event whose data does not read.
    #[error("an event's data does not read")]
    Format(#[source] serde_json::Error),
}

/// What the pool tells a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum PoolEvent {
    /// All there is.
    Snapshot(Snapshot),
    /// One client more.
    Added(PeerAdded),
    /// One client less.
    Removed(PeerRemoved),
    /// One connection given back.
    Released(PeerReleased),
}

/// An event with the id to ask for what follows it; empty when the pool gave none.
pub(super) type Numbered = (String, PoolEvent);

/// Puts events together from the chunks they arrive in. After an error it is of no use.
#[derive(Debug, Default)]
pub(super) struct Decoder {
    /// The line so far.
    line: Vec<u8>,
    /// A line ended in CR; a LF right after it belongs to it.
    after_return: bool,
    /// The first line is over.
    begun: bool,
    name: String,
    data: String,
    id: String,
}

impl Decoder {
    /// What a chunk completes, in order; an error comes last.
    pub(super) fn read(&mut self, chunk: &[u8]) -> Vec<Result<Numbered, Error>> {
        let mut events = Vec::new();
        let mut rest = chunk;
        while let Some(end) = rest.iter().position(|byte| matches!(byte, b'\n' | b'\r')) {
            let (part, ending) = rest.split_at(end);
            let Some((last, after)) = ending.split_first() else {
                break;
            };
            rest = after;
            let second_half = mem::replace(&mut self.after_return, *last == b'\r') && part.is_empty() && *last == b'\n';
            if second_half {
                continue;
            }
            match self.append(part).and_then(|()| self.end_line()) {
                Ok(None) => {}
                Ok(Some(event)) => events.push(Ok(event)),
                Err(error) => {
                    events.push(Err(error));
                    return events;
                }
            }
        }
        if !rest.is_empty() {
            self.after_return = false;
            if let Err(error) = self.append(rest) {
                events.push(Err(error));
            }
        }
        events
    }

    fn append(&mut self, part: &[u8]) -> Result<(), Error> {
        if self.line.len() + part.len() + self.data.len() > MAX_LIST_BYTES {
            return Err(Error::TooLong);
        }
        self.line.extend_from_slice(part);
        Ok(())
    }

    fn end_line(&mut self) -> Result<Option<Numbered>, Error> {
        let line = mem::take(&mut self.line);
        let first = !mem::replace(&mut self.begun, true);
        let bytes = line.strip_prefix(BYTE_ORDER_MARK).filter(|_| first).unwrap_or(&line);
        let text = str::from_utf8(bytes).map_err(|_not_text| Error::Garbled)?;
        if text.is_empty() {
            return self.end_event();
        }
        // A line without a colon is a name; a comment is a field without one.
        let (field, value) = text.split_once(':').unwrap_or((text, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "event" => value.clone_into(&mut self.name),
            "data" => {
                self.data.push_str(value);
                self.data.push('\n');
            }
            // It goes back in a header: one that fits in none would keep the node from ever coming back.
            "id" if value.len() <= MAX_ID_BYTES && value.bytes().all(|byte| byte.is_ascii_graphic()) => {
                value.clone_into(&mut self.id);
            }
            _ => {}
        }
        Ok(None)
    }

    /// Events without data are none; those of unknown names are for newer nodes.
    fn end_event(&mut self) -> Result<Option<Numbered>, Error> {
        let (name, data) = (mem::take(&mut self.name), mem::take(&mut self.data));
        let Some(data) = data.strip_suffix('\n') else {
            return Ok(None);
        };
        let event = match name.as_str() {
            event::SNAPSHOT => serde_json::from_str(data).map(PoolEvent::Snapshot),
            event::ADD => serde_json::from_str(data).map(PoolEvent::Added),
            event::REMOVE => serde_json::from_str(data).map(PoolEvent::Removed),
            event::RELEASE => serde_json::from_str(data).map(PoolEvent::Released),
            _ => return Ok(None),
        };
        Ok(Some((self.id.clone(), event.map_err(Error::Format)?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=";

    fn removal(sequence: u64) -> String {
        format!(r#"{{"sequence":{sequence},"public_key":"{KEY}"}}"#)
    }

    fn read(bytes: &[u8]) -> Vec<(String, u64)> {
        let sequence = |event| match event {
            PoolEvent::Removed(removed) => removed.sequence,
            PoolEvent::Released(released) => released.sequence,
            PoolEvent::Snapshot(_) | PoolEvent::Added(_) => 0,
        };
        let events = Decoder::default().read(bytes);
        events
            .into_iter()
            .map(|event| event.map(|(id, event)| (id, sequence(event))).unwrap())
            .collect()
    }

    #[test]
    fn events_read_alike_however_their_lines_end_and_wherever_they_are_cut() {
        let (one, two) = (removal(1), removal(2));
        let text = format!(": ping\n\nid: 1\nevent: remove\ndata: {one}\n\nevent:remove\nid:2\ndata:{two}\n\n");
        for ending in ["\n", "\r", "\r\n"] {
            let text = text.replace('\n', ending);
            assert_eq!(read(text.as_bytes()), [("1".into(), 1), ("2".into(), 2)], "{ending:?}");
            for size in 1..9 {
                let mut decoder = Decoder::default();
                let count: usize = text
                    .as_bytes()
                    .chunks(size)
                    .map(|chunk| decoder.read(chunk).len())
                    .sum();
                assert_eq!(count, 2, "{ending:?} in chunks of {size}");
            }
        }
    }

    #[test]
    fn data_of_several_lines_is_one_text_and_an_event_without_its_empty_line_is_none() {
        let split = removal(3).replacen(',', ",\ndata: ", 1);
        assert_eq!(
            read(format!("event: remove\ndata: {split}\n\n").as_bytes()),
            [(String::new(), 3)]
        );
        assert!(read(format!("event: remove\ndata: {}\n", removal(3)).as_bytes()).is_empty());
        assert!(read(b"event: remove\n\nevent: news\ndata: {}\n\ndata: x\n\n").is_empty());
    }

    #[test]
    fn a_byte_order_mark_goes_unnoticed() {
        let text = format!("\u{feff}event: remove\ndata: {}\n\n", removal(4));
        assert_eq!(read(text.as_bytes()), [(String::new(), 4)]);
    }

    #[test]
    fn an_id_that_fits_in_no_header_is_not_kept() {
        for id in ["\u{7f}", "é", "1 2", &"9".repeat(MAX_ID_BYTES + 1)] {
            let text = format!("id: 7\nid: {id}\nevent: remove\ndata: {}\n\n", removal(5));
            assert_eq!(read(text.as_bytes()), [("7".into(), 5)], "{id:?}");
        }
    }

    #[test]
    fn what_is_no_text_or_no_json_ends_the_stream_after_what_came_before() {
        let good = format!("event: remove\ndata: {}\n\n", removal(6));
        for (bad, is_expected) in [
            (
                b"\xff\n".as_slice(),
                (|error| matches!(error, Error::Garbled)) as fn(&Error) -> bool,
            ),
            (b"event: add\ndata: {}\n\n", |error| matches!(error, Error::Format(_))),
        ] {
            let events = Decoder::default().read(&[good.as_bytes(), bad, good.as_bytes()].concat());
            let [Ok((_, PoolEvent::Removed(_))), Err(error)] = &events[..] else {
                panic!("{events:?}")
            };
            assert!(is_expected(error), "{error}");
        }
    }

    #[test]
    fn only_what_is_kept_counts_towards_the_limit() {
        let mut decoder = Decoder::default();
        let pings = b": ping\n\n".repeat(64 * 1024);
        for _ in 0..16 {
            assert!(decoder.read(&pings).is_empty());
        }
        let line = [b"data: ".as_slice(), &vec![b'x'; MAX_LIST_BYTES / 2], b"\n"].concat();
        assert!(decoder.read(&line).is_empty());
        assert!(matches!(decoder.read(&line)[..], [Err(Error::TooLong)]));
    }
}
