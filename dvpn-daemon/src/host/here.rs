//! Which network this machine is on.

use std::{
    net::{IpAddr, SocketAddr, SocketAddrV6, UdpSocket},
    time::Duration,
};

use dvpn_core::line::book::NetworkId;
use netlink_packet_route::{
    AddressFamily,
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage},
    route::{RouteAddress, RouteAttribute, RouteMessage, RouteVia},
};
use tokio::time::sleep;

use super::{
    Error, Host,
    netlink::read,
    way_out::{interfaces_of, leads_out},
};

/// How often the router is asked for its hardware address, and how long each time. Links without such addresses have none.
const ASKED: u32 = 10;
const ANSWER_AFTER: Duration = Duration::from_millis(100);
/// The discard port (RFC 863): nothing has to listen there for the router to be looked for.
const DISCARD: u16 = 9;

impl Host {
    /// The network that the default route leads into, told by the interface and the router's addresses; nothing without a
    /// default route. A network behind the same router by another interface is another one: its line is.
    pub async fn network_id(&self) -> Result<Option<NetworkId>, Error> {
        let routes = self.routes().await?;
        let defaults = routes
            .iter()
            .filter(|route| leads_out(route) && route.header.destination_prefix_length == 0);
        let Some(way) = defaults.min_by_key(|route| (is_v6(route), metric(route))) else {
            return Ok(None);
        };
        let Some(index) = interfaces_of(way).first().copied() else {
            return Ok(None);
        };
        let links = self.links().await?;
        let Some(name) = links.into_iter().find(|link| link.index == index).map(|link| link.name) else {
            return Ok(None);
        };
        let Some(gateway) = gateway(way) else {
            return Ok(Some(NetworkId::of([name.as_bytes()])));
        };
        let hardware = self.hardware_address(gateway, index).await?.unwrap_or_default();
        let address = gateway.to_string();
        Ok(Some(NetworkId::of([name.as_bytes(), address.as_bytes(), &hardware])))
    }

    async fn hardware_address(&self, router: IpAddr, index: u32) -> Result<Option<Vec<u8>>, Error> {
        for _ in 0..ASKED {
            let neighbours = read("neighbours", || self.netlink().neighbours().get().execute()).await?;
            if let Some(known) = neighbours
                .iter()
                .find_map(|message| hardware_of(message, router, index))
            {
                return Ok(Some(known));
            }
            if let Err(error) = look_for(router, index) {
                tracing::debug!("looking for this network's router: {error}");
            }
            sleep(ANSWER_AFTER).await;
        }
        Ok(None)
    }
}

/// An empty datagram makes the kernel ask who has the address.
fn look_for(router: IpAddr, index: u32) -> std::io::Result<()> {
    let (local, to): (&str, SocketAddr) = match router {
        IpAddr::V4(_) => ("0.0.0.0:0", (router, DISCARD).into()),
        IpAddr::V6(address) => ("[::]:0", SocketAddrV6::new(address, DISCARD, 0, index).into()),
    };
    let socket = UdpSocket::bind(local)?;
    crate::control_plane::mark(&socket2::SockRef::from(&socket));
    socket.set_nonblocking(true)?;
    socket.send_to(&[], to).map(drop)
}

fn is_v6(route: &RouteMessage) -> bool {
    route.header.address_family == AddressFamily::Inet6
}

/// The kernel prefers the smaller one.
fn metric(route: &RouteMessage) -> u32 {
    let found = route.attributes.iter().find_map(|attribute| {
        if let RouteAttribute::Priority(metric) = attribute {
            Some(*metric)
        } else {
            None
        }
    });
    found.unwrap_or(0)
}

#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "the crate's enum is open; what is not named is not asked for"
)]
fn gateway(route: &RouteMessage) -> Option<IpAddr> {
    let attributes = |attributes: &[RouteAttribute]| {
        attributes.iter().find_map(|attribute| match attribute {
            RouteAttribute::Gateway(RouteAddress::Inet(address)) | RouteAttribute::Via(RouteVia::Inet(address)) => {
                Some(IpAddr::V4(*address))
            }
            RouteAttribute::Gateway(RouteAddress::Inet6(address)) | RouteAttribute::Via(RouteVia::Inet6(address)) => {
                Some(IpAddr::V6(*address))
            }
            _ => None,
        })
    };
    let first_hop = || {
        route.attributes.iter().find_map(|attribute| match attribute {
            RouteAttribute::MultiPath(hops) => attributes(&hops.first()?.attributes),
            _ => None,
        })
    };
    attributes(&route.attributes).or_else(first_hop)
}

/// The hardware address in an entry about this router on this link; entries that are still being resolved have none.
fn hardware_of(message: &NeighbourMessage, router: IpAddr, index: u32) -> Option<Vec<u8>> {
    let about = message.header.ifindex == index
        && message.attributes.iter().any(|attribute| {
            matches!(attribute, NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) if IpAddr::V4(*address) == router)
                || matches!(attribute, NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)) if IpAddr::V6(*address) == router)
        });
    if !about {
        return None;
    }
    message.attributes.iter().find_map(|attribute| {
        if let NeighbourAttribute::LinkLayerAddress(bytes) = attribute {
            bytes.iter().any(|byte| *byte != 0).then(|| bytes.clone())
        } else {
            None
        }
    })
}
