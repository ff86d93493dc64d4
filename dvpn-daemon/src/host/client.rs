//! The client's network and firewall: one state, made to stand as a whole.
//!
//! In app mode only what is bound to the tunnel's interface or address goes through it. In device mode everything does
//! that does not carry our mark, and with a blocking policy nothing passes beside it but what [`super::client_policy`]
//! names. Two barriers stand against a leak, and each holds without the other: rules and routes, whose table ends in
//! `unreachable` for both families, and the firewall.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use dvpn_core::firewall::{Exemptions, Policy};
use ipnetwork::IpNetwork;
use netlink_packet_route::{AddressFamily, IpProtocol};

use super::{
    CLIENT_INTERFACE, CLIENT_TABLE, Error, Host, PROVIDER_INTERFACE, client_policy,
    forwarding::{self, Remembered},
    host_prefix,
    neighbours::Neighbourhood,
    netlink::Selector,
    nft::{self, expr::Family},
    portal_opening::PortalOpening,
    provider::remembered,
};

/// Most addresses of pool, payment server and orchestrator that are open at once: those used last.
const MAX_CONTROL: usize = 32;
/// SSH's port, reachable unless something else is said, when somebody listens there.
const SSH: u16 = 22;

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

/// What of device mode is configured.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeviceConfig {
    /// Private networks that this machine is on stay reachable.
    pub allow_lan: bool,
    /// TCP ports that stay reachable from outside; nothing means 22 while somebody listens there.
    pub inbound: Option<Vec<u16>>,
    /// UDP ports at which this machine serves as a provider.
    pub served: Vec<u16>,
}

/// The client's side as it should be.
pub(super) struct ClientSide {
    /// In device mode only.
    device: Option<DeviceConfig>,
    policy: Policy,
    guarded: Vec<IpAddr>,
    network: Option<ClientNetwork>,
    /// The last one used last.
    control: Vec<SocketAddr>,
    resolvers: BTreeSet<SocketAddr>,
    /// As they were last seen.
    around: Neighbourhood,
    inbound: Vec<u16>,
    /// For a login to the network.
    pub(super) portal: Option<PortalOpening>,
    /// Whether the kernel can reset a connection that is refused; nothing while that is not known.
    tells: Option<bool>,
    /// Settings to put back. The table remembers them too, for a run after this one; but somebody may flush it.
    remembered: Vec<Remembered>,
    /// Something was asked for in this run. Before, what an earlier one left is left alone: it may be blocking.
    told: bool,
    /// Who makes the table; opened at the first change.
    committer: Option<nft::Committer>,
    /// How many rules the table has; nothing while it is not of this process's making.
    made: Option<usize>,
}

impl Default for ClientSide {
    fn default() -> Self {
        Self {
            device: None,
            policy: Policy::Open,
            guarded: Vec::new(),
            network: None,
            control: Vec::new(),
            resolvers: BTreeSet::new(),
            around: Neighbourhood::default(),
            inbound: Vec::new(),
            portal: None,
            tells: None,
            remembered: Vec::new(),
            told: false,
            committer: None,
            made: None,
        }
    }
}

impl ClientSide {
    pub(super) fn exemptions(&self) -> Option<&Exemptions> {
        match &self.policy {
            Policy::Blocked(exemptions) => Some(exemptions),
            Policy::Open => None,
        }
    }

    /// Device mode, while there is something for it to do.
    fn standing_device(&self) -> Option<&DeviceConfig> {
        let stands = self.network.is_some() || self.exemptions().is_some();
        self.device.as_ref().filter(|_| stands)
    }

    /// The interfaces by which nothing may be led beside the tunnel.
    fn dead_ends(&self) -> BTreeSet<u32> {
        let blocks = self.standing_device().is_some() && self.exemptions().is_some();
        let outside = self.around.outside.iter().filter(|_| blocks);
        outside.map(|(index, _)| *index).collect()
    }

    /// Whether there is a table at all.
    fn has_table(&self) -> bool {
        self.standing_device().is_some() || !self.guarded.is_empty()
    }

    pub(super) fn addresses(&self) -> &[IpNetwork] {
        self.network.as_ref().map_or(&[], |network| &network.addresses)
    }

    /// What is known first is what there was before us.
    fn remember(&mut self, settings: Vec<Remembered>) {
        for setting in settings {
            if !self.remembered.iter().any(|known| known.is_of(&setting)) {
                self.remembered.push(setting);
            }
        }
    }

    fn table(&self, owned: bool) -> nft::batch::Batch {
        let control: BTreeSet<SocketAddr> = self.control.iter().copied().collect();
        let device = self.standing_device().map(|device| client_policy::Device {
            blocked: self.exemptions(),
            control: &control,
            resolvers: &self.resolvers,
            inbound: &self.inbound,
            served: &device.served,
            neighbours: &self.around.neighbours,
            portal: self.portal.as_ref(),
            tells: self.tells.unwrap_or(true),
        });
        let facts = client_policy::Facts {
            guarded: &self.guarded,
            addresses: self.addresses(),
            device,
            remembered: &self.remembered,
        };
        client_policy::table(&facts, self.made.is_none(), owned)
    }

    /// Which packets look in which table, the first that applies first.
    fn selectors(&self) -> Vec<Selector> {
        const FAMILIES: [AddressFamily; 2] = [AddressFamily::Inet, AddressFamily::Inet6];
        let mut selectors = Vec::new();
        if self.network.is_some() {
            selectors.extend(FAMILIES.map(|family| Selector::Interface(family, CLIENT_INTERFACE.to_owned())));
            selectors.extend(self.addresses().iter().map(|address| Selector::Source(address.ip())));
        }
        let Some(device) = self.standing_device() else {
            return selectors;
        };
        for family in FAMILIES {
            for interface in [PROVIDER_INTERFACE, CLIENT_INTERFACE] {
                selectors.push(Selector::From(family, interface.to_owned()));
            }
            for port in &self.inbound {
                selectors.push(Selector::Answer(family, IpProtocol::Tcp, *port));
            }
            for port in &device.served {
                selectors.push(Selector::Answer(family, IpProtocol::Udp, *port));
            }
        }
        for (family, ours, servers) in client_policy::DHCP {
            let family = match family {
                Family::V4 => AddressFamily::Inet,
                Family::V6 => AddressFamily::Inet6,
            };
            selectors.push(Selector::Dhcp(family, ours, servers));
        }
        if self.exemptions().is_some() {
            selectors.extend(FAMILIES.map(Selector::Marked));
            let outside = self.around.outside.iter();
            selectors.extend(outside.map(|(_, name)| Selector::Bound(name.clone())));
        }
        let networks: BTreeSet<IpNetwork> = self
            .around
            .neighbours
            .iter()
            .map(|neighbour| neighbour.network)
            .collect();
        selectors.extend(networks.into_iter().map(Selector::To));
        selectors.extend(FAMILIES.map(Selector::Unmarked));
        selectors
    }
}

impl Host {
    /// Turns device mode on, from the next change on.
    pub async fn device_mode(&self, config: DeviceConfig) {
        self.inner.client.lock().await.device = Some(config);
    }

    /// Makes the firewall what the session asks for. A blocking policy belongs to device mode and is refused in app mode
    /// rather than half applied; an open one takes away what an earlier run left.
    pub async fn apply_policy(&self, policy: &Policy) -> Result<(), Error> {
        let mut side = self.inner.client.lock().await;
        if side.device.is_none() && matches!(policy, Policy::Blocked(_)) {
            return Err(Error::NotInAppMode);
        }
        side.policy = policy.clone();
        side.told = true;
        self.settle(&mut side).await
    }

    /// Sets or removes the guard of our tunnel addresses. It outlives the interface and the daemon.
    ///
    /// Dropped packets are counted by [`super::SOURCE_ELSEWHERE`] and [`super::DESTINATION_ELSEWHERE`] in
    /// [`Host::client_counters`].
    pub async fn set_client_guard(&self, addresses: &[IpAddr]) -> Result<(), Error> {
        let mut side = self.inner.client.lock().await;
        side.guarded = addresses.to_vec();
        side.told = true;
        self.settle(&mut side).await
    }

    /// Lets our marked sockets reach these addresses of pool, payment server or orchestrator from now on.
    pub async fn allow_control(&self, addresses: &[SocketAddr]) -> Result<(), Error> {
        let mut side = self.inner.client.lock().await;
        let known = addresses.iter().all(|address| side.control.contains(address));
        side.control.retain(|address| !addresses.contains(address));
        side.control.extend(addresses);
        let surplus = side.control.len().saturating_sub(MAX_CONTROL);
        side.control.drain(..surplus);
        if known { Ok(()) } else { commit_standing(&mut side) }
    }

    /// Lets our marked sockets ask these name servers from now on.
    pub async fn set_resolvers(&self, servers: &[SocketAddr]) -> Result<(), Error> {
        let mut side = self.inner.client.lock().await;
        let servers: BTreeSet<SocketAddr> = servers.iter().copied().collect();
        if side.resolvers == servers {
            return Ok(());
        }
        side.resolvers = servers;
        commit_standing(&mut side)
    }

    /// Looks at the machine again and makes everything stand as it should, whoever changed it.
    pub async fn reassert_client(&self) -> Result<(), Error> {
        let mut side = self.inner.client.lock().await;
        if !side.told {
            return Ok(());
        }
        self.stand(&mut side).await
    }

    /// Makes everything stand again if somebody took something of it away; says what they did.
    pub async fn repair_client(&self) -> Result<Option<&'static str>, Error> {
        let mut side = self.inner.client.lock().await;
        if !side.told {
            return Ok(None);
        }
        let Some(lost) = self.client_lost(&side).await? else {
            return Ok(None);
        };
        // Whatever the table is now, it becomes ours in one transaction.
        side.made = None;
        self.stand(&mut side).await.map(|()| Some(lost))
    }

    /// Firewall, rules and routes, those through the tunnel too while its interface is there.
    async fn stand(&self, side: &mut ClientSide) -> Result<(), Error> {
        self.settle(side).await?;
        match &side.network {
            Some(network) if self.link(&network.interface).await?.is_some() => self.lead_through(network).await,
            Some(_) | None => Ok(()),
        }
    }

    /// What of it does not stand any more.
    pub(super) async fn client_lost(&self, side: &ClientSide) -> Result<Option<&'static str>, Error> {
        let rules = nft::read::rules(CLIENT_TABLE).map_err(|source| Error::FirewallRead {
            table: CLIENT_TABLE,
            source,
        })?;
        let made = side.made.unwrap_or(0);
        if made != rules {
            tracing::debug!("the table {CLIENT_TABLE} has {rules} rules instead of {made}");
            return Ok(Some("firewall"));
        }
        let selectors = side.selectors();
        if selectors.is_empty() {
            return Ok(None);
        }
        let index = match &side.network {
            Some(network) => self.link(&network.interface).await?.map(|link| link.index),
            None => None,
        };
        let mut wanted = everything().map(|default| (default, None)).to_vec();
        if let (Some(network), Some(index)) = (&side.network, index) {
            wanted.extend(routes(network, index));
            let there = self.addresses().await?;
            let has = |address: &IpNetwork| there.iter().any(|a| a.index == index && a.network == *address);
            if !network.addresses.iter().all(has) {
                return Ok(Some("addresses"));
            }
        }
        if !self.has_rules(&selectors).await? {
            return Ok(Some("rules"));
        }
        let stand = self.has_routes(&wanted).await? && side.dead_ends().is_subset(&self.dead_ends().await?);
        Ok((!stand).then_some("routes"))
    }

    /// Makes the client's addresses, routes and rules equal to `network`, replacing what was there of ours.
    ///
    /// Our table ends in `unreachable` for both families, which stand before the first rule and after the last: at no
    /// moment does a packet of the tunnel find another way out. A family without a tunnel address goes nowhere.
    pub async fn client_up(&self, network: &ClientNetwork) -> Result<(), Error> {
        self.interface_index(&network.interface).await?;
        let network = ClientNetwork {
            addresses: network.addresses.iter().map(host_prefix).collect(),
            ..network.clone()
        };
        let mut side = self.inner.client.lock().await;
        side.network = Some(network.clone());
        side.told = true;
        self.settle(&mut side).await?;
        self.lead_through(&network).await
    }

    /// Removes the client's addresses, routes and rules; what blocks stays. It is no error if the interface is gone
    /// already.
    pub async fn client_down(&self) -> Result<(), Error> {
        let mut side = self.inner.client.lock().await;
        side.network = None;
        if let Some(link) = self.link(CLIENT_INTERFACE).await? {
            self.set_addresses(link.index, &link.name, &[], false).await?;
        }
        self.settle(&mut side).await
    }

    /// Addresses, the link, and the routes through it.
    async fn lead_through(&self, network: &ClientNetwork) -> Result<(), Error> {
        let interface = network.interface.as_str();
        let index = self.interface_index(interface).await?;
        self.set_addresses(index, interface, &network.addresses, false).await?;
        self.set_up(index, interface, network.mtu_bytes).await?;
        let routes = routes(network, index);
        let mut wanted = everything().map(|default| (default, None)).to_vec();
        wanted.extend(&routes);
        self.delete_routes(&wanted).await?;
        for (to, oif) in routes {
            self.add_route(to, oif).await?;
        }
        Ok(())
    }

    /// Makes firewall, rules and `unreachable` what `side` says. What closes comes before what opens.
    async fn settle(&self, side: &mut ClientSide) -> Result<(), Error> {
        if let Some(device) = side.standing_device() {
            let (lan, inbound) = (device.allow_lan, device.inbound.clone());
            side.around = self.neighbourhood(lan).await?;
            side.inbound = inbound.unwrap_or_else(|| forwarding::listens(SSH).then_some(SSH).into_iter().collect());
        }
        if side.has_table() {
            commit_with_settings(side)?;
        }
        let selectors = side.selectors();
        let defaults = everything().map(|default| (default, None));
        if !selectors.is_empty() {
            for default in everything() {
                self.add_route(default, None).await?;
            }
        }
        self.set_dead_ends(&side.dead_ends()).await?;
        let stale = self.add_rules(&selectors).await?;
        if side.network.is_none() {
            // While a rule stands, its table still answers "unreachable".
            self.delete_routes(&defaults).await?;
        }
        self.delete_rules(stale).await?;
        if selectors.is_empty() {
            self.delete_routes(&[]).await?;
        }
        if !side.has_table() {
            side.remember(remembered(CLIENT_TABLE)?);
            for setting in side.remembered.drain(..) {
                setting.restore()?;
            }
            // With the socket that owns it; the next table gets another.
            let removed = match side.committer.take() {
                Some(committer) => committer.delete_table(CLIENT_TABLE),
                None => nft::delete_table(CLIENT_TABLE),
            };
            removed.map_err(firewall_error)?;
            side.made = None;
        }
        Ok(())
    }
}

/// The table with the settings that device mode needs, which it remembers before they are changed.
fn commit_with_settings(side: &mut ClientSide) -> Result<(), Error> {
    let new = match side.standing_device() {
        Some(_) => forwarding::client_needs(&side.around.uplinks),
        None => Vec::new(),
    };
    side.remember(remembered(CLIENT_TABLE)?);
    side.remember(new.clone());
    commit(side)?;
    new.iter().try_for_each(Remembered::apply)
}

/// The table alone, if it stands.
pub(super) fn commit_standing(side: &mut ClientSide) -> Result<(), Error> {
    if side.has_table() { commit(side) } else { Ok(()) }
}

fn commit(side: &mut ClientSide) -> Result<(), Error> {
    let mut committer = match side.committer.take() {
        Some(committer) => committer,
        None => nft::Committer::open().map_err(firewall_error)?,
    };
    let mut done = committer.commit(|owned| side.table(owned));
    let tells = side.standing_device().is_some_and(|_| side.exemptions().is_some());
    if side.tells.is_none() && tells {
        side.tells = Some(done.is_ok());
        if done.is_err() {
            // Without that it blocks as well.
            done = committer.commit(|owned| side.table(owned));
        }
    }
    side.committer = Some(committer);
    side.made = Some(done.map_err(firewall_error)?);
    Ok(())
}

fn firewall_error(source: std::io::Error) -> Error {
    Error::Firewall {
        table: CLIENT_TABLE,
        source,
    }
}

/// What the provider carries, of families that we have an address of.
fn routes(network: &ClientNetwork, index: u32) -> Vec<(IpNetwork, Option<u32>)> {
    let carried = |route: &&IpNetwork| {
        let addresses = network.addresses.iter();
        addresses
            .into_iter()
            .any(|address| address.is_ipv4() == route.is_ipv4())
    };
    let exact = |route: &IpNetwork| IpNetwork::new(route.network(), route.prefix()).unwrap_or(*route);
    let carried = network.routes.iter().filter(carried);
    carried.map(|route| (exact(route), Some(index))).collect()
}

/// The default routes of both families.
fn everything() -> [IpNetwork; 2] {
    let prefix = |address: IpAddr| IpNetwork::new(address, 0).unwrap_or_else(|_| address.into());
    [
        prefix(Ipv4Addr::UNSPECIFIED.into()),
        prefix(Ipv6Addr::UNSPECIFIED.into()),
    ]
}
