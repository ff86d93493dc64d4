//! The name servers of the network outside the tunnel.

use std::{
    collections::BTreeSet,
    fs,
    net::{IpAddr, SocketAddr, SocketAddrV6},
    path::Path,
};

use dvpn_core::dns::{NameServer, is_of_network, parse};
use nix::net::if_::if_nametoindex;

use super::{Dns, PORT, bus, file, network_manager, record::Record, resolved};
use crate::run::chain;

/// All servers that systemd-resolved knows, in the form of a resolv.conf.
const RESOLVED_FILE: &str = "/run/systemd/resolve/resolv.conf";
/// What each interface of Debian's resolvconf, and of openresolv, has brought.
const RECORDS: [&str; 2] = ["/run/resolvconf/interface", "/run/resolvconf/interfaces"];

impl Dns {
    /// The name servers of the network, in the order in which to ask them: what the daemon's own sockets use outside the
    /// tunnel. Neither the tunnel's nor local ones; empty where the network's are known to a local program alone.
    pub async fn network_servers(&self) -> Vec<SocketAddr> {
        let record = match self.inner.store.load() {
            Ok(record) => record.unwrap_or_else(Record::new),
            Err(error) => {
                tracing::debug!("{}", chain(&error));
                Record::new()
            }
        };
        let tunnel = &record.servers;
        if let Some(bus) = self.bus().await {
            if bus::runs(&bus, resolved::SERVICE).await {
                let ours = record.resolved.then_some(record.index);
                match resolved::network_servers(&bus, ours, tunnel).await {
                    Ok(servers) if !servers.is_empty() => return unique(servers),
                    Ok(_) => {}
                    Err(error) => tracing::debug!("{}", chain(&error)),
                }
            }
            if bus::runs(&bus, network_manager::SERVICE).await {
                match network_manager::network_servers(&bus).await {
                    Ok(servers) if !servers.is_empty() => return unique(servers),
                    Ok(_) => {}
                    Err(error) => tracing::debug!("{}", chain(&error)),
                }
            }
        }
        let before = self.before(&record).map(|(_, text)| text).unwrap_or_default();
        let texts = [before, fs::read_to_string(RESOLVED_FILE).unwrap_or_default()];
        for text in texts.into_iter().chain([records()]) {
            let servers = parse(&text).servers;
            let network = servers.iter().filter(|server| is_of_network(server.address, tunnel));
            let servers = unique(network.filter_map(socket_address).collect());
            if !servers.is_empty() {
                return servers;
            }
        }
        Vec::new()
    }
}

fn records() -> String {
    let mut paths: Vec<_> = RECORDS
        .iter()
        .filter_map(|folder| fs::read_dir(Path::new(folder)).ok())
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect();
    paths.sort();
    let texts = paths.iter().filter_map(|path| file::look(path).ok());
    texts.map(|found| found.text() + "\n").collect()
}

fn socket_address(server: &NameServer) -> Option<SocketAddr> {
    match (server.address, &server.zone) {
        (IpAddr::V6(address), Some(zone)) => {
            let scope = zone.parse().ok().or_else(|| if_nametoindex(zone.as_str()).ok())?;
            Some(SocketAddrV6::new(address, PORT, 0, scope).into())
        }
        (address, _) => Some(SocketAddr::new(address, PORT)),
    }
}

fn unique(mut servers: Vec<SocketAddr>) -> Vec<SocketAddr> {
    let mut seen = BTreeSet::new();
    servers.retain(|server| seen.insert(*server));
    servers
}
