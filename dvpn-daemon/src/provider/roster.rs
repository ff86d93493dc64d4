//! The clients that should be peers now, and how to get there from what the tunnel has.

use std::collections::{BTreeMap, BTreeSet};

use dvpn_common::{
    contract::{PeerEntry, RefusedPeer},
    keys::PublicKey,
};
use ipnetwork::IpNetwork;
use jiff::Timestamp;

use super::admission::{Admitted, Ground, Refusal, Serials};
use crate::tunnel::PeerConfig;

/// Most peers of one node.
pub const MAX_PEERS: usize = 4096;

/// What has to be done to a tunnel.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) set: Vec<PeerConfig>,
    pub(super) remove: Vec<PublicKey>,
}

/// The admitted clients.
#[derive(Default)]
pub(super) struct Roster {
    serials: Serials,
    desired: BTreeMap<PublicKey, Admitted>,
    holders: BTreeMap<IpNetwork, PublicKey>,
    /// What the tunnel was told last, because it does not tell allowed IPs back.
    applied: BTreeMap<PublicKey, Vec<IpNetwork>>,
}

impl Roster {
    /// Makes the clients equal to a snapshot; whom it leaves out goes. Says who was refused.
    pub(super) fn replace(&mut self, entries: &[PeerEntry], ground: &Ground, now: Timestamp) -> Vec<RefusedPeer> {
        self.desired.clear();
        self.holders.clear();
        entries
            .iter()
            .filter_map(|entry| self.add(entry, ground, now).err())
            .collect()
    }

    /// Admits one client, or says why not. A refused renewal leaves the client as it was.
    pub(super) fn add(&mut self, entry: &PeerEntry, ground: &Ground, now: Timestamp) -> Result<(), RefusedPeer> {
        let refused = |reason: Refusal| RefusedPeer {
            public_key: entry.public_key,
            reason: reason.to_string(),
        };
        if self.desired.len() >= MAX_PEERS && !self.desired.contains_key(&entry.public_key) {
            return Err(refused(Refusal::Full));
        }
        let holders = &self.holders;
        let taken = |address: &IpNetwork| holders.get(address).copied();
        let admitted = ground.admit(entry, &mut self.serials, taken, now).map_err(refused)?;
        self.remove(&admitted.key);
        self.holders
            .extend(admitted.addresses.iter().map(|address| (*address, admitted.key)));
        self.desired.insert(admitted.key, admitted);
        Ok(())
    }

    /// Removes every client that is not among these.
    pub(super) fn retain(&mut self, entries: &[PeerEntry]) {
        let named: BTreeSet<&PublicKey> = entries.iter().map(|entry| &entry.public_key).collect();
        self.desired.retain(|key, _| named.contains(key));
        self.holders.retain(|_, holder| named.contains(holder));
    }

    /// Removes a client; one that is not there is no error.
    pub(super) fn remove(&mut self, key: &PublicKey) {
        self.desired.remove(key);
        self.holders.retain(|_, holder| holder != key);
    }

    /// Removes whose time is over.
    pub(super) fn expire(&mut self, now: Timestamp) -> Vec<PublicKey> {
        let over: Vec<PublicKey> = self
            .desired
            .values()
            .filter(|client| client.expires_at <= now)
            .map(|client| client.key)
            .collect();
        for key in &over {
            self.remove(key);
        }
        over
    }

    /// When the next client's time is over.
    pub(super) fn next_expiry(&self) -> Option<Timestamp> {
        self.desired.values().map(|client| client.expires_at).min()
    }

    /// Desired − observed is set, observed − desired is removed.
    pub(super) fn plan(&self, observed: &BTreeSet<PublicKey>) -> Plan {
        let set = self.desired.values().filter(|client| {
            !observed.contains(&client.key) || self.applied.get(&client.key) != Some(&client.addresses)
        });
        Plan {
            set: set
                .map(|client| PeerConfig {
                    public_key: client.key,
                    endpoint: None,
                    allowed_ips: client.addresses.clone(),
                    keepalive: None,
                })
                .collect(),
            remove: observed
                .iter()
                .filter(|key| !self.desired.contains_key(key))
                .copied()
                .collect(),
        }
    }

    /// Notes that a plan was carried out.
    pub(super) fn applied(&mut self, plan: &Plan) {
        for key in &plan.remove {
            self.applied.remove(key);
        }
        self.applied
            .extend(plan.set.iter().map(|peer| (peer.public_key, peer.allowed_ips.clone())));
    }
}
