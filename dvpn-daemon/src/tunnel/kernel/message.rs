//! Messages to the kernel, each within the limits of netlink: the length of an attribute is 16 bits, and a longer one
//! wraps silently.

use std::net::IpAddr;

use dvpn_common::keys::{PrivateKey, PublicKey};
use ipnetwork::IpNetwork;
use netlink_packet_core::{
    Emitable, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload, NetlinkSerializable,
};
use netlink_packet_generic::{
    GenlMessage,
    ctrl::{GenlCtrl, GenlCtrlCmd, nlas::GenlCtrlAttrs},
};
use netlink_packet_wireguard::{
    WireguardAddressFamily, WireguardAllowedIp, WireguardAllowedIpAttr, WireguardAttribute, WireguardCmd,
    WireguardMessage, WireguardPeer, WireguardPeerAttribute, WireguardPeerFlags,
};
use zeroize::{Zeroize, Zeroizing};

use crate::tunnel::PeerConfig;

/// The kernel takes a key agreement for each new peer while it holds the lock of all network configuration: some
/// 10 ms for as many.
const PEERS_A_MESSAGE: usize = 200;
/// Room for the value of the attribute that holds all peers; `nla_len` counts its header too.
const PEERS_BYTES: usize = (u16::MAX - 4) as usize & !3;
/// Prefixes of one peer in one message: 40 bytes each at most, so that a peer of its own always fits.
const PREFIXES_A_MESSAGE: usize = 1000;

/// What is to become of a peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum PeerChange {
    /// It is there, like this. Without an endpoint it keeps the one it has.
    Set {
        /// How.
        peer: PeerConfig,
        /// Take away prefixes that it has from before.
        replace_prefixes: bool,
    },
    /// If it is there, it sends something now: an empty packet, or the handshake it lacks.
    Wake {
        /// Which.
        public_key: PublicKey,
        /// Its persistent keepalive in seconds; 0 is none.
        keepalive: u16,
    },
    /// It is not there.
    Remove(PublicKey),
}

/// `peer.keepalive` as WireGuard counts it; 0 is none.
pub(super) fn keepalive_seconds(peer: &PeerConfig) -> u16 {
    peer.keepalive
        .map_or(0, |keepalive| u16::try_from(keepalive.as_secs()).unwrap_or(u16::MAX))
}

/// The changes in their order, cut into lists of which each fits into one message.
pub(super) fn chunks(changes: impl IntoIterator<Item = PeerChange>) -> Vec<Vec<WireguardPeer>> {
    let mut chunks = Vec::new();
    let (mut chunk, mut bytes) = (Vec::new(), 0);
    for piece in changes.into_iter().flat_map(pieces) {
        let size = piece.buffer_len();
        if chunk.len() == PEERS_A_MESSAGE || bytes + size > PEERS_BYTES {
            chunks.push(std::mem::take(&mut chunk));
            bytes = 0;
        }
        bytes += size;
        chunk.push(piece);
    }
    if !chunk.is_empty() {
        chunks.push(chunk);
    }
    chunks
}

fn pieces(change: PeerChange) -> Vec<WireguardPeer> {
    match change {
        PeerChange::Set { peer, replace_prefixes } => set_pieces(&peer, replace_prefixes),
        PeerChange::Wake { public_key, keepalive } => {
            // An interval that begins sends at once (`set_peer` in drivers/net/wireguard/netlink.c).
            let interval = |seconds| {
                WireguardPeer(vec![
                    WireguardPeerAttribute::PublicKey(*public_key.as_bytes()),
                    WireguardPeerAttribute::Flags(WireguardPeerFlags::UpdateOnly),
                    WireguardPeerAttribute::PersistentKeepalive(seconds),
                ])
            };
            vec![interval(0), interval(keepalive.max(1)), interval(keepalive)]
        }
        PeerChange::Remove(key) => vec![WireguardPeer(vec![
            WireguardPeerAttribute::PublicKey(*key.as_bytes()),
            WireguardPeerAttribute::Flags(WireguardPeerFlags::RemoveMe),
        ])],
    }
}

/// A peer with many prefixes comes in pieces: the first makes it, the others add to it.
fn set_pieces(peer: &PeerConfig, replace_prefixes: bool) -> Vec<WireguardPeer> {
    let key = WireguardPeerAttribute::PublicKey(*peer.public_key.as_bytes());
    let mut parts = peer.allowed_ips.chunks(PREFIXES_A_MESSAGE);
    let mut first = vec![key.clone()];
    if replace_prefixes {
        first.push(WireguardPeerAttribute::Flags(WireguardPeerFlags::ReplaceAllowedIps));
    }
    first.extend(peer.endpoint.map(WireguardPeerAttribute::Endpoint));
    first.push(WireguardPeerAttribute::PersistentKeepalive(keepalive_seconds(peer)));
    first.extend(parts.next().map(prefixes));
    let mut pieces = vec![WireguardPeer(first)];
    // A piece must not bring a peer back that somebody removed meanwhile.
    let only_if_there = WireguardPeerAttribute::Flags(WireguardPeerFlags::UpdateOnly);
    pieces.extend(parts.map(|part| WireguardPeer(vec![key.clone(), only_if_there.clone(), prefixes(part)])));
    pieces
}

fn prefixes(networks: &[IpNetwork]) -> WireguardPeerAttribute {
    let prefix = |network: &IpNetwork| {
        let family = match network.ip() {
            IpAddr::V4(_) => WireguardAddressFamily::Ipv4,
            IpAddr::V6(_) => WireguardAddressFamily::Ipv6,
        };
        WireguardAllowedIp(vec![
            WireguardAllowedIpAttr::Family(family),
            WireguardAllowedIpAttr::IpAddr(network.ip()),
            WireguardAllowedIpAttr::Cidr(network.prefix()),
        ])
    };
    WireguardPeerAttribute::AllowedIps(networks.iter().map(prefix).collect())
}

/// The question which number the generic netlink family has.
pub(super) fn find_family(name: &str) -> Vec<u8> {
    let control = GenlCtrl {
        cmd: GenlCtrlCmd::GetFamily,
        nlas: vec![GenlCtrlAttrs::FamilyName(name.to_owned())],
    };
    encode(NLM_F_ACK, GenlMessage::from_payload(control))
}

/// The device that later messages are about.
#[derive(Debug, Clone, Copy)]
pub(super) struct Target {
    /// Number of the family "wireguard".
    pub(super) family: u16,
    /// Interface index.
    pub(super) index: u32,
}

impl Target {
    /// The question how the device and its peers are.
    pub(super) fn ask(self) -> Vec<u8> {
        encode(NLM_F_DUMP, self.message(WireguardCmd::GetDevice, Vec::new()))
    }

    /// Sets what `attributes` say.
    pub(super) fn set(self, attributes: Vec<WireguardAttribute>) -> Vec<u8> {
        encode(NLM_F_ACK, self.message(WireguardCmd::SetDevice, attributes))
    }

    /// Sets our key, or takes it away. Every copy is wiped, with the result as the last.
    pub(super) fn set_key(self, key: Option<&PrivateKey>) -> Zeroizing<Vec<u8>> {
        let slot = WireguardAttribute::PrivateKey([0; WireguardAttribute::WG_KEY_LEN]);
        let mut message = NetlinkMessage::from(self.message(WireguardCmd::SetDevice, vec![slot]));
        fill(&mut message, |bytes| {
            if let Some(key) = key {
                bytes.copy_from_slice(key.expose());
            }
        });
        let bytes = Zeroizing::new(finish(NLM_F_ACK, &mut message));
        fill(&mut message, Zeroize::zeroize);
        bytes
    }

    fn message(self, cmd: WireguardCmd, attributes: Vec<WireguardAttribute>) -> GenlMessage<WireguardMessage> {
        let mut all = vec![WireguardAttribute::IfIndex(self.index)];
        all.extend(attributes);
        let mut message = GenlMessage::from_payload(WireguardMessage { cmd, attributes: all });
        message.set_resolved_family_id(self.family);
        message
    }
}

/// Where the key stands in a message, so that it is never moved.
fn fill(message: &mut NetlinkMessage<GenlMessage<WireguardMessage>>, with: impl Fn(&mut [u8; 32])) {
    if let NetlinkPayload::InnerMessage(inner) = &mut message.payload {
        for attribute in &mut inner.payload.attributes {
            if let WireguardAttribute::PrivateKey(bytes) = attribute {
                with(bytes);
            }
        }
    }
}

/// A message with its netlink header, ready to be sent.
pub(super) fn encode<T: NetlinkSerializable>(flags: u16, message: T) -> Vec<u8>
where
    NetlinkPayload<T>: From<T>,
{
    finish(flags, &mut NetlinkMessage::from(message))
}

fn finish<T: NetlinkSerializable>(flags: u16, message: &mut NetlinkMessage<T>) -> Vec<u8> {
    message.header.flags = NLM_F_REQUEST | flags;
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.emit(&mut bytes);
    bytes
}
