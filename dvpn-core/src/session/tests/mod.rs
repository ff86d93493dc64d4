//! Tests of the machine as a whole, from outside.

mod edges;
mod lease;
mod properties;
mod renewals;
mod table;

use std::time::Duration;

use dvpn_common::status::{ProbeMethod, StateName};

use super::{
    fixtures::{after, approval, approval_at, config, directory, failure, leased, paid, provider, start},
    *,
};
use crate::{Retry, payment::Verification, sim::watch::Watch};

const HOUR: Duration = Duration::from_hours(1);

/// A session, its clock, and everything it asked for. Every step is watched.
struct Rig {
    session: Session,
    watch: Watch,
    config: SessionConfig,
    now: Now,
    last: Vec<Action>,
    /// Number of the last question, tunnel or tear-down.
    asked: Attempt,
    /// Bytes of the standing tunnel.
    traffic: Traffic,
}

impl Rig {
    fn new(config: SessionConfig) -> Self {
        Self::restored(config, Restored::default())
    }

    fn restored(config: SessionConfig, restored: Restored) -> Self {
        let now = start();
        let mut session = Session::new(config.clone(), [7; 32], restored, now);
        let mut watch = Watch::new(&config, &restored);
        let last = watch.begin(&mut session, now).unwrap();
        let traffic = Traffic::default();
        let mut rig = Self {
            session,
            watch,
            config,
            now,
            last,
            asked: Attempt(0),
            traffic,
        };
        rig.note();
        rig
    }

    fn note(&mut self) {
        for action in &self.last {
            match action {
                Action::Discover(attempt)
                | Action::Probe(attempt, _)
                | Action::Verify(attempt, _)
                | Action::Approve(attempt, ..)
                | Action::Provision(attempt, _)
                | Action::ConfigureTunnel(attempt, _)
                | Action::RenewTunnel(attempt, _)
                | Action::TearDown(attempt) => self.asked = *attempt,
                Action::Cancel(_)
                | Action::ForceHandshake(_)
                | Action::ProbeTunnel(_)
                | Action::RebindTunnel(_)
                | Action::SetFirewall(_)
                | Action::Release(_)
                | Action::StoreWish(_)
                | Action::StoreLastEndpoint(_)
                | Action::StoreSubscription(_)
                | Action::Audit(_) => {}
            }
        }
    }

    #[track_caller]
    fn feed(&mut self, input: Input) -> StateName {
        self.last = self.watch.feed(&mut self.session, input, self.now).unwrap();
        self.note();
        self.session.state()
    }

    #[track_caller]
    fn expire(&mut self) -> StateName {
        let (at, _) = self.session.poll_timeout().unwrap();
        self.wait(at.saturating_duration_since(self.now.instant));
        self.last = self.watch.expire(&mut self.session, self.now).unwrap();
        self.note();
        self.session.state()
    }

    fn wait(&mut self, time: Duration) {
        self.now = after(self.now, time);
    }

    /// One second with this much traffic.
    #[track_caller]
    fn second(&mut self, tx: u64, rx: u64) -> StateName {
        self.wait(Duration::from_secs(1));
        self.traffic.tx_bytes += tx;
        self.traffic.rx_bytes += rx;
        let tunnel = self.tunnel();
        self.feed(Input::TrafficSampled(tunnel, self.traffic))
    }

    fn tunnel(&self) -> Attempt {
        let (State::Connected(tunnel) | State::Degraded(tunnel)) = &self.session.state else {
            panic!("no tunnel in {:?}", self.session.state)
        };
        tunnel.attempt
    }

    fn did(&self, wanted: impl Fn(&Action) -> bool) -> bool {
        self.last.iter().any(wanted)
    }

    fn start(&mut self) {
        self.feed(Input::Start(Choice::default()));
    }

    /// Every probed provider answers, in this order of speed.
    fn all_alive(&self) -> Vec<Measurement> {
        let State::Probing(probing) = &self.session.state else {
            panic!("{:?}", self.session.state)
        };
        let measured = probing.asked.iter().zip(1..).map(|(provider, ms)| Measurement {
            provider: provider.id.clone(),
            latency: Some(Duration::from_millis(ms)),
            method: ProbeMethod::Echo,
        });
        measured.collect()
    }

    fn asked_provider(&self) -> crate::directory::Provider {
        self.session.state.provider().unwrap().clone()
    }

    /// Answers well until the state is reached.
    #[track_caller]
    fn lead_to(&mut self, state: StateName) {
        for _ in 0..20 {
            if self.session.state() == state {
                return;
            }
            let asked = self.asked;
            let input = match &self.session.state {
                State::Disconnected(_) => Input::Start(Choice::default()),
                State::Discovering(_) => Input::Listed(asked, Ok(directory(2))),
                State::Probing(_) => Input::Probed(asked, self.all_alive()),
                State::Authorizing(state::Authorizing {
                    step: state::Step::Approve(provider),
                    ..
                }) => Input::Approved(asked, Ok(approval(provider, self.now, HOUR))),
                State::Provisioning(provisioning) if provisioning.verified => {
                    Input::Provisioned(asked, Ok(approval(&provider(9), self.now, HOUR)))
                }
                State::Authorizing(_) | State::Provisioning(_) => Input::Verified(asked, paid(self.now, HOUR)),
                State::Connecting(_) => Input::HandshakeSeen(asked),
                State::Connected(_) if state == StateName::Disconnecting => Input::Stop,
                State::Connected(_) => {
                    self.second(100, 0);
                    continue;
                }
                State::Degraded(_) | State::Disconnecting(_) | State::Backoff(_) | State::Blocked(_) => {
                    panic!("{:?} leads nowhere", self.session.state)
                }
            };
            self.feed(input);
        }
        panic!("{state:?} is not reached, but {:?}", self.session.state);
    }

    fn policy(&self) -> &Policy {
        self.session.firewall().unwrap()
    }
}

/// A rig in a state, by its name in the table.
fn rig_in(name: &str) -> Rig {
    let mut fallback = config();
    fallback.fallback = true;
    let mut open = config();
    open.kill_switch = false;
    let missing = SessionConfig {
        not_configured: Some(failure(Retry::Never)),
        ..config()
    };
    let mut rig = match name {
        "not-configured" => Rig::new(missing),
        "refused" => Rig::new(open),
        "provisioning-verify" | "provisioning" | "authorizing-provisioned" => Rig::new(fallback),
        _ => Rig::new(config()),
    };
    match name {
        "not-wanted" | "not-configured" => {}
        "discovering" => rig.lead_to(StateName::Discovering),
        "probing" => rig.lead_to(StateName::Probing),
        "authorizing-verify" => rig.lead_to(StateName::Authorizing),
        "authorizing-approve" => {
            rig.lead_to(StateName::Authorizing);
            rig.feed(Input::Verified(rig.asked, paid(rig.now, HOUR)));
        }
        "provisioning-verify" | "provisioning" | "authorizing-provisioned" => {
            rig.start();
            rig.feed(Input::Listed(rig.asked, Err(failure(Retry::Backoff))));
            if name != "provisioning-verify" {
                rig.feed(Input::Verified(rig.asked, paid(rig.now, HOUR)));
            }
            if name == "authorizing-provisioned" {
                rig.lead_to(StateName::Authorizing);
            }
        }
        "connecting" => rig.lead_to(StateName::Connecting),
        "connected" => rig.lead_to(StateName::Connected),
        "asking" | "asking-again" | "renewing" => {
            rig.lead_to(StateName::Connected);
            rig.feed(Input::TokenChanged);
            rig.feed(Input::Verified(rig.asked, paid(rig.now, HOUR * 9)));
            assert!(rig.did(|a| matches!(a, Action::Approve(..))), "{:?}", rig.last);
            if name == "asking-again" {
                rig.feed(Input::Approved(rig.asked, Err(failure(Retry::Backoff))));
            }
            if name != "renewing" {
                return rig;
            }
            let fresh = approval(&rig.asked_provider(), rig.now, HOUR);
            rig.feed(Input::Approved(rig.asked, Ok(fresh)));
            assert!(rig.did(|a| matches!(a, Action::RenewTunnel(..))), "{:?}", rig.last);
        }
        "degraded" => rig.lead_to(StateName::Degraded),
        "disconnecting-stop" => rig.lead_to(StateName::Disconnecting),
        "disconnecting-next" => {
            rig.lead_to(StateName::Connecting);
            rig.feed(Input::TunnelConfigured(rig.asked, Err(failure(Retry::Now))));
        }
        "backoff" => {
            rig.start();
            rig.feed(Input::Listed(rig.asked, Err(failure(Retry::Backoff))));
        }
        "refused" | "blocked" => {
            rig.lead_to(StateName::Authorizing);
            rig.feed(Input::Verified(rig.asked, Verification::NotPaid(failure(Retry::Never))));
        }
        other => panic!("{other}"),
    }
    rig
}
