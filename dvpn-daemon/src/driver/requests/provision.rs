//! Asking the orchestrator for a provider, through the fallback script.

use dvpn_common::{contract::ProvisionRequest, possession::PROVISION};
use dvpn_core::{
    approval::{self, Approval},
    directory,
    keys::public_key,
    possession,
};

use super::{
    AbortHandle, Attempt, Failure, Input, PoisonError, Requests, Retry, Secret, Shared, Subscription, Timestamp,
    random_key, redacted, to_failure,
};
use crate::fallback::Fallback;

impl Requests {
    /// `fallback` is nothing when it was switched off meanwhile.
    pub(in crate::driver) fn provision(
        &self,
        attempt: Attempt,
        subscription: Subscription,
        fallback: Option<Fallback>,
    ) -> AbortHandle {
        let shared = self.shared.clone();
        self.spawn(async move {
            let made = match fallback {
                Some(fallback) => shared.provision(&fallback, &subscription).await,
                None => Err(Failure {
                    what: "the fallback is switched off".to_owned(),
                    how: "set FALLBACK_ENABLED and FALLBACK_ORCHESTRATOR_URL".to_owned(),
                    retry: Retry::Backoff,
                }),
            };
            Input::Provisioned(attempt, made.map(Box::new))
        })
    }

    /// The token that the last lease was made with: whoever renews or returns it must show it.
    pub(in crate::driver) fn lease_token(&self) -> Option<Secret> {
        self.shared
            .lease_token
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

impl Shared {
    async fn provision(&self, fallback: &Fallback, subscription: &Subscription) -> Result<Approval, Failure> {
        let token = self.usable_token().await?;
        let key = match &self.static_key {
            Some(key) => key.clone(),
            None => random_key()?,
        };
        let unusable =
            |error: &dyn std::error::Error, how| to_failure("asking for a fallback provider", error, how, Retry::Never);
        let client_key = public_key(&key).map_err(|error| unusable(&error, "set another WG_PRIVATE_KEY"))?;
        let user_id = match &self.user_id {
            Some(id) => id.clone(),
            None => self
                .state
                .user_id()
                .map_err(|error| unusable(&error, "check STATE_DIRECTORY, or set USER_ID"))?,
        };
        let proof = match fallback.challenge().await {
            Ok(Some(challenge)) => Some(possession::prove(
                &key,
                &challenge.public_key,
                PROVISION,
                token.expose(),
            )?),
            Ok(None) => None,
            // The script may know a way that this daemon does not.
            Err(error) => {
                tracing::info!(
                    "asking the orchestrator for a challenge: {}: the script is run without a proof",
                    crate::run::chain(&error)
                );
                None
            }
        };
        let request = ProvisionRequest {
            user_id,
            token: token.expose().to_owned(),
            public_key: client_key,
            proof,
            timeout_seconds: fallback.timeout().as_secs(),
        };
        let answer = fallback
            .provision(&request)
            .await
            .map_err(|error| redacted(Failure::from(error), &token))?;
        let policy = directory::Policy {
            own_keys: &[client_key],
            own_node: self.own_node.as_ref().map(|(id, key)| (id, key)),
            private_endpoints: self.private_endpoints,
        };
        let asked = approval::ProvisionRequest {
            subscription,
            client_key: &client_key,
            policy: &policy,
            static_addresses: &self.static_addresses,
            now: Timestamp::now(),
        };
        let approval =
            Approval::from_provision(&asked, &answer).map_err(|error| redacted(Failure::from(error), &token))?;
        self.keys.keep(client_key, key);
        *self.lease_token.lock().unwrap_or_else(PoisonError::into_inner) = Some(token);
        Ok(approval)
    }
}
