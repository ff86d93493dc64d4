//! The provider side of a node: registration, approved clients as WireGuard peers, NAT, DNS at the gateway, the echo.
//!
//! The pool says who may come; each approval is checked here before it becomes a peer, and ends here when its time is
//! over, whether or not the pool still speaks. The firewall stands before the first peer and falls after the last.

mod acks;
mod admission;
mod dns;
mod echo;
mod events;
mod grants;
mod identity;
mod limiter;
mod memory;
mod network;
mod node;
mod pinned;
mod pool;
mod registration;
mod roster;
mod serials;
mod status;
mod stream;
mod verdict;
mod volume;

use std::{net::SocketAddr, sync::Arc};

use dvpn_common::{
    ids::{ProviderId, Region},
    keys::{PrivateKey, PublicKey, VerifyingKey},
};
use dvpn_core::{
    line::Known,
    node::{Rules, Usage},
};
use futures::future::BoxFuture;
use reqwest::Url;
use tokio::sync::watch;
use zeroize::Zeroizing;

pub use admission::{Admitted, Ground, Refusal};
pub use dns::{Forwarder, system_resolvers};
pub use echo::{EchoResponder, EchoStats};
pub use grants::Enforcement;
pub use identity::Identity;
pub use memory::Memory;
pub use network::{NetworkError, check_networks};
pub use node::run;
pub use pool::Error as PoolError;
pub use roster::MAX_PEERS;
pub use serials::{Change, Serials};
pub use status::{Event, PeerStatus, ProviderStatus};

use crate::{
    ebpf::Loader,
    host::{self, Host},
    tunnel::{self, Tunnel, TunnelConfig},
};

/// Makes the provider's WireGuard device.
pub type TunnelFactory =
    Arc<dyn Fn(TunnelConfig) -> BoxFuture<'static, Result<Box<dyn Tunnel>, tunnel::Error>> + Send + Sync>;

/// What a node needs to know to be a provider. No Debug: it holds two private keys.
pub struct ProviderConfig {
    /// `NODE_ID`.
    pub node_id: ProviderId,
    /// Ed25519 seed of the node's identity.
    pub identity_seed: Zeroizing<[u8; 32]>,
    /// Key of the provider interface.
    pub private_key: PrivateKey,
    /// Its public half.
    pub public_key: PublicKey,
    /// `POOL_URL`.
    pub pool_url: Url,
    /// `NODE_PUBLIC_ENDPOINT`; discovered when left out.
    pub endpoint: Option<String>,
    /// `NODE_PORT`: the outer UDP port.
    pub port: u16,
    /// `NODE_PROBE_PORT`: the echo's UDP port.
    pub probe_port: u16,
    /// `NODE_PUBLIC_PROBE`; the endpoint's address with the probe port when left out.
    pub public_probe: Option<String>,
    /// `NODE_REGION`.
    pub region: Option<Region>,
    /// The pool's key, if configured or learned before.
    pub pool_key: Option<VerifyingKey>,
    /// Keeps what must outlive a restart.
    pub memory: Arc<dyn Memory>,
    /// Serials from before a restart.
    pub serials: Serials,
    /// Volume of the month from before a restart.
    pub usage: Option<Usage>,
    /// `NODE_MAX_PEERS`.
    pub max_peers: u32,
    /// `NODE_MONTHLY_CAP_GB` and `NODE_SCHEDULE`.
    pub rules: Rules,
    /// `NODE_LIMIT_MBPS` in bits per second.
    pub limit_bits_per_second: Option<u64>,
    /// What this machine's line carries; without it there is nothing to grant, and no clients are taken.
    pub line: watch::Receiver<Known>,
    /// Loads the programs that enforce grants.
    pub loader: Loader,
    /// The owner's hand: true takes no new clients.
    pub drained: watch::Receiver<bool>,
    /// A client with connect and total time limits, no redirects, our roots.
    pub http: reqwest::Client,
    /// The machine.
    pub host: Host,
    /// Where the device comes from.
    pub tunnel: TunnelFactory,
    /// Where clients' DNS questions go; the machine's resolvers when empty.
    pub resolvers: Vec<SocketAddr>,
    /// Told of everything worth recording.
    pub audit: Arc<dyn Fn(Event) + Send + Sync>,
    /// Kept up to date.
    pub status: watch::Sender<ProviderStatus>,
}

/// Why being a provider ended. Everything is taken down before this is returned.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The seed is no Ed25519 key.
    #[error("the node's identity is no Ed25519 seed: remove it from the state directory to make a new one")]
    Identity,
    /// The probe port is taken.
    #[error("opening the echo on UDP port {port}: free it or set NODE_PROBE_PORT")]
    Echo {
        /// Which.
        port: u16,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// The WireGuard device failed.
    #[error("the provider's tunnel failed")]
    Tunnel(#[source] tunnel::Error),
    /// The WireGuard device died by itself.
    #[error("the provider's tunnel died: {0}")]
    TunnelDied(String),
    /// Somebody flushed our nftables table: clients would reach what they must not.
    #[error("the nftables table of the provider side is gone: another program flushed the ruleset")]
    FirewallGone,
    /// The machine could not be configured.
    #[error("configuring the machine for provider traffic")]
    Host(#[source] host::Error),
}
