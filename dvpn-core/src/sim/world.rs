//! The world around a session: a pool, a payment server, an orchestrator, providers with loss and outages, a user, and
//! a clock that jumps from event to event. One seed decides everything.

mod mischief;
mod renewing;
mod servers;

use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

use dvpn_common::{ids::ProviderId, keys::PublicKey, status::StateName};
use jiff::Timestamp;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use renewing::Renewing;

use super::watch::{Broken, Watch};
use crate::{
    Failure, Now, Retry,
    approval::Approval,
    directory::Provider,
    session::{Action, Attempt, Choice, Input, Restored, Session, SessionConfig, Traffic},
};

/// One second: how often the tunnel's totals are sampled.
const SAMPLE: Duration = Duration::from_secs(1);
/// How long the change of a tunnel takes in a world where all is well.
const SETTLING: Duration = Duration::from_secs(5);

/// How a server behaves for a while.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Server {
    Up,
    Slow,
    Down,
    /// Answers what must not be believed, or says no.
    Hostile,
    /// Never answers: not even an error comes back.
    Lost,
}

/// A provider as it really is.
#[derive(Debug)]
struct Peer {
    provider: Provider,
    latency: Duration,
    loss: f64,
    /// Silent until then.
    silent_until: Duration,
    dead: bool,
}

/// A tunnel as it really is.
#[derive(Debug)]
struct Device {
    attempt: Attempt,
    provider: ProviderId,
    key: PublicKey,
    traffic: Traffic,
    shaken: bool,
}

/// Something that will happen.
#[derive(Debug)]
enum Event {
    /// The machine is told.
    Tell(Box<Input>),
    /// Totals are read.
    Sample(Attempt),
    /// A handshake is tried, this many times already.
    Handshake(Attempt, u32),
    /// The world or its user does something.
    Mischief,
    /// From now on all is well.
    Heal,
}

/// What one run saw.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Inputs and timeouts fed.
    pub steps: u64,
    /// Attempts begun.
    pub attempts: u64,
    /// Tunnels that shook hands.
    pub tunnels: u64,
    /// Changes of provider without being told to.
    pub switches: u64,
    /// Providers made by the orchestrator.
    pub provisions: u64,
    /// Tunnels that went over to a fresh key.
    pub renewals: u64,
    /// Those of them whose approval was asked for again, because the pool had acted and its answer was lost.
    pub regained: u64,
    /// Restarts of the daemon.
    pub restarts: u64,
}

pub(super) struct World {
    rng: StdRng,
    start: Now,
    /// Time since the start.
    pub(super) time: Duration,
    events: BTreeMap<(Duration, u64), Event>,
    sequence: u64,
    session: Session,
    watch: Watch,
    config: SessionConfig,
    pool: Server,
    payment: Server,
    orchestrator: Server,
    peers: Vec<Peer>,
    device: Option<Device>,
    renewing: Renewing,
    /// How busy the user is: bytes a second.
    load: u64,
    subscription_life: Duration,
    approval_life: Duration,
    stored: Restored,
    healed: bool,
    pub(super) counts: Counts,
    /// Attempts and switches of sessions before a restart.
    before: (u64, u64),
}

impl World {
    pub(super) fn new(seed: u64, start: Now) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let peers = (1..=rng.random_range(1..=9_u8)).map(|n| peer(n, &mut rng)).collect();
        let config = SessionConfig {
            not_configured: None,
            kill_switch: rng.random_bool(0.7),
            lockdown: rng.random_bool(0.2),
            sample_size: rng.random_range(1..=4),
            choice: Choice::default(),
            fallback: rng.random_bool(0.4),
            fallback_timeout: Duration::from_secs(20),
        };
        let stored = Restored {
            wish: rng.random_bool(0.3),
            ..Restored::default()
        };
        let session = Session::new(config.clone(), rng.random(), stored, start);
        let watch = Watch::new(&config, &stored);
        let (subscription_life, approval_life) = lives(&mut rng);
        Self {
            rng,
            start,
            time: Duration::ZERO,
            events: BTreeMap::new(),
            sequence: 0,
            session,
            watch,
            config,
            pool: Server::Up,
            payment: Server::Up,
            orchestrator: Server::Up,
            peers,
            device: None,
            renewing: Renewing::default(),
            load: 0,
            subscription_life,
            approval_life,
            stored,
            healed: false,
            counts: Counts::default(),
            before: (0, 0),
        }
    }

    fn now(&self) -> Now {
        Now {
            instant: self.start.instant + self.time,
            wall: self.start.wall.checked_add(self.time).unwrap_or(Timestamp::MAX),
        }
    }

    fn at(&mut self, delay: Duration, event: Event) {
        self.sequence += 1;
        self.events.insert((self.time + delay, self.sequence), event);
    }

    fn tell(&mut self, delay: Duration, input: Input) {
        self.at(delay, Event::Tell(Box::new(input)));
    }

    /// Chaos until `chaos`, then a healed world until `end`, by when a wanted session must be connected.
    pub(super) fn run(&mut self, chaos: Duration, end: Duration) -> Result<(), Broken> {
        self.at(Duration::from_millis(10), Event::Mischief);
        self.at(chaos, Event::Heal);
        let now = self.now();
        let first = self.watch.begin(&mut self.session, now)?;
        self.carry_out(first);
        while self.time < end {
            self.step(end)?;
        }
        // A renewal may be changing the tunnel at this very moment.
        let last = end + SETTLING;
        while self.session.status().wanted && self.session.state() != StateName::Connected && self.time < last {
            self.step(last)?;
        }
        let status = self.session.status();
        self.counts.attempts = self.before.0 + status.attempts;
        self.counts.switches = self.before.1 + status.switches;
        let connected = status.state == StateName::Connected;
        if status.wanted && !connected {
            return Err(Broken(format!(
                "all is well again, and the session is still {:?}: {:?}",
                status.state, status.problem
            )));
        }
        if !status.wanted && status.state != StateName::Disconnected {
            return Err(Broken(format!(
                "nothing is wanted, and the session is {:?}",
                status.state
            )));
        }
        Ok(())
    }

    fn step(&mut self, end: Duration) -> Result<(), Broken> {
        let event_at = self.events.first_key_value().map(|((at, _), _)| *at);
        let due_at = self
            .session
            .poll_timeout()
            .map(|(at, _)| at.saturating_duration_since(self.start.instant));
        self.counts.steps += 1;
        // Which of two things at the same moment comes first is not defined: both orders are tried.
        let timeout_first = match (due_at, event_at) {
            (Some(due), Some(event)) => due < event || (due == event && self.rng.random()),
            (Some(_), None) => true,
            (None, _) => false,
        };
        let actions = if timeout_first {
            self.time = due_at.unwrap_or(self.time).max(self.time);
            let now = self.now();
            self.watch.expire(&mut self.session, now)?
        } else if let Some(((at, _), event)) = self.events.pop_first() {
            self.time = at.max(self.time);
            return self.happen(event);
        } else {
            // A session at rest in a quiet world: nothing happens until the end.
            self.time = end;
            return Ok(());
        };
        self.carry_out(actions);
        Ok(())
    }

    fn feed(&mut self, input: Input) -> Result<(), Broken> {
        let now = self.now();
        let actions = self.watch.feed(&mut self.session, input, now)?;
        self.carry_out(actions);
        Ok(())
    }

    fn happen(&mut self, event: Event) -> Result<(), Broken> {
        match event {
            Event::Tell(input) => {
                if let Input::TornDown(attempt) = *input
                    && self.device.as_ref().is_some_and(|device| device.attempt == attempt)
                {
                    self.device = None;
                }
                self.heard(&input);
                self.feed(*input)
            }
            Event::Sample(attempt) => match self.sampled(attempt) {
                Some(traffic) => {
                    self.at(SAMPLE, Event::Sample(attempt));
                    self.feed(Input::TrafficSampled(attempt, traffic))
                }
                None => Ok(()),
            },
            Event::Handshake(attempt, tries) => self.shake(attempt, tries),
            Event::Mischief if self.healed => Ok(()),
            Event::Mischief => {
                let pause = Duration::from_millis(self.rng.random_range(100..12_000));
                self.at(pause, Event::Mischief);
                self.mischief()
            }
            Event::Heal => self.heal(),
        }
    }

    /// Whether a packet to a provider and back arrives.
    fn passes(&mut self, provider: &ProviderId) -> bool {
        let time = self.time;
        let Some(peer) = self.peers.iter().find(|peer| peer.provider.id == *provider) else {
            return false;
        };
        !peer.dead && peer.silent_until <= time && !self.rng.random_bool(peer.loss)
    }

    /// A second of user's traffic passes, or does not.
    fn sampled(&mut self, attempt: Attempt) -> Option<Traffic> {
        let provider = self
            .device
            .as_ref()
            .filter(|device| device.attempt == attempt)?
            .provider
            .clone();
        let load = if self.rng.random_bool(0.8) { self.load } else { 0 };
        let packets = load.min(4);
        let admitted = self.is_admitted();
        let arrived = (0..packets).filter(|_| admitted && self.passes(&provider)).count() as u64;
        let device = self.device.as_mut()?;
        device.traffic.tx_bytes += load;
        if let Some(share) = (load * arrived).checked_div(packets) {
            device.traffic.rx_bytes += share;
        }
        Some(device.traffic)
    }

    fn shake(&mut self, attempt: Attempt, tries: u32) -> Result<(), Broken> {
        let Some(device) = self.device.as_mut().filter(|device| device.attempt == attempt) else {
            return Ok(());
        };
        let provider = device.provider.clone();
        device.traffic.tx_bytes += 148;
        if !self.is_admitted() || !self.passes(&provider) {
            // WireGuard's own retry comes after 5 s; three are enough for any state to be left.
            if tries < 3 {
                self.at(Duration::from_secs(5), Event::Handshake(attempt, tries + 1));
            }
            return Ok(());
        }
        let Some(device) = self.device.as_mut() else {
            return Ok(());
        };
        device.traffic.rx_bytes += 92;
        let first = !std::mem::replace(&mut device.shaken, true);
        if first {
            self.counts.tunnels += 1;
            self.at(SAMPLE, Event::Sample(attempt));
        }
        self.feed(Input::HandshakeSeen(attempt))
    }

    fn carry_out(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Discover(attempt) => self.list(attempt),
                Action::Probe(attempt, providers) => self.measure(attempt, &providers),
                Action::Verify(attempt, _) => self.verify(attempt),
                Action::Approve(attempt, provider, subscription, renews) => {
                    self.approve(attempt, &provider, &subscription, renews);
                }
                Action::Provision(attempt, subscription) => self.provision(attempt, &subscription),
                // Answers already under way come all the same: the machine must not mind.
                Action::Cancel(attempt) => self.renewing.cancel(attempt),
                Action::Release(release) => self.renewing.release(&release.client_key),
                Action::SetFirewall(_) | Action::Audit(_) => {}
                Action::ConfigureTunnel(attempt, approval) => self.configure(attempt, &approval),
                Action::RenewTunnel(attempt, approval) => self.hand_over(attempt, *approval.client_key()),
                Action::ForceHandshake(attempt) | Action::RebindTunnel(attempt) => {
                    self.at(Duration::from_millis(20), Event::Handshake(attempt, 3));
                }
                Action::ProbeTunnel(attempt) => self.probe_tunnel(attempt),
                Action::TearDown(attempt) => {
                    let delay = Duration::from_millis(self.rng.random_range(1..300));
                    self.tell(delay, Input::TornDown(attempt));
                }
                Action::StoreWish(wish) => self.stored.wish = wish,
                Action::StoreLastEndpoint(endpoint) => self.stored.last_endpoint = Some(endpoint),
                Action::StoreSubscription(subscription) => self.stored.subscription = subscription,
            }
        }
    }

    fn configure(&mut self, attempt: Attempt, approval: &Approval) {
        let delay = Duration::from_millis(self.rng.random_range(5..60));
        if !self.healed && self.rng.random_bool(0.05) {
            return self.tell(
                delay,
                Input::TunnelConfigured(attempt, Err(failure("no /dev/net/tun", Retry::Now))),
            );
        }
        let provider = approval.provider().id.clone();
        self.device = Some(Device {
            attempt,
            provider,
            key: *approval.client_key(),
            traffic: Traffic::default(),
            shaken: false,
        });
        self.tell(delay, Input::TunnelConfigured(attempt, Ok(())));
        self.at(delay + Duration::from_millis(20), Event::Handshake(attempt, 0));
    }

    /// The device goes over to another key, or does not; once in a while it hangs.
    fn hand_over(&mut self, attempt: Attempt, key: PublicKey) {
        let delay = Duration::from_millis(self.rng.random_range(50..3_000));
        let luck = if self.healed { 0 } else { self.rng.random_range(0..20) };
        let answer = match luck {
            19 => return,
            16..=18 => Err(failure("no answer from the gateway", Retry::Backoff)),
            _ => Ok(()),
        };
        if answer.is_ok() {
            self.counts.renewals += 1;
            self.counts.regained += u64::from(self.renewing.was_regained(&key));
            if let Some(device) = &mut self.device {
                device.key = key;
            }
        }
        self.tell(delay, Input::TunnelRenewed(attempt, answer));
    }

    fn probe_tunnel(&mut self, attempt: Attempt) {
        let Some(provider) = self
            .device
            .as_ref()
            .filter(|d| d.attempt == attempt)
            .map(|d| d.provider.clone())
        else {
            return;
        };
        let answered = self.is_admitted() && self.passes(&provider);
        if let Some(device) = self.device.as_mut() {
            device.traffic.tx_bytes += 96;
            device.traffic.rx_bytes += if answered { 96 } else { 0 };
        }
    }
}

fn failure(what: &str, retry: Retry) -> Failure {
    Failure {
        what: what.to_owned(),
        how: "wait, this is a simulation".to_owned(),
        retry,
    }
}

fn lives(rng: &mut StdRng) -> (Duration, Duration) {
    let seconds = |rng: &mut StdRng| Duration::from_secs(rng.random_range(5..300));
    (seconds(rng), seconds(rng))
}

fn peer(n: u8, rng: &mut StdRng) -> Peer {
    let address = [198, 51, 100, n];
    let mut key = [n; 32];
    // Never all zero, whatever n is.
    key[31] = 1;
    let provider = Provider {
        id: match format!("provider-{n}").parse() {
            Ok(id) => id,
            Err(_never) => unreachable!("provider-N reads as an id"),
        },
        endpoint: SocketAddr::from((address, 51820)),
        public_key: match PublicKey::from_bytes(key) {
            Ok(key) => key,
            Err(_never) => unreachable!("the key is not zero"),
        },
        allowed_ips: Vec::new(),
        probe: rng.random_bool(0.7).then(|| SocketAddr::from((address, 51821))),
        region: None,
    };
    Peer {
        provider,
        latency: Duration::from_millis(rng.random_range(5..200)),
        loss: if rng.random_bool(0.3) { 0.02 } else { 0.0 },
        silent_until: Duration::ZERO,
        dead: rng.random_bool(0.15),
    }
}
