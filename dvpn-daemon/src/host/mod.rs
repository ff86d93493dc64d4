//! The only module that changes the machine. It executes no tc, nft, ip or wg.
//!
//! Whatever it makes can be told from what others made, so that it never touches theirs and [`Host::cleanup`] finds
//! its own even after `kill -9`: interface names ([`CLIENT_INTERFACE`], [`PROVIDER_INTERFACE`]), one routing table
//! ([`ROUTING_TABLE`]), one protocol number on rules and routes ([`PROTOCOL`]), two nftables tables
//! ([`CLIENT_TABLE`], [`PROVIDER_TABLE`]). Changed kernel settings are remembered as comments in the nftables table,
//! which lives exactly as long as they do: until removed, or until the machine stops.

mod changes;
mod cleanup;
mod client;
mod client_policy;
pub mod dns;
mod exposure;
mod forwarding;
mod here;
mod metered;
mod neighbours;
mod netlink;
mod nft;
mod portal_opening;
mod provider;
mod provider_meter;
mod provider_policy;
pub mod shaping;
mod watch;
mod way_out;

use std::{collections::BTreeMap, io, path::PathBuf, sync::Arc};

use ipnetwork::IpNetwork;
use tokio::sync::Mutex;
use tokio_util::task::AbortOnDropHandle;

pub use changes::NetworkChanges;
pub use client::{ClientNetwork, DeviceConfig};
pub use client_policy::{
    BLOCKED_IN, BLOCKED_OUT, DESTINATION_ELSEWHERE, FOREIGN_SOURCE, SOURCE_ELSEWHERE, UNSOLICITED,
};
pub use exposure::Exposure;
pub use metered::is_metered;
pub use nft::read::CounterValue;
pub use portal_opening::PortalOpening;
pub use provider::ProviderNetwork;
pub use provider_meter::{CONNECTION_BURST, CONNECTIONS_PER_SECOND, Carried, MAX_CONNECTIONS};
pub use provider_policy::refused;
pub use shaping::{Grant, Mode, Modes, PeerNumber, Shaper, ShaperConfig};

pub use crate::tunnel::{CLIENT_INTERFACE, PROVIDER_INTERFACE};

/// Routing table of everything that goes through the tunnel.
pub const ROUTING_TABLE: u32 = 0x0d01;
/// In device mode, where IPv4 leads that is bound to an interface beside the tunnel.
pub const NOBODY_TABLE: u32 = 0x0d02;
/// Protocol number (`rtm_protocol`, `FRA_PROTOCOL`) of our routes and rules; free in iproute2's `rt_protos`.
pub const PROTOCOL: u8 = 213;
/// Priority of our rules: before wg-quick's (32764), Tailscale's (5210) and the main table's (32766).
pub const RULE_PRIORITY: u32 = 0x0d01;
/// nftables table (family inet) of the client side.
pub const CLIENT_TABLE: &str = "dvpn";
/// nftables table (family inet) of the provider side.
pub const PROVIDER_TABLE: &str = "dvpn_provider";

/// What could not be done to the machine.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No rtnetlink.
    #[error("opening rtnetlink: is this a Linux kernel with networking?")]
    Open(#[source] io::Error),
    /// A question to rtnetlink failed.
    #[error("reading {what} by rtnetlink")]
    Read {
        /// Which objects.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: rtnetlink::Error,
    },
    /// An interface that must exist does not.
    #[error("there is no interface {0}: bring up the tunnel first")]
    NoInterface(String),
    /// An interface by our name that is neither a TUN nor a WireGuard link.
    #[error("the interface {name} is a {kind}, not ours; it was left alone: rename or remove it")]
    ForeignInterface {
        /// Its name.
        name: String,
        /// What it is.
        kind: String,
    },
    /// A change by rtnetlink failed.
    #[error("{what}: give the daemon CAP_NET_ADMIN")]
    Change {
        /// What was to be changed, and where.
        what: String,
        /// What the kernel said.
        #[source]
        source: rtnetlink::Error,
    },
    /// An nftables transaction failed; nothing of it was applied.
    #[error("changing the nftables table {table}: give the daemon CAP_NET_ADMIN and the kernel nf_tables")]
    Firewall {
        /// Which.
        table: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Counters or comments could not be read.
    #[error("reading the nftables table {table}")]
    FirewallRead {
        /// Which.
        table: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A kernel setting could not be read or written.
    #[error("setting {path}: give the daemon write access to /proc/sys/net")]
    Setting {
        /// Which.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A pin could not be removed.
    #[error("removing the eBPF pin {path}")]
    Pin {
        /// Which.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The folder of pins is no BPF file system: nothing in it was touched.
    #[error("{0} is not on a BPF file system and was left alone: set BPF_DIRECTORY")]
    NotBpf(PathBuf),
    /// A blocking firewall in app mode.
    #[error("blocking all traffic needs device mode: set TUNNEL_MODE=device")]
    NotInAppMode,
    /// The eBPF programs that enforce grants.
    #[error(transparent)]
    Programs(Box<crate::ebpf::Error>),
    /// The thread that attaches programs ended with them.
    #[error("the programs that enforce grants are lost: restart the daemon")]
    NoShaper,
    /// Name resolution could not be put back.
    #[error(transparent)]
    Dns(#[from] dns::Error),
    /// Provider operations before `provider_up`.
    #[error("the provider interface is not up")]
    ProviderDown,
}

impl From<crate::ebpf::Error> for Error {
    fn from(error: crate::ebpf::Error) -> Self {
        Self::Programs(Box::new(error))
    }
}

/// A handle on the machine's network. Cheap to clone.
#[derive(Clone)]
pub struct Host {
    inner: Arc<Inner>,
}

struct Inner {
    rtnetlink: rtnetlink::Handle,
    /// What `provider_up` was given; also makes changes of the provider's side one at a time.
    provider: Mutex<Option<ProviderNetwork>>,
    /// What the client's side should be; also makes changes of it one at a time.
    client: Mutex<client::ClientSide>,
    _connection: AbortOnDropHandle<()>,
}

impl Host {
    /// Opens rtnetlink. Needs a tokio runtime; its threads decide which network namespace this is about.
    pub fn open() -> Result<Self, Error> {
        let (connection, rtnetlink, _) = rtnetlink::new_connection().map_err(Error::Open)?;
        let connection = AbortOnDropHandle::new(tokio::spawn(connection));
        Ok(Self {
            inner: Arc::new(Inner {
                rtnetlink,
                provider: Mutex::new(None),
                client: Mutex::default(),
                _connection: connection,
            }),
        })
    }

    /// Every refusal counter of the provider's table, by name; empty while it is down.
    ///
    /// Totals run from `provider_up` to `provider_down`.
    pub fn provider_counters(&self) -> Result<BTreeMap<String, CounterValue>, Error> {
        counters(PROVIDER_TABLE)
    }

    /// The counters of the client's table, by name: [`BLOCKED_OUT`] and the like; empty while there is none.
    pub fn client_counters(&self) -> Result<BTreeMap<String, CounterValue>, Error> {
        counters(CLIENT_TABLE)
    }

    fn netlink(&self) -> &rtnetlink::Handle {
        &self.inner.rtnetlink
    }
}

fn counters(table: &'static str) -> Result<BTreeMap<String, CounterValue>, Error> {
    nft::read::counters(table).map_err(|source| Error::FirewallRead { table, source })
}

/// The address of a prefix alone: `10.96.0.1/20` becomes `10.96.0.1/32`.
fn host_prefix(network: &IpNetwork) -> IpNetwork {
    IpNetwork::from(network.ip())
}
