//! systemd-resolved (`org.freedesktop.resolve1(5)`): name servers belong to links, and names are routed by domain.

use std::{
    net::{IpAddr, SocketAddr, SocketAddrV6},
    time::Duration,
};

use dvpn_core::dns::is_of_network;
use tokio::time::{Instant, sleep};
use zbus::Connection;

use super::{Error, PORT, bus::Object};

/// Its name on the bus.
pub(super) const SERVICE: &str = "org.freedesktop.resolve1";
/// The object that announces its changes.
pub(super) const PATH: &str = "/org/freedesktop/resolve1";

const MANAGER: Object<'_> = Object {
    service: SERVICE,
    path: PATH,
    interface: "org.freedesktop.resolve1.Manager",
};
const NO_SUCH_LINK: &str = "org.freedesktop.resolve1.NoSuchLink";
/// It hears of a link from the kernel as we do, and may hear of it later.
const LINK_PATIENCE: Duration = Duration::from_secs(2);
const LINK_INTERVAL: Duration = Duration::from_millis(50);
/// Flags of a question (`org.freedesktop.resolve1(5)`). A version before 248 refuses the last one and asks nobody.
const DNS: u64 = 1 << 0;
const NO_SEARCH: u64 = 1 << 8;
const NO_NETWORK: u64 = 1 << 15;
/// Every name, and no search list.
const ALL_NAMES: (&str, bool) = (".", true);

/// Gives the link these servers and routes every name to it.
pub(super) async fn set(bus: &Connection, index: u32, servers: &[IpAddr]) -> Result<(), Error> {
    let index = index.cast_signed();
    let addresses: Vec<(i32, Vec<u8>)> = servers.iter().copied().map(on_wire).collect();
    let deadline = Instant::now() + LINK_PATIENCE;
    loop {
        match MANAGER.call::<_, ()>(bus, "SetLinkDNS", &(index, &addresses)).await {
            Err(error) if is_no_such_link(&error) && Instant::now() < deadline => sleep(LINK_INTERVAL).await,
            other => break other?,
        }
    }
    MANAGER
        .call::<_, ()>(bus, "SetLinkDomains", &(index, [ALL_NAMES].as_slice()))
        .await?;
    MANAGER
        .call::<_, ()>(bus, "SetLinkDefaultRoute", &(index, true))
        .await?;
    warn_of_others(bus, index).await;
    Ok(())
}

/// Takes everything from the link that was set over the bus. A link that is gone has nothing.
pub(super) async fn revert(bus: &Connection, index: u32) -> Result<(), Error> {
    match MANAGER.call(bus, "RevertLink", &index.cast_signed()).await {
        Err(error) if is_no_such_link(&error) => Ok(()),
        other => other,
    }
}

/// Has it read /etc/resolv.conf, which it does when it looks for a server: here for a name that it may ask nobody for.
pub(super) async fn read_again(bus: &Connection) {
    let question = (0_i32, "example.com", libc::AF_INET, DNS | NO_SEARCH | NO_NETWORK);
    let asked = MANAGER
        .call::<_, (Vec<(i32, i32, Vec<u8>)>, String, u64)>(bus, "ResolveHostname", &question)
        .await;
    // That there is no answer is its answer.
    if let Err(error) = asked {
        tracing::debug!("had systemd-resolved read /etc/resolv.conf: {error}");
    }
}

/// Whether it still does what [`set`] said. An answer that cannot be had is a no.
pub(super) async fn is_set(bus: &Connection, index: u32, servers: &[IpAddr]) -> bool {
    let index = index.cast_signed();
    let wanted: Vec<(i32, Vec<u8>)> = servers.iter().copied().map(on_wire).collect();
    let observed = async {
        let servers: Vec<(i32, i32, Vec<u8>)> = MANAGER.property(bus, "DNS").await?;
        let domains: Vec<(i32, String, bool)> = MANAGER.property(bus, "Domains").await?;
        Ok::<_, Error>((servers, domains))
    };
    match observed.await {
        Ok((servers, domains)) => {
            let ours = servers.into_iter().filter(|(link, ..)| *link == index);
            ours.map(|(_, family, bytes)| (family, bytes)).eq(wanted)
                && domains
                    .iter()
                    .any(|(link, name, route)| (*link, name.as_str(), *route) == (index, ALL_NAMES.0, ALL_NAMES.1))
        }
        Err(error) => {
            tracing::debug!("asking systemd-resolved what it does: {error}");
            false
        }
    }
}

/// The servers of every link but `ours`, and those of no link, which it also reads from a resolv.conf that is not its
/// own: `tunnel` is left out of these.
pub(super) async fn network_servers(
    bus: &Connection,
    ours: Option<u32>,
    tunnel: &[IpAddr],
) -> Result<Vec<SocketAddr>, Error> {
    let servers: Vec<(i32, i32, Vec<u8>, u16, String)> = MANAGER.property(bus, "DNSEx").await?;
    let network = servers.into_iter().filter_map(|(link, _, bytes, port, _)| {
        let address = from_wire(&bytes)?;
        let link = link.cast_unsigned();
        if ours == Some(link) || !is_of_network(address, if link == 0 { tunnel } else { &[] }) {
            return None;
        }
        let port = if port == 0 { PORT } else { port };
        Some(match address {
            IpAddr::V6(address) if address.is_unicast_link_local() => SocketAddrV6::new(address, port, 0, link).into(),
            IpAddr::V6(_) | IpAddr::V4(_) => SocketAddr::new(address, port),
        })
    });
    Ok(network.collect())
}

/// Other links may claim names for themselves: those are asked there, and what blocks the network blocks them.
async fn warn_of_others(bus: &Connection, index: i32) {
    let Ok(domains) = MANAGER.property::<Vec<(i32, String, bool)>>(bus, "Domains").await else {
        return;
    };
    for (link, name, _) in domains.into_iter().filter(|(link, ..)| *link != index) {
        let name = dvpn_core::text::excerpt(&name);
        tracing::warn!(
            "systemd-resolved asks the network's own name servers for names in {name} (link {link}): the firewall stops \
             these questions"
        );
    }
}

fn is_no_such_link(error: &Error) -> bool {
    let Error::Call { source, .. } = error else {
        return false;
    };
    matches!(&**source, zbus::Error::MethodError(name, ..) if name.as_str() == NO_SUCH_LINK)
}

fn on_wire(address: IpAddr) -> (i32, Vec<u8>) {
    match address {
        IpAddr::V4(address) => (libc::AF_INET, address.octets().to_vec()),
        IpAddr::V6(address) => (libc::AF_INET6, address.octets().to_vec()),
    }
}

pub(super) fn from_wire(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
        16 => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
        _ => None,
    }
}
