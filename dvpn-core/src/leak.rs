//! The leak test on demand: what is sent on the running machine, and what follows from what the capture saw.
//!
//! Everything goes to addresses where nobody is ([`NOWHERE_V4`], [`NOWHERE_V6`]), to the provider in use or to the
//! network's own name servers, and says nothing. A capture that has not just seen a planted packet proves nothing, so a
//! packet that may pass is sent before and after the others; without it a row whose packets left the program says
//! "unknown". A packet that the kernel refused to take has not left, capture or not.

use std::{
    collections::BTreeSet,
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use serde::Serialize;

use crate::config::Mode;

/// Nobody is here (TEST-NET-1, RFC 5737).
pub const NOWHERE_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
/// Nor here (RFC 3849).
pub const NOWHERE_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1));
/// Where a public name server could be, and is not.
const NO_NAME_SERVER: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 53));
/// The discard service (RFC 863).
const DISCARD: u16 = 9;
const DOMAIN: u16 = 53;

/// What the machine is like while it is tested.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// What goes through the tunnel.
    pub mode: Mode,
    /// Nothing is to pass beside it.
    pub blocking: bool,
    /// The tunnel's interface.
    pub interface: String,
    /// The provider in use.
    pub endpoint: Option<SocketAddr>,
    /// Our tunnel addresses; empty without a tunnel.
    pub addresses: Vec<IpAddr>,
    /// By which packets leave otherwise, each with its addresses.
    pub uplinks: Vec<(String, Vec<IpAddr>)>,
    /// The network's.
    pub name_servers: Vec<SocketAddr>,
    /// Firewall, rules and routes are what was made.
    pub stands: bool,
    /// So are the kernel's settings for answers by their mark (`rp_filter`, `src_valid_mark`) and for ARP.
    pub settings: bool,
}

/// What a socket is bound to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct From {
    /// An address of ours.
    pub address: Option<IpAddr>,
    /// An interface.
    pub interface: Option<String>,
}

/// A datagram of a program that does not carry our mark.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe {
    /// The row that it belongs to.
    pub row: &'static str,
    /// By what.
    pub from: From,
    /// To whom.
    pub to: SocketAddr,
}

/// What is sent, in this order.
pub fn plan(facts: &Facts) -> Vec<Probe> {
    let mut probes = Vec::new();
    let mut add = |row, from: From, to| probes.push(Probe { row, from, to });
    for address in &facts.addresses {
        let to = SocketAddr::new(if address.is_ipv4() { NOWHERE_V4 } else { NOWHERE_V6 }, DISCARD);
        let bound = |interface: &str| From {
            address: Some(*address),
            interface: Some(interface.to_owned()),
        };
        add("tunnel", bound(&facts.interface), to);
        for (uplink, _) in &facts.uplinks {
            add("tunnel_address", bound(uplink), to);
        }
    }
    if facts.mode == Mode::App {
        return probes;
    }
    let anyhow = From::default();
    let by = |uplink: &str| From {
        address: None,
        interface: Some(uplink.to_owned()),
    };
    for (row, to) in [("ipv4", NOWHERE_V4), ("ipv6", NOWHERE_V6)] {
        let to = SocketAddr::new(to, DISCARD);
        add(row, anyhow.clone(), to);
        for (uplink, addresses) in &facts.uplinks {
            add(row, by(uplink), to);
            for address in addresses.iter().filter(|address| address.is_ipv4() == to.is_ipv4()) {
                let address = Some(*address);
                add(
                    row,
                    From {
                        address,
                        interface: None,
                    },
                    to,
                );
            }
        }
    }
    let servers = facts.name_servers.iter().map(|server| ("name_server", *server));
    let others = [("public_name_server", SocketAddr::new(NO_NAME_SERVER, DOMAIN))];
    let provider = facts.endpoint.map(|endpoint| ("provider", endpoint));
    for (row, to) in servers.chain(others).chain(provider) {
        add(row, anyhow.clone(), to);
        for (uplink, _) in &facts.uplinks {
            add(row, by(uplink), to);
        }
    }
    probes
}

/// Where a packet with our mark may go that must be seen; the first that is seen is enough. Nobody else hears of it: it is
/// the network's name server, the provider in use, or nobody.
pub fn plants(facts: &Facts) -> Vec<SocketAddr> {
    if !facts.blocking {
        return vec![SocketAddr::new(NOWHERE_V4, DISCARD)];
    }
    facts.name_servers.iter().copied().chain(facts.endpoint).collect()
}

/// What the capture is worth.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Capture {
    /// It saw what was planted before and after the probes, and these of them.
    Saw(BTreeSet<usize>),
    /// It did not, or there was none.
    Blind(String),
}

/// What the kernel's routes say of a program that binds nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Route {
    /// Nowhere.
    Nowhere,
    /// From this address.
    From(IpAddr),
}

/// A verdict.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// As promised.
    Good,
    /// Nothing is promised here.
    NotPromised,
    /// Cannot tell.
    Unknown,
    /// Something leaves beside the tunnel, or would.
    Leak,
}

impl Verdict {
    /// The name as it stands in replies.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Good => "good",
            Self::NotPromised => "not_promised",
            Self::Unknown => "unknown",
            Self::Leak => "leak",
        }
    }
}

/// One line of the result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// What was looked at.
    pub name: &'static str,
    /// What follows.
    pub verdict: Verdict,
    /// Why, in words.
    pub detail: String,
}

/// Judges a test: the probes of [`plan`], for each what the kernel said when it was sent (nothing: it took it), the
/// capture, and the routes of both families.
pub fn judge(facts: &Facts, probes: &[(Probe, Option<String>)], capture: &Capture, routes: [Route; 2]) -> Vec<Row> {
    let mut rows = vec![standing(facts)];
    rows.push(match capture {
        Capture::Saw(_) => row("capture", Verdict::Good, "it saw the planted packets"),
        Capture::Blind(why) => row("capture", Verdict::Unknown, why),
    });
    if facts.mode == Mode::Device {
        for (name, route) in ["route_ipv4", "route_ipv6"].into_iter().zip(routes) {
            rows.push(match route {
                Route::Nowhere => row(name, Verdict::Good, "leads nowhere"),
                Route::From(address) if facts.addresses.contains(&address) => {
                    row(name, Verdict::Good, "leads into the tunnel")
                }
                Route::From(address) => row(name, Verdict::Leak, format!("leads out from {address}")),
            });
        }
        let answers = "the kernel's settings for marked answers and for ARP";
        rows.push(if !facts.blocking && facts.addresses.is_empty() {
            row("settings", Verdict::NotPromised, "nothing stands that needs them")
        } else if facts.settings {
            row("settings", Verdict::Good, format!("{answers} are as needed"))
        } else {
            row("settings", Verdict::Leak, format!("{answers} were changed: reconnect"))
        });
    }
    let mut names: Vec<&'static str> = Vec::new();
    for (probe, _) in probes {
        if !names.contains(&probe.row) {
            names.push(probe.row);
        }
    }
    rows.extend(names.into_iter().map(|name| sent(name, probes, capture)));
    rows
}

fn row(name: &'static str, verdict: Verdict, detail: impl Into<String>) -> Row {
    Row {
        name,
        verdict,
        detail: detail.into(),
    }
}

fn standing(facts: &Facts) -> Row {
    let name = "firewall";
    match facts.mode {
        Mode::App => row(
            name,
            Verdict::NotPromised,
            "app mode protects what uses the SOCKS5 proxy and nothing else: TUNNEL_MODE=device protects everything",
        ),
        Mode::Device if !facts.stands => row(
            name,
            Verdict::Leak,
            "something of the firewall, rules or routes was taken away: it is made again, or restart the daemon",
        ),
        Mode::Device if facts.blocking => row(name, Verdict::Good, "everything beside the tunnel is blocked"),
        Mode::Device => row(
            name,
            Verdict::Leak,
            "nothing is blocked: no session is wanted, or KILL_SWITCH=false",
        ),
    }
}

fn sent(name: &'static str, probes: &[(Probe, Option<String>)], capture: &Capture) -> Row {
    let of_row = || probes.iter().enumerate().filter(|(_, (probe, _))| probe.row == name);
    let taken = of_row().filter(|(_, (_, refused))| refused.is_none()).count();
    let refused = of_row().count().saturating_sub(taken);
    match capture {
        Capture::Saw(seen) => {
            let left: Vec<String> = of_row()
                .filter(|(number, _)| seen.contains(number))
                .map(|(_, (probe, _))| probe.to_string())
                .collect();
            if left.is_empty() {
                let detail = format!("packets sent: {taken}, seen to leave: none, refused by the kernel: {refused}");
                row(name, Verdict::Good, detail)
            } else {
                row(
                    name,
                    Verdict::Leak,
                    format!("left beside the tunnel: {}", left.join("; ")),
                )
            }
        }
        Capture::Blind(_) if taken == 0 => row(
            name,
            Verdict::Good,
            format!("packets refused by the kernel: {refused}, that is all"),
        ),
        Capture::Blind(_) => row(
            name,
            Verdict::Unknown,
            format!("packets sent: {taken}, and nobody looked"),
        ),
    }
}

impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "to {}", self.to)?;
        if let Some(address) = &self.from.address {
            write!(f, " from {address}")?;
        }
        if let Some(interface) = &self.from.interface {
            write!(f, " bound to {interface}")?;
        }
        Ok(())
    }
}

/// Which verdict stands for all: the worst.
pub fn worst(rows: &[Row]) -> Verdict {
    rows.iter().map(|row| row.verdict).max().unwrap_or(Verdict::Unknown)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> Facts {
        Facts {
            mode: Mode::Device,
            blocking: true,
            interface: "dvpn0".to_owned(),
            endpoint: Some("198.51.100.7:51820".parse().unwrap()),
            addresses: vec!["10.96.0.2".parse().unwrap(), "fd00::2".parse().unwrap()],
            uplinks: vec![(
                "eth0".to_owned(),
                vec!["203.0.113.20".parse().unwrap(), "2001:db8::20".parse().unwrap()],
            )],
            name_servers: vec!["203.0.113.1:53".parse().unwrap()],
            stands: true,
            settings: true,
        }
    }

    fn verdict(rows: &[Row], name: &str) -> Verdict {
        rows.iter()
            .find(|row| row.name == name)
            .unwrap_or_else(|| panic!("no row {name} in {rows:?}"))
            .verdict
    }

    fn all_taken(facts: &Facts) -> Vec<(Probe, Option<String>)> {
        plan(facts).into_iter().map(|probe| (probe, None)).collect()
    }

    const NOWHERE: [Route; 2] = [Route::Nowhere; 2];

    #[test]
    fn every_way_of_a_program_is_tried_and_nobody_far_away_is_asked() {
        let facts = facts();
        let probes = plan(&facts);
        for row in [
            "tunnel",
            "tunnel_address",
            "ipv4",
            "ipv6",
            "name_server",
            "public_name_server",
            "provider",
        ] {
            assert!(probes.iter().any(|probe| probe.row == row), "{row}");
        }
        let known = [
            NOWHERE_V4,
            NOWHERE_V6,
            NO_NAME_SERVER,
            facts.endpoint.unwrap().ip(),
            facts.name_servers[0].ip(),
        ];
        for probe in &probes {
            assert!(known.contains(&probe.to.ip()), "{probe}");
            let own = probe
                .from
                .address
                .is_none_or(|address| address.is_ipv4() == probe.to.is_ipv4());
            assert!(own, "{probe}");
        }
        for (row, bound) in [
            ("ipv4", From::default()),
            (
                "ipv4",
                From {
                    address: None,
                    interface: Some("eth0".to_owned()),
                },
            ),
            (
                "ipv6",
                From {
                    address: Some("2001:db8::20".parse().unwrap()),
                    interface: None,
                },
            ),
            (
                "name_server",
                From {
                    address: None,
                    interface: Some("eth0".to_owned()),
                },
            ),
        ] {
            assert!(
                probes.iter().any(|probe| probe.row == row && probe.from == bound),
                "{row} {bound:?}"
            );
        }
    }

    #[test]
    fn app_mode_tests_what_app_mode_promises() {
        let facts = Facts {
            mode: Mode::App,
            blocking: false,
            ..facts()
        };
        let probes = plan(&facts);
        assert!(probes.iter().all(|probe| probe.from.address.is_some()), "{probes:?}");
        let rows = judge(&facts, &all_taken(&facts), &Capture::Saw(BTreeSet::new()), NOWHERE);
        assert_eq!(verdict(&rows, "firewall"), Verdict::NotPromised);
        assert_eq!(worst(&rows), Verdict::NotPromised);
        let rows = judge(&facts, &all_taken(&facts), &Capture::Saw([0].into()), NOWHERE);
        assert_eq!((verdict(&rows, "tunnel"), worst(&rows)), (Verdict::Leak, Verdict::Leak));
        let alone = Facts {
            addresses: Vec::new(),
            ..facts
        };
        assert!(plan(&alone).is_empty());
    }

    #[test]
    fn each_packet_that_is_seen_is_a_leak_of_its_row_alone() {
        let facts = facts();
        let probes = all_taken(&facts);
        let good = judge(&facts, &probes, &Capture::Saw(BTreeSet::new()), NOWHERE);
        assert_eq!(worst(&good), Verdict::Good, "{good:?}");
        for (number, (probe, _)) in probes.iter().enumerate() {
            let rows = judge(&facts, &probes, &Capture::Saw([number].into()), NOWHERE);
            for row in &rows {
                let leaks = row.name == probe.row;
                assert_eq!(row.verdict == Verdict::Leak, leaks, "{number}: {row:?}");
            }
            let told = rows.iter().find(|row| row.verdict == Verdict::Leak).unwrap();
            assert!(told.detail.contains(&probe.to_string()), "{told:?}");
        }
    }

    #[test]
    fn a_blind_capture_says_unknown_unless_the_kernel_refused_everything() {
        let facts = facts();
        let mut probes = all_taken(&facts);
        for (_, refused) in probes.iter_mut().filter(|(probe, _)| probe.row == "ipv6") {
            *refused = Some("no route to host".to_owned());
        }
        let rows = judge(
            &facts,
            &probes,
            &Capture::Blind("no planted packet was seen".to_owned()),
            NOWHERE,
        );
        assert_eq!(verdict(&rows, "capture"), Verdict::Unknown);
        assert_eq!(verdict(&rows, "ipv6"), Verdict::Good);
        for row in [
            "ipv4",
            "name_server",
            "public_name_server",
            "provider",
            "tunnel_address",
        ] {
            assert_eq!(verdict(&rows, row), Verdict::Unknown, "{row}");
        }
        assert_eq!(worst(&rows), Verdict::Unknown);
    }

    #[test]
    fn what_does_not_stand_and_what_leads_out_is_said() {
        let seen = Capture::Saw(BTreeSet::new());
        let of = |facts: &Facts, routes| judge(facts, &[], &seen, routes);
        let rows = of(
            &Facts {
                stands: false,
                ..facts()
            },
            NOWHERE,
        );
        assert_eq!(verdict(&rows, "firewall"), Verdict::Leak);
        let rows = of(
            &Facts {
                blocking: false,
                ..facts()
            },
            NOWHERE,
        );
        assert_eq!(verdict(&rows, "firewall"), Verdict::Leak);
        let rows = of(
            &Facts {
                settings: false,
                ..facts()
            },
            NOWHERE,
        );
        assert_eq!(verdict(&rows, "settings"), Verdict::Leak);
        let inside = Route::From("10.96.0.2".parse().unwrap());
        let outside = Route::From("203.0.113.20".parse().unwrap());
        let rows = of(&facts(), [inside, outside]);
        assert_eq!(verdict(&rows, "route_ipv4"), Verdict::Good);
        assert_eq!(verdict(&rows, "route_ipv6"), Verdict::Leak);
        let nothing = Facts {
            blocking: false,
            addresses: Vec::new(),
            endpoint: None,
            settings: false,
            ..facts()
        };
        assert_eq!(verdict(&of(&nothing, NOWHERE), "settings"), Verdict::NotPromised);
    }

    #[test]
    fn what_is_planted_may_pass_and_tells_nobody() {
        let facts = facts();
        assert_eq!(plants(&facts), [facts.name_servers[0], facts.endpoint.unwrap()]);
        let open = Facts {
            blocking: false,
            ..facts
        };
        assert_eq!(plants(&open), ["192.0.2.1:9".parse().unwrap()]);
    }
}
