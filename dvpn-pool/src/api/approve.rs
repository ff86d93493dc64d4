//! Approval: a paid client becomes a peer of one provider, and is told so only when the provider has it.

use std::{sync::Arc, time::Instant};

use axum::{
    Json,
    extract::State,
    http::{HeaderValue, StatusCode, header},
    response::IntoResponse,
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use dvpn_common::{
    contract::{ApproveRequest, ApproveResponse, PossessionProof},
    ids::ProviderId,
    keys::PublicKey,
    limits::MAX_APPROVAL_LIFE,
};
use jiff::Timestamp;
use tokio::sync::oneshot;

use crate::{
    ledger::Given,
    live::AckResult,
    pool::{Pool, TokenClaim},
    refusal::Refusal,
    request::Incoming,
    signing::sha256,
    store::{Acknowledgement, ApprovalRow, ApproveOutcome, NewApproval, Token, TokenHash},
};

/// `GET /approve/challenge`: the key to prove possession against.
pub async fn challenge(State(pool): State<Arc<Pool>>) -> Result<impl IntoResponse, Refusal> {
    let challenge = pool
        .challenges
        .current(Instant::now())
        .ok_or_else(|| Refusal::unavailable("the pool has no random numbers; try again"))?;
    let headers = [(header::CACHE_CONTROL, HeaderValue::from_static("no-store"))];
    Ok((headers, Json(challenge)))
}

/// `POST /approve`
pub async fn approve(State(pool): State<Arc<Pool>>, request: Incoming) -> Result<Json<ApproveResponse>, Refusal> {
    let source = request.source;
    let worker = pool.clone();
    let decided = async {
        let body: ApproveRequest = request.json()?;
        // In a task of its own: a client that hangs up must not leave an approval half made.
        tokio::spawn(async move { decide(&worker, body).await })
            .await
            .unwrap_or_else(|_| Err(Refusal::unavailable("the approval was interrupted; try again")))
    };
    pool.guarded(source, decided).await.map(Json)
}

/// Everything an approval names, and whether the token was used before.
struct Wish {
    approval: NewApproval,
    first_use: bool,
}

async fn decide(pool: &Arc<Pool>, body: ApproveRequest) -> Result<ApproveResponse, Refusal> {
    let Wish {
        approval: wish,
        first_use,
    } = check(pool, &body).await?;
    drop(body);
    pool.approvals
        .take(&wish.token, Instant::now())
        .map_err(Refusal::too_many)?;
    let claim = pool
        .claim_token(wish.token)
        .ok_or_else(|| Refusal::unavailable("another approval for this token is under way"))?;
    let (row, given) = admit(pool, &claim, &wish, first_use).await?;
    drop(claim);
    let networks = pool.networks(wish.node.index);
    let addresses = networks.of_client(row.host);
    Ok(ApproveResponse {
        approved: Some(true),
        provider_id: Some(wish.node.id.to_string()),
        address: addresses.first().copied(),
        addresses: Some(addresses),
        gateways: Some(networks.gateways()),
        expires_at: Some(wish.expires_at),
        approval: Some(STANDARD.encode(&given.approval)),
        signature: Some(STANDARD.encode(given.signature)),
        pool_key: Some(given.signer.ring.current().public()),
        rotations: given.signer.rotations.clone(),
        error: None,
    })
}

/// Makes the client a peer of the node, by right of `_claim`. Only once the node has said so this is an approval; every
/// other one of the token goes then.
pub(crate) async fn admit(
    pool: &Arc<Pool>,
    _claim: &TokenClaim,
    wish: &NewApproval,
    first_use: bool,
) -> Result<(ApprovalRow, Given), Refusal> {
    let (row, answer) = stored(pool.ledger.approve(wish.clone()).await?)?;
    let problem = match tokio::time::timeout(pool.config.timing.ack_timeout, answer).await {
        Ok(Ok(Ok(()))) => None,
        Ok(Ok(Err(reason))) => Some(format!("the provider refused: {reason}")),
        Ok(Err(_)) => Some("the provider's stream ended".to_owned()),
        Err(_) => {
            pool.live.stalled(&wish.node.id, row.sequence, Instant::now());
            Some("the provider did not confirm in time".to_owned())
        }
    };
    if let Some(problem) = problem {
        // A key that was a peer before stays one: the client is connected through it, and it is paid for.
        if !row.again {
            pool.ledger.withdraw(row.serial).await?;
        }
        return Err(Refusal::unavailable(format!("{problem}; take another provider")));
    }
    let grace = pool.config.timing.renewal_grace;
    let over = Timestamp::now().checked_add(grace).unwrap_or(wish.expires_at);
    let given = pool
        .ledger
        .acknowledge(Acknowledgement {
            token: wish.token,
            serial: row.serial,
            supersedes: wish.renews.and(row.renews).map(|old| (old, over)),
            others: row.others,
            first_use,
        })
        .await?;
    match given {
        Some(given) => Ok((row, given)),
        None => Err(Refusal::unavailable("the approval was taken back meanwhile; try again")),
    }
}

/// A token that this pool gave out, that the operator has not taken back, and that is paid at `now`.
pub(crate) async fn paid_token(pool: &Pool, token: &TokenHash, now: Timestamp) -> Result<Token, Refusal> {
    let known = paid(pool, token).await?;
    if known.expires_at <= now {
        return Err(Refusal::new(
            StatusCode::PAYMENT_REQUIRED,
            format!("the subscription ended at {}: pay for another month", known.expires_at),
        ));
    }
    Ok(known)
}

/// Whether this may be asked at all. What the client says of its own approval is not read.
async fn check(pool: &Pool, body: &ApproveRequest) -> Result<Wish, Refusal> {
    let Some(client_key) = body.client_public_key else {
        return Err(Refusal::bad_request(
            "`client_public_key` is missing: this pool approves one WireGuard key",
        ));
    };
    let now = Timestamp::now();
    let issued_at = Timestamp::from_second(now.as_second()).unwrap_or(now);
    let token = sha256(body.token.as_bytes());
    check_proof(pool, body.proof.as_ref(), &body.provider_id, &client_key, &token)?;
    let known = paid_token(pool, &token, now).await?;
    let unknown = || Refusal::not_found("the pool has no such provider: fetch the list again");
    let id: ProviderId = body.provider_id.parse().ok().ok_or_else(unknown)?;
    let node = pool.live.node(&id).ok_or_else(unknown)?;
    if let Some(reason) = pool.live.unready(&id, Instant::now()) {
        tracing::debug!(node = %id, reason, "asked for while not listed");
        return Err(Refusal::unavailable("the provider is not ready; take another one"));
    }
    if pool.live.is_standby(&id) {
        return Err(Refusal::unavailable("the provider is not ready; take another one"));
    }
    if node.public_key == client_key {
        return Err(Refusal::bad_request("`client_public_key` is the provider's own key"));
    }
    if body.renews == Some(client_key) {
        return Err(Refusal::bad_request("`renews` is the key itself: leave it out"));
    }
    let life = pool.config.timing.approval_life.min(MAX_APPROVAL_LIFE);
    let expires_at = issued_at
        .checked_add(life)
        .map_or(known.expires_at, |end| end.min(known.expires_at));
    Ok(Wish {
        first_use: !known.used,
        approval: NewApproval {
            token,
            node,
            client_key,
            renews: body.renews,
            now: issued_at,
            expires_at,
            only_again: false,
        },
    })
}

/// Whoever asks must hold the private half of the key: else one could have somebody else's key bound to one's token.
/// `subject` is what the proof was made for: a provider's id, or [`dvpn_common::possession::PROVISION`].
pub(crate) fn check_proof(
    pool: &Pool,
    proof: Option<&PossessionProof>,
    subject: &str,
    client_key: &PublicKey,
    token: &TokenHash,
) -> Result<(), Refusal> {
    let refused = |reason: &str| {
        // The id is the sender's word: only one that could be an id is repeated.
        let provider = subject.parse::<ProviderId>().ok();
        tracing::warn!(target: crate::AUDIT, provider = provider.as_ref().map(ProviderId::as_str), reason, "proof_refused");
        Refusal::unauthorized(reason)
    };
    let Some(proof) = proof else {
        return Err(refused(
            "`proof` is missing: show with a key of approve/challenge (of an orchestrator, provision/challenge) that you \
             hold the private half of the client's key",
        ));
    };
    pool.challenges
        .check(proof, subject, client_key, token, Instant::now())
        .map_err(|error| refused(&error.to_string()))
}

/// The token, if somebody was given it and the operator has not taken it back. Its month may be over.
async fn paid(pool: &Pool, token: &TokenHash) -> Result<Token, Refusal> {
    let known = pool
        .store
        .token(token)
        .await?
        .ok_or_else(|| Refusal::unauthorized("this pool does not know the token: pay, or check PAYMENT_TOKEN"))?;
    match known.revoked {
        Some(reason) => {
            tracing::warn!(target: crate::AUDIT, "revoked_token_used");
            Err(Refusal::forbidden(format!("the operator revoked this token: {reason}")))
        }
        None => Ok(known),
    }
}

/// The approval that was stored, or why none was.
fn stored(
    outcome: (ApproveOutcome, Option<oneshot::Receiver<AckResult>>),
) -> Result<(ApprovalRow, oneshot::Receiver<AckResult>), Refusal> {
    let refusal = match outcome {
        (ApproveOutcome::Stored(row), Some(answer)) => return Ok((*row, answer)),
        (ApproveOutcome::Stored(_), None) => Refusal::unavailable("the approval was interrupted; try again"),
        (ApproveOutcome::KeyTaken, _) => {
            Refusal::conflict("this WireGuard key is approved for another token: make a fresh one")
        }
        (ApproveOutcome::NodeFull, _) => Refusal::unavailable("the provider is full; take another one"),
        (ApproveOutcome::NodeDraining, _) => {
            Refusal::unavailable("the provider takes no new clients; take another one")
        }
        (ApproveOutcome::NothingToRenew, _) => Refusal::conflict(
            "`renews` is not a live approval of this token at this provider: ask without it, with a fresh key",
        ),
        (ApproveOutcome::RenewalPending, _) => Refusal::conflict(
            "the connection was renewed by another key a moment ago: release the old key, or ask again in 30 s",
        ),
        (ApproveOutcome::Superseded, _) => {
            Refusal::conflict("this key was renewed by another one: use that, or a fresh one")
        }
        (ApproveOutcome::NotThere, _) => Refusal::not_found("the approval ended: ask for another"),
    };
    Err(refusal)
}
