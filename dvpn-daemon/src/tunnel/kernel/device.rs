//! A WireGuard device by generic netlink. The kernel does the work within each call, so calls may take a while where
//! there are thousands of peers: they belong on threads that may block.

use std::{collections::HashMap, io, time::Duration};

use dvpn_common::keys::{PrivateKey, PublicKey};
use netlink_packet_core::{NlasIterator, parse_u16};
use netlink_packet_wireguard::{WireguardAttribute, WireguardDeviceFlags};
use netlink_sys::protocols::NETLINK_GENERIC;

use super::{
    dump::{self, Peer},
    message::{self, PeerChange, Target, chunks, keepalive_seconds},
    socket::Socket,
};
use crate::tunnel::{Error, PeerConfig, PeerStats};

const FAMILY: &str = "wireguard";
/// `CTRL_ATTR_FAMILY_ID`, include/uapi/linux/genetlink.h.
const FAMILY_ID: u16 = 1;
/// `sizeof(struct genlmsghdr)`.
const GENERIC_HEADER_BYTES: usize = 4;
/// How often a dump is begun again that a change overtook.
const DUMP_TRIES: u32 = 8;

/// A device, and what it was told.
pub(super) struct Device {
    interface: String,
    private_key: PrivateKey,
    /// As configured: 0 takes another port at each [`Self::rebind`].
    listen_port: u16,
    socket: Socket,
    target: Target,
    /// What the kernel was told, so that telling it again is free and takes no prefix away for a moment.
    peers: HashMap<PublicKey, PeerConfig>,
    /// Received and sent bytes of peers that were made anew, up to then.
    carried: HashMap<PublicKey, (u64, u64)>,
}

impl Device {
    /// Finds the family of messages; the link must be there, as making it loads the kernel's module.
    pub(super) fn open(interface: String, index: u32, private_key: PrivateKey, listen_port: u16) -> io::Result<Self> {
        let mut socket = Socket::open(NETLINK_GENERIC)?;
        let mut family = None;
        socket.request(&mut message::find_family(FAMILY), |answer| {
            for attribute in NlasIterator::new(answer.get(GENERIC_HEADER_BYTES..).unwrap_or_default()) {
                let attribute = attribute.map_err(io::Error::other)?;
                if attribute.kind() == FAMILY_ID {
                    family = Some(parse_u16(attribute.value()).map_err(io::Error::other)?);
                }
            }
            Ok(())
        })?;
        let family = family.ok_or_else(|| io::Error::from_raw_os_error(libc::ENOENT))?;
        Ok(Self {
            interface,
            private_key,
            listen_port,
            socket,
            target: Target { family, index },
            peers: HashMap::new(),
            carried: HashMap::new(),
        })
    }

    /// Sets everything but the peers, and takes away those that are there.
    pub(super) fn configure(&mut self, fwmark: u32) -> Result<(), Error> {
        self.set_key(true)?;
        self.set(vec![
            WireguardAttribute::ListenPort(self.listen_port),
            WireguardAttribute::Fwmark(fwmark),
            WireguardAttribute::Flags(WireguardDeviceFlags::ReplacePeers),
        ])
    }

    /// Adds or changes peers. What a peer keeps is not taken away in between.
    pub(super) fn set_peers(&mut self, peers: Vec<PeerConfig>) -> Result<(), Error> {
        let wanted: HashMap<PublicKey, PeerConfig> = peers.into_iter().map(|peer| (peer.public_key, peer)).collect();
        let changes = wanted
            .values()
            .filter(|peer| self.peers.get(&peer.public_key) != Some(peer))
            .map(|peer| PeerChange::Set {
                replace_prefixes: self
                    .peers
                    .get(&peer.public_key)
                    .is_none_or(|old| old.allowed_ips.iter().any(|prefix| !peer.allowed_ips.contains(prefix))),
                peer: peer.clone(),
            });
        let changes: Vec<PeerChange> = changes.collect();
        self.change(changes)?;
        self.peers.extend(wanted);
        Ok(())
    }

    /// Removes a peer, if it is there.
    pub(super) fn remove_peer(&mut self, peer: PublicKey) -> Result<(), Error> {
        self.change([PeerChange::Remove(peer)])?;
        self.peers.remove(&peer);
        self.carried.remove(&peer);
        Ok(())
    }

    /// All peers. `now` is since the Unix epoch, by the same clock as the kernel's.
    pub(super) fn stats(&mut self, now: Duration) -> Result<Vec<PeerStats>, Error> {
        let seen = self.seen()?;
        let carried = |peer: &Peer| self.carried.get(&peer.public_key).copied().unwrap_or_default();
        Ok(seen
            .peers
            .iter()
            .map(|peer| PeerStats {
                public_key: peer.public_key,
                endpoint: peer.endpoint,
                last_handshake: peer.last_handshake.map(|at| now.saturating_sub(at)),
                rx_bytes: carried(peer).0 + peer.rx_bytes,
                tx_bytes: carried(peer).1 + peer.tx_bytes,
            })
            .collect())
    }

    /// The outer port; 0 while the interface is down and any may be taken.
    pub(super) fn port(&mut self) -> Result<u16, Error> {
        self.seen().map(|device| device.listen_port)
    }

    /// When hands were last shaken with this peer.
    pub(super) fn last_handshake(&mut self, peer: PublicKey) -> Result<Option<Duration>, Error> {
        self.peer(peer).map(|peer| peer.last_handshake)
    }

    /// Makes the kernel send an initiation now, whatever session there is; says when hands were last shaken.
    ///
    /// It does so only for a peer without a session that may send. A new private key ends those of all peers: so it is
    /// taken away and put back (`wg_noise_expire_current_peer_keypairs` in drivers/net/wireguard/noise.c). What is
    /// under way to us still passes, counters and endpoints stay. With more than one peer that would reach too far:
    /// there, the one peer is made anew.
    pub(super) fn begin_handshake(&mut self, peer: PublicKey) -> Result<Option<Duration>, Error> {
        let config = self.peers.get(&peer).cloned().ok_or(Error::NoPeer(peer))?;
        let seen = self.peer(peer)?;
        let endpoint = seen.endpoint.ok_or(Error::NoEndpoint(peer))?;
        let wake = PeerChange::Wake {
            public_key: peer,
            keepalive: keepalive_seconds(&config),
        };
        if self.peers.len() == 1 {
            self.set_key(false)?;
            self.set_key(true)?;
            self.change([wake])?;
            return Ok(seen.last_handshake);
        }
        let anew = PeerChange::Set {
            peer: PeerConfig {
                endpoint: Some(endpoint),
                ..config
            },
            replace_prefixes: true,
        };
        self.change([PeerChange::Remove(peer), anew, wake])?;
        let carried = self.carried.entry(peer).or_default();
        carried.0 += seen.rx_bytes;
        carried.1 += seen.tx_bytes;
        Ok(None)
    }

    /// Goes over to another private key and returns the one before. Sessions end for sending only: what is under way to
    /// us still passes.
    pub(super) fn replace_key(&mut self, next: PrivateKey) -> Result<PrivateKey, Error> {
        let last = std::mem::replace(&mut self.private_key, next);
        match self.set_key(true) {
            Ok(()) => Ok(last),
            Err(error) => {
                self.private_key = last;
                Err(error)
            }
        }
    }

    /// A new outer socket: of another port, or of the configured one. The kernel does nothing for a port that it has.
    pub(super) fn rebind(&mut self) -> Result<(), Error> {
        self.set(vec![WireguardAttribute::ListenPort(0)])?;
        if self.listen_port == 0 {
            return Ok(());
        }
        self.set(vec![WireguardAttribute::ListenPort(self.listen_port)])
    }

    fn peer(&mut self, key: PublicKey) -> Result<Peer, Error> {
        let seen = self.seen()?;
        let mut peers = seen.peers.into_iter();
        peers.find(|peer| peer.public_key == key).ok_or(Error::NoPeer(key))
    }

    fn seen(&mut self) -> Result<dump::Device, Error> {
        for _ in 0..DUMP_TRIES {
            let mut device = dump::Device::default();
            let merge = |part: &[u8]| device.merge(part).map_err(io::Error::other);
            let asked = self.socket.request(&mut self.target.ask(), merge);
            if asked.map_err(|source| self.error(source))? {
                return Ok(device);
            }
        }
        Err(self.error(io::Error::other("something else changes its peers all the time")))
    }

    fn change(&mut self, changes: impl IntoIterator<Item = PeerChange>) -> Result<(), Error> {
        for chunk in chunks(changes) {
            self.set(vec![WireguardAttribute::Peers(chunk)])?;
        }
        Ok(())
    }

    fn set(&mut self, attributes: Vec<WireguardAttribute>) -> Result<(), Error> {
        let done = self.socket.request(&mut self.target.set(attributes), |_| Ok(()));
        done.map(|_| ()).map_err(|source| self.error(source))
    }

    fn set_key(&mut self, ours: bool) -> Result<(), Error> {
        let mut message = self.target.set_key(ours.then_some(&self.private_key));
        let done = self.socket.request(&mut message, |_| Ok(()));
        done.map(|_| ()).map_err(|source| self.error(source))
    }

    fn error(&self, source: io::Error) -> Error {
        match source.raw_os_error() {
            Some(libc::ENODEV) => Error::Stopped(self.interface.clone()),
            Some(libc::EADDRINUSE) => Error::Socket {
                port: self.listen_port,
                source,
            },
            _ => Error::Link {
                interface: self.interface.clone(),
                source,
            },
        }
    }
}
