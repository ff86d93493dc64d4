//! WireGuard devices behind one trait, so that kernel and userspace backends are interchangeable.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Once,
    time::Duration,
};

use dvpn_common::{
    keys::{PrivateKey, PublicKey},
    status::TunnelBackend,
};
use futures::future::BoxFuture;
use ipnetwork::IpNetwork;
use tokio::sync::watch;

pub mod kernel;
pub mod userspace;

/// Name of the interface on which we are a client.
pub const CLIENT_INTERFACE: &str = "dvpn0";
/// Name of the interface on which we are a provider.
pub const PROVIDER_INTERFACE: &str = "dvpnp0";
/// Mark of every packet that the daemon itself sends outside the tunnel.
pub const FWMARK: u32 = 0x0d00_0000;
/// The bits of a packet's mark that are ours; the others are anybody's.
pub const FWMARK_MASK: u32 = 0xff00_0000;
/// Inner MTU when nothing better is known: 1500 − 80.
pub const DEFAULT_MTU_BYTES: u16 = 1420;
/// The least MTU that IPv6 allows (RFC 8200, section 5).
pub const MIN_MTU_BYTES: u16 = 1280;

/// A device as it should be.
pub struct TunnelConfig {
    /// Interface name, at most 15 bytes.
    pub interface: String,
    /// Our key.
    pub private_key: PrivateKey,
    /// Outer UDP port; 0 takes any.
    pub listen_port: u16,
    /// Mark on outer packets.
    pub fwmark: u32,
    /// Inner MTU in bytes.
    pub mtu_bytes: u16,
    /// Peers from the start.
    pub peers: Vec<PeerConfig>,
    /// Let the kernel segment and join packets (TUN `vnet_hdr`, `UDP_SEGMENT`, `UDP_GRO`). On unless a
    /// driver is found that gets it wrong.
    pub offload: bool,
}

/// A peer as it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerConfig {
    /// Its key.
    pub public_key: PublicKey,
    /// Its outer address; a provider learns its clients' from their handshakes.
    pub endpoint: Option<SocketAddr>,
    /// Inner prefixes routed to it and accepted from it.
    pub allowed_ips: Vec<IpNetwork>,
    /// Persistent keepalive.
    pub keepalive: Option<Duration>,
}

/// The next key of a standing tunnel.
pub struct Renewal {
    /// Our new key; the peer gives our tunnel addresses to it at its first handshake.
    pub private_key: PrivateKey,
    /// The peer, as before.
    pub peer: PeerConfig,
    /// Our tunnel address.
    pub source: IpAddr,
    /// The peer's own address inside the tunnel, of the same family: it answers pings.
    pub gateway: IpAddr,
}

/// A peer as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerStats {
    /// Its key.
    pub public_key: PublicKey,
    /// Where its last authenticated packet came from.
    pub endpoint: Option<SocketAddr>,
    /// Age of the last handshake. One that the peer began counts from its first transport packet on.
    pub last_handshake: Option<Duration>,
    /// Bytes received from it.
    pub rx_bytes: u64,
    /// Bytes sent to it.
    pub tx_bytes: u64,
}

/// Why a tunnel operation failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The interface could not be made.
    #[error(
        "creating the tunnel interface {interface}: give the daemon CAP_NET_ADMIN, and a kernel with WireGuard or \
         /dev/net/tun"
    )]
    Create {
        /// Which.
        interface: String,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// The outer UDP socket could not be opened.
    #[error("opening the WireGuard socket on UDP port {port}")]
    Socket {
        /// Which.
        port: u16,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// The link was made but could not be set up.
    #[error("setting up the tunnel interface {interface}: is CAP_NET_ADMIN still held?")]
    Link {
        /// Which.
        interface: String,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// No such peer.
    #[error("no peer {0} on this tunnel")]
    NoPeer(PublicKey),
    /// The peer has neither a configured nor a learned outer address.
    #[error("peer {0} has no endpoint yet: it has to call first")]
    NoEndpoint(PublicKey),
    /// No answer to a handshake in time.
    #[error("no handshake with {0} within {1:?}")]
    NoHandshake(PublicKey, Duration),
    /// The gateway cannot be asked from this address.
    #[error("{gateway} cannot be asked from {ours} whether the tunnel moved to its new key")]
    NoGateway {
        /// Our address.
        ours: IpAddr,
        /// The peer's.
        gateway: IpAddr,
    },
    /// The peer did not give our addresses to the new key.
    #[error("{gateway} did not answer under the new key within {within:?}: the tunnel stays on the old one")]
    NotMoved {
        /// The peer's address inside the tunnel.
        gateway: IpAddr,
        /// How long was waited.
        within: Duration,
    },
    /// The device does not answer any more.
    #[error("the tunnel device {0} has stopped")]
    Stopped(String),
}

/// Makes a device: in the kernel where that has WireGuard, which making the link tells, else in this process. Why not in
/// the kernel is logged once.
pub async fn create(config: TunnelConfig) -> Result<Box<dyn Tunnel>, Error> {
    static SAID: Once = Once::new();
    match kernel::Link::create(&config.interface, config.mtu_bytes).await {
        Ok(link) => kernel::KernelTunnel::on(link, config).await,
        Err(error) if has_no_wireguard(&error) => {
            SAID.call_once(|| tracing::info!("WireGuard runs in this process, as this kernel has none: {error}"));
            userspace::UserspaceTunnel::create(config).await
        }
        Err(source) => Err(Error::Create {
            interface: config.interface,
            source,
        }),
    }
}

/// Link kinds nobody has registered are `EOPNOTSUPP`; sandboxes that imitate a kernel answer otherwise.
fn has_no_wireguard(error: &std::io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(
            libc::EOPNOTSUPP | libc::ENOENT | libc::ENOSYS | libc::EINVAL | libc::EAFNOSUPPORT | libc::EPROTONOSUPPORT
        )
    )
}

/// Waits until a backend says why its device can go on no more.
async fn reason_of_death(mut death: watch::Receiver<Option<String>>) -> String {
    match death.wait_for(Option::is_some).await {
        Ok(reason) => reason.clone().unwrap_or_default(),
        Err(_closed) => "the device was stopped".to_owned(),
    }
}

/// A running WireGuard device. Dropping it takes the interface down; [`Tunnel::close`] waits until it is gone.
pub trait Tunnel: Send + Sync {
    /// The interface's name.
    fn interface(&self) -> &str;
    /// Where packets are encrypted.
    fn backend(&self) -> TunnelBackend;
    /// Adds or replaces peers.
    fn set_peers(&self, peers: Vec<PeerConfig>) -> BoxFuture<'_, Result<(), Error>>;
    /// Removes a peer; one that is not there is no error.
    fn remove_peer(&self, peer: PublicKey) -> BoxFuture<'_, Result<(), Error>>;
    /// All peers as they are.
    fn stats(&self) -> BoxFuture<'_, Result<Vec<PeerStats>, Error>>;
    /// Shakes hands now and waits for the answer, at most `timeout`.
    fn force_handshake(&self, peer: PublicKey, timeout: Duration) -> BoxFuture<'_, Result<(), Error>>;
    /// Replaces the outer socket.
    fn rebind(&self) -> BoxFuture<'_, Result<(), Error>>;
    /// Goes over to a new key while traffic flows. After an error the old key is in use as before. Takes some round trips
    /// and half a second. In userspace no packet is lost; in the kernel those are that the peer receives under the new
    /// key before it has given our addresses to it, and those beyond 128 that are sent until hands are shaken.
    fn renew(&self, renewal: Renewal) -> BoxFuture<'_, Result<(), Error>>;
    /// The outer port in use.
    fn listen_port(&self) -> BoxFuture<'_, Result<u16, Error>>;
    /// Resolves when the device has died by itself: socket error, interface deleted.
    fn died(&self) -> BoxFuture<'_, String>;
    /// Takes everything down and waits until the interface is gone.
    fn close(self: Box<Self>) -> BoxFuture<'static, ()>;
}
