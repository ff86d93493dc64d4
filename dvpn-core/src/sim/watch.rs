//! What must hold whatever happens, checked from outside: only what goes into the machine and what comes out of it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    time::{Duration, Instant},
};

use dvpn_common::{keys::PublicKey, status::StateName};

use crate::{
    Now, Retry,
    approval::Approval,
    directory::Provider,
    firewall::{Exemptions, Policy, ProbeTarget},
    payment::{Subscription, Verification},
    session::{Action, Attempt, Input, Restored, Session, SessionConfig},
};

/// More actions than this for one input is a storm.
const MAX_ACTIONS: usize = 14;
/// An idle tunnel is probed every 20 s, is degraded 5 s later and is looked at once a second.
const LONGEST_SILENCE: Duration = Duration::from_secs(27);

/// The pool's answer to a renewal counts as lost this often before it is left alone for long.
const RENEWAL_TRIES: u32 = 5;
/// And is asked again within this.
const ASKED_AGAIN: Duration = Duration::from_secs(8);

/// An invariant that does not hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Broken(pub String);

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

macro_rules! hold {
    ($condition:expr, $($text:tt)+) => {
        if !$condition {
            return Err(Broken(format!($($text)+)));
        }
    };
}

/// Looks at one session from its beginning on.
#[derive(Debug)]
pub struct Watch {
    config: SessionConfig,
    wanted: bool,
    /// Somebody has acted, so the firewall is ours.
    acted: bool,
    policy: Option<Policy>,
    /// It may be told the same again.
    firewall_failed: bool,
    /// Questions whose answers are awaited.
    open: BTreeSet<(Attempt, Kind)>,
    highest: u64,
    asked: BTreeMap<Attempt, Provider>,
    provisions: BTreeSet<Attempt>,
    approvals: BTreeMap<Attempt, Box<Approval>>,
    subscriptions: Vec<Subscription>,
    /// The tunnel that was configured and not reported gone.
    tunnel: Option<Attempt>,
    /// The key it uses.
    key: Option<PublicKey>,
    /// Keys that a pool admitted for tunnels, and that were not released.
    held: BTreeSet<PublicKey>,
    last_rx: Option<(Now, u64)>,
    /// How often the renewal under way was asked for.
    renewal_tries: u32,
    /// Since when it is to be asked for again.
    unanswered: Option<Instant>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Listed,
    Probed,
    Verified,
    Approved,
    Provisioned,
    Configured,
    Renewed,
    TornDown,
}

impl Watch {
    /// Begins with what the session begins with.
    pub fn new(config: &SessionConfig, restored: &Restored) -> Self {
        Self {
            config: config.clone(),
            wanted: restored.wish,
            acted: restored.wish,
            policy: None,
            firewall_failed: false,
            open: BTreeSet::new(),
            highest: 0,
            asked: BTreeMap::new(),
            provisions: BTreeSet::new(),
            approvals: BTreeMap::new(),
            subscriptions: restored.subscription.into_iter().collect(),
            tunnel: None,
            key: None,
            held: BTreeSet::new(),
            last_rx: None,
            renewal_tries: 0,
            unanswered: None,
        }
    }

    /// Feeds an input, gives back the actions, checks everything.
    pub fn feed(&mut self, session: &mut Session, input: Input, now: Now) -> Result<Vec<Action>, Broken> {
        let name = name_of(&input);
        let awaited = self.take_in(&input, now);
        let before = (!awaited).then(|| session.status());
        session.handle_input(input, now);
        let actions = drain(session);
        if let Some(before) = before {
            hold!(actions.is_empty(), "{name} was not awaited and led to {actions:?}");
            hold!(
                session.status() == before,
                "{name} was not awaited and changed the status"
            );
        }
        self.check(session, &actions, now)
            .map_err(|Broken(text)| Broken(format!("after {name}: {text}")))?;
        Ok(actions)
    }

    /// Lets a timeout pass, gives back the actions, checks everything.
    pub fn expire(&mut self, session: &mut Session, now: Now) -> Result<Vec<Action>, Broken> {
        let due = session.poll_timeout().map_or("nothing due", |(_, reason)| reason);
        session.handle_timeout(now);
        let actions = drain(session);
        if let Some((next, reason)) = session.poll_timeout() {
            hold!(
                next > now.instant,
                "the deadline of {reason:?} stays due after it was handled"
            );
        }
        self.check(session, &actions, now)
            .map_err(|Broken(text)| Broken(format!("after {due:?}: {text}")))?;
        Ok(actions)
    }

    /// The first actions of a session that was just made.
    pub fn begin(&mut self, session: &mut Session, now: Now) -> Result<Vec<Action>, Broken> {
        let actions = drain(session);
        self.check(session, &actions, now)?;
        Ok(actions)
    }

    /// Takes note of an input. False if it answers nothing that is asked.
    fn take_in(&mut self, input: &Input, now: Now) -> bool {
        match input {
            Input::Start(_) => {
                self.wanted = true;
                self.acted = true;
                true
            }
            Input::Stop => {
                self.wanted = false;
                self.acted = true;
                true
            }
            Input::ConfigChanged(config) => {
                self.config = (**config).clone();
                true
            }
            Input::TokenChanged => {
                self.subscriptions.clear();
                self.unanswered = None;
                true
            }
            Input::NetworkChanged => true,
            Input::FirewallFailed(_) => {
                self.firewall_failed = true;
                true
            }
            Input::Listed(attempt, _) => self.open.remove(&(*attempt, Kind::Listed)),
            Input::Probed(attempt, _) => self.open.remove(&(*attempt, Kind::Probed)),
            Input::Verified(attempt, verification) => {
                let awaited = self.open.remove(&(*attempt, Kind::Verified));
                match verification {
                    Verification::Paid(subscription) if awaited => self.subscriptions.push(*subscription),
                    Verification::NotPaid(_) if awaited => self.subscriptions.clear(),
                    Verification::Paid(_) | Verification::NotPaid(_) | Verification::CannotTell(_) => {}
                }
                awaited
            }
            Input::Approved(attempt, answer) => {
                let awaited = self.open.remove(&(*attempt, Kind::Approved));
                match answer {
                    Ok(approval) if awaited => {
                        self.approvals.insert(*attempt, approval.clone());
                    }
                    // The pool may have acted, and takes the old key off soon.
                    Err(failure) if awaited && self.tunnel.is_some() => {
                        let again = failure.retry != Retry::Never && self.renewal_tries < RENEWAL_TRIES;
                        self.unanswered = again.then_some(now.instant);
                    }
                    Ok(_) | Err(_) => {}
                }
                awaited
            }
            Input::Provisioned(attempt, answer) => {
                let awaited = self.open.remove(&(*attempt, Kind::Provisioned));
                if let (true, Ok(approval)) = (awaited, answer) {
                    self.approvals.insert(*attempt, approval.clone());
                }
                awaited
            }
            Input::LeaseExtended(attempt, until) => {
                let given = self.approvals.get_mut(attempt);
                match (given, self.subscriptions.last()) {
                    // Refused or not: the machine is held against what the approval itself allows.
                    (Some(approval), Some(subscription)) => {
                        drop(approval.extend_lease(subscription, *until, now.wall));
                        true
                    }
                    (Some(_), None) | (None, _) => false,
                }
            }
            Input::TunnelConfigured(attempt, _) => self.open.remove(&(*attempt, Kind::Configured)),
            Input::TunnelRenewed(attempt, answer) => {
                let awaited = self.open.remove(&(*attempt, Kind::Renewed));
                if awaited && answer.is_ok() {
                    self.key = self.approvals.get(attempt).map(|approval| *approval.client_key());
                }
                awaited
            }
            Input::TornDown(attempt) => {
                let awaited = self.open.remove(&(*attempt, Kind::TornDown));
                if awaited {
                    self.tunnel = None;
                    self.key = None;
                    self.open.retain(|(_, kind)| *kind != Kind::Renewed);
                }
                awaited
            }
            Input::HandshakeSeen(attempt) => {
                if self.tunnel == Some(*attempt) && self.last_rx.is_none() {
                    self.last_rx = Some((now, 0));
                }
                self.tunnel == Some(*attempt)
            }
            Input::TrafficSampled(attempt, traffic) => {
                if self.tunnel == Some(*attempt) && self.last_rx.is_some_and(|(_, rx)| traffic.rx_bytes > rx) {
                    self.last_rx = Some((now, traffic.rx_bytes));
                }
                self.tunnel == Some(*attempt)
            }
            Input::TunnelLost(attempt, _) => self.tunnel == Some(*attempt),
        }
    }

    fn check(&mut self, session: &Session, actions: &[Action], now: Now) -> Result<(), Broken> {
        hold!(
            actions.len() <= MAX_ACTIONS,
            "a storm of {} actions: {actions:?}",
            actions.len()
        );
        for action in actions {
            self.check_action(action, now)?;
        }
        self.check_firewall(session.state())?;
        match session.state() {
            StateName::Disconnected => {
                hold!(
                    !self.wanted || !(self.config.kill_switch || self.config.lockdown),
                    "disconnected, so open, though a session is wanted and has to block"
                );
            }
            StateName::Connecting | StateName::Degraded => {
                hold!(self.tunnel.is_some(), "no tunnel in {:?}", session.state());
            }
            StateName::Connected => {
                hold!(self.tunnel.is_some(), "connected without a tunnel");
                let silence = self
                    .last_rx
                    .map(|(at, _)| now.instant.saturating_duration_since(at.instant));
                hold!(
                    silence.is_some_and(|s| s <= LONGEST_SILENCE),
                    "connected, and nothing received for {silence:?}"
                );
            }
            StateName::Discovering
            | StateName::Probing
            | StateName::Authorizing
            | StateName::Provisioning
            | StateName::Backoff
            | StateName::Blocked => hold!(self.tunnel.is_none(), "a tunnel stands in {:?}", session.state()),
            StateName::Disconnecting => {}
        }
        hold!(
            self.unanswered
                .is_none_or(|since| now.instant.saturating_duration_since(since) <= ASKED_AGAIN),
            "a renewal whose answer is lost is not asked for again"
        );
        hold!(
            self.tunnel.is_some() || self.held.is_empty(),
            "no tunnel, and keys that were not released"
        );
        Ok(())
    }

    fn number(&mut self, attempt: Attempt, fresh: bool) -> Result<(), Broken> {
        let grows = if fresh {
            attempt.0 > self.highest
        } else {
            attempt.0 >= self.highest
        };
        hold!(grows, "number {} after {}", attempt.0, self.highest);
        hold!(self.wanted, "something is asked though no session is wanted");
        self.highest = attempt.0;
        Ok(())
    }

    fn is_paid(&self, subscription: &Subscription, now: Now) -> bool {
        subscription.is_valid(now.wall) && self.subscriptions.contains(subscription)
    }

    fn exemptions(&self) -> Option<&Exemptions> {
        match &self.policy {
            Some(Policy::Blocked(exemptions)) => Some(exemptions),
            Some(Policy::Open) | None => None,
        }
    }

    fn check_action(&mut self, action: &Action, now: Now) -> Result<(), Broken> {
        match action {
            Action::Discover(attempt) => {
                self.number(*attempt, true)?;
                self.open.insert((*attempt, Kind::Listed));
            }
            Action::Probe(attempt, providers) => {
                self.number(*attempt, true)?;
                if let Some(exemptions) = self.exemptions() {
                    let targets: Vec<_> = providers.iter().map(ProbeTarget::of).collect();
                    hold!(
                        exemptions.probes == targets,
                        "probes before the firewall lets them pass"
                    );
                }
                self.open.insert((*attempt, Kind::Probed));
            }
            Action::Verify(attempt, _) => {
                self.number(*attempt, false)?;
                (self.renewal_tries, self.unanswered) = (0, None);
                self.open.insert((*attempt, Kind::Verified));
            }
            Action::Approve(attempt, provider, subscription, renews) => {
                self.number(*attempt, false)?;
                hold!(
                    renews.is_none() || *renews == self.key,
                    "a key is to be followed that is not the tunnel's"
                );
                hold!(
                    self.is_paid(subscription, now),
                    "an approval is asked for without a verified subscription"
                );
                self.renewal_tries += 1;
                self.unanswered = None;
                self.asked.insert(*attempt, (**provider).clone());
                self.open.insert((*attempt, Kind::Approved));
            }
            Action::Provision(attempt, subscription) => {
                self.number(*attempt, false)?;
                hold!(
                    self.is_paid(subscription, now),
                    "a provider is asked for without a verified subscription"
                );
                hold!(
                    self.exemptions().is_none_or(|e| e.fallback_script),
                    "the script before the firewall lets it pass"
                );
                self.provisions.insert(*attempt);
                self.open.insert((*attempt, Kind::Provisioned));
            }
            Action::Cancel(attempt) => self.open.retain(|(open, _)| open != attempt),
            Action::ConfigureTunnel(..)
            | Action::RenewTunnel(..)
            | Action::Release(_)
            | Action::ForceHandshake(_)
            | Action::ProbeTunnel(_)
            | Action::RebindTunnel(_)
            | Action::TearDown(_) => self.check_tunnel_action(action, now)?,
            Action::SetFirewall(policy) => {
                let again = std::mem::take(&mut self.firewall_failed);
                hold!(
                    again || self.policy.as_ref() != Some(policy),
                    "the firewall is told the same twice"
                );
                let blocks = self.config.lockdown || (self.config.kill_switch && self.wanted);
                hold!(
                    *policy != Policy::Open || !blocks,
                    "the firewall opens though it has to block"
                );
                hold!(
                    *policy != Policy::Open || self.acted,
                    "the firewall is opened though nobody acted"
                );
                self.policy = Some(policy.clone());
                self.acted = true;
            }
            Action::StoreWish(wish) => hold!(*wish == self.wanted, "the wrong wish is stored"),
            Action::StoreSubscription(Some(subscription)) => {
                hold!(
                    self.subscriptions.contains(subscription),
                    "a subscription is stored that nobody verified"
                );
            }
            Action::StoreSubscription(None) | Action::StoreLastEndpoint(_) | Action::Audit(_) => {}
        }
        Ok(())
    }

    /// The tunnel and its keys.
    fn check_tunnel_action(&mut self, action: &Action, now: Now) -> Result<(), Broken> {
        match action {
            Action::ConfigureTunnel(attempt, approval) => {
                self.number(*attempt, false)?;
                self.check_approval(*attempt, approval, now)?;
                self.check_tunnel(approval)?;
                self.tunnel = Some(*attempt);
                self.key = Some(*approval.client_key());
                self.hold(approval);
                self.last_rx = None;
                self.open.insert((*attempt, Kind::Configured));
            }
            Action::ForceHandshake(attempt) | Action::ProbeTunnel(attempt) | Action::RebindTunnel(attempt) => {
                hold!(
                    self.tunnel == Some(*attempt),
                    "{action:?} for a tunnel that does not stand"
                );
            }
            Action::RenewTunnel(attempt, approval) => {
                self.number(*attempt, false)?;
                self.check_approval(*attempt, approval, now)?;
                hold!(self.tunnel.is_some(), "a renewal without a tunnel");
                self.hold(approval);
                self.open.insert((*attempt, Kind::Renewed));
            }
            Action::Release(release) => {
                let key = release.client_key;
                hold!(self.key != Some(key), "the key of the standing tunnel is released");
                let known =
                    |approval: &Approval| *approval.client_key() == key && approval.provider().id == release.provider;
                hold!(
                    self.approvals.values().any(|approval| known(approval)),
                    "a key is released that nobody admitted"
                );
                self.held.remove(&key);
            }
            Action::TearDown(attempt) => {
                hold!(
                    self.tunnel == Some(*attempt),
                    "{action:?} for a tunnel that does not stand"
                );
                self.unanswered = None;
                // A hand-over that is under way ends with the device.
                self.open
                    .retain(|(open, kind)| open != attempt && *kind != Kind::Renewed);
                self.open.insert((*attempt, Kind::TornDown));
            }
            Action::Discover(_)
            | Action::Probe(..)
            | Action::Verify(..)
            | Action::Approve(..)
            | Action::Provision(..)
            | Action::Cancel(_)
            | Action::SetFirewall(_)
            | Action::StoreWish(_)
            | Action::StoreLastEndpoint(_)
            | Action::StoreSubscription(_)
            | Action::Audit(_) => {}
        }
        Ok(())
    }

    fn hold(&mut self, approval: &Approval) {
        if approval.is_from_pool() {
            self.held.insert(*approval.client_key());
        }
    }

    /// Verified, approved, tunnel: in this order, for this number, for this provider.
    fn check_approval(&self, attempt: Attempt, approval: &Approval, now: Now) -> Result<(), Broken> {
        let given = self.approvals.get(&attempt);
        hold!(
            given.is_some_and(|given| **given == *approval),
            "a tunnel without the approval of its number"
        );
        let asked = self
            .asked
            .get(&attempt)
            .is_some_and(|provider| provider == approval.provider());
        hold!(
            asked || self.provisions.contains(&attempt),
            "a tunnel to a provider that was not asked for"
        );
        hold!(
            approval.expires_at() > now.wall,
            "a tunnel under an approval that is over"
        );
        Ok(())
    }

    fn check_tunnel(&self, approval: &Approval) -> Result<(), Broken> {
        hold!(self.tunnel.is_none(), "a second tunnel before the first is gone");
        if let Some(exemptions) = self.exemptions() {
            let endpoint = approval.provider().endpoint;
            hold!(
                exemptions.tunnel == Some(endpoint),
                "a tunnel before the firewall lets it pass"
            );
        }
        Ok(())
    }

    fn check_firewall(&self, state: StateName) -> Result<(), Broken> {
        let blocks = self.config.lockdown || (self.config.kill_switch && self.wanted);
        hold!(
            self.policy.is_some() || !self.acted,
            "somebody acted and the firewall was told nothing"
        );
        let open = !matches!(self.policy, Some(Policy::Blocked(_)));
        hold!(!open || !blocks, "open in {state:?} though it has to block");
        // Blocking longer than needed is a fault as well; a Stop opens when the tunnel is down.
        let may_block = blocks || (state == StateName::Disconnecting && self.config.kill_switch);
        hold!(open || may_block, "blocked in {state:?} though nothing asks for it");
        let Some(exemptions) = self.exemptions() else {
            return Ok(());
        };
        let uses_tunnel = matches!(
            state,
            StateName::Connecting | StateName::Connected | StateName::Degraded
        );
        hold!(
            exemptions.tunnel.is_some() == uses_tunnel,
            "tunnel exemption {exemptions:?} in {state:?}"
        );
        hold!(
            exemptions.probes.is_empty() == (state != StateName::Probing),
            "probe exemption in {state:?}"
        );
        hold!(
            exemptions.fallback_script == (state == StateName::Provisioning),
            "script exemption in {state:?}"
        );
        Ok(())
    }
}

fn name_of(input: &Input) -> &'static str {
    match input {
        Input::Start(_) => "Start",
        Input::Stop => "Stop",
        Input::Listed(..) => "Listed",
        Input::Probed(..) => "Probed",
        Input::Verified(..) => "Verified",
        Input::Approved(..) => "Approved",
        Input::Provisioned(..) => "Provisioned",
        Input::LeaseExtended(..) => "LeaseExtended",
        Input::TunnelConfigured(..) => "TunnelConfigured",
        Input::HandshakeSeen(_) => "HandshakeSeen",
        Input::TrafficSampled(..) => "TrafficSampled",
        Input::TunnelRenewed(..) => "TunnelRenewed",
        Input::TunnelLost(..) => "TunnelLost",
        Input::TornDown(_) => "TornDown",
        Input::FirewallFailed(_) => "FirewallFailed",
        Input::TokenChanged => "TokenChanged",
        Input::ConfigChanged(_) => "ConfigChanged",
        Input::NetworkChanged => "NetworkChanged",
    }
}

fn drain(session: &mut Session) -> Vec<Action> {
    std::iter::from_fn(|| session.poll_action()).collect()
}
