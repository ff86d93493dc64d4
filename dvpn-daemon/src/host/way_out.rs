//! Whether packets to the internet leave this machine another way than before.
//!
//! A machine's network changes all day: containers come and go, bridges are made, addresses are renewed. Only few of these
//! concern a tunnel's outer packets, and each of the others would cost a needless handshake, or an attempt its progress.

use std::collections::BTreeSet;

use futures::{Stream, StreamExt as _, stream};
use ipnetwork::IpNetwork;
use netlink_packet_route::route::{RouteAttribute, RouteMessage, RouteProtocol, RouteType};

use super::{
    Error, Host, NetworkChanges, PROTOCOL, ROUTING_TABLE,
    netlink::{oif_of, table_of},
};

/// The kernel's table of its own addresses (`RT_TABLE_LOCAL`).
const LOCAL_TABLE: u32 = 255;

/// How packets leave: two that are equal lead the same way.
#[derive(Debug, Clone, PartialEq, Eq)]
struct WayOut {
    /// Default routes and all by a gateway, of every table but ours, as the kernel tells them.
    routes: Vec<RouteMessage>,
    /// Of the interfaces that those use; of all where there are none.
    addresses: BTreeSet<(u32, IpNetwork)>,
    /// Which of those interfaces have a carrier.
    carriers: BTreeSet<u32>,
}

impl Host {
    /// Yields after each burst of changes that left the machine another way out. Bursts are debounced as in
    /// [`Host::network_changes`]; when the way out cannot be read, that counts as a change.
    pub async fn way_out_changes(&self) -> Result<impl Stream<Item = ()> + Send + use<>, Error> {
        // Subscribed before the first look, so that nothing falls between.
        let changes = self.network_changes().await?;
        let before = self.way_out().await?;
        Ok(stream::unfold(
            (self.clone(), changes, Some(before)),
            |(host, mut changes, before)| async move {
                let now = host.next_way_out(&mut changes, before.as_ref()).await?;
                Some(((), (host, changes, now)))
            },
        ))
    }

    /// The next one that differs from `before`; nothing inside when it could not be read, nothing at all at the end.
    async fn next_way_out(&self, changes: &mut NetworkChanges, before: Option<&WayOut>) -> Option<Option<WayOut>> {
        loop {
            changes.next().await?;
            match self.way_out().await {
                Ok(now) if Some(&now) == before => {}
                Ok(now) => return Some(Some(now)),
                Err(error) => {
                    tracing::warn!("reading the machine's routes: {error}; the network is taken for changed");
                    return Some(None);
                }
            }
        }
    }

    /// The interfaces by which packets leave for where this machine is not itself.
    pub(super) async fn uplinks(&self) -> Result<BTreeSet<u32>, Error> {
        let routes = self.routes().await?;
        Ok(routes
            .iter()
            .filter(|route| leads_out(route))
            .flat_map(interfaces_of)
            .collect())
    }

    async fn way_out(&self) -> Result<WayOut, Error> {
        let mut routes: Vec<RouteMessage> = self.routes().await?.into_iter().filter(leads_out).collect();
        for route in &mut routes {
            // Counts and remaining lifetimes.
            route
                .attributes
                .retain(|attribute| !matches!(attribute, RouteAttribute::CacheInfo(_)));
        }
        let used: BTreeSet<u32> = routes.iter().flat_map(interfaces_of).collect();
        let counts = |index: u32| used.is_empty() || used.contains(&index);
        let addresses = self.addresses().await?;
        let links = self.links().await?;
        Ok(WayOut {
            routes,
            addresses: addresses
                .into_iter()
                .filter(|address| counts(address.index))
                .map(|address| (address.index, address.network))
                .collect(),
            carriers: links
                .into_iter()
                .filter(|link| link.has_carrier && counts(link.index))
                .map(|link| link.index)
                .collect(),
        })
    }
}

pub(super) fn leads_out(route: &RouteMessage) -> bool {
    let foreign = table_of(route) != ROUTING_TABLE && route.header.protocol != RouteProtocol::Other(PROTOCOL);
    let far = route.header.destination_prefix_length <= 1
        || route.attributes.iter().any(|attribute| {
            matches!(
                attribute,
                RouteAttribute::Gateway(_) | RouteAttribute::Via(_) | RouteAttribute::MultiPath(_)
            )
        });
    foreign && far && route.header.kind == RouteType::Unicast && table_of(route) != LOCAL_TABLE
}

pub(super) fn interfaces_of(route: &RouteMessage) -> Vec<u32> {
    let several = route.attributes.iter().find_map(|attribute| {
        if let RouteAttribute::MultiPath(hops) = attribute {
            Some(hops.iter().map(|hop| hop.interface_index).collect())
        } else {
            None
        }
    });
    several.unwrap_or_else(|| oif_of(route).into_iter().collect())
}
