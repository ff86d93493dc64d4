//! A source and a sink for measuring a line.

use std::{
    collections::HashMap,
    convert::Infallible,
    net::{IpAddr, SocketAddr},
    sync::{Arc, LazyLock, Mutex, PoisonError},
    time::Instant,
};

use axum::{
    Json,
    body::{Body, Bytes},
    extract::{ConnectInfo, Query, Request, State},
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use futures::StreamExt as _;
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use crate::{limiter::site, pool::Pool, refusal::Refusal};

/// What is sent when nothing is asked for.
const DEFAULT_BYTES: u64 = 25_000_000;
/// What one request moves at most.
pub const MAX_BYTES: u64 = 200_000_000;
/// Requests at one time: more would only measure each other.
const AT_ONCE: usize = 32;
const CHUNK: usize = 64 * 1024;

/// Random bytes, sent over and over: longer than the window of any compressor on the way but the largest.
static NOISE: LazyLock<Bytes> = LazyLock::new(|| {
    let mut noise = vec![0_u8; 64 * CHUNK];
    rand::fill(&mut noise[..]);
    noise.into()
});

/// The query of `GET /speed`.
#[derive(Debug, Deserialize)]
pub struct Wanted {
    bytes: Option<u64>,
}

/// The answer to `POST /speed`.
#[derive(Debug, Serialize)]
pub struct Swallowed {
    /// How much came.
    bytes: u64,
    /// In which time.
    seconds: f64,
}

/// The speed tests under way.
pub struct Slots {
    per_site: usize,
    taken: Arc<Mutex<HashMap<IpAddr, usize>>>,
}

struct Slot {
    taken: Arc<Mutex<HashMap<IpAddr, usize>>>,
    site: IpAddr,
}

impl Slots {
    /// At most `per_site` of one site.
    pub fn new(per_site: usize) -> Self {
        Self {
            per_site,
            taken: Arc::default(),
        }
    }

    fn take(&self, source: IpAddr) -> Result<Slot, Refusal> {
        let site = site(source);
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let here = taken.get(&site).copied().unwrap_or(0);
        if here >= self.per_site || taken.values().sum::<usize>() >= AT_ONCE {
            return Err(Refusal::unavailable("too many speed tests are running; wait"));
        }
        taken.insert(site, here + 1);
        Ok(Slot {
            taken: self.taken.clone(),
            site,
        })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(here) = taken.get_mut(&self.site) {
            *here -= 1;
            if *here == 0 {
                taken.remove(&self.site);
            }
        }
    }
}

/// `GET /speed?bytes=N`
pub async fn send(
    State(pool): State<Arc<Pool>>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    wanted: Result<Query<Wanted>, axum::extract::rejection::QueryRejection>,
) -> Result<Response, Refusal> {
    let Ok(Query(wanted)) = wanted else {
        return Err(Refusal::bad_request("`bytes` must be a whole number"));
    };
    let bytes = wanted.bytes.unwrap_or(DEFAULT_BYTES);
    if bytes > MAX_BYTES {
        return Err(Refusal::bad_request(format!("`bytes` is at most {MAX_BYTES}")));
    }
    let slot = pool.speed.take(peer.ip())?;
    let limit = pool.config.timing.speed_test;
    let until = Instant::now() + limit;
    // Nobody asks a body for more while its reader stalls: the connection itself is cut when the time is over.
    let (running, ended) = oneshot::channel::<Infallible>();
    if let Some(scissors) = pool.gate.scissors(peer) {
        tokio::spawn(async move {
            if tokio::time::timeout(limit, ended).await.is_err() {
                scissors.cut();
            }
        });
    }
    let start = (bytes, 0_usize, slot, running);
    let body = futures::stream::unfold(start, move |(left, at, slot, running)| async move {
        if left == 0 || Instant::now() >= until {
            return None;
        }
        let at = if at + CHUNK > NOISE.len() { 0 } else { at };
        let length = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
        let chunk = NOISE.slice(at..at + length);
        Some((
            Ok::<_, Infallible>(chunk),
            (left - length as u64, at + CHUNK, slot, running),
        ))
    });
    let headers = [
        (
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/octet-stream"),
        ),
        (
            header::CACHE_CONTROL,
            HeaderValue::from_static("no-store, no-transform"),
        ),
        (header::CONTENT_LENGTH, HeaderValue::from(bytes)),
    ];
    Ok((headers, Body::from_stream(body)).into_response())
}

/// `POST /speed`
pub async fn swallow(
    State(pool): State<Arc<Pool>>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    request: Request,
) -> Result<Json<Swallowed>, Refusal> {
    let _slot = pool.speed.take(peer.ip())?;
    let start = Instant::now();
    let mut body = request.into_body().into_data_stream();
    let mut bytes = 0_u64;
    let all = async {
        while let Some(chunk) = body.next().await {
            let chunk = chunk.map_err(|_gone| Refusal::bad_request("the body ended early"))?;
            bytes += chunk.len() as u64;
            if bytes > MAX_BYTES {
                return Err(Refusal::new(
                    StatusCode::PAYLOAD_TOO_LARGE,
                    format!("a speed test sends at most {MAX_BYTES} bytes"),
                ));
            }
        }
        Ok(())
    };
    match tokio::time::timeout(pool.config.timing.speed_test, all).await {
        Ok(done) => done?,
        Err(_) => {
            return Err(Refusal::new(
                StatusCode::REQUEST_TIMEOUT,
                "the speed test took too long",
            ));
        }
    }
    Ok(Json(Swallowed {
        bytes,
        seconds: start.elapsed().as_secs_f64(),
    }))
}
