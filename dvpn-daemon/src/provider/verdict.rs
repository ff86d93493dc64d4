//! What the pool found when it tried to reach this node, in words its owner can act on.

use dvpn_common::{contract::Reachability, status::Problem};

/// What the words need to know.
pub(super) struct Facts<'a> {
    /// What the pool says it found.
    pub(super) reachability: Option<Reachability>,
    /// Its own words, when it does not list us.
    pub(super) reason: Option<&'a str>,
    /// Whether clients are shown this node.
    pub(super) listed: bool,
    /// What we announce.
    pub(super) endpoint: &'a str,
    /// Where the pool sees us.
    pub(super) observed: Option<std::net::IpAddr>,
    pub(super) port: u16,
    pub(super) probe_port: u16,
}

/// Nothing while clients reach this node, or while nobody tried yet.
pub(super) fn verdict(facts: &Facts<'_>) -> Option<Problem> {
    let Facts {
        endpoint,
        port,
        probe_port,
        ..
    } = facts;
    let problem = |what: String, how: String| Some(Problem { what, how });
    match facts.reachability {
        Some(Reachability::NoEcho) => problem(
            format!("the pool's echo to UDP port {probe_port} of {endpoint} was not answered"),
            format!(
                "open UDP ports {probe_port} and {port} in this machine's firewall and forward them on the router to this \
                 machine; if the provider's line has no public address (CGNAT), this machine can not be a provider here"
            ),
        ),
        Some(Reachability::NoHandshake) => problem(
            format!("the pool's WireGuard handshake with {endpoint} was not answered, its echo was"),
            format!("open UDP port {port} in this machine's firewall and forward it on the router to this machine"),
        ),
        Some(Reachability::OtherAddress) => {
            let seen = facts
                .observed
                .map_or_else(|| "another address".to_owned(), |address| address.to_string());
            problem(
                format!("this node announces {endpoint}, the pool sees it at {seen}"),
                format!(
                    "behind a router, forward UDP ports {port} and {probe_port} to this machine and set \
                     NODE_PUBLIC_ENDPOINT={}; behind a CGNAT nobody can forward them, and this machine can not be a \
                     provider here",
                    facts.observed.map_or_else(
                        || format!("IP:{port}"),
                        |address| std::net::SocketAddr::new(address, *port).to_string()
                    )
                ),
            )
        }
        Some(Reachability::Untested | Reachability::Reachable) | None => {
            let reason = facts.reason.filter(|_| !facts.listed)?;
            let printable: String = reason.chars().filter(|c| !c.is_control()).take(300).collect();
            problem(
                format!("the pool does not list this node: {printable}"),
                "see what the pool's operator asks for".to_owned(),
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(reachability: Option<Reachability>, listed: bool) -> Facts<'static> {
        Facts {
            reachability,
            reason: Some("not approved yet"),
            listed,
            endpoint: "10.0.0.7:51820",
            observed: Some([203, 0, 113, 7].into()),
            port: 51820,
            probe_port: 51821,
        }
    }

    #[test]
    fn each_finding_names_its_cure() {
        let how = |reachability| verdict(&facts(Some(reachability), false)).unwrap().how;
        assert!(how(Reachability::NoEcho).contains("51821"));
        assert!(how(Reachability::NoHandshake).contains("open UDP port 51820"));
        let other = how(Reachability::OtherAddress);
        assert!(
            other.contains("NODE_PUBLIC_ENDPOINT=203.0.113.7:51820") && other.contains("CGNAT"),
            "{other}"
        );
        assert!(verdict(&facts(None, false)).unwrap().what.contains("not approved yet"));
        assert_eq!(verdict(&facts(Some(Reachability::Reachable), true)), None);
        assert_eq!(verdict(&facts(None, true)), None);
    }
}
