//! The provider's network: its interface, what its clients may reach, and forwarding for that alone.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use netlink_packet_route::{
    AddressFamily,
    route::{RouteAttribute, RouteHeader, RouteMessage, RouteType},
};

use super::{
    Error, Host, PROVIDER_TABLE, forwarding,
    forwarding::Remembered,
    netlink::{destination_of, oif_of, table_of},
    nft,
    provider_policy::{Facts, fresh, update},
};

/// What the pool gives a provider.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProviderNetwork {
    /// The tunnel's interface; it exists and has no peer yet.
    pub interface: String,
    /// The inner networks, our own address in each: `10.96.0.1/20`.
    pub networks: Vec<IpNetwork>,
    /// Inner MTU in bytes.
    pub mtu_bytes: u16,
    /// Addresses that others know this node by: its public endpoint, what the pool saw. Clients reach no service of
    /// ours there either, should a router send them back.
    pub public: Vec<IpAddr>,
}

/// What the policy needs to know of the machine.
struct Surroundings {
    uplinks: Vec<String>,
    on_link: Vec<IpNetwork>,
}

impl Host {
    /// Puts up the firewall, then addresses, then the link, then forwarding. Peers may come after this.
    pub async fn provider_up(&self, network: &ProviderNetwork) -> Result<(), Error> {
        let mut current = self.inner.provider.lock().await;
        let index = self.interface_index(&network.interface).await?;
        restore_settings(PROVIDER_TABLE)?;
        let around = self.surroundings(&network.interface).await?;
        let settings = settings(network, &around)?;
        commit(fresh(&facts(network, &around, &settings)))?;
        *current = Some(network.clone());
        self.set_addresses(index, &network.interface, &network.networks, true)
            .await?;
        self.set_up(index, &network.interface, network.mtu_bytes).await?;
        settings.iter().try_for_each(Remembered::apply)
    }

    /// Reads the machine's addresses and routes again and makes the policy fit. To be called on every network change.
    pub async fn provider_refresh(&self) -> Result<(), Error> {
        let current = self.inner.provider.lock().await;
        let network = current.as_ref().ok_or(Error::ProviderDown)?;
        let around = self.surroundings(&network.interface).await?;
        let new = settings(network, &around)?;
        let settings: Vec<Remembered> = remembered(PROVIDER_TABLE)?
            .into_iter()
            .chain(new.iter().cloned())
            .collect();
        commit(update(&facts(network, &around, &settings)))?;
        new.iter().try_for_each(Remembered::apply)
    }

    /// Changes the addresses that others know this node by.
    pub async fn provider_public(&self, public: Vec<IpAddr>) -> Result<(), Error> {
        self.inner
            .provider
            .lock()
            .await
            .as_mut()
            .ok_or(Error::ProviderDown)?
            .public = public;
        self.provider_refresh().await
    }

    /// Takes the link down, puts the settings back, then removes the firewall. No error if nothing is up.
    pub async fn provider_down(&self) -> Result<(), Error> {
        let mut current = self.inner.provider.lock().await;
        if let Some(network) = current.take()
            && let Some(link) = self.link(&network.interface).await?
        {
            self.set_down(link.index, &link.name).await?;
            self.set_addresses(link.index, &link.name, &[], true).await?;
        }
        restore_settings(PROVIDER_TABLE)?;
        nft::delete_table(PROVIDER_TABLE).map_err(|source| Error::Firewall {
            table: PROVIDER_TABLE,
            source,
        })?;
        Ok(())
    }

    /// The prefixes of every interface but `interface`, and what routes say is on a link.
    pub async fn foreign_prefixes(&self, interface: &str) -> Result<Vec<IpNetwork>, Error> {
        Ok(self.surroundings(interface).await?.on_link)
    }

    async fn surroundings(&self, interface: &str) -> Result<Surroundings, Error> {
        let links = self.links().await?;
        let name = |index: u32| {
            links
                .iter()
                .find(|link| link.index == index)
                .map(|link| link.name.clone())
        };
        let others = |index: u32| name(index).is_some_and(|name| name != interface);
        let mut around = Surroundings {
            uplinks: Vec::new(),
            on_link: Vec::new(),
        };
        for route in self.routes().await? {
            let (Some(to), Some(oif)) = (destination_of(&route), oif_of(&route)) else {
                continue;
            };
            if table_of(&route) != u32::from(RouteHeader::RT_TABLE_MAIN)
                || route.header.kind != RouteType::Unicast
                || !others(oif)
            {
                continue;
            }
            if to.prefix() == 0 {
                around.uplinks.extend(name(oif));
            } else if !has_gateway(&route) {
                around.on_link.push(to);
            }
        }
        around.uplinks.extend(self.multipath_uplinks(&links).await?);
        for address in self
            .addresses()
            .await?
            .into_iter()
            .filter(|address| others(address.index))
        {
            let network = IpNetwork::new(address.network.network(), address.network.prefix());
            around.on_link.push(network.unwrap_or(address.network));
        }
        around.uplinks.sort();
        around.uplinks.dedup();
        around.on_link.sort();
        around.on_link.dedup();
        Ok(around)
    }

    /// Default routes with several next hops name their interfaces there.
    async fn multipath_uplinks(&self, links: &[super::netlink::Link]) -> Result<Vec<String>, Error> {
        let mut found = Vec::new();
        for route in self.routes().await? {
            if table_of(&route) != u32::from(RouteHeader::RT_TABLE_MAIN) || route.header.destination_prefix_length != 0
            {
                continue;
            }
            for attribute in &route.attributes {
                if let RouteAttribute::MultiPath(hops) = attribute {
                    let indexes = hops.iter().map(|hop| hop.interface_index);
                    found.extend(indexes.filter_map(|index| {
                        links
                            .iter()
                            .find(|link| link.index == index)
                            .map(|link| link.name.clone())
                    }));
                }
            }
        }
        Ok(found)
    }
}

fn settings(network: &ProviderNetwork, around: &Surroundings) -> Result<Vec<Remembered>, Error> {
    let has = |v4: bool| network.networks.iter().any(|prefix| prefix.is_ipv4() == v4);
    forwarding::needed(&network.interface, &around.uplinks, has(true), has(false))
}

/// Puts back every setting that the table remembers; says which.
pub(super) fn restore_settings(table: &'static str) -> Result<Vec<String>, Error> {
    let mut restored = Vec::new();
    for setting in remembered(table)? {
        if setting.restore()? {
            restored.push(setting.to_comment());
        }
    }
    Ok(restored)
}

pub(super) fn remembered(table: &'static str) -> Result<Vec<Remembered>, Error> {
    let comments = nft::read::comments(table).map_err(|source| Error::FirewallRead { table, source })?;
    Ok(comments
        .iter()
        .filter_map(|comment| Remembered::parse(comment))
        .collect())
}

fn facts<'a>(network: &'a ProviderNetwork, around: &'a Surroundings, remembered: &'a [Remembered]) -> Facts<'a> {
    Facts {
        interface: &network.interface,
        networks: &network.networks,
        uplinks: &around.uplinks,
        on_link: &around.on_link,
        remembered,
        public: &network.public,
        router: forwarding::router(remembered),
    }
}

fn commit(batch: nft::batch::Batch) -> Result<(), Error> {
    nft::commit(batch).map_err(|source| Error::Firewall {
        table: PROVIDER_TABLE,
        source,
    })
}

#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "the crate's enum is open; what is not named is not asked for"
)]
fn has_gateway(route: &RouteMessage) -> bool {
    route.attributes.iter().any(|attribute| match attribute {
        RouteAttribute::Gateway(_) | RouteAttribute::Via(_) | RouteAttribute::MultiPath(_) => true,
        _ => route.header.address_family == AddressFamily::Unspec,
    })
}
