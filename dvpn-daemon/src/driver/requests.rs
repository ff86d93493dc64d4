//! The questions the session asks of others, each a task that answers with one input.

mod provision;

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
};

use dvpn_common::{
    ids::{ProviderId, UserId},
    keys::{PrivateKey, PublicKey, VerifyingKey},
};
use dvpn_core::{
    Failure, Retry,
    config::{Config, Secret},
    directory::Provider,
    payment::{self, Subscription, Verification},
    session::{Attempt, Input, Release, SessionConfig},
};
use ipnetwork::IpNetwork;
use jiff::Timestamp;
use rand::{TryRng as _, rngs::SysRng};
use tokio::{
    sync::{OnceCell, mpsc},
    task::AbortHandle,
};
use zeroize::Zeroizing;

use super::{Parts, pool::Known, subscriptions};
use crate::{
    audit::Audit,
    http::{Payment, Pool},
    probe,
    state::{self, State},
};

/// Private keys that were made for approvals and not yet used. A key is taken once.
#[derive(Clone, Default)]
pub(super) struct Keys(Arc<Mutex<HashMap<PublicKey, PrivateKey>>>);

impl Keys {
    /// Keeps one key; keys of approvals that never came are forgotten with it.
    pub(super) fn keep(&self, public: PublicKey, private: PrivateKey) {
        let mut keys = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        keys.clear();
        keys.insert(public, private);
    }
    /// The private half of an approved key, which stays: a hand-over may be tried again.
    pub(super) fn peek(&self, public: &PublicKey) -> Option<PrivateKey> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(public)
            .cloned()
    }
    /// Takes the private half of an approved key.
    pub(super) fn take(&self, public: &PublicKey) -> Option<PrivateKey> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(public)
    }
}

pub(super) struct Shared {
    pub(super) pool: Option<Pool>,
    payment: Option<Payment>,
    pub(super) state: State,
    pub(super) audit: Audit,
    pub(super) keys: Keys,
    pub(super) own_node: Option<(ProviderId, PublicKey)>,
    pub(super) private_endpoints: bool,
    development: bool,
    pub(super) static_key: Option<PrivateKey>,
    pub(super) static_addresses: Vec<IpNetwork>,
    /// As configured.
    pub(super) pool_key: Option<VerifyingKey>,
    pub(super) known: Known,
    given_token: Option<Secret>,
    token: Mutex<Arc<OnceCell<Option<Secret>>>>,
    /// The last yes of the payment server, and the token it was for.
    verified: Mutex<Option<(Subscription, Secret)>>,
    user_id: Option<UserId>,
    lease_token: Mutex<Option<Secret>>,
}

/// Asks; clones share everything.
#[derive(Clone)]
pub(super) struct Requests {
    shared: Arc<Shared>,
    inputs: mpsc::Sender<Input>,
    subscriptions: mpsc::UnboundedSender<subscriptions::Order>,
}

pub(super) fn to_failure(what: &str, error: &dyn std::error::Error, how: &str, retry: Retry) -> Failure {
    Failure {
        what: format!("{what}: {error}"),
        how: how.to_owned(),
        retry,
    }
}

/// A token is missing: the session's problem until one is stored.
pub(super) fn no_token() -> Failure {
    Failure {
        what: "no payment token is stored".to_owned(),
        how: "pay through the Payments method (busctl call org.dvpn.Daemon1 /org/dvpn/Daemon1 org.dvpn.Daemon1 \
              Payments), or set PAYMENT_TOKEN"
            .to_owned(),
        retry: Retry::Never,
    }
}

fn sealed_away(error: &state::Error) -> Failure {
    to_failure(
        "opening the stored payment token",
        error,
        "set the TOKEN_PASSPHRASE it was sealed with, or remove the file and pay again",
        Retry::Never,
    )
}

/// The firewall did not take a policy.
pub(super) fn firewall_failed(error: &crate::host::Error) -> Failure {
    Failure {
        what: format!("changing the firewall: {}", crate::run::chain(error)),
        how: "the daemon needs CAP_NET_ADMIN and a kernel with nf_tables".to_owned(),
        retry: Retry::Backoff,
    }
}

/// An approval came for a key that is no longer held.
pub(super) fn key_lost() -> Failure {
    Failure {
        what: "the approval is for a key that this daemon no longer holds".to_owned(),
        how: "a new one is asked for".to_owned(),
        retry: Retry::Backoff,
    }
}

/// A fresh WireGuard key from the operating system's generator.
pub(super) fn random_key() -> Result<PrivateKey, Failure> {
    let mut bytes = Zeroizing::new([0_u8; 32]);
    SysRng.try_fill_bytes(bytes.as_mut_slice()).map_err(|error| {
        to_failure(
            "making a key",
            &error,
            "the operating system gives no random numbers",
            Retry::Backoff,
        )
    })?;
    Ok(PrivateKey::from_bytes(*bytes))
}

impl Requests {
    pub(super) fn new(parts: &Parts, keys: Keys, inputs: mpsc::Sender<Input>) -> Self {
        let config = &parts.config;
        let shared = Shared {
            pool: parts.pool.clone(),
            payment: parts.payment.clone(),
            state: parts.state.clone(),
            audit: parts.audit.clone(),
            keys,
            own_node: parts.own_node.clone(),
            private_endpoints: config.pool_private,
            development: config.development,
            static_key: config.tunnel.private_key.clone(),
            static_addresses: config.tunnel.addresses.clone(),
            pool_key: config.pool_public_key,
            known: Known::default(),
            given_token: config.payment_token.clone(),
            token: Mutex::default(),
            verified: Mutex::default(),
            user_id: config.user_id.clone(),
            lease_token: Mutex::default(),
        };
        Self {
            shared: Arc::new(shared),
            inputs,
            subscriptions: subscriptions::spawn(parts.state.clone()),
        }
    }

    fn spawn(&self, work: impl Future<Output = Input> + Send + 'static) -> AbortHandle {
        let inputs = self.inputs.clone();
        tokio::spawn(async move {
            let input = work.await;
            if inputs.send(input).await.is_err() {
                tracing::debug!("the driver has ended; an answer is dropped");
            }
        })
        .abort_handle()
    }

    pub(super) fn discover(&self, attempt: Attempt) -> AbortHandle {
        let shared = Arc::clone(&self.shared);
        self.spawn(async move { Input::Listed(attempt, shared.list().await) })
    }

    pub(super) fn probe(&self, attempt: Attempt, candidates: Vec<Provider>) -> AbortHandle {
        self.spawn(async move { Input::Probed(attempt, probe::measure(candidates, probe::Options::default()).await) })
    }

    pub(super) fn verify(&self, attempt: Attempt, provider: ProviderId) -> AbortHandle {
        // The approval that follows needs the pool's challenge: it is fetched meanwhile.
        let shared = Arc::clone(&self.shared);
        tokio::spawn(async move {
            if let Err(failure) = shared.challenge(false).await {
                tracing::debug!("asking the pool for its challenge: {failure}");
            }
        });
        let shared = Arc::clone(&self.shared);
        self.spawn(async move { Input::Verified(attempt, shared.verify(&provider).await) })
    }

    pub(super) fn approve(
        &self,
        attempt: Attempt,
        provider: Provider,
        subscription: Subscription,
        renews: Option<PublicKey>,
    ) -> AbortHandle {
        let shared = Arc::clone(&self.shared);
        self.spawn(async move {
            let answer = shared.approve(&provider, &subscription, renews).await;
            Input::Approved(attempt, answer.map(Box::new))
        })
    }

    /// Whether every approval is for the same key.
    pub(super) fn has_static_key(&self) -> bool {
        self.shared.static_key.is_some()
    }

    /// Tells the pool that a key is used no more, again and again until it has answered; nobody has to wait.
    pub(super) fn release(&self, release: Release) {
        // Noted now: an approval of the same key that is asked for next takes it back.
        if let Some(number) = self.shared.known.releases.owe(release) {
            let shared = Arc::clone(&self.shared);
            tokio::spawn(async move { shared.release(number).await });
        }
    }

    /// Tells the pool once, for the last time, that these keys are used no more, and all that it was not told yet. True if
    /// it has answered for each.
    pub(super) async fn release_last(&self, held: Vec<Release>) -> bool {
        let releases = &self.shared.known.releases;
        for release in held {
            releases.owe(release);
        }
        let tries = releases
            .numbers()
            .into_iter()
            .map(|number| self.shared.try_release(number));
        futures::future::join_all(tries).await.into_iter().all(|done| done)
    }

    /// What the session must know of the configuration, the stored token included.
    pub(super) async fn session_config(&self, config: &Config) -> SessionConfig {
        match self.shared.token().await {
            Ok(token) => config.session(token.as_ref()),
            Err(error) => SessionConfig {
                not_configured: Some(sealed_away(&error)),
                ..config.session(None)
            },
        }
    }

    /// The stored token was replaced: read it again at its next use.
    pub(super) fn forget_token(&self) {
        *self.shared.token.lock().unwrap_or_else(PoisonError::into_inner) = Arc::default();
    }

    /// Three small files a session; each is written before the session goes on, so that a crash finds the last word.
    pub(super) fn store_wish(&self, wish: bool) {
        if let Err(error) = self.shared.state.store_wish(wish) {
            tracing::error!("storing whether a restart goes on with the session: {error}");
        }
    }

    pub(super) fn store_last_endpoint(&self, endpoint: SocketAddr) {
        if let Err(error) = self.shared.state.store_last_endpoint(endpoint) {
            tracing::warn!("storing the last endpoint: {error}");
        }
    }

    /// Stores a yes of the payment server, bound to the token it was for, or forgets it.
    pub(super) fn store_subscription(&self, subscription: Option<Subscription>) {
        let order = match subscription {
            None => subscriptions::Order::Forget,
            Some(subscription) => {
                let verified = self.shared.verified.lock().unwrap_or_else(PoisonError::into_inner);
                match verified.as_ref().filter(|(yes, _)| *yes == subscription) {
                    Some((_, token)) => subscriptions::Order::Keep(subscription, token.clone()),
                    None => return,
                }
            }
        };
        if self.subscriptions.send(order).is_err() {
            tracing::error!("the task that stores the verified subscription has ended: restart the daemon");
        }
    }
}

/// Problems are logged and shown; a server that repeats the token in its words does not get it there.
pub(super) fn redacted(failure: Failure, token: &Secret) -> Failure {
    Failure {
        what: failure.what.replace(token.expose(), "[token]"),
        ..failure
    }
}

fn without_token(verification: Verification, token: &Secret) -> Verification {
    match verification {
        Verification::Paid(subscription) => Verification::Paid(subscription),
        Verification::NotPaid(failure) => Verification::NotPaid(redacted(failure, token)),
        Verification::CannotTell(failure) => Verification::CannotTell(redacted(failure, token)),
    }
}

impl Shared {
    /// The configured token, or the stored one, opened once.
    async fn token(&self) -> Result<Option<Secret>, state::Error> {
        if let Some(token) = &self.given_token {
            return Ok(Some(token.clone()));
        }
        let cell = Arc::clone(&self.token.lock().unwrap_or_else(PoisonError::into_inner));
        cell.get_or_try_init(|| self.state.token()).await.cloned()
    }

    pub(super) async fn usable_token(&self) -> Result<Secret, Failure> {
        let token = self.token().await.map_err(|error| sealed_away(&error))?;
        let token = token.ok_or_else(no_token)?;
        payment::check_token(token.expose(), self.development)?;
        Ok(token)
    }

    async fn verify(&self, provider: &ProviderId) -> Verification {
        let token = match self.usable_token().await {
            Ok(token) => token,
            // Nobody was asked: that says nothing about the payment.
            Err(failure) => return Verification::CannotTell(failure),
        };
        let Some(server) = &self.payment else {
            return Verification::CannotTell(Failure {
                what: "no payment server is configured".to_owned(),
                how: "set PAYMENT_API_URL".to_owned(),
                retry: Retry::Never,
            });
        };
        match server
            .verify(&payment::verify_request(token.expose(), provider.as_str()))
            .await
        {
            Ok((status, body)) => {
                let verification = without_token(payment::judge(status, &body, Timestamp::now()), &token);
                if let Verification::Paid(subscription) = &verification {
                    let mut verified = self.verified.lock().unwrap_or_else(PoisonError::into_inner);
                    *verified = Some((*subscription, token));
                }
                verification
            }
            Err(error) => Verification::CannotTell(error.into()),
        }
    }
}
