//! The orchestrator's paths.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Path, State},
    http::StatusCode,
};
use dvpn_common::contract::{ProvisionRequest, ProvisionResponse};

use crate::{orchestrator, pool::Pool, refusal::Refusal, request::Incoming};

/// `POST /orchestrator/provision`
pub async fn provision(State(pool): State<Arc<Pool>>, request: Incoming) -> Result<Json<ProvisionResponse>, Refusal> {
    let source = request.source;
    let worker = pool.clone();
    let lent = async {
        let body: ProvisionRequest = request.json()?;
        whole(async move { orchestrator::lend(&worker, &body).await }).await
    };
    pool.guarded(source, lent).await.map(Json)
}

/// `POST /orchestrator/leases/{id}`
pub async fn renew(
    State(pool): State<Arc<Pool>>,
    Path(id): Path<String>,
    request: Incoming,
) -> Result<Json<ProvisionResponse>, Refusal> {
    let worker = pool.clone();
    let renewed = async {
        let token = token(&request)?;
        whole(async move { orchestrator::renew(&worker, &id, &token).await }).await
    };
    pool.guarded(request.source, renewed).await.map(Json)
}

/// `DELETE /orchestrator/leases/{id}`
pub async fn take_back(
    State(pool): State<Arc<Pool>>,
    Path(id): Path<String>,
    request: Incoming,
) -> Result<StatusCode, Refusal> {
    let worker = pool.clone();
    let taken = async {
        let token = token(&request)?;
        whole(async move { orchestrator::take_back(&worker, &id, &token).await }).await
    };
    pool.guarded(request.source, taken).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Runs in a task of its own: a client that hangs up must not leave a lease half made.
async fn whole<T: Send + 'static>(
    work: impl Future<Output = Result<T, Refusal>> + Send + 'static,
) -> Result<T, Refusal> {
    tokio::spawn(work)
        .await
        .unwrap_or_else(|_| Err(Refusal::unavailable("the request was interrupted; try again")))
}

fn token(request: &Incoming) -> Result<String, Refusal> {
    request
        .bearer()
        .map(str::to_owned)
        .ok_or_else(|| Refusal::unauthorized("send the payment token as `Authorization: Bearer …`"))
}
