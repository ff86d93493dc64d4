//! What each client's tunnel address may open and has carried: limits and counters in sets that the rules fill.

use std::{collections::BTreeMap, net::IpAddr, time::Duration};

use super::{
    Error, Host, PROVIDER_TABLE,
    nft::{
        self,
        batch::{AddressSet, Batch},
        expr::{Family, Rule},
        read::CounterValue,
    },
    provider_policy::refused,
};

/// Most connections that one tunnel address has open at once.
pub const MAX_CONNECTIONS: u32 = 4096;
/// New connections a second from one tunnel address.
pub const CONNECTIONS_PER_SECOND: u64 = 200;
/// As many more may come at once.
pub const CONNECTION_BURST: u32 = 400;

/// The zone of the clients' connections: whatever else this machine tracks, theirs are other connections.
pub(super) const ZONE: u16 = 0x0d51;
/// Twice the peers that a node can have, so that those who left do not crowd out those who came.
const ADDRESSES: u32 = 8192;
const FORGET_RATE_AFTER: Duration = Duration::from_mins(1);
/// Read every few seconds; what is not seen for this long has been read.
const FORGET_COUNT_AFTER: Duration = Duration::from_hours(1);

const fn set(name: &'static str, family: Family, forget_after: Option<Duration>) -> AddressSet {
    AddressSet {
        name,
        family,
        forget_after,
        size: ADDRESSES,
    }
}

/// The sets of one family.
struct Sets {
    rate: AddressSet,
    open: AddressSet,
    sent: AddressSet,
    received: AddressSet,
}

const SETS: [Sets; 2] = [
    Sets {
        rate: set("rate_v4", Family::V4, Some(FORGET_RATE_AFTER)),
        open: set("open_v4", Family::V4, None),
        sent: set("sent_v4", Family::V4, Some(FORGET_COUNT_AFTER)),
        received: set("received_v4", Family::V4, Some(FORGET_COUNT_AFTER)),
    },
    Sets {
        rate: set("rate_v6", Family::V6, Some(FORGET_RATE_AFTER)),
        open: set("open_v6", Family::V6, None),
        sent: set("sent_v6", Family::V6, Some(FORGET_COUNT_AFTER)),
        received: set("received_v6", Family::V6, Some(FORGET_COUNT_AFTER)),
    },
];

/// Chain: the first packet of each connection of a client goes through here.
pub(super) const LIMITS: &str = "limits";
/// Chain: what a client sends and may send.
pub(super) const SENT: &str = "sent";
/// Chain: what comes back to it.
pub(super) const RECEIVED: &str = "received";

/// Makes the sets; they outlive a change of the rules.
pub(super) fn make_sets(batch: &mut Batch) {
    for Sets {
        rate,
        open,
        sent,
        received,
    } in &SETS
    {
        for set in [rate, open, sent, received] {
            batch.set(set);
        }
    }
}

/// The rules of [`LIMITS`], [`SENT`] and [`RECEIVED`].
pub(super) fn rules(batch: &mut Batch) {
    for sets in &SETS {
        let faster = Rule::new().source_faster_than(&sets.rate, CONNECTIONS_PER_SECOND, CONNECTION_BURST);
        batch.rule(LIMITS, faster.count(refused::TOO_FAST).drop());
        let more = Rule::new().source_with_more_than(&sets.open, MAX_CONNECTIONS);
        batch.rule(LIMITS, more.count(refused::TOO_MANY).drop());
        batch.rule(SENT, Rule::new().count_source(&sets.sent));
        batch.rule(RECEIVED, Rule::new().count_destination(&sets.received));
    }
}

/// What one tunnel address carried since it was first seen; begins again when it was not seen for an hour.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Carried {
    /// From the client.
    pub sent: CounterValue,
    /// To the client.
    pub received: CounterValue,
}

impl Host {
    /// What each tunnel address carried, in layer-3 packets and bytes as the kernel forwards them.
    pub fn provider_carried(&self) -> Result<BTreeMap<IpAddr, Carried>, Error> {
        let mut all = BTreeMap::<IpAddr, Carried>::new();
        let read = |set: &AddressSet| {
            nft::read::addresses(PROVIDER_TABLE, set.name).map_err(|source| Error::FirewallRead {
                table: PROVIDER_TABLE,
                source,
            })
        };
        for sets in &SETS {
            for (address, counter) in read(&sets.sent)? {
                all.entry(address).or_default().sent = counter;
            }
            for (address, counter) in read(&sets.received)? {
                all.entry(address).or_default().received = counter;
            }
        }
        Ok(all)
    }
}
