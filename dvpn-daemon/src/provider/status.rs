//! What a provider says of itself. Clients are numbers here, made anew at every start.

use std::collections::BTreeMap;

use dvpn_common::{abi::Traffic, contract::Reachability, keys::PublicKey, status::Problem};
use serde::Serialize;

use super::Enforcement;
use crate::host::{Carried, CounterValue};

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
    /// The pool changed its key, and the old one vouched for the new one.
    PoolKeyRotated {
        /// The new one, base64.
        key: String,
    },
    /// What this node does with clients changed.
    AdmissionChanged {
        /// [`dvpn_core::node::Admission`] in words.
        admission: String,
    },
    /// A client became a peer.
    PeerAdmitted {
        /// Its number.
        peer: u64,
    },
    /// A client's connection goes on under a new key.
    PeerRenewed {
        /// Its number.
        peer: u64,
    },
    /// A client gave its connection back.
    PeerReleased {
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

/// One client's connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PeerStatus {
    /// Its number.
    pub peer: u64,
    /// A handshake within three minutes, and not given back since.
    pub active: bool,
    /// What it sent and was sent, in layer-3 packets and bytes.
    #[serde(skip)]
    pub carried: Carried,
    /// What its grant let pass and did not, towards it and from it.
    #[serde(skip)]
    pub shaped: [Traffic; 2],
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
    /// What the pool found when it tried to reach this node.
    pub reachability: Option<Reachability>,
    /// Why clients do not reach this node, and what its owner can do.
    pub verdict: Option<Problem>,
    /// [`dvpn_core::node::Admission`] in words.
    pub admission: String,
    /// Most clients.
    pub max_peers: u32,
    /// Connections that are active now.
    pub active: usize,
    /// Bytes carried for clients this calendar month (UTC).
    pub month_bytes: u64,
    /// `NODE_MONTHLY_CAP_GB` in bytes; 0 for none.
    pub monthly_cap_bytes: u64,
    /// `NODE_LIMIT_MBPS` in bits per second.
    pub limit_bits_per_second: Option<u64>,
    /// Every client.
    pub peers: Vec<PeerStatus>,
    /// Packets refused, by reason: [`crate::host::refused`].
    #[serde(skip)]
    pub refused: BTreeMap<String, CounterValue>,
    /// Echoes answered.
    pub echoes: u64,
    /// How grants are enforced; nothing while they are not.
    #[serde(skip)]
    pub enforcement: Option<Enforcement>,
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

    /// The number of a key that has one.
    pub(super) fn known(&self, key: &PublicKey) -> Option<u64> {
        self.of.get(key).copied()
    }

    /// The connection goes on under another key.
    pub(super) fn inherit(&mut self, old: &PublicKey, new: PublicKey) -> Option<u64> {
        let number = self.of.remove(old)?;
        self.of.insert(new, number);
        Some(number)
    }

    pub(super) fn forget(&mut self, key: &PublicKey) -> Option<u64> {
        self.of.remove(key)
    }
}
