//! What the operator asked for: one table of settings, and a pure function from texts to [`Config`].
//!
//! Precedence: command line, environment, `/etc/dvpn/dvpn.toml` with its `conf.d`, defaults. Every error is reported,
//! not only the first, and no error shows a secret.

mod choice;
mod document;
mod error;
mod read;
mod remarks;
mod secret;
mod source;
mod table;
mod values;

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use dvpn_common::{
    ids::{ProviderId, Region, UserId},
    keys::{PrivateKey, VerifyingKey},
};
use ipnetwork::IpNetwork;
use url::Url;

pub use choice::parse_choice;
pub use document::{env_example, help_table, markdown_table, toml_example};
pub use error::{Error, Errors};
pub use read::{parse, secret_files};
pub use secret::Secret;
pub use source::Source;
pub use table::{Kind, Owner, SETTINGS, Setting, find};

use crate::{
    Failure, Retry,
    node::Rules,
    payment,
    session::{Choice, SessionConfig},
};

/// The whole configuration, every value checked.
#[expect(clippy::struct_excessive_bools, reason = "independent switches of the operator")]
#[derive(Clone)]
pub struct Config {
    /// `POOL_URL`, without a slash at its end.
    pub pool_url: Option<Url>,
    /// `POOL_PRIVATE`.
    pub pool_private: bool,
    /// `POOL_PUBLIC_KEY`.
    pub pool_public_key: Option<VerifyingKey>,
    /// `PAYMENT_API_URL`, without a slash at its end.
    pub payment_api_url: Option<Url>,
    /// `PAYMENT_TOKEN`.
    pub payment_token: Option<Secret>,
    /// `USER_ID`; the stored one is used when nothing is set.
    pub user_id: Option<UserId>,
    /// `DVPN_DEVELOPMENT`.
    pub development: bool,
    /// `SSL_CERT_FILE`.
    pub ssl_cert_file: Option<PathBuf>,
    /// `MESH_SAMPLE_SIZE`, at least 1.
    pub mesh_sample_size: usize,
    /// `PROVIDERS_ONLY` and `PROVIDERS_EXCLUDE`.
    pub choice: Choice,
    /// The orchestrator.
    pub fallback: FallbackConfig,
    /// The client's tunnel.
    pub tunnel: TunnelSettings,
    /// A network that wants a login.
    pub portal: PortalConfig,
    /// The proxy.
    pub socks5: Socks5Config,
    /// /health and /metrics.
    pub control: ControlConfig,
    /// This install as a provider.
    pub node: NodeConfig,
    /// The line's rate.
    pub bandwidth: BandwidthConfig,
    /// `AUTO_NETWORK_CONFIG`.
    pub auto_network_config: bool,
    /// `UPNP_ENABLED`.
    pub upnp: bool,
    /// `ENABLE_TRAY`.
    pub tray: bool,
    /// `TOKEN_PASSPHRASE`.
    pub token_passphrase: Option<Secret>,
    /// `STATE_DIRECTORY`, the first if systemd gives several.
    pub state_directory: PathBuf,
    /// `BPF_DIRECTORY`.
    pub bpf_directory: PathBuf,
    /// `DVPN_LOG`.
    pub log: String,
}

/// `FALLBACK_…`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FallbackConfig {
    /// `FALLBACK_ENABLED`; then there is an orchestrator.
    pub enabled: bool,
    /// `FALLBACK_SCRIPT_PATH`, absolute.
    pub script: PathBuf,
    /// `FALLBACK_ORCHESTRATOR_URL`.
    pub orchestrator_url: Option<Url>,
    /// `FALLBACK_TIMEOUT_SECONDS`.
    pub timeout: Duration,
    /// `FALLBACK_CA_CERT`.
    pub ca_cert: Option<PathBuf>,
}

/// What goes through the tunnel.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Mode {
    /// What applications send to the proxy.
    #[default]
    App,
    /// Everything that this machine sends or forwards.
    Device,
}

/// The client's tunnel and what may pass beside it.
#[derive(Clone)]
pub struct TunnelSettings {
    /// `WG_PRIVATE_KEY`.
    pub private_key: Option<PrivateKey>,
    /// `WG_ADDRESS`: at most one of each family.
    pub addresses: Vec<IpNetwork>,
    /// `TUNNEL_DNS`.
    pub dns: Vec<IpAddr>,
    /// `TUNNEL_MODE`.
    pub mode: Mode,
    /// `KILL_SWITCH`; never in app mode.
    pub kill_switch: bool,
    /// `LOCKDOWN`; never in app mode.
    pub lockdown: bool,
    /// `ALLOW_LAN`.
    pub allow_lan: bool,
    /// `ALLOW_INBOUND`; nothing means SSH's port when sshd listens.
    pub allow_inbound: Option<Vec<u16>>,
}

/// `CAPTIVE_PORTAL_…`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortalConfig {
    /// `CAPTIVE_PORTAL_URL`.
    pub url: Option<Url>,
    /// `CAPTIVE_PORTAL_SECONDS`.
    pub open_for: Duration,
}

/// `SOCKS5_…`.
#[derive(Clone)]
pub struct Socks5Config {
    /// `SOCKS5_LISTEN`.
    pub listen: SocketAddr,
    /// `SOCKS5_USER` and `SOCKS5_PASSWORD`; always there when `listen` is not loopback.
    pub login: Option<(String, Secret)>,
}

/// `CONTROL_…`.
#[derive(Clone)]
pub struct ControlConfig {
    /// `CONTROL_LISTEN`.
    pub listen: SocketAddr,
    /// `CONTROL_TOKEN`; always there when `listen` is not loopback.
    pub token: Option<Secret>,
}

/// `NODE_…`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeConfig {
    /// `NODE_REGISTER_ENABLED`.
    pub register: bool,
    /// `NODE_ID`; the stored one is used when nothing is set.
    pub id: Option<ProviderId>,
    /// `NODE_REGION`.
    pub region: Option<Region>,
    /// `NODE_PORT`.
    pub port: u16,
    /// `NODE_PROBE_PORT`, never the same as `port`.
    pub probe_port: u16,
    /// `NODE_PUBLIC_ENDPOINT`; a bare address has `port` added.
    pub public_endpoint: Option<SocketAddr>,
    /// `NODE_PUBLIC_PROBE`; a bare address has `probe_port` added.
    pub public_probe: Option<SocketAddr>,
    /// `NODE_ACCEPT_TERMS`: without it this install is no provider.
    pub accept_terms: bool,
    /// `NODE_MAX_PEERS`.
    pub max_peers: u32,
    /// `NODE_MONTHLY_CAP_GB` and `NODE_SCHEDULE`.
    pub rules: Rules,
    /// `NODE_LIMIT_MBPS` in bits per second; nothing means no limit.
    pub limit_bits_per_second: Option<u64>,
}

/// `BANDWIDTH_…`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BandwidthConfig {
    /// `BANDWIDTH_TEST_URL`.
    pub test_url: Option<Url>,
    /// `BANDWIDTH_SAMPLE_SECONDS`.
    pub sample: Duration,
    /// `BANDWIDTH_TOTAL_MBPS` in bits per second; nothing means measure.
    pub total_bits_per_second: Option<u64>,
}

impl Config {
    /// The token in force: the configured one, else the stored one.
    pub fn token<'a>(&'a self, stored: Option<&'a Secret>) -> Option<&'a Secret> {
        self.payment_token.as_ref().or(stored)
    }

    /// What the session machine must know. `stored` is the token that an earlier checkout stored.
    pub fn session(&self, stored: Option<&Secret>) -> SessionConfig {
        SessionConfig {
            not_configured: self.not_configured(stored),
            kill_switch: self.tunnel.kill_switch,
            lockdown: self.tunnel.lockdown,
            sample_size: self.mesh_sample_size,
            choice: self.choice.clone(),
            fallback: self.fallback.enabled,
            fallback_timeout: self.fallback.timeout,
        }
    }

    fn not_configured(&self, stored: Option<&Secret>) -> Option<Failure> {
        let mut missing = Vec::new();
        let mut cures = Vec::new();
        if self.pool_url.is_none() {
            missing.push("pool (POOL_URL)");
            cures.push("set POOL_URL to the pool's provider list");
        }
        if self.payment_api_url.is_none() {
            missing.push("payment server (PAYMENT_API_URL)");
            cures.push("set PAYMENT_API_URL to the pool's payment server");
        }
        let token = self.token(stored);
        if token.is_none() {
            missing.push("payment token");
            cures.push("pay through the D-Bus method Payments, or set PAYMENT_TOKEN_FILE");
        }
        if missing.is_empty() {
            return token.and_then(|token| payment::check_token(token.expose(), self.development).err());
        }
        Some(Failure {
            what: format!("not configured: no {}", missing.join(", no ")),
            how: cures.join("; "),
            retry: Retry::Never,
        })
    }
}

#[cfg(test)]
mod tests;
