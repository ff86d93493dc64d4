//! Edges out of the states with a tunnel: Connecting, Connected, Degraded and Disconnecting.

use super::{
    Action, Input, Release, Session, SessionConfig,
    liveness::Remedy,
    state::{Connecting, Disconnecting, Run, State, Then, Tunnel},
    steps::{GOOD_CONNECTION, HANDSHAKE_TIMEOUT},
};
use crate::{Failure, Retry, approval::Approval};

impl Session {
    pub(super) fn in_connecting(&mut self, mut connecting: Connecting, input: Input) -> State {
        let ours = connecting.question.attempt;
        match input {
            Input::TunnelConfigured(attempt, Ok(())) if attempt == ours => {
                connecting.question = self.within(ours, HANDSHAKE_TIMEOUT);
                State::Connecting(connecting)
            }
            Input::TunnelConfigured(attempt, Err(failure)) | Input::TunnelLost(attempt, failure) if attempt == ours => {
                self.abandon(ours, &connecting.approval, Then::Next(connecting.run, failure))
            }
            Input::HandshakeSeen(attempt) if attempt == ours => self.stand(ours, connecting.approval),
            Input::LeaseExtended(attempt, until) if attempt == ours => {
                self.extend(&mut connecting.approval, until);
                State::Connecting(connecting)
            }
            Input::Start(choice) => {
                let changed = self.wish(choice);
                if changed && !self.allows(connecting.approval.provider()) {
                    return self.abandon(ours, &connecting.approval, Then::Discover);
                }
                State::Connecting(connecting)
            }
            Input::Stop => {
                self.forget_wish();
                self.abandon(ours, &connecting.approval, Then::Stop)
            }
            Input::TokenChanged => {
                self.forget_subscription();
                self.abandon(ours, &connecting.approval, Then::Discover)
            }
            Input::ConfigChanged(config) => {
                self.configure(*config);
                if self.may_keep(&connecting.approval) {
                    State::Connecting(connecting)
                } else {
                    self.abandon(ours, &connecting.approval, Then::Discover)
                }
            }
            Input::NetworkChanged => {
                self.out
                    .extend([Action::RebindTunnel(ours), Action::ForceHandshake(ours)]);
                State::Connecting(connecting)
            }
            Input::FirewallFailed(failure) => {
                if self.firewall_failed(failure.clone()) {
                    return self.abandon(ours, &connecting.approval, Then::RefuseUnblocked(failure));
                }
                State::Connecting(connecting)
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
            Input::TunnelRenewed(attempt, answer) => self.renewed(tunnel, attempt, answer),
            Input::LeaseExtended(attempt, until) if attempt == ours => {
                self.extend(&mut tunnel.approval, until);
                stays(tunnel)
            }
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
                self.renew_at_once(&mut tunnel);
                match self.renewal_due(tunnel) {
                    Ok(tunnel) => stays(tunnel),
                    Err(ended) => *ended,
                }
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
            | Input::LeaseExtended(..)
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
    pub(super) fn tunnel_due(&mut self, tunnel: Tunnel) -> State {
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
        let mut tunnel = match self.renewal_due(tunnel) {
            Ok(tunnel) => tunnel,
            Err(ended) => return *ended,
        };
        if self.is_over(tunnel.liveness.assess_at()) {
            let remedy = tunnel.liveness.overdue(self.now.instant);
            return self.remedy(tunnel, remedy);
        }
        stays(tunnel)
    }

    pub(super) fn in_disconnecting(&mut self, mut disconnecting: Disconnecting, input: Input) -> State {
        match input {
            Input::TornDown(attempt) if attempt == disconnecting.question.attempt => {
                return self.torn_down(disconnecting);
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
            | Input::LeaseExtended(..)
            | Input::TunnelConfigured(..)
            | Input::HandshakeSeen(_)
            | Input::TrafficSampled(..)
            | Input::TunnelRenewed(..)
            | Input::TunnelLost(..)
            | Input::TornDown(_) => {}
        }
        State::Disconnecting(disconnecting)
    }

    fn torn_down(&mut self, disconnecting: Disconnecting) -> State {
        let Disconnecting { then, release, .. } = disconnecting;
        let then = match then {
            // It ended while the tunnel went down.
            Then::Connect(_, approval) if !self.lasts(&approval) => Then::Discover,
            then @ (Then::Stop
            | Then::Discover
            | Then::Next(..)
            | Then::Connect(..)
            | Then::BackOff
            | Then::Refuse(_)
            | Then::RefuseUnblocked(_)) => then,
        };
        for release in release {
            if !goes_on_with(&then, &release) {
                self.out.push(Action::Release(release));
            }
        }
        match then {
            Then::Stop => self.rest(),
            Then::Connect(attempt, approval) => self.connect(attempt, approval, Run::default()),
            Then::Discover => self.begin(),
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

/// Whether a key that was to be released is the one to be connected with now.
fn goes_on_with(then: &Then, release: &Release) -> bool {
    match then {
        Then::Connect(_, approval) => *approval.client_key() == release.client_key,
        Then::Stop | Then::Discover | Then::Next(..) | Then::BackOff | Then::Refuse(_) | Then::RefuseUnblocked(_) => {
            false
        }
    }
}

pub(super) fn stays(tunnel: Tunnel) -> State {
    if tunnel.liveness.is_degraded() {
        State::Degraded(tunnel)
    } else {
        State::Connected(tunnel)
    }
}
