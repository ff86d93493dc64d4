//! Edges out of the states in which nothing is asked and no tunnel stands: Disconnected, Backoff and Blocked. Also all
//! deadlines.

use super::{
    Action, Input, Session,
    state::{Backoff, Blocked, Idle, State, Then},
    steps::TEAR_DOWN_TIMEOUT,
};
use crate::{Failure, Retry, audit::Event, payment::Verification};

fn no_answer(from: &str) -> Failure {
    Failure {
        what: format!("no answer from {from}"),
        how: "check the network; the session tries again by itself".into(),
        retry: Retry::Backoff,
    }
}

impl Session {
    pub(super) fn in_disconnected(&mut self, idle: Idle, input: Input) -> State {
        match input {
            Input::Start(choice) => {
                self.wish(choice);
                self.begin()
            }
            Input::Stop => self.stop_now(None),
            Input::TokenChanged => {
                self.forget_subscription();
                self.again(idle)
            }
            Input::ConfigChanged(config) => {
                self.configure(*config);
                if self.wanted.is_some() {
                    self.begin()
                } else {
                    self.rest()
                }
            }
            Input::NetworkChanged => self.again(idle),
            Input::FirewallFailed(failure) => {
                self.firewall_failed(failure);
                State::Disconnected(idle)
            }
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
            | Input::TornDown(_) => State::Disconnected(idle),
        }
    }

    /// A refused session is tried again when what it was refused for may be over.
    fn again(&mut self, idle: Idle) -> State {
        match idle {
            Idle::Refused => self.begin(),
            Idle::NotWanted | Idle::NotConfigured => State::Disconnected(idle),
        }
    }

    pub(super) fn in_backoff(&mut self, backoff: Backoff, input: Input) -> State {
        match input {
            Input::Start(choice) => {
                self.wish(choice);
                self.begin()
            }
            Input::Stop => self.stop_now(None),
            Input::TokenChanged => {
                self.forget_subscription();
                self.begin()
            }
            Input::ConfigChanged(config) => {
                self.configure(*config);
                self.begin()
            }
            Input::NetworkChanged => self.begin(),
            Input::FirewallFailed(failure) => {
                if self.firewall_failed(failure.clone()) {
                    self.refuse_unblocked(failure)
                } else {
                    State::Backoff(backoff)
                }
            }
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
            | Input::TornDown(_) => State::Backoff(backoff),
        }
    }

    pub(super) fn in_blocked(&mut self, blocked: Blocked, input: Input) -> State {
        match input {
            Input::Start(choice) => {
                self.wish(choice);
                self.begin()
            }
            Input::Stop => self.stop_now(None),
            Input::TokenChanged => {
                self.forget_subscription();
                self.begin()
            }
            Input::ConfigChanged(config) => {
                self.configure(*config);
                self.begin()
            }
            Input::NetworkChanged => self.begin(),
            Input::FirewallFailed(failure) => {
                if self.firewall_failed(failure) {
                    State::Blocked(Blocked { leaking: true })
                } else {
                    State::Blocked(blocked)
                }
            }
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
            | Input::TornDown(_) => State::Blocked(blocked),
        }
    }

    /// Records that the firewall is not what it should be. True if it should block.
    pub(super) fn firewall_failed(&mut self, failure: Failure) -> bool {
        self.audit(Event::FirewallFailed {
            reason: failure.to_string(),
        });
        self.firewall_unknown = true;
        if self.wanted.is_none() || !self.blocks() {
            self.problem = Some(failure);
            return false;
        }
        true
    }

    pub(super) fn on_timeout(&mut self, state: State) -> State {
        match state {
            State::Discovering(question) if self.is_over(question.deadline) => {
                self.out.push(Action::Cancel(question.attempt));
                self.listed(Err(no_answer("the pool")))
            }
            State::Probing(probing) if self.is_over(probing.question.deadline) => {
                self.out.push(Action::Cancel(probing.question.attempt));
                self.probed(probing, &[])
            }
            State::Authorizing(authorizing) if self.is_over(authorizing.question.deadline) => {
                self.out.push(Action::Cancel(authorizing.question.attempt));
                self.authorization_missing(authorizing, no_answer("the payment server or the pool"))
            }
            State::Provisioning(provisioning) if self.is_over(provisioning.question.deadline) => {
                let attempt = provisioning.question.attempt;
                self.out.push(Action::Cancel(attempt));
                if provisioning.verified {
                    return self.provisioned(attempt, Err(no_answer("the fallback orchestrator")));
                }
                self.fallback_verified(attempt, Verification::CannotTell(no_answer("the payment server")))
            }
            State::Connecting(connecting) if self.is_over(connecting.question.deadline) => {
                let failure = Failure {
                    what: format!("no handshake with {}", connecting.approval.provider().id),
                    how: "the next provider is tried; if none answers, check that UDP passes".into(),
                    retry: Retry::Now,
                };
                self.abandon(
                    connecting.question.attempt,
                    &connecting.approval,
                    Then::Next(connecting.run, failure),
                )
            }
            State::Connected(tunnel) | State::Degraded(tunnel) => self.tunnel_due(tunnel),
            State::Disconnecting(mut disconnecting) if self.is_over(disconnecting.question.deadline) => {
                self.out.push(Action::TearDown(disconnecting.question.attempt));
                disconnecting.question.deadline = self.now.instant + TEAR_DOWN_TIMEOUT;
                State::Disconnecting(disconnecting)
            }
            State::Backoff(backoff) if self.is_over(backoff.until) => self.begin(),
            // Not due, or without a deadline.
            State::Disconnected(_)
            | State::Discovering(_)
            | State::Probing(_)
            | State::Authorizing(_)
            | State::Provisioning(_)
            | State::Connecting(_)
            | State::Disconnecting(_)
            | State::Backoff(_)
            | State::Blocked(_) => state,
        }
    }
}
