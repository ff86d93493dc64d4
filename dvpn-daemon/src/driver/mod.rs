//! The driver: wait, feed the session machine, act, publish. Nothing else touches the machine.
//!
//! Answers come back as inputs tagged with the attempt that asked; whatever the machine cancels is aborted. The tunnel
//! belongs to one task of its own ([`device`]), the requests to [`requests`].

mod device;
mod login;
mod pool;
mod releases;
mod requests;
mod status;
mod subscriptions;

use std::{collections::HashMap, net::SocketAddr, sync::Arc, time::Duration};

use dvpn_common::{
    ids::ProviderId,
    keys::PublicKey,
    status::{Status, TunnelBackend},
};
use dvpn_core::{
    Now,
    approval::Approval,
    audit::Event,
    config::{Config, Mode},
    rollback::{self, Rollback},
    session::{Action, Attempt, Choice, Input, Restored, Session},
};
use futures::future::OptionFuture;
use jiff::Timestamp;
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::AbortHandle,
    time::{Instant, Interval},
};

use crate::{
    audit::Audit,
    control::{Command, metrics::Metrics},
    control_plane::ControlPlane,
    ebpf,
    fallback::{Fallback, lease::Leases},
    host::{Host, dns::Dns},
    http::{Payment, Pool},
    socks5::{TunnelPath, TunnelWatch},
    state::State,
};
use device::Order;
use login::Login;
use requests::{Keys, Requests};

/// How long the end of the daemon waits for the pool to take the connection back.
const LAST_RELEASE: Duration = Duration::from_secs(1);

/// What the driver needs of the daemon.
pub struct Parts {
    /// The configuration in force.
    pub config: Arc<Config>,
    /// What survives restarts.
    pub state: State,
    /// What changes the machine.
    pub host: Arc<Host>,
    /// Makes the connections beside the tunnel in device mode.
    pub control_plane: Option<ControlPlane>,
    /// The machine's name resolution.
    pub dns: Dns,
    /// The pool, once `POOL_URL` is set.
    pub pool: Option<Pool>,
    /// The payment server, once `PAYMENT_API_URL` is set.
    pub payment: Option<Payment>,
    /// We as a provider, left out of every list: a node never selects itself.
    pub own_node: Option<(ProviderId, PublicKey)>,
    /// The audit stream.
    pub audit: Audit,
    /// The metrics.
    pub metrics: Metrics,
    /// The counting programs on the tunnel interface, read by `/metrics`.
    pub counters: Arc<std::sync::Mutex<Option<ebpf::Counters>>>,
    /// The service manager's watchdog, where it set one.
    pub watchdog: Option<Watchdog>,
}

/// Who ends and restarts a daemon that shows no sign of life.
#[derive(Debug, Clone, Copy)]
pub struct Watchdog {
    /// How often it is told; some times in its own limit.
    pub every: Duration,
    /// Tells it. Called only after the driver took a turn *and* the tunnel's task carried out an order.
    pub feed: fn(),
}

/// What happened to the machine's network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MachineEvent {
    /// Packets to the internet leave another way than before.
    OtherWayOut,
    /// Something changed that is not ours: what is on which link may be different.
    Changed,
    /// Something of ours may be gone.
    Loss,
    /// Somebody else may have changed the machine's name resolution.
    NamesDisturbed,
    /// The machine was suspended.
    Resumed,
    /// The wall clock was set: what is due by it may be due now.
    ClockSet,
}

/// What the service manager wants of a daemon that it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Termination {
    /// The tunnel is taken down, and what was blocked is opened.
    Stop,
    /// A successor comes: what blocks stays.
    Restart,
}

/// Why the driver ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// `Exit`, or a restart: what blocks stays.
    Exit,
    /// The service manager: the tunnel is down.
    Terminated,
}

/// The driver, ready to run.
pub struct Driver {
    session: Session,
    parts: Parts,
    choice: Choice,
    autostart: bool,
    inputs: mpsc::Receiver<Input>,
    requests: Requests,
    leases: Leases,
    running: HashMap<Attempt, AbortHandle>,
    orders: mpsc::Sender<Order>,
    keys: Keys,
    status: watch::Sender<Status>,
    path: watch::Sender<Option<(Attempt, Arc<TunnelPath>)>>,
    /// Of the last tunnel that was made.
    backend: watch::Receiver<Option<TunnelBackend>>,
    /// A tunnel was configured and its traces are still on the machine.
    configured: bool,
    usable_by: Option<Attempt>,
    usable: watch::Sender<Option<Arc<TunnelPath>>>,
    stopping: Vec<oneshot::Sender<()>>,
    /// Of a start over SSH.
    rollback: Rollback,
    login: Login,
    /// Before the first change of ours: what an earlier run left blocks.
    found_blocking: bool,
}

/// Both ends of what the driver shows: made first, so that the control servers can stand before the stored state is
/// opened.
pub struct Views {
    status: watch::Sender<Status>,
    path: watch::Sender<Option<Arc<TunnelPath>>>,
}

impl Views {
    /// A daemon that has just started, on a machine where everything is blocked already, or not.
    pub fn new(config: &Config, blocking: bool) -> Self {
        let status = Status {
            blocking,
            ..status::starting(config)
        };
        Self {
            status: watch::Sender::new(status),
            path: watch::Sender::new(None),
        }
    }
    /// The status, after every change.
    pub fn status(&self) -> watch::Receiver<Status> {
        self.status.subscribe()
    }
    /// The path applications may use: something only while traffic flows.
    pub fn path(&self) -> TunnelWatch {
        self.path.subscribe()
    }
}

fn now() -> Now {
    Now {
        instant: std::time::Instant::now(),
        wall: Timestamp::now(),
    }
}

impl Driver {
    /// Makes the driver; `seed` is 32 bytes from the operating system's CSPRNG, `restored` what outlived the last run.
    pub async fn new(parts: Parts, seed: [u8; 32], restored: Restored, views: Views) -> Self {
        let (inputs_sender, inputs) = mpsc::channel(256);
        let path = watch::Sender::new(None);
        let keys = Keys::default();
        let autostart = restored.wish;
        let dns = parts
            .config
            .tunnel
            .dns
            .iter()
            .map(|address| SocketAddr::new(*address, 53))
            .collect();
        let (backend_sender, backend) = watch::channel(None);
        let surroundings = device::Surroundings {
            host: Arc::clone(&parts.host),
            metrics: parts.metrics.clone(),
            dns,
            names: (parts.config.tunnel.mode == Mode::Device).then(|| parts.dns.clone()),
            loader: ebpf::Loader::new(parts.config.bpf_directory.clone()),
            counters: Arc::clone(&parts.counters),
            backend: backend_sender,
        };
        let orders = device::spawn(surroundings, inputs_sender.clone(), path.clone());
        let found_blocking = views.status.borrow().blocking;
        let leases = Leases::new(inputs_sender.clone());
        let requests = Requests::new(&parts, keys.clone(), inputs_sender);
        let choice = parts.config.choice.clone();
        let session = Session::new(requests.session_config(&parts.config).await, seed, restored, now());
        Self {
            session,
            parts,
            choice,
            autostart,
            inputs,
            requests,
            leases,
            running: HashMap::new(),
            orders,
            keys,
            status: views.status,
            path,
            backend,
            configured: false,
            usable_by: None,
            usable: views.path,
            stopping: Vec::new(),
            rollback: Rollback::default(),
            login: Login::new(),
            found_blocking,
        }
    }

    /// Runs until told to end. `terminate` completes when the service manager ends the daemon; `reload` brings a new
    /// configuration that was already checked; `events` says what happened to the machine.
    pub async fn run(
        mut self,
        mut commands: mpsc::Receiver<Command>,
        mut reload: mpsc::Receiver<Arc<Config>>,
        mut events: mpsc::Receiver<MachineEvent>,
        terminate: impl Future<Output = Termination>,
    ) -> Ended {
        tokio::pin!(terminate);
        let mut path = self.path.subscribe();
        let mut signs_of_life = self.parts.watchdog.map(|watchdog| {
            let mut ticks = tokio::time::interval(watchdog.every);
            ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            ticks
        });
        loop {
            self.settle().await;
            let deadline = self.session.poll_timeout().map(|(at, _reason)| at);
            let taken_back = self.rollback.due().map(|(at, _)| at);
            let login = self.login.due_at();
            let sleep = async {
                match deadline.into_iter().chain(taken_back).chain(login).min() {
                    Some(at) => tokio::time::sleep_until(Instant::from_std(at)).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                Some(input) = self.inputs.recv() => self.feed(input),
                Some(command) = commands.recv() => {
                    if let Some(ended) = self.obey(command).await {
                        self.end_login().await;
                        self.leases.end().await;
                        return ended;
                    }
                }
                Some(config) = reload.recv() => {
                    self.parts.config = config;
                    self.choice = self.parts.config.choice.clone();
                    self.feed_config().await;
                }
                Some(event) = events.recv() => self.on_machine(event).await,
                Some(look) = self.login.looks.recv() => self.network_looked(look).await,
                Ok(()) = path.changed() => {}
                Some(_) = OptionFuture::from(signs_of_life.as_mut().map(Interval::tick)) => self.show_life(),
                () = sleep => {
                    if self.rollback.is_due(now().instant) {
                        self.take_back();
                    }
                    self.login_due().await;
                    self.session.handle_timeout(now());
                }
                how = &mut terminate => {
                    self.end_login().await;
                    return match how {
                        Termination::Stop => self.terminate().await,
                        Termination::Restart => self.make_way(),
                    };
                }
            }
        }
    }

    /// Nobody confirmed a start over SSH.
    fn take_back(&mut self) {
        tracing::warn!("the start over SSH was not confirmed and is taken back");
        self.parts.audit.record(&Event::StartTakenBack);
        self.feed(Input::Stop);
    }

    async fn on_machine(&mut self, event: MachineEvent) {
        if matches!(event, MachineEvent::OtherWayOut | MachineEvent::Resumed) {
            self.login_moved().await;
        }
        let done = match event {
            MachineEvent::OtherWayOut => return self.feed(Input::NetworkChanged),
            MachineEvent::NamesDisturbed => return self.order(Order::Names).await,
            MachineEvent::ClockSet => return self.session.handle_timeout(now()),
            MachineEvent::Resumed => {
                // Whoever we were connected to has forgotten us, or we are on another network.
                let done = self.parts.host.reassert_client().await.map(|()| None);
                self.feed(Input::NetworkChanged);
                done
            }
            MachineEvent::Changed => self.parts.host.reassert_client().await.map(|()| None),
            MachineEvent::Loss => self.parts.host.repair_client().await,
        };
        match done {
            Ok(Some(lost)) => {
                tracing::warn!("another program changed our {lost}: made again");
                self.parts.audit.record(&Event::FirewallRepaired { lost });
            }
            Ok(None) => {}
            Err(error) => self.feed(Input::FirewallFailed(requests::firewall_failed(&error))),
        }
    }

    /// Tells the watchdog, by way of the tunnel's task: a task that hangs, or a queue that is full, is not life.
    fn show_life(&self) {
        let Some(Watchdog { feed, .. }) = self.parts.watchdog else {
            return;
        };
        let (done, carried_out) = oneshot::channel();
        if self.orders.try_send(Order::Ping(done)).is_ok() {
            tokio::spawn(async move {
                if carried_out.await.is_ok() {
                    feed();
                }
            });
        }
    }

    fn feed(&mut self, input: Input) {
        if let Input::Provisioned(_, Ok(approval)) = &input {
            self.hold_lease(approval);
        }
        self.session.handle_input(input, now());
    }

    /// Takes the lease of a provider that was just made, whether or not the session still wants it: it is to be returned.
    fn hold_lease(&mut self, approval: &Approval) {
        if let (Some(lease), Some(token), Some(fallback)) = (
            approval.lease(),
            self.requests.lease_token(),
            Fallback::new(&self.parts.config, self.parts.control_plane.clone()),
        ) {
            let orchestrator = fallback.orchestrator();
            self.leases
                .hold(lease.clone(), approval.expires_at(), token, orchestrator);
        }
    }

    /// The configuration as the session must know it: whether a token is there decides `not_configured`.
    async fn feed_config(&mut self) {
        let mut session = self.requests.session_config(&self.parts.config).await;
        session.choice = self.choice.clone();
        self.feed(Input::ConfigChanged(Box::new(session)));
    }

    async fn obey(&mut self, command: Command) -> Option<Ended> {
        match command {
            Command::Start(from_afar, done) => {
                let everything = self.parts.config.tunnel.mode == Mode::Device;
                let begins = !self.session.status().wanted;
                if self.rollback.started(from_afar && everything, begins, now()) {
                    tracing::warn!(
                        "started over SSH: this is taken back in {} s unless Start is called once more",
                        rollback::WITHIN.as_secs()
                    );
                }
                self.feed_config().await;
                // The standing choice is part of the configuration, so that it can be changed and lifted later.
                self.feed(Input::Start(Choice::default()));
                self.settle().await;
                answer(done);
            }
            Command::Stop(done) => {
                self.rollback.stopped();
                self.feed(Input::Stop);
                self.settle().await;
                // The caller hears of it once the tunnel is gone; see `publish`.
                self.stopping.push(done);
                self.publish();
            }
            Command::Choose(choice, done) => {
                self.choice = choice;
                self.feed_config().await;
                answer(done);
            }
            Command::Portal(uid, done) => self.let_out(uid, done).await,
            Command::TokenChanged => {
                self.requests.forget_token();
                self.feed(Input::TokenChanged);
                self.feed_config().await;
            }
            Command::Exit(done) => {
                self.parts.audit.record(&Event::Stopped {
                    reason: "Exit was called".to_owned(),
                });
                answer(done);
                return Some(Ended::Exit);
            }
        }
        None
    }

    /// Carries out everything the machine wants, then publishes.
    async fn settle(&mut self) {
        while let Some(action) = self.session.poll_action() {
            self.act(action).await;
        }
        self.leases.follow(self.session.lease());
        if self.configured && status::is_at_rest(self.session.state()) {
            self.clear().await;
        }
        self.follow_login().await;
        self.publish();
    }

    async fn act(&mut self, action: Action) {
        match action {
            Action::Discover(attempt) => {
                let task = self.requests.discover(attempt);
                self.running.insert(attempt, task);
            }
            Action::Probe(attempt, candidates) => {
                let task = self.requests.probe(attempt, candidates);
                self.running.insert(attempt, task);
            }
            Action::Verify(attempt, provider) => {
                let task = self.requests.verify(attempt, provider);
                self.running.insert(attempt, task);
            }
            Action::Approve(attempt, provider, subscription, renews) => {
                let task = self.requests.approve(attempt, *provider, subscription, renews);
                self.running.insert(attempt, task);
            }
            Action::Provision(attempt, subscription) => {
                let fallback = Fallback::new(&self.parts.config, self.parts.control_plane.clone());
                let task = self.requests.provision(attempt, subscription, fallback);
                self.running.insert(attempt, task);
            }
            Action::Cancel(attempt) => {
                if let Some(task) = self.running.remove(&attempt) {
                    task.abort();
                }
            }
            Action::ConfigureTunnel(attempt, approval) => match self.keys.take(approval.client_key()) {
                Some(key) => {
                    self.configured = true;
                    self.order(Order::Configure(attempt, approval, key)).await;
                }
                None => self.feed(Input::TunnelConfigured(attempt, Err(requests::key_lost()))),
            },
            Action::RenewTunnel(attempt, approval) => {
                // A static key stays: the device has nothing to do.
                let key = self.keys.peek(approval.client_key());
                match key {
                    _ if self.requests.has_static_key() => self.feed(Input::TunnelRenewed(attempt, Ok(()))),
                    Some(key) => self.order(Order::Renew(attempt, approval, key)).await,
                    None => self.feed(Input::TunnelRenewed(attempt, Err(requests::key_lost()))),
                }
            }
            Action::Release(release) => self.requests.release(release),
            Action::ForceHandshake(attempt) => self.order(Order::Handshake(attempt)).await,
            Action::ProbeTunnel(attempt) => self.order(Order::Probe(attempt)).await,
            Action::RebindTunnel(attempt) => self.order(Order::Rebind(attempt)).await,
            Action::TearDown(attempt) => self.order(Order::TearDown(attempt)).await,
            Action::SetFirewall(policy) => {
                if let Err(error) = self.parts.host.apply_policy(&policy).await {
                    self.feed(Input::FirewallFailed(requests::firewall_failed(&error)));
                }
            }
            Action::StoreWish(wish) => {
                self.autostart = wish;
                self.requests.store_wish(wish);
            }
            Action::StoreLastEndpoint(endpoint) => self.requests.store_last_endpoint(endpoint),
            Action::StoreSubscription(subscription) => self.requests.store_subscription(subscription),
            Action::Audit(event) => {
                self.parts.audit.record(&event);
            }
        }
    }

    /// Takes the last traces of the tunnel off the machine and waits until they are gone.
    async fn clear(&mut self) {
        self.configured = false;
        let (done, cleared) = oneshot::channel();
        self.order(Order::Clear(done)).await;
        if cleared.await.is_err() {
            tracing::debug!("the tunnel task ended first");
        }
    }

    async fn order(&self, order: Order) {
        if self.orders.send(order).await.is_err() {
            tracing::error!("the tunnel task has ended: restart the daemon");
        }
    }

    fn publish(&mut self) {
        self.running.retain(|_, task| !task.is_finished());
        let mut status = status::of(&self.session, &self.parts.config, self.autostart);
        status.blocking |= self.session.firewall().is_none() && self.found_blocking;
        status::show_login(&mut status, self.login.decided());
        status.confirm_by = self.rollback.due().map(|(_, at)| at);
        status.backend = self.path.borrow().as_ref().and(*self.backend.borrow());
        let flows = status::carries_traffic(status.state);
        let path = if flows { self.path.borrow().clone() } else { None };
        let by = path.as_ref().map(|(attempt, _)| *attempt);
        if by != self.usable_by {
            self.usable_by = by;
            self.usable.send_replace(path.map(|(_, path)| path));
        }
        if !status::is_going_down(status.state) {
            self.stopping.drain(..).for_each(answer);
        }
        self.status.send_if_modified(|published| {
            let changed = *published != status;
            if changed {
                status::log(published, &status);
                *published = status;
            }
            changed
        });
    }

    /// Ends for a successor, which finds the wish stored and everything blocked that is to be.
    fn make_way(self) -> Ended {
        self.parts.audit.record(&Event::Stopped {
            reason: "the service manager restarts the daemon".to_owned(),
        });
        Ended::Exit
    }

    /// Takes the tunnel down without touching the stored wish.
    async fn terminate(mut self) -> Ended {
        self.parts.audit.record(&Event::Stopped {
            reason: "the service manager ended the daemon".to_owned(),
        });
        self.usable.send_replace(None);
        for task in self.running.values() {
            task.abort();
        }
        // The tunnel task may be telling us something that nobody will hear any more: its channel must not fill up.
        self.inputs.close();
        let held = self.session.held();
        self.clear().await;
        let released = tokio::time::timeout(LAST_RELEASE, self.requests.release_last(held));
        let (released, ()) = tokio::join!(released, self.leases.end());
        if !released.unwrap_or(false) {
            tracing::info!("the pool is not told in time that the connection has ended: it finds out by itself");
        }
        if !self.parts.config.tunnel.lockdown
            && let Err(error) = self.parts.host.apply_policy(&dvpn_core::firewall::Policy::Open).await
        {
            tracing::error!("opening the firewall: {error}: dvpn-daemon --cleanup opens it");
        }
        Ended::Terminated
    }
}

fn answer(done: oneshot::Sender<()>) {
    if done.send(()).is_err() {
        tracing::debug!("a caller did not wait for the end of its command");
    }
}
