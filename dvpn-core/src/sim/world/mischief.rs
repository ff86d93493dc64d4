//! What goes wrong, what the user does, and how it all heals.

use std::time::Duration;

use rand::RngExt as _;

use super::{Event, Server, World, failure, lives};
use crate::{
    Retry,
    directory::Directory,
    session::{Attempt, Choice, Input, Session},
    sim::watch::{Broken, Watch},
};

impl World {
    pub(super) fn mischief(&mut self) -> Result<(), Broken> {
        let choice = self.rng.random_range(0..20);
        match choice {
            0 => self.pool = self.any_server(),
            1 => self.payment = self.any_server(),
            2 => self.orchestrator = self.any_server(),
            3..=5 => self.disturb(),
            6 => {
                self.load = *[0, 0, 40, 5_000, 1_000_000]
                    .get(self.rng.random_range(0..5))
                    .unwrap_or(&0);
            }
            7..=9 => return self.feed(Input::Start(Choice::default())),
            10 => {
                let choice = self.any_choice();
                return self.feed(Input::Start(choice));
            }
            11 => return self.feed(Input::Stop),
            12 => return self.feed(Input::TokenChanged),
            13 => return self.feed(Input::NetworkChanged),
            14 => return self.reconfigure(),
            15 => return self.break_device(),
            16 => return self.feed(Input::FirewallFailed(failure("netlink says no", Retry::Backoff))),
            17 => return self.restart(),
            18 => {
                let stale = Attempt(self.rng.random_range(0..4));
                return self.feed(Input::Listed(stale, Ok(Directory::default())));
            }
            _ => (self.subscription_life, self.approval_life) = lives(&mut self.rng),
        }
        Ok(())
    }

    pub(super) fn any_server(&mut self) -> Server {
        match self.rng.random_range(0..8) {
            0 => Server::Slow,
            1 => Server::Down,
            2 => Server::Hostile,
            3 => Server::Lost,
            _ => Server::Up,
        }
    }

    pub(super) fn disturb(&mut self) {
        let index = self.rng.random_range(0..self.peers.len());
        let outage = Duration::from_millis(self.rng.random_range(500..20_000));
        let (kind, loss) = (self.rng.random_range(0..4), self.rng.random_range(0.0..0.6));
        let until = self.time + outage;
        let Some(peer) = self.peers.get_mut(index) else { return };
        match kind {
            0 => peer.dead = !peer.dead,
            1 => peer.loss = loss,
            _ => peer.silent_until = until,
        }
    }

    pub(super) fn any_choice(&mut self) -> Choice {
        let index = self.rng.random_range(0..self.peers.len());
        let id = self.peers.get(index).map(|peer| peer.provider.id.clone());
        if self.rng.random() {
            Choice {
                only_ids: id.into_iter().collect(),
                ..Choice::default()
            }
        } else {
            Choice {
                exclude_ids: id.into_iter().collect(),
                ..Choice::default()
            }
        }
    }

    pub(super) fn reconfigure(&mut self) -> Result<(), Broken> {
        match self.rng.random_range(0..5) {
            0 => self.config.kill_switch = !self.config.kill_switch,
            1 => self.config.lockdown = !self.config.lockdown,
            2 => self.config.fallback = !self.config.fallback,
            3 => {
                let missing = self.rng.random::<bool>().then(|| failure("no POOL_URL", Retry::Never));
                self.config.not_configured = missing;
            }
            _ => self.config.choice = self.any_choice(),
        }
        self.feed(Input::ConfigChanged(Box::new(self.config.clone())))
    }

    pub(super) fn break_device(&mut self) -> Result<(), Broken> {
        match self.device.as_ref().map(|device| device.attempt) {
            Some(attempt) => self.feed(Input::TunnelLost(
                attempt,
                failure("the interface was deleted", Retry::Now),
            )),
            None => Ok(()),
        }
    }

    /// The daemon dies and comes back: what was stored is all it knows, and nothing opened meanwhile.
    pub(super) fn restart(&mut self) -> Result<(), Broken> {
        let status = self.session.status();
        self.before = (self.before.0 + status.attempts, self.before.1 + status.switches);
        self.counts.restarts += 1;
        self.events
            .retain(|_, event| matches!(event, Event::Mischief | Event::Heal));
        self.device = None;
        self.renewing.forget();
        let now = self.now();
        self.session = Session::new(self.config.clone(), self.rng.random(), self.stored, now);
        self.watch = Watch::new(&self.config, &self.stored);
        let first = self.watch.begin(&mut self.session, now)?;
        self.carry_out(first);
        Ok(())
    }

    /// All is well from now on, and the user says once more what is wanted.
    pub(super) fn heal(&mut self) -> Result<(), Broken> {
        self.healed = true;
        (self.pool, self.payment, self.orchestrator) = (Server::Up, Server::Up, Server::Up);
        for peer in &mut self.peers {
            (peer.dead, peer.loss, peer.silent_until) = (false, 0.0, Duration::ZERO);
        }
        self.load = 1_000;
        self.approval_life = Duration::from_hours(1);
        self.subscription_life = Duration::from_hours(2);
        self.config.not_configured = None;
        self.config.choice = Choice::default();
        self.feed(Input::ConfigChanged(Box::new(self.config.clone())))?;
        if self.rng.random_bool(0.8) {
            self.feed(Input::Start(Choice::default()))
        } else {
            self.feed(Input::Stop)
        }
    }
}
