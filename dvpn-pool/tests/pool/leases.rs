//! The orchestrator: what it lends, to whom, and that it comes back.

use std::time::Duration;

use dvpn_common::{contract::ProvisionResponse, keys::PublicKey};
use jiff::{SignedDuration, Timestamp};
use serde_json::json;

use crate::{
    node::{ServingNode, TestNode},
    support::{Access, DEADLINE, TestPool, client_key, eventually, refusal},
};

const LIFE: Duration = Duration::from_mins(10);

/// An orchestrating pool with one listed node and one on standby.
async fn pool(life: Duration) -> (TestPool, ServingNode, ServingNode) {
    let pool = TestPool::start(|config| config.orchestrator = Some(life)).await;
    let listed = TestNode::new(&pool.access, "node-a", 1).await.serve().await;
    let standby = TestNode::new(&pool.access, "node-s", 2).await.serve().await;
    pool.access.wait_for_list(&["node-a", "node-s"]).await;
    assert!(
        pool.store()
            .await
            .set_standby(&"node-s".parse().unwrap(), true)
            .await
            .unwrap()
    );
    pool.access.wait_for_list(&["node-a"]).await;
    (pool, listed, standby)
}

async fn provision(access: &Access, token: &str, key: PublicKey) -> reqwest::Response {
    let body = json!({ "user_id": "0123456789abcdef0123456789abcdef", "token": token, "public_key": key, "timeout_seconds": 60 });
    access.post("/orchestrator/provision", &body).await
}

async fn provisioned(access: &Access, token: &str, key: PublicKey) -> ProvisionResponse {
    let response = provision(access, token, key).await;
    let status = response.status();
    assert_eq!(status, 200, "{}", response.text().await.unwrap());
    response.json().await.unwrap()
}

async fn lease(access: &Access, method: reqwest::Method, id: &str, token: Option<&str>) -> reqwest::Response {
    let mut request = access
        .client
        .request(method, format!("{}/orchestrator/leases/{id}", access.base));
    if let Some(token) = token {
        request = request.bearer_auth(token);
    }
    request.send().await.unwrap()
}

#[tokio::test]
async fn a_standby_is_lent_to_a_paid_client_and_taken_back() {
    let (pool, listed, standby) = pool(LIFE).await;
    let (access, key) = (&pool.access, client_key(1));
    let token = access.pay("user").await;
    // Nobody gets it by asking for it.
    assert_eq!(refusal(access.approve("node-s", &token, key).await).await.0, 503);

    let made = provisioned(access, &token, key).await;
    let peer = standby
        .peer(key)
        .expect("the node has the peer before the client hears of it");
    assert!(listed.peer(key).is_none());
    assert_eq!(made.id, "node-s");
    assert_eq!(made.endpoint, standby.node.address.to_string());
    assert_eq!(made.public_key, standby.node.key.to_string());
    assert_eq!(made.client_public_key, Some(key));
    assert_eq!(made.addresses.as_ref(), Some(&peer.addresses));
    assert_eq!(made.gateways.as_ref().map(Vec::len), Some(2));
    let ends = made.lease_expires_at.unwrap();
    let life = ends.duration_since(Timestamp::now());
    assert!(
        life <= SignedDuration::from_mins(10) && life > SignedDuration::from_mins(9),
        "{life}"
    );
    assert_eq!(peer.expires_at, ends, "the node ends it too if it hears no more");

    let id = made.lease_id.unwrap();
    assert!(!id.contains(&token) && id.len() == 32);
    assert_eq!(
        lease(access, reqwest::Method::DELETE, &id, Some(&token)).await.status(),
        204
    );
    eventually(|| async { standby.peer(key).is_none() }).await;
    assert_eq!(
        lease(access, reqwest::Method::DELETE, &id, Some(&token)).await.status(),
        404
    );
}

#[tokio::test]
async fn a_renewed_lease_keeps_its_peer_and_addresses() {
    let (pool, _listed, standby) = pool(LIFE).await;
    let (access, key) = (&pool.access, client_key(1));
    let token = access.pay("user").await;
    let made = provisioned(access, &token, key).await;
    let id = made.lease_id.as_deref().unwrap();
    // Whole seconds are told: only the next one shows a later end.
    let begun = made.lease_expires_at.unwrap();
    let later = tokio::time::timeout(DEADLINE, async {
        loop {
            let response = lease(access, reqwest::Method::POST, id, Some(&token)).await;
            assert_eq!(response.status(), 200);
            let renewed: ProvisionResponse = response.json().await.unwrap();
            if renewed.lease_expires_at.unwrap() > begun {
                return renewed;
            }
        }
    })
    .await
    .expect("a later end in time");
    assert_eq!(later.lease_id.as_deref(), Some(id));
    assert_eq!(later.addresses, made.addresses);
    assert_eq!(standby.peer(key).unwrap().expires_at, later.lease_expires_at.unwrap());
}

#[tokio::test]
async fn only_its_token_renews_or_returns_a_lease() {
    let (pool, _listed, standby) = pool(LIFE).await;
    let (access, key) = (&pool.access, client_key(1));
    let (token, other) = (access.pay("user").await, access.pay("other").await);
    let id = provisioned(access, &token, key).await.lease_id.unwrap();
    for method in [reqwest::Method::POST, reqwest::Method::DELETE] {
        assert_eq!(
            refusal(lease(access, method.clone(), &id, Some(&other)).await).await.0,
            404
        );
        assert_eq!(refusal(lease(access, method.clone(), &id, None).await).await.0, 401);
        assert_eq!(
            refusal(lease(access, method, "unknown", Some(&token)).await).await.0,
            404
        );
    }
    assert!(standby.peer(key).is_some());
}

#[tokio::test]
async fn one_token_has_one_lease_and_a_key_one_token() {
    let (pool, _listed, standby) = pool(LIFE).await;
    let access = &pool.access;
    let (token, other) = (access.pay("user").await, access.pay("other").await);
    let first = provisioned(access, &token, client_key(1)).await.lease_id.unwrap();
    let second = provisioned(access, &token, client_key(2)).await.lease_id.unwrap();
    eventually(|| async { standby.peer(client_key(1)).is_none() }).await;
    assert!(standby.peer(client_key(2)).is_some());
    assert_eq!(
        lease(access, reqwest::Method::POST, &first, Some(&token))
            .await
            .status(),
        404
    );
    assert_eq!(
        lease(access, reqwest::Method::POST, &second, Some(&token))
            .await
            .status(),
        200
    );
    let (status, error) = refusal(provision(access, &other, client_key(2)).await).await;
    assert_eq!(status, 409, "{error}");
    let (status, _) = refusal(provision(access, &other, standby.node.key).await).await;
    assert_eq!(status, 400, "a provider's own key");
    let (status, _) = refusal(provision(access, "dev_nobody", client_key(3)).await).await;
    assert_eq!(status, 401);
    // An ordinary approval takes the lease's place, as it does with any other approval of the token.
    access.approved("node-a", &token, client_key(4)).await;
    eventually(|| async { standby.peer(client_key(2)).is_none() }).await;
    assert_eq!(
        lease(access, reqwest::Method::POST, &second, Some(&token))
            .await
            .status(),
        404
    );
}

#[tokio::test]
async fn a_lease_that_nobody_renews_ends_by_itself() {
    let (pool, _listed, standby) = pool(Duration::from_secs(2)).await;
    let (access, key) = (&pool.access, client_key(1));
    let token = access.pay("user").await;
    let id = provisioned(access, &token, key).await.lease_id.unwrap();
    assert!(standby.peer(key).is_some());
    eventually(|| async { standby.peer(key).is_none() }).await;
    assert_eq!(
        lease(access, reqwest::Method::POST, &id, Some(&token)).await.status(),
        404
    );
    assert_eq!(pool.store().await.forget_ended_leases().await.unwrap(), 1);
}

#[tokio::test]
async fn a_token_that_asks_too_often_has_to_wait() {
    let (pool, _listed, _standby) = pool(LIFE).await;
    let access = &pool.access;
    let token = access.pay("user").await;
    let mut answers = Vec::new();
    for number in 0..14 {
        answers.push(provision(access, &token, client_key(number)).await.status().as_u16());
    }
    assert_eq!(
        answers.iter().filter(|status| **status == 200).count(),
        12,
        "{answers:?}"
    );
    assert_eq!(answers.last(), Some(&429));
}

#[tokio::test]
async fn without_a_standby_or_the_option_there_is_nothing_to_lend() {
    let (pool, _listed, _standby) = pool(LIFE).await;
    let access = &pool.access;
    let token = access.pay("user").await;
    assert!(
        pool.store()
            .await
            .set_standby(&"node-s".parse().unwrap(), false)
            .await
            .unwrap()
    );
    access.wait_for_list(&["node-a", "node-s"]).await;
    let (status, error) = refusal(provision(access, &token, client_key(1)).await).await;
    assert_eq!(status, 503, "{error}");
    assert!(
        !pool
            .store()
            .await
            .set_standby(&"node-x".parse().unwrap(), true)
            .await
            .unwrap()
    );

    let plain = TestPool::start(|_| {}).await;
    assert_eq!(provision(&plain.access, &token, client_key(1)).await.status(), 404);
}
