//! `NetworkManager` (`org.freedesktop.NetworkManager(5)`): its global configuration takes the place of what connections
//! bring, in /etc/resolv.conf and in the local resolvers that it runs. It writes that down, so a restart keeps it, and a
//! crash of ours leaves it: the record has what was there before.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
};

use zbus::{
    Connection,
    zvariant::{Endian, OwnedObjectPath, OwnedValue, Value, serialized, to_bytes},
};

use super::{
    Error, PORT,
    bus::Object,
    record::{Global, Managed},
    resolved::from_wire,
};

/// Its name on the bus.
pub(super) const SERVICE: &str = "org.freedesktop.NetworkManager";
/// The object that announces its changes.
pub(super) const PATH: &str = "/org/freedesktop/NetworkManager";
/// Where it keeps what is set over the bus, and the beginning of the section's name.
const KEPT: &str = "/var/lib/NetworkManager/NetworkManager-intern.conf";
const KEPT_SECTION: &str = "[.intern.global-dns";
const GLOBAL: &str = "GlobalDnsConfiguration";
/// The domain of all names.
const ALL_NAMES: &str = "*";

const MANAGER: Object<'_> = Object {
    service: SERVICE,
    path: PATH,
    interface: "org.freedesktop.NetworkManager",
};
const DNS_MANAGER: Object<'_> = Object {
    service: SERVICE,
    path: "/org/freedesktop/NetworkManager/DnsManager",
    interface: "org.freedesktop.NetworkManager.DnsManager",
};

type Dictionary = HashMap<String, OwnedValue>;

/// What it says of its part in name resolution: `Mode` and `RcManager`.
pub(super) async fn modes(bus: &Connection) -> Result<(String, String), Error> {
    let mode = DNS_MANAGER.property(bus, "Mode").await?;
    Ok((mode, DNS_MANAGER.property(bus, "RcManager").await?))
}

/// The configuration that there is now.
pub(super) async fn global(bus: &Connection) -> Result<Global, Error> {
    let now: Dictionary = MANAGER.property(bus, GLOBAL).await?;
    match to_bytes(serialized::Context::new_dbus(Endian::Little, 0), &now) {
        Ok(bytes) => Ok(Global(bytes.to_vec())),
        Err(source) => Err(failed(source)),
    }
}

/// Makes these servers those of all names.
pub(super) async fn set(bus: &Connection, servers: &[IpAddr]) -> Result<(), Error> {
    let servers: Vec<String> = servers.iter().map(IpAddr::to_string).collect();
    let domain = HashMap::from([("servers", Value::from(servers))]);
    let domains = HashMap::from([(ALL_NAMES, Value::from(domain))]);
    let configuration = HashMap::from([("domains", Value::from(domains))]);
    MANAGER.set_property(bus, GLOBAL, configuration.into()).await
}

/// Puts back what was there, if what is there now is ours; says whether it was.
pub(super) async fn restore(bus: &Connection, managed: &Managed) -> Result<bool, Error> {
    let now = global(bus).await?;
    if !managed.ours.iter().any(|ours| is_set(&now, ours)) {
        return Ok(false);
    }
    let before = dictionary(&managed.before).map_err(failed)?;
    let before: HashMap<String, Value<'_>> = before.into_iter().map(|(key, value)| (key, value.into())).collect();
    MANAGER.set_property(bus, GLOBAL, before.into()).await?;
    Ok(true)
}

/// Whether a configuration is the one that [`set`] makes.
pub(super) fn is_set(global: &Global, servers: &[IpAddr]) -> bool {
    servers_of(global).is_some_and(|found| found == servers)
}

/// Whether it keeps a configuration that was set over the bus, as far as its file says. One that cannot be read may.
pub(super) fn may_keep() -> bool {
    match std::fs::read(KEPT) {
        Ok(bytes) => String::from_utf8_lossy(&bytes)
            .lines()
            .any(|line| line.starts_with(KEPT_SECTION)),
        Err(error) => error.kind() != std::io::ErrorKind::NotFound,
    }
}

fn object<'a>(path: &'a OwnedObjectPath, interface: &'static str) -> Object<'a> {
    Object {
        service: SERVICE,
        path: path.as_str(),
        interface,
    }
}

/// What the network's connections brought; those of VPNs are reached by these only.
pub(super) async fn network_servers(bus: &Connection) -> Result<Vec<SocketAddr>, Error> {
    let active: Vec<OwnedObjectPath> = MANAGER.property(bus, "ActiveConnections").await?;
    let mut servers = Vec::new();
    for connection in active {
        let connection = object(&connection, "org.freedesktop.NetworkManager.Connection.Active");
        // It may have ended since it was listed.
        let Ok(false) = connection.property::<bool>(bus, "Vpn").await else {
            continue;
        };
        if let Ok(path) = connection.property::<OwnedObjectPath>(bus, "Ip4Config").await {
            let config = object(&path, "org.freedesktop.NetworkManager.IP4Config");
            let data: Vec<Dictionary> = config.property(bus, "NameserverData").await.unwrap_or_default();
            let addresses = data.into_iter().filter_map(|mut entry| {
                let address = String::try_from(entry.remove("address")?).ok()?;
                address.parse::<IpAddr>().ok()
            });
            servers.extend(addresses);
        }
        if let Ok(path) = connection.property::<OwnedObjectPath>(bus, "Ip6Config").await {
            let config = object(&path, "org.freedesktop.NetworkManager.IP6Config");
            let data: Vec<Vec<u8>> = config.property(bus, "Nameservers").await.unwrap_or_default();
            servers.extend(data.iter().filter_map(|bytes| from_wire(bytes)));
        }
    }
    Ok(servers
        .into_iter()
        .map(|address| SocketAddr::new(address, PORT))
        .collect())
}

fn servers_of(global: &Global) -> Option<Vec<IpAddr>> {
    let mut top = dictionary(global).ok()?;
    let mut domains = Dictionary::try_from(top.remove("domains")?).ok()?;
    // More than ours was said by somebody else.
    if !top.is_empty() || domains.len() != 1 {
        return None;
    }
    let mut domain = Dictionary::try_from(domains.remove(ALL_NAMES)?).ok()?;
    let servers = Vec::<String>::try_from(domain.remove("servers")?).ok()?;
    servers.iter().map(|server| server.parse().ok()).collect()
}

fn dictionary(global: &Global) -> zbus::zvariant::Result<Dictionary> {
    let context = serialized::Context::new_dbus(Endian::Little, 0);
    let data = serialized::Data::new(global.0.as_slice(), context);
    data.deserialize().map(|(dictionary, _)| dictionary)
}

fn failed(source: zbus::zvariant::Error) -> Error {
    Error::Call {
        service: SERVICE,
        what: GLOBAL.to_owned(),
        source: Box::new(source.into()),
    }
}
