//! What a provider's clients may reach: the internet beyond the uplink, the gateway's DNS, and nothing else.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use netlink_packet_netfilter::nftables::InetHookNumber;

use super::{
    PROVIDER_TABLE,
    forwarding::Remembered,
    nft::{
        batch::{Attach, Batch},
        expr::{ECHO_REQUEST, ECHO_REQUEST_V6, Family, ICMP, ICMPV6, Rule, TCP, UDP},
    },
    provider_meter,
};

/// Counters of refused packets. The names are stable: metrics carry them.
pub mod refused {
    /// From an address that is not one of our networks'.
    pub const SPOOFED: &str = "spoofed_source";
    /// From one client to another.
    pub const PEER: &str = "peer_to_peer";
    /// To a network this machine is itself on.
    pub const ON_LINK: &str = "on_link";
    /// To a private, shared, local, multicast or reserved prefix.
    pub const SPECIAL: &str = "special_prefix";
    /// To port 25.
    pub const SMTP: &str = "smtp";
    /// By an interface that is no uplink.
    pub const NOT_UPLINK: &str = "not_uplink";
    /// To this machine, other than DNS and ping at the gateway.
    pub const NODE: &str = "to_node";
    /// From outside to a client, unasked.
    pub const INBOUND: &str = "inbound";
    /// To the gateway address by another interface.
    pub const GATEWAY: &str = "gateway_elsewhere";
    /// From one interface to another, where only the provider side had forwarding switched on.
    pub const TRANSIT: &str = "transit";

    /// Untrackable: it would leave with the client's own address.
    pub const INVALID: &str = "invalid";
    /// More new connections a second than a client may open.
    pub const TOO_FAST: &str = "connection_rate";
    /// More open connections than a client may have.
    pub const TOO_MANY: &str = "connection_count";

    /// All of them.
    pub const ALL: [&str; 13] = [
        SPOOFED, PEER, ON_LINK, SPECIAL, SMTP, NOT_UPLINK, NODE, INBOUND, GATEWAY, TRANSIT, INVALID, TOO_FAST, TOO_MANY,
    ];
}

/// Destinations that are not global unicast (IANA special-purpose registries, RFC 6890), less the documentation
/// prefixes: nobody is reached there by accident, and test networks use them.
const SPECIAL: [&str; 27] = [
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.88.99.0/24",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "224.0.0.0/4",
    "240.0.0.0/4",
    // Unspecified, loopback, IPv4-compatible and IPv4-mapped; translated prefixes lead to IPv4 addresses unseen.
    "::/8",
    "64:ff9b::/96",
    "64:ff9b:1::/48",
    "100::/64",
    "2001::/32",
    "2001:2::/48",
    "2001:10::/28",
    "2001:20::/28",
    "2002::/16",
    "3ffe::/16",
    "5f00::/16",
    "fc00::/7",
    "fe80::/10",
    "fec0::/10",
    "ff00::/8",
];

const CHAINS: [&str; 16] = [
    "zone",
    "forward",
    "input",
    "output",
    "postrouting",
    "from_peers",
    "leaving",
    "destination_v4",
    "destination_v6",
    "uplink",
    "allowed",
    "to_gateway",
    provider_meter::LIMITS,
    provider_meter::SENT,
    provider_meter::RECEIVED,
    "remembered",
];

/// All that the policy depends on.
pub(super) struct Facts<'a> {
    pub(super) interface: &'a str,
    /// Our inner networks, our own address in each.
    pub(super) networks: &'a [IpNetwork],
    /// Interfaces with a default route.
    pub(super) uplinks: &'a [String],
    /// Prefixes of every other interface.
    pub(super) on_link: &'a [IpNetwork],
    /// Settings to put back.
    pub(super) remembered: &'a [Remembered],
    /// Addresses of this node that others know it by: behind a router they are not on any interface.
    pub(super) public: &'a [IpAddr],
    /// Whether somebody else made this machine a router.
    pub(super) router: Router,
}

/// Whether this machine forwards for others than us, each family by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Router {
    pub(super) ipv4: bool,
    pub(super) ipv6: bool,
    /// For IPv6 we had to switch on forwarding between all interfaces.
    pub(super) ipv6_everywhere_by_us: bool,
}

/// The whole table, new: counters start at zero.
pub(super) fn fresh(facts: &Facts<'_>) -> Batch {
    let mut batch = Batch::new(PROVIDER_TABLE);
    batch.replace_table();
    for name in refused::ALL {
        batch.counter(name);
    }
    provider_meter::make_sets(&mut batch);
    for name in CHAINS {
        batch.chain(name, attach(name));
    }
    rules(&mut batch, facts);
    batch
}

/// The same table with other facts: counters go on.
pub(super) fn update(facts: &Facts<'_>) -> Batch {
    let mut batch = Batch::new(PROVIDER_TABLE);
    for name in CHAINS {
        batch.flush_chain(name);
    }
    rules(&mut batch, facts);
    batch
}

fn attach(chain: &str) -> Option<Attach> {
    match chain {
        // Before connection tracking (-200).
        "zone" => Some(Attach::filter(InetHookNumber::PreRouting, -300)),
        "forward" => Some(Attach::filter(InetHookNumber::Forward, 0)),
        "input" => Some(Attach::filter(InetHookNumber::LocalIn, 0)),
        "output" => Some(Attach::filter(InetHookNumber::LocalOut, 0)),
        "postrouting" => Some(Attach::nat(InetHookNumber::PostRouting, 100)),
        _ => None,
    }
}

fn rules(batch: &mut Batch, facts: &Facts<'_>) {
    let interface = facts.interface;
    let refuse = |rule: Rule, counter: &str| rule.count(counter).drop();

    for setting in facts.remembered {
        batch.rule("remembered", Rule::new().done().comment(&setting.to_comment()));
    }

    provider_meter::rules(batch);
    batch.rule("zone", Rule::new().input_is(interface).zone(provider_meter::ZONE));

    // Between interfaces.
    batch.rule("forward", Rule::new().input_is(interface).goto("from_peers"));
    batch.rule(
        "forward",
        Rule::new()
            .output_is(interface)
            .established()
            .jump(provider_meter::RECEIVED),
    );
    batch.rule("forward", Rule::new().output_is(interface).established().accept());
    batch.rule("forward", refuse(Rule::new().output_is(interface), refused::INBOUND));
    for (family, router) in [(Family::V4, facts.router.ipv4), (Family::V6, facts.router.ipv6)] {
        // Where we switch nothing on, what is forwarded is somebody else's.
        if router || !facts.networks.iter().any(|network| Family::of(network) == family) {
            continue;
        }
        if family == Family::V6 && facts.router.ipv6_everywhere_by_us {
            batch.rule("forward", refuse(Rule::new().family(family), refused::TRANSIT));
        } else {
            for uplink in facts.uplinks {
                let transit = Rule::new().family(family).input_is(uplink);
                batch.rule("forward", refuse(transit, refused::TRANSIT));
            }
        }
    }
    for network in facts.networks {
        batch.rule("from_peers", Rule::new().from(network).goto("leaving"));
    }
    batch.rule("from_peers", refuse(Rule::new(), refused::SPOOFED));

    // On-link prefixes are asked first, also of established connections, because they change while those live.
    batch.rule("leaving", refuse(Rule::new().output_is(interface), refused::PEER));
    for address in facts.public {
        let own = IpNetwork::from(*address);
        batch.rule("leaving", refuse(Rule::new().to(&own), refused::NODE));
    }
    for network in facts.on_link {
        batch.rule("leaving", refuse(Rule::new().to(network), refused::ON_LINK));
    }
    batch.rule("leaving", Rule::new().family(Family::V4).goto("destination_v4"));
    batch.rule("leaving", Rule::new().family(Family::V6).goto("destination_v6"));
    batch.rule("leaving", refuse(Rule::new(), refused::SPECIAL));
    for (family, chain) in Family::ALL.into_iter().zip(["destination_v4", "destination_v6"]) {
        let special = SPECIAL.iter().filter_map(|text| text.parse::<IpNetwork>().ok());
        for network in special.filter(|network| Family::of(network) == family) {
            batch.rule(
                chain,
                refuse(Rule::new().destination_in_family(&network), refused::SPECIAL),
            );
        }
        batch.rule(chain, Rule::new().goto("uplink"));
    }
    batch.rule("uplink", refuse(Rule::new().port(TCP, 25), refused::SMTP));
    for uplink in facts.uplinks {
        batch.rule("uplink", Rule::new().output_is(uplink).goto("allowed"));
    }
    batch.rule("allowed", refuse(Rule::new().invalid(), refused::INVALID));
    batch.rule(
        "allowed",
        Rule::new().first_of_connection().jump(provider_meter::LIMITS),
    );
    batch.rule("allowed", Rule::new().jump(provider_meter::SENT));
    batch.rule("allowed", Rule::new().accept());
    batch.rule("uplink", refuse(Rule::new(), refused::NOT_UPLINK));

    own_rules(batch, facts);
}

/// To and from this machine, and how clients leave it.
fn own_rules(batch: &mut Batch, facts: &Facts<'_>) {
    let interface = facts.interface;
    let refuse = |rule: Rule, counter: &str| rule.count(counter).drop();
    batch.rule("input", Rule::new().input_is(interface).goto("to_gateway"));
    for network in facts.networks {
        let gateway = IpNetwork::from(network.ip());
        batch.rule(
            "input",
            refuse(Rule::new().input_is_not("lo").to(&gateway), refused::GATEWAY),
        );
        for protocol in [UDP, TCP] {
            batch.rule(
                "to_gateway",
                Rule::new()
                    .from(network)
                    .to(&gateway)
                    .port(protocol, 53)
                    .goto("allowed"),
            );
        }
        let (protocol, echo) = if network.is_ipv4() {
            (ICMP, ECHO_REQUEST)
        } else {
            (ICMPV6, ECHO_REQUEST_V6)
        };
        batch.rule(
            "to_gateway",
            Rule::new()
                .from(network)
                .to(&gateway)
                .icmp(protocol, echo)
                .goto("allowed"),
        );
    }
    batch.rule("to_gateway", refuse(Rule::new(), refused::NODE));
    batch.rule(
        "output",
        Rule::new()
            .output_is(interface)
            .established()
            .jump(provider_meter::RECEIVED),
    );
    batch.rule("output", Rule::new().output_is(interface).established().accept());
    batch.rule("output", refuse(Rule::new().output_is(interface), refused::INBOUND));

    for network in facts.networks {
        batch.rule(
            "postrouting",
            Rule::new().from(network).output_is_not(interface).masquerade(),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_special_prefix_reads() {
        for text in SPECIAL {
            let network: IpNetwork = text.parse().unwrap();
            assert_eq!(network.network(), network.ip(), "{text}");
        }
    }
}
