//! The clients that should be peers now, and how to get there from what the tunnel has.
//!
//! An address has one holder. A renewal has the addresses of the client that it renews and waits, a peer without
//! allowed IPs, until its first completed handshake, or until the renewed one is gone; then it is the holder.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use dvpn_common::{
    contract::{PeerEntry, RefusedPeer},
    keys::PublicKey,
};
use dvpn_core::Now;
use ipnetwork::IpNetwork;
use jiff::Timestamp;

use super::{
    Change, Serials,
    admission::{Admitted, Ground, Refusal},
};
use crate::tunnel::{PeerConfig, PeerStats};

/// Most peers of one node.
pub const MAX_PEERS: usize = 4096;
/// A connection is active for this long after a handshake: a session can be used for no longer
/// (whitepaper, section 6.1: Reject-After-Time).
pub(super) const ACTIVE: Duration = Duration::from_mins(3);
/// A renewal is watched for this long; later it is noticed with the next comparison.
const WATCH: Duration = Duration::from_secs(30);
/// So closely at first: until it is seen the client sends nothing.
const CLOSELY: Duration = Duration::from_millis(10);
/// For so long: a client that renews shakes hands within two seconds of its approval.
const AT_FIRST: Duration = Duration::from_secs(3);
/// In the end no more closely than this: whoever never shakes hands is not worth the device's time.
const LOOSELY: Duration = Duration::from_millis(250);
/// Old keys that are remembered as renewed.
const MAX_RENEWED: usize = 2 * MAX_PEERS;
/// Renewals of renewals that a snapshot is sorted by; deeper ones are taken as they come.
const MAX_DEPTH: usize = 8;

/// What has to be done to a tunnel: first `set`, then `remove`, so that an address that moves is never nobody's.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) set: Vec<PeerConfig>,
    pub(super) remove: Vec<PublicKey>,
}

/// One client.
#[derive(Debug)]
struct Client {
    admitted: Admitted,
    /// The holder of its addresses, while it is not itself.
    waits_for: Option<PublicKey>,
    /// Since when it waits.
    since: Instant,
}

/// The admitted clients.
pub(super) struct Roster {
    serials: Serials,
    max_clients: usize,
    clients: BTreeMap<PublicKey, Client>,
    holders: BTreeMap<IpNetwork, PublicKey>,
    /// Whose addresses a renewal took at its handshake, which, and when the old approval ends: until then the pool may go
    /// on naming the old key.
    renewed: BTreeMap<PublicKey, (PublicKey, Timestamp)>,
    /// The same since somebody last asked: the connection goes on under another key.
    handed_over: Vec<(PublicKey, PublicKey)>,
    released: BTreeMap<PublicKey, Instant>,
    handshakes: BTreeMap<PublicKey, Instant>,
    /// The pool's own peer.
    prober: Option<PublicKey>,
    /// Why no new clients are taken.
    pub(super) draining: Option<&'static str>,
    /// Nobody is a peer outside the node's hours; who may be one is kept up to date.
    pub(super) closed: bool,
    /// What the tunnel was told last, because it does not tell allowed IPs back.
    applied: BTreeMap<PublicKey, Vec<IpNetwork>>,
}

impl Roster {
    pub(super) fn new(serials: Serials, max_clients: usize) -> Self {
        Self {
            serials,
            max_clients: max_clients.min(MAX_PEERS),
            clients: BTreeMap::new(),
            holders: BTreeMap::new(),
            renewed: BTreeMap::new(),
            handed_over: Vec::new(),
            released: BTreeMap::new(),
            handshakes: BTreeMap::new(),
            prober: None,
            draining: None,
            closed: false,
            applied: BTreeMap::new(),
        }
    }

    /// What has to be kept of serials before the tunnel is told anything, if they changed since this was last asked.
    pub(super) fn changed_serials(&mut self) -> Option<Change> {
        self.serials.take_change()
    }

    /// What was to be kept is not, or nobody knows.
    pub(super) fn serials_not_kept(&mut self) {
        self.serials.rewrite();
    }

    /// The pool's key for its own handshakes; says whether it is another one than before.
    pub(super) fn set_prober(&mut self, prober: Option<PublicKey>) -> bool {
        let changed = self.prober != prober;
        self.prober = prober;
        changed
    }

    /// Forgets every client; what was seen of serials stays.
    pub(super) fn clear(&mut self) {
        self.clients.clear();
        self.holders.clear();
    }

    /// Makes the clients equal to a snapshot; whom it leaves out goes. Says who was refused.
    pub(super) fn replace(&mut self, entries: &[PeerEntry], ground: &Ground, now: Now) -> Vec<RefusedPeer> {
        let named: BTreeSet<PublicKey> = entries.iter().map(|entry| entry.public_key).collect();
        let kept = named.iter().chain(self.clients.keys());
        self.serials.make_room(named.len(), kept, now.wall);
        let before = std::mem::take(&mut self.clients);
        self.holders.clear();
        self.renewed.retain(|_, (new, _)| named.contains(new));
        self.released.retain(|key, _| named.contains(key));
        // A snapshot says who is there, not who is new.
        let draining = self.draining.take();
        let mut refused = Vec::new();
        for entry in in_order(entries) {
            refused.extend(self.add(entry, ground, now).err());
        }
        self.draining = draining;
        for (key, client) in &mut self.clients {
            if let Some(earlier) = before.get(key) {
                client.since = earlier.since;
            }
        }
        refused
    }

    /// Admits one client, or says why not. A refused renewal leaves the client as it was.
    pub(super) fn add(&mut self, entry: &PeerEntry, ground: &Ground, now: Now) -> Result<(), RefusedPeer> {
        let key = entry.public_key;
        if let Some((successor, _)) = self.renewed.get(&key) {
            if entry.renews != Some(*successor) {
                // Its addresses went to its renewal, which is what was asked for.
                return Ok(());
            }
            self.renewed.remove(&key);
        }
        let refused = |reason: Refusal| RefusedPeer {
            public_key: key,
            reason: reason.to_string(),
        };
        let renews = self.renewable(entry);
        if !self.clients.contains_key(&key) && renews.is_none() {
            if let Some(why) = self.draining {
                return Err(refused(Refusal::NotNow(why)));
            }
            if self.clients.len() >= self.max_clients && self.holding_clients().count() >= self.max_clients {
                return Err(refused(Refusal::Full));
            }
        }
        if !self.clients.contains_key(&key) && self.clients.len() >= 2 * MAX_PEERS {
            return Err(refused(Refusal::Full));
        }
        self.serials.make_room(1, self.clients.keys().chain([&key]), now.wall);
        let holders = &self.holders;
        let taken = |address: &IpNetwork| holders.get(address).copied().filter(|holder| Some(*holder) != renews);
        let admitted = ground
            .admit(entry, &mut self.serials, taken, now.wall)
            .map_err(refused)?;
        if entry.released {
            self.released.entry(key).or_insert(now.instant);
        } else {
            self.released.remove(&key);
        }
        self.insert(admitted, renews, now.instant);
        Ok(())
    }

    /// The holder of the addresses that this entry renews: the renewed client, or whom it is itself waiting for.
    fn renewable(&self, entry: &PeerEntry) -> Option<PublicKey> {
        let old = entry.renews.filter(|old| *old != entry.public_key)?;
        let old = self.renewed.get(&old).map_or(old, |(new, _)| *new);
        let holder = self.clients.get(&old)?.waits_for.unwrap_or(old);
        let same = self.clients.get(&holder)?.admitted.addresses == entry.addresses;
        (same && holder != entry.public_key).then_some(holder)
    }

    fn insert(&mut self, admitted: Admitted, waits_for: Option<PublicKey>, now: Instant) {
        let key = admitted.key;
        let moved = self
            .clients
            .get(&key)
            .is_some_and(|before| before.admitted.addresses != admitted.addresses);
        if moved {
            self.remove(&key);
        }
        if waits_for.is_none() {
            self.holders
                .extend(admitted.addresses.iter().map(|address| (*address, key)));
        }
        let since = self.clients.get(&key).map_or(now, |before| before.since);
        self.clients.insert(
            key,
            Client {
                admitted,
                waits_for,
                since,
            },
        );
    }

    /// Removes every client that is not among these.
    pub(super) fn retain(&mut self, entries: &[PeerEntry]) {
        let named: BTreeSet<&PublicKey> = entries.iter().map(|entry| &entry.public_key).collect();
        let gone: Vec<PublicKey> = self
            .clients
            .keys()
            .filter(|key| !named.contains(key))
            .copied()
            .collect();
        for key in &gone {
            self.remove(key);
        }
    }

    /// Removes a client; one that is not there is no error. Its addresses go to whoever renews it.
    pub(super) fn remove(&mut self, key: &PublicKey) {
        let Some(gone) = self.clients.remove(key) else {
            return;
        };
        self.released.remove(key);
        if gone.waits_for.is_some() {
            return;
        }
        for address in &gone.admitted.addresses {
            self.holders.remove(address);
        }
        let newest = self
            .waiting_for(*key)
            .max_by_key(|client| client.admitted.serial)
            .map(|client| client.admitted.key);
        if let Some(newest) = newest {
            self.make_holder(newest, *key);
        }
    }

    /// A client gave its connection back: it is active again with its next handshake.
    pub(super) fn release(&mut self, key: &PublicKey, now: Instant) {
        if self.clients.contains_key(key) {
            self.released.insert(*key, now);
        }
    }

    /// A renewal completed its handshake: the addresses are its own, and the renewed client is gone.
    fn take_over(&mut self, key: PublicKey) {
        let Some(client) = self.clients.get(&key) else { return };
        let (Some(old), serial) = (client.waits_for, client.admitted.serial) else {
            return;
        };
        // Older attempts at the same renewal are superseded with it.
        let superseded: Vec<PublicKey> = self
            .waiting_for(old)
            .filter(|other| other.admitted.serial < serial)
            .map(|other| other.admitted.key)
            .chain([old])
            .collect();
        for gone in superseded {
            let ends_at = self.clients.remove(&gone).map(|client| client.admitted.ends_at);
            self.released.remove(&gone);
            self.renewed.insert(gone, (key, ends_at.unwrap_or(Timestamp::MAX)));
        }
        while self.renewed.len() > MAX_RENEWED {
            let first = self.renewed.iter().min_by_key(|(_, (_, ends_at))| *ends_at);
            let Some(first) = first.map(|(old, _)| *old) else { break };
            self.renewed.remove(&first);
        }
        self.make_holder(key, old);
    }

    fn make_holder(&mut self, key: PublicKey, instead_of: PublicKey) {
        for client in self.clients.values_mut() {
            if client.admitted.key == key {
                client.waits_for = None;
                let addresses = client.admitted.addresses.iter();
                self.holders.extend(addresses.map(|address| (*address, key)));
            } else if client.waits_for == Some(instead_of) {
                client.waits_for = Some(key);
            }
        }
        self.handed_over.push((instead_of, key));
    }

    fn waiting_for(&self, holder: PublicKey) -> impl Iterator<Item = &Client> {
        self.clients
            .values()
            .filter(move |client| client.waits_for == Some(holder))
    }

    /// How soon to look for the handshake of the youngest renewal, while one is young enough to be watched.
    pub(super) fn watches(&self, now: Instant) -> Option<Duration> {
        let waiting = self.clients.values().filter(|client| client.waits_for.is_some());
        let youngest = waiting
            .map(|client| now.saturating_duration_since(client.since))
            .min()?;
        (youngest < WATCH).then(|| (youngest.saturating_sub(AT_FIRST) / 8).clamp(CLOSELY, LOOSELY))
    }

    /// Notes what the tunnel saw; renewals with a completed handshake take over. Says whether one did.
    pub(super) fn observe(&mut self, stats: &[PeerStats], now: Instant) -> bool {
        self.handshakes = stats
            .iter()
            .filter_map(|peer| Some((peer.public_key, now.checked_sub(peer.last_handshake?)?)))
            .collect();
        let completed: Vec<PublicKey> = self
            .clients
            .values()
            .filter(|client| client.waits_for.is_some() && self.handshakes.contains_key(&client.admitted.key))
            .map(|client| client.admitted.key)
            .collect();
        for key in &completed {
            self.take_over(*key);
        }
        !completed.is_empty()
    }

    /// The clients whose connection is active: a handshake within [`ACTIVE`], and none given back since. As of the last
    /// [`Roster::observe`]; these are who shares the line.
    pub(super) fn active(&self, now: Instant) -> impl Iterator<Item = &Admitted> {
        self.holding_clients().filter(move |client| {
            self.handshakes.get(&client.key).is_some_and(|shaken| {
                let fresh = now.saturating_duration_since(*shaken) < ACTIVE;
                let released = self.released.get(&client.key);
                fresh && released.is_none_or(|released| released < shaken)
            })
        })
    }

    /// Clients that hold addresses now: each is one connection.
    pub(super) fn holding_clients(&self) -> impl Iterator<Item = &Admitted> {
        self.clients
            .values()
            .filter(|client| client.waits_for.is_none())
            .map(|client| &client.admitted)
    }

    /// Connections that go on under another key since this was last asked: old and new.
    pub(super) fn take_handed_over(&mut self) -> Vec<(PublicKey, PublicKey)> {
        std::mem::take(&mut self.handed_over)
    }

    /// Removes whose time is over.
    pub(super) fn expire(&mut self, now: Timestamp) -> Vec<PublicKey> {
        // What ended needs no successor: it would not be admitted any more.
        self.renewed.retain(|_, (_, ends_at)| *ends_at > now);
        let over: Vec<PublicKey> = self
            .clients
            .values()
            .filter(|client| client.admitted.ends_at <= now)
            .map(|client| client.admitted.key)
            .collect();
        for key in &over {
            self.remove(key);
        }
        over
    }

    /// When the next client's time is over.
    pub(super) fn next_expiry(&self) -> Option<Timestamp> {
        self.clients.values().map(|client| client.admitted.ends_at).min()
    }

    /// Desired − observed is set, observed − desired is removed.
    pub(super) fn plan(&self, observed: &BTreeSet<PublicKey>) -> Plan {
        let clients = self.clients.values().filter(|_| !self.closed).map(|client| {
            let held = client.waits_for.is_none();
            let addresses = if held {
                client.admitted.addresses.as_slice()
            } else {
                &[]
            };
            (client.admitted.key, addresses)
        });
        let prober = self.prober.filter(|key| !self.clients.contains_key(key));
        let desired: BTreeMap<PublicKey, &[IpNetwork]> =
            clients.chain(prober.map(|key| (key, [].as_slice()))).collect();
        let set = desired.iter().filter(|(key, addresses)| {
            !observed.contains(*key) || self.applied.get(*key).map(Vec::as_slice) != Some(**addresses)
        });
        Plan {
            set: set
                .map(|(key, addresses)| PeerConfig {
                    public_key: *key,
                    endpoint: None,
                    allowed_ips: addresses.to_vec(),
                    keepalive: None,
                })
                .collect(),
            remove: observed
                .iter()
                .filter(|key| !desired.contains_key(key))
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

/// The entries, each after the one that it renews.
fn in_order(entries: &[PeerEntry]) -> Vec<&PeerEntry> {
    let mut sorted = Vec::with_capacity(entries.len());
    let mut rest: Vec<&PeerEntry> = entries.iter().collect();
    for _ in 0..MAX_DEPTH {
        let unsorted: BTreeSet<PublicKey> = rest.iter().map(|entry| entry.public_key).collect();
        let (ready, later): (Vec<_>, Vec<_>) = rest
            .into_iter()
            .partition(|entry| entry.renews.is_none_or(|old| !unsorted.contains(&old)));
        sorted.extend(ready);
        rest = later;
        if rest.is_empty() {
            break;
        }
    }
    sorted.extend(rest);
    sorted
}

#[cfg(test)]
mod tests;
