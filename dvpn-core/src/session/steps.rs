//! How each state is entered: what is asked, until when, and what is recorded. Every function returns the state that
//! is true afterwards.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use dvpn_common::status::{CandidateStatus, PaymentStatus};
use jiff::SignedDuration;
use rand::RngExt as _;

use super::{
    Action, Attempt, Choice, FALLBACK_ID, Measurement, Release, Session, SessionConfig,
    liveness::Liveness,
    state::{
        Authorizing, Backoff, Blocked, Connecting, Disconnecting, Idle, Probing, Provisioning, Question, Run, State,
        Step, Then, Tunnel,
    },
};
use crate::{
    Failure, Retry,
    approval::Approval,
    audit::Event,
    directory::{Directory, Provider},
    payment::Subscription,
    selection,
};

/// The pool and payment clients give up earlier by themselves; this guards against an answer that never comes.
pub(super) const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
pub(super) const PROBE_TIMEOUT: Duration = Duration::from_secs(5);
pub(super) const CONFIGURE_TIMEOUT: Duration = Duration::from_secs(10);
pub(super) const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// A tear-down that is not confirmed by then is asked for again.
pub(super) const TEAR_DOWN_TIMEOUT: Duration = Duration::from_secs(10);
/// The script is killed at its own deadline; its answer may take this much longer.
const FALLBACK_GRACE: Duration = Duration::from_secs(10);
const DIRECTORY_GOOD_FOR: SignedDuration = SignedDuration::from_hours(24);
/// Samples in one attempt: a bound for the day when the whole list is dead.
const MAX_ROUNDS: u32 = 8;
const BACKOFF_FIRST: Duration = Duration::from_secs(1);
const BACKOFF_MAX: Duration = Duration::from_mins(1);
/// A tunnel that stood this long wipes out the failures before it.
pub(super) const GOOD_CONNECTION: Duration = Duration::from_secs(30);

impl Session {
    /// The next number.
    pub(super) fn fresh(&mut self) -> Attempt {
        self.last_attempt += 1;
        Attempt(self.last_attempt)
    }

    pub(super) fn within(&self, attempt: Attempt, timeout: Duration) -> Question {
        Question {
            attempt,
            deadline: self.now.instant + timeout,
        }
    }

    pub(super) fn is_over(&self, deadline: Instant) -> bool {
        self.now.instant >= deadline
    }

    /// Whether traffic outside the tunnel is to be blocked while a session is wanted.
    pub(super) fn blocks(&self) -> bool {
        self.config.kill_switch || self.config.lockdown
    }

    pub(super) fn audit(&mut self, event: Event) {
        self.out.push(Action::Audit(event));
    }

    /// The state of a session that nobody wants.
    pub(super) fn rest(&mut self) -> State {
        self.problem = self.config.not_configured.clone();
        State::Disconnected(if self.problem.is_some() {
            Idle::NotConfigured
        } else {
            Idle::NotWanted
        })
    }

    /// A new attempt, unless something is missing.
    pub(super) fn begin(&mut self) -> State {
        self.retry_firewall();
        match self.config.not_configured.clone() {
            Some(missing) if self.blocks() => {
                self.problem = Some(missing);
                State::Blocked(Blocked { leaking: false })
            }
            Some(missing) => {
                self.problem = Some(missing);
                State::Disconnected(Idle::NotConfigured)
            }
            None => self.discover(),
        }
    }

    fn discover(&mut self) -> State {
        self.attempts += 1;
        let attempt = self.fresh();
        self.out.push(Action::Discover(attempt));
        State::Discovering(self.within(attempt, ANSWER_TIMEOUT))
    }

    /// Ends a question nobody will wait for, then begins anew.
    pub(super) fn restart(&mut self, attempt: Attempt) -> State {
        self.out.push(Action::Cancel(attempt));
        self.begin()
    }

    /// Stop, where no tunnel stands.
    pub(super) fn stop_now(&mut self, open_question: Option<Attempt>) -> State {
        self.forget_wish();
        if let Some(attempt) = open_question {
            self.out.push(Action::Cancel(attempt));
        }
        self.rest()
    }

    pub(super) fn forget_wish(&mut self) {
        self.wanted = None;
        self.retry_firewall();
        self.adopting = false;
        self.last_provider = None;
        self.failures = 0;
        self.out.push(Action::StoreWish(false));
    }

    /// A firewall that could not be changed is told again when somebody or something acts.
    fn retry_firewall(&mut self) {
        if std::mem::take(&mut self.firewall_unknown) {
            self.policy = None;
        }
    }

    /// Takes a Start. True if it asks for something else than what is under way.
    pub(super) fn wish(&mut self, choice: Choice) -> bool {
        let changed = self.wanted.as_ref() != Some(&choice);
        if self.wanted.is_none() {
            self.out.push(Action::StoreWish(true));
            self.adopting = false;
        }
        self.wanted = Some(choice);
        changed
    }

    /// Takes a configuration. What was fetched under the old one is not used any more.
    pub(super) fn configure(&mut self, config: SessionConfig) {
        self.config = config;
        self.directory = None;
    }

    /// The token is another one: what is known of the old one says nothing.
    pub(super) fn forget_subscription(&mut self) {
        self.subscription = None;
        self.payment = PaymentStatus::Unknown;
        self.out.push(Action::StoreSubscription(None));
    }

    /// Whether both the standing choice and this session's allow a provider.
    pub(super) fn allows(&self, provider: &Provider) -> bool {
        self.config.choice.allows(provider) && self.wanted.as_ref().is_none_or(|choice| choice.allows(provider))
    }

    pub(super) fn listed(&mut self, answer: Result<Directory, Failure>) -> State {
        match answer {
            Ok(directory) => {
                self.audit(Event::ListAccepted {
                    providers: directory.providers.len(),
                    version: directory.version,
                });
                self.directory = Some((directory, self.now.wall));
                self.choose()
            }
            Err(failure) => {
                self.audit(Event::ListRefused {
                    reason: failure.to_string(),
                });
                if self.directory_is_good() {
                    self.problem = Some(failure);
                    return self.choose();
                }
                self.directory = None;
                self.give_up(failure, false)
            }
        }
    }

    fn directory_is_good(&self) -> bool {
        self.directory.as_ref().is_some_and(|(directory, fetched_at)| {
            let age = self.now.wall.duration_since(*fetched_at);
            // A clock that was set back hides the age; the list is then not good.
            (SignedDuration::ZERO..=DIRECTORY_GOOD_FOR).contains(&age)
                && directory.expires_at.is_none_or(|end| self.now.wall < end)
        })
    }

    fn choose(&mut self) -> State {
        let choice = self.wanted.clone().unwrap_or_default();
        let providers = self
            .directory
            .as_ref()
            .map_or(&[][..], |(directory, _)| &directory.providers);
        let order = selection::order(
            providers,
            [&self.config.choice, &choice],
            self.last_endpoint,
            &mut self.rng,
        );
        if order.is_empty() {
            let offered = providers.len();
            let nobody = Failure {
                what: format!("none of the pool's {offered} providers is allowed by the choice"),
                how: "widen PROVIDERS_ONLY, PROVIDERS_EXCLUDE, or what Choose was given".into(),
                retry: Retry::Backoff,
            };
            return self.give_up(nobody, false);
        }
        self.candidates.clear();
        self.probe(order, 1)
    }

    fn probe(&mut self, mut rest: VecDeque<Provider>, rounds: u32) -> State {
        let asked = selection::sample(&mut rest, self.config.sample_size);
        let attempt = self.fresh();
        self.out.push(Action::Probe(attempt, asked.clone()));
        State::Probing(Probing {
            question: self.within(attempt, PROBE_TIMEOUT),
            asked,
            rest,
            rounds,
        })
    }

    pub(super) fn probed(&mut self, probing: Probing, measurements: &[Measurement]) -> State {
        let Probing {
            asked, rest, rounds, ..
        } = probing;
        for provider in &asked {
            let measured = measurements.iter().find(|m| m.provider == provider.id);
            self.candidates.push(CandidateStatus {
                id: provider.id.clone(),
                region: provider.region.clone(),
                latency_ms: measured
                    .and_then(|m| m.latency)
                    .map(|latency| latency.as_secs_f64() * 1e3),
                method: measured.map(|m| m.method),
            });
        }
        let untried = selection::rank(&asked, measurements);
        if !untried.is_empty() {
            let nobody = Failure {
                what: String::new(),
                how: String::new(),
                retry: Retry::Now,
            };
            return self.next_candidate(
                Run {
                    untried,
                    provisioned: false,
                },
                nobody,
            );
        }
        if !rest.is_empty() && rounds < MAX_ROUNDS {
            return self.probe(rest, rounds + 1);
        }
        let failure = Failure {
            what: format!("none of {} measured providers answered", self.candidates.len()),
            how: "check that UDP passes on this network".into(),
            retry: Retry::Backoff,
        };
        self.give_up(failure, false)
    }

    /// Goes to the next candidate of the attempt; `failure` is why the last one was left.
    pub(super) fn next_candidate(&mut self, mut run: Run, failure: Failure) -> State {
        let Some(provider) = run.untried.pop_front() else {
            return self.give_up(failure, run.provisioned);
        };
        let CandidateStatus { latency_ms, method, .. } = self.candidate(&provider);
        self.audit(Event::ProviderChosen {
            provider: provider.id.clone(),
            latency_ms,
            method,
        });
        let attempt = self.fresh();
        self.out.push(Action::Verify(attempt, provider.id.clone()));
        let question = self.within(attempt, ANSWER_TIMEOUT);
        State::Authorizing(Authorizing {
            question,
            step: Step::Verify(provider),
            run,
        })
    }

    pub(super) fn candidate(&self, provider: &Provider) -> CandidateStatus {
        let measured = self.candidates.iter().find(|candidate| candidate.id == provider.id);
        measured.cloned().unwrap_or_else(|| CandidateStatus {
            id: provider.id.clone(),
            region: provider.region.clone(),
            latency_ms: None,
            method: None,
        })
    }

    /// An attempt that led to nothing: the orchestrator if it may help, else refusal or a pause.
    pub(super) fn give_up(&mut self, failure: Failure, provisioned: bool) -> State {
        // A choice that names providers is not answered with one the orchestrator made.
        let narrow = self.config.choice.is_narrow() || self.wanted.as_ref().is_some_and(Choice::is_narrow);
        if self.config.fallback && !provisioned && !narrow {
            self.problem = Some(failure);
            return self.provision();
        }
        match failure.retry {
            Retry::Never => self.refuse(failure),
            Retry::Now | Retry::Backoff => self.back_off(failure),
        }
    }

    fn provision(&mut self) -> State {
        let attempt = self.fresh();
        match FALLBACK_ID.parse() {
            Ok(id) => self.out.push(Action::Verify(attempt, id)),
            // FALLBACK_ID reads as an id (a test says so).
            Err(_never) => {
                return State::Backoff(Backoff {
                    until: self.now.instant + BACKOFF_MAX,
                });
            }
        }
        let question = self.within(attempt, ANSWER_TIMEOUT);
        State::Provisioning(Provisioning {
            question,
            verified: false,
        })
    }

    pub(super) fn ask_orchestrator(&mut self, attempt: Attempt, subscription: Subscription) -> State {
        self.out.push(Action::Provision(attempt, subscription));
        let question = self.within(attempt, self.config.fallback_timeout + FALLBACK_GRACE);
        State::Provisioning(Provisioning {
            question,
            verified: true,
        })
    }

    pub(super) fn connect(&mut self, attempt: Attempt, approval: Box<Approval>, run: Run) -> State {
        self.out.push(Action::ConfigureTunnel(attempt, approval.clone()));
        State::Connecting(Connecting {
            question: self.within(attempt, CONFIGURE_TIMEOUT),
            approval,
            run,
        })
    }

    /// The tunnel has shaken hands.
    pub(super) fn stand(&mut self, attempt: Attempt, approval: Box<Approval>) -> State {
        let provider = approval.provider();
        let (id, endpoint) = (provider.id.clone(), provider.endpoint);
        if self.last_provider.as_ref().is_some_and(|last| *last != id) {
            self.switches += 1;
        }
        self.last_provider = Some(id.clone());
        self.last_endpoint = Some(endpoint);
        self.problem = None;
        self.out.push(Action::StoreLastEndpoint(endpoint));
        self.audit(Event::TunnelUp { provider: id, endpoint });
        let renewal = self.renew_later(&approval);
        let liveness = Liveness::new(self.now.instant);
        State::Connected(Tunnel {
            attempt,
            approval,
            since: self.now.instant,
            liveness,
            renewal,
        })
    }

    /// Takes a tunnel down that has not shaken hands yet.
    pub(super) fn abandon(&mut self, attempt: Attempt, approval: &Approval, then: Then) -> State {
        self.tear_down(attempt, Release::of(approval).into_iter().collect(), then)
    }

    fn tear_down(&mut self, attempt: Attempt, release: Vec<Release>, then: Then) -> State {
        self.out.push(Action::TearDown(attempt));
        State::Disconnecting(Disconnecting {
            question: self.within(attempt, TEAR_DOWN_TIMEOUT),
            then,
            release,
        })
    }

    /// Takes a tunnel down that stood.
    pub(super) fn end(&mut self, tunnel: &Tunnel, reason: &str, then: Then) -> State {
        self.cancel_renewal(tunnel);
        let provider = tunnel.approval.provider().id.clone();
        self.audit(Event::TunnelDown {
            provider,
            reason: reason.to_owned(),
        });
        self.tear_down(tunnel.attempt, tunnel.held(), then)
    }

    pub(super) fn back_off(&mut self, failure: Failure) -> State {
        self.problem = Some(failure);
        self.pause()
    }

    /// Twice as long as the last time, and of that at least half, at random, so that clients do not come in step.
    pub(super) fn pause(&mut self) -> State {
        self.failures = self.failures.saturating_add(1);
        let doubled = BACKOFF_FIRST.saturating_mul(1_u32.checked_shl(self.failures.min(16)).unwrap_or(u32::MAX));
        let longest = doubled.min(BACKOFF_MAX);
        let pause = longest.mul_f64(self.rng.random_range(0.5..=1.0));
        State::Backoff(Backoff {
            until: self.now.instant + pause,
        })
    }

    /// Nothing helps until somebody acts.
    pub(super) fn refuse(&mut self, failure: Failure) -> State {
        self.problem = Some(failure);
        if self.blocks() {
            State::Blocked(Blocked { leaking: false })
        } else {
            State::Disconnected(Idle::Refused)
        }
    }

    /// The firewall does not block: with nothing of ours running, at least no session pretends that it does.
    pub(super) fn refuse_unblocked(&mut self, failure: Failure) -> State {
        self.problem = Some(failure);
        State::Blocked(Blocked { leaking: true })
    }
}
