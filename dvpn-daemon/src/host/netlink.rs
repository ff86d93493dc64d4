//! rtnetlink as the other files use it: typed reads, and changes that say what they were about.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use futures::{TryStream, TryStreamExt as _};
use ipnetwork::IpNetwork;
use netlink_packet_route::{
    AddressFamily, IpProtocol,
    address::{AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope},
    link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage},
    route::{
        RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
    },
    rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage, RulePortRange},
};
use rtnetlink::{IpVersion, LinkUnspec};
use tokio::time::sleep;

use super::{Error, Host, NOBODY_TABLE, PROTOCOL, ROUTING_TABLE, RULE_PRIORITY};
use crate::tunnel::{FWMARK, FWMARK_MASK};

/// The dummy address that no machine has (RFC 7600).
const NOBODY: Ipv4Addr = Ipv4Addr::new(192, 0, 0, 8);
/// How often a read is repeated, and how soon.
const READ_TRIES: u32 = 20;
const READ_AGAIN_AFTER: Duration = Duration::from_millis(5);

/// A link, as far as this module cares.
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) kind: Option<InfoKind>,
    /// Whether the layer below is there: a cable, an access point, the other end of a pair.
    pub(super) has_carrier: bool,
    /// Whether it is up and asks who has an address before it sends there (ARP).
    pub(super) asks: bool,
    /// The bridge or bond that it is a port of.
    pub(super) controller: Option<u32>,
}

/// An address on a link.
pub(super) struct Address {
    pub(super) index: u32,
    pub(super) network: IpNetwork,
    pub(super) message: AddressMessage,
}

/// Which packets a rule of ours is about. The first two kinds come first, the last comes last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Selector {
    /// Those bound to this interface: our table.
    Interface(AddressFamily, String),
    /// Those from this address: our table.
    Source(IpAddr),
    /// Those that came in by this interface: the main table.
    From(AddressFamily, String),
    /// Those of this protocol from this port: the main table. The firewall sees to it that these are answers.
    Answer(AddressFamily, IpProtocol, u16),
    /// UDP from the first port to the second: the main table.
    Dhcp(AddressFamily, u16, u16),
    /// Those to this network: the main table.
    To(IpNetwork),
    /// Those with our mark: the main table.
    Marked(AddressFamily),
    /// IPv4 bound to this interface: the table that leads to nobody.
    Bound(String),
    /// Those without our mark: our table.
    Unmarked(AddressFamily),
}

impl Selector {
    fn family(&self) -> AddressFamily {
        let of = |v4: bool| if v4 { AddressFamily::Inet } else { AddressFamily::Inet6 };
        match self {
            Self::Interface(family, _)
            | Self::From(family, _)
            | Self::Answer(family, ..)
            | Self::Dhcp(family, ..)
            | Self::Marked(family)
            | Self::Unmarked(family) => *family,
            Self::Bound(_) => AddressFamily::Inet,
            Self::Source(address) => of(address.is_ipv4()),
            Self::To(network) => of(network.is_ipv4()),
        }
    }

    fn table(&self) -> u32 {
        match self {
            Self::Interface(..) | Self::Source(_) | Self::Unmarked(_) => ROUTING_TABLE,
            Self::Bound(_) => NOBODY_TABLE,
            Self::From(..) | Self::Answer(..) | Self::Dhcp(..) | Self::To(_) | Self::Marked(_) => {
                u32::from(RouteHeader::RT_TABLE_MAIN)
            }
        }
    }

    fn priority(&self) -> u32 {
        match self {
            Self::Interface(..) | Self::Source(_) => RULE_PRIORITY,
            Self::From(..) | Self::Answer(..) | Self::Dhcp(..) | Self::To(_) => RULE_PRIORITY + 1,
            Self::Marked(_) => RULE_PRIORITY + 2,
            Self::Bound(_) => RULE_PRIORITY + 3,
            Self::Unmarked(_) => RULE_PRIORITY + 4,
        }
    }

    /// The rule as it is asked for.
    fn rule(&self) -> RuleMessage {
        let mut rule = RuleMessage::default();
        rule.header.family = self.family();
        rule.header.table = RouteHeader::RT_TABLE_UNSPEC;
        rule.header.action = RuleAction::ToTable;
        let one = |port: u16| RulePortRange { start: port, end: port };
        let own = match self {
            Self::Interface(_, name) | Self::Bound(name) => vec![RuleAttribute::Oifname(name.clone())],
            Self::Marked(_) => vec![RuleAttribute::FwMark(FWMARK), RuleAttribute::FwMask(FWMARK_MASK)],
            Self::From(_, name) => vec![RuleAttribute::Iifname(name.clone())],
            Self::Source(address) => {
                rule.header.src_len = if address.is_ipv4() { 32 } else { 128 };
                vec![RuleAttribute::Source(*address)]
            }
            Self::To(network) => {
                rule.header.dst_len = network.prefix();
                vec![RuleAttribute::Destination(network.network())]
            }
            Self::Answer(_, protocol, port) => vec![
                RuleAttribute::IpProtocol(*protocol),
                RuleAttribute::SourcePortRange(one(*port)),
            ],
            Self::Dhcp(_, ours, servers) => vec![
                RuleAttribute::IpProtocol(IpProtocol::Udp),
                RuleAttribute::SourcePortRange(one(*ours)),
                RuleAttribute::DestinationPortRange(one(*servers)),
            ],
            Self::Unmarked(_) => {
                rule.header.flags |= RuleFlags::Invert;
                vec![RuleAttribute::FwMark(FWMARK), RuleAttribute::FwMask(FWMARK_MASK)]
            }
        };
        rule.attributes.extend(own);
        rule.attributes.extend([
            RuleAttribute::Table(self.table()),
            RuleAttribute::Priority(self.priority()),
            RuleAttribute::Protocol(RouteProtocol::Other(PROTOCOL)),
        ]);
        rule
    }

    /// Whether a rule that the kernel shows is this one.
    fn selects_as(&self, rule: &RuleMessage) -> bool {
        let wanted = self.rule();
        let lengths = |rule: &RuleMessage| (rule.header.family, rule.header.src_len, rule.header.dst_len);
        let inverted = |rule: &RuleMessage| rule.header.flags.contains(RuleFlags::Invert);
        lengths(&wanted) == lengths(rule)
            && inverted(&wanted) == inverted(rule)
            && wanted
                .attributes
                .iter()
                .all(|attribute| rule.attributes.contains(attribute))
    }
}

/// What the kernel answers to deleting something that is gone already.
#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "the crate's enum is open; what is not named is not asked for"
)]
pub(super) fn is_gone(error: &rtnetlink::Error) -> bool {
    match error {
        rtnetlink::Error::NetlinkError(message) => {
            matches!(
                -message.raw_code(),
                libc::ENOENT | libc::ESRCH | libc::ENODEV | libc::EADDRNOTAVAIL
            )
        }
        _ => false,
    }
}

/// An answer in which "it is not there" is as good as "done".
pub(super) fn or_gone(result: Result<(), rtnetlink::Error>, what: impl Into<String>) -> Result<(), Error> {
    match result {
        Err(error) if !is_gone(&error) => Err(Error::Change {
            what: what.into(),
            source: error,
        }),
        Ok(()) | Err(_) => Ok(()),
    }
}

pub(super) fn link_of(message: &LinkMessage) -> Link {
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        kind: None,
        has_carrier: message.header.flags.contains(LinkFlags::LowerUp),
        asks: message.header.flags.contains(LinkFlags::Up) && !message.header.flags.contains(LinkFlags::Noarp),
        controller: None,
    };
    for attribute in &message.attributes {
        if let LinkAttribute::IfName(name) = attribute {
            link.name.clone_from(name);
        } else if let LinkAttribute::Controller(index) = attribute {
            link.controller = Some(*index);
        } else if let LinkAttribute::LinkInfo(infos) = attribute {
            for info in infos {
                if let LinkInfo::Kind(kind) = info {
                    link.kind = Some(kind.clone());
                }
            }
        }
    }
    link
}

/// The table of a route, whichever field holds it.
pub(super) fn table_of(message: &RouteMessage) -> u32 {
    message
        .attributes
        .iter()
        .find_map(|a| {
            if let RouteAttribute::Table(table) = a {
                Some(*table)
            } else {
                None
            }
        })
        .unwrap_or_else(|| u32::from(message.header.table))
}

/// The outgoing interface of a route.
pub(super) fn oif_of(message: &RouteMessage) -> Option<u32> {
    message.attributes.iter().find_map(|a| {
        if let RouteAttribute::Oif(index) = a {
            Some(*index)
        } else {
            None
        }
    })
}

/// The destination of a route; the default route's is `0.0.0.0/0` or `::/0`.
#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "the crate's enum is open; what is not named is not asked for"
)]
pub(super) fn destination_of(message: &RouteMessage) -> Option<IpNetwork> {
    let address = message.attributes.iter().find_map(|a| match a {
        RouteAttribute::Destination(RouteAddress::Inet(v4)) => Some(IpAddr::V4(*v4)),
        RouteAttribute::Destination(RouteAddress::Inet6(v6)) => Some(IpAddr::V6(*v6)),
        _ => None,
    });
    let unspecified = match message.header.address_family {
        AddressFamily::Inet => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        AddressFamily::Inet6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        _ => return None,
    };
    IpNetwork::new(address.unwrap_or(unspecified), message.header.destination_prefix_length).ok()
}

pub(super) fn is_own_route(route: &RouteMessage) -> bool {
    table_of(route) == ROUTING_TABLE && route.header.protocol == RouteProtocol::Other(PROTOCOL)
}

/// The interface of a route that leads to nobody.
pub(super) fn to_nobody(route: &RouteMessage) -> Option<u32> {
    let ours = table_of(route) == NOBODY_TABLE && route.header.protocol == RouteProtocol::Other(PROTOCOL);
    oif_of(route).filter(|_| ours)
}

/// Where a route of ours leads, and by which interface.
fn place_of(route: &RouteMessage) -> Option<(IpNetwork, Option<u32>)> {
    // The kernel reports an unreachable IPv6 route as one to the loopback interface.
    let oif = if route.header.kind == RouteType::Unreachable {
        None
    } else {
        oif_of(route)
    };
    Some((destination_of(route)?, oif))
}

/// All that the kernel has of something. It cannot tell in one piece what somebody changes meanwhile: then it is asked
/// again.
pub(super) async fn read<T, S>(what: &'static str, ask: impl Fn() -> S) -> Result<Vec<T>, Error>
where
    S: TryStream<Ok = T, Error = rtnetlink::Error>,
{
    let mut tried = 0;
    loop {
        match ask().try_collect().await {
            Ok(found) => return Ok(found),
            Err(source) if tried == READ_TRIES => return Err(Error::Read { what, source }),
            Err(error) => tracing::debug!("reading {what} by rtnetlink once more: {error}"),
        }
        tried += 1;
        sleep(READ_AGAIN_AFTER).await;
    }
}

impl Host {
    pub(super) async fn links(&self) -> Result<Vec<Link>, Error> {
        let found = read("links", || self.netlink().link().get().execute()).await?;
        Ok(found.iter().map(link_of).collect())
    }

    pub(super) async fn link(&self, name: &str) -> Result<Option<Link>, Error> {
        Ok(self.links().await?.into_iter().find(|link| link.name == name))
    }

    pub(super) async fn interface_index(&self, name: &str) -> Result<u32, Error> {
        self.link(name)
            .await?
            .map(|link| link.index)
            .ok_or_else(|| Error::NoInterface(name.to_owned()))
    }

    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "the crate's enum is open; what is not named is not asked for"
    )]
    pub(super) async fn addresses(&self) -> Result<Vec<Address>, Error> {
        let messages: Vec<AddressMessage> = read("addresses", || self.netlink().address().get().execute()).await?;
        Ok(messages
            .into_iter()
            .filter_map(|message| {
                let find = |local: bool| {
                    message.attributes.iter().find_map(|a| match a {
                        AddressAttribute::Local(ip) if local => Some(*ip),
                        AddressAttribute::Address(ip) if !local => Some(*ip),
                        _ => None,
                    })
                };
                let network = IpNetwork::new(find(true).or_else(|| find(false))?, message.header.prefix_len).ok()?;
                Some(Address {
                    index: message.header.index,
                    network,
                    message,
                })
            })
            .collect())
    }

    pub(super) async fn routes(&self) -> Result<Vec<RouteMessage>, Error> {
        let mut all = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut question = RouteMessage::default();
            question.header.address_family = family;
            all.extend(read("routes", || self.netlink().route().get(question.clone()).execute()).await?);
        }
        Ok(all)
    }

    /// Our rules, known by their protocol number.
    pub(super) async fn own_rules(&self) -> Result<Vec<RuleMessage>, Error> {
        let mut ours = Vec::new();
        for version in [IpVersion::V4, IpVersion::V6] {
            let found: Vec<RuleMessage> =
                read("routing rules", || self.netlink().rule().get(version.clone()).execute()).await?;
            ours.extend(found.into_iter().filter(|rule| {
                rule.attributes
                    .contains(&RuleAttribute::Protocol(RouteProtocol::Other(PROTOCOL)))
            }));
        }
        Ok(ours)
    }

    /// Whether each of these is there.
    pub(super) async fn has_rules(&self, wanted: &[Selector]) -> Result<bool, Error> {
        let rules = self.own_rules().await?;
        let there = |selector: &Selector| rules.iter().any(|rule| selector.selects_as(rule));
        Ok(wanted.iter().all(there))
    }

    /// Whether each of these (destination, interface) is in our table.
    pub(super) async fn has_routes(&self, wanted: &[(IpNetwork, Option<u32>)]) -> Result<bool, Error> {
        let routes = self.routes().await?.into_iter();
        let there: Vec<_> = routes
            .filter(is_own_route)
            .filter_map(|route| place_of(&route))
            .collect();
        Ok(wanted.iter().all(|route| there.contains(route)))
    }

    /// Adds those of these rules that are missing; gives those of ours that are none of these.
    pub(super) async fn add_rules(&self, wanted: &[Selector]) -> Result<Vec<RuleMessage>, Error> {
        let mut there = self.own_rules().await?;
        for selector in wanted {
            if !there.iter().any(|rule| selector.selects_as(rule)) {
                self.add_rule(selector).await?;
            }
        }
        there.retain(|rule| !wanted.iter().any(|selector| selector.selects_as(rule)));
        Ok(there)
    }

    /// Removes these rules; says how many there were.
    pub(super) async fn delete_rules(&self, rules: Vec<RuleMessage>) -> Result<usize, Error> {
        let count = rules.len();
        for rule in rules {
            or_gone(
                self.netlink().rule().del(rule).execute().await,
                "removing a routing rule of ours",
            )?;
        }
        Ok(count)
    }

    /// Removes those of our routes in our table that are not in `keep` (destination, interface); says how many.
    pub(super) async fn delete_routes(&self, keep: &[(IpNetwork, Option<u32>)]) -> Result<usize, Error> {
        let mut count = 0;
        for route in self.routes().await? {
            let kept = place_of(&route).is_some_and(|place| keep.contains(&place));
            if is_own_route(&route) && !kept {
                count += 1;
                or_gone(
                    self.netlink().route().del(route).execute().await,
                    "removing a route of ours",
                )?;
            }
        }
        Ok(count)
    }

    /// Adds a route to our table: to an interface, or `unreachable` with the worst metric.
    pub(super) async fn add_route(&self, to: IpNetwork, interface: Option<u32>) -> Result<(), Error> {
        let mut route = RouteMessage::default();
        route.header.address_family = if to.is_ipv4() {
            AddressFamily::Inet
        } else {
            AddressFamily::Inet6
        };
        route.header.destination_prefix_length = to.prefix();
        route.header.table = RouteHeader::RT_TABLE_UNSPEC;
        route.header.protocol = RouteProtocol::Other(PROTOCOL);
        route.header.scope = RouteScope::Universe;
        route.attributes.push(RouteAttribute::Table(ROUTING_TABLE));
        if to.prefix() > 0 {
            route.attributes.push(RouteAttribute::Destination(to.network().into()));
        }
        if let Some(index) = interface {
            route.header.kind = RouteType::Unicast;
            if to.is_ipv4() {
                route.header.scope = RouteScope::Link;
            }
            route.attributes.push(RouteAttribute::Oif(index));
        } else {
            route.header.kind = RouteType::Unreachable;
            route.attributes.push(RouteAttribute::Priority(u32::MAX));
        }
        let what = format!("adding a route to {to} in table {ROUTING_TABLE}");
        let request = self.netlink().route().add(route).replace();
        request.execute().await.map_err(|source| Error::Change { what, source })
    }

    /// The interfaces by which IPv4 leads to nobody.
    pub(super) async fn dead_ends(&self) -> Result<BTreeSet<u32>, Error> {
        Ok(self.routes().await?.iter().filter_map(to_nobody).collect())
    }

    /// Makes IPv4 lead to nobody by these interfaces and no others; says how many were taken away.
    ///
    /// A packet bound to an interface whose routing says "unreachable" is sent all the same, as if everybody were on its
    /// link (`ip_route_output_key_hash_rcu` in net/ipv4/route.c). So there is a next hop for it, which no machine is
    /// (RFC 7600): it waits for an answer to ARP that never comes.
    pub(super) async fn set_dead_ends(&self, interfaces: &BTreeSet<u32>) -> Result<usize, Error> {
        let (mut count, mut there) = (0, BTreeSet::new());
        for route in self.routes().await? {
            let Some(interface) = to_nobody(&route) else {
                continue;
            };
            if interfaces.contains(&interface) {
                there.insert(interface);
                continue;
            }
            count += 1;
            or_gone(
                self.netlink().route().del(route).execute().await,
                "removing a route to nobody",
            )?;
        }
        for interface in interfaces.difference(&there) {
            let mut route = RouteMessage::default();
            route.header.address_family = AddressFamily::Inet;
            route.header.table = RouteHeader::RT_TABLE_UNSPEC;
            route.header.protocol = RouteProtocol::Other(PROTOCOL);
            route.header.scope = RouteScope::Universe;
            route.header.kind = RouteType::Unicast;
            route.header.flags = RouteFlags::Onlink;
            route.attributes = vec![
                RouteAttribute::Table(NOBODY_TABLE),
                RouteAttribute::Gateway(RouteAddress::Inet(NOBODY)),
                RouteAttribute::Oif(*interface),
                // One for each: without it the next would be the same route.
                RouteAttribute::Priority(*interface),
            ];
            // An interface that goes down or away meanwhile sends nothing.
            match self.netlink().route().add(route).replace().execute().await {
                Err(rtnetlink::Error::NetlinkError(message))
                    if matches!(-message.raw_code(), libc::ENETDOWN | libc::ENODEV) => {}
                Err(source) => {
                    let what = format!("adding a route to nobody in table {NOBODY_TABLE}");
                    return Err(Error::Change { what, source });
                }
                Ok(()) => {}
            }
        }
        Ok(count)
    }

    /// Adds a rule; one that is there already is no error.
    async fn add_rule(&self, selector: &Selector) -> Result<(), Error> {
        let mut request = self.netlink().rule().add();
        *request.message_mut() = selector.rule();
        match request.execute().await {
            Err(rtnetlink::Error::NetlinkError(message)) if message.raw_code() == -libc::EEXIST => Ok(()),
            Err(source) => Err(Error::Change {
                what: format!("adding a rule for table {}", selector.table()),
                source,
            }),
            Ok(()) => Ok(()),
        }
    }

    /// Makes the addresses of an interface of ours equal to these; link-local ones are the kernel's.
    pub(super) async fn set_addresses(
        &self,
        index: u32,
        interface: &str,
        wanted: &[IpNetwork],
        prefix_route: bool,
    ) -> Result<(), Error> {
        let observed: Vec<Address> = self
            .addresses()
            .await?
            .into_iter()
            .filter(|a| a.index == index)
            .collect();
        for old in &observed {
            if !wanted.contains(&old.network) && old.message.header.scope != AddressScope::Link {
                let what = format!("removing {} from {interface}", old.network);
                or_gone(self.netlink().address().del(old.message.clone()).execute().await, what)?;
            }
        }
        for new in wanted
            .iter()
            .filter(|new| observed.iter().all(|old| old.network != **new))
        {
            let mut request = self.netlink().address().add(index, new.ip(), new.prefix());
            let message = request.message_mut();
            let mut flags = AddressFlags::empty();
            if !prefix_route {
                flags |= AddressFlags::Noprefixroute;
            }
            if new.is_ipv6() {
                // The address is ours by contract; without this it could not be bound for a second.
                flags |= AddressFlags::Nodad;
                message.header.flags |= AddressHeaderFlags::Nodad;
            }
            message
                .attributes
                .retain(|a| !matches!(a, AddressAttribute::Broadcast(_)));
            message.attributes.push(AddressAttribute::Flags(flags));
            let what = format!("adding {new} to {interface}");
            request
                .execute()
                .await
                .map_err(|source| Error::Change { what, source })?;
        }
        Ok(())
    }

    /// Sets the MTU and brings the interface up.
    pub(super) async fn set_up(&self, index: u32, interface: &str, mtu_bytes: u16) -> Result<(), Error> {
        let message = LinkUnspec::new_with_index(index).mtu(mtu_bytes.into()).up().build();
        let what = format!("bringing {interface} up with an MTU of {mtu_bytes}");
        self.netlink()
            .link()
            .set(message)
            .execute()
            .await
            .map_err(|source| Error::Change { what, source })
    }

    /// Brings the interface down.
    pub(super) async fn set_down(&self, index: u32, interface: &str) -> Result<(), Error> {
        let message = LinkUnspec::new_with_index(index).down().build();
        or_gone(
            self.netlink().link().set(message).execute().await,
            format!("taking {interface} down"),
        )
    }
}
