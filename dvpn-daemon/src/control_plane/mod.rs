//! Device mode's connections beside the tunnel: to the pool, the payment server and the orchestrator, and to the network's
//! name servers for their names. Each is made of a marked socket, to an address and port that the firewall was told
//! before.
//!
//! A name that was resolved once is kept on disk, so that a machine whose name servers do not answer while everything is
//! blocked can still pay and connect. The certificate, not the address, says who is there.

mod relay;
mod sockets;

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use hickory_resolver::{
    Hosts,
    proto::{
        op::Query,
        rr::{Name, RecordType},
    },
};
use tokio::{net::TcpStream, sync::OnceCell, time::timeout};
use url::{Host as UrlHost, Url};

pub use relay::{Door, Relay};
pub(crate) use sockets::{Marked, mark};

use crate::{
    host::{self, Host, dns::Dns},
    race::race,
    resolve::{self, Resolver, Sockets as _},
    state::State,
};

/// How long the network's name servers are waited for when the name's last addresses are known.
const PATIENCE_WITH_SERVERS: Duration = Duration::from_secs(2);
/// Addresses of one name kept on disk. Those of before are kept behind the last ones: a network that wants a login answers
/// every name with its own.
const MAX_ADDRESSES: usize = 8;
/// Names kept on disk; there are three, and what they were before a change of configuration.
const MAX_NAMES: usize = 16;

/// The socket of the program that runs for us, in the state directory.
const DOOR: &str = "orchestrator.socket";

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The address names no host.
    #[error("{0} names no host: correct it in the configuration")]
    NoHost(Url),
    /// The firewall did not take the address.
    #[error("opening the firewall for the control plane")]
    Firewall(#[source] host::Error),
    /// The name has no address and never had one.
    #[error("{name} does not resolve at this network's name servers: check the name and the network")]
    Name {
        /// Which.
        name: String,
        /// Why.
        #[source]
        source: resolve::Error,
    },
    /// No address answered.
    #[error("connecting to {name}: check the network")]
    Connect {
        /// Whom.
        name: String,
        /// What the last one said.
        #[source]
        source: io::Error,
    },
    /// The relay could not be made.
    #[error("making a socket for requests of this daemon's own")]
    Relay(#[source] io::Error),
}

/// Makes them. Clones share everything.
#[derive(Clone)]
pub struct ControlPlane(Arc<Inner>);

struct Inner {
    host: Arc<Host>,
    state: State,
    dns: Dns,
    /// Each name's last addresses, as the disk has them.
    names: Mutex<BTreeMap<String, Vec<IpAddr>>>,
    relays: tokio::sync::Mutex<BTreeMap<String, Relay>>,
    hosts: OnceCell<Hosts>,
}

impl std::fmt::Debug for ControlPlane {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ControlPlane")
    }
}

impl ControlPlane {
    /// On this machine, with the names that `state` remembers.
    pub fn new(host: Arc<Host>, state: State, dns: Dns) -> Self {
        let names = Mutex::new(state.names());
        Self(Arc::new(Inner {
            host,
            state,
            dns,
            names,
            relays: tokio::sync::Mutex::default(),
            hosts: OnceCell::new(),
        }))
    }

    /// A socket of this process that leads to the host of `url`, the same for the same host and port.
    pub async fn relay(&self, url: &Url) -> Result<Relay, Error> {
        let (host, port) = target(url)?;
        let mut relays = self.0.relays.lock().await;
        let key = format!("{host}:{port}");
        if let Some(relay) = relays.get(&key) {
            return Ok(relay.clone());
        }
        let relay = Relay::start(self.clone(), host, port).map_err(Error::Relay)?;
        relays.insert(key, relay.clone());
        Ok(relay)
    }

    /// A socket in the file system that leads to the host of `url` for as long as it is held: for a program that runs as
    /// our own user.
    pub fn door(&self, url: &Url) -> Result<Door, Error> {
        let (host, port) = target(url)?;
        let path = self.0.state.path(DOOR);
        Door::open(path, self.clone(), host, port).map_err(Error::Relay)
    }

    /// A connection to this host. The caller limits the time.
    pub async fn connect(&self, host: &UrlHost<String>, port: u16) -> Result<TcpStream, Error> {
        let addresses = match host {
            UrlHost::Ipv4(address) => vec![IpAddr::V4(*address)],
            UrlHost::Ipv6(address) => vec![IpAddr::V6(*address)],
            UrlHost::Domain(name) => self.resolve(name).await?,
        };
        let addresses: Vec<SocketAddr> = addresses.into_iter().map(|ip| SocketAddr::new(ip, port)).collect();
        self.0.host.allow_control(&addresses).await.map_err(Error::Firewall)?;
        let connected = race(addresses, |address| async move { Marked.connect(address).await }).await;
        connected.map_err(|source| Error::Connect {
            name: host.to_string(),
            source,
        })
    }

    async fn resolve(&self, name: &str) -> Result<Vec<IpAddr>, Error> {
        let written = self.in_hosts_file(name).await;
        if !written.is_empty() {
            return Ok(written);
        }
        let known = self.names().get(name).cloned();
        let asked = self.ask(name);
        let Some(known) = known else {
            let addresses = asked.await?;
            self.remember(name, &addresses);
            return Ok(addresses);
        };
        let Ok(Ok(addresses)) = timeout(PATIENCE_WITH_SERVERS, asked).await else {
            tracing::debug!("the network's name servers do not answer; a name's last addresses are used");
            return Ok(known);
        };
        if !known.starts_with(&addresses) {
            self.remember(name, &addresses);
        }
        Ok(addresses)
    }

    /// Lets marked questions reach the network's name servers, as they are now, and says which those are.
    pub async fn allow_servers(&self) -> Result<Vec<SocketAddr>, Error> {
        let servers = self.0.dns.network_servers().await;
        let told = self.0.host.set_resolvers(&servers).await;
        told.map(|()| servers).map_err(Error::Firewall)
    }

    /// What the network's name servers say of a name at this moment: neither /etc/hosts nor what is remembered.
    pub async fn ask(&self, name: &str) -> Result<Vec<IpAddr>, Error> {
        let servers = self.allow_servers().await?;
        let failed = |source| Error::Name {
            name: name.to_owned(),
            source,
        };
        let resolver = Resolver::new(&Marked, &servers).map_err(failed)?;
        resolver.resolve(name).await.map_err(failed)
    }

    /// What the administrator wrote into /etc/hosts comes first, as everywhere (hosts(5)).
    async fn in_hosts_file(&self, name: &str) -> Vec<IpAddr> {
        let hosts = self.0.hosts.get_or_init(|| async {
            let read = tokio::task::spawn_blocking(Hosts::from_system).await;
            read.ok().and_then(Result::ok).unwrap_or_default()
        });
        let hosts = hosts.await;
        let Ok(name) = Name::from_utf8(name) else {
            return Vec::new();
        };
        let kinds = [RecordType::A, RecordType::AAAA];
        let found = kinds.map(|kind| hosts.lookup_static_host(&Query::query(name.clone(), kind)));
        let records = found
            .iter()
            .flatten()
            .flat_map(hickory_resolver::lookup::Lookup::answers);
        records.filter_map(|record| record.data.ip_addr()).collect()
    }

    fn remember(&self, name: &str, addresses: &[IpAddr]) {
        let names = {
            let mut names = self.names();
            if names.len() >= MAX_NAMES {
                names.clear();
            }
            let before = names.remove(name).unwrap_or_default();
            names.insert(name.to_owned(), newest_first(addresses, &before));
            names.clone()
        };
        let state = self.0.state.clone();
        // Nobody waits for the disk here: at worst the name is asked for again.
        tokio::task::spawn_blocking(move || {
            if let Err(error) = state.store_names(&names) {
                tracing::warn!("{error}: the addresses of pool and payment server are not remembered");
            }
        });
    }

    fn names(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Vec<IpAddr>>> {
        self.0.names.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn newest_first(now: &[IpAddr], before: &[IpAddr]) -> Vec<IpAddr> {
    let older = before.iter().filter(|address| !now.contains(address));
    now.iter().chain(older).copied().take(MAX_ADDRESSES).collect()
}

/// The host and port that `url` is about.
fn target(url: &Url) -> Result<(UrlHost<String>, u16), Error> {
    let host = url.host().zip(url.port_or_known_default());
    host.map(|(host, port)| (host.to_owned(), port))
        .ok_or_else(|| Error::NoHost(url.clone()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_false_answer_does_not_drive_out_the_addresses_of_before() {
        let address = |last: u8| IpAddr::from([192, 0, 2, last]);
        let (real, portal) = (vec![address(1), address(2)], vec![address(9)]);
        let kept = newest_first(&portal, &real);
        assert_eq!(kept, [address(9), address(1), address(2)]);
        assert_eq!(newest_first(&real, &kept), [address(1), address(2), address(9)]);
        let many: Vec<IpAddr> = (0..20).map(address).collect();
        assert_eq!(newest_first(&many, &kept), many[..MAX_ADDRESSES]);
    }
}
