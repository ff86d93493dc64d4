//! The list, and how a node gets onto it.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Json,
    extract::State,
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use dvpn_common::{
    contract::{RegisterRequest, RegisterResponse},
    ids::ProviderId,
};
use jiff::Timestamp;
use tokio::sync::watch;

use crate::{
    limiter::{line, site},
    live::Check,
    network::{is_public, is_unicast},
    pool::Pool,
    reach,
    refusal::Refusal,
    request::Incoming,
    signed::Claim,
    store::{Node, RegisterOutcome},
};

/// How long a registration waits for the result of a check.
const CHECK_WAIT: Duration = Duration::from_millis(1500);

/// `GET /providers`
pub async fn list(State(pool): State<Arc<Pool>>, headers: HeaderMap) -> Response {
    let document = pool.live.list(|| pool.signer(), Timestamp::now());
    let known = headers
        .get_all(header::IF_NONE_MATCH)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|tag| matches!(tag.trim(), "*") || tag.trim().trim_start_matches("W/") == document.etag);
    let mut response = if known {
        StatusCode::NOT_MODIFIED.into_response()
    } else {
        (
            [(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))],
            document.json,
        )
            .into_response()
    };
    if let Ok(etag) = HeaderValue::try_from(document.etag) {
        response.headers_mut().insert(header::ETAG, etag);
    }
    response
        .headers_mut()
        .insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}

/// `POST /register`: registration and heartbeat.
pub async fn register(State(pool): State<Arc<Pool>>, request: Incoming) -> Result<Json<RegisterResponse>, Refusal> {
    let source = request.source;
    pool.guarded(source, registered(&pool, request)).await.map(Json)
}

async fn registered(pool: &Arc<Pool>, request: Incoming) -> Result<RegisterResponse, Refusal> {
    let body: RegisterRequest = request.json()?;
    let claim = Claim::read(&request.headers)?;
    if claim.node != body.node_id {
        return Err(Refusal::unauthorized(
            "the request is signed by another node than it registers",
        ));
    }
    let known = pool.live.node(&body.node_id);
    let identity = match (&known, body.identity) {
        (Some(node), Some(identity)) if node.identity != identity => {
            return Err(foreign_identity());
        }
        (Some(node), _) => node.identity,
        (None, Some(identity)) => identity,
        (None, None) => {
            return Err(Refusal::bad_request(
                "send `identity` with the first registration of a node",
            ));
        }
    };
    let now = Timestamp::now();
    // A stranger costs a signature check and a row: its site is asked first, and its nonce is remembered only once it is
    // a registered node. Until then a repeated request says what the first one said.
    if known.is_none()
        && let Some(wait) = pool.registrations.blocked(&site(request.source), Instant::now())
    {
        return Err(Refusal::too_many(wait));
    }
    claim.verify(&request.signed_parts(), &identity, now.as_second())?;
    if known.is_some() {
        pool.replays.admit(&claim, now.as_second())?;
    }
    let policy = pool.config.private_endpoints;
    let endpoint = address("endpoint", &body.endpoint, policy)?;
    let probe = body
        .probe
        .as_deref()
        .map(|text| address("probe", text, policy))
        .transpose()?;
    if probe.is_some_and(|probe| probe.ip() != endpoint.ip()) {
        return Err(Refusal::bad_request("`probe` must be at the address of `endpoint`"));
    }
    if known.is_none() {
        pool.registrations
            .take(&site(request.source), Instant::now())
            .map_err(Refusal::too_many)?;
    }
    let wanted = Node {
        id: body.node_id,
        index: 0,
        identity,
        public_key: body.public_key,
        endpoint,
        probe,
        region: body.region,
        approved: false,
        draining: body.draining,
        max_peers: body.max_peers,
    };
    if let Some(known) = &known {
        count_change(pool, known, &wanted)?;
    }
    let order = pool.changes.lock().await;
    let (node, removed) = match pool.store.register(&wanted, now).await? {
        RegisterOutcome::Stored { node, removed } => (node, removed),
        RegisterOutcome::ForeignIdentity => return Err(foreign_identity()),
        RegisterOutcome::KeyTaken => {
            return Err(Refusal::conflict(
                "another node has this WireGuard key: make a fresh one",
            ));
        }
        RegisterOutcome::Full => return Err(Refusal::unavailable("the pool has no room for another node")),
    };
    pool.announce_removed(removed);
    pool.live
        .registered(&node, request.source, body.leaving, Instant::now());
    drop(order);
    if known.is_none() {
        pool.replays.admit(&claim, now.as_second())?;
    }
    // A node that has only just been told of the prober's key can answer no handshake before this answer.
    let patience = if pool.live.told_prober(&node.id) {
        CHECK_WAIT
    } else {
        Duration::ZERO
    };
    if let Some(mut checked) = start_check(pool, &node.id) {
        drop(tokio::time::timeout(patience, checked.changed()).await);
    }
    let reason = pool.live.obstacle(&node.id, Instant::now());
    let signer = pool.signer();
    Ok(RegisterResponse {
        listed: reason.is_none(),
        reason,
        observed_address: Some(request.source),
        heartbeat_seconds: Some(pool.config.timing.heartbeat.as_secs().max(1)),
        pool_key: Some(signer.ring.current().public()),
        rotations: signer.rotations.clone(),
        prober_key: Some(pool.prober.public()),
        reachability: Some(pool.live.reachability(&node.id)),
    })
}

/// A change costs a write that everything else waits for. The heartbeat that says the same again costs none.
fn count_change(pool: &Pool, known: &Node, wanted: &Node) -> Result<(), Refusal> {
    if wanted.changes(known) {
        pool.node_changes
            .take(&wanted.id, Instant::now())
            .map_err(Refusal::too_many)?;
    }
    Ok(())
}

/// Begins to check whether the node can be reached, if that is due. The receiver changes when the check is over.
pub(super) fn start_check(pool: &Arc<Pool>, id: &ProviderId) -> Option<watch::Receiver<u64>> {
    let now = Instant::now();
    let endpoint = pool.live.node(id)?.endpoint;
    if pool.checks.blocked(&line(endpoint.ip()), now).is_some() {
        return None;
    }
    match pool.live.begin_check(id, now) {
        Check::NotDue => None,
        Check::Running(checked) => Some(checked),
        Check::Due(node, checked) => {
            pool.checks.count(&line(endpoint.ip()), now);
            let pool = pool.clone();
            tokio::spawn(async move {
                let result = reach::check(&node, &pool.prober).await;
                pool.live.checked(&node, result, Instant::now());
            });
            Some(checked)
        }
    }
}

fn foreign_identity() -> Refusal {
    Refusal::forbidden("this node id belongs to another identity: restore that node's identity or take another id")
}

fn address(name: &str, text: &str, private_endpoints: bool) -> Result<SocketAddr, Refusal> {
    let address: SocketAddr = text.parse().ok().ok_or_else(|| {
        Refusal::bad_request(format!(
            "`{name}` must be an IP address and a port, like 192.0.2.1:51820"
        ))
    })?;
    let usable = |ip: IpAddr| is_unicast(ip) && (private_endpoints || is_public(ip));
    if address.port() == 0 || !usable(address.ip()) {
        return Err(Refusal::bad_request(format!(
            "`{name}` {address} cannot be reached from everywhere: it needs a port and a public unicast address"
        )));
    }
    Ok(address)
}
