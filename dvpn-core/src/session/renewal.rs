//! Keeping the approval of a standing tunnel fresh: verify, approve, hand over.
//!
//! A pool that did not answer may have acted all the same: it admitted the fresh key, and takes the old one off soon. So it
//! is asked again within seconds, and whoever carries that out asks for the very key whose answer is missing. Only after
//! several tries is it left alone until half of what is left.
//!
//! A hand-over that fails leaves the tunnel on its old key, which the provider drops soon after it admitted the fresh
//! one. So it is tried again within seconds, and then the tunnel is made anew under the fresh approval: a short gap now
//! instead of a dead tunnel later.

use std::time::Duration;

use rand::RngExt as _;

use super::{
    Action, Attempt, Release, Session,
    standing::stays,
    state::{Asking, HandOver, Renewal, State, Then, Tunnel},
    steps::ANSWER_TIMEOUT,
    trust::Verdict,
};
use crate::{
    Failure, Retry,
    approval::Approval,
    audit::Event,
    payment::{Subscription, Verification},
};

/// The device gives a hand-over up after 3 s; this guards against an answer that never comes.
pub(super) const HAND_OVER_TIMEOUT: Duration = Duration::from_secs(10);
/// Before the second try; twice as long before the third.
const HAND_OVER_PAUSE: Duration = Duration::from_secs(2);
const HAND_OVER_TRIES: u32 = 3;
/// Before the pool is asked a second time; twice as long before each further try, and of that at least half, at random:
/// many clients may have lost their answers at one moment.
const ASK_PAUSE: Duration = Duration::from_secs(1);
/// All of them within the half minute that a pool keeps a renewed key, where it refuses at once.
const ASK_TRIES: u32 = 5;

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
            Renewal::Waiting(at) if self.now.wall >= *at => tunnel.renewal = self.begin_renewal(&tunnel),
            Renewal::Verifying(question) if self.is_over(question.deadline) => {
                self.cancel_renewal(&tunnel);
                tunnel.renewal = self.renew_later(&tunnel.approval);
            }
            Renewal::Approving(asking) if self.is_over(asking.question.deadline) => {
                let (subscription, failed) = (asking.subscription, asking.failed);
                tunnel.renewal = if asking.pausing {
                    // The subscription outlasts the approval, and that still holds.
                    let attempt = self.fresh();
                    self.ask(&tunnel, attempt, subscription, failed)
                } else {
                    self.cancel_renewal(&tunnel);
                    self.ask_again_soon(&tunnel, subscription, failed + 1)
                };
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

    fn begin_renewal(&mut self, tunnel: &Tunnel) -> Renewal {
        let attempt = self.fresh();
        self.out
            .push(Action::Verify(attempt, tunnel.approval.provider().id.clone()));
        Renewal::Verifying(self.within(attempt, ANSWER_TIMEOUT))
    }

    /// Asks the pool to admit a key that follows the tunnel's.
    fn ask(&mut self, tunnel: &Tunnel, attempt: Attempt, subscription: Subscription, failed: u32) -> Renewal {
        let provider = Box::new(tunnel.approval.provider().clone());
        let renews = Some(*tunnel.approval.client_key());
        self.out.push(Action::Approve(attempt, provider, subscription, renews));
        Renewal::Approving(Asking {
            question: self.within(attempt, ANSWER_TIMEOUT),
            subscription,
            failed,
            pausing: false,
        })
    }

    /// Waits a little before the next try, or for long after the last one.
    fn ask_again_soon(&mut self, tunnel: &Tunnel, subscription: Subscription, failed: u32) -> Renewal {
        if failed >= ASK_TRIES {
            return self.renew_later(&tunnel.approval);
        }
        let longest = ASK_PAUSE * 2_u32.pow(failed - 1);
        let pause = longest.mul_f64(self.rng.random_range(0.5..=1.0));
        Renewal::Approving(Asking {
            question: self.within(Attempt(self.last_attempt), pause),
            subscription,
            failed,
            pausing: true,
        })
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
        match self.verified(tunnel.approval.provider().id.clone(), verification) {
            // Asking again for what cannot last longer would only cut the connection. The pool does not know a provider
            // that the orchestrator made: its lease is renewed where it came from.
            Verdict::Paid(subscription)
                if subscription.valid_until() > tunnel.approval.expires_at() && tunnel.approval.is_from_pool() =>
            {
                tunnel.renewal = self.ask(&tunnel, attempt, subscription, 0);
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
        let (subscription, failed) = match &tunnel.renewal {
            Renewal::Approving(asking) if asking.question.attempt == attempt && !asking.pausing => {
                (asking.subscription, asking.failed)
            }
            Renewal::Waiting(_) | Renewal::Verifying(_) | Renewal::Approving(_) | Renewal::HandingOver(_) => {
                return stays(tunnel);
            }
        };
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
                if failure.retry != Retry::Never {
                    tunnel.renewal = self.ask_again_soon(&tunnel, subscription, failed + 1);
                }
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
            // Nobody is asked.
            Renewal::Approving(asking) if asking.pausing => {}
            Renewal::Verifying(question) | Renewal::Approving(Asking { question, .. }) => {
                self.out.push(Action::Cancel(question.attempt));
            }
        }
    }
}
