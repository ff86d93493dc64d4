//! What a provider says of itself. Clients are numbers here, made anew at every start.

use std::{collections::BTreeMap, time::Duration};

use dvpn_common::keys::PublicKey;
use serde::Serialize;

use crate::{host::CounterValue, tunnel::PeerStats};

/// A fact for the audit log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The pool knows this node; `listed` says whether clients are shown it.
    NodeRegistered {
        /// Whether it is on the list.
        listed: bool,
    },
    /// The pool's key was learned at the first registration.
    PoolKeyLearned {
        /// It, base64.
        key: String,
    },
    /// The pool offered another key than the pinned one. It is not used.
    PoolKeyRefused {
        /// It, base64.
        key: String,
    },
    /// A client became a peer.
    PeerAdmitted {
        /// Its number.
        peer: u64,
    },
    /// A client is no peer any more.
    PeerRemoved {
        /// Its number.
        peer: u64,
    },
    /// A client was refused.
    PeerRefused {
        /// Why.
        reason: String,
    },
}

/// One client.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PeerStatus {
    /// Its number.
    pub peer: u64,
    /// Bytes received from it.
    pub rx_bytes: u64,
    /// Bytes sent to it.
    pub tx_bytes: u64,
    /// Age of its last handshake.
    pub last_handshake: Option<Duration>,
}

/// The provider as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[expect(clippy::struct_excessive_bools, reason = "independent facts, each read by itself")]
pub struct ProviderStatus {
    /// The pool answered our last registration.
    pub registered: bool,
    /// Clients are shown this node.
    pub listed: bool,
    /// The event stream is open.
    pub connected: bool,
    /// Interface, firewall and forwarding stand.
    pub up: bool,
    /// What is wrong, and what to do.
    pub problem: Option<String>,
    /// Every client.
    pub peers: Vec<PeerStatus>,
    /// Packets refused, by reason: [`crate::host::refused`].
    #[serde(skip)]
    pub refused: BTreeMap<String, CounterValue>,
    /// Echoes answered.
    pub echoes: u64,
}

/// Gives keys their numbers.
#[derive(Default)]
pub(super) struct Numbers {
    next: u64,
    of: BTreeMap<PublicKey, u64>,
}

impl Numbers {
    pub(super) fn of(&mut self, key: PublicKey) -> u64 {
        let next = &mut self.next;
        *self.of.entry(key).or_insert_with(|| {
            *next += 1;
            *next
        })
    }

    pub(super) fn forget(&mut self, key: &PublicKey) -> Option<u64> {
        self.of.remove(key)
    }

    pub(super) fn status(&mut self, stats: &[PeerStats]) -> Vec<PeerStatus> {
        stats
            .iter()
            .map(|peer| PeerStatus {
                peer: self.of(peer.public_key),
                rx_bytes: peer.rx_bytes,
                tx_bytes: peer.tx_bytes,
                last_handshake: peer.last_handshake,
            })
            .collect()
    }
}
