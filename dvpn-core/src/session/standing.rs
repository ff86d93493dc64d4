//! Edges out of the states with a tunnel: Connecting, Connected, Degraded and Disconnecting.

use super::{
    Action, Attempt, Input, Session, SessionConfig,
    liveness::Remedy,
    state::{Connecting, Disconnecting, Renewal, Run, State, Then, Tunnel},
    steps::{ANSWER_TIMEOUT, GOOD_CONNECTION, HANDSHAKE_TIMEOUT},
    trust::Verdict,
};
use crate::{Failure, Retry, approval::Approval, payment::Verification};

impl Session {
    pub(super) fn in_connecting(&mut self, mut connecting: Connecting, input: Input) -> State {
        let ours = connecting.question.attempt;
        match input {
            Input::TunnelConfigured(attempt, Ok(())) if attempt == ours => {
                connecting.question = self.within(ours, HANDSHAKE_TIMEOUT);
                State::Connecting(connecting)
            }
            Input::TunnelConfigured(attempt, Err(failure)) | Input::TunnelLost(attempt, failure) if attempt == ours => {
                self.tear_down(ours, Then::Next(connecting.run, failure))
            }
            Input::HandshakeSeen(attempt) if attempt == ours => self.stand(ours, connecting.approval),
            Input::Start(choice) => {
                let changed = self.wish(choice);
                if changed && !self.allows(connecting.approval.provider()) {
                    return self.tear_down(ours, Then::Discover);
                }
                State::Connecting(connecting)
            }
            Input::Stop => {
                self.forget_wish();
                self.tear_down(ours, Then::Stop)
            }
            Input::TokenChanged => {
                self.forget_subscription();
                self.tear_down(ours, Then::Discover)
            }
            Input::ConfigChanged(config) => {
                self.configure(*config);
                if self.may_keep(&connecting.approval) {
                    State::Connecting(connecting)
                } else {
                    self.tear_down(ours, Then::Discover)
                }
            }
            Input::NetworkChanged => {
                self.out
                    .extend([Action::RebindTunnel(ours), Action::ForceHandshake(ours)]);
                State::Connecting(connecting)
            }
            Input::FirewallFailed(failure) => {
                if self.firewall_failed(failure.clone()) {
                    return self.tear_down(ours, Then::RefuseUnblocked(failure));
                }
                State::Connecting(connecting)
            }
            Input::Listed(..)
            | Input::Probed(..)
            | Input::Verified(..)
            | Input::Approved(..)
            | Input::Provisioned(..)
            | Input::TunnelConfigured(..)
            | Input::HandshakeSeen(_)
            | Input::TrafficSampled(..)
            | Input::TunnelLost(..)
            | Input::TornDown(_) => State::Connecting(connecting),
        }
    }

    /// Connected and Degraded differ only in how long the tunnel has been silent.
    pub(super) fn in_tunnel(&mut self, mut tunnel: Tunnel, input: Input) -> State {
        let ours = tunnel.attempt;
        match input {
            Input::TrafficSampled(attempt, totals) if attempt == ours => {
                if self.now.instant.duration_since(tunnel.since) >= GOOD_CONNECTION {
                    self.failures = 0;
                }
                let remedy = tunnel.liveness.sample(totals, self.now.instant);
                self.remedy(tunnel, remedy)
            }
            Input::TunnelLost(attempt, failure) if attempt == ours => {
                // A device that dies as soon as it stands would otherwise be made again without a pause.
                let young = self.now.instant.duration_since(tunnel.since) < GOOD_CONNECTION;
                let then = if young && self.failures > 0 { Then::BackOff } else { Then::Discover };
                if young {
                    self.failures = self.failures.saturating_add(1);
                }
                let reason = failure.to_string();
                self.problem = Some(failure);
                self.end(&tunnel, &reason, then)
            }
            Input::Verified(attempt, verification) => self.renewal_verified(tunnel, attempt, verification),
            Input::Approved(attempt, answer) => self.renewal_approved(tunnel, attempt, answer),
            Input::Start(choice) => {
                let changed = self.wish(choice);
                if changed && !self.allows(tunnel.approval.provider()) {
                    self.last_provider = None;
                    return self.end(&tunnel, "another provider was chosen", Then::Discover);
                }
                stays(tunnel)
            }
            Input::Stop => {
                self.forget_wish();
                self.end(&tunnel, "stopped", Then::Stop)
            }
            Input::TokenChanged => {
                self.forget_subscription();
                self.cancel_renewal(&tunnel);
                tunnel.renewal = Renewal::Waiting(self.now.wall);
                self.renewal_due(&mut tunnel);
                stays(tunnel)
            }
            Input::ConfigChanged(config) => self.reconfigured(tunnel, *config),
            Input::NetworkChanged => {
                tunnel.liveness.suspect(self.now.instant);
                self.out.extend([
                    Action::RebindTunnel(ours),
                    Action::ForceHandshake(ours),
                    Action::ProbeTunnel(ours),
                ]);
                stays(tunnel)
            }
            Input::FirewallFailed(failure) => {
                if self.firewall_failed(failure.clone()) {
                    return self.end(&tunnel, &failure.to_string(), Then::RefuseUnblocked(failure));
                }
                stays(tunnel)
            }
            Input::Listed(..)
            | Input::Probed(..)
            | Input::Provisioned(..)
            | Input::TunnelConfigured(..)
            // A handshake shows that the provider lives, not that traffic flows: the samples decide.
            | Input::HandshakeSeen(_)
            | Input::TrafficSampled(..)
            | Input::TunnelLost(..)
            | Input::TornDown(_) => stays(tunnel),
        }
    }

    fn reconfigured(&mut self, tunnel: Tunnel, config: SessionConfig) -> State {
        self.configure(config);
        if self.may_keep(&tunnel.approval) {
            return stays(tunnel);
        }
        self.last_provider = None;
        self.end(&tunnel, "the configuration changed", Then::Discover)
    }

    fn may_keep(&self, approval: &Approval) -> bool {
        self.config.not_configured.is_none() && self.allows(approval.provider())
    }

    fn remedy(&mut self, tunnel: Tunnel, remedy: Remedy) -> State {
        let attempt = tunnel.attempt;
        match remedy {
            Remedy::Nothing => {}
            Remedy::Probe => self.out.push(Action::ProbeTunnel(attempt)),
            Remedy::Handshake => {
                self.out
                    .extend([Action::ForceHandshake(attempt), Action::ProbeTunnel(attempt)]);
            }
            Remedy::Rebind => self.out.extend([
                Action::RebindTunnel(attempt),
                Action::ForceHandshake(attempt),
                Action::ProbeTunnel(attempt),
            ]),
            Remedy::Lost => {
                self.problem = Some(Failure {
                    what: format!("{} stopped answering", tunnel.approval.provider().id),
                    how: "another provider is taken".into(),
                    retry: Retry::Now,
                });
                return self.end(&tunnel, "no answer", Then::Discover);
            }
        }
        stays(tunnel)
    }

    /// What is due beside a tunnel's traffic.
    pub(super) fn tunnel_due(&mut self, mut tunnel: Tunnel) -> State {
        if self.now.wall >= tunnel.approval.expires_at() {
            self.problem = Some(Failure {
                what: format!(
                    "the approval at {} ended and was not renewed",
                    tunnel.approval.provider().id
                ),
                how: "a new one is asked for".into(),
                retry: Retry::Now,
            });
            return self.end(&tunnel, "the approval ended", Then::Discover);
        }
        self.renewal_due(&mut tunnel);
        if self.is_over(tunnel.liveness.assess_at()) {
            let remedy = tunnel.liveness.overdue(self.now.instant);
            return self.remedy(tunnel, remedy);
        }
        stays(tunnel)
    }

    /// Begins a renewal that is due, or gives up one whose answer is lost.
    fn renewal_due(&mut self, tunnel: &mut Tunnel) {
        match &tunnel.renewal {
            Renewal::Waiting(at) if self.now.wall >= *at => {
                let attempt = self.fresh();
                self.out
                    .push(Action::Verify(attempt, tunnel.approval.provider().id.clone()));
                tunnel.renewal = Renewal::Verifying(self.within(attempt, ANSWER_TIMEOUT));
            }
            Renewal::Verifying(question) | Renewal::Approving(question) if self.is_over(question.deadline) => {
                self.cancel_renewal(tunnel);
                tunnel.renewal = self.renew_later(&tunnel.approval);
            }
            Renewal::Waiting(_) | Renewal::Verifying(_) | Renewal::Approving(_) => {}
        }
    }

    fn renewal_verified(&mut self, mut tunnel: Tunnel, attempt: Attempt, verification: Verification) -> State {
        let Renewal::Verifying(question) = &tunnel.renewal else {
            return stays(tunnel);
        };
        if question.attempt != attempt {
            return stays(tunnel);
        }
        let provider = tunnel.approval.provider().clone();
        match self.verified(provider.id.clone(), verification) {
            // Asking again for what cannot last longer would only cut the connection.
            Verdict::Paid(subscription) if subscription.valid_until() > tunnel.approval.expires_at() => {
                self.out
                    .push(Action::Approve(attempt, Box::new(provider), subscription));
                tunnel.renewal = Renewal::Approving(self.within(attempt, ANSWER_TIMEOUT));
                stays(tunnel)
            }
            Verdict::Paid(_) => {
                tunnel.renewal = self.renew_later(&tunnel.approval);
                stays(tunnel)
            }
            Verdict::CannotTell(failure) => {
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

    fn renewal_approved(
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
            Ok(fresh) if fresh.expires_at() > tunnel.approval.expires_at() => {
                self.end(&tunnel, "renewed", Then::Connect(attempt, fresh))
            }
            Ok(_) => stays(tunnel),
            Err(failure) => {
                self.problem = Some(failure);
                stays(tunnel)
            }
        }
    }

    pub(super) fn cancel_renewal(&mut self, tunnel: &Tunnel) {
        match &tunnel.renewal {
            Renewal::Waiting(_) => {}
            Renewal::Verifying(question) | Renewal::Approving(question) => {
                self.out.push(Action::Cancel(question.attempt));
            }
        }
    }

    pub(super) fn in_disconnecting(&mut self, mut disconnecting: Disconnecting, input: Input) -> State {
        match input {
            Input::TornDown(attempt) if attempt == disconnecting.question.attempt => {
                return self.torn_down(disconnecting.then);
            }
            Input::Start(choice) => {
                let changed = self.wish(choice);
                disconnecting.then = if changed {
                    Then::Discover
                } else {
                    sooner(disconnecting.then)
                };
            }
            Input::Stop => {
                self.forget_wish();
                disconnecting.then = Then::Stop;
            }
            Input::TokenChanged => {
                self.forget_subscription();
                anew(&mut disconnecting.then);
            }
            Input::ConfigChanged(config) => {
                self.configure(*config);
                anew(&mut disconnecting.then);
            }
            Input::NetworkChanged => disconnecting.then = sooner(disconnecting.then),
            Input::FirewallFailed(failure) => {
                if self.firewall_failed(failure.clone()) {
                    disconnecting.then = Then::RefuseUnblocked(failure);
                }
            }
            Input::Listed(..)
            | Input::Probed(..)
            | Input::Verified(..)
            | Input::Approved(..)
            | Input::Provisioned(..)
            | Input::TunnelConfigured(..)
            | Input::HandshakeSeen(_)
            | Input::TrafficSampled(..)
            | Input::TunnelLost(..)
            | Input::TornDown(_) => {}
        }
        State::Disconnecting(disconnecting)
    }

    fn torn_down(&mut self, then: Then) -> State {
        match then {
            Then::Stop => self.rest(),
            Then::Connect(attempt, approval) if self.lasts(&approval) => {
                self.connect(attempt, approval, Run::default())
            }
            Then::Discover | Then::Connect(..) => self.begin(),
            Then::Next(run, failure) => self.next_candidate(run, failure),
            Then::BackOff => self.pause(),
            Then::Refuse(failure) => self.refuse(failure),
            Then::RefuseUnblocked(failure) => self.refuse_unblocked(failure),
        }
    }
}

/// Something changed that whatever was to follow did not know of.
fn anew(then: &mut Then) {
    match then {
        Then::Stop => {}
        Then::Discover
        | Then::Next(..)
        | Then::Connect(..)
        | Then::BackOff
        | Then::Refuse(_)
        | Then::RefuseUnblocked(_) => *then = Then::Discover,
    }
}

/// Somebody is back: neither a pause nor an old refusal holds.
fn sooner(then: Then) -> Then {
    match then {
        Then::BackOff | Then::Refuse(_) | Then::RefuseUnblocked(_) => Then::Discover,
        Then::Stop | Then::Discover | Then::Next(..) | Then::Connect(..) => then,
    }
}

fn stays(tunnel: Tunnel) -> State {
    if tunnel.liveness.is_degraded() {
        State::Degraded(tunnel)
    } else {
        State::Connected(tunnel)
    }
}
