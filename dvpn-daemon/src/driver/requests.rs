//! The questions the session asks of others, each a task that answers with one input.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
};

use dvpn_common::{
    contract::ApproveRequest,
    ids::ProviderId,
    keys::{PrivateKey, PublicKey, VerifyingKey},
};
use dvpn_core::{
    Failure, Retry,
    approval::{Approval, PoolRequest},
    config::{Config, Secret},
    directory::{self, Provider},
    keys::public_key,
    payment::{self, Subscription, Verification},
    session::{Attempt, Input, SessionConfig},
};
use ipnetwork::IpNetwork;
use jiff::Timestamp;
use rand::{TryRng as _, rngs::SysRng};
use tokio::{
    sync::{OnceCell, mpsc},
    task::AbortHandle,
};
use zeroize::Zeroizing;

use super::Parts;
use crate::{
    http::{Payment, Pool},
    probe,
    state::{self, State},
};

/// Private keys that were made for approvals and not yet used. A key is taken once.
#[derive(Clone, Default)]
pub(super) struct Keys(Arc<Mutex<HashMap<PublicKey, PrivateKey>>>);

impl Keys {
    /// Keeps one key; keys of approvals that never came are forgotten with it.
    fn keep(&self, public: PublicKey, private: PrivateKey) {
        let mut keys = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        keys.clear();
        keys.insert(public, private);
    }
    /// Takes the private half of an approved key.
    pub(super) fn take(&self, public: &PublicKey) -> Option<PrivateKey> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(public)
    }
}

struct Shared {
    pool: Option<Pool>,
    payment: Option<Payment>,
    state: State,
    keys: Keys,
    own_node: Option<(ProviderId, PublicKey)>,
    private_endpoints: bool,
    development: bool,
    static_key: Option<PrivateKey>,
    static_addresses: Vec<IpNetwork>,
    pool_key: Option<VerifyingKey>,
    given_token: Option<Secret>,
    token: Mutex<Arc<OnceCell<Option<Secret>>>>,
}

/// Asks; clones share everything.
#[derive(Clone)]
pub(super) struct Requests {
    shared: Arc<Shared>,
    inputs: mpsc::Sender<Input>,
}

fn to_failure(what: &str, error: &dyn std::error::Error, how: &str, retry: Retry) -> Failure {
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
    to_failure(
        "changing the firewall",
        error,
        "the daemon needs CAP_NET_ADMIN and a kernel with nf_tables",
        Retry::Backoff,
    )
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
fn random_key() -> Result<PrivateKey, Failure> {
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
            keys,
            own_node: parts.own_node.clone(),
            private_endpoints: config.pool_private,
            development: config.development,
            static_key: config.tunnel.private_key.clone(),
            static_addresses: config.tunnel.addresses.clone(),
            pool_key: config.pool_public_key,
            given_token: config.payment_token.clone(),
            token: Mutex::default(),
        };
        Self {
            shared: Arc::new(shared),
            inputs,
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
        let shared = Arc::clone(&self.shared);
        self.spawn(async move { Input::Verified(attempt, shared.verify(&provider).await) })
    }

    pub(super) fn approve(&self, attempt: Attempt, provider: Provider, subscription: Subscription) -> AbortHandle {
        let shared = Arc::clone(&self.shared);
        self.spawn(
            async move { Input::Approved(attempt, shared.approve(&provider, &subscription).await.map(Box::new)) },
        )
    }

    pub(super) fn provision(&self, attempt: Attempt, _subscription: Subscription) -> AbortHandle {
        self.spawn(async move {
            let failure = Failure {
                what: "fallback providers are not in this release".to_owned(),
                how: "set FALLBACK_ENABLED=false".to_owned(),
                retry: Retry::Backoff,
            };
            Input::Provisioned(attempt, Err(failure))
        })
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

    /// Sealing takes a while: it happens beside the session.
    pub(super) fn store_subscription(&self, subscription: Option<Subscription>) {
        let shared = Arc::clone(&self.shared);
        tokio::spawn(async move {
            let Ok(Some(token)) = shared.token().await else { return };
            let stored = match &subscription {
                Some(subscription) => shared.state.store_subscription(subscription, &token).await,
                None => shared.state.clear_subscription(),
            };
            if let Err(error) = stored {
                tracing::warn!("storing the verified subscription: {error}");
            }
        });
    }
}

/// Problems are logged and shown; a server that repeats the token in its words does not get it there.
fn redacted(failure: Failure, token: &Secret) -> Failure {
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
    fn pool(&self) -> Result<&Pool, Failure> {
        self.pool.as_ref().ok_or_else(|| Failure {
            what: "no pool is configured".to_owned(),
            how: "set POOL_URL".to_owned(),
            retry: Retry::Never,
        })
    }

    async fn list(&self) -> Result<directory::Directory, Failure> {
        let body = self.pool()?.list().await?;
        let own_keys: Vec<_> = self
            .static_key
            .as_ref()
            .and_then(|key| public_key(key).ok())
            .into_iter()
            .collect();
        let own_node = self.own_node.clone();
        let private_endpoints = self.private_endpoints;
        // 10,000 entries take some milliseconds of arithmetic: not on a thread that moves packets.
        let parsed = tokio::task::spawn_blocking(move || {
            let own_node = own_node.as_ref().map(|(id, key)| (id, key));
            let policy = directory::Policy {
                own_keys: &own_keys,
                own_node,
                private_endpoints,
            };
            directory::parse(&body, &policy, Timestamp::now())
        })
        .await;
        match parsed {
            Ok(parsed) => Ok(parsed?),
            Err(error) => Err(to_failure(
                "reading the provider list",
                &error,
                "trying again",
                Retry::Backoff,
            )),
        }
    }

    /// The configured token, or the stored one, opened once.
    async fn token(&self) -> Result<Option<Secret>, state::Error> {
        if let Some(token) = &self.given_token {
            return Ok(Some(token.clone()));
        }
        let cell = Arc::clone(&self.token.lock().unwrap_or_else(PoisonError::into_inner));
        cell.get_or_try_init(|| self.state.token()).await.cloned()
    }

    async fn usable_token(&self) -> Result<Secret, Failure> {
        let token = self.token().await.map_err(|error| sealed_away(&error))?;
        let token = token.ok_or_else(no_token)?;
        payment::check_token(token.expose(), self.development)?;
        Ok(token)
    }

    async fn verify(&self, provider: &ProviderId) -> Verification {
        let token = match self.usable_token().await {
            Ok(token) => token,
            Err(failure) if failure.retry == Retry::Never => return Verification::NotPaid(failure),
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
            Ok((status, body)) => without_token(payment::judge(status, &body, Timestamp::now()), &token),
            Err(error) => Verification::CannotTell(error.into()),
        }
    }

    async fn approve(&self, provider: &Provider, subscription: &Subscription) -> Result<Approval, Failure> {
        let token = self.usable_token().await?;
        let key = match &self.static_key {
            Some(key) => key.clone(),
            None => random_key()?,
        };
        let client_key = public_key(&key).map_err(|error| {
            to_failure(
                "deriving the public key of WG_PRIVATE_KEY",
                &error,
                "set another one",
                Retry::Never,
            )
        })?;
        let request = ApproveRequest {
            provider_id: provider.id.to_string(),
            token: token.expose().to_owned(),
            approved: true,
            client_public_key: Some(client_key),
            proof: None,
            renews: None,
        };
        let (status, body) = self.pool()?.approve(&request).await?;
        let asked = PoolRequest {
            subscription,
            provider,
            client_key: &client_key,
            static_addresses: &self.static_addresses,
            pool_key: self.pool_key.as_ref(),
            now: Timestamp::now(),
        };
        let approval =
            Approval::from_pool(&asked, status, &body).map_err(|error| redacted(Failure::from(error), &token))?;
        self.keys.keep(client_key, key);
        Ok(approval)
    }
}
