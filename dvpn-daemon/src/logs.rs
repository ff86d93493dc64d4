//! The log: a line each on standard error, which systemd hands to the journal, and a short tail in memory for the D-Bus
//! method `Logs`.

use std::{
    collections::VecDeque,
    io,
    sync::{Arc, Mutex, PoisonError},
};

use tracing_subscriber::{EnvFilter, fmt::MakeWriter, layer::SubscriberExt, util::SubscriberInitExt};

/// Most lines the tail keeps.
pub const TAIL_LINES: usize = 500;
/// Most bytes of one line that the tail keeps.
pub const TAIL_LINE_BYTES: usize = 1024;

/// What libraries may log at most: their debug output holds host names, credentials and keys.
const QUIET: &str = "fast_socks5=off,hickory_net=warn,hickory_proto=warn,hickory_resolver=warn,hyper=info,netlink_proto=warn,\
                     reqwest=info,rustls=info,gotatun=info";

/// The last lines of the log, shared and bounded.
#[derive(Debug, Clone, Default)]
pub struct Tail(Arc<Mutex<VecDeque<String>>>);

impl Tail {
    /// The last `count` lines, oldest first.
    pub fn last(&self, count: usize) -> Vec<String> {
        let lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        lines.iter().skip(lines.len().saturating_sub(count)).cloned().collect()
    }

    fn push(&self, line: &str) {
        let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if lines.len() == TAIL_LINES {
            lines.pop_front();
        }
        let end = line.floor_char_boundary(TAIL_LINE_BYTES);
        lines.push_back(line.get(..end).unwrap_or_default().trim_end().to_owned());
    }
}

/// Writes each formatted event into the tail.
pub struct TailWriter(Tail);

impl io::Write for TailWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.push(&String::from_utf8_lossy(bytes));
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Tail {
    type Writer = TailWriter;
    fn make_writer(&'a self) -> TailWriter {
        TailWriter(self.clone())
    }
}

/// What `DVPN_LOG` asks for. Libraries that write names, passwords or packets at debug level stay silent whatever it is.
pub fn filter(text: &str) -> Result<EnvFilter, String> {
    EnvFilter::try_new(format!("{text},{QUIET}")).map_err(|error| {
        format!("DVPN_LOG = {text:?}: {error}: give error, warn, info, debug or trace, or a list like info,dvpn_daemon=debug")
    })
}

/// Starts logging; `filter` is a level or a list of `module=level`, as in `DVPN_LOG`. Standard error carries no times
/// when the journal adds its own.
pub fn init(filter: &str) -> Result<Tail, String> {
    let tail = Tail::default();
    let filter = self::filter(filter)?;
    let format = tracing_subscriber::fmt::layer().with_ansi(false).with_target(false);
    let screen: Box<dyn tracing_subscriber::Layer<_> + Send + Sync> = if std::env::var_os("JOURNAL_STREAM").is_some() {
        Box::new(format.with_writer(io::stderr).without_time())
    } else {
        Box::new(format.with_writer(io::stderr))
    };
    let memory = tracing_subscriber::fmt::layer()
        .with_ansi(false)
        .with_target(false)
        .with_writer(tail.clone());
    tracing_subscriber::registry()
        .with(filter)
        .with(screen)
        .with(memory)
        .try_init()
        .map_err(|error| format!("starting the log: {error}"))?;
    Ok(tail)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_keeps_the_last_lines_and_bounds_each() {
        let tail = Tail::default();
        for n in 0..TAIL_LINES + 10 {
            tail.push(&format!("line {n}\n"));
        }
        tail.push(&"ä".repeat(TAIL_LINE_BYTES));
        let lines = tail.last(2);
        assert_eq!(lines[0], format!("line {}", TAIL_LINES + 9));
        assert!(lines[1].len() <= TAIL_LINE_BYTES);
        assert_eq!(tail.last(10_000).len(), TAIL_LINES);
    }
}
