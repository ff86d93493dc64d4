//! How a network that wants a login is told from one that is dead: by what it does with three questions, which ask nobody
//! but the pool for anything.

use std::net::{IpAddr, SocketAddr};

use dvpn_common::status::PortalSign;
use url::{Host, Url};

use crate::address::{is_global_unicast, is_private, is_unicast};

/// Ports at which a login page, and what it is made of, is found anywhere.
pub const PORTS: [u16; 2] = [80, 443];
/// What is asked for in the clear at the pool's host, when nothing else is configured: the usual path of such a question,
/// so that it does not say whose it is. A server that knows nothing of it says so; a portal shows its page to everybody.
const CHECK_PATH: &str = "/generate_204";

/// Where to ask in the clear: nobody hears of it but the network and the pool, who know each other's names anyway.
pub fn check_url(configured: Option<&Url>, pool: &Url) -> Option<Url> {
    if let Some(url) = configured {
        return Some(url.clone());
    }
    let host = pool.host_str()?;
    Url::parse(&format!("http://{host}{CHECK_PATH}")).ok()
}

/// What came of a TLS handshake with the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PoolAnswer {
    /// The pool itself.
    Itself,
    /// A certificate for somebody else, or no TLS at all.
    Stranger,
    /// A certificate that nobody vouches for: a portal's, or a pool's whose authority is not configured.
    Unvouched,
    /// Nothing, or nothing that says anything.
    Nothing,
}

/// What came of the question in the clear.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PageAnswer {
    /// A page that the pool does not have, or the way to one.
    Login(Url),
    /// What an ordinary server says.
    Ordinary,
    /// Nothing.
    Nothing,
}

/// Judges the answer to a question for `asked` in the clear (RFC 8952, section 3.2; RFC 6585, section 6 for 511).
pub fn page(status: u16, location: Option<&str>, asked: &Url) -> PageAnswer {
    match status {
        204 => PageAnswer::Ordinary,
        200..=299 | 511 => PageAnswer::Login(asked.clone()),
        301 | 302 | 303 | 307 | 308 => {
            let to = location.and_then(|to| asked.join(to).ok());
            let Some(to) = to.filter(|to| matches!(to.scheme(), "http" | "https")) else {
                return PageAnswer::Ordinary;
            };
            // The usual advice to come back by TLS.
            if to.scheme() == "https" && to.host() == asked.host() {
                PageAnswer::Ordinary
            } else {
                PageAnswer::Login(to)
            }
        }
        _ => PageAnswer::Ordinary,
    }
}

/// All that was seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// The addresses that the network's name servers give the pool's name at this moment; empty when the pool has no name,
    /// or nobody answers.
    pub addresses: Vec<IpAddr>,
    /// The handshake.
    pub pool: PoolAnswer,
    /// The page.
    pub page: PageAnswer,
}

/// What follows from it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Nobody is in the way.
    Reached,
    /// Somebody wants a login.
    Portal(PortalSign),
    /// Nothing answers, or the fault is the pool's or this machine's.
    Unknown,
}

/// Judges what was seen; `pool_private` when the pool may have a private address.
pub fn judge(seen: &Seen, pool_private: bool) -> Verdict {
    let elsewhere = !pool_private && seen.addresses.iter().any(|address| !is_reachable_far(*address));
    match (&seen.pool, &seen.page) {
        (PoolAnswer::Itself, _) => Verdict::Reached,
        (_, PageAnswer::Login(_)) => Verdict::Portal(PortalSign::Page),
        (PoolAnswer::Stranger | PoolAnswer::Unvouched | PoolAnswer::Nothing, _) if elsewhere => {
            Verdict::Portal(PortalSign::Name)
        }
        // A pool that serves an ordinary page and has a wrong certificate has a wrong certificate.
        (PoolAnswer::Stranger, PageAnswer::Nothing) => Verdict::Portal(PortalSign::Certificate),
        (PoolAnswer::Stranger | PoolAnswer::Unvouched | PoolAnswer::Nothing, _) => Verdict::Unknown,
    }
}

/// Documentation ranges count: nothing lives there, and test networks use them as if they were public.
fn is_reachable_far(address: IpAddr) -> bool {
    let local = match address.to_canonical() {
        IpAddr::V4(v4) => v4.is_loopback() || v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_loopback() || v6.is_unicast_link_local(),
    };
    is_global_unicast(address) || !(is_private(address) || local || !is_unicast(address))
}

/// Where a login may go besides [`PORTS`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// The portal's address.
    pub address: IpAddr,
    /// One port, or all: a portal of the local network has its pages at whatever port it likes.
    pub port: Option<u16>,
}

/// Where the login page is, by the addresses of its host and its port.
pub fn places(addresses: &[IpAddr], port: u16) -> Vec<Place> {
    let at = |address: &IpAddr| {
        let address = address.to_canonical();
        let port = (!is_private(address)).then_some(port);
        Place { address, port }
    };
    let mut places: Vec<Place> = addresses.iter().map(at).filter(|place| may_be(place.address)).collect();
    places.sort();
    places.dedup();
    places
}

/// The host and port of a login page, if it has any.
pub fn host_of(url: &Url) -> Option<(Host<String>, u16)> {
    Some((url.host()?.to_owned(), url.port_or_known_default()?))
}

/// Whether the login may connect there.
pub fn admits(places: &[Place], to: SocketAddr) -> bool {
    let address = to.ip().to_canonical();
    let named = |place: &Place| place.address == address && place.port.is_none_or(|port| port == to.port());
    may_be(address) && to.port() > 0 && (PORTS.contains(&to.port()) || places.iter().any(named))
}

/// Never this machine itself, nor what answers on one link alone: there are the secrets of virtual machines' hosts.
fn may_be(address: IpAddr) -> bool {
    let near = match address {
        IpAddr::V4(v4) => v4.is_loopback() || v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_loopback() || v6.is_unicast_link_local(),
    };
    is_unicast(address) && !near
}

#[cfg(test)]
mod tests {
    use super::*;

    fn url(text: &str) -> Url {
        text.parse().unwrap()
    }

    #[test]
    fn the_pool_is_asked_in_the_clear_unless_something_else_is_said() {
        let pool = url("https://pool.example:8443/providers");
        assert_eq!(
            check_url(None, &pool).unwrap().as_str(),
            "http://pool.example/generate_204"
        );
        let six = url("https://[2001:db8::1]/providers");
        assert!(
            check_url(None, &six)
                .unwrap()
                .as_str()
                .starts_with("http://[2001:db8::1]/")
        );
        let other = url("http://check.example/");
        assert_eq!(check_url(Some(&other), &pool), Some(other));
    }

    #[test]
    fn a_page_where_none_should_be_is_a_login() {
        let asked = url("http://pool.example/x");
        let login = |to: &str| PageAnswer::Login(url(to));
        for (status, location, expected) in [
            (204, None, PageAnswer::Ordinary),
            (200, None, login("http://pool.example/x")),
            (511, None, login("http://pool.example/x")),
            (
                302,
                Some("http://192.168.1.1:8880/guest"),
                login("http://192.168.1.1:8880/guest"),
            ),
            (
                307,
                Some("https://login.hotel.example/"),
                login("https://login.hotel.example/"),
            ),
            (303, Some("/login"), login("http://pool.example/login")),
            (301, Some("https://pool.example/x"), PageAnswer::Ordinary),
            (301, Some("https://pool.example:8443/y"), PageAnswer::Ordinary),
            (302, None, PageAnswer::Ordinary),
            (302, Some("tel:112"), PageAnswer::Ordinary),
            (304, None, PageAnswer::Ordinary),
            (403, None, PageAnswer::Ordinary),
            (404, None, PageAnswer::Ordinary),
            (503, None, PageAnswer::Ordinary),
        ] {
            assert_eq!(page(status, location, &asked), expected, "{status} {location:?}");
        }
    }

    #[test]
    fn the_three_answers_together_decide() {
        const OWN: &str = "198.51.100.7";
        const LAN: &str = "192.168.1.1";
        let login = || PageAnswer::Login(url("http://login.hotel.example/"));
        let portal = Verdict::Portal;
        let none: &[&str] = &[];
        for (addresses, pool, page, private, expected) in [
            // Who answers with the pool's certificate is the pool, whatever else happens.
            (&[LAN][..], PoolAnswer::Itself, login(), false, Verdict::Reached),
            (none, PoolAnswer::Itself, PageAnswer::Nothing, false, Verdict::Reached),
            (none, PoolAnswer::Nothing, login(), false, portal(PortalSign::Page)),
            (&[OWN], PoolAnswer::Unvouched, login(), true, portal(PortalSign::Page)),
            (
                &[LAN],
                PoolAnswer::Nothing,
                PageAnswer::Nothing,
                false,
                portal(PortalSign::Name),
            ),
            (
                &["127.0.0.1"],
                PoolAnswer::Nothing,
                PageAnswer::Ordinary,
                false,
                portal(PortalSign::Name),
            ),
            (
                &[OWN, "fd00::1"],
                PoolAnswer::Unvouched,
                PageAnswer::Ordinary,
                false,
                portal(PortalSign::Name),
            ),
            (&[LAN], PoolAnswer::Nothing, PageAnswer::Nothing, true, Verdict::Unknown),
            (
                &[OWN],
                PoolAnswer::Stranger,
                PageAnswer::Nothing,
                false,
                portal(PortalSign::Certificate),
            ),
            // A pool whose certificate is wrong, or whose authority this machine does not know, is no portal.
            (
                &[OWN],
                PoolAnswer::Stranger,
                PageAnswer::Ordinary,
                false,
                Verdict::Unknown,
            ),
            (
                &[OWN],
                PoolAnswer::Unvouched,
                PageAnswer::Nothing,
                false,
                Verdict::Unknown,
            ),
            (
                &[OWN],
                PoolAnswer::Nothing,
                PageAnswer::Ordinary,
                false,
                Verdict::Unknown,
            ),
            (none, PoolAnswer::Nothing, PageAnswer::Nothing, false, Verdict::Unknown),
        ] {
            let seen = Seen {
                addresses: addresses.iter().map(|text| text.parse().unwrap()).collect(),
                pool,
                page,
            };
            assert_eq!(judge(&seen, private), expected, "{seen:?} {private}");
        }
    }

    #[test]
    fn a_login_reaches_web_ports_and_the_portal_and_nothing_else() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let found = places(
            &[ip("192.168.1.1"), ip("198.51.100.7"), ip("127.0.0.1"), ip("::1")],
            8880,
        );
        assert_eq!(found.len(), 2, "{found:?}");
        for good in [
            "203.0.113.9:80",
            "203.0.113.9:443",
            "192.168.1.77:80",
            "192.168.1.1:8880",
            "192.168.1.1:8843",
            "198.51.100.7:8880",
            "[2001:db8::1]:443",
            "[::ffff:192.168.1.1]:8843",
        ] {
            assert!(admits(&found, good.parse().unwrap()), "{good}");
        }
        for bad in [
            "203.0.113.9:22",
            "192.168.1.77:8843",
            "198.51.100.7:8843",
            "192.168.1.1:0",
            "127.0.0.1:80",
            "[::1]:80",
            "[::ffff:127.0.0.1]:80",
            "0.0.0.0:80",
            "169.254.169.254:80",
            "[fe80::1]:80",
            "224.0.0.1:80",
            "255.255.255.255:80",
        ] {
            assert!(!admits(&found, bad.parse().unwrap()), "{bad}");
        }
    }
}
