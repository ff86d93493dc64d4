//! Name resolution through the tunnel: every query leaves by a socket bound to the tunnel's interface and address, or
//! not at all. Neither /etc/hosts nor resolv.conf is read.

use std::{
    fmt, io,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    time::Duration,
};

use futures::Future;
use hickory_resolver::{
    Resolver as Hickory,
    config::{ConnectionConfig, LookupIpStrategy, NameServerConfig, ResolveHosts, ResolverConfig, ResolverOpts},
    net::{
        NetError,
        runtime::{RuntimeProvider, TokioHandle, TokioTime, iocompat::AsyncIoTokioAsStd},
    },
};
use tokio::{
    net::{TcpStream, UdpSocket},
    time::timeout,
};

use crate::socks5::Binding;

/// Answers kept.
const CACHED_ANSWERS: u64 = 256;
/// Longest life of a kept answer, whatever its own says.
const MAX_TTL: Duration = Duration::from_mins(10);
/// How long one server is waited for before the query is sent again: longer than a path by satellite takes.
const QUERY_TIMEOUT: Duration = Duration::from_millis(1200);
/// How long a TCP connection to a server may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Repetitions of a query. Lookups of one name share their query, so one that began with an outage of three seconds
/// must outlast it: whoever asks when the network is back waits for its next repetition and does not fail with it.
const REPEATS: usize = 5;
/// Addresses of one name that are tried.
const MAX_ADDRESSES: usize = 8;

/// Why a name has no address.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The tunnel carries no address at all.
    #[error("the tunnel has no inner address: connect again")]
    NoAddress,
    /// The pool named no server and neither did the user.
    #[error("no name server inside the tunnel: set TUNNEL_DNS")]
    NoServer,
    /// The resolver could not be made.
    #[error("setting up name resolution: this is a defect, please report it")]
    Setup {
        /// Why.
        #[source]
        source: NetError,
    },
    /// No answer, or none with an address of a family the tunnel carries. The name is not repeated here: it is private.
    #[error("the name does not resolve through the tunnel: check it, or set TUNNEL_DNS to another server")]
    Lookup {
        /// Why.
        #[source]
        source: NetError,
    },
}

/// A resolver on one tunnel. Clones share its cache.
#[derive(Clone)]
pub struct Resolver(Option<Hickory<Bound>>);

impl fmt::Debug for Resolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() {
            "Resolver"
        } else {
            "Resolver(no server)"
        })
    }
}

impl Resolver {
    /// On this tunnel, asking these servers in this order; without one, every name fails and addresses still work.
    pub fn new(binding: &Binding, servers: &[SocketAddr]) -> Result<Self, Error> {
        let servers: Vec<_> = servers
            .iter()
            .filter(|server| binding.carries(server.ip()))
            .map(|server| name_server(*server))
            .collect();
        if servers.is_empty() {
            return Ok(Self(None));
        }
        let mut options = ResolverOpts::default();
        options.timeout = QUERY_TIMEOUT;
        options.attempts = REPEATS;
        options.cache_size = CACHED_ANSWERS;
        options.positive_max_ttl = Some(MAX_TTL);
        options.negative_max_ttl = Some(Duration::from_secs(30));
        options.use_hosts_file = ResolveHosts::Never;
        options.try_tcp_on_error = true;
        options.case_randomization = false;
        options.ip_strategy = match (binding.carries_v4(), binding.carries_v6()) {
            (true, true) => LookupIpStrategy::Ipv6AndIpv4,
            (true, false) => LookupIpStrategy::Ipv4Only,
            (false, true) => LookupIpStrategy::Ipv6Only,
            (false, false) => return Err(Error::NoAddress),
        };
        let config = ResolverConfig::from_parts(None, Vec::new(), servers);
        let hickory = Hickory::builder_with_config(
            config,
            Bound {
                binding: binding.clone(),
                handle: TokioHandle::default(),
            },
        )
        .with_options(options)
        .build()
        .map_err(|source| Error::Setup { source })?;
        Ok(Self(Some(hickory)))
    }

    /// Addresses of a name, of the families the tunnel carries, first families taking turns (RFC 8305, section 4). At
    /// most eight, at least one.
    pub async fn resolve(&self, name: &str) -> Result<Vec<IpAddr>, Error> {
        let Some(hickory) = &self.0 else {
            return Err(Error::NoServer);
        };
        let answer = hickory
            .lookup_ip(name)
            .await
            .map_err(|source| Error::Lookup { source })?;
        let (v6, v4): (Vec<IpAddr>, Vec<IpAddr>) = answer.iter().partition(IpAddr::is_ipv6);
        Ok(take_turns(v6, v4))
    }
}

/// First of the one, first of the other, second of the one, …
fn take_turns(one: Vec<IpAddr>, other: Vec<IpAddr>) -> Vec<IpAddr> {
    let (mut one, mut other) = (one.into_iter(), other.into_iter());
    let mut out = Vec::new();
    loop {
        let before = out.len();
        out.extend(one.next());
        out.extend(other.next());
        if out.len() == before || out.len() >= MAX_ADDRESSES {
            out.truncate(MAX_ADDRESSES);
            return out;
        }
    }
}

fn name_server(server: SocketAddr) -> NameServerConfig {
    let connections = [ConnectionConfig::udp(), ConnectionConfig::tcp()]
        .into_iter()
        .map(|mut connection| {
            connection.port = server.port();
            connection
        })
        .collect();
    NameServerConfig::new(server.ip(), true, connections)
}

/// Makes the resolver's sockets; all of them bound to the tunnel.
#[derive(Clone)]
struct Bound {
    binding: Binding,
    handle: TokioHandle,
}

type IoFuture<T> = Pin<Box<dyn Future<Output = io::Result<T>> + Send>>;

impl RuntimeProvider for Bound {
    type Handle = TokioHandle;
    type Timer = TokioTime;
    type Udp = UdpSocket;
    type Tcp = AsyncIoTokioAsStd<TcpStream>;

    fn create_handle(&self) -> TokioHandle {
        self.handle.clone()
    }

    fn connect_tcp(&self, server: SocketAddr, _: Option<SocketAddr>, wait: Option<Duration>) -> IoFuture<Self::Tcp> {
        let binding = self.binding.clone();
        Box::pin(async move {
            let connect = binding.connect(server);
            timeout(wait.unwrap_or(CONNECT_TIMEOUT), connect)
                .await?
                .map(AsyncIoTokioAsStd)
        })
    }

    fn bind_udp(&self, local: SocketAddr, server: SocketAddr) -> IoFuture<Self::Udp> {
        // The address asked for is the unspecified one; only its random port is kept.
        let socket = self.binding.udp(server.ip(), local.port());
        Box::pin(async move { socket })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_take_turns_and_the_list_is_short() {
        let v6: Vec<IpAddr> = (1..=2).map(|n| format!("2001:db8::{n}").parse().unwrap()).collect();
        let v4: Vec<IpAddr> = (1..=20).map(|n| format!("192.0.2.{n}").parse().unwrap()).collect();
        let list = take_turns(v6.clone(), v4.clone());
        assert_eq!(list[..5], [v6[0], v4[0], v6[1], v4[1], v4[2]]);
        assert_eq!(list.len(), MAX_ADDRESSES);
        assert_eq!(take_turns(Vec::new(), v4[..1].to_vec()), v4[..1]);
    }
}
