//! Keeping the approval of a standing tunnel fresh: verify, approve, hand over.
//!
//! A hand-over that fails leaves the tunnel on its old key, which the provider drops soon after it admitted the fresh
//! one. So it is tried again within seconds, and then the tunnel is made anew under the fresh approval: a short gap now
//! instead of a dead tunnel later.

use std::time::Duration;

use super::{
    Action, Attempt, Release, Session,
    standing::stays,
    state::{HandOver, Renewal, State, Then, Tunnel},
    steps::ANSWER_TIMEOUT,
    trust::Verdict,
};
use crate::{Failure, Retry, approval::Approval, audit::Event, payment::Verification};

/// The device gives a hand-over up after 3 s; this guards against an answer that never comes.
pub(super) const HAND_OVER_TIMEOUT: Duration = Duration::from_secs(10);
/// Before the second try; twice as long before the third.
const HAND_OVER_PAUSE: Duration = Duration::from_secs(2);
const HAND_OVER_TRIES: u32 = 3;

impl Tunnel {
    /// The keys that a pool admitted for it.
    pub(super) fn held(&self) -> Vec<Release> {
        let fresh = match &self.renewal {
            Renewal::HandingOver(hand_over) => Release::of(&hand_over.approval),
            Renewal::Waiting(_) | Renewal::Verifying(_) | Renewal::Approving(_) => None,
        };
        let held = Release::of(&self.approval);
        let fresh = fresh.filter(|fresh| Some(fresh) != held.as_ref());
        held.into_iter().chain(fresh).collect()
    }
}

impl Session {
    /// Begins a renewal that is due, goes on with one, or gives one up whose answer is lost. The other result is the
    /// state after a tunnel that could not be kept.
    pub(super) fn renewal_due(&mut self, mut tunnel: Tunnel) -> Result<Tunnel, Box<State>> {
        match &mut tunnel.renewal {
            Renewal::Waiting(at) if self.now.wall >= *at => {
                let attempt = self.fresh();
                self.out
                    .push(Action::Verify(attempt, tunnel.approval.provider().id.clone()));
                tunnel.renewal = Renewal::Verifying(self.within(attempt, ANSWER_TIMEOUT));
            }
            Renewal::Verifying(question) | Renewal::Approving(question) if self.is_over(question.deadline) => {
                self.cancel_renewal(&tunnel);
                tunnel.renewal = self.renew_later(&tunnel.approval);
            }
            Renewal::HandingOver(hand_over) if self.is_over(hand_over.question.deadline) => {
                if !hand_over.pausing {
                    // What the device did is unknown: neither key can be counted on.
                    let reason = "the hand-over to a fresh key did not end";
                    return Err(Box::new(self.end(&tunnel, reason, Then::Discover)));
                }
                if !self.lasts(&hand_over.approval) {
                    let reason = "the fresh approval ended before the hand-over";
                    return Err(Box::new(self.end(&tunnel, reason, Then::Discover)));
                }
                let attempt = hand_over.question.attempt;
                self.out.push(Action::RenewTunnel(attempt, hand_over.approval.clone()));
                hand_over.pausing = false;
                hand_over.question = self.within(attempt, HAND_OVER_TIMEOUT);
            }
            Renewal::Waiting(_) | Renewal::Verifying(_) | Renewal::Approving(_) | Renewal::HandingOver(_) => {}
        }
        Ok(tunnel)
    }

    pub(super) fn renewal_verified(
        &mut self,
        mut tunnel: Tunnel,
        attempt: Attempt,
        verification: Verification,
    ) -> State {
        let Renewal::Verifying(question) = &tunnel.renewal else {
            return stays(tunnel);
        };
        if question.attempt != attempt {
            return stays(tunnel);
        }
        let provider = tunnel.approval.provider().clone();
        match self.verified(provider.id.clone(), verification) {
            // Asking again for what cannot last longer would only cut the connection. The pool does not know a provider
            // that the orchestrator made: its lease is renewed where it came from.
            Verdict::Paid(subscription)
                if subscription.valid_until() > tunnel.approval.expires_at() && tunnel.approval.is_from_pool() =>
            {
                let renews = Some(*tunnel.approval.client_key());
                self.out
                    .push(Action::Approve(attempt, Box::new(provider), subscription, renews));
                tunnel.renewal = Renewal::Approving(self.within(attempt, ANSWER_TIMEOUT));
                stays(tunnel)
            }
            Verdict::Paid(_) => {
                tunnel.renewal = self.renew_later(&tunnel.approval);
                stays(tunnel)
            }
            Verdict::CannotTell(failure) | Verdict::CannotAsk(failure) => {
                self.problem = Some(failure);
                tunnel.renewal = self.renew_later(&tunnel.approval);
                stays(tunnel)
            }
            Verdict::NotPaid(failure) => {
                tunnel.renewal = self.renew_later(&tunnel.approval);
                self.end(&tunnel, "the payment does not hold any more", Then::Refuse(failure))
            }
        }
    }

    pub(super) fn renewal_approved(
        &mut self,
        mut tunnel: Tunnel,
        attempt: Attempt,
        answer: Result<Box<Approval>, Failure>,
    ) -> State {
        let Renewal::Approving(question) = &tunnel.renewal else {
            return stays(tunnel);
        };
        if question.attempt != attempt {
            return stays(tunnel);
        }
        tunnel.renewal = self.renew_later(&tunnel.approval);
        let provider = tunnel.approval.provider().clone();
        match self.admitted(&provider, answer) {
            // Also one that lasts no longer: the provider drops the old key soon.
            Ok(fresh) if fresh.continues(&tunnel.approval) => {
                self.out.push(Action::RenewTunnel(attempt, fresh.clone()));
                tunnel.renewal = Renewal::HandingOver(HandOver {
                    question: self.within(attempt, HAND_OVER_TIMEOUT),
                    approval: fresh,
                    failed: 0,
                    pausing: false,
                    renew_again: false,
                });
                stays(tunnel)
            }
            Ok(fresh) if fresh.expires_at() > tunnel.approval.expires_at() => {
                self.end(&tunnel, "renewed", Then::Connect(attempt, fresh))
            }
            Ok(fresh) => {
                let unused = Release::of(&fresh).filter(|unused| !tunnel.held().contains(unused));
                self.out.extend(unused.map(Action::Release));
                stays(tunnel)
            }
            Err(failure) => {
                self.problem = Some(failure);
                stays(tunnel)
            }
        }
    }

    /// The device's answer to a hand-over.
    pub(super) fn renewed(&mut self, mut tunnel: Tunnel, attempt: Attempt, answer: Result<(), Failure>) -> State {
        let mut hand_over = match tunnel.renewal {
            Renewal::HandingOver(hand_over) if hand_over.question.attempt == attempt && !hand_over.pausing => hand_over,
            Renewal::Waiting(_) | Renewal::Verifying(_) | Renewal::Approving(_) | Renewal::HandingOver(_) => {
                return stays(tunnel);
            }
        };
        match answer {
            Ok(()) => {
                let old = std::mem::replace(&mut tunnel.approval, hand_over.approval);
                let superseded = Release::of(&old).filter(|old| old.client_key != *tunnel.approval.client_key());
                self.out.extend(superseded.map(Action::Release));
                self.problem = None;
                self.audit(Event::TunnelRenewed {
                    provider: tunnel.approval.provider().id.clone(),
                    expires_at: tunnel.approval.expires_at(),
                });
                tunnel.renewal = if hand_over.renew_again {
                    Renewal::Waiting(self.now.wall)
                } else {
                    self.renew_later(&tunnel.approval)
                };
                stays(tunnel)
            }
            Err(failure) => {
                hand_over.failed += 1;
                if hand_over.failed < HAND_OVER_TRIES && failure.retry != Retry::Never {
                    self.problem = Some(failure);
                    hand_over.pausing = true;
                    hand_over.question = self.within(attempt, HAND_OVER_PAUSE * hand_over.failed);
                    tunnel.renewal = Renewal::HandingOver(hand_over);
                    return stays(tunnel);
                }
                let then = if hand_over.renew_again {
                    Then::Discover
                } else {
                    Then::Connect(attempt, hand_over.approval.clone())
                };
                self.problem = Some(failure);
                tunnel.renewal = Renewal::HandingOver(hand_over);
                self.end(&tunnel, "the hand-over to a fresh key failed", then)
            }
        }
    }

    /// The token is another one: the approval is renewed with it, as soon as that is possible.
    pub(super) fn renew_at_once(&mut self, tunnel: &mut Tunnel) {
        self.cancel_renewal(tunnel);
        match &mut tunnel.renewal {
            Renewal::HandingOver(hand_over) => hand_over.renew_again = true,
            renewal @ (Renewal::Waiting(_) | Renewal::Verifying(_) | Renewal::Approving(_)) => {
                *renewal = Renewal::Waiting(self.now.wall);
            }
        }
    }

    pub(super) fn cancel_renewal(&mut self, tunnel: &Tunnel) {
        match &tunnel.renewal {
            // The device's own: it ends with the device.
            Renewal::Waiting(_) | Renewal::HandingOver(_) => {}
            Renewal::Verifying(question) | Renewal::Approving(question) => {
                self.out.push(Action::Cancel(question.attempt));
            }
        }
    }
}
