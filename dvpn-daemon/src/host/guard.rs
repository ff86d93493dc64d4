//! The client's guard in app mode: what has a tunnel address stays in the tunnel, whatever routes say.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use netlink_packet_netfilter::nftables::InetHookNumber;

use dvpn_core::firewall::Policy;

use super::{
    CLIENT_TABLE, Error, Host,
    nft::{
        self,
        batch::{Attach, Batch},
        expr::Rule,
    },
};

/// Counter: packets with a tunnel source address that were about to leave by another interface.
pub const SOURCE_ELSEWHERE: &str = "tunnel_source_elsewhere";
/// Counter: packets to a tunnel address that came in by another interface.
pub const DESTINATION_ELSEWHERE: &str = "tunnel_destination_elsewhere";

/// After connection tracking and destination translation's reading, before any source translation (`mangle`).
const BEFORE_TRANSLATION: i32 = -150;

/// Which addresses belong to which interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientGuard {
    /// The tunnel's interface; it need not exist.
    pub interface: String,
    /// Our tunnel addresses.
    pub addresses: Vec<IpAddr>,
}

impl Host {
    /// Sets or removes the guard, in one transaction. It outlives the interface and the daemon.
    ///
    /// Dropped packets are counted by [`SOURCE_ELSEWHERE`] and [`DESTINATION_ELSEWHERE`] in
    /// [`Host::client_counters`].
    pub fn set_client_guard(&self, guard: Option<&ClientGuard>) -> Result<(), Error> {
        let result = match guard {
            Some(guard) => nft::commit(guard_table(guard)),
            None => nft::delete_table(CLIENT_TABLE).map(drop),
        };
        result.map_err(|source| Error::Firewall {
            table: CLIENT_TABLE,
            source,
        })
    }

    /// Makes the firewall what the session asks for.
    ///
    /// In app mode that is always [`Policy::Open`]: nothing but the guard, which [`Host::set_client_guard`] owns. A
    /// blocking policy belongs to device mode and is refused here rather than half applied.
    pub fn apply_policy(&self, policy: &Policy) -> Result<(), Error> {
        match policy {
            Policy::Open => Ok(()),
            Policy::Blocked(_) => Err(Error::NotInAppMode),
        }
    }
}

fn guard_table(guard: &ClientGuard) -> Batch {
    let mut batch = Batch::new(CLIENT_TABLE);
    batch.replace_table();
    batch.counter(SOURCE_ELSEWHERE);
    batch.counter(DESTINATION_ELSEWHERE);
    batch.chain(
        "leaving",
        Some(Attach::filter(InetHookNumber::PostRouting, BEFORE_TRANSLATION)),
    );
    batch.chain(
        "arriving",
        Some(Attach::filter(InetHookNumber::PreRouting, BEFORE_TRANSLATION)),
    );
    for address in guard.addresses.iter().map(|address| IpNetwork::from(*address)) {
        let leaving = Rule::new()
            .from(&address)
            .output_is_not(&guard.interface)
            .output_is_not("lo");
        batch.rule("leaving", leaving.count(SOURCE_ELSEWHERE).drop());
        let arriving = Rule::new()
            .to(&address)
            .input_is_not(&guard.interface)
            .input_is_not("lo");
        batch.rule("arriving", arriving.count(DESTINATION_ELSEWHERE).drop());
    }
    batch
}
