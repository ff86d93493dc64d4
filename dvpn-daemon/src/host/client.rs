//! The client's network in app mode: only what is bound to the tunnel's interface or address goes through it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnetwork::IpNetwork;
use netlink_packet_route::AddressFamily;

use super::{CLIENT_INTERFACE, Error, Host, host_prefix, netlink::Selector};

/// What an approval gives us.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientNetwork {
    /// The tunnel's interface; it exists.
    pub interface: String,
    /// Our tunnel addresses. Only the address counts, the prefix is always /32 or /128.
    pub addresses: Vec<IpNetwork>,
    /// Inner MTU in bytes.
    pub mtu_bytes: u16,
    /// What the provider carries: the approval's allowed IPs.
    pub routes: Vec<IpNetwork>,
}

impl Host {
    /// Makes the client's addresses, routes and rules equal to `network`, replacing what was there of ours.
    ///
    /// Our table ends in `unreachable` for both families, which stand before the first rule and after the last: at no
    /// moment does a packet of the tunnel find another way out. A family without a tunnel address goes nowhere.
    pub async fn client_up(&self, network: &ClientNetwork) -> Result<(), Error> {
        let interface = network.interface.as_str();
        let index = self.interface_index(interface).await?;
        let addresses: Vec<IpNetwork> = network.addresses.iter().map(host_prefix).collect();
        let mut selectors: Vec<Selector> = [AddressFamily::Inet, AddressFamily::Inet6]
            .map(|family| Selector::Interface(family, interface.to_owned()))
            .to_vec();
        selectors.extend(addresses.iter().map(|address| Selector::Source(address.ip())));
        let mut routes = everything().map(|default| (default, None)).to_vec();
        for route in &network.routes {
            if addresses.iter().any(|address| address.is_ipv4() == route.is_ipv4()) {
                let route = IpNetwork::new(route.network(), route.prefix()).unwrap_or(*route);
                routes.push((route, Some(index)));
            }
        }

        for default in everything() {
            self.add_route(default, None).await?;
        }
        for selector in &selectors {
            self.add_rule(selector).await?;
        }
        self.delete_rules(&selectors).await?;
        self.set_addresses(index, interface, &addresses, false).await?;
        self.set_up(index, interface, network.mtu_bytes).await?;
        self.delete_routes(&routes).await?;
        for (to, oif) in routes {
            self.add_route(to, oif).await?;
        }
        Ok(())
    }

    /// Removes the client's addresses, routes and rules. It is no error if the interface is gone already.
    pub async fn client_down(&self) -> Result<(), Error> {
        if let Some(link) = self.link(CLIENT_INTERFACE).await? {
            self.set_addresses(link.index, &link.name, &[], false).await?;
        }
        // While a rule stands, its table still answers "unreachable".
        self.delete_routes(&everything().map(|default| (default, None))).await?;
        self.delete_rules(&[]).await?;
        self.delete_routes(&[]).await?;
        Ok(())
    }
}

/// The default routes of both families.
fn everything() -> [IpNetwork; 2] {
    let prefix = |address: IpAddr| IpNetwork::new(address, 0).unwrap_or_else(|_| address.into());
    [
        prefix(Ipv4Addr::UNSPECIFIED.into()),
        prefix(Ipv6Addr::UNSPECIFIED.into()),
    ]
}
