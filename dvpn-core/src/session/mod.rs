//! The session machine: the user's wish over many attempts.
//!
//! ```text
//!                    ┌────────────────────────── deadline, Start, NetworkChanged ────────────────────────┐
//!                    ▼                                                                                   │
//! Disconnected ─Start─► Discovering ─listed─► Probing ─chosen─► Authorizing ─approved─► Connecting       │
//!      ▲             │ no list                   │ ▲ none alive   │ ▲ next                │ │ ▲           │
//!      │             │                           │ └─ next sample │ └───────── no handshake │ │ fresh     │
//!      │             │   all failed, fallback on │                │           (tear down) ──┘ │ approval  │
//!      │             ├───────────────────────────┴────────────────┤                 handshake │           │
//!      │             ▼                                            │                         ▼ │           │
//!      │        Provisioning ─provider─► Authorizing(verify only) │      Connected ◄─5 s / rx─► Degraded  │
//!      │             │ failed                                     │            │ lost, Stop, unpaid │     │
//!      │             └───────────────► Backoff ◄──────────────────┘            ▼                    ▼     │
//!      │                                  │  ▲                              Disconnecting{then}           │
//!      │                                  └──┼─────────────────────────────────┼───────────────────────────┘
//!      └───────── Stop, torn down ───────────┴──────────── torn down ──────────┘
//!
//! any ─refused for good (unpaid, not configured)─► Blocked when traffic is to be blocked, else Disconnected
//! Blocked ─Start, paid, config or network change─► Discovering;  Blocked ─Stop─► Disconnected
//! ```
//!
//! Four verbs and no async: feed [`Session::handle_input`] and [`Session::handle_timeout`], carry out what
//! [`Session::poll_action`] gives in order, sleep until [`Session::poll_timeout`]. Every question carries an
//! [`Attempt`]; an answer with another number than the one awaited is dropped.
//!
//! An approval is renewed beside the running tunnel from half of its life on: verify, approve (asked again within seconds
//! when the answer is lost, for the pool may have acted on it), then the tunnel goes over to the fresh key while it stands
//! (`RenewTunnel`), and the state stays. Where the fresh approval gives other addresses, or the hand-over fails again and
//! again, the same provider is connected anew under it (`Connected → Disconnecting → Connecting`). While no fresh approval
//! is to be had the tunnel stays until the old one's end. A provider that the
//! orchestrator made is not the pool's to approve: whoever drives the session renews its lease and says so
//! ([`Input::LeaseExtended`]), and returns it once [`Session::lease`] names it no more.

mod busy;
#[cfg(test)]
pub(crate) mod fixtures;
mod idle;
mod io;
mod liveness;
mod renewal;
mod standing;
mod state;
mod steps;
#[cfg(test)]
mod tests;
mod trust;

use std::{
    collections::VecDeque,
    mem,
    net::SocketAddr,
    time::{Duration, Instant},
};

use dvpn_common::status::{CandidateStatus, PaymentStatus, Problem, StateName};
use jiff::Timestamp;
use rand::{SeedableRng as _, rngs::StdRng};

pub use io::{Action, Attempt, Choice, Input, Measurement, Release, Restored, SessionConfig, Traffic};
use state::{Idle, Renewal, State};

use crate::{
    Failure, Now,
    approval::Lease,
    audit::Event,
    directory::Directory,
    firewall::{self, Policy},
    payment::Subscription,
};

/// The provider id that stands in a verify request when no provider is known yet.
pub const FALLBACK_ID: &str = "fallback";

/// Wall-clock deadlines are looked at this often, because that clock can be set.
const WALL_CLOCK_CHECK: Duration = Duration::from_hours(1);

/// The session machine.
pub struct Session {
    config: SessionConfig,
    rng: StdRng,
    state: State,
    since: Timestamp,
    now: Now,
    /// What the user asked for; nothing while no session is wanted.
    wanted: Option<Choice>,
    last_attempt: u64,
    attempts: u64,
    switches: u64,
    /// Attempts failed in a row.
    failures: u32,
    directory: Option<(Directory, Timestamp)>,
    last_endpoint: Option<SocketAddr>,
    last_provider: Option<dvpn_common::ids::ProviderId>,
    subscription: Option<Subscription>,
    payment: PaymentStatus,
    problem: Option<Failure>,
    candidates: Vec<CandidateStatus>,
    /// What the firewall was last told to be; nothing before it was told anything.
    policy: Option<Policy>,
    /// It could not be made so: what it is, nobody knows.
    firewall_unknown: bool,
    /// What the firewall was before us is left alone until somebody acts.
    adopting: bool,
    out: Vec<Action>,
    actions: VecDeque<Action>,
}

/// What the machine says of itself.
#[derive(Debug, Clone, PartialEq)]
pub struct SessionStatus {
    /// Where it is.
    pub state: StateName,
    /// Since when.
    pub since: Timestamp,
    /// Whether a session is wanted.
    pub wanted: bool,
    /// Whom it uses or asks for.
    pub provider: Option<CandidateStatus>,
    /// Everything measured in the last attempt.
    pub candidates: Vec<CandidateStatus>,
    /// What is known of the payment.
    pub payment: PaymentStatus,
    /// When the verified subscription ends.
    pub paid_until: Option<Timestamp>,
    /// What went wrong last.
    pub problem: Option<Problem>,
    /// True when the firewall could not be made to block: traffic may leak.
    pub leaking: bool,
    /// Attempts so far.
    pub attempts: u64,
    /// Changes of provider without being told to.
    pub switches: u64,
    /// Totals of the standing tunnel.
    pub traffic: Traffic,
    /// When the next attempt begins, in Backoff.
    pub next_attempt: Option<Instant>,
}

impl Session {
    /// A session at rest, or at its first attempt if the wish was stored. Carry out the actions at once: under a kill
    /// switch or lockdown the first is the firewall. Without a wish the firewall stays as it was found.
    ///
    /// `seed` comes from the operating system's generator.
    pub fn new(config: SessionConfig, seed: [u8; 32], restored: Restored, now: Now) -> Self {
        let mut session = Self {
            config,
            rng: StdRng::from_seed(seed),
            state: State::Disconnected(Idle::NotWanted),
            since: now.wall,
            now,
            wanted: restored.wish.then(Choice::default),
            last_attempt: 0,
            attempts: 0,
            switches: 0,
            failures: 0,
            directory: None,
            last_endpoint: restored.last_endpoint,
            last_provider: None,
            subscription: restored.subscription,
            payment: PaymentStatus::Unknown,
            problem: None,
            candidates: Vec::new(),
            policy: None,
            firewall_unknown: false,
            adopting: !restored.wish,
            out: Vec::new(),
            actions: VecDeque::new(),
        };
        if session
            .subscription
            .is_some_and(|subscription| subscription.is_valid(now.wall))
        {
            session.payment = PaymentStatus::Paid;
        }
        let first = if restored.wish { session.begin() } else { session.rest() };
        session.settle(StateName::Disconnected, first);
        session
    }

    /// Takes in what happened.
    pub fn handle_input(&mut self, input: Input, now: Now) {
        self.now = now;
        let state = mem::replace(&mut self.state, State::Disconnected(Idle::NotWanted));
        let from = state.name();
        let next = match state {
            State::Disconnected(idle) => self.in_disconnected(idle, input),
            State::Discovering(question) => self.in_discovering(question, input),
            State::Probing(probing) => self.in_probing(probing, input),
            State::Authorizing(authorizing) => self.in_authorizing(authorizing, input),
            State::Provisioning(provisioning) => self.in_provisioning(provisioning, input),
            State::Connecting(connecting) => self.in_connecting(connecting, input),
            State::Connected(tunnel) | State::Degraded(tunnel) => self.in_tunnel(tunnel, input),
            State::Disconnecting(disconnecting) => self.in_disconnecting(disconnecting, input),
            State::Backoff(backoff) => self.in_backoff(backoff, input),
            State::Blocked(blocked) => self.in_blocked(blocked, input),
        };
        self.settle(from, next);
    }

    /// Acts on what is due. Calling it early or twice does nothing.
    pub fn handle_timeout(&mut self, now: Now) {
        self.now = now;
        let state = mem::replace(&mut self.state, State::Disconnected(Idle::NotWanted));
        let from = state.name();
        let next = self.on_timeout(state);
        self.settle(from, next);
    }

    /// The next thing to do, in order; nothing when all is done.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// When to call [`Self::handle_timeout`], and what for.
    pub fn poll_timeout(&self) -> Option<(Instant, &'static str)> {
        match &self.state {
            State::Disconnected(_) | State::Blocked(_) => None,
            State::Discovering(question) => Some((question.deadline, "no provider list")),
            State::Probing(probing) => Some((probing.question.deadline, "no probe results")),
            State::Authorizing(authorizing) => Some((authorizing.question.deadline, "no authorization")),
            State::Provisioning(provisioning) => Some((provisioning.question.deadline, "no fallback provider")),
            State::Connecting(connecting) => Some((connecting.question.deadline, "no handshake")),
            State::Disconnecting(disconnecting) => Some((disconnecting.question.deadline, "tunnel still up")),
            State::Backoff(backoff) => Some((backoff.until, "next attempt")),
            State::Connected(tunnel) | State::Degraded(tunnel) => {
                let renewal = match &tunnel.renewal {
                    Renewal::Waiting(at) => (self.instant_of(*at), "renew the approval"),
                    Renewal::Verifying(question) => (question.deadline, "no renewed approval"),
                    Renewal::Approving(asking) if asking.pausing => {
                        (asking.question.deadline, "ask for the renewed approval again")
                    }
                    Renewal::Approving(asking) => (asking.question.deadline, "no renewed approval"),
                    Renewal::HandingOver(hand_over) => (hand_over.question.deadline, "hand-over of the tunnel"),
                };
                let traffic = (tunnel.liveness.assess_at(), "no traffic sample");
                let end = (self.instant_of(tunnel.approval.expires_at()), "end of the approval");
                [renewal, traffic, end].into_iter().min_by_key(|(at, _)| *at)
            }
        }
    }

    /// Where the session is.
    pub fn state(&self) -> StateName {
        self.state.name()
    }

    /// The lease in use, which somebody has to renew and, once this is another or none, to return; and the number that
    /// its `LeaseExtended` carries.
    pub fn lease(&self) -> Option<(Attempt, &Lease)> {
        self.state.lease()
    }

    /// What the firewall should be now, to be asserted again after somebody else changed it. Nothing before the first
    /// `SetFirewall`: what was found is left as it is.
    pub fn firewall(&self) -> Option<&Policy> {
        self.policy.as_ref()
    }

    /// The keys that a pool holds for the standing tunnel: for an end that does not wait for the machine.
    pub fn held(&self) -> Vec<Release> {
        match &self.state {
            State::Connecting(connecting) => Release::of(&connecting.approval).into_iter().collect(),
            State::Connected(tunnel) | State::Degraded(tunnel) => tunnel.held(),
            State::Disconnecting(disconnecting) => disconnecting.release.clone(),
            State::Disconnected(_)
            | State::Discovering(_)
            | State::Probing(_)
            | State::Authorizing(_)
            | State::Provisioning(_)
            | State::Backoff(_)
            | State::Blocked(_) => Vec::new(),
        }
    }

    /// Everything worth showing.
    pub fn status(&self) -> SessionStatus {
        let traffic = match &self.state {
            State::Connected(tunnel) | State::Degraded(tunnel) => tunnel.liveness.totals(),
            State::Disconnected(_)
            | State::Discovering(_)
            | State::Probing(_)
            | State::Authorizing(_)
            | State::Provisioning(_)
            | State::Connecting(_)
            | State::Disconnecting(_)
            | State::Backoff(_)
            | State::Blocked(_) => Traffic::default(),
        };
        let (next_attempt, leaking) = match &self.state {
            State::Backoff(backoff) => (Some(backoff.until), false),
            State::Blocked(blocked) => (None, blocked.leaking),
            State::Disconnected(_)
            | State::Discovering(_)
            | State::Probing(_)
            | State::Authorizing(_)
            | State::Provisioning(_)
            | State::Connecting(_)
            | State::Connected(_)
            | State::Degraded(_)
            | State::Disconnecting(_) => (None, false),
        };
        SessionStatus {
            state: self.state.name(),
            since: self.since,
            wanted: self.wanted.is_some(),
            provider: self.state.provider().map(|provider| self.candidate(provider)),
            candidates: self.candidates.clone(),
            payment: self.payment,
            paid_until: self.subscription.map(|subscription| subscription.valid_until()),
            problem: self.problem.as_ref().map(|f| Problem {
                what: f.what.clone(),
                how: f.how.clone(),
            }),
            leaking,
            attempts: self.attempts,
            switches: self.switches,
            traffic,
            next_attempt,
        }
    }

    /// Makes `next` the state. The firewall comes before everything that the new state does.
    fn settle(&mut self, from: StateName, next: State) {
        self.state = next;
        let to = self.state.name();
        if from != to {
            self.since = self.now.wall;
            self.actions.push_back(Action::Audit(Event::StateChanged { from, to }));
        }
        let policy = firewall::policy(self.state.phase(), self.config.kill_switch, self.config.lockdown);
        let adopted = self.adopting && policy == Policy::Open;
        if !adopted && self.policy.as_ref() != Some(&policy) {
            self.actions
                .push_back(Action::Audit(Event::FirewallChanged { policy: policy.clone() }));
            self.actions.push_back(Action::SetFirewall(policy.clone()));
            self.policy = Some(policy);
            self.firewall_unknown = false;
            self.adopting = false;
        }
        self.actions.extend(self.out.drain(..));
    }

    /// When the wall clock will show `at`, as far as it is known, and at most [`WALL_CLOCK_CHECK`] from now.
    fn instant_of(&self, at: Timestamp) -> Instant {
        let left = Duration::try_from(at.duration_since(self.now.wall)).unwrap_or_default();
        self.now.instant + left.min(WALL_CLOCK_CHECK)
    }
}
