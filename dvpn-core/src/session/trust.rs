//! What is believed of a payment and of an approval, and for how long.

use dvpn_common::{ids::ProviderId, status::PaymentStatus};
use jiff::{SignedDuration, Timestamp};

use super::{Action, Session, state::Renewal};
use crate::{
    Failure, Retry,
    approval::Approval,
    audit::{Event, VerificationOutcome},
    directory::Provider,
    payment::{Subscription, Verification},
};

/// An approval that ends sooner would be renewed without a pause.
const MIN_APPROVAL_LIFE: SignedDuration = SignedDuration::from_secs(10);
const MIN_RENEWAL_PAUSE: SignedDuration = SignedDuration::from_secs(5);
/// No approval lives longer, and a leased provider's payment is looked at as often as one of the pool's.
const LONGEST_WITHOUT_A_LOOK: SignedDuration = SignedDuration::from_hours(24);

/// What a verification means for going on.
pub(super) enum Verdict {
    Paid(Subscription),
    NotPaid(Failure),
    CannotTell(Failure),
    /// Nobody was asked, and nobody can be until somebody acts: the token is missing, or sealed away. That says nothing
    /// about the payment.
    CannotAsk(Failure),
}

impl Session {
    /// Takes the payment server's word, keeping "no answer" apart from "no".
    pub(super) fn verified(&mut self, provider: ProviderId, verification: Verification) -> Verdict {
        let (outcome, verdict) = match verification {
            Verification::Paid(subscription) if subscription.is_valid(self.now.wall) => {
                self.subscription = Some(subscription);
                self.payment = PaymentStatus::Paid;
                self.out.push(Action::StoreSubscription(Some(subscription)));
                let valid_until = subscription.valid_until();
                (VerificationOutcome::Paid { valid_until }, Verdict::Paid(subscription))
            }
            // A yes that came so late that it is over: the next answer will tell.
            Verification::Paid(subscription) => {
                let failure = Failure {
                    what: format!("the verified subscription ended at {}", subscription.valid_until()),
                    how: "check this machine's clock, or pay for the next month".into(),
                    retry: Retry::Backoff,
                };
                let reason = failure.to_string();
                (VerificationOutcome::CannotTell { reason }, Verdict::CannotTell(failure))
            }
            Verification::NotPaid(failure) => {
                self.subscription = None;
                self.payment = PaymentStatus::Unpaid;
                self.out.push(Action::StoreSubscription(None));
                (
                    VerificationOutcome::NotPaid {
                        reason: failure.to_string(),
                    },
                    Verdict::NotPaid(failure),
                )
            }
            Verification::CannotTell(failure) => {
                let outcome = VerificationOutcome::CannotTell {
                    reason: failure.to_string(),
                };
                if failure.retry == Retry::Never {
                    self.audit(Event::PaymentVerified { provider, outcome });
                    return Verdict::CannotAsk(failure);
                }
                match self.subscription.filter(|held| held.is_valid(self.now.wall)) {
                    Some(held) => {
                        self.problem = Some(failure);
                        (outcome, Verdict::Paid(held))
                    }
                    None => (outcome, Verdict::CannotTell(failure)),
                }
            }
        };
        self.audit(Event::PaymentVerified { provider, outcome });
        verdict
    }

    /// Takes an approval if it is for `provider` and lasts.
    pub(super) fn admitted(
        &mut self,
        provider: &Provider,
        answer: Result<Box<Approval>, Failure>,
    ) -> Result<Box<Approval>, Failure> {
        let checked = answer.and_then(|approval| {
            if approval.provider() != provider {
                Err(Failure {
                    what: format!(
                        "the approval is for {}, not for {}",
                        approval.provider().id,
                        provider.id
                    ),
                    how: "tell the pool's operator".into(),
                    retry: Retry::Now,
                })
            } else if self.lasts(&approval) {
                Ok(approval)
            } else {
                Err(Failure {
                    what: format!("the approval at {} ends at {}", provider.id, approval.expires_at()),
                    how: "check this machine's clock, and when the subscription ends".into(),
                    retry: Retry::Now,
                })
            }
        });
        self.audit(match &checked {
            Ok(approval) => Event::ApprovalGranted {
                provider: provider.id.clone(),
                expires_at: approval.expires_at(),
            },
            Err(failure) => Event::ApprovalRefused {
                provider: provider.id.clone(),
                reason: failure.to_string(),
            },
        });
        checked
    }

    /// Whether an approval is worth a tunnel.
    pub(super) fn lasts(&self, approval: &Approval) -> bool {
        approval.expires_at().duration_since(self.now.wall) >= MIN_APPROVAL_LIFE
    }

    /// Half of what is left of an approval, so that a renewal that fails has time to be tried again.
    pub(super) fn renew_later(&self, approval: &Approval) -> Renewal {
        let end = match self.subscription {
            // Its lease is short and renewed elsewhere; only the payment is looked at again.
            Some(subscription) if !approval.is_from_pool() => subscription.valid_until(),
            Some(_) | None => approval.expires_at(),
        };
        let left = end.duration_since(self.now.wall).min(LONGEST_WITHOUT_A_LOOK);
        let pause = (left / 2).max(MIN_RENEWAL_PAUSE);
        Renewal::Waiting(self.now.wall.checked_add(pause).unwrap_or(Timestamp::MAX))
    }

    /// The orchestrator renewed a lease: the approval lasts as long as that and the payment allow.
    pub(super) fn extend(&mut self, approval: &mut Approval, until: Timestamp) {
        let Some(subscription) = self.subscription else { return };
        if let Err(error) = approval.extend_lease(&subscription, until, self.now.wall) {
            self.problem = Some(error.into());
        }
    }
}
