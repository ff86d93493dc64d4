//! Whether a tunnel lives: the ladder from silence to the next provider.
//!
//! | without an answer for | then |
//! |---|---|
//! | 2 s | a probe inside the tunnel, each second |
//! | 5 s | degraded; a forced handshake |
//! | 8 s | a new outer socket, a forced handshake |
//! | 10 s | lost |
//!
//! Silence is counted from the last byte received while the user's traffic was active within 15 s, else from the first
//! byte sent without an answer. An idle tunnel is probed every 20 s. Any byte received ends the ladder, except that a
//! forced handshake's own answer is no proof that traffic flows. The rungs are climbed one per assessment, so a daemon
//! that was stopped for a while does not take its own sleep for the provider's.

use std::time::{Duration, Instant};

use super::Traffic;

const PROBE_AFTER: Duration = Duration::from_secs(2);
const DEGRADED_AFTER: Duration = Duration::from_secs(5);
const REBIND_AFTER: Duration = Duration::from_secs(8);
const LOST_AFTER: Duration = Duration::from_secs(10);
const USER_ACTIVE_FOR: Duration = Duration::from_secs(15);
const IDLE_PROBE_EVERY: Duration = Duration::from_secs(20);
/// Samples come once a second; three missing ones are silence too.
const SAMPLE_OVERDUE_AFTER: Duration = Duration::from_secs(3);
const SAMPLE_EVERY: Duration = Duration::from_secs(1);
/// A second of probes, keepalives and a handshake is less than this; the user's traffic usually is not.
const HOUSEKEEPING_BYTES: u64 = 1024;
/// A handshake response and a keepalive (WireGuard paper, section 5.4: 92 and 32 bytes).
const HANDSHAKE_BYTES: u64 = 92 + 32;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rung {
    Fine,
    Probing,
    Degraded,
    Rebound,
}

/// What to do about a tunnel now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Remedy {
    Nothing,
    Probe,
    Handshake,
    Rebind,
    Lost,
}

/// What is known of a tunnel's life.
#[derive(Debug)]
pub(super) struct Liveness {
    totals: Traffic,
    sampled_at: Instant,
    assess_at: Instant,
    last_rx: Instant,
    user_at: Option<Instant>,
    silent_since: Option<Instant>,
    rung: Rung,
    /// Bytes that may be a handshake's own answer.
    unproven_bytes: u64,
}

impl Liveness {
    /// A tunnel that has just shaken hands.
    pub(super) fn new(now: Instant) -> Self {
        Self {
            totals: Traffic::default(),
            sampled_at: now,
            assess_at: now + SAMPLE_OVERDUE_AFTER,
            last_rx: now,
            user_at: None,
            silent_since: None,
            rung: Rung::Fine,
            unproven_bytes: 0,
        }
    }

    pub(super) fn totals(&self) -> Traffic {
        self.totals
    }

    /// When to call [`Self::overdue`] if no sample comes.
    pub(super) fn assess_at(&self) -> Instant {
        self.assess_at
    }

    pub(super) fn is_degraded(&self) -> bool {
        match self.rung {
            Rung::Fine | Rung::Probing => false,
            Rung::Degraded | Rung::Rebound => true,
        }
    }

    /// Takes a sample, and says what to do.
    pub(super) fn sample(&mut self, totals: Traffic, now: Instant) -> Remedy {
        let rx = totals.rx_bytes.saturating_sub(self.totals.rx_bytes);
        let tx = totals.tx_bytes.saturating_sub(self.totals.tx_bytes);
        self.totals = totals;
        self.sampled_at = now;
        self.assess_at = now + SAMPLE_OVERDUE_AFTER;
        if rx + tx > HOUSEKEEPING_BYTES {
            self.user_at = Some(now);
        }
        if rx > self.unproven_bytes {
            self.last_rx = now;
            self.silent_since = None;
            self.rung = Rung::Fine;
            self.unproven_bytes = 0;
        } else {
            self.unproven_bytes -= rx;
            let user_active = self.user_at.is_some_and(|at| now.duration_since(at) < USER_ACTIVE_FOR);
            if self.silent_since.is_none() && user_active {
                self.silent_since = Some(self.last_rx);
            } else if self.silent_since.is_none() && tx > 0 {
                self.silent_since = Some(now);
            }
        }
        let remedy = self.climb(now);
        self.look_again_at_next_rung(now);
        remedy
    }

    /// No sample came in time, which is silence as well; or a rung is due.
    pub(super) fn overdue(&mut self, now: Instant) -> Remedy {
        self.assess_at = now + SAMPLE_EVERY;
        self.silent_since.get_or_insert(self.sampled_at);
        let remedy = self.climb(now);
        self.look_again_at_next_rung(now);
        remedy
    }

    /// Something happened after which silence would mean more than usual: count from now.
    pub(super) fn suspect(&mut self, now: Instant) {
        self.silent_since.get_or_insert(now);
    }

    fn climb(&mut self, now: Instant) -> Remedy {
        let Some(since) = self.silent_since else {
            if now.duration_since(self.last_rx) < IDLE_PROBE_EVERY {
                return Remedy::Nothing;
            }
            self.silent_since = Some(now);
            return Remedy::Probe;
        };
        let silence = now.duration_since(since);
        match self.rung {
            Rung::Fine if silence < PROBE_AFTER => Remedy::Nothing,
            Rung::Fine => {
                self.rung = Rung::Probing;
                Remedy::Probe
            }
            Rung::Probing if silence >= DEGRADED_AFTER => {
                self.rung = Rung::Degraded;
                self.unproven_bytes = HANDSHAKE_BYTES;
                Remedy::Handshake
            }
            Rung::Degraded if silence >= REBIND_AFTER => {
                self.rung = Rung::Rebound;
                self.unproven_bytes += HANDSHAKE_BYTES;
                Remedy::Rebind
            }
            Rung::Rebound if silence >= LOST_AFTER => Remedy::Lost,
            Rung::Probing | Rung::Degraded | Rung::Rebound => Remedy::Probe,
        }
    }

    /// Samples come by the second; a rung is climbed when its time has come, not at the sample after.
    fn look_again_at_next_rung(&mut self, now: Instant) {
        let after = match self.rung {
            Rung::Fine => PROBE_AFTER,
            Rung::Probing => DEGRADED_AFTER,
            Rung::Degraded => REBIND_AFTER,
            Rung::Rebound => LOST_AFTER,
        };
        if let Some(since) = self.silent_since {
            let due = since + after;
            // Behind after a pause of the daemon: one rung a second until it has caught up.
            let due = if due > now { due } else { now + SAMPLE_EVERY };
            self.assess_at = self.assess_at.min(due);
        }
    }
}
