//! The other side of the plain contract: an HTTPS server that answers what a test tells it to, byte for byte. It stands
//! for pools and payment servers that are not ours.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::{Context as _, Result};
use axum::{
    Router,
    body::Bytes,
    extract::{Request, State},
    http::{StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
};
use axum_server::tls_rustls::RustlsConfig;
use dvpn_tests::{certs::Identity, https, namespace::Namespace};
use tokio::runtime::Runtime;

type Key = (String, String);

#[derive(Default)]
struct Script {
    answers: BTreeMap<Key, (u16, Vec<u8>)>,
    asked: Vec<(Key, Vec<u8>)>,
}

/// A running server; dropping it ends it.
pub(crate) struct Counterpart {
    script: Arc<Mutex<Script>>,
    _runtime: Runtime,
}

impl Counterpart {
    /// Serves inside a namespace. What no answer was given for is 404.
    pub(crate) fn serve(namespace: &Namespace, at: SocketAddr, identity: &Identity) -> Result<Self> {
        https::install_crypto();
        let listener = namespace.listen(at)?;
        listener
            .set_nonblocking(true)
            .context("making the listener non-blocking")?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .context("starting a runtime")?;
        let script = Arc::<Mutex<Script>>::default();
        let router = Router::new().fallback(answer).with_state(Arc::clone(&script));
        runtime.block_on(async {
            let tls = RustlsConfig::from_pem_file(&identity.certificate, &identity.key)
                .await
                .context("TLS files")?;
            let server = axum_server::from_tcp_rustls(listener, tls).context("making the server")?;
            tokio::spawn(async move { server.serve(router.into_make_service()).await });
            anyhow::Ok(())
        })?;
        Ok(Self {
            script,
            _runtime: runtime,
        })
    }

    /// From now on this request gets this answer.
    pub(crate) fn answer(&self, method: &str, path: &str, status: u16, body: impl Into<Vec<u8>>) {
        let key = (method.to_owned(), path.to_owned());
        self.lock().answers.insert(key, (status, body.into()));
    }

    /// The bodies of all requests of this kind so far.
    pub(crate) fn asked(&self, method: &str, path: &str) -> Vec<Vec<u8>> {
        let wanted = (method.to_owned(), path.to_owned());
        self.lock()
            .asked
            .iter()
            .filter(|(key, _)| *key == wanted)
            .map(|(_, body)| body.clone())
            .collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Script> {
        self.script.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn answer(State(script): State<Arc<Mutex<Script>>>, request: Request) -> Response {
    let key = (request.method().to_string(), request.uri().path().to_owned());
    let body = axum::body::to_bytes(request.into_body(), 1 << 20)
        .await
        .unwrap_or_default();
    let mut script = script.lock().unwrap_or_else(PoisonError::into_inner);
    let found = script.answers.get(&key).cloned();
    script.asked.push((key, body.to_vec()));
    match found {
        Some((status, body)) => {
            let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
            (status, [(CONTENT_TYPE, "application/json")], Bytes::from(body)).into_response()
        }
        None => StatusCode::NOT_FOUND.into_response(),
    }
}
