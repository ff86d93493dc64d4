//! Listens, serves and stops.

use std::{
    io,
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use axum::{
    Json, Router,
    extract::{DefaultBodyLimit, Request, State},
    http::StatusCode,
    middleware::{self, Next},
    response::{IntoResponse as _, Response},
    routing::{get, post},
};
use axum_server::{
    Handle,
    tls_rustls::{RustlsAcceptor, RustlsConfig},
};
use dvpn_common::{keys::VerifyingKey, limits::MAX_BODY_BYTES};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};

use crate::{
    api,
    config::Config,
    ledger,
    pool::{self, Pool},
    refusal::Refusal,
};

/// How long a client may take for TLS, and how long for the head of its next request.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a request may take from its head to the head of its answer.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(15);
/// How long requests under way may still take at the end.
const GRACE: Duration = Duration::from_secs(5);
/// How often the pool looks at what time has changed.
const SWEEP: Duration = Duration::from_millis(500);
/// How often it forgets what nobody asks for any more, in sweeps.
const SWEEPS_PER_CLEANING: u32 = 120;

/// Why the pool does not serve.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The pool does not open.
    #[error(transparent)]
    Pool(#[from] pool::Error),
    /// Certificate or key does not read.
    #[error("the TLS file {path} does not read: it must be PEM (scripts/gen_dev_certs.sh makes a pair)")]
    Pem {
        /// Which file.
        path: PathBuf,
        /// What the reader said.
        #[source]
        source: rustls::pki_types::pem::Error,
    },
    /// Certificate and key do not make a server.
    #[error("certificate {cert} and key {key} do not make a TLS server: do they belong together?")]
    Tls {
        /// The certificate.
        cert: PathBuf,
        /// The key.
        key: PathBuf,
        /// What rustls said.
        #[source]
        source: rustls::Error,
    },
    /// The address cannot be taken.
    #[error("cannot listen on {address}")]
    Listen {
        /// Which address.
        address: SocketAddr,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The server ended by itself.
    #[error("the server on {address} failed")]
    Serve {
        /// Which address.
        address: SocketAddr,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// A pool that listens.
pub struct Server {
    address: SocketAddr,
    pool: Arc<Pool>,
    task: tokio::task::JoinHandle<io::Result<()>>,
}

impl Server {
    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The key that its approvals verify with.
    pub fn pool_key(&self) -> VerifyingKey {
        self.pool.public_key()
    }

    /// Waits until it has stopped and its database is closed.
    pub async fn finished(self) -> Result<(), Error> {
        let result = self.task.await.unwrap_or_else(|error| Err(io::Error::other(error)));
        self.pool.store.close().await;
        result.map_err(|source| Error::Serve {
            address: self.address,
            source,
        })
    }
}

/// Opens the pool and listens. Once this returns, requests are answered; `shutdown` ends it gracefully.
pub async fn serve(config: Config, shutdown: impl Future<Output = ()> + Send + 'static) -> Result<Server, Error> {
    let tls = tls_config(&config.tls_cert, &config.tls_key)?;
    let wanted = config.listen;
    let (pool, queue) = Pool::open(config).await?;
    let failed = |source| Error::Listen {
        address: wanted,
        source,
    };
    let listener = TcpListener::bind(wanted).map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    let acceptor = RustlsAcceptor::new(RustlsConfig::from_config(Arc::new(tls)))
        .handshake_timeout(HANDSHAKE_TIMEOUT)
        .acceptor(pool.gate.clone());
    let handle = Handle::new();
    let mut server = axum_server::from_tcp(listener)
        .map_err(failed)?
        .acceptor(acceptor)
        .http1_only()
        .first_request_timeout(HEAD_TIMEOUT)
        .accept_error_handler(|from, error| tracing::debug!(?from, %error, "connection not accepted"))
        .handle(handle.clone());
    server
        .http_builder()
        .http1()
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(64 * 1024);
    let service = router(pool.clone()).into_make_service_with_connect_info::<SocketAddr>();
    let sweeper = tokio::spawn(sweep(pool.clone()));
    let writer = tokio::spawn(ledger::write(pool.clone(), queue));
    let stopping = pool.clone();
    tokio::spawn(async move {
        shutdown.await;
        // Event streams never end by themselves.
        stopping.live.close();
        handle.graceful_shutdown(Some(GRACE));
    });
    let task = tokio::spawn(async move {
        let result = server.serve(service).await;
        sweeper.abort();
        writer.abort();
        result
    });
    Ok(Server { address, pool, task })
}

/// Reads certificate and key without listening.
pub fn tls_config(cert: &Path, key: &Path) -> Result<rustls::ServerConfig, Error> {
    let pem = |path: &Path| {
        let path = path.to_owned();
        move |source| Error::Pem { path, source }
    };
    let chain = CertificateDer::pem_file_iter(cert)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(pem(cert))?;
    let private = PrivateKeyDer::from_pem_file(key).map_err(pem(key))?;
    let tls = |source| Error::Tls {
        cert: cert.to_owned(),
        key: key.to_owned(),
        source,
    };
    let mut config =
        rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])
            .map_err(tls)?
            .with_no_client_auth()
            .with_single_cert(chain, private)
            .map_err(tls)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

fn router(pool: Arc<Pool>) -> Router {
    let speed = Router::new()
        .route("/speed", get(api::speed::send).post(api::speed::swallow))
        .layer(DefaultBodyLimit::disable());
    let mut router = Router::new()
        .route("/providers", get(api::providers::list))
        .route("/providers/register", post(api::providers::register))
        .route("/register", post(api::providers::register))
        .route("/providers/nodes/{id}/events", get(api::nodes::events))
        .route("/providers/nodes/{id}/ack", post(api::nodes::ack))
        .route("/providers/approve", post(api::approve::approve))
        .route("/approve", post(api::approve::approve))
        .route("/providers/approve/challenge", get(api::approve::challenge))
        .route("/approve/challenge", get(api::approve::challenge))
        .route("/providers/release", post(api::release::release))
        .route("/release", post(api::release::release))
        .route("/payment", post(api::payment::verify))
        .route("/payment/checkout/start", post(api::payment::start))
        .route("/payment/checkout/{id}", get(api::payment::status))
        .route("/payment/checkout/{id}/page", get(api::payment::page))
        .route("/health", get(health));
    if pool.config.orchestrator.is_some() {
        router = router
            .route("/orchestrator/provision", post(api::provision::provision))
            .route("/orchestrator/provision/challenge", get(api::approve::challenge))
            .route(
                "/orchestrator/leases/{id}",
                post(api::provision::renew).delete(api::provision::take_back),
            );
    }
    if pool.config.development {
        router = router.route("/payment/dev/pay/{id}", post(api::payment::development_pay));
    }
    router
        .method_not_allowed_fallback(|| async { Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "not with this method") })
        .fallback(|| async { Refusal::not_found("there is nothing at this path") })
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .layer(middleware::from_fn(in_time))
        .merge(speed)
        .with_state(pool)
}

async fn in_time(request: Request, next: Next) -> Response {
    match tokio::time::timeout(REQUEST_TIMEOUT, next.run(request)).await {
        Ok(response) => response,
        Err(_) => Refusal::new(StatusCode::REQUEST_TIMEOUT, "the request took too long").into_response(),
    }
}

async fn health(State(pool): State<Arc<Pool>>) -> Result<Json<serde_json::Value>, Refusal> {
    pool.store.ping().await?;
    Ok(Json(
        serde_json::json!({ "status": "ok", "development": pool.config.development }),
    ))
}

async fn sweep(pool: Arc<Pool>) {
    let mut ticks = tokio::time::interval(SWEEP);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut round = 0_u32;
    loop {
        ticks.tick().await;
        round = round.wrapping_add(1);
        let mut done = pool.sweep().await;
        if done.is_ok() && round.is_multiple_of(SWEEPS_PER_CLEANING) {
            done = pool.clean().await;
        }
        if let Err(error) = done {
            tracing::error!(
                error = &error as &dyn std::error::Error,
                "a sweep failed; the next one tries again"
            );
        }
    }
}
