//! The client's nftables table: what has a tunnel address stays in the tunnel, and in device mode nothing leaves or
//! arrives beside it but what is named here.
//!
//! Packets that may pass beside the tunnel carry our mark, and their connections too, so that answers find their way
//! where routes are checked backwards (`rp_filter`). The mark alone opens nothing: what leaves is also asked for its
//! address and port.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    time::Instant,
};

use dvpn_core::{
    firewall::{Exemptions, ProbeTarget},
    portal,
};
use ipnetwork::IpNetwork;
use netlink_packet_netfilter::nftables::InetHookNumber;

use super::{
    CLIENT_INTERFACE, CLIENT_TABLE, PROVIDER_INTERFACE,
    forwarding::Remembered,
    neighbours::Neighbour,
    nft::{
        batch::{Attach, Batch},
        expr::{ECHO_REQUEST, ECHO_REQUEST_V6, Family, ICMP, ICMPV6, Rule, TCP, UDP},
    },
    portal_opening::PortalOpening,
};

/// Counter: packets with a tunnel source address that were about to leave by another interface.
pub const SOURCE_ELSEWHERE: &str = "tunnel_source_elsewhere";
/// Counter: packets to a tunnel address that came in by another interface.
pub const DESTINATION_ELSEWHERE: &str = "tunnel_destination_elsewhere";
/// Counter: packets out of the tunnel that nobody here asked for.
pub const UNSOLICITED: &str = "tunnel_unsolicited";
/// Counter: packets into the tunnel with a source that is not a tunnel address.
pub const FOREIGN_SOURCE: &str = "tunnel_foreign_source";
/// Counter: packets that were about to leave beside the tunnel while that is blocked.
pub const BLOCKED_OUT: &str = "blocked_out";
/// Counter: packets that came in beside the tunnel while that is blocked.
pub const BLOCKED_IN: &str = "blocked_in";

/// The comment of a rule that refuses; one in the table shows a later run that it blocks.
pub(super) const BLOCKS: &str = "refused";
/// Holds TCP for as long as somebody is let out to log in to the network.
const PORTAL_LEASE: &str = "portal";

const COUNTERS: [&str; 6] = [
    SOURCE_ELSEWHERE,
    DESTINATION_ELSEWHERE,
    UNSOLICITED,
    FOREIGN_SOURCE,
    BLOCKED_OUT,
    BLOCKED_IN,
];

/// After connection tracking and destination translation's reading, before any source translation (`mangle`).
const BEFORE_TRANSLATION: i32 = -150;
/// Where source addresses are translated (`srcnat`).
const TRANSLATION: i32 = 100;
/// After every source translation.
const AFTER_TRANSLATION: i32 = 150;

const CHAINS: [&str; 10] = [
    "arriving",
    "received",
    "rerouted",
    "refused",
    "leaving",
    "beside",
    "forwarded",
    "translated",
    "entering",
    "remembered",
];

/// `ICMPv6` types of neighbour discovery (RFC 4861) and multicast listener reports (RFC 2710, RFC 3810), without which
/// no IPv6 link works; the kernel sends them, and none goes beyond the link.
const LINK_MESSAGES: [u8; 9] = [130, 131, 132, 133, 134, 135, 136, 137, 143];
/// DHCP's ports, ours and the server's (RFC 2131, RFC 8415).
pub(super) const DHCP: [(Family, u16, u16); 2] = [(Family::V4, 68, 67), (Family::V6, 546, 547)];

/// All that the table depends on.
#[derive(Debug)]
pub(super) struct Facts<'a> {
    /// Our tunnel addresses, those of a session that goes on elsewhere included.
    pub(super) guarded: &'a [IpAddr],
    /// Our tunnel addresses now.
    pub(super) addresses: &'a [IpNetwork],
    /// In device mode only.
    pub(super) device: Option<Device<'a>>,
    /// Settings to put back.
    pub(super) remembered: &'a [Remembered],
}

/// What device mode adds.
#[derive(Debug)]
pub(super) struct Device<'a> {
    /// Nothing passes beside the tunnel but these and the rest of this; without it, everything that finds a way.
    pub(super) blocked: Option<&'a Exemptions>,
    /// Pool, payment server and orchestrator.
    pub(super) control: &'a BTreeSet<SocketAddr>,
    /// The network's name servers.
    pub(super) resolvers: &'a BTreeSet<SocketAddr>,
    /// TCP ports reachable from outside.
    pub(super) inbound: &'a [u16],
    /// UDP ports at which we serve as a provider.
    pub(super) served: &'a [u16],
    /// Networks that stay reachable.
    pub(super) neighbours: &'a [Neighbour],
    /// For a login to the network.
    pub(super) portal: Option<&'a PortalOpening>,
    /// The kernel can reset a connection that is refused.
    pub(super) tells: bool,
}

/// The whole table, `owned` by whoever commits it or by nobody. A `fresh` one begins its counters at zero, another goes on
/// with those that are there.
pub(super) fn table(facts: &Facts<'_>, fresh: bool, owned: bool) -> Batch {
    let mut batch = if owned {
        Batch::owning(CLIENT_TABLE)
    } else {
        Batch::new(CLIENT_TABLE)
    };
    if fresh {
        batch.replace_table();
    } else {
        batch.make_table();
    }
    for name in COUNTERS {
        batch.counter(name);
    }
    for name in CHAINS {
        batch.chain(name, attach(name));
    }
    if !fresh {
        for name in CHAINS {
            batch.flush_chain(name);
        }
    }
    if let Some(device) = &facts.device {
        // With what is left of it at this moment: the table may be made again while it stands.
        let left = |opening: &PortalOpening| opening.until.saturating_duration_since(Instant::now());
        batch.lease(PORTAL_LEASE, TCP, device.portal.map(left));
    }
    for setting in facts.remembered {
        batch.rule("remembered", Rule::new().done().comment(&setting.to_comment()));
    }
    guard(&mut batch, facts);
    if let Some(device) = &facts.device {
        marks(&mut batch, device);
        inside(&mut batch, facts);
        if let Some(exemptions) = device.blocked {
            beside(&mut batch, device, exemptions);
        }
    }
    batch
}

fn attach(chain: &str) -> Option<Attach> {
    use InetHookNumber::{Forward, LocalIn, LocalOut, PostRouting, PreRouting};
    match chain {
        "arriving" => Some(Attach::filter(PreRouting, BEFORE_TRANSLATION)),
        "received" => Some(Attach::filter(LocalIn, 0)),
        "rerouted" => Some(Attach::route(BEFORE_TRANSLATION)),
        "refused" => Some(Attach::filter(LocalOut, 0)),
        "leaving" => Some(Attach::filter(PostRouting, BEFORE_TRANSLATION)),
        "forwarded" => Some(Attach::filter(Forward, BEFORE_TRANSLATION)),
        "translated" => Some(Attach::nat(PostRouting, TRANSLATION)),
        "entering" => Some(Attach::filter(PostRouting, AFTER_TRANSLATION)),
        _ => None,
    }
}

fn refuse(rule: Rule, counter: &str) -> Rule {
    rule.count(counter).drop()
}

/// In every mode: tunnel addresses are used in the tunnel only, and nothing comes out of it unasked.
fn guard(batch: &mut Batch, facts: &Facts<'_>) {
    batch.rule("leaving", Rule::new().output_is("lo").accept());
    for address in facts.guarded.iter().map(|address| IpNetwork::from(*address)) {
        let leaving = Rule::new().from(&address).output_is_not(CLIENT_INTERFACE);
        batch.rule("leaving", refuse(leaving, SOURCE_ELSEWHERE));
        let arriving = Rule::new()
            .to(&address)
            .input_is_not(CLIENT_INTERFACE)
            .input_is_not("lo");
        batch.rule("arriving", refuse(arriving, DESTINATION_ELSEWHERE));
    }
    let asked_for = Rule::new().input_is(CLIENT_INTERFACE).established();
    batch.rule("received", asked_for.accept());
    batch.rule("received", refuse(Rule::new().input_is(CLIENT_INTERFACE), UNSOLICITED));
}

/// Which connections go beside the tunnel: our own sockets', those that began outside at a port that stays reachable,
/// and those of our clients as a provider.
fn marks(batch: &mut Batch, device: &Device<'_>) {
    batch.rule("arriving", Rule::new().input_is("lo").accept());
    batch.rule("arriving", Rule::new().input_is(CLIENT_INTERFACE).accept());
    batch.rule(
        "arriving",
        Rule::new()
            .input_is(PROVIDER_INTERFACE)
            .mark_connection()
            .mark()
            .accept(),
    );
    let ports = device.inbound.iter().map(|port| (TCP, *port));
    let ports: Vec<(u8, u16)> = ports.chain(device.served.iter().map(|port| (UDP, *port))).collect();
    for (protocol, port) in &ports {
        let began_outside = Rule::new().port(*protocol, *port).for_this_machine().original();
        batch.rule("arriving", began_outside.mark_connection().mark().accept());
    }
    for address in device.control {
        // A connection of ours from before this table has no mark until we send, and may be waiting to be sent to.
        let answer = Rule::new()
            .from(&IpNetwork::from(address.ip()))
            .source_port(TCP, address.port())
            .tcp_goes_on();
        batch.rule("arriving", answer.mark_connection().mark().accept());
    }
    batch.rule("arriving", Rule::new().connection_marked().mark());

    batch.rule("rerouted", Rule::new().marked().mark_connection().accept());
    for (protocol, port) in &ports {
        // A connection that is older than this table has no mark yet.
        let answer = Rule::new().source_port(*protocol, *port).reply();
        batch.rule("rerouted", answer.mark_connection().mark().accept());
        if *protocol == TCP {
            let under_way = Rule::new().found_under_way(*port);
            batch.rule("rerouted", under_way.mark_connection().mark().accept());
        }
        let marked = Rule::new().source_port(*protocol, *port).connection_marked();
        batch.rule("rerouted", marked.mark().accept());
    }
    batch.rule("rerouted", Rule::new().reply().connection_marked().mark());
}

/// What is forwarded into the tunnel gets our address, and only our addresses enter it.
fn inside(batch: &mut Batch, facts: &Facts<'_>) {
    batch.rule("forwarded", Rule::new().output_is(CLIENT_INTERFACE).clamp_segments());
    batch.rule("forwarded", Rule::new().output_is(CLIENT_INTERFACE).accept());
    batch.rule(
        "forwarded",
        Rule::new().input_is(CLIENT_INTERFACE).established().accept(),
    );
    batch.rule("forwarded", refuse(Rule::new().input_is(CLIENT_INTERFACE), UNSOLICITED));
    for address in facts.addresses.iter().map(|address| IpNetwork::from(address.ip())) {
        let ours = || Rule::new().output_is(CLIENT_INTERFACE).from(&address);
        batch.rule("translated", ours().done());
        batch.rule("entering", ours().accept());
        let others = Rule::new()
            .output_is(CLIENT_INTERFACE)
            .family(Family::of(&address))
            .masquerade();
        batch.rule("translated", others);
    }
    batch.rule(
        "entering",
        refuse(Rule::new().output_is(CLIENT_INTERFACE), FOREIGN_SOURCE),
    );
}

/// Nothing passes beside the tunnel but what is named here.
fn beside(batch: &mut Batch, device: &Device<'_>, exemptions: &Exemptions) {
    for interface in [CLIENT_INTERFACE, PROVIDER_INTERFACE] {
        batch.rule("leaving", Rule::new().output_is(interface).accept());
    }
    // What our clients as a provider may reach was judged where it was forwarded.
    batch.rule("leaving", Rule::new().input_is(PROVIDER_INTERFACE).accept());
    batch.rule("leaving", Rule::new().marked().jump("beside"));
    unmarked(batch, device, "leaving", |rule| {
        vec![refuse(rule, BLOCKED_OUT).comment(BLOCKS)]
    });
    by_address(batch, device, exemptions);
    told(batch, device);

    for interface in ["lo", CLIENT_INTERFACE, PROVIDER_INTERFACE] {
        batch.rule("received", Rule::new().input_is(interface).accept());
    }
    batch.rule("received", Rule::new().connection_marked().accept());
    link_messages(batch, "received");
    for (family, ours, servers) in DHCP {
        let answers = Rule::new().family(family).source_port(UDP, servers).port(UDP, ours);
        batch.rule("received", answers.accept());
    }
    for neighbour in device.neighbours {
        let near = Rule::new().input_is(&neighbour.interface).from(&neighbour.network);
        batch.rule("received", near.accept());
    }
    batch.rule("received", refuse(Rule::new(), BLOCKED_IN));
}

/// What passes in this chain without our mark, and what becomes of everything else.
fn unmarked(batch: &mut Batch, device: &Device<'_>, chain: &str, refuse: impl Fn(Rule) -> Vec<Rule>) {
    let refuse_in = |batch: &mut Batch, rule: Rule| {
        for rule in refuse(rule) {
            batch.rule(chain, rule);
        }
    };
    batch.rule(chain, Rule::new().connection_marked().reply().accept());
    for port in device.inbound {
        batch.rule(chain, Rule::new().source_port(TCP, *port).connection_marked().accept());
    }
    link_messages(batch, chain);
    for (family, ours, servers) in DHCP {
        let asks = Rule::new().family(family).source_port(UDP, ours).port(UDP, servers);
        batch.rule(chain, asks.accept());
    }
    for neighbour in device.neighbours {
        for port in neighbour.kind.name_servers() {
            for protocol in [UDP, TCP] {
                refuse_in(batch, Rule::new().to(&neighbour.network).port(protocol, *port));
            }
        }
        let near = Rule::new().output_is(&neighbour.interface).to(&neighbour.network);
        batch.rule(chain, near.accept());
    }
    refuse_in(batch, Rule::new());
}

/// A program of this machine whose packets are refused is told so, and does not wait for an answer that cannot come. It
/// is told by the kernel here: nothing of that leaves, and nobody outside is told anything. What is dropped here is an
/// error of sending, but for TCP, which would try again and is reset instead. What is let through is judged again where
/// it leaves.
fn told(batch: &mut Batch, device: &Device<'_>) {
    for interface in ["lo", CLIENT_INTERFACE, PROVIDER_INTERFACE] {
        batch.rule("refused", Rule::new().output_is(interface).accept());
    }
    batch.rule("refused", Rule::new().marked().accept());
    let tells = device.tells;
    unmarked(batch, device, "refused", |rule| {
        let reset = rule.clone().protocol(TCP).count(BLOCKED_OUT).reset();
        let dropped = refuse(rule, BLOCKED_OUT);
        if tells { vec![reset, dropped] } else { vec![dropped] }
    });
}

/// What carries our mark, by address and port.
fn by_address(batch: &mut Batch, device: &Device<'_>, exemptions: &Exemptions) {
    let to = |protocol: u8, to: &SocketAddr| Rule::new().to(&IpNetwork::from(to.ip())).port(protocol, to.port());
    if let Some(endpoint) = &exemptions.tunnel {
        batch.rule("beside", to(UDP, endpoint).accept());
    }
    for address in device.control {
        batch.rule("beside", to(TCP, address).accept());
    }
    for server in device.resolvers {
        for protocol in [UDP, TCP] {
            batch.rule("beside", to(protocol, server).accept());
        }
    }
    for probe in &exemptions.probes {
        let rule = match probe {
            ProbeTarget::Echo(address) => to(UDP, address),
            ProbeTarget::Icmp(address) => {
                let (protocol, kind) = match address {
                    IpAddr::V4(_) => (ICMP, ECHO_REQUEST),
                    IpAddr::V6(_) => (ICMPV6, ECHO_REQUEST_V6),
                };
                Rule::new().to(&IpNetwork::from(*address)).icmp(protocol, kind)
            }
        };
        batch.rule("beside", rule.accept());
    }
    for port in device.served {
        batch.rule("beside", Rule::new().source_port(UDP, *port).accept());
    }
    if let Some(opening) = device.portal {
        login(batch, opening);
    }
}

/// Where a login may go. The kernel ends it by itself: each rule holds only while the lease does.
fn login(batch: &mut Batch, opening: &PortalOpening) {
    for port in portal::PORTS {
        let anywhere = Rule::new().port(TCP, port);
        batch.rule("beside", anywhere.while_leased(PORTAL_LEASE).accept());
    }
    for place in &opening.places {
        let there = Rule::new().to(&IpNetwork::from(place.address));
        let there = match place.port {
            Some(port) => there.port(TCP, port),
            None => there.protocol(TCP),
        };
        batch.rule("beside", there.while_leased(PORTAL_LEASE).accept());
    }
}

fn link_messages(batch: &mut Batch, chain: &str) {
    for kind in LINK_MESSAGES {
        batch.rule(chain, Rule::new().icmp(ICMPV6, kind).accept());
    }
}
