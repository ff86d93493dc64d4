//! The orchestrator: what it lends, to whom, and that it comes back.

use std::time::Duration;

use dvpn_common::{
    contract::{ChallengeResponse, PossessionProof, ProvisionRequest, ProvisionResponse},
    keys::PublicKey,
    possession::PROVISION,
};
use jiff::{SignedDuration, Timestamp};

use crate::{
    node::{Seen, ServingNode, TestNode, next},
    support::{Access, DEADLINE, TestPool, client_key, eventually, proof, refusal},
};

const LIFE: Duration = Duration::from_mins(10);

/// An orchestrating pool with one listed node and one on standby.
async fn pool(life: Duration) -> (TestPool, ServingNode, ServingNode) {
    let pool = TestPool::start(|config| {
        config.orchestrator = Some(life);
        config.limits.approvals = 1000;
    })
    .await;
    let listed = TestNode::new(&pool.access, "node-a", 1).await.serve().await;
    let standby = TestNode::new(&pool.access, "node-s", 2).await.serve().await;
    pool.access.wait_for_list(&["node-a", "node-s"]).await;
    assert!(set_standby(&pool, "node-s", true).await);
    pool.access.wait_for_list(&["node-a"]).await;
    (pool, listed, standby)
}

async fn provision(access: &Access, token: &str, key: PublicKey) -> reqwest::Response {
    let challenge: ChallengeResponse = access
        .get("/orchestrator/provision/challenge")
        .await
        .json()
        .await
        .expect("an orchestrator gives challenges");
    let shown = proof(PROVISION, token, key, challenge.public_key);
    provision_with(access, token, key, Some(shown)).await
}

async fn provision_with(
    access: &Access,
    token: &str,
    key: PublicKey,
    proof: Option<PossessionProof>,
) -> reqwest::Response {
    let request = ProvisionRequest {
        user_id: "0123456789abcdef0123456789abcdef".parse().unwrap(),
        token: token.to_owned(),
        public_key: key,
        proof,
        timeout_seconds: 60,
    };
    access
        .post("/orchestrator/provision", &serde_json::to_value(request).unwrap())
        .await
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

/// Whether there is such a node.
async fn set_standby(pool: &TestPool, id: &str, standby: bool) -> bool {
    let store = pool.store().await;
    store.set_standby(&id.parse().unwrap(), standby).await.unwrap()
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
async fn only_who_holds_a_key_has_a_provider_made_for_it() {
    let (pool, _listed, standby) = pool(LIFE).await;
    let (access, key) = (&pool.access, client_key(1));
    let token = access.pay("user").await;
    let challenge = access.challenge().await.public_key;
    for (shown, why) in [
        (None, "none"),
        (
            Some(proof(PROVISION, &token, client_key(2), challenge)),
            "another key's",
        ),
        (Some(proof(PROVISION, "dev_other", key, challenge)), "another token's"),
        (Some(proof("node-s", &token, key, challenge)), "one for an approval"),
        (
            Some(proof(PROVISION, &token, key, client_key(3))),
            "no challenge of ours",
        ),
    ] {
        let (status, error) = refusal(provision_with(access, &token, key, shown).await).await;
        assert_eq!(status, 401, "{why}: {error}");
    }
    assert!(standby.keys().is_empty());
    // And what is shown for a provision approves nothing.
    let mut request = access.approve_request("node-a", &token, key).await;
    request.proof = Some(proof(PROVISION, &token, key, challenge));
    assert_eq!(access.send_approve(&request).await.status(), 401);
    provisioned(access, &token, key).await;
    assert_eq!(standby.keys(), [key]);
}

#[tokio::test]
async fn a_renewal_that_meets_an_approval_of_its_token_takes_nothing_from_it() {
    let pool = TestPool::start(|config| {
        config.orchestrator = Some(LIFE);
        config.timing.ack_timeout = DEADLINE;
    })
    .await;
    let access = &pool.access;
    let standby = TestNode::new(access, "node-s", 2).await.serve().await;
    let (slow, mut events) = TestNode::by_hand(access, "node-a", 1).await;
    assert!(set_standby(&pool, "node-s", true).await);
    access.wait_for_list(&["node-a"]).await;
    let token = access.pay("user").await;
    let id = provisioned(access, &token, client_key(1)).await.lease_id.unwrap();

    // The approval is at its node, unanswered, when the renewal comes.
    let approving = access.approve("node-a", &token, client_key(2));
    let renewing = async {
        let Seen::Add(added) = next(&mut events).await else {
            panic!("an approval")
        };
        let renewal = lease(access, reqwest::Method::POST, &id, Some(&token));
        let answering = async {
            // That it waits for the approval nothing shows; whatever comes first, the outcome is the same.
            for _ in 0..5 {
                assert_eq!(access.get("/health").await.status(), 200);
            }
            slow.ack(added.sequence, Vec::new()).await;
        };
        tokio::join!(renewal, answering).0
    };
    let (approved, renewed) = tokio::join!(approving, renewing);
    assert_eq!(approved.status(), 200);
    let (status, error) = refusal(renewed).await;
    assert_eq!(status, 404, "the approval took the lease's place: {error}");
    eventually(|| async { standby.keys().is_empty() }).await;
    let Seen::Snapshot(snapshot) = next(&mut slow.open_stream().await).await else {
        panic!("a snapshot")
    };
    assert_eq!(snapshot.peers.len(), 1);
    assert_eq!(snapshot.peers[0].public_key, client_key(2));
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
    assert!(set_standby(&pool, "node-s", false).await);
    access.wait_for_list(&["node-a", "node-s"]).await;
    let (status, error) = refusal(provision(access, &token, client_key(1)).await).await;
    assert_eq!(status, 503, "{error}");
    assert!(!set_standby(&pool, "node-x", true).await);

    let plain = TestPool::start(|_| {}).await;
    assert_eq!(
        provision_with(&plain.access, &token, client_key(1), None)
            .await
            .status(),
        404
    );
}
