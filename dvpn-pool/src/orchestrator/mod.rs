//! The orchestrator: lends a standby node to a client that found no provider on the list.
//!
//! A lease is a short approval with a name. It is made, renewed and ended on the same stream as every approval, so a
//! node knows no difference, and a lease that nobody renews ends like any approval whose time is over. One token has
//! one lease: a new one takes the place of the old.

use std::{sync::Arc, time::Instant};

use dvpn_common::{
    contract::{ProvisionRequest, ProvisionResponse},
    keys::PublicKey,
    possession::PROVISION,
};
use jiff::Timestamp;

use crate::{
    api::approve::{admit, check_proof, paid_token},
    hex,
    limiter::Limiter,
    pool::{Pool, TokenClaim},
    refusal::Refusal,
    signing::sha256,
    store::{ApprovalRow, LeaseRow, NewApproval, Node, TokenHash},
};

/// How long a lease lasts if the operator says nothing.
pub const DEFAULT_LEASE_LIFE: std::time::Duration = std::time::Duration::from_mins(10);
/// Leases one token may ask for in [`WINDOW`].
const LEASES_PER_TOKEN: u32 = 12;
const WINDOW: std::time::Duration = std::time::Duration::from_mins(10);
/// Tokens that are remembered.
const CAPACITY: usize = 65_536;
/// Standby nodes that are asked before the client is told that there is none: each may take the whole time of an
/// acknowledgement.
const TRIES: usize = 3;

/// What the orchestrator remembers.
pub struct Orchestrator {
    life: std::time::Duration,
    leases: Limiter<TokenHash>,
}

impl Orchestrator {
    /// Leases last for `life`.
    pub fn new(life: std::time::Duration) -> Self {
        Self {
            life,
            leases: Limiter::new(LEASES_PER_TOKEN, WINDOW, CAPACITY),
        }
    }
}

/// Makes a lease for the asker's key at the standby node with the fewest peers.
pub async fn lend(pool: &Arc<Pool>, asked: &ProvisionRequest) -> Result<ProvisionResponse, Refusal> {
    let orchestrator = orchestrator(pool)?;
    let now = Timestamp::now();
    let token = sha256(asked.token.as_bytes());
    let client_key = asked.public_key;
    check_proof(pool, asked.proof.as_ref(), PROVISION, &client_key, &token)?;
    let known = paid_token(pool, &token, now).await?;
    orchestrator
        .leases
        .take(&token, Instant::now())
        .map_err(Refusal::too_many)?;
    let mut nodes = pool.live.ready_standbys(Instant::now());
    if nodes.iter().any(|node| node.public_key == client_key) {
        return Err(Refusal::bad_request("`public_key` is a provider's own key"));
    }
    let peers = pool.store.peer_counts().await?;
    nodes.sort_by_key(|node| peers.get(&node.id).copied().unwrap_or(0));
    let mut last = Refusal::unavailable("no standby node is ready; try again later");
    // Held until the lease has its name: another one of the token comes before or after it.
    let claim = claim(pool, token).await?;
    for node in nodes.into_iter().take(TRIES) {
        let wish = wish(orchestrator, token, node, client_key, known.expires_at);
        match admit(pool, &claim, &wish, !known.used).await {
            Ok((row, _)) => {
                let id = hex::encode(&rand::random::<[u8; 16]>());
                pool.store.store_lease(&id, &token, &wish.node.id, &client_key).await?;
                tracing::info!(node = %wish.node.id, expires_at = %wish.expires_at, "a lease begins");
                return Ok(response(pool, id, &wish, &row));
            }
            Err(refusal) if refusal.is_unavailable() => {
                tracing::warn!(node = %wish.node.id, "a standby node did not take a client");
                last = refusal;
            }
            Err(refusal) => return Err(refusal),
        }
    }
    Err(last)
}

/// Lets a lease last for another life from now.
pub async fn renew(pool: &Arc<Pool>, id: &str, token: &str) -> Result<ProvisionResponse, Refusal> {
    let orchestrator = orchestrator(pool)?;
    let now = Timestamp::now();
    let token = sha256(token.as_bytes());
    let known = paid_token(pool, &token, now).await?;
    find(pool, id, &token, now).await?;
    pool.approvals.take(&token, Instant::now()).map_err(Refusal::too_many)?;
    // Once no other approval of the token is under way: one that came first has taken the lease's place.
    let claim = claim(pool, token).await?;
    let lease = find(pool, id, &token, Timestamp::now()).await?;
    let node = pool.live.node(&lease.node).ok_or_else(gone)?;
    let wish = NewApproval {
        only_again: true,
        ..wish(orchestrator, token, node, lease.client_key, known.expires_at)
    };
    let (row, _) = admit(pool, &claim, &wish, false).await?;
    Ok(response(pool, id.to_owned(), &wish, &row))
}

/// Takes a lease back before its end.
pub async fn take_back(pool: &Arc<Pool>, id: &str, token: &str) -> Result<(), Refusal> {
    let token = sha256(token.as_bytes());
    find(pool, id, &token, Timestamp::now()).await?;
    // A renewal under way has another serial than the lease had.
    let _claim = claim(pool, token).await?;
    let lease = find(pool, id, &token, Timestamp::now()).await?;
    pool.ledger.withdraw(lease.serial).await?;
    pool.store.forget_lease(id).await?;
    tracing::info!(node = %lease.node, "a lease was returned");
    Ok(())
}

fn orchestrator(pool: &Pool) -> Result<&Orchestrator, Refusal> {
    pool.orchestrator
        .as_ref()
        .ok_or_else(|| Refusal::not_found("this server is no orchestrator"))
}

async fn claim(pool: &Arc<Pool>, token: TokenHash) -> Result<TokenClaim, Refusal> {
    pool.claim_token_soon(token)
        .await
        .ok_or_else(|| Refusal::unavailable("another approval for this token is under way"))
}

async fn find(pool: &Pool, id: &str, token: &TokenHash, now: Timestamp) -> Result<LeaseRow, Refusal> {
    pool.store.lease(id, token, now).await?.ok_or_else(gone)
}

/// One answer for "ended" and "somebody else's": guesses learn nothing.
fn gone() -> Refusal {
    Refusal::not_found("there is no such lease of this token: it may have ended; ask for another")
}

fn wish(
    orchestrator: &Orchestrator,
    token: TokenHash,
    node: Node,
    client_key: PublicKey,
    paid_until: Timestamp,
) -> NewApproval {
    let now = Timestamp::now();
    let issued_at = Timestamp::from_second(now.as_second()).unwrap_or(now);
    let end = issued_at.checked_add(orchestrator.life).unwrap_or(paid_until);
    NewApproval {
        token,
        node,
        client_key,
        renews: None,
        now: issued_at,
        expires_at: end.min(paid_until),
        only_again: false,
    }
}

fn response(pool: &Pool, lease_id: String, wish: &NewApproval, row: &ApprovalRow) -> ProvisionResponse {
    let networks = pool.networks(wish.node.index);
    let addresses = networks.of_client(row.host);
    ProvisionResponse {
        id: wish.node.id.to_string(),
        endpoint: wish.node.endpoint.to_string(),
        public_key: wish.node.public_key.to_string(),
        allowed_ips: None,
        client_public_key: Some(wish.client_key),
        address: addresses.first().copied(),
        addresses: Some(addresses),
        gateways: Some(networks.gateways()),
        lease_id: Some(lease_id),
        lease_expires_at: Some(wish.expires_at),
    }
}
