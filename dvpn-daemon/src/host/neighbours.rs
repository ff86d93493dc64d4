//! The networks that this machine is itself on, as far as device mode lets them be reached beside the tunnel.
//!
//! Only what the kernel knows from our own addresses counts, and only private ranges: a route that the network pushed to
//! us (DHCP option 121, a router advertisement) makes nobody a neighbour.

use std::collections::BTreeSet;

use ipnetwork::IpNetwork;
use netlink_packet_route::link::InfoKind;

use super::{
    CLIENT_INTERFACE, Error, Host, PROVIDER_INTERFACE,
    netlink::{Address, Link},
};

/// Private and link-local ranges (RFC 1918, RFC 3927, RFC 4193).
const PRIVATE: [&str; 5] = [
    "10.0.0.0/8",
    "172.16.0.0/12",
    "192.168.0.0/16",
    "169.254.0.0/16",
    "fc00::/7",
];
/// What a local network is reached by besides its own addresses: multicast, broadcast and link-local.
const ON_EVERY_LAN: [&str; 4] = ["224.0.0.0/4", "255.255.255.255/32", "fe80::/10", "ff00::/8"];

/// Whom a network belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    /// This machine alone: containers and virtual machines on a bridge without a port to the outside, and our clients as
    /// a provider. What they send further is forwarded, and judged there.
    Own,
    /// Others too.
    Lan,
}

impl Kind {
    /// Ports of name servers there: what is asked of them the network hears.
    pub(super) fn name_servers(self) -> &'static [u16] {
        match self {
            Self::Own => &[],
            Self::Lan => &[53, 853],
        }
    }
}

/// A network that stays reachable, by its interface only.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Neighbour {
    pub(super) interface: String,
    pub(super) network: IpNetwork,
    pub(super) kind: Kind,
}

/// Where this machine is.
#[derive(Debug, Default)]
pub(super) struct Neighbourhood {
    /// In order, each once.
    pub(super) neighbours: Vec<Neighbour>,
    /// The names of the interfaces that lead to the internet.
    pub(super) uplinks: Vec<String>,
    /// Index and name of every interface, but for loopback and tunnels, by which IPv4 can be led to nobody.
    pub(super) outside: Vec<(u32, String)>,
}

impl Host {
    /// With the networks of this machine alone, and with `lan` those of its local network.
    pub(super) async fn neighbourhood(&self, lan: bool) -> Result<Neighbourhood, Error> {
        let uplinks = self.uplinks().await?;
        let links = self.links().await?;
        let ours = ["lo", CLIENT_INTERFACE, PROVIDER_INTERFACE];
        let outside = links
            .iter()
            .filter(|link| link.asks && !ours.contains(&link.name.as_str()));
        Ok(Neighbourhood {
            outside: outside.map(|link| (link.index, link.name.clone())).collect(),
            neighbours: judge(&links, &self.addresses().await?, &uplinks, lan),
            uplinks: links
                .into_iter()
                .filter(|link| uplinks.contains(&link.index))
                .map(|link| link.name)
                .collect(),
        })
    }
}

fn judge(links: &[Link], addresses: &[Address], uplinks: &BTreeSet<u32>, lan: bool) -> Vec<Neighbour> {
    let parse = |texts: &[&str]| -> Vec<IpNetwork> { texts.iter().filter_map(|text| text.parse().ok()).collect() };
    let (private, on_every_lan) = (parse(&PRIVATE), parse(&ON_EVERY_LAN));
    let mut found = BTreeSet::new();
    for link in links {
        let kind = if link.name == "lo" || link.name == CLIENT_INTERFACE {
            continue;
        } else if link.name == PROVIDER_INTERFACE || is_own_bridge(link, links, uplinks) {
            Kind::Own
        } else if lan {
            Kind::Lan
        } else {
            continue;
        };
        let of_link = addresses.iter().filter(|address| address.index == link.index);
        let networks = of_link.filter_map(|address| {
            let network = IpNetwork::new(address.network.network(), address.network.prefix()).ok()?;
            private.iter().any(|range| contains(range, &network)).then_some(network)
        });
        let mut networks: Vec<IpNetwork> = networks.collect();
        if kind == Kind::Lan && !networks.is_empty() {
            networks.extend(&on_every_lan);
        }
        found.extend(networks.into_iter().map(|network| Neighbour {
            interface: link.name.clone(),
            network,
            kind,
        }));
    }
    found.into_iter().collect()
}

/// Whether only this machine's own containers and virtual machines can be behind it.
fn is_own_bridge(link: &Link, links: &[Link], uplinks: &BTreeSet<u32>) -> bool {
    link.kind == Some(InfoKind::Bridge)
        && !uplinks.contains(&link.index)
        && links
            .iter()
            .filter(|port| port.controller == Some(link.index))
            .all(|port| matches!(port.kind, Some(InfoKind::Veth | InfoKind::Tun)))
}

fn contains(range: &IpNetwork, network: &IpNetwork) -> bool {
    range.is_ipv4() == network.is_ipv4() && range.prefix() <= network.prefix() && range.contains(network.network())
}

#[cfg(test)]
mod tests {
    use netlink_packet_route::address::AddressMessage;

    use super::*;

    fn link(index: u32, name: &str, kind: Option<InfoKind>, controller: Option<u32>) -> Link {
        Link {
            index,
            name: name.to_owned(),
            kind,
            has_carrier: true,
            asks: true,
            controller,
        }
    }

    fn address(index: u32, network: &str) -> Address {
        Address {
            index,
            network: network.parse().unwrap(),
            message: AddressMessage::default(),
        }
    }

    #[test]
    fn only_private_networks_of_our_own_addresses_are_neighbours() {
        let links = [
            link(1, "lo", None, None),
            link(2, "eth0", None, None),
            link(3, "docker0", Some(InfoKind::Bridge), None),
            link(4, "veth1", Some(InfoKind::Veth), Some(3)),
            link(5, "br0", Some(InfoKind::Bridge), None),
            link(6, "eth1", None, Some(5)),
            link(7, "dvpn0", Some(InfoKind::Wireguard), None),
            link(8, "dvpnp0", Some(InfoKind::Wireguard), None),
        ];
        let addresses = [
            address(1, "127.0.0.1/8"),
            address(2, "192.168.7.20/24"),
            address(2, "203.0.113.20/24"),
            address(2, "10.0.0.5/7"),
            address(3, "172.17.0.1/16"),
            address(5, "192.168.9.1/24"),
            address(7, "10.96.0.2/32"),
            address(8, "10.97.0.1/20"),
        ];
        let names = |lan| -> Vec<String> {
            judge(&links, &addresses, &BTreeSet::from([2]), lan)
                .iter()
                .map(|n| format!("{} {} {:?}", n.interface, n.network, n.kind))
                .collect()
        };
        // br0 has a port to the outside: whoever is behind it is no part of this machine.
        let own = ["docker0 172.17.0.0/16 Own", "dvpnp0 10.97.0.0/20 Own"];
        assert_eq!(names(false), own);
        let all = names(true);
        for network in own {
            assert!(all.contains(&network.to_owned()), "{all:?}");
        }
        for network in [
            "eth0 192.168.7.0/24 Lan",
            "eth0 224.0.0.0/4 Lan",
            "br0 192.168.9.0/24 Lan",
        ] {
            assert!(all.contains(&network.to_owned()), "{all:?}");
        }
        assert!(
            !all.iter().any(|n| n.contains("203.0.113") || n.contains("10.0.0.0/7")),
            "{all:?}"
        );
    }
}
