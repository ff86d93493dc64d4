//! What is true in each state, and only that.

use std::{collections::VecDeque, time::Instant};

use dvpn_common::status::StateName;
use jiff::Timestamp;

use super::{Attempt, Release, liveness::Liveness};
use crate::{
    Failure,
    approval::{Approval, Lease},
    directory::Provider,
    firewall::Phase,
    payment::Subscription,
};

/// Where the session is.
#[derive(Debug)]
pub(super) enum State {
    /// No tunnel is wanted, or none is possible and nothing has to be blocked.
    Disconnected(Idle),
    /// The pool is asked for its list.
    Discovering(Question),
    /// A sample of the list is measured.
    Probing(Probing),
    /// The payment is checked and one candidate's approval is asked for.
    Authorizing(Authorizing),
    /// The orchestrator is asked for a provider.
    Provisioning(Provisioning),
    /// The tunnel is configured and has not shaken hands.
    Connecting(Connecting),
    /// Traffic flows.
    Connected(Tunnel),
    /// Traffic stalls and is being repaired.
    Degraded(Tunnel),
    /// The tunnel is on its way down.
    Disconnecting(Disconnecting),
    /// A pause before the next attempt.
    Backoff(Backoff),
    /// Nothing helps until somebody acts, and traffic stays blocked.
    Blocked(Blocked),
}

/// Why nothing happens.
#[derive(Debug)]
pub(super) enum Idle {
    /// Nobody wants a session.
    NotWanted,
    /// Something is missing that a session needs.
    NotConfigured,
    /// A session is wanted and was refused; without a kill switch nothing is blocked meanwhile.
    Refused,
}

/// An answer that is awaited.
#[derive(Debug)]
pub(super) struct Question {
    pub(super) attempt: Attempt,
    /// When the answer counts as lost.
    pub(super) deadline: Instant,
}

#[derive(Debug)]
pub(super) struct Probing {
    pub(super) question: Question,
    /// The sample being measured.
    pub(super) asked: Vec<Provider>,
    /// Who comes after it, in shuffled order.
    pub(super) rest: VecDeque<Provider>,
    /// Samples taken in this attempt, this one included.
    pub(super) rounds: u32,
}

/// The candidates of one attempt that are still to be tried, fastest first.
#[derive(Debug, Default)]
pub(super) struct Run {
    pub(super) untried: VecDeque<Provider>,
    /// True for an attempt that the orchestrator has already helped.
    pub(super) provisioned: bool,
}

#[derive(Debug)]
pub(super) struct Authorizing {
    pub(super) question: Question,
    pub(super) step: Step,
    pub(super) run: Run,
}

/// What is asked about a candidate.
#[derive(Debug)]
pub(super) enum Step {
    /// Whether we have paid.
    Verify(Provider),
    /// Whether the pool admits us.
    Approve(Provider),
    /// Whether we have paid, for a provider that was made for us.
    VerifyProvisioned(Box<Approval>),
}

#[derive(Debug)]
pub(super) struct Provisioning {
    pub(super) question: Question,
    /// True once the payment is verified and the orchestrator asked.
    pub(super) verified: bool,
}

#[derive(Debug)]
pub(super) struct Connecting {
    pub(super) question: Question,
    pub(super) approval: Box<Approval>,
    pub(super) run: Run,
}

/// A tunnel that has shaken hands.
#[derive(Debug)]
pub(super) struct Tunnel {
    pub(super) attempt: Attempt,
    pub(super) approval: Box<Approval>,
    pub(super) since: Instant,
    pub(super) liveness: Liveness,
    pub(super) renewal: Renewal,
}

/// Keeping a standing tunnel's approval fresh, beside its traffic.
#[derive(Debug)]
pub(super) enum Renewal {
    /// Nothing to do before this time.
    Waiting(Timestamp),
    /// Whether the payment still holds.
    Verifying(Question),
    /// Whether the pool admits a fresh key.
    Approving(Asking),
    /// The tunnel goes over to the fresh approval.
    HandingOver(HandOver),
}

/// The pool is asked to let the tunnel go on under a fresh key.
#[derive(Debug)]
pub(super) struct Asking {
    /// Its deadline is the pool's answer, or the next try.
    pub(super) question: Question,
    /// By what right.
    pub(super) subscription: Subscription,
    /// Tries without an answer that settles it.
    pub(super) failed: u32,
    /// True while the next try is waited for.
    pub(super) pausing: bool,
}

/// A tunnel on its way from one approval to the next.
#[derive(Debug)]
pub(super) struct HandOver {
    /// The renewal's number; its deadline is the device's answer, or the next try.
    pub(super) question: Question,
    /// What the tunnel is to go on under.
    pub(super) approval: Box<Approval>,
    /// Tries that failed.
    pub(super) failed: u32,
    /// True while the next try is waited for.
    pub(super) pausing: bool,
    /// The token changed meanwhile: what is handed over to is to be renewed as soon as it stands.
    pub(super) renew_again: bool,
}

#[derive(Debug)]
pub(super) struct Disconnecting {
    pub(super) question: Question,
    pub(super) then: Then,
    /// Keys that nobody uses once the tunnel is gone.
    pub(super) release: Vec<Release>,
}

/// What follows once the tunnel is gone.
#[derive(Debug)]
pub(super) enum Then {
    /// Nothing: no session is wanted any more.
    Stop,
    /// A new attempt.
    Discover,
    /// The next candidate of the same attempt.
    Next(Run, Failure),
    /// The same provider under a fresh approval.
    Connect(Attempt, Box<Approval>),
    /// A pause.
    BackOff,
    /// Refusal.
    Refuse(Failure),
    /// Refusal, because the firewall does not do what it should.
    RefuseUnblocked(Failure),
}

#[derive(Debug)]
pub(super) struct Backoff {
    pub(super) until: Instant,
}

#[derive(Debug)]
pub(super) struct Blocked {
    /// True when the block itself failed: traffic may pass that should not.
    pub(super) leaking: bool,
}

impl State {
    pub(super) fn name(&self) -> StateName {
        match self {
            Self::Disconnected(_) => StateName::Disconnected,
            Self::Discovering(_) => StateName::Discovering,
            Self::Probing(_) => StateName::Probing,
            Self::Authorizing(_) => StateName::Authorizing,
            Self::Provisioning(_) => StateName::Provisioning,
            Self::Connecting(_) => StateName::Connecting,
            Self::Connected(_) => StateName::Connected,
            Self::Degraded(_) => StateName::Degraded,
            Self::Disconnecting(_) => StateName::Disconnecting,
            Self::Backoff(_) => StateName::Backoff,
            Self::Blocked(_) => StateName::Blocked,
        }
    }

    /// What the firewall must know of it.
    pub(super) fn phase(&self) -> Phase<'_> {
        match self {
            Self::Disconnected(_) => Phase::Idle,
            Self::Discovering(_)
            | Self::Authorizing(_)
            | Self::Disconnecting(_)
            | Self::Backoff(_)
            | Self::Blocked(_) => Phase::Waiting,
            Self::Probing(probing) => Phase::Probing(&probing.asked),
            Self::Provisioning(_) => Phase::Provisioning,
            Self::Connecting(connecting) => Phase::Tunnel(connecting.approval.provider().endpoint),
            Self::Connected(tunnel) | Self::Degraded(tunnel) => Phase::Tunnel(tunnel.approval.provider().endpoint),
        }
    }

    /// The leased provider that it uses or is about to use, with the number its tunnel has or will have.
    pub(super) fn lease(&self) -> Option<(Attempt, &Lease)> {
        let (attempt, approval) = match self {
            Self::Authorizing(authorizing) => match &authorizing.step {
                Step::VerifyProvisioned(approval) => (authorizing.question.attempt, approval),
                Step::Verify(_) | Step::Approve(_) => return None,
            },
            Self::Connecting(connecting) => (connecting.question.attempt, &connecting.approval),
            Self::Connected(tunnel) | Self::Degraded(tunnel) => (tunnel.attempt, &tunnel.approval),
            Self::Disconnected(_)
            | Self::Discovering(_)
            | Self::Probing(_)
            | Self::Provisioning(_)
            | Self::Disconnecting(_)
            | Self::Backoff(_)
            | Self::Blocked(_) => return None,
        };
        approval.lease().map(|lease| (attempt, lease))
    }

    /// Whom it uses or asks for.
    pub(super) fn provider(&self) -> Option<&Provider> {
        match self {
            Self::Authorizing(authorizing) => match &authorizing.step {
                Step::Verify(provider) | Step::Approve(provider) => Some(provider),
                Step::VerifyProvisioned(approval) => Some(approval.provider()),
            },
            Self::Connecting(connecting) => Some(connecting.approval.provider()),
            Self::Connected(tunnel) | Self::Degraded(tunnel) => Some(tunnel.approval.provider()),
            Self::Disconnected(_)
            | Self::Discovering(_)
            | Self::Probing(_)
            | Self::Provisioning(_)
            | Self::Disconnecting(_)
            | Self::Backoff(_)
            | Self::Blocked(_) => None,
        }
    }
}
