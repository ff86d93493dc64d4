//! A start from afar is taken back unless somebody confirms it: whoever cut themselves off could not undo it.
//!
//! A start over SSH that sends all of the machine's traffic through a tunnel arms it; a second start within
//! [`WITHIN`] confirms, a stop disarms.

use std::time::{Duration, Instant};

use jiff::Timestamp;

use crate::Now;

/// How long there is to confirm.
pub const WITHIN: Duration = Duration::from_mins(1);

/// Armed or not.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Rollback {
    /// The same moment by both clocks.
    due: Option<(Instant, Timestamp)>,
}

impl Rollback {
    /// A start: whether it came from afar, and whether it is what begins the session. Says whether it has to be
    /// confirmed now.
    pub fn started(&mut self, from_afar: bool, begins: bool, now: Now) -> bool {
        let waits = self.due.is_none() && from_afar && begins;
        let due = now.instant.checked_add(WITHIN).zip(now.wall.checked_add(WITHIN).ok());
        self.due = due.filter(|_| waits);
        self.due.is_some()
    }

    /// A stop: there is nothing to take back.
    pub fn stopped(&mut self) {
        self.due = None;
    }

    /// When it is due, if it is armed.
    pub fn due(&self) -> Option<(Instant, Timestamp)> {
        self.due
    }

    /// Whether the session is to be ended now; then it is disarmed.
    pub fn is_due(&mut self, now: Instant) -> bool {
        let due = self.due.is_some_and(|(due, _)| due <= now);
        if due {
            self.due = None;
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::fixtures::start;

    #[test]
    fn only_a_start_from_afar_that_begins_a_session_waits_to_be_confirmed() {
        let now = start();
        for (afar, begins, waits) in [(true, true, true), (true, false, false), (false, true, false)] {
            let mut rollback = Rollback::default();
            assert_eq!(rollback.started(afar, begins, now), waits);
            assert_eq!(rollback.is_due(now.instant + WITHIN), waits, "{afar} {begins}");
            assert!(!rollback.is_due(now.instant + WITHIN * 2), "only once");
        }
    }

    #[test]
    fn a_second_start_confirms_and_a_stop_disarms() {
        let now = start();
        let mut rollback = Rollback::default();
        assert!(rollback.started(true, true, now));
        assert!(!rollback.is_due(now.instant + WITHIN.saturating_sub(Duration::from_millis(1))));
        assert!(!rollback.started(true, false, now));
        assert!(!rollback.is_due(now.instant + WITHIN));
        assert!(rollback.started(true, true, now));
        rollback.stopped();
        assert!(!rollback.is_due(now.instant + WITHIN));
    }
}
