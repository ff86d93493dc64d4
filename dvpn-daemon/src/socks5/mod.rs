//! The SOCKS5 proxy (RFC 1928, RFC 1929): applications in, the tunnel out, and no other way out.
//!
//! Every outgoing socket is made by [`Binding`], names are resolved by [`TunnelPath::resolver`], destinations are judged
//! after resolution. Without a tunnel every request is answered "network unreachable" and nothing is sent; when the
//! tunnel goes away or is replaced, every connection on it is reset at once, so that an application can not take the cut
//! for the end of its data.

mod auth;
pub(crate) mod connect;
mod destination;
mod header;
pub(crate) mod negotiation;
mod path;
mod udp;

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

pub use auth::Credentials;
use fast_socks5::{ReplyError, Socks5Command, server::SocksServerError};
use negotiation::Request;
pub use path::{Binding, TunnelPath};
use socket2::{SockRef, TcpKeepalive};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, watch},
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

/// Longest time for authentication and request.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest time for resolution and connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Clients served at a time; one more is closed unanswered.
pub const MAX_CONNECTIONS: usize = 4_096;
/// A silent client is asked whether it lives after this long.
const KEEPALIVE: Duration = Duration::from_mins(1);
/// Pause after an accept that failed for want of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// The tunnel as it stands; a new `Arc` is a new tunnel.
pub type TunnelWatch = watch::Receiver<Option<Arc<TunnelPath>>>;

/// What the proxy counts. Totals only grow.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Clients served now.
    pub active: AtomicU64,
    /// Clients accepted.
    pub accepted_total: AtomicU64,
    /// Clients closed unanswered because there were too many.
    pub overflow_total: AtomicU64,
    /// Handshakes that failed: garbage, silence, wrong password.
    pub handshake_failed_total: AtomicU64,
    /// Requests answered "network unreachable" because there is no tunnel.
    pub no_tunnel_total: AtomicU64,
    /// Requests and datagrams to destinations that are never reached.
    pub refused_total: AtomicU64,
    /// Requests whose destination did not resolve or answer.
    pub unreachable_total: AtomicU64,
    /// Connections reset because their tunnel went away.
    pub reset_total: AtomicU64,
    /// Datagrams relayed, both directions.
    pub datagrams_total: AtomicU64,
}

impl Metrics {
    fn count(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// One more client while it lives.
struct Active(Arc<Metrics>);

impl Active {
    fn new(metrics: &Arc<Metrics>) -> Self {
        metrics.active.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(metrics))
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        self.0.active.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Serves until `shutdown`, then closes every connection and returns.
pub async fn serve(
    listener: TcpListener,
    credentials: Option<Credentials>,
    tunnel: TunnelWatch,
    metrics: Arc<Metrics>,
    shutdown: CancellationToken,
) {
    let credentials = credentials.map(Arc::new);
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut clients = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            () = shutdown.cancelled() => return,
            // Finished tasks are taken off the set as they end, or it would grow for ever.
            Some(ended) = clients.join_next(), if !clients.is_empty() => {
                if let Err(error) = ended {
                    warn!(%error, "a SOCKS5 connection ended abnormally");
                }
                continue;
            }
            accepted = listener.accept() => accepted,
        };
        let (client, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                warn!(%error, "accepting a SOCKS5 client");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Ok(permit) = Arc::clone(&room).try_acquire_owned() else {
            Metrics::count(&metrics.overflow_total);
            continue;
        };
        Metrics::count(&metrics.accepted_total);
        let (credentials, tunnel, metrics) = (credentials.clone(), tunnel.clone(), Arc::clone(&metrics));
        clients.spawn(async move {
            let _permit = permit;
            let _active = Active::new(&metrics);
            if let Err(error) = client_session(client, peer, credentials.as_deref(), tunnel, &metrics).await {
                debug!(%error, "SOCKS5 connection");
            }
        });
    }
}

/// Why a connection ended early; for the log only, without destinations.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("no complete request within {HANDSHAKE_TIMEOUT:?}")]
    Slow,
    #[error("the handshake failed")]
    Handshake(#[source] SocksServerError),
    #[error("answering the client")]
    Reply(#[source] SocksServerError),
    #[error("relaying")]
    Relay(#[source] io::Error),
    #[error("setting up the UDP relay")]
    Associate(#[source] io::Error),
}

async fn client_session(
    client: TcpStream,
    peer: SocketAddr,
    credentials: Option<&Credentials>,
    mut tunnel: TunnelWatch,
    metrics: &Metrics,
) -> Result<(), Error> {
    let local = client.local_addr().map_err(Error::Associate)?;
    let request = match timeout(HANDSHAKE_TIMEOUT, handshake(client, credentials)).await {
        Ok(Ok(request)) => request,
        Ok(Err(error)) => {
            Metrics::count(&metrics.handshake_failed_total);
            return Err(Error::Handshake(error));
        }
        Err(_elapsed) => {
            Metrics::count(&metrics.handshake_failed_total);
            return Err(Error::Slow);
        }
    };
    let (client, command, destination) = request;
    let Some(path) = tunnel.borrow_and_update().clone() else {
        Metrics::count(&metrics.no_tunnel_total);
        return client
            .reply_error(&ReplyError::NetworkUnreachable)
            .await
            .map_err(Error::Reply);
    };
    match command {
        Socks5Command::TCPConnect => connect::serve(client, destination, &path, &mut tunnel, metrics).await,
        Socks5Command::UDPAssociate => {
            udp::serve(
                client,
                udp::Ends { local, peer },
                &destination,
                &path,
                &mut tunnel,
                metrics,
            )
            .await
        }
        // A listener at the provider's address is not on offer.
        Socks5Command::TCPBind => client
            .reply_error(&ReplyError::CommandNotSupported)
            .await
            .map_err(Error::Reply),
    }
}

async fn handshake(
    client: TcpStream,
    credentials: Option<&Credentials>,
) -> Result<Request<TcpStream>, SocksServerError> {
    let set_up = |source| SocksServerError::Io {
        source,
        context: "setting up the connection",
    };
    client.set_nodelay(true).map_err(set_up)?;
    SockRef::from(&client)
        .set_tcp_keepalive(&TcpKeepalive::new().with_time(KEEPALIVE))
        .map_err(set_up)?;
    negotiation::read(client, credentials).await
}

/// Returns when `path` is no longer the tunnel.
async fn gone(tunnel: &mut TunnelWatch, path: &Arc<TunnelPath>) {
    while tunnel.changed().await.is_ok() {
        let current = tunnel.borrow_and_update();
        if !current.as_ref().is_some_and(|current| Arc::ptr_eq(current, path)) {
            return;
        }
    }
}

/// Makes closing this socket a reset, not an orderly end.
fn reset_on_close(stream: &TcpStream) {
    if let Err(error) = SockRef::from(stream).set_linger(Some(Duration::ZERO)) {
        debug!(%error, "SO_LINGER");
    }
}
