//! Measures this machine's line and keeps what is known of it in view. `dvpn_core::line` decides when.
//!
//! It never holds anything up: it begins after the daemon is ready, and whatever the session or the network does next ends a
//! measurement at once. Its connections are the daemon's own, beside the tunnel, so that it sees the line and not the tunnel.

mod error;
mod transfer;

use std::{
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use dvpn_common::{
    rate::Rate,
    status::{LineStatus, NodeStatus, Status},
};
use dvpn_core::{
    Failure,
    audit::Event,
    config::{Config, Mode},
    line::{Decision, Facts, Failures, Hindrance, Known, Measured, book::Book, book::NetworkId, decide, words},
};
use futures::{Stream, StreamExt as _, stream};
use jiff::Timestamp;
use tokio::{sync::watch, time::timeout};

pub use self::error::Error;
use self::transfer::Direction;
use crate::{
    audit::Audit,
    clock::{self, Jump},
    host::{self, Host},
    http,
    run::chain,
    state::State,
};

/// Before a measurement nothing may have happened for this long: a session that is about to begin has begun by then.
const SETTLED: Duration = Duration::from_secs(2);
/// A hindrance that nothing announces the end of is looked at again after this.
const LOOK_AGAIN: Duration = Duration::from_mins(5);

/// Both ends of what is shown of the line.
pub struct Views {
    book: Book,
    known: watch::Sender<Known>,
    status: watch::Sender<LineStatus>,
}

impl Views {
    /// What is known as the daemon starts. Where it is it finds out later: until then it is where it was measured last, so
    /// that a restarted provider has something to grant at once.
    pub fn new(config: &Config, state: &State) -> Self {
        let book = state.lines().unwrap_or_else(|error| {
            tracing::warn!("what was measured of lines: {}: they are measured anew", chain(&error));
            Book::default()
        });
        let latest = book.latest(Timestamp::now());
        let known = match (config.bandwidth.total_bits_per_second, latest) {
            (Some(bits), _) => Known::Set(Rate::from_bits_per_second(bits)),
            (None, Some(measured)) => Known::Measured(measured),
            (None, None) => Known::Nothing,
        };
        let decision = Decision::Not {
            hindrance: Hindrance::NotYet,
            until: None,
        };
        Self {
            book,
            known: watch::Sender::new(known),
            status: watch::Sender::new(words::status(&words_of(config, known, &decision, None))),
        }
    }

    /// What is known, for who decides by it.
    pub fn known(&self) -> watch::Receiver<Known> {
        self.known.subscribe()
    }

    /// The same in words.
    pub fn status(&self) -> watch::Receiver<LineStatus> {
        self.status.subscribe()
    }
}

fn words_of<'a>(config: &Config, known: Known, decision: &'a Decision, progress: Option<u8>) -> words::Facts<'a> {
    words::Facts {
        known,
        decision,
        progress,
        is_provider: config.node.register,
        limit: config.node.limit_bits_per_second.map(Rate::from_bits_per_second),
    }
}

/// What measuring needs of the daemon.
pub struct Parts {
    /// The configuration in force.
    pub config: Arc<Config>,
    /// Makes its connections beside the tunnel.
    pub client: http::Client,
    /// The machine.
    pub host: Arc<Host>,
    /// Remembers results.
    pub state: State,
    /// The audit stream.
    pub audit: Audit,
    /// The session's state.
    pub status: watch::Receiver<Status>,
    /// The provider side, if there is one.
    pub node: watch::Receiver<Option<NodeStatus>>,
}

type Happenings = Pin<Box<dyn Stream<Item = ()> + Send>>;

/// Keeps the line known for as long as it is polled. Nothing to do, and it ends, when the line is set.
pub async fn run(parts: Parts, mut views: Views) {
    if parts.config.bandwidth.total_bits_per_second.is_some() {
        return;
    }
    let happenings = happenings(&parts.host).await;
    let mut line = Line {
        parts,
        book: std::mem::take(&mut views.book),
        views,
        failures: Failures::default(),
        happenings,
        last_reason: None,
    };
    let mut last_network = None;
    loop {
        let facts = line.facts().await;
        if facts.network != last_network {
            // What failed elsewhere says nothing of here.
            (line.failures, last_network) = (Failures::default(), facts.network);
        }
        let decision = decide(&line.book, &line.failures, &facts, Timestamp::now());
        line.show(&facts, &decision, None);
        match (&decision, facts.network) {
            (Decision::Measure { payload }, Some(network)) => {
                let payload = *payload;
                if timeout(SETTLED, line.disturbed(&facts)).await.is_err() {
                    line.measure(network, payload, &facts, &decision).await;
                }
            }
            (Decision::Keep { until } | Decision::Not { until: Some(until), .. }, _) => {
                let pause = Duration::try_from(until.duration_since(Timestamp::now())).unwrap_or_default();
                // A suspended machine's timers sleep too, and the clock may be set: nothing is waited for in one piece.
                drop(timeout(pause.min(LOOK_AGAIN), line.disturbed(&facts)).await);
            }
            (Decision::Measure { .. } | Decision::Not { until: None, .. }, _) => {
                drop(timeout(LOOK_AGAIN, line.disturbed(&facts)).await);
            }
        }
    }
}

/// Whatever may mean another line: another way out, or a machine that slept.
async fn happenings(host: &Host) -> Happenings {
    let ways: Happenings = match host.way_out_changes().await {
        Ok(changes) => Box::pin(changes),
        Err(error) => {
            tracing::warn!("changes of the network are not seen: {}", chain(&error));
            Box::pin(stream::pending())
        }
    };
    let slept: Happenings = match clock::jumps() {
        Ok(jumps) => Box::pin(stream::unfold(jumps, |mut jumps| async move {
            loop {
                match jumps.recv().await? {
                    Jump::Slept(_) => return Some(((), jumps)),
                    Jump::Set => {}
                }
            }
        })),
        Err(error) => {
            tracing::warn!("the end of a suspension is not seen: {error}");
            Box::pin(stream::pending())
        }
    };
    Box::pin(stream::select(ways, slept))
}

struct Line {
    parts: Parts,
    views: Views,
    book: Book,
    failures: Failures,
    happenings: Happenings,
    /// Told in the audit stream last.
    last_reason: Option<String>,
}

impl Line {
    async fn facts(&mut self) -> Facts {
        let config = &self.parts.config;
        let has_server = config.bandwidth.test_url.is_some();
        let network = match self.parts.host.network_id().await {
            Ok(network) => network,
            Err(error) => {
                tracing::warn!("finding out which network this is: {}", chain(&error));
                None
            }
        };
        Facts {
            has_server,
            network,
            metered: has_server && host::is_metered().await,
            state: self.parts.status.borrow().state,
            lockdown: config.tunnel.mode == Mode::Device && config.tunnel.lockdown,
            has_clients: self.has_clients(),
        }
    }

    fn has_clients(&self) -> bool {
        self.parts.node.borrow().as_ref().is_some_and(|node| node.active > 0)
    }

    /// Completes when something is not as it was: the session's state, the network, or whether clients are there.
    async fn disturbed(&mut self, before: &Facts) {
        let (state, has_clients) = (before.state, before.has_clients);
        let (mut status, mut node) = (self.parts.status.clone(), self.parts.node.clone());
        let other_state = async { status.wait_for(|status| status.state != state).await.is_ok() };
        let other_clients = async {
            let differ = |node: &Option<NodeStatus>| node.as_ref().is_some_and(|node| node.active > 0) != has_clients;
            node.wait_for(differ).await.is_ok()
        };
        tokio::select! {
            true = other_state => {}
            true = other_clients => {}
            Some(()) = self.happenings.next() => {}
            // Whoever would say so has ended: the daemon ends.
            else => std::future::pending().await,
        }
    }

    /// Shows how things are. Off every network, what was known of the last one stays.
    fn show(&mut self, facts: &Facts, decision: &Decision, progress: Option<u8>) {
        if let Some(network) = facts.network {
            let known = match self.book.measured(&network, Timestamp::now()) {
                Some(measured) => Known::Measured(measured),
                None => Known::Nothing,
            };
            self.views
                .known
                .send_if_modified(|last| std::mem::replace(last, known) != known);
        }
        let known = *self.views.known.borrow();
        let status = words::status(&words_of(&self.parts.config, known, decision, progress));
        if progress.is_none() {
            self.tell(&status, decision);
        }
        self.views.status.send_if_modified(|last| {
            let news = *last != status;
            *last = status;
            news
        });
    }

    /// Logs and records what changed.
    fn tell(&mut self, status: &LineStatus, decision: &Decision) {
        if self.views.status.borrow().summary != status.summary {
            tracing::info!("the line: {}", status.summary);
        }
        let is_passing = match decision {
            Decision::Not { hindrance, .. } => hindrance.is_passing(),
            Decision::Measure { .. } => true,
            Decision::Keep { .. } => false,
        };
        let reason = status.problem.as_ref().map(|problem| problem.what.clone());
        if is_passing || self.last_reason == reason {
            return;
        }
        if let Some(problem) = &status.problem {
            tracing::warn!("{}: {}", problem.what, problem.how);
            let reason = problem.what.clone();
            self.parts.audit.record(&Event::LineUnmeasured { reason });
        }
        self.last_reason = reason;
    }

    async fn measure(&mut self, network: NetworkId, payload: u64, facts: &Facts, decision: &Decision) {
        let Some(url) = self.parts.config.bandwidth.test_url.clone() else {
            return;
        };
        tracing::info!("measuring the line with {}", http::Target::of(&url));
        let moved = Arc::new(AtomicU64::new(0));
        let percent = watch::Sender::new(0);
        let mut seen = percent.subscribe();
        let ended = {
            let client = self.parts.client.clone();
            let limits = Limits {
                time: self.parts.config.bandwidth.sample,
                payload: payload / 2,
            };
            let measuring = measure(&client, &url, limits, &moved, &percent);
            let mut measuring = pin!(measuring);
            self.show(facts, decision, Some(0));
            loop {
                let disturbed = self.disturbed(facts);
                tokio::select! {
                    ended = &mut measuring => break Some(ended),
                    () = disturbed => break None,
                    Ok(()) = seen.changed() => {
                        let percent = *seen.borrow_and_update();
                        self.show(facts, decision, Some(percent));
                    }
                }
            }
        };
        let now = Timestamp::now();
        let payload = moved.load(Ordering::Relaxed);
        self.book.spend(network, payload, now);
        match ended {
            Some(Ok((down, up))) => {
                self.failures = Failures::default();
                self.book.note(network, Measured { down, up, at: now });
                tracing::info!(
                    "the line brings {down} and takes {}",
                    up.map_or("?".to_owned(), |up| up.to_string())
                );
                self.parts.audit.record(&Event::LineMeasured {
                    down_bits_per_second: down.bits_per_second(),
                    up_bits_per_second: up.map(Rate::bits_per_second),
                    payload_bytes: payload,
                });
            }
            Some(Err(error)) => {
                let failure = Failure::from(error);
                tracing::warn!("the line was not measured: {failure}");
                self.failures.note(failure, now);
            }
            None => tracing::info!("measuring the line was broken off: the session or the network changed"),
        }
        if let Err(error) = self.parts.state.store_lines(&self.book) {
            tracing::warn!("remembering what was measured: {}", chain(&error));
        }
    }
}

/// How long a direction is measured, and with how much.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// `BANDWIDTH_SAMPLE_SECONDS`.
    pub time: Duration,
    /// Bytes.
    pub payload: u64,
}

/// Measures once: down, then up. A server that takes no uploads is no reason to know nothing. `moved` grows with every byte,
/// also when this is dropped half-way; `percent` is told how far it is.
pub async fn measure(
    client: &http::Client,
    url: &url::Url,
    limits: Limits,
    moved: &Arc<AtomicU64>,
    percent: &watch::Sender<u8>,
) -> Result<(Rate, Option<Rate>), Error> {
    let told = |half: u8, percent_of_half: u8| {
        percent.send_if_modified(|last| {
            let now = half + percent_of_half / 2;
            let news = now / 5 != *last / 5;
            if news {
                *last = now;
            }
            news
        });
    };
    let speed = Arc::new(client.speed(url).await?);
    let down = transfer::run(Direction::Down, &speed, limits, moved, |part| told(0, part)).await?;
    match transfer::run(Direction::Up, &speed, limits, moved, |part| told(50, part)).await {
        Ok(up) => Ok((down, Some(up))),
        Err(error) if error.is_final() => {
            tracing::warn!("the upload was not measured: {}", chain(&error));
            Ok((down, None))
        }
        // Half a result would hold for a day.
        Err(error) => Err(error),
    }
}
