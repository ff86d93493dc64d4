//! Checkouts: begun once, followed until paid or expired, survived by restarts.
//!
//! The open checkout is stored sealed, because its secret fetches the token: a daemon that is killed between the payment
//! and the token goes on following it. The token never leaves this module but into the sealed state.

use std::{sync::Arc, time::Duration};

use dvpn_common::{
    contract::{CheckoutRequest, CheckoutResponse, CheckoutState, CheckoutStatus},
    ids::{CheckoutId, UserId},
    limits::{REQUIRED_INTERVAL, REQUIRED_PRICE_USD, REQUIRED_WALLET},
};
use dvpn_core::{
    audit::Event,
    config::{Config, Secret},
    payment::is_development_token,
};
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use tokio::sync::{Mutex, mpsc};

use super::Command;
use crate::{audit::Audit, http::Payment, state::State};

/// How often an open checkout is asked about while a person is likely waiting.
const FAST_POLL: Duration = Duration::from_secs(1);
/// For how many polls that lasts.
const FAST_POLLS: u32 = 60;
/// How often afterwards.
const SLOW_POLL: Duration = Duration::from_secs(10);
/// How long after its end a checkout is still followed: a block may come late.
const GRACE: SignedDuration = SignedDuration::from_hours(24);
/// A checkout without an end is followed for this long.
const DEFAULT_LIFE: SignedDuration = SignedDuration::from_hours(24);

/// Why no checkout was begun.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `PAYMENT_API_URL` is not set.
    #[error("no payment server is configured: set PAYMENT_API_URL")]
    NotConfigured,
    /// No answer, or an answer with an error.
    #[error("beginning a checkout: {0}")]
    Server(String),
    /// The state directory failed.
    #[error("keeping the checkout: {0}")]
    State(String),
}

/// What a person needs in order to pay; never a secret.
#[derive(Debug, Clone)]
pub struct Checkout {
    state: &'static str,
    session_id: String,
    url: Option<String>,
    bitcoin_uri: Option<String>,
    amount_btc: Option<String>,
    amount_sats: Option<u64>,
    expires_at: Option<Timestamp>,
    confirmations: Option<String>,
    /// When the month that is paid already ends; another one runs from the day of its payment.
    pub paid_until: Option<Timestamp>,
}

impl Checkout {
    /// Name and value of everything known, as text.
    pub fn fields(self) -> Vec<(&'static str, String)> {
        let known = [
            ("state", Some(self.state.to_owned())),
            ("session_id", Some(self.session_id)),
            ("checkout_url", self.url),
            ("bitcoin_uri", self.bitcoin_uri),
            ("amount_btc", self.amount_btc),
            ("amount_sats", self.amount_sats.map(|sats| sats.to_string())),
            ("expires_at", self.expires_at.map(|time| time.to_string())),
            ("confirmations", self.confirmations),
            ("paid_until", self.paid_until.map(|time| time.to_string())),
        ];
        known
            .into_iter()
            .filter_map(|(name, value)| value.map(|value| (name, value)))
            .collect()
    }
}

/// What is stored, sealed.
#[derive(Clone, Serialize, Deserialize)]
struct Open {
    response: CheckoutResponse,
    begun_at: Timestamp,
    #[serde(skip, default = "pending")]
    progress: CheckoutStatus,
}

fn pending() -> CheckoutStatus {
    CheckoutStatus {
        status: CheckoutState::Pending,
        confirmations: None,
        required_confirmations: None,
        token: None,
    }
}

fn is_worth_asking(ends_at: Timestamp, now: Timestamp) -> bool {
    ends_at.checked_add(GRACE).is_ok_and(|end| now < end)
}

impl Open {
    fn ends_at(&self) -> Timestamp {
        let end = self
            .response
            .expires_at
            .or_else(|| self.begun_at.checked_add(DEFAULT_LIFE).ok());
        end.unwrap_or(self.begun_at)
    }
    /// Whether a person may still be told to pay this.
    fn is_payable(&self, now: Timestamp) -> bool {
        match self.progress.status {
            CheckoutState::Pending => now < self.ends_at(),
            CheckoutState::Seen | CheckoutState::Confirming => true,
            CheckoutState::Confirmed | CheckoutState::Expired => false,
        }
    }
    fn shown(&self) -> Checkout {
        let response = self.response.clone();
        let state = match self.progress.status {
            CheckoutState::Pending => "pending",
            CheckoutState::Seen => "seen",
            CheckoutState::Confirming => "confirming",
            CheckoutState::Confirmed => "confirmed",
            CheckoutState::Expired => "expired",
        };
        let confirmations = self.progress.confirmations.zip(self.progress.required_confirmations);
        Checkout {
            state,
            session_id: response.session_id.to_string(),
            url: response.checkout_url,
            bitcoin_uri: response.bitcoin_uri,
            amount_btc: response.amount_btc,
            amount_sats: response.amount_sats,
            expires_at: response.expires_at,
            confirmations: confirmations.map(|(seen, needed)| format!("{seen}/{needed}")),
            paid_until: None,
        }
    }
}

/// The one follower of checkouts; clones share it.
#[derive(Clone)]
pub struct Payments(Arc<Inner>);

struct Inner {
    server: Option<Payment>,
    state: State,
    audit: Audit,
    development: bool,
    user_id: Option<UserId>,
    open: Mutex<Option<Open>>,
}

impl Payments {
    /// `server` is nothing while `PAYMENT_API_URL` is not set.
    pub fn new(server: Option<Payment>, state: State, audit: Audit, config: &Config) -> Self {
        let (development, user_id) = (config.development, config.user_id.clone());
        Self(Arc::new(Inner {
            server,
            state,
            audit,
            development,
            user_id,
            open: Mutex::new(None),
        }))
    }

    /// Goes on with a checkout that an earlier run began.
    pub async fn resume(&self, commands: mpsc::Sender<Command>) {
        let stored = match self.0.state.checkout().await {
            Ok(Some(stored)) => stored,
            Ok(None) => return,
            Err(error) => {
                tracing::warn!("reading the stored checkout: {error}");
                return;
            }
        };
        match serde_json::from_slice::<Open>(&stored) {
            Ok(open) if is_worth_asking(open.ends_at(), Timestamp::now()) => {
                tracing::info!("following the checkout {} that was open", open.response.session_id);
                let (checkout, ends_at) = (open.response.clone(), open.ends_at());
                *self.0.open.lock().await = Some(open);
                tokio::spawn(self.clone().follow(checkout, ends_at, commands));
            }
            Ok(over) => self.forget(&over.response.session_id).await,
            Err(error) => tracing::warn!("the stored checkout does not read: {error}"),
        }
    }

    /// The open checkout, or a new one.
    pub async fn checkout(&self, commands: mpsc::Sender<Command>) -> Result<Checkout, Error> {
        let server = self.0.server.as_ref().ok_or(Error::NotConfigured)?;
        // The lock is held over the request, so that two callers begin one checkout.
        let mut slot = self.0.open.lock().await;
        if let Some(open) = slot.as_ref().filter(|open| open.is_payable(Timestamp::now())) {
            return Ok(open.shown());
        }
        let state_error = |error: crate::state::Error| Error::State(error.to_string());
        let request = CheckoutRequest {
            user_id: match &self.0.user_id {
                Some(configured) => configured.clone(),
                None => self.0.state.user_id().map_err(state_error)?,
            },
            required_wallet: REQUIRED_WALLET.to_owned(),
            required_price_usd: REQUIRED_PRICE_USD,
            required_interval: REQUIRED_INTERVAL.to_owned(),
        };
        let (status, body) = server
            .checkout_start(&request)
            .await
            .map_err(|error| Error::Server(error.to_string()))?;
        if !(200..300).contains(&status) {
            return Err(Error::Server(format!(
                "the payment server answered {status}: try again later"
            )));
        }
        let response = serde_json::from_slice::<CheckoutResponse>(&body)
            .map_err(|error| Error::Server(format!("the answer does not read ({error}): tell its operator")))?;
        let open = Open {
            response,
            begun_at: Timestamp::now(),
            progress: pending(),
        };
        let record = serde_json::to_vec(&open).map_err(|error| Error::State(error.to_string()))?;
        self.0
            .state
            .store_checkout(&zeroize::Zeroizing::new(record))
            .await
            .map_err(state_error)?;
        let (shown, checkout, ends_at) = (open.shown(), open.response.clone(), open.ends_at());
        *slot = Some(open);
        drop(slot);
        self.0.audit.record(&Event::CheckoutStarted);
        tokio::spawn(self.clone().follow(checkout, ends_at, commands));
        Ok(shown)
    }

    /// Forgets this checkout; one that was begun meanwhile stays.
    async fn forget(&self, id: &CheckoutId) {
        let mut slot = self.0.open.lock().await;
        if slot.as_ref().is_some_and(|open| open.response.session_id != *id) {
            return;
        }
        *slot = None;
        if let Err(error) = self.0.state.clear_checkout() {
            tracing::warn!("removing the stored checkout: {error}");
        }
    }

    /// Asks about one checkout until it is confirmed or not worth asking about: also after its end, since a payment may
    /// be seen late. A checkout begun meanwhile has a follower of its own.
    async fn follow(self, checkout: CheckoutResponse, ends_at: Timestamp, commands: mpsc::Sender<Command>) {
        let Some(server) = self.0.server.clone() else { return };
        let id = &checkout.session_id;
        for poll in 0_u32.. {
            tokio::time::sleep(if poll < FAST_POLLS { FAST_POLL } else { SLOW_POLL }).await;
            if !is_worth_asking(ends_at, Timestamp::now()) {
                tracing::info!("the checkout {id} ended unpaid");
                return self.forget(id).await;
            }
            let mut progress = match server.checkout_status(id, checkout.secret.as_deref()).await {
                Ok((200..=299, body)) => match serde_json::from_slice::<CheckoutStatus>(&body) {
                    Ok(progress) => progress,
                    Err(error) => {
                        tracing::warn!("the payment server's answer about the checkout does not read: {error}");
                        continue;
                    }
                },
                Ok((status, _)) => {
                    tracing::warn!("the payment server answered {status} about the checkout");
                    continue;
                }
                Err(error) => {
                    tracing::info!("asking about the checkout: {error}");
                    continue;
                }
            };
            if let Some(token) = progress.token.take()
                && self.keep(Secret::new(token)).await
            {
                self.forget(id).await;
                if commands.send(Command::TokenChanged).await.is_err() {
                    tracing::debug!("the driver has ended; it reads the token at its next start");
                }
                return;
            }
            let mut slot = self.0.open.lock().await;
            if let Some(open) = slot.as_mut().filter(|open| open.response.session_id == *id) {
                open.progress = progress;
            }
        }
    }

    /// Stores the token; false goes on asking, for a server that hands it out again.
    async fn keep(&self, token: Secret) -> bool {
        let development = is_development_token(token.expose());
        if development && !self.0.development {
            tracing::error!(
                "the payment server handed out a development token; set DVPN_DEVELOPMENT=true to use one, or set \
                 PAYMENT_API_URL to a server that takes real payments"
            );
            return false;
        }
        match self.0.state.store_token(&token).await {
            Ok(()) => {
                self.0.audit.record(&Event::TokenStored);
                tracing::info!("the payment is confirmed; the token is stored");
                true
            }
            Err(error) => {
                tracing::error!("storing the token: {error}");
                false
            }
        }
    }
}
