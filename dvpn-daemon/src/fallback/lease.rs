//! What the orchestrator lent: renewed at half of its life while it is used, returned once it is not.

use std::time::Duration;

use dvpn_common::{
    contract::{ErrorBody, LEASES_PATH},
    limits::MAX_BODY_BYTES,
};
use dvpn_core::{
    approval::{self, Lease},
    config::Secret,
    session::{Attempt, Input},
};
use jiff::{SignedDuration, Timestamp};
use reqwest::{Method, StatusCode};
use tokio::{
    sync::mpsc,
    task::{AbortHandle, JoinSet},
};
use url::Url;

use crate::http::{self, Client, EXCHANGE_TIMEOUT, read_limited};

/// A renewal that fails is tried again after this, or sooner when the end is near.
const RETRY_PAUSE: Duration = Duration::from_secs(30);
const SHORTEST_PAUSE: Duration = Duration::from_secs(1);
/// The wall clock may be set, and the machine may sleep: it is looked at this often.
const CLOCK_CHECK: Duration = Duration::from_mins(1);
/// Longest wait for returns at the end of the daemon.
const FAREWELL_TIMEOUT: Duration = Duration::from_secs(3);
/// Longest part of the orchestrator's own words that is logged.
const MAX_SAID_CHARS: usize = 200;

/// Why a lease was not renewed or returned.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not asked, or no answer.
    #[error(transparent)]
    Http(#[from] http::Error),
    /// An answer that is none.
    #[error(transparent)]
    Answer(#[from] approval::Error),
    /// A no.
    #[error("the orchestrator answered {status}: {said}")]
    Refused {
        /// The status.
        status: StatusCode,
        /// Its words, shortened, without the token.
        said: String,
    },
}

impl Error {
    /// Whether asking again is of no use: the lease is gone, or not paid for.
    fn is_final(&self) -> bool {
        matches!(
            self,
            Self::Refused {
                status: StatusCode::NOT_FOUND | StatusCode::UNAUTHORIZED | StatusCode::PAYMENT_REQUIRED,
                ..
            }
        )
    }
}

/// The orchestrator, as the one who keeps a lease meets it.
#[derive(Debug, Clone)]
pub struct Orchestrator {
    client: Client,
    url: Url,
}

impl Orchestrator {
    /// At `FALLBACK_ORCHESTRATOR_URL`, with a client that trusts its roots.
    pub fn new(client: Client, url: Url) -> Self {
        Self { client, url }
    }

    /// Lets the lease last; when it ends now.
    pub async fn renew(&self, lease: &Lease, token: &Secret) -> Result<Timestamp, Error> {
        let body = self.ask(Method::POST, lease, token).await?;
        Ok(lease.read_renewal(&body)?)
    }

    /// Returns the lease. One that is gone already is as good.
    pub async fn give_back(&self, lease: &Lease, token: &Secret) -> Result<(), Error> {
        match self.ask(Method::DELETE, lease, token).await {
            Ok(_)
            | Err(Error::Refused {
                status: StatusCode::NOT_FOUND,
                ..
            }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn ask(&self, method: Method, lease: &Lease, token: &Secret) -> Result<bytes::Bytes, Error> {
        let mut url = self.url.clone();
        // A URL that was configured as https has path segments.
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.pop_if_empty().extend([LEASES_PATH, lease.as_str()]);
        }
        let response = self
            .client
            .inner(&url)
            .await?
            .request(method, url.clone())
            .bearer_auth(token.expose())
            .timeout(EXCHANGE_TIMEOUT)
            .send()
            .await
            .map_err(|source| http::Error::from_request(&url, source))?;
        let status = response.status();
        let body = read_limited(response, MAX_BODY_BYTES).await?;
        if status.is_success() {
            return Ok(body);
        }
        let said = serde_json::from_slice(&body).map_or_else(|_| String::new(), |body: ErrorBody| body.error);
        let said = said.replace(token.expose(), "[token]");
        Err(Error::Refused {
            status,
            said: said.chars().filter(|c| !c.is_control()).take(MAX_SAID_CHARS).collect(),
        })
    }
}

/// One lease and what is needed to keep it.
struct Held {
    lease: Lease,
    expires_at: Timestamp,
    token: Secret,
    orchestrator: Orchestrator,
    keeper: Option<AbortHandle>,
}

/// The lease in hand; at most one. It belongs to the driver, which says after every step which lease the session uses.
pub struct Leases {
    inputs: mpsc::Sender<Input>,
    held: Option<Held>,
    returns: JoinSet<()>,
}

impl Leases {
    /// Holds none. Renewals are told to the session through `inputs`.
    pub fn new(inputs: mpsc::Sender<Input>) -> Self {
        Self {
            inputs,
            held: None,
            returns: JoinSet::new(),
        }
    }

    /// Takes a lease that was just made; the one before it is returned.
    pub fn hold(&mut self, lease: Lease, expires_at: Timestamp, token: Secret, orchestrator: Orchestrator) {
        self.give_back();
        self.held = Some(Held {
            lease,
            expires_at,
            token,
            orchestrator,
            keeper: None,
        });
    }

    /// Keeps the lease while it is `used`, and returns it once it is not.
    pub fn follow(&mut self, used: Option<(Attempt, &Lease)>) {
        while self.returns.try_join_next().is_some() {}
        let Some(held) = &mut self.held else { return };
        match used {
            Some((attempt, lease)) if *lease == held.lease => {
                if held.keeper.is_none() {
                    let keeping = keep(
                        held.orchestrator.clone(),
                        held.lease.clone(),
                        held.token.clone(),
                        held.expires_at,
                        attempt,
                        self.inputs.clone(),
                    );
                    held.keeper = Some(tokio::spawn(keeping).abort_handle());
                }
            }
            Some(_) | None => self.give_back(),
        }
    }

    fn give_back(&mut self) {
        let Some(held) = self.held.take() else { return };
        if let Some(keeper) = held.keeper {
            keeper.abort();
        }
        self.returns.spawn(async move {
            match held.orchestrator.give_back(&held.lease, &held.token).await {
                Ok(()) => tracing::info!("the fallback provider was returned"),
                Err(error) => tracing::warn!(
                    "returning the fallback provider: {}: it ends by itself",
                    crate::run::chain(&error)
                ),
            }
        });
    }

    /// Returns what is held, and waits for that, but not for long.
    pub async fn end(&mut self) {
        self.give_back();
        let returned = async { while self.returns.join_next().await.is_some() {} };
        if tokio::time::timeout(FAREWELL_TIMEOUT, returned).await.is_err() {
            tracing::warn!("the fallback provider was not returned in time: it ends by itself");
        }
    }
}

impl Drop for Leases {
    fn drop(&mut self) {
        if let Some(keeper) = self.held.as_mut().and_then(|held| held.keeper.take()) {
            keeper.abort();
        }
    }
}

/// Renews until the lease is gone.
async fn keep(
    orchestrator: Orchestrator,
    lease: Lease,
    token: Secret,
    mut expires_at: Timestamp,
    attempt: Attempt,
    inputs: mpsc::Sender<Input>,
) {
    let mut due = half_way(Timestamp::now(), expires_at);
    loop {
        let now = Timestamp::now();
        if now >= expires_at {
            tracing::warn!("the lease of the fallback provider ended and could not be renewed");
            return;
        }
        if now < due {
            tokio::time::sleep(length(due.duration_since(now)).min(CLOCK_CHECK)).await;
            continue;
        }
        match orchestrator.renew(&lease, &token).await {
            Ok(until) => {
                tracing::info!("the fallback provider is ours until {until}");
                expires_at = until;
                due = half_way(Timestamp::now(), expires_at);
                if inputs.send(Input::LeaseExtended(attempt, until)).await.is_err() {
                    return;
                }
            }
            Err(error) if error.is_final() => {
                tracing::warn!(
                    "the lease of the fallback provider is not renewed: {}",
                    crate::run::chain(&error)
                );
                return;
            }
            Err(error) => {
                tracing::warn!("renewing the fallback provider's lease: {}", crate::run::chain(&error));
                let left = length(expires_at.duration_since(Timestamp::now()));
                let pause = RETRY_PAUSE.min(left / 4).max(SHORTEST_PAUSE);
                due = Timestamp::now().saturating_add(pause).unwrap_or(expires_at);
            }
        }
    }
}

fn half_way(now: Timestamp, end: Timestamp) -> Timestamp {
    let half = (end.duration_since(now) / 2).max(SignedDuration::from_secs(1));
    now.saturating_add(half).unwrap_or(end)
}

fn length(span: SignedDuration) -> Duration {
    Duration::try_from(span).unwrap_or_default()
}
