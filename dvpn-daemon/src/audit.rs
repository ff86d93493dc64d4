//! The audit stream: one JSON object per event, numbered, never filtered by log levels.
//!
//! Under systemd the stream is the journal, under the identifier `dvpn-audit` (`journalctl -t dvpn-audit`); elsewhere it
//! is standard output. A gap in `sequence` within one `run` means a lost event.

use std::{
    io::Write as _,
    sync::{Arc, Mutex, PoisonError},
};

use jiff::Timestamp;
use serde::Serialize;

/// What the journal shows in place of the program's name.
pub const IDENTIFIER: &str = "dvpn-audit";

#[derive(Serialize)]
struct Record<'a, E> {
    run: &'a str,
    sequence: u64,
    time: Timestamp,
    #[serde(flatten)]
    event: &'a E,
}

enum Sink {
    Journal,
    Output,
    #[cfg(test)]
    Memory(Vec<String>),
}

struct Stream {
    run: String,
    sequence: u64,
    sink: Sink,
}

/// A handle on the stream; clones write to the same one.
#[derive(Clone)]
pub struct Audit(Arc<Mutex<Stream>>);

impl Audit {
    /// Opens the journal when the daemon runs under systemd, standard output otherwise. `run` names this run of the
    /// daemon.
    pub fn open(run: String) -> Self {
        let sink = if std::env::var_os("JOURNAL_STREAM").is_some() {
            Sink::Journal
        } else {
            Sink::Output
        };
        Self(Arc::new(Mutex::new(Stream { run, sequence: 0, sink })))
    }

    /// Keeps its lines, for a test that reads them.
    #[cfg(test)]
    pub(crate) fn in_memory() -> Self {
        Self(Arc::new(Mutex::new(Stream {
            run: "test".into(),
            sequence: 0,
            sink: Sink::Memory(Vec::new()),
        })))
    }

    /// What was written so far.
    #[cfg(test)]
    pub(crate) fn lines(&self) -> Vec<String> {
        match &self.0.lock().unwrap_or_else(PoisonError::into_inner).sink {
            Sink::Memory(lines) => lines.clone(),
            Sink::Journal | Sink::Output => Vec::new(),
        }
    }

    /// Writes one event.
    pub fn record<E: Serialize>(&self, event: &E) {
        let mut stream = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        stream.sequence += 1;
        let record = Record {
            run: &stream.run,
            sequence: stream.sequence,
            time: Timestamp::now(),
            event,
        };
        match serde_json::to_string(&record) {
            Ok(line) => stream.sink.write(&line),
            Err(error) => tracing::error!("an audit event could not be written as JSON: {error}"),
        }
    }
}

impl Sink {
    fn write(&mut self, line: &str) {
        match self {
            Self::Journal => {
                let identifier = format!("SYSLOG_IDENTIFIER={IDENTIFIER}");
                let sent = systemd::journal::send(&[&format!("MESSAGE={line}"), "PRIORITY=5", &identifier]);
                if let Err(error) = sent {
                    tracing::error!("the journal refused an audit event ({error}): {line}");
                }
            }
            Self::Output => {
                if let Err(error) = writeln!(std::io::stdout().lock(), "{line}") {
                    tracing::error!("writing an audit event to standard output: {error}: {line}");
                }
            }
            #[cfg(test)]
            Self::Memory(lines) => lines.push(line.to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dvpn_common::status::StateName;
    use dvpn_core::audit::Event;

    #[test]
    fn events_are_numbered_json_lines() {
        let stream = Stream {
            run: "r1".into(),
            sequence: 0,
            sink: Sink::Memory(Vec::new()),
        };
        let audit = Audit(Arc::new(Mutex::new(stream)));
        let event = Event::StateChanged {
            from: StateName::Disconnected,
            to: StateName::Discovering,
        };
        audit.record(&event);
        audit.record(&event);
        let stream = audit.0.lock().unwrap();
        let Sink::Memory(lines) = &stream.sink else {
            panic!("memory")
        };
        let second: serde_json::Value = serde_json::from_str(&lines[1]).unwrap();
        assert_eq!(second["sequence"], 2);
        assert_eq!(second["run"], "r1");
        assert_eq!(second["event"], "state_changed");
    }
}
