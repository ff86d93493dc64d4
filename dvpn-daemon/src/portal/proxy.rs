//! The way out: a SOCKS5 proxy on the loopback for the programs of one user, for as long as it is held.
//!
//! Who connects is told by the kernel's list of sockets, not by a password: browsers have no way to give a SOCKS5 proxy
//! one. Other programs of the same user could use it too, once they find its port; they could also use the browser.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use dvpn_core::portal::Place;
use fast_socks5::{ReplyError, Socks5Command, server::SocksServerError, util::target_addr::TargetAddr};
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_util::task::AbortOnDropHandle;

use super::{look::admitted, owner};
use crate::{
    control_plane::Marked,
    race::race,
    resolve::{Resolver, Sockets as _},
    socks5::{connect::reply, negotiation},
};

/// Longest time for a request.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest time for a name and a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Connections at a time: a browser's, many times over.
const MAX_CONNECTIONS: usize = 256;

/// A running one. Dropping it ends it and every connection of it.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    _serving: AbortOnDropHandle<()>,
}

struct Rules {
    uid: u32,
    places: Vec<Place>,
    resolver: Resolver<Marked>,
}

impl Proxy {
    /// At a port that the kernel chooses; `servers` are the network's name servers.
    pub async fn open(uid: u32, places: Vec<Place>, servers: &[SocketAddr]) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let resolver = Resolver::new(&Marked, servers).map_err(io::Error::other)?;
        let rules = Arc::new(Rules { uid, places, resolver });
        Ok(Self {
            address,
            _serving: AbortOnDropHandle::new(tokio::spawn(serve(listener, rules))),
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

async fn serve(listener: TcpListener, rules: Arc<Rules>) {
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut served = JoinSet::new();
    loop {
        while served.try_join_next().is_some() {}
        let (client, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::debug!("a connection for the login is not taken: {error}");
                sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let Ok(permit) = Arc::clone(&room).try_acquire_owned() else {
            continue;
        };
        let rules = Arc::clone(&rules);
        served.spawn(async move {
            let _permit = permit;
            if let Err(error) = one(client, peer, &rules).await {
                // Without its destination.
                tracing::debug!("a connection for the login ended: {error}");
            }
        });
    }
}

async fn one(client: TcpStream, peer: SocketAddr, rules: &Rules) -> io::Result<()> {
    let local = client.local_addr()?;
    let owner = tokio::task::spawn_blocking(move || owner::of(peer, local)).await;
    // Closed unheard.
    if owner.ok().flatten() != Some(rules.uid) {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    client.set_nodelay(true)?;
    let request = timeout(HANDSHAKE_TIMEOUT, negotiation::read(client, None)).await?;
    let (client, command, destination) = request.map_err(protocol)?;
    let connected = match command {
        Socks5Command::TCPConnect => timeout(CONNECT_TIMEOUT, connect(destination, rules))
            .await
            .unwrap_or(Err(ReplyError::HostUnreachable)),
        Socks5Command::TCPBind | Socks5Command::UDPAssociate => Err(ReplyError::CommandNotSupported),
    };
    let mut far = match connected {
        Ok(far) => far,
        Err(refusal) => return client.reply_error(&refusal).await.map_err(protocol),
    };
    let mut client = client.reply_success(far.local_addr()?).await.map_err(protocol)?;
    copy_bidirectional(&mut client, &mut far).await.map(|_bytes| ())
}

fn protocol(error: SocksServerError) -> io::Error {
    io::Error::other(error)
}

async fn connect(destination: TargetAddr, rules: &Rules) -> Result<TcpStream, ReplyError> {
    let (addresses, port) = match destination {
        TargetAddr::Ip(address) => (vec![address.ip()], address.port()),
        // An address written as a name is an address.
        TargetAddr::Domain(name, port) => match name.parse::<IpAddr>() {
            Ok(address) => (vec![address], port),
            Err(_not_an_address) => {
                let resolved = rules.resolver.resolve(&name).await;
                (resolved.map_err(|_private| ReplyError::HostUnreachable)?, port)
            }
        },
    };
    let admitted = admitted(&rules.places, addresses, port);
    if admitted.is_empty() {
        return Err(ReplyError::ConnectionNotAllowed);
    }
    race(admitted, |address| async move { Marked.connect(address).await })
        .await
        .map_err(|error| reply(&error))
}
