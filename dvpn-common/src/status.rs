//! What the daemon says of itself: the document behind `/health`, the D-Bus properties and the clients' displays.
//! It holds nothing private: no key, token, address of the user or destination.

use std::net::SocketAddr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{
    contract::Reachability,
    ids::{ProviderId, Region},
};

/// The states of a session, by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StateName {
    /// No tunnel wanted, or not possible until something is configured.
    Disconnected,
    /// Asking the pool.
    Discovering,
    /// Measuring latency.
    Probing,
    /// Checking payment and asking for approval.
    Authorizing,
    /// Asking the orchestrator for a fallback provider.
    Provisioning,
    /// Tunnel configured, no handshake yet.
    Connecting,
    /// Traffic flows.
    Connected,
    /// Traffic stalls; being repaired.
    Degraded,
    /// Tunnel going down.
    Disconnecting,
    /// Waiting before the next attempt.
    Backoff,
    /// Refused for good until somebody acts; traffic stays blocked.
    Blocked,
}

impl StateName {
    /// Every state.
    pub const ALL: [Self; 11] = [
        Self::Disconnected,
        Self::Discovering,
        Self::Probing,
        Self::Authorizing,
        Self::Provisioning,
        Self::Connecting,
        Self::Connected,
        Self::Degraded,
        Self::Disconnecting,
        Self::Backoff,
        Self::Blocked,
    ];

    /// The name as it stands in JSON, D-Bus and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Disconnected => "disconnected",
            Self::Discovering => "discovering",
            Self::Probing => "probing",
            Self::Authorizing => "authorizing",
            Self::Provisioning => "provisioning",
            Self::Connecting => "connecting",
            Self::Connected => "connected",
            Self::Degraded => "degraded",
            Self::Disconnecting => "disconnecting",
            Self::Backoff => "backoff",
            Self::Blocked => "blocked",
        }
    }
}

/// How a latency was measured. Figures of different methods are never compared unlabelled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ProbeMethod {
    /// The authenticated UDP echo of [`crate::echo`].
    Echo,
    /// ICMP echo to the endpoint's address.
    Icmp,
}

impl ProbeMethod {
    /// The name as it stands in JSON and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Echo => "echo",
            Self::Icmp => "icmp",
        }
    }
}

/// Where WireGuard runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TunnelBackend {
    /// In the kernel.
    Kernel,
    /// In the daemon, on a TUN.
    Userspace,
}

impl TunnelBackend {
    /// The name as it stands in JSON and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Kernel => "kernel",
            Self::Userspace => "userspace",
        }
    }
}

/// One candidate of the last attempt.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CandidateStatus {
    /// Its id.
    pub id: ProviderId,
    /// Where it stands.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub region: Option<Region>,
    /// Median round trip in milliseconds; nothing if it did not answer.
    pub latency_ms: Option<f64>,
    /// How that was measured.
    pub method: Option<ProbeMethod>,
}

/// What went wrong last, in words a person can act on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// What failed, on what.
    pub what: String,
    /// What to do about it.
    pub how: String,
}

/// What is known of the payment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PaymentStatus {
    /// No token, or never asked.
    Unknown,
    /// Verified and not over.
    Paid,
    /// The payment server says no.
    Unpaid,
}

/// What goes through the tunnel.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ModeName {
    /// What applications send to the proxy.
    #[default]
    App,
    /// Everything that the machine sends or forwards.
    Device,
}

impl ModeName {
    /// The name as it stands in JSON and D-Bus.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::App => "app",
            Self::Device => "device",
        }
    }
}

/// What gives a network away that wants a login.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PortalSign {
    /// It answers a question in the clear with a page of its own.
    Page,
    /// It gives the pool's name an address of its own.
    Name,
    /// Somebody else answers in the pool's place.
    Certificate,
}

/// A network that wants a login, and the opening for that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortalStatus {
    /// What gave it away; nothing when somebody opened without one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sign: Option<PortalSign>,
    /// A user's program is let out to log in, until then at the latest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub open_until: Option<Timestamp>,
}

/// This install as a provider. Nothing in it tells one client from another.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[expect(clippy::struct_excessive_bools, reason = "independent facts, each read by itself")]
pub struct NodeStatus {
    /// Its id at the pool.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<ProviderId>,
    /// The pool answered the last registration.
    pub registered: bool,
    /// Clients are shown this node.
    pub listed: bool,
    /// The pool's event stream is open.
    pub connected: bool,
    /// Interface, firewall and forwarding stand.
    pub up: bool,
    /// `open`, or why clients are not taken.
    pub admission: String,
    /// What the pool found when it tried to reach this node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reachability: Option<Reachability>,
    /// Why clients can not use this node, and what its owner can do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<Problem>,
    /// Clients that are approved.
    pub clients: u64,
    /// Those of them whose connection is active.
    pub active: u64,
    /// Most clients.
    pub max_clients: u32,
    /// Bytes carried for clients this calendar month (UTC), both directions.
    pub month_bytes: u64,
    /// The owner's limit for that; 0 for none.
    pub monthly_cap_bytes: u64,
    /// The owner's limit on the rate for all clients together; not enforced in this version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit_bits_per_second: Option<u64>,
}

/// Where the figures of the line come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LineSource {
    /// `BANDWIDTH_TOTAL_MBPS`.
    Set,
    /// A transfer from and to `BANDWIDTH_TEST_URL`.
    Measured,
    /// Nowhere: they are not known.
    Unmeasured,
}

impl LineSource {
    /// Every source.
    pub const ALL: [Self; 3] = [Self::Set, Self::Measured, Self::Unmeasured];

    /// The name as it stands in JSON, D-Bus and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Set => "set",
            Self::Measured => "measured",
            Self::Unmeasured => "unmeasured",
        }
    }
}

/// This machine's line, and what follows from it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LineStatus {
    /// Where the figures come from.
    pub source: LineSource,
    /// From the internet, layer 3.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub down_bits_per_second: Option<u64>,
    /// To the internet, layer 3.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub up_bits_per_second: Option<u64>,
    /// When it was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub measured_at: Option<Timestamp>,
    /// When it may be measured next, if the time alone decides that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_at: Option<Timestamp>,
    /// How far a measurement under way is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub measuring_percent: Option<u8>,
    /// Why something is not known, and what to do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<Problem>,
    /// All of it in one sentence, and whose grant it is.
    pub summary: String,
}

/// The whole status.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Version of the daemon.
    pub version: String,
    /// Where the session is.
    pub state: StateName,
    /// Since when.
    pub since: Timestamp,
    /// The stored wish: connect again after a restart.
    pub autostart: bool,
    /// What goes through the tunnel.
    #[serde(default)]
    pub mode: ModeName,
    /// True while nothing passes beside the tunnel.
    #[serde(default)]
    pub blocking: bool,
    /// The network wants a login, or somebody is let out for one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub portal: Option<PortalStatus>,
    /// The provider in use or being connected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub provider: Option<CandidateStatus>,
    /// Everything measured in the last attempt.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub candidates: Vec<CandidateStatus>,
    /// What is known of the payment.
    pub payment: PaymentStatus,
    /// When the verified subscription ends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paid_until: Option<Timestamp>,
    /// What went wrong last; nothing while all is well.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<Problem>,
    /// Where applications find the SOCKS5 proxy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socks5: Option<SocketAddr>,
    /// Attempts since the daemon started.
    pub attempts: u64,
    /// Changes of provider without being told to, since the daemon started.
    pub switches: u64,
    /// Where the tunnel's WireGuard runs; nothing while there is no tunnel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backend: Option<TunnelBackend>,
    /// Bytes received from the provider on this tunnel.
    pub rx_bytes: u64,
    /// Bytes sent to the provider on this tunnel.
    pub tx_bytes: u64,
    /// True when the WireGuard key is the configured one and not made fresh.
    pub static_key: bool,
    /// A start over SSH is taken back then, unless Start is called once more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub confirm_by: Option<Timestamp>,
    /// This install as a provider, if its owner opted in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<NodeStatus>,
    /// This machine's line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub line: Option<LineStatus>,
}
