//! Starts the provider side, when its owner opted in. It runs beside the client and never holds it up.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use dvpn_common::{ids::ProviderId, keys::PublicKey};
use dvpn_core::{config::Config, keys::public_key};
use tokio::{sync::watch, task::JoinHandle, time::timeout};
use tokio_util::sync::CancellationToken;

use crate::{
    audit::Audit,
    host::Host,
    http,
    provider::{self, ProviderConfig, ProviderStatus, TunnelFactory},
    state::{self, State},
    tunnel::userspace::UserspaceTunnel,
};

/// How long the end of the daemon waits for the provider side to take everything down.
const END_TIMEOUT: Duration = Duration::from_secs(5);

/// Why a node can not be a provider. The client side goes on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `NODE_REGISTER_ENABLED` without `POOL_URL`.
    #[error("NODE_REGISTER_ENABLED needs a pool: set POOL_URL")]
    NoPool,
    /// The stored keys do not open.
    #[error("opening the node's keys")]
    State(#[from] state::Error),
    /// The stored key is none.
    #[error("the provider's key is not usable: remove it from the state directory to make a new one")]
    Key(#[from] dvpn_common::keys::Error),
    /// No HTTPS client.
    #[error("making the HTTPS client")]
    Http(#[from] http::Error),
}

/// The provider side, running.
pub struct Node {
    /// Under which id.
    pub id: ProviderId,
    /// Its key on the provider interface.
    pub public_key: PublicKey,
    /// How it is.
    pub status: watch::Receiver<ProviderStatus>,
    end: CancellationToken,
    task: JoinHandle<()>,
}

impl Node {
    /// Starts it; opens two sealed keys first, which takes a moment.
    pub async fn start(
        config: &Config,
        state: &State,
        host: &Host,
        client: &http::Client,
        audit: &Audit,
    ) -> Result<Self, Error> {
        let pool_url = config.pool_url.clone().ok_or(Error::NoPool)?;
        let private_key = state.provider_key().await?;
        let key = public_key(&private_key)?;
        let id = match &config.node.id {
            Some(id) => id.clone(),
            None => state.node_id()?,
        };
        let pool_key = match config.pool_public_key {
            Some(key) => Some(key),
            None => state.pool_key()?,
        };
        let (status, status_view) = watch::channel(ProviderStatus::default());
        let (pin, events) = (state.clone(), audit.clone());
        let tunnel: TunnelFactory = Arc::new(|config| Box::pin(UserspaceTunnel::create(config)));
        let provider = ProviderConfig {
            node_id: id.clone(),
            identity_seed: state.identity_seed().await?,
            private_key,
            public_key: key,
            pool_url,
            endpoint: config.node.public_endpoint.map(|endpoint| endpoint.to_string()),
            port: config.node.port,
            probe_port: config.node.probe_port,
            public_probe: config.node.public_probe.map(|probe| probe.to_string()),
            region: config.node.region.clone(),
            pool_key,
            pool_key_learned: Arc::new(move |key| {
                if let Err(error) = pin.store_pool_key(&key) {
                    tracing::error!("pinning the pool's key: {error}: it is learned anew at the next start");
                }
            }),
            http: client.inner().await?.clone(),
            host: host.clone(),
            tunnel,
            resolvers: Vec::<SocketAddr>::new(),
            audit: Arc::new(move |event| events.record(&event)),
            status,
        };
        let end = CancellationToken::new();
        let ended = end.clone();
        let task = tokio::spawn(async move {
            if let Err(error) = provider::run(provider, ended).await {
                tracing::error!("this node is no provider any more: {}", crate::run::chain(&error));
            }
        });
        Ok(Self { id, public_key: key, status: status_view, end, task })
    }

    /// Takes everything down and waits for it.
    pub async fn stop(self) {
        self.end.cancel();
        if timeout(END_TIMEOUT, self.task).await.is_err() {
            tracing::warn!("the provider side did not end in time: dvpn-daemon --cleanup removes what is left");
        }
    }
}
