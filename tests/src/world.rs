//! The local network with everything running in it.

use std::{
    fs::File,
    net::Ipv4Addr,
    path::PathBuf,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use anyhow::{Context as _, Result};
use dvpn_common::status::{PaymentStatus, Status};

use crate::{
    certs::{Authority, Identity},
    client::Client,
    https,
    network::{Machine, Network, NetworkConfig, POOL},
    node::{self, Daemon, Environment},
    process::Process,
    snapshot, sweep,
};

/// How long a session may take to stand, on a machine that is busy with other tests.
pub const CONNECT_PATIENCE: Duration = Duration::from_secs(20);

/// An id that no other network of this machine has.
pub fn unique_id() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("t{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// Everything running. Field order is drop order: the client first, its network last.
pub struct World {
    /// The client's daemon.
    pub client: Daemon,
    /// The providers' daemons, in the order of the network's machines.
    pub providers: Vec<Daemon>,
    /// The pool.
    pub pool: Process,
    /// The web server beyond the providers.
    pub web: Process,
    /// Who signs certificates here.
    pub authority: Authority,
    /// The pool's certificate.
    pub identity: Identity,
    /// The client's machine before its daemon was first started.
    pub client_before: String,
    /// The first provider's machine before its daemon was first started.
    pub provider_before: String,
    /// The network itself.
    pub network: Network,
    _alone: File,
}

impl World {
    /// One client, a pool, and providers at these round-trip times. No other world runs beside it.
    pub fn build(round_trips_ms: &[u64]) -> Result<Self> {
        Self::build_with(
            &NetworkConfig::with_round_trips(&unique_id(), round_trips_ms),
            |environment| environment,
        )
    }

    /// The same with the network as given and the client told something else.
    pub fn build_with(config: &NetworkConfig, told: impl FnOnce(Environment) -> Environment) -> Result<Self> {
        let alone = sweep::exclusive()?;
        let network = Network::build(config)?;
        let authority = Authority::create(&network.directory.join("certs"))?;
        let identity = authority.issue("pool", &[POOL.into()], &["pool.dvpn.test"])?;
        let ca = authority.certificate();
        let web = node::spawn_web(&network)?;
        let pool = node::spawn_pool(&network, &identity)?;
        let look = |machine: &Machine| snapshot::take(&machine.namespace, &network.bpf_directory(machine));
        let client_before = look(&network.client)?;
        let provider_before = network.providers.first().map(look).transpose()?.unwrap_or_default();
        let mut providers = Vec::new();
        for machine in &network.providers {
            providers.push(Daemon::spawn(
                &network,
                machine,
                node::provider_environment(machine, &ca),
            )?);
        }
        node::wait_until_listed(&network, &ca, providers.len(), Duration::from_secs(30))
            .with_context(|| format!("the pool says:\n{}", pool.log_tail()))?;
        let client = Daemon::spawn(&network, &network.client, told(node::client_environment(&ca)))?;
        client.client.check_no_way_around()?;
        Ok(Self {
            client,
            providers,
            pool,
            web,
            authority,
            identity,
            client_before,
            provider_before,
            network,
            _alone: alone,
        })
    }

    /// The way to ask the client.
    pub fn ask(&self) -> &Client {
        &self.client.client
    }

    /// The certificate that everybody trusts.
    pub fn ca(&self) -> PathBuf {
        self.authority.certificate()
    }

    /// Pays with the development payment and waits for the token.
    pub fn pay(&self) -> Result<()> {
        let checkout = self.ask().begin_checkout()?;
        https::development_pay(
            &self.network.client.namespace,
            &self.ca(),
            &node::payment_url(),
            &checkout,
        )?;
        self.ask().wait_status("the token", Duration::from_secs(20), |status| {
            status.payment == PaymentStatus::Paid || status.problem.is_none()
        })?;
        Ok(())
    }

    /// Pays, starts and waits until traffic may flow; with the log's end when that fails.
    pub fn pay_and_connect(&self) -> Result<Status> {
        self.pay()
            .and_then(|()| self.ask().connect(CONNECT_PATIENCE))
            .with_context(|| format!("the client's log ends:\n{}", self.client.process.log_tail()))
    }

    /// Where the provider with this id stands among the machines.
    pub fn provider_number(&self, id: &str) -> Result<usize> {
        let found = self.network.providers.iter().position(|machine| machine.name == id);
        found.with_context(|| format!("no provider {id} in this network"))
    }

    /// The machine of the provider with this id.
    pub fn provider_machine(&self, id: &str) -> Result<&Machine> {
        let number = self.provider_number(id)?;
        self.network.providers.get(number).context("a provider's machine")
    }

    /// The outer address of the provider that a status names.
    pub fn address_of(&self, status: &Status) -> Result<Ipv4Addr> {
        let provider = status.provider.as_ref().context("the status names no provider")?;
        Ok(self.provider_machine(provider.id.as_str())?.address)
    }
}
