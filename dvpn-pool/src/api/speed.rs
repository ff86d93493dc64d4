//! A source and a sink for measuring a line.

use std::{
    convert::Infallible,
    sync::{Arc, LazyLock},
    time::{Duration, Instant},
};

use axum::{
    Json,
    body::{Body, Bytes},
    extract::{Query, Request},
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use futures::StreamExt as _;
use serde::{Deserialize, Serialize};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::refusal::Refusal;

/// What is sent when nothing is asked for.
const DEFAULT_BYTES: u64 = 25_000_000;
/// What one request moves at most.
pub const MAX_BYTES: u64 = 200_000_000;
/// How long one request runs at most.
const MAX_TIME: Duration = Duration::from_mins(1);
/// Requests at one time: more would only measure each other.
const AT_ONCE: usize = 32;
const CHUNK: usize = 64 * 1024;

static SLOTS: LazyLock<Arc<Semaphore>> = LazyLock::new(|| Arc::new(Semaphore::new(AT_ONCE)));
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

fn slot() -> Result<OwnedSemaphorePermit, Refusal> {
    SLOTS
        .clone()
        .try_acquire_owned()
        .map_err(|_full| Refusal::unavailable("too many speed tests are running; wait"))
}

/// `GET /speed?bytes=N`
pub async fn send(
    wanted: Result<Query<Wanted>, axum::extract::rejection::QueryRejection>,
) -> Result<Response, Refusal> {
    let Ok(Query(wanted)) = wanted else {
        return Err(Refusal::bad_request("`bytes` must be a whole number"));
    };
    let bytes = wanted.bytes.unwrap_or(DEFAULT_BYTES);
    if bytes > MAX_BYTES {
        return Err(Refusal::bad_request(format!("`bytes` is at most {MAX_BYTES}")));
    }
    let slot = slot()?;
    let until = Instant::now() + MAX_TIME;
    let body = futures::stream::unfold((bytes, 0_usize, slot), move |(left, at, slot)| async move {
        if left == 0 || Instant::now() >= until {
            return None;
        }
        let at = if at + CHUNK > NOISE.len() { 0 } else { at };
        let length = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
        let chunk = NOISE.slice(at..at + length);
        Some((Ok::<_, Infallible>(chunk), (left - length as u64, at + CHUNK, slot)))
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
pub async fn swallow(request: Request) -> Result<Json<Swallowed>, Refusal> {
    let _slot = slot()?;
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
    match tokio::time::timeout(MAX_TIME, all).await {
        Ok(done) => done?,
        Err(_) => {
            return Err(Refusal::new(
                StatusCode::REQUEST_TIMEOUT,
                "a speed test runs at most a minute",
            ));
        }
    }
    Ok(Json(Swallowed {
        bytes,
        seconds: start.elapsed().as_secs_f64(),
    }))
}
