//! One pool, one watched provider, one client; what they do, and how they are killed and started again.

use std::{
    collections::BTreeSet,
    path::PathBuf,
    process::{Command, Stdio},
    thread::JoinHandle,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, Result, bail, ensure};
use dvpn_common::{keys::PublicKey, status::StateName};
use dvpn_tests::{
    https,
    node::{self, Daemon},
    process::{program, wait_for},
    window::{self, Window},
    world::{CONNECT_PATIENCE, World},
};

use super::{
    journal::Journal,
    watcher::{View, Watcher},
};

/// The shortest that a pool gives: it is renewed at half of it.
const APPROVAL_SECONDS: &str = "20";
/// The claim.
pub(super) const AGREEMENT: Duration = Duration::from_secs(5);

/// What is under way when somebody is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Operation {
    /// A client connects.
    Approve,
    /// A session goes over to a fresh key.
    Renew,
    /// A client stops.
    Release,
    /// The operator revokes a token.
    Revoke,
}

impl Operation {
    pub(super) const ALL: [Self; 4] = [Self::Approve, Self::Renew, Self::Release, Self::Revoke];
}

/// Who is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Victim {
    Pool,
    Provider,
    Client,
}

impl Victim {
    pub(super) const ALL: [Self; 3] = [Self::Pool, Self::Provider, Self::Client];
}

/// An operation under way, if somebody has to wait for it.
pub(super) struct Running(Option<JoinHandle<Result<()>>>);

impl Running {
    fn spawn(work: impl FnOnce() -> Result<()> + Send + 'static) -> Self {
        Self(Some(std::thread::spawn(work)))
    }

    pub(super) fn join(self) -> Result<()> {
        match self.0.map(JoinHandle::join) {
            None => Ok(()),
            Some(Ok(done)) => done,
            Some(Err(_)) => bail!("a thread panicked"),
        }
    }
}

/// Everything. Field order is drop order: the watcher goes before what it watches.
pub(super) struct Bed {
    pub(super) watcher: Watcher,
    pub(super) window: Window,
    pub(super) journal: Journal,
    pub(super) world: World,
    prober: PublicKey,
    /// By which the token in use was paid.
    checkout: String,
}

impl Bed {
    /// A paid client, not connected.
    pub(super) fn build() -> Result<Self> {
        let mut world = World::build(&[8])?;
        world.pool.kill()?;
        world.pool = spawn_pool(&world)?;
        let provider = world.providers.first_mut().context("a provider")?;
        provider.process.stop(Duration::from_secs(10))?;
        let provider = spawn_provider(&world)?;
        *world.providers.first_mut().context("a provider")? = provider;
        node::wait_until_listed(&world.network, &world.ca(), 1, Duration::from_secs(30))?;
        let mut journal = Journal::open(&database(&world))?;
        journal.keep()?;
        ensure!(journal.look()?.is_empty(), "approvals before the first client");
        let mut window = Window::new(&socket(&world));
        let peers = window.peers()?.context("the provider's device")?;
        let &prober = peers.first().context("the pool's own peer")?;
        ensure!(peers.len() == 1, "peers before the first client: {peers:?}");
        let watcher = Watcher::start(View {
            socket: socket(&world),
            database: database(&world),
            prober,
        });
        let mut bed = Self {
            watcher,
            window,
            journal,
            world,
            prober,
            checkout: String::new(),
        };
        bed.pay()?;
        Ok(bed)
    }

    /// Pays for another token and waits until the client has it.
    pub(super) fn pay(&mut self) -> Result<()> {
        let stored = |world: &World| world.client.process.log_text().matches("token_stored").count();
        let before = stored(&self.world);
        self.checkout = self.world.ask().begin_checkout()?;
        https::development_pay(
            &self.world.network.client.namespace,
            &self.world.ca(),
            &node::payment_url(),
            &self.checkout,
        )?;
        wait_for("the token", CONNECT_PATIENCE, || {
            Ok((stored(&self.world) > before).then_some(()))
        })?;
        ensure!(self.journal.has_token(&self.checkout)?, "a token of another checkout");
        Ok(())
    }

    /// The keys that are approved.
    pub(super) fn keys(&mut self) -> Result<BTreeSet<PublicKey>> {
        Ok(self.journal.look()?.keys().copied().collect())
    }

    /// When the client renews the approval that it has just been given: at half of what is left of it.
    pub(super) fn renewal_due(&mut self) -> Result<Instant> {
        let status = self.world.ask().health()?.1;
        ensure!(status.state == StateName::Connected, "{status:?}");
        let since = SystemTime::from(status.since);
        let newest = self.journal.look()?.values().map(|row| row.expires_at).max();
        let newest = u64::try_from(newest.context("an approval")?)?;
        let left = (SystemTime::UNIX_EPOCH + Duration::from_secs(newest)).duration_since(since)?;
        let now = (SystemTime::now(), Instant::now());
        let due = since + left / 2;
        let from_now = due.duration_since(now.0).context("the renewal is due already")?;
        Ok(now.1 + from_now)
    }

    /// Begins what is begun by somebody.
    pub(super) fn begin(&self, operation: Operation) -> Result<Running> {
        let bus = self.world.ask().bus().clone();
        Ok(match operation {
            Operation::Approve => Running::spawn(move || bus.call("Start", &[]).map(drop)),
            Operation::Renew => Running(None),
            Operation::Release => Running::spawn(move || bus.call("Stop", &[]).map(drop)),
            Operation::Revoke => {
                let mut command = Command::new(program("dvpn-pool")?);
                command
                    .args(["revoke", "--checkout", &self.checkout, "--database"])
                    .arg(database(&self.world))
                    .stdin(Stdio::null());
                Running::spawn(move || {
                    let output = command.output().context("running dvpn-pool revoke")?;
                    let error = String::from_utf8_lossy(&output.stderr);
                    ensure!(output.status.success(), "dvpn-pool revoke: {}", error.trim());
                    Ok(())
                })
            }
        })
    }

    /// Whether nothing of an operation is left to do, of which `before` were the keys.
    pub(super) fn is_complete(&mut self, operation: Operation, before: &BTreeSet<PublicKey>) -> Result<bool> {
        Ok(match operation {
            Operation::Approve => {
                let health = self.world.ask().health();
                health.is_ok_and(|(_, status)| status.state == StateName::Connected)
            }
            // The fresh key is there and the old one was given back.
            Operation::Renew => {
                let now = self.keys()?;
                !now.is_empty() && now.is_disjoint(before)
            }
            Operation::Release => self.journal.look()?.values().all(|row| row.released),
            Operation::Revoke => self.journal.look()?.is_empty() && self.peers()?.is_some_and(|peers| peers.is_empty()),
        })
    }

    /// Kills by SIGKILL.
    pub(super) fn kill(&mut self, victim: Victim) -> Result<()> {
        match victim {
            Victim::Pool => {
                self.watcher.trouble();
                self.world.pool.kill()
            }
            Victim::Provider => {
                self.watcher.trouble();
                let provider = self.world.providers.first_mut().context("a provider")?;
                provider.process.kill()
            }
            Victim::Client => self.world.client.process.kill(),
        }
    }

    /// Starts it again as it was started, and waits until it is ready.
    pub(super) fn restart(&mut self, victim: Victim) -> Result<()> {
        match victim {
            Victim::Pool => self.world.pool = spawn_pool(&self.world)?,
            Victim::Provider => {
                let provider = spawn_provider(&self.world)?;
                *self.world.providers.first_mut().context("a provider")? = provider;
            }
            Victim::Client => {
                let network = &self.world.network;
                let environment = self.world.client.environment.clone();
                self.world.client = Daemon::spawn(network, &network.client, environment)?;
            }
        }
        self.watcher.calm();
        Ok(())
    }

    /// Waits until everybody agrees, at most `patience` from `ready` on; how long it took.
    pub(super) fn agree(&mut self, ready: Instant, operation: Operation, patience: Duration) -> Result<Duration> {
        loop {
            let unsettled = self.unsettled(operation)?;
            let took = ready.elapsed();
            let Some(why) = unsettled else { return Ok(took) };
            ensure!(took <= patience, "no agreement within {patience:?}: {why}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn unsettled(&mut self, operation: Operation) -> Result<Option<String>> {
        if operation == Operation::Revoke && self.journal.look()?.values().any(|row| row.revoked_at.is_some()) {
            return Ok(Some("the pool has approvals of a revoked token".to_owned()));
        }
        self.disagreement()
    }

    /// In what the pool's database, the node and its device differ; nothing if they agree.
    ///
    /// A key that was renewed may be a peer until it goes, and need not be: the node drops it with the first handshake
    /// of its renewal, of which the pool is not told.
    pub(super) fn disagreement(&mut self) -> Result<Option<String>> {
        let approved = self.journal.look()?.clone();
        let Some(peers) = self.peers()? else {
            return Ok(Some("the provider has no device".to_owned()));
        };
        let provider = self.world.providers.first().context("a provider")?;
        let Some(node) = provider.client.health().ok().and_then(|(_, status)| status.node) else {
            return Ok(Some("the provider does not say how it is".to_owned()));
        };
        if *self.journal.look()? != approved {
            return Ok(Some("the pool's database changes".to_owned()));
        }
        let connections: BTreeSet<i64> = approved.values().map(|row| row.host).collect();
        if let Some(stray) = peers.iter().find(|key| !approved.contains_key(key)) {
            return Ok(Some(format!("the device has {stray}, which is not approved")));
        }
        let missing = approved
            .iter()
            .find(|(key, row)| row.remove_at.is_none() && !peers.contains(key));
        if let Some((key, row)) = missing {
            return Ok(Some(format!("{key} is approved and no peer: {row:?}")));
        }
        if node.clients != u64::try_from(connections.len())? {
            let (says, are) = (node.clients, connections.len());
            return Ok(Some(format!("the node says {says} clients, the pool has {are}")));
        }
        Ok(None)
    }

    fn peers(&mut self) -> Result<Option<BTreeSet<PublicKey>>> {
        let mut peers = self.window.peers()?;
        if let Some(peers) = &mut peers {
            peers.remove(&self.prober);
        }
        Ok(peers)
    }

    /// The end of every log.
    pub(super) fn logs(&self) -> String {
        let provider = self.world.providers.first().map(|daemon| daemon.process.log_tail());
        format!(
            "--- pool\n{}\n--- provider\n{}\n--- client\n{}",
            self.world.pool.log_tail(),
            provider.unwrap_or_default(),
            self.world.client.process.log_tail()
        )
    }
}

fn database(world: &World) -> PathBuf {
    world.network.pool.directory.join("pool.sqlite")
}

fn socket(world: &World) -> PathBuf {
    world.network.directory.join("window.socket")
}

fn spawn_pool(world: &World) -> Result<dvpn_tests::process::Process> {
    node::spawn_pool_with(
        &world.network,
        &world.identity,
        &["--approval-seconds", APPROVAL_SECONDS],
    )
}

/// The provider, with a window onto its device.
fn spawn_provider(world: &World) -> Result<Daemon> {
    let machine = world.network.providers.first().context("a provider's machine")?;
    let environment = node::provider_environment(machine, &world.ca()).with(window::VARIABLE, socket(world));
    let watched = program("watched-daemon")?;
    Daemon::spawn_by(&world.network, machine, environment, |daemon| {
        let mut command = Command::new(watched);
        command.args(daemon.get_args()).env_clear();
        command.envs(daemon.get_envs().filter_map(|(name, value)| Some((name, value?))));
        command
    })
}
