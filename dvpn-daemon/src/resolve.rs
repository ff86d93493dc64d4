//! Name resolution by sockets of our own making: through the tunnel, or beside it with our mark. No other way is tried,
//! and neither /etc/hosts nor resolv.conf is read.

use std::{
    fmt, io,
    net::{IpAddr, SocketAddr},
    pin::{Pin, pin},
    time::Duration,
};

use hickory_resolver::{
    Resolver as Hickory,
    config::{ConnectionConfig, NameServerConfig, ResolveHosts, ResolverConfig, ResolverOpts},
    lookup::Lookup,
    net::{
        NetError,
        runtime::{RuntimeProvider, TokioHandle, TokioTime, iocompat::AsyncIoTokioAsStd},
    },
    proto::rr::{Name, RecordType},
};
use tokio::{
    net::{TcpStream, UdpSocket},
    time::{Instant, sleep_until, timeout, timeout_at},
};

/// Makes a resolver's sockets: they decide which way its questions go.
pub trait Sockets: Clone + Send + Sync + Unpin + 'static {
    /// Whether they carry IPv4.
    fn carries_v4(&self) -> bool;
    /// Whether they carry IPv6.
    fn carries_v6(&self) -> bool;
    /// Connects. The caller limits the time.
    fn connect(&self, to: SocketAddr) -> impl Future<Output = io::Result<TcpStream>> + Send;
    /// A UDP socket of the family of `to`, on this port (0 takes any).
    fn udp(&self, to: IpAddr, port: u16) -> io::Result<UdpSocket>;
}

/// Answers kept.
const CACHED_ANSWERS: u64 = 256;
/// Longest life of a kept answer, whatever its own says.
const MAX_TTL: Duration = Duration::from_mins(10);
/// How long one attempt may take: longer than a path by satellite does.
const ATTEMPT_TIMEOUT: Duration = Duration::from_millis(1200);
/// An attempt that fails sooner is not followed by another before this long after its start.
const ATTEMPT_INTERVAL: Duration = Duration::from_millis(400);
/// Counted from each caller's own question: the library lets lookups of one name share their query, and one that began
/// in an outage must not fail who asks when the network is back. Shorter than the proxy waits for a connection.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(8);
/// Once one family has an address, the other is waited for no longer than this (RFC 8305, section 3).
const RESOLUTION_DELAY: Duration = Duration::from_millis(50);
/// How long a TCP connection to a server may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Addresses of one name that are tried.
const MAX_ADDRESSES: usize = 8;

/// Why a name has no address.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The pool named no server and neither did the user.
    #[error("no name server is known: set TUNNEL_DNS, or see to the network's own")]
    NoServer,
    /// The resolver could not be made.
    #[error("setting up name resolution: this is a defect, please report it")]
    Setup {
        /// Why.
        #[source]
        source: NetError,
    },
    /// No answer, or none with an address of a family the tunnel carries. The name is not repeated here: it is private.
    #[error("the name does not resolve: check it, or set TUNNEL_DNS to another server")]
    Lookup {
        /// Why.
        #[source]
        source: NetError,
    },
}

/// A resolver that goes one way. Clones share its cache.
#[derive(Clone)]
pub struct Resolver<S: Sockets>(Option<Inner<S>>);

#[derive(Clone)]
struct Inner<S: Sockets> {
    hickory: Hickory<Bound<S>>,
    sockets: S,
}

impl<S: Sockets> fmt::Debug for Resolver<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() {
            "Resolver"
        } else {
            "Resolver(no server)"
        })
    }
}

impl<S: Sockets> Resolver<S> {
    /// By these sockets, asking these servers in this order; without one, every name fails and addresses still work.
    pub fn new(sockets: &S, servers: &[SocketAddr]) -> Result<Self, Error> {
        let carries = |server: &SocketAddr| match server {
            SocketAddr::V4(_) => sockets.carries_v4(),
            SocketAddr::V6(_) => sockets.carries_v6(),
        };
        let servers: Vec<_> = servers
            .iter()
            .filter(|server| carries(server))
            .map(|server| name_server(*server))
            .collect();
        if servers.is_empty() {
            return Ok(Self(None));
        }
        let mut options = ResolverOpts::default();
        options.timeout = ATTEMPT_TIMEOUT;
        // Repeated here: the library's own attempts end as soon as its guess of the round trip allows.
        options.attempts = 0;
        options.cache_size = CACHED_ANSWERS;
        options.positive_max_ttl = Some(MAX_TTL);
        options.negative_max_ttl = Some(Duration::from_secs(30));
        options.use_hosts_file = ResolveHosts::Never;
        options.case_randomization = false;
        let config = ResolverConfig::from_parts(None, Vec::new(), servers);
        let hickory = Hickory::builder_with_config(
            config,
            Bound {
                sockets: sockets.clone(),
                handle: TokioHandle::default(),
            },
        )
        .with_options(options)
        .build()
        .map_err(|source| Error::Setup { source })?;
        Ok(Self(Some(Inner {
            hickory,
            sockets: sockets.clone(),
        })))
    }

    /// Addresses of a name, of the families the sockets carry, first families taking turns (RFC 8305, section 4). At
    /// most eight, at least one.
    pub async fn resolve(&self, name: &str) -> Result<Vec<IpAddr>, Error> {
        let Some(inner) = &self.0 else {
            return Err(Error::NoServer);
        };
        let lookup_error = |source: NetError| Error::Lookup { source };
        let mut name = Name::from_utf8(name).map_err(|source| lookup_error(source.into()))?;
        // No search list is ever tried.
        name.set_fqdn(true);
        let mut addresses = match (inner.sockets.carries_v6(), inner.sockets.carries_v4()) {
            (true, true) => {
                let v6 = inner.persist(&name, RecordType::AAAA);
                let v4 = inner.persist(&name, RecordType::A);
                match both(v6, v4).await {
                    (Err(_), Err(source)) => Err(source),
                    (v6, v4) => Ok(take_turns(v6.unwrap_or_default(), v4.unwrap_or_default())),
                }
            }
            (true, false) => inner.persist(&name, RecordType::AAAA).await,
            (false, _) => inner.persist(&name, RecordType::A).await,
        }
        .map_err(lookup_error)?;
        addresses.truncate(MAX_ADDRESSES);
        Ok(addresses)
    }
}

impl<S: Sockets> Inner<S> {
    /// Asks until there is an answer, be it that there is none such, or [`LOOKUP_TIMEOUT`] is over. At least one
    /// address.
    async fn persist(&self, name: &Name, kind: RecordType) -> Result<Vec<IpAddr>, NetError> {
        let deadline = Instant::now() + LOOKUP_TIMEOUT;
        loop {
            let next = Instant::now() + ATTEMPT_INTERVAL;
            let lookup = self.hickory.lookup(name.clone(), kind);
            match timeout_at(deadline, lookup).await.unwrap_or(Err(NetError::Timeout)) {
                Ok(lookup) => return addresses(&lookup),
                Err(NetError::Timeout | NetError::Io(_) | NetError::NoConnections | NetError::Busy)
                    if next < deadline =>
                {
                    sleep_until(next).await;
                }
                Err(error) => return Err(error),
            }
        }
    }
}

fn addresses(lookup: &Lookup) -> Result<Vec<IpAddr>, NetError> {
    let addresses: Vec<IpAddr> = lookup
        .answers()
        .iter()
        .filter_map(|record| record.data.ip_addr())
        .collect();
    if addresses.is_empty() {
        Err(NetError::Message("the answer has no address"))
    } else {
        Ok(addresses)
    }
}

/// Both answers; when the first has addresses, the other only if it comes within [`RESOLUTION_DELAY`].
async fn both<T>(
    one: impl Future<Output = Result<T, NetError>>,
    other: impl Future<Output = Result<T, NetError>>,
) -> (Result<T, NetError>, Result<T, NetError>) {
    async fn second<T>(found: bool, second: impl Future<Output = Result<T, NetError>>) -> Result<T, NetError> {
        if found {
            timeout(RESOLUTION_DELAY, second)
                .await
                .unwrap_or(Err(NetError::Timeout))
        } else {
            second.await
        }
    }
    let (mut one, mut other) = (pin!(one), pin!(other));
    tokio::select! {
        first = &mut one => {
            let other = second(first.is_ok(), other).await;
            (first, other)
        }
        first = &mut other => {
            let one = second(first.is_ok(), one).await;
            (one, first)
        }
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
        if out.len() == before {
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

/// The sockets as the library wants them.
#[derive(Clone)]
struct Bound<S> {
    sockets: S,
    handle: TokioHandle,
}

type IoFuture<T> = Pin<Box<dyn Future<Output = io::Result<T>> + Send>>;

impl<S: Sockets> RuntimeProvider for Bound<S> {
    type Handle = TokioHandle;
    type Timer = TokioTime;
    type Udp = UdpSocket;
    type Tcp = AsyncIoTokioAsStd<TcpStream>;

    fn create_handle(&self) -> TokioHandle {
        self.handle.clone()
    }

    fn connect_tcp(&self, server: SocketAddr, _: Option<SocketAddr>, wait: Option<Duration>) -> IoFuture<Self::Tcp> {
        let sockets = self.sockets.clone();
        Box::pin(async move {
            let connect = sockets.connect(server);
            timeout(wait.unwrap_or(CONNECT_TIMEOUT), connect)
                .await?
                .map(AsyncIoTokioAsStd)
        })
    }

    fn bind_udp(&self, local: SocketAddr, server: SocketAddr) -> IoFuture<Self::Udp> {
        // The address asked for is the unspecified one; only its random port is kept.
        let socket = self.sockets.udp(server.ip(), local.port());
        Box::pin(async move { socket })
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use hickory_resolver::proto::{
        op::{Message, ResponseCode},
        rr::{RData, Record, rdata},
    };

    use super::*;
    use crate::socks5::Binding;

    #[test]
    fn families_take_turns() {
        let v6: Vec<IpAddr> = (1..=2).map(|n| format!("2001:db8::{n}").parse().unwrap()).collect();
        let v4: Vec<IpAddr> = (1..=20).map(|n| format!("192.0.2.{n}").parse().unwrap()).collect();
        let list = take_turns(v6.clone(), v4.clone());
        assert_eq!(list[..5], [v6[0], v4[0], v6[1], v4[1], v4[2]]);
        assert_eq!(list.len(), 22);
        assert_eq!(take_turns(Vec::new(), v4[..1].to_vec()), v4[..1]);
    }

    /// What the server below does with a question, told by its type and by the time since the server was started.
    type Behaviour = fn(RecordType, Duration) -> Option<Message>;

    /// A name server on the loopback, for as long as the runtime.
    async fn server(behaviour: Behaviour) -> SocketAddr {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = socket.local_addr().unwrap();
        let started = Instant::now();
        tokio::spawn(async move {
            let mut buffer = [0; 512];
            loop {
                let (length, from) = socket.recv_from(&mut buffer).await.unwrap();
                let question = Message::from_vec(&buffer[..length]).unwrap();
                let query = question.queries[0].clone();
                if let Some(mut answer) = behaviour(query.query_type, started.elapsed()) {
                    answer.metadata.id = question.metadata.id;
                    for record in &mut answer.answers {
                        record.name = query.name.clone();
                    }
                    answer.add_query(query);
                    socket.send_to(&answer.to_vec().unwrap(), from).await.unwrap();
                }
            }
        });
        address
    }

    fn answer(data: Option<RData>, code: ResponseCode) -> Message {
        let mut message = Message::query().into_response();
        message.metadata.response_code = code;
        if let Some(data) = data {
            message.add_answer(Record::from_rdata(Name::root(), 60, data));
        }
        message
    }

    fn resolver(server: SocketAddr) -> Resolver<Binding> {
        let inner = [IpAddr::V4(Ipv4Addr::LOCALHOST), "::1".parse().unwrap()];
        Resolver::new(&Binding::new("lo", &inner), &[server]).unwrap()
    }

    const ADDRESS: RData = RData::A(rdata::A(Ipv4Addr::new(192, 0, 2, 1)));

    #[tokio::test]
    async fn who_asks_when_the_network_is_back_does_not_fail_with_who_asked_before() {
        let server = server(|kind, elapsed| {
            if kind != RecordType::A {
                Some(answer(None, ResponseCode::NoError))
            } else if elapsed < Duration::from_secs(3) {
                None
            } else {
                Some(answer(Some(ADDRESS), ResponseCode::NoError))
            }
        })
        .await;
        let resolver = resolver(server);
        let mut asked = Vec::new();
        for _ in 0..15 {
            let resolver = resolver.clone();
            asked.push(tokio::spawn(
                async move { resolver.resolve("outlasting.example").await },
            ));
            tokio::time::sleep(Duration::from_millis(250)).await;
        }
        for asked in asked {
            assert_eq!(asked.await.unwrap().unwrap(), [IpAddr::from([192, 0, 2, 1])]);
        }
    }

    #[tokio::test]
    async fn a_family_that_never_answers_delays_the_other_by_a_moment_only() {
        let server =
            server(|kind, _| (kind == RecordType::A).then(|| answer(Some(ADDRESS), ResponseCode::NoError))).await;
        let resolver = resolver(server);
        let asked = timeout(Duration::from_secs(1), resolver.resolve("half.example"));
        assert_eq!(asked.await.unwrap().unwrap(), [IpAddr::from([192, 0, 2, 1])]);
    }

    #[tokio::test]
    async fn a_name_that_does_not_exist_is_not_asked_for_again() {
        let server = server(|_, _| Some(answer(None, ResponseCode::NXDomain))).await;
        let resolver = resolver(server);
        let asked = timeout(Duration::from_secs(1), resolver.resolve("none.example"));
        assert!(matches!(asked.await.unwrap(), Err(Error::Lookup { .. })));
    }

    #[tokio::test]
    async fn a_server_that_is_silent_ends_in_an_error_before_the_proxy_gives_up() {
        let server = server(|_, _| None).await;
        let resolver = resolver(server);
        let asked = timeout(Duration::from_secs(10), resolver.resolve("silent.example"));
        assert!(matches!(asked.await.unwrap(), Err(Error::Lookup { .. })));
    }
}
