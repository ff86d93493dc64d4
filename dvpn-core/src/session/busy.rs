//! Edges out of the states in which an answer is awaited and no tunnel stands: Discovering, Probing, Authorizing and
//! Provisioning.

use super::{
    Action, Attempt, Choice, FALLBACK_ID, Input, Session,
    state::{Authorizing, Probing, Provisioning, Question, Run, State, Step},
    steps::ANSWER_TIMEOUT,
    trust::Verdict,
};
use crate::{Failure, Retry, approval::Approval, audit::Event, payment::Verification};

/// The orchestrator's provider belongs to no measured run.
const PROVISIONED: Run = Run {
    untried: std::collections::VecDeque::new(),
    provisioned: true,
};

fn over(approval: &Approval) -> Failure {
    Failure {
        what: format!("the provisioned provider's approval ends at {}", approval.expires_at()),
        how: "check this machine's clock, and when the subscription ends".into(),
        retry: Retry::Backoff,
    }
}

impl Session {
    pub(super) fn in_discovering(&mut self, question: Question, input: Input) -> State {
        match input {
            Input::Listed(attempt, answer) if attempt == question.attempt => self.listed(answer),
            Input::Start(choice) => {
                // The list is chosen from when it comes.
                self.wish(choice);
                State::Discovering(question)
            }
            Input::Stop => self.stop_now(Some(question.attempt)),
            Input::TokenChanged => {
                self.forget_subscription();
                State::Discovering(question)
            }
            Input::ConfigChanged(config) => {
                self.configure(*config);
                self.restart(question.attempt)
            }
            Input::NetworkChanged => self.restart(question.attempt),
            Input::FirewallFailed(failure) => self.leaking(failure, question.attempt, State::Discovering(question)),
            Input::Listed(..)
            | Input::Probed(..)
            | Input::Verified(..)
            | Input::Approved(..)
            | Input::Provisioned(..)
            | Input::LeaseExtended(..)
            | Input::TunnelConfigured(..)
            | Input::HandshakeSeen(_)
            | Input::TrafficSampled(..)
            | Input::TunnelRenewed(..)
            | Input::TunnelLost(..)
            | Input::TornDown(_) => State::Discovering(question),
        }
    }

    pub(super) fn in_probing(&mut self, probing: Probing, input: Input) -> State {
        let ours = probing.question.attempt;
        match input {
            Input::Probed(attempt, measurements) if attempt == ours => self.probed(probing, &measurements),
            Input::Start(choice) => self.wish_anew(choice, ours, State::Probing(probing)),
            Input::Stop => self.stop_now(Some(ours)),
            Input::TokenChanged => {
                self.forget_subscription();
                State::Probing(probing)
            }
            Input::ConfigChanged(config) => {
                self.configure(*config);
                self.restart(ours)
            }
            Input::NetworkChanged => self.restart(ours),
            Input::FirewallFailed(failure) => self.leaking(failure, ours, State::Probing(probing)),
            Input::Listed(..)
            | Input::Probed(..)
            | Input::Verified(..)
            | Input::Approved(..)
            | Input::Provisioned(..)
            | Input::LeaseExtended(..)
            | Input::TunnelConfigured(..)
            | Input::HandshakeSeen(_)
            | Input::TrafficSampled(..)
            | Input::TunnelRenewed(..)
            | Input::TunnelLost(..)
            | Input::TornDown(_) => State::Probing(probing),
        }
    }

    pub(super) fn in_authorizing(&mut self, mut authorizing: Authorizing, input: Input) -> State {
        let ours = authorizing.question.attempt;
        match input {
            Input::Verified(attempt, verification) if attempt == ours => {
                self.candidate_verified(authorizing, verification)
            }
            Input::Approved(attempt, answer) if attempt == ours => self.candidate_approved(authorizing, answer),
            Input::LeaseExtended(attempt, until) if attempt == ours => {
                if let Step::VerifyProvisioned(approval) = &mut authorizing.step {
                    self.extend(approval, until);
                }
                State::Authorizing(authorizing)
            }
            Input::Start(choice) => self.wish_anew(choice, ours, State::Authorizing(authorizing)),
            Input::Stop => self.stop_now(Some(ours)),
            Input::TokenChanged => {
                self.forget_subscription();
                self.restart(ours)
            }
            Input::ConfigChanged(config) => {
                self.configure(*config);
                self.restart(ours)
            }
            Input::NetworkChanged => self.restart(ours),
            Input::FirewallFailed(failure) => self.leaking(failure, ours, State::Authorizing(authorizing)),
            Input::Listed(..)
            | Input::Probed(..)
            | Input::Verified(..)
            | Input::Approved(..)
            | Input::Provisioned(..)
            | Input::LeaseExtended(..)
            | Input::TunnelConfigured(..)
            | Input::HandshakeSeen(_)
            | Input::TrafficSampled(..)
            | Input::TunnelRenewed(..)
            | Input::TunnelLost(..)
            | Input::TornDown(_) => State::Authorizing(authorizing),
        }
    }

    fn candidate_verified(&mut self, authorizing: Authorizing, verification: Verification) -> State {
        let Authorizing { question, step, run } = authorizing;
        let id = match &step {
            Step::Verify(provider) => provider.id.clone(),
            Step::VerifyProvisioned(approval) => approval.provider().id.clone(),
            // Verified already: an answer given twice.
            Step::Approve(_) => return State::Authorizing(Authorizing { question, step, run }),
        };
        let subscription = match self.verified(id, verification) {
            Verdict::Paid(subscription) => subscription,
            Verdict::NotPaid(failure) | Verdict::CannotAsk(failure) => return self.refuse(failure),
            Verdict::CannotTell(failure) => return self.back_off(failure),
        };
        match step {
            Step::Verify(provider) | Step::Approve(provider) => {
                self.out.push(Action::Approve(
                    question.attempt,
                    Box::new(provider.clone()),
                    subscription,
                    None,
                ));
                let question = self.within(question.attempt, ANSWER_TIMEOUT);
                State::Authorizing(Authorizing {
                    question,
                    step: Step::Approve(provider),
                    run,
                })
            }
            Step::VerifyProvisioned(approval) if self.lasts(&approval) => self.connect(question.attempt, approval, run),
            // Its end came while the payment server was slow.
            Step::VerifyProvisioned(approval) => self.back_off(over(&approval)),
        }
    }

    fn candidate_approved(&mut self, authorizing: Authorizing, answer: Result<Box<Approval>, Failure>) -> State {
        let Authorizing { question, step, run } = authorizing;
        let provider = match step {
            Step::Approve(provider) => provider,
            // Not asked yet: nobody's answer.
            Step::Verify(_) | Step::VerifyProvisioned(_) => {
                return State::Authorizing(Authorizing { question, step, run });
            }
        };
        match self.admitted(&provider, answer) {
            Ok(approval) => self.connect(question.attempt, approval, run),
            Err(failure) => match failure.retry {
                Retry::Now => self.next_candidate(run, failure),
                Retry::Backoff => self.give_up(failure, run.provisioned),
                Retry::Never => self.refuse(failure),
            },
        }
    }

    /// The answer about a candidate is lost.
    pub(super) fn authorization_missing(&mut self, authorizing: Authorizing, failure: Failure) -> State {
        let Authorizing { question, step, run } = authorizing;
        match step {
            // Nothing was heard of the payment: that is the answer "cannot tell".
            Step::Verify(_) | Step::VerifyProvisioned(_) => {
                let authorizing = Authorizing { question, step, run };
                self.candidate_verified(authorizing, Verification::CannotTell(failure))
            }
            Step::Approve(provider) => {
                self.audit(Event::ApprovalRefused {
                    provider: provider.id,
                    reason: failure.to_string(),
                });
                self.next_candidate(run, failure)
            }
        }
    }

    pub(super) fn in_provisioning(&mut self, provisioning: Provisioning, input: Input) -> State {
        let ours = provisioning.question.attempt;
        match input {
            Input::Verified(attempt, verification) if attempt == ours && !provisioning.verified => {
                self.fallback_verified(ours, verification)
            }
            Input::Provisioned(attempt, answer) if attempt == ours && provisioning.verified => {
                self.provisioned(ours, answer)
            }
            Input::Start(choice) => self.wish_anew(choice, ours, State::Provisioning(provisioning)),
            Input::Stop => self.stop_now(Some(ours)),
            Input::TokenChanged => {
                self.forget_subscription();
                self.restart(ours)
            }
            Input::ConfigChanged(config) => {
                self.configure(*config);
                self.restart(ours)
            }
            Input::FirewallFailed(failure) => self.leaking(failure, ours, State::Provisioning(provisioning)),
            // A provider that is being made is waited for: its answer may still come over the new network.
            Input::NetworkChanged
            | Input::Listed(..)
            | Input::Probed(..)
            | Input::Verified(..)
            | Input::Approved(..)
            | Input::Provisioned(..)
            | Input::LeaseExtended(..)
            | Input::TunnelConfigured(..)
            | Input::HandshakeSeen(_)
            | Input::TrafficSampled(..)
            | Input::TunnelRenewed(..)
            | Input::TunnelLost(..)
            | Input::TornDown(_) => State::Provisioning(provisioning),
        }
    }

    /// Whether the orchestrator may be asked for a provider.
    pub(super) fn fallback_verified(&mut self, attempt: Attempt, verification: Verification) -> State {
        let Ok(id) = FALLBACK_ID.parse() else {
            return self.pause();
        };
        match self.verified(id, verification) {
            Verdict::Paid(subscription) => self.ask_orchestrator(attempt, subscription),
            Verdict::NotPaid(failure) | Verdict::CannotAsk(failure) => self.refuse(failure),
            Verdict::CannotTell(failure) => self.back_off(failure),
        }
    }

    /// The orchestrator's answer. However it failed, the pool may be back after a pause.
    pub(super) fn provisioned(&mut self, attempt: Attempt, answer: Result<Box<Approval>, Failure>) -> State {
        let lasting = answer.and_then(|approval| {
            if self.lasts(&approval) {
                return Ok(approval);
            }
            Err(over(&approval))
        });
        match lasting {
            Ok(approval) => {
                let provider = approval.provider().id.clone();
                let expires_at = approval.expires_at();
                self.audit(Event::FallbackProvisioned {
                    provider: provider.clone(),
                    expires_at,
                });
                self.out.push(Action::Verify(attempt, provider));
                let question = self.within(attempt, ANSWER_TIMEOUT);
                let step = Step::VerifyProvisioned(approval);
                State::Authorizing(Authorizing {
                    question,
                    step,
                    run: PROVISIONED,
                })
            }
            Err(failure) => {
                self.audit(Event::FallbackFailed {
                    reason: failure.to_string(),
                });
                self.back_off(failure)
            }
        }
    }

    /// A Start while something is under way: only another choice begins anew.
    fn wish_anew(&mut self, choice: Choice, open_question: Attempt, state: State) -> State {
        if self.wish(choice) {
            self.restart(open_question)
        } else {
            state
        }
    }

    /// The firewall is not what it should be: nothing goes on that counts on it.
    fn leaking(&mut self, failure: Failure, open_question: Attempt, state: State) -> State {
        if !self.firewall_failed(failure.clone()) {
            return state;
        }
        self.out.push(Action::Cancel(open_question));
        self.refuse_unblocked(failure)
    }
}
