//! One transfer from the speed server, and one to it.
//!
//! Several connections at once, because one does not fill a long line. Downloads are counted as they are read. An upload is
//! counted when the server has answered it, because what is handed to the kernel is not sent yet: it goes in pieces, and each
//! counts as spread evenly over the time until its answer.

use std::{
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use dvpn_common::rate::Rate;
use dvpn_core::line::samples::Samples;
use futures::{future::BoxFuture, stream};
use rand::{TryRng as _, rngs::SysRng};
use reqwest::{Body, Response};
use serde::Deserialize;
use tokio::task::JoinSet;

use super::{Error, Limits};
use crate::http::{self, SPEED_CONNECTIONS, Speed};

/// Most that is asked for, or sent, in one request.
const PIECE: u64 = 8_000_000;
/// A file that ends earlier measures round trips and not the line.
const SHORTEST_FILE: u64 = 1_000_000;
/// The first piece of an upload, and the time that later ones are to take.
const FIRST_UPLOAD: u64 = 16 * 1024;
const UPLOAD_TAKES: Duration = Duration::from_millis(400);
/// How long a server may take for an upload's answer after the transfer's own time.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// A server that is busy is asked again after this, and so often: it may not have noticed yet that the last transfer is over.
const ASKED_AGAIN: u32 = 5;
const BUSY_PAUSE: Duration = Duration::from_millis(300);
/// How often the end of the transfer is looked for, and progress is told.
const LOOK: Duration = Duration::from_millis(50);
/// Random bytes, sent over and over.
const NOISE_BYTES: usize = 1024 * 1024;
const CHUNK: usize = 64 * 1024;

/// Which way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    Down,
    Up,
}

/// Moves bytes until a limit is reached and says what rate that was. `moved` grows with every byte, also of a transfer that
/// is dropped half-way; `progress` is told percents.
pub(super) async fn run(
    direction: Direction,
    speed: &Arc<Speed>,
    limits: Limits,
    moved: &Arc<AtomicU64>,
    progress: impl Fn(u8),
) -> Result<Rate, Error> {
    let transfer = Arc::new(Transfer::new(direction, speed, limits, moved)?);
    let mut workers = JoinSet::new();
    for number in 0..SPEED_CONNECTIONS {
        let transfer = Arc::clone(&transfer);
        let work: BoxFuture<'static, _> = match direction {
            Direction::Down => Box::pin(async move { patiently(|| transfer.download()).await }),
            Direction::Up => Box::pin(async move { patiently(|| transfer.upload(number)).await }),
        };
        workers.spawn(work);
    }
    let mut look = tokio::time::interval(LOOK);
    let mut failed = None;
    let until = loop {
        tokio::select! {
            ended = workers.join_next() => match ended {
                None => break transfer.elapsed(),
                Some(Ok(Err(error))) if error.is_final() => return Err(error),
                // The server may let fewer in; the others go on.
                Some(Ok(Err(error))) => failed = failed.or(Some(error)),
                Some(Ok(Ok(())) | Err(_)) => {}
            },
            _ = look.tick() => {
                progress(transfer.percent());
                if transfer.elapsed() >= limits.time {
                    break limits.time;
                }
            }
        }
    };
    // Nothing moves any more when this is over.
    workers.shutdown().await;
    let rate = transfer.rate(until);
    match (rate, failed) {
        (Ok(rate), _) => Ok(rate),
        (Err(_), Some(error)) => Err(error),
        (Err(too_little), None) => Err(Error::TooLittle {
            target: speed.target(),
            source: too_little,
        }),
    }
}

/// Again and again while the server is busy, for a while.
async fn patiently<F: Future<Output = Result<(), Error>>>(work: impl Fn() -> F) -> Result<(), Error> {
    for _ in 0..ASKED_AGAIN {
        match work().await {
            Err(error) if error.is_busy() => tokio::time::sleep(BUSY_PAUSE).await,
            ended => return ended,
        }
    }
    work().await
}

struct Transfer {
    direction: Direction,
    speed: Arc<Speed>,
    limits: Limits,
    /// Since the first byte may have passed.
    started: OnceLock<Instant>,
    samples: Mutex<Samples>,
    left: AtomicU64,
    moved: Arc<AtomicU64>,
    /// The server does not take `?bytes=`.
    plain: OnceLock<()>,
    /// Until when each connection's uploads have been answered.
    answered: Mutex<[Option<Duration>; SPEED_CONNECTIONS]>,
    noise: Bytes,
}

impl Transfer {
    fn new(direction: Direction, speed: &Arc<Speed>, limits: Limits, moved: &Arc<AtomicU64>) -> Result<Self, Error> {
        let mut noise = vec![0_u8; if direction == Direction::Up { NOISE_BYTES } else { 0 }];
        SysRng.try_fill_bytes(&mut noise).map_err(|_error| Error::Random)?;
        Ok(Self {
            direction,
            speed: Arc::clone(speed),
            limits,
            started: OnceLock::new(),
            samples: Mutex::default(),
            left: AtomicU64::new(limits.payload),
            moved: Arc::clone(moved),
            plain: OnceLock::new(),
            answered: Mutex::default(),
            noise: noise.into(),
        })
    }

    /// The transfer's clock, which begins now if it has not yet.
    fn clock(&self) -> Duration {
        self.started.get_or_init(Instant::now).elapsed()
    }

    fn elapsed(&self) -> Duration {
        self.started.get().map(Instant::elapsed).unwrap_or_default()
    }

    fn percent(&self) -> u8 {
        let of = |part: u128, whole: u128| part.saturating_mul(100) / whole.max(1);
        let time = of(self.elapsed().as_millis(), self.limits.time.as_millis());
        let left = u128::from(self.left.load(Ordering::Relaxed));
        let payload = u128::from(self.limits.payload);
        let percent = time.max(of(payload.saturating_sub(left), payload)).min(100);
        u8::try_from(percent).unwrap_or(100)
    }

    /// Reserves up to `wanted` bytes of what is left.
    fn take(&self, wanted: u64) -> u64 {
        let taken = self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
            Some(left.saturating_sub(wanted))
        });
        taken.unwrap_or_else(|left| left).min(wanted)
    }

    fn give_back(&self, bytes: u64) {
        self.left.fetch_add(bytes, Ordering::Relaxed);
    }

    fn note(&self, from: Duration, until: Duration, bytes: u64) {
        let mut samples = self.samples.lock().unwrap_or_else(PoisonError::into_inner);
        samples.add(from, until, bytes);
    }

    fn rate(&self, until: Duration) -> Result<Rate, dvpn_core::line::samples::TooLittle> {
        let until = match self.direction {
            Direction::Down => until,
            // Later a connection may have sent what nobody has answered yet.
            Direction::Up => {
                let answered = self.answered.lock().unwrap_or_else(PoisonError::into_inner);
                answered.iter().flatten().min().copied().unwrap_or_default().min(until)
            }
        };
        self.samples.lock().unwrap_or_else(PoisonError::into_inner).rate(until)
    }

    async fn ask(&self, bytes: u64) -> Result<Response, http::Error> {
        if self.plain.get().is_some() {
            return self.speed.get(None).await;
        }
        match self.speed.get(Some(bytes)).await {
            Err(http::Error::Status { status, .. })
                if status.is_client_error() && !matches!(status.as_u16(), 408 | 429) =>
            {
                // Some servers of plain files want no query.
                let response = self.speed.get(None).await?;
                self.plain.get_or_init(|| ());
                Ok(response)
            }
            answer => answer,
        }
    }

    async fn download(&self) -> Result<(), Error> {
        loop {
            let asked = self.take(PIECE);
            if asked == 0 {
                return Ok(());
            }
            let mut reserved = asked;
            let mut response = self.ask(asked).await.inspect_err(|_| self.give_back(asked))?;
            let url = response.url().clone();
            let (mut last, mut got) = (self.clock(), 0_u64);
            while let Some(chunk) = response
                .chunk()
                .await
                .map_err(|source| http::Error::from_request(&url, source))?
            {
                let (now, length) = (self.clock(), u64::try_from(chunk.len()).unwrap_or(u64::MAX));
                self.note(last, now, length);
                self.moved.fetch_add(length, Ordering::Relaxed);
                (last, got) = (now, got.saturating_add(length));
                if got > reserved {
                    // It sends more than it was asked for.
                    reserved += self.take((got - reserved).max(PIECE));
                    if got > reserved {
                        return Ok(());
                    }
                }
            }
            self.give_back(reserved - got);
            if got < asked.min(SHORTEST_FILE) {
                return Err(Error::TooShort {
                    target: self.speed.target(),
                    bytes: got,
                });
            }
        }
    }

    async fn upload(&self, number: usize) -> Result<(), Error> {
        let mut wanted = FIRST_UPLOAD;
        loop {
            let bytes = self.take(wanted);
            if bytes == 0 {
                return Ok(());
            }
            let begun = self.clock();
            let sent = Arc::new(AtomicU64::new(0));
            let body = self.body(bytes, &sent);
            let within = self.limits.time + ANSWER_TIMEOUT;
            let answer = self.speed.post(body, bytes, within).await;
            let answer = answer.inspect_err(|_| self.give_back(bytes - sent.load(Ordering::Relaxed)))?;
            let now = self.clock();
            let target = || self.speed.target();
            if sent.load(Ordering::Relaxed) < bytes {
                return Err(Error::Early { target: target() });
            }
            match serde_json::from_slice::<Swallowed>(&answer) {
                Ok(said) if said.bytes == bytes => {}
                // One that answers early and says nothing would look like a line without end: what was handed to the
                // kernel has not arrived.
                Ok(_) | Err(_) => return Err(Error::Disagrees { target: target() }),
            }
            self.note(begun, now, bytes);
            let mut answered = self.answered.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(answered) = answered.get_mut(number) {
                *answered = Some(now);
            }
            wanted = next_piece(bytes, now.saturating_sub(begun));
        }
    }

    fn body(&self, bytes: u64, sent: &Arc<AtomicU64>) -> Body {
        let start = (bytes, 0_usize);
        let (noise, sent, moved) = (self.noise.clone(), Arc::clone(sent), Arc::clone(&self.moved));
        Body::wrap_stream(stream::unfold(start, move |(left, at)| {
            let at = if at + CHUNK > noise.len() { 0 } else { at };
            let length = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
            let next = (length > 0).then(|| {
                let bytes = u64::try_from(length).unwrap_or(0);
                sent.fetch_add(bytes, Ordering::Relaxed);
                moved.fetch_add(bytes, Ordering::Relaxed);
                let chunk = noise.slice(at..at + length);
                (Ok::<_, std::convert::Infallible>(chunk), (left - bytes, at + CHUNK))
            });
            std::future::ready(next)
        }))
    }
}

/// What dvpn-pool answers to an upload.
#[derive(Deserialize)]
struct Swallowed {
    bytes: u64,
}

/// As much as takes [`UPLOAD_TAKES`] at the rate of the last one, and at most four times as much.
fn next_piece(bytes: u64, took: Duration) -> u64 {
    let micros = took.as_micros().max(1);
    let piece = u128::from(bytes) * UPLOAD_TAKES.as_micros() / micros;
    let piece = u64::try_from(piece).unwrap_or(PIECE);
    piece.min(bytes.saturating_mul(4)).clamp(FIRST_UPLOAD, PIECE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_piece_of_an_upload_takes_a_moment_at_any_rate() {
        let second = Duration::from_secs(1);
        for (bytes, took, wanted) in [
            (100_000, second, 40_000),
            (100_000, second / 10, 400_000),
            (100_000, second / 1000, 400_000),
            (100_000, Duration::ZERO, 400_000),
            (16 * 1024, second * 8, FIRST_UPLOAD),
            (PIECE, second / 100, PIECE),
        ] {
            assert_eq!(next_piece(bytes, took), wanted, "{bytes} in {took:?}");
        }
    }
}
