//! What the kernel says of a device, put together from as many messages as it takes. A peer with many prefixes is cut
//! between two of them.

use std::{net::SocketAddr, time::Duration};

use dvpn_common::keys::PublicKey;
use ipnetwork::IpNetwork;
use netlink_packet_core::{DecodeError, NlasIterator, Parseable as _, parse_u16};
use netlink_packet_wireguard::{
    WireguardAllowedIp, WireguardAllowedIpAttr, WireguardAttribute, WireguardPeer, WireguardPeerAttribute,
};

/// `sizeof(struct genlmsghdr)`.
const GENERIC_HEADER_BYTES: usize = 4;
/// `WGDEVICE_A_LISTEN_PORT` and `WGDEVICE_A_PEERS`, include/uapi/linux/wireguard.h.
const LISTEN_PORT: u16 = 6;
const PEERS: u16 = 8;

/// A device as it is.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Device {
    /// Its outer port; 0 while it is down and has none.
    pub(super) listen_port: u16,
    /// In the kernel's order.
    pub(super) peers: Vec<Peer>,
}

/// A peer as it is.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Peer {
    pub(super) public_key: PublicKey,
    pub(super) endpoint: Option<SocketAddr>,
    pub(super) allowed_ips: Vec<IpNetwork>,
    /// Since the Unix epoch, by the machine's clock at that moment.
    pub(super) last_handshake: Option<Duration>,
    pub(super) rx_bytes: u64,
    pub(super) tx_bytes: u64,
}

impl Device {
    /// Adds what one message says (without its netlink header). Our private key, which is in the first, is passed over.
    pub(super) fn merge(&mut self, message: &[u8]) -> Result<(), DecodeError> {
        let attributes = message.get(GENERIC_HEADER_BYTES..).unwrap_or_default();
        for attribute in NlasIterator::new(attributes) {
            let attribute = attribute?;
            match attribute.kind() {
                LISTEN_PORT => self.listen_port = parse_u16(attribute.value())?,
                PEERS => {
                    if let WireguardAttribute::Peers(peers) = WireguardAttribute::parse(&attribute)? {
                        for peer in peers {
                            self.merge_peer(peer);
                        }
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// The second part of a peer has its key and prefixes only, and follows the first.
    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "the crate's enum is open; what is not named is not asked for"
    )]
    fn merge_peer(&mut self, WireguardPeer(attributes): WireguardPeer) {
        let key = attributes.iter().find_map(|attribute| match attribute {
            WireguardPeerAttribute::PublicKey(key) => PublicKey::from_bytes(*key).ok(),
            _ => None,
        });
        let Some(key) = key else { return };
        let mut peer = match self.peers.pop() {
            Some(begun) if begun.public_key == key => begun,
            other => {
                self.peers.extend(other);
                Peer::new(key)
            }
        };
        for attribute in attributes {
            match attribute {
                WireguardPeerAttribute::Endpoint(endpoint) => peer.endpoint = Some(endpoint),
                WireguardPeerAttribute::RxBytes(bytes) => peer.rx_bytes = bytes,
                WireguardPeerAttribute::TxBytes(bytes) => peer.tx_bytes = bytes,
                WireguardPeerAttribute::LastHandshake(at) => {
                    let since = u64::try_from(at.seconds).unwrap_or_default();
                    let nanoseconds = u32::try_from(at.nano_seconds).unwrap_or_default();
                    let since = Duration::from_secs(since).saturating_add(Duration::from_nanos(nanoseconds.into()));
                    peer.last_handshake = Some(since).filter(|since| !since.is_zero());
                }
                WireguardPeerAttribute::AllowedIps(prefixes) => {
                    peer.allowed_ips.extend(prefixes.iter().filter_map(prefix));
                }
                _ => {}
            }
        }
        self.peers.push(peer);
    }
}

impl Peer {
    fn new(public_key: PublicKey) -> Self {
        Self {
            public_key,
            endpoint: None,
            allowed_ips: Vec::new(),
            last_handshake: None,
            rx_bytes: 0,
            tx_bytes: 0,
        }
    }
}

#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "the crate's enum is open; what is not named is not asked for"
)]
fn prefix(WireguardAllowedIp(attributes): &WireguardAllowedIp) -> Option<IpNetwork> {
    let (mut address, mut length) = (None, None);
    for attribute in attributes {
        match attribute {
            WireguardAllowedIpAttr::IpAddr(ip) => address = Some(*ip),
            WireguardAllowedIpAttr::Cidr(bits) => length = Some(*bits),
            _ => {}
        }
    }
    IpNetwork::new(address?, length?).ok()
}
