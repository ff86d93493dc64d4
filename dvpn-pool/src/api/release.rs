//! Release: a client says that its connection is over, so that its provider can give the grant to others.

use std::{sync::Arc, time::Instant};

use axum::{extract::State, http::StatusCode};
use dvpn_common::{contract::ReleaseRequest, ids::ProviderId};

use crate::{pool::Pool, refusal::Refusal, request::Incoming, signing::sha256, store::ReleaseOutcome};

/// `POST /release`. Saying it twice, or of a key that is gone, is as good as saying it once.
pub async fn release(State(pool): State<Arc<Pool>>, request: Incoming) -> Result<StatusCode, Refusal> {
    pool.guarded(request.source, async {
        let body: ReleaseRequest = request.json()?;
        let token = sha256(body.token.as_bytes());
        // A token that is over or revoked still gives back what it held.
        if pool.store.token(&token).await?.is_none() {
            return Err(Refusal::unauthorized("this pool does not know the token"));
        }
        pool.releases.take(&token, Instant::now()).map_err(Refusal::too_many)?;
        let Ok(node) = body.provider_id.parse::<ProviderId>() else {
            return Ok(StatusCode::NO_CONTENT);
        };
        match pool.ledger.release(node, body.client_public_key, token).await? {
            ReleaseOutcome::Released(_) | ReleaseOutcome::Removed(_) | ReleaseOutcome::Nothing => {
                Ok(StatusCode::NO_CONTENT)
            }
            ReleaseOutcome::Foreign => {
                tracing::warn!(target: crate::AUDIT, "foreign_release_refused");
                Err(Refusal::forbidden("this key was approved for another token"))
            }
        }
    })
    .await
}
