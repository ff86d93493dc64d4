//! Approval: a paid client becomes a peer of one provider, and is told so only when the provider has it.

use std::{sync::Arc, time::Instant};

use axum::{Json, extract::State, http::StatusCode};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use dvpn_common::{
    approval::ApprovalFields,
    contract::{ApproveRequest, ApproveResponse, PeerAdded, PeerEntry},
    ids::ProviderId,
    keys::PublicKey,
    limits::MAX_APPROVAL_LIFE,
};
use jiff::Timestamp;

use crate::{
    live::NodeEvent,
    pool::Pool,
    refusal::Refusal,
    request::Incoming,
    signing::sha256,
    store::{ApprovalRow, ApproveOutcome, NewApproval, Node, TokenHash},
};

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

/// Everything an approval names.
struct Wish {
    token: TokenHash,
    node: Node,
    client_key: PublicKey,
    issued_at: Timestamp,
    expires_at: Timestamp,
}

async fn decide(pool: &Arc<Pool>, body: ApproveRequest) -> Result<ApproveResponse, Refusal> {
    let wish = check(pool, &body).await?;
    drop(body);
    pool.approvals
        .take(&wish.token, Instant::now())
        .map_err(Refusal::too_many)?;
    let Some(claim) = pool.claim_token(wish.token) else {
        return Err(Refusal::unavailable("another approval for this token is under way"));
    };
    let networks = pool.networks(wish.node.index);
    let (row, answer) = tell_node(pool, &wish).await?;
    let problem = match tokio::time::timeout(pool.config.timing.ack_timeout, answer).await {
        Ok(Ok(Ok(()))) => None,
        Ok(Ok(Err(reason))) => Some(format!("the provider refused: {reason}")),
        Ok(Err(_)) => Some("the provider's stream ended".to_owned()),
        Err(_) => {
            pool.live.stalled(&wish.node.id, row.sequence, Instant::now());
            Some("the provider did not confirm in time".to_owned())
        }
    };
    let order = pool.changes.lock().await;
    if let Some(problem) = problem {
        // A renewal that is not confirmed keeps its peer: the client is connected through it, and it is paid for.
        if !row.renewal {
            let removed = pool.store.withdraw(row.serial).await?;
            pool.announce_removed(removed);
        }
        return Err(Refusal::unavailable(format!("{problem}; take another provider")));
    }
    let removed = pool.store.acknowledge(&wish.token, row.serial).await?;
    pool.announce_removed(removed);
    drop(order);
    drop(claim);
    let addresses = networks.of_client(row.host);
    Ok(ApproveResponse {
        approved: Some(true),
        provider_id: Some(wish.node.id.to_string()),
        address: addresses.first().copied(),
        addresses: Some(addresses),
        gateways: Some(networks.gateways()),
        expires_at: Some(wish.expires_at),
        approval: Some(STANDARD.encode(&row.approval)),
        signature: Some(STANDARD.encode(row.signature)),
        error: None,
    })
}

/// Whether this may be asked at all. What the client says of its own approval is not read.
async fn check(pool: &Pool, body: &ApproveRequest) -> Result<Wish, Refusal> {
    let Some(client_key) = body.client_public_key else {
        return Err(Refusal::bad_request(
            "`client_public_key` is missing: this pool approves one WireGuard key",
        ));
    };
    let token = sha256(body.token.as_bytes());
    let now = Timestamp::now();
    let issued_at = Timestamp::from_second(now.as_second()).unwrap_or(now);
    let Some(paid_until) = pool.store.token_expiry(&token).await? else {
        return Err(Refusal::unauthorized(
            "this pool does not know the token: pay, or check PAYMENT_TOKEN",
        ));
    };
    if paid_until <= now {
        return Err(Refusal::new(
            StatusCode::PAYMENT_REQUIRED,
            format!("the subscription ended at {paid_until}: pay for another month"),
        ));
    }
    let unknown = || Refusal::not_found("the pool has no such provider: fetch the list again");
    let id: ProviderId = body.provider_id.parse().ok().ok_or_else(unknown)?;
    let node = pool.live.node(&id).ok_or_else(unknown)?;
    if let Some(reason) = pool.live.obstacle(&id, Instant::now()) {
        tracing::debug!(node = %id, reason, "asked for while not listed");
        return Err(Refusal::unavailable("the provider is not ready; take another one"));
    }
    if node.public_key == client_key {
        return Err(Refusal::bad_request("`client_public_key` is the provider's own key"));
    }
    let life = pool.config.timing.approval_life.min(MAX_APPROVAL_LIFE);
    let expires_at = issued_at
        .checked_add(life)
        .map_or(paid_until, |end| end.min(paid_until));
    Ok(Wish {
        token,
        node,
        client_key,
        issued_at,
        expires_at,
    })
}

/// Stores the approval and sends it to the provider; the receiver tells what the provider said.
async fn tell_node(
    pool: &Pool,
    wish: &Wish,
) -> Result<(ApprovalRow, tokio::sync::oneshot::Receiver<crate::live::AckResult>), Refusal> {
    let networks = pool.networks(wish.node.index);
    let order = pool.changes.lock().await;
    let wanted = NewApproval {
        token: &wish.token,
        node: &wish.node,
        client_key: wish.client_key,
        now: wish.issued_at,
        expires_at: wish.expires_at,
    };
    let sign = |serial, host| {
        let approval = ApprovalFields {
            pool_id: pool.key.pool_id(),
            provider_id: wish.node.id.clone(),
            provider_key: wish.node.public_key,
            client_key: wish.client_key,
            addresses: networks.of_client(host),
            issued_at: wish.issued_at,
            expires_at: wish.expires_at,
            serial,
        }
        .encode();
        let signature = pool.key.sign(&approval);
        (approval, signature)
    };
    let row = match pool.store.approve(wanted, sign).await? {
        ApproveOutcome::Stored(row) => row,
        ApproveOutcome::KeyTaken => {
            return Err(Refusal::conflict(
                "this WireGuard key is approved for another token: make a fresh one",
            ));
        }
        ApproveOutcome::NodeFull => return Err(Refusal::unavailable("the provider is full; take another one")),
    };
    let event = NodeEvent::Add(PeerAdded {
        sequence: row.sequence,
        peer: PeerEntry {
            public_key: wish.client_key,
            addresses: networks.of_client(row.host),
            expires_at: wish.expires_at,
            approval: STANDARD.encode(&row.approval),
            signature: STANDARD.encode(row.signature),
            renews: None,
            released: false,
        },
    });
    let answer = pool.live.expect_ack(&wish.node.id, row.sequence, wish.client_key);
    // Without a stream it waits all the same: a node that reconnects in time finds the peer in its snapshot.
    pool.live.send(&wish.node.id, event, Instant::now());
    drop(order);
    Ok((row, answer))
}
