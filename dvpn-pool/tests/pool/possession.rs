//! What a modified client may try at approval, each with the refusal it meets.

use std::time::Duration;

use dvpn_common::contract::ApproveRequest;
use serde_json::json;

use crate::{
    node::{ServingNode, TestNode},
    support::{TestPool, client_key, granted, proof, refusal},
};

async fn serving(pool: &TestPool, id: &str, number: u8) -> ServingNode {
    TestNode::new(&pool.access, id, number).await.serve().await
}

async fn refused(pool: &TestPool, request: &ApproveRequest, status: u16, says: &str) {
    let (got, error) = refusal(pool.access.send_approve(request).await).await;
    assert_eq!(got, status, "{error}");
    assert!(error.contains(says), "{error}");
}

#[tokio::test]
async fn approved_true_opens_nothing() {
    let pool = TestPool::start(|_| {}).await;
    let node = serving(&pool, "node-a", 1).await;
    let mut request = pool.access.approve_request("node-a", "", client_key(1)).await;
    refused(&pool, &request, 401, "does not know the token").await;
    let mut bare = serde_json::to_value(&request).unwrap();
    bare.as_object_mut().unwrap().remove("token");
    assert_eq!(refusal(pool.access.post("/approve", &bare).await).await.0, 400);
    // And `approved: false` closes nothing: it is not read.
    let token = pool.access.pay("user").await;
    request = pool.access.approve_request("node-a", &token, client_key(1)).await;
    request.approved = false;
    granted(pool.access.send_approve(&request).await).await;
    assert_eq!(node.keys(), [client_key(1)]);
}

#[tokio::test]
async fn without_a_valid_proof_nobodys_key_is_approved() {
    let pool = TestPool::start(|_| {}).await;
    let (one, other) = (serving(&pool, "node-a", 1).await, serving(&pool, "node-b", 2).await);
    let (token, foreign) = (pool.access.pay("user").await, pool.access.pay("other").await);
    let (key, victim) = (client_key(1), client_key(2));
    let honest = pool.access.approve_request("node-a", &token, key).await;
    let altered = |change: &dyn Fn(&mut ApproveRequest)| {
        let mut request = honest.clone();
        change(&mut request);
        request
    };
    refused(
        &pool,
        &altered(&|request| request.proof = None),
        401,
        "`proof` is missing",
    )
    .await;
    let not_shown = "does not show";
    // Overheard, the proof is good for nothing but the approval it was made for.
    refused(
        &pool,
        &altered(&|request| request.client_public_key = Some(victim)),
        401,
        not_shown,
    )
    .await;
    refused(
        &pool,
        &altered(&|request| request.token.clone_from(&foreign)),
        401,
        not_shown,
    )
    .await;
    refused(
        &pool,
        &altered(&|request| request.provider_id = "node-b".into()),
        401,
        not_shown,
    )
    .await;
    // Somebody else's key, with a proof by one's own.
    let mut stolen = pool.access.approve_request("node-a", &token, key).await;
    stolen.client_public_key = Some(victim);
    refused(&pool, &stolen, 401, not_shown).await;
    // A challenge of one's own making.
    let made_up = proof("node-a", &token, key, client_key(9));
    refused(
        &pool,
        &altered(&|request| request.proof = Some(made_up.clone())),
        401,
        "fetch approve/challenge",
    )
    .await;
    let bad_mac = json!({"challenge": client_key(9).to_string(), "mac": 1});
    let mut unreadable = serde_json::to_value(&honest).unwrap();
    unreadable["proof"] = bad_mac;
    assert_eq!(refusal(pool.access.post("/approve", &unreadable).await).await.0, 400);
    assert!(one.keys().is_empty() && other.keys().is_empty());
    granted(pool.access.send_approve(&honest).await).await;
    assert_eq!(one.keys(), [key]);
}

#[tokio::test]
async fn a_challenge_is_over_after_its_time_and_a_new_one_is_good() {
    let pool = TestPool::start(|config| config.timing.challenge_life = Duration::from_millis(500)).await;
    serving(&pool, "node-a", 1).await;
    let token = pool.access.pay("user").await;
    let first = pool.access.challenge().await;
    let request = pool.access.approve_request("node-a", &token, client_key(1)).await;
    crate::support::eventually(|| async { jiff::Timestamp::now() > first.expires_at }).await;
    crate::support::eventually(|| async {
        let response = pool.access.send_approve(&request).await;
        response.status() == 401 && refusal(response).await.1.contains("fetch approve/challenge again")
    })
    .await;
    pool.access.approved("node-a", &token, client_key(1)).await;
}

#[tokio::test]
async fn wrong_proofs_count_as_guesses() {
    let pool = TestPool::start(|config| config.limits.failures = 5).await;
    serving(&pool, "node-a", 1).await;
    let token = pool.access.pay("user").await;
    let honest = pool.access.approve_request("node-a", &token, client_key(1)).await;
    let mut bare = honest.clone();
    bare.proof = None;
    for _ in 0..5 {
        refused(&pool, &bare, 401, "proof").await;
    }
    assert_eq!(pool.access.send_approve(&honest).await.status(), 429);
}
