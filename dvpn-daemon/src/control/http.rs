//! `/health` and `/metrics`.
//!
//! On loopback every request must name a loopback host, so that a web page in the user's browser can not read them
//! through DNS rebinding. Elsewhere every request must carry the bearer token. Slow and many clients are cut off.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use aws_lc_rs::constant_time::verify_slices_are_equal;
use axum::{
    Json, Router,
    extract::{Request, State},
    http::{StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::get,
};
use dvpn_common::status::{LineStatus, NodeStatus, StateName, Status};
use dvpn_core::config::Secret;
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, watch},
    time::timeout,
};

use super::metrics::Metrics;

/// Most connections served at once.
const MAX_CONNECTIONS: usize = 64;
/// A request's head must be whole within this time.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest life of a connection.
const CONNECTION_TIMEOUT: Duration = Duration::from_mins(1);

/// What the two pages are made from.
#[derive(Clone)]
struct Pages {
    status: watch::Receiver<Status>,
    node: watch::Receiver<Option<NodeStatus>>,
    line: watch::Receiver<LineStatus>,
    metrics: Metrics,
    refresh: Arc<dyn Fn() + Send + Sync>,
    guard: Arc<Guard>,
}

/// Who may read.
struct Guard {
    loopback: bool,
    token: Option<Secret>,
}

impl Guard {
    fn admit(&self, request: &Request) -> Result<(), StatusCode> {
        let header = |name| request.headers().get(name).and_then(|value| value.to_str().ok());
        if let Some(token) = &self.token {
            let given = header(header::AUTHORIZATION)
                .and_then(|value| value.strip_prefix("Bearer "))
                .unwrap_or("");
            return match verify_slices_are_equal(given.as_bytes(), token.expose().as_bytes()) {
                Ok(()) => Ok(()),
                Err(_) => Err(StatusCode::UNAUTHORIZED),
            };
        }
        // The configuration refuses a listener off loopback without a token; this denies should that ever change.
        if self.loopback && header(header::HOST).is_some_and(is_loopback_host) {
            Ok(())
        } else {
            Err(StatusCode::FORBIDDEN)
        }
    }
}

/// Whether a Host header names this machine's loopback, with or without a port.
fn is_loopback_host(host: &str) -> bool {
    if let Ok(address) = host.parse::<SocketAddr>() {
        return address.ip().is_loopback();
    }
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.parse::<u16>().is_ok() && !name.ends_with(':') => name,
        Some(_) | None => host,
    };
    let name = name.trim_start_matches('[').trim_end_matches(']');
    name.eq_ignore_ascii_case("localhost") || name.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// Whether the node does what its owner wants right now: a wanted session carries traffic, or none is wanted.
pub fn is_healthy(status: &Status) -> bool {
    status.state == StateName::Connected || (status.state == StateName::Disconnected && !status.autostart)
}

/// Serves until the task is dropped. `refresh` runs before the metrics are read.
pub async fn serve(
    listener: TcpListener,
    token: Option<Secret>,
    status: watch::Receiver<Status>,
    node: watch::Receiver<Option<NodeStatus>>,
    line: watch::Receiver<LineStatus>,
    metrics: Metrics,
    refresh: Arc<dyn Fn() + Send + Sync>,
) {
    let loopback = listener.local_addr().is_ok_and(|address| address.ip().is_loopback());
    let pages = Pages {
        status,
        node,
        line,
        metrics,
        refresh,
        guard: Arc::new(Guard { loopback, token }),
    };
    let router = Router::new()
        .route("/health", get(health))
        .route("/metrics", get(metrics_page))
        .layer(middleware::from_fn_with_state(pages.clone(), admit))
        .with_state(pages);
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                let router = router.clone();
                tokio::spawn(async move {
                    connection(stream, router).await;
                    drop(slot);
                });
            }
            Err(error) => {
                tracing::warn!("accepting a connection on the control listener: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn connection(stream: TcpStream, router: Router) {
    let service = TowerToHyperService::new(router);
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(16 * 1024)
        .serve_connection(TokioIo::new(stream), service);
    // How a reader's connection ends is the reader's business.
    drop(timeout(CONNECTION_TIMEOUT, served).await);
}

async fn admit(State(pages): State<Pages>, request: Request, next: Next) -> Response {
    match pages.guard.admit(&request) {
        Ok(()) => next.run(request).await,
        Err(StatusCode::UNAUTHORIZED) => (
            StatusCode::UNAUTHORIZED,
            "send Authorization: Bearer with the CONTROL_TOKEN\n",
        )
            .into_response(),
        Err(code) => (code, "ask by a loopback name: http://127.0.0.1 or http://localhost\n").into_response(),
    }
}

async fn health(State(pages): State<Pages>) -> Response {
    let mut status = pages.status.borrow().clone();
    status.node.clone_from(&pages.node.borrow());
    status.line = Some(pages.line.borrow().clone());
    let code = if is_healthy(&status) {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    (code, [(header::CACHE_CONTROL, "no-store")], Json(status)).into_response()
}

async fn metrics_page(State(pages): State<Pages>) -> Response {
    (pages.refresh)();
    pages.metrics.observe(&pages.status.borrow());
    pages.metrics.show_line(&pages.line.borrow());
    match pages.metrics.encode() {
        Ok(text) => ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response(),
        Err(error) => (
            StatusCode::INTERNAL_SERVER_ERROR,
            format!("encoding the metrics: {error}\n"),
        )
            .into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loopback_names_pass_the_host_check() {
        for good in [
            "localhost",
            "LOCALHOST:9808",
            "127.0.0.1",
            "127.0.0.1:9808",
            "127.9.9.9:1",
            "[::1]:9808",
            "[::1]",
        ] {
            assert!(is_loopback_host(good), "{good}");
        }
        for bad in [
            "",
            "example.org",
            "localhost.example.org",
            "127.0.0.1.example.org:80",
            "10.0.0.1:9808",
            "[fe80::1]",
        ] {
            assert!(!is_loopback_host(bad), "{bad}");
        }
    }
}
