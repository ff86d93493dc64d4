//! Approvals: what the client is told, what the node is told, and that neither is told without the other.

use std::{collections::BTreeSet, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use dvpn_common::{approval::ApprovalFields, contract::RefusedPeer, keys::PublicKey};
use dvpn_pool::signing;
use jiff::{SignedDuration, Timestamp};
use serde_json::json;

use crate::{
    node::{Seen, ServingNode, TestNode, next},
    support::{TestPool, client_key, eventually, refusal},
};

async fn serving(pool: &TestPool, id: &str, number: u8) -> ServingNode {
    TestNode::new(&pool.access, id, number).await.serve().await
}

#[tokio::test]
async fn a_paid_client_is_a_peer_before_it_is_told_so() {
    let pool = TestPool::start(|_| {}).await;
    let node = serving(&pool, "node-a", 1).await;
    let token = pool.access.pay("user").await;
    let key = client_key(1);
    let answer = pool.access.approved("node-a", &token, key).await;
    let peer = node
        .peer(key)
        .expect("the node has the peer when the client hears of it");
    let bytes = STANDARD.decode(answer.approval.as_ref().unwrap()).unwrap();
    let signature = STANDARD.decode(answer.signature.as_ref().unwrap()).unwrap();
    assert!(signing::verify(&pool.key, &bytes, &signature));
    let fields = ApprovalFields::decode(&bytes).unwrap();
    fields.check_time(Timestamp::now()).unwrap();
    assert_eq!((fields.client_key, fields.provider_key), (key, node.node.key));
    assert_eq!(fields.provider_id.as_str(), "node-a");
    assert_eq!(Some(&fields.addresses), answer.addresses.as_ref());
    assert_eq!(Some(fields.expires_at), answer.expires_at);
    assert_eq!(
        fields.expires_at.duration_since(fields.issued_at),
        SignedDuration::from_hours(24)
    );
    assert_eq!(peer.addresses, fields.addresses);
    assert_eq!(Some(peer.approval), answer.approval);
    assert_eq!(Some(peer.signature), answer.signature);
    assert_eq!(
        (answer.approved, answer.provider_id.as_deref()),
        (Some(true), Some("node-a"))
    );
    let gateways = answer.gateways.unwrap();
    for ((network, address), gateway) in node.networks.iter().zip(&fields.addresses).zip(gateways) {
        assert_eq!(network.ip(), gateway);
        assert!(network.contains(address.ip()));
        assert_ne!(address.ip(), gateway);
    }
}

#[tokio::test]
async fn every_refusal_says_what_is_wrong() {
    let pool = TestPool::start(|_| {}).await;
    let node = serving(&pool, "node-a", 1).await;
    let (access, key) = (&pool.access, client_key(1));
    let token = access.pay("user").await;
    let check = async |response: reqwest::Response, status: u16, says: &str| {
        let (got, error) = refusal(response).await;
        assert_eq!(got, status, "{error}");
        assert!(error.contains(says), "{error}");
    };
    check(
        access.approve("node-a", "dev_nobody", key).await,
        401,
        "does not know the token",
    )
    .await;
    check(access.approve("node-x", &token, key).await, 404, "no such provider").await;
    check(access.approve("not an id", &token, key).await, 404, "no such provider").await;
    check(access.approve("node-a", &token, node.node.key).await, 400, "own key").await;
    let seed_only = json!({"provider_id": "node-a", "token": token, "approved": true});
    check(access.post("/approve", &seed_only).await, 400, "client_public_key").await;
    let zero = json!({
        "provider_id": "node-a", "token": token, "approved": true, "client_public_key": STANDARD.encode([0; 32]),
    });
    check(access.post("/approve", &zero).await, 400, "all-zero").await;
    check(access.post("/approve", &json!([1, 2])).await, 400, "body").await;
    check(
        access.post("/approve", &json!({"x": "y".repeat(70_000)})).await,
        413,
        "65536",
    )
    .await;
    access.approved("node-a", &token, key).await;
    let other = access.pay("other").await;
    check(access.approve("node-a", &other, key).await, 409, "another token").await;
    let unready = TestNode::new(access, "node-b", 2).await;
    unready.register().await;
    check(access.approve("node-b", &token, key).await, 503, "not ready").await;
    assert_eq!(node.peers.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn a_token_whose_month_is_over_gets_402() {
    let pool = TestPool::start(|_| {}).await;
    serving(&pool, "node-a", 1).await;
    let checkout = pool.access.start_checkout("user").await;
    let store = pool.store().await;
    assert!(
        store
            .pay_checkout(&checkout.session_id, Timestamp::now())
            .await
            .unwrap()
    );
    let ended = Timestamp::now() - SignedDuration::from_secs(1);
    let hash = signing::sha256(b"dev_old");
    let minted = store.mint_token(&checkout.session_id, &hash, ended).await.unwrap();
    assert_eq!(minted, Some(hash));
    let (status, error) = refusal(pool.access.approve("node-a", "dev_old", client_key(1)).await).await;
    assert_eq!(status, 402);
    assert!(error.contains("pay"), "{error}");
    assert!(pool.access.verify("dev_old").await.contains("\"active\":false"));
}

#[tokio::test]
async fn an_approval_ends_with_the_subscription_and_the_node_is_told() {
    let pool = TestPool::start(|_| {}).await;
    let node = serving(&pool, "node-a", 1).await;
    let checkout = pool.access.start_checkout("user").await;
    let store = pool.store().await;
    assert!(
        store
            .pay_checkout(&checkout.session_id, Timestamp::now())
            .await
            .unwrap()
    );
    let end = Timestamp::from_second(Timestamp::now().as_second() + 3).unwrap();
    let hash = signing::sha256(b"dev_short");
    let minted = store.mint_token(&checkout.session_id, &hash, end).await.unwrap();
    assert_eq!(minted, Some(hash));
    let answer = pool.access.approved("node-a", "dev_short", client_key(1)).await;
    assert_eq!(answer.expires_at, Some(end));
    assert!(node.peer(client_key(1)).is_some());
    eventually(|| async { node.peer(client_key(1)).is_none() }).await;
    assert!(Timestamp::now() >= end);
}

#[tokio::test]
async fn without_an_acknowledgement_there_is_no_approval_and_no_peer() {
    let pool = TestPool::start(|config| config.timing.ack_timeout = Duration::from_millis(300)).await;
    let (node, mut events) = TestNode::by_hand(&pool.access, "node-a", 1).await;
    let token = pool.access.pay("user").await;
    let (status, error) = refusal(pool.access.approve("node-a", &token, client_key(1)).await).await;
    assert_eq!(status, 503);
    assert!(error.contains("in time"), "{error}");
    let Seen::Add(added) = next(&mut events).await else {
        panic!("the peer was announced first")
    };
    let Seen::Remove(removed) = next(&mut events).await else {
        panic!("and then withdrawn")
    };
    assert_eq!(
        (added.peer.public_key, removed.public_key),
        (client_key(1), client_key(1))
    );
    assert!(removed.sequence > added.sequence);
    assert!(
        pool.access.listed_ids().await.is_empty(),
        "a node that does not answer is not shown"
    );
    assert_eq!(node.ack(removed.sequence, Vec::new()).await.status(), 204);
    assert_eq!(pool.access.listed_ids().await, ["node-a"], "until it answers again");
    let Seen::Snapshot(snapshot) = next(&mut node.open_stream().await).await else {
        panic!("a snapshot")
    };
    assert_eq!((snapshot.peers.len(), snapshot.sequence), (0, removed.sequence));
}

#[tokio::test]
async fn a_peer_that_the_node_refuses_is_withdrawn() {
    let pool = TestPool::start(|_| {}).await;
    let (node, mut events) = TestNode::by_hand(&pool.access, "node-a", 1).await;
    let token = pool.access.pay("user").await;
    let asking = pool.access.approve("node-a", &token, client_key(1));
    let refusing = async {
        let Seen::Add(added) = next(&mut events).await else {
            panic!("an added peer")
        };
        let refused = RefusedPeer {
            public_key: added.peer.public_key,
            reason: "no room".into(),
        };
        node.ack(added.sequence, vec![refused]).await;
        assert!(matches!(next(&mut events).await, Seen::Remove(removed) if removed.public_key == client_key(1)));
    };
    let (response, ()) = tokio::join!(asking, refusing);
    let (status, error) = refusal(response).await;
    assert_eq!(status, 503);
    assert!(error.contains("no room"), "{error}");
}

#[tokio::test]
async fn a_new_key_replaces_the_old_one_wherever_it_was() {
    let pool = TestPool::start(|_| {}).await;
    let (one, other) = (serving(&pool, "node-a", 1).await, serving(&pool, "node-b", 2).await);
    let token = pool.access.pay("user").await;
    pool.access.approved("node-a", &token, client_key(1)).await;
    pool.access.approved("node-b", &token, client_key(2)).await;
    assert!(other.peer(client_key(2)).is_some());
    eventually(|| async { one.peer(client_key(1)).is_none() }).await;
    pool.access.approved("node-b", &token, client_key(3)).await;
    eventually(|| async { other.peers.lock().unwrap().keys().copied().eq([client_key(3)]) }).await;
    // The same key may move, too.
    pool.access.approved("node-a", &token, client_key(3)).await;
    assert!(one.peer(client_key(3)).is_some());
    eventually(|| async { other.peers.lock().unwrap().is_empty() }).await;
}

#[tokio::test]
async fn asking_again_for_a_key_keeps_the_addresses_and_raises_the_serial() {
    let pool = TestPool::start(|_| {}).await;
    let node = serving(&pool, "node-a", 1).await;
    let token = pool.access.pay("user").await;
    let decode = |answer: &dvpn_common::contract::ApproveResponse| {
        ApprovalFields::decode(&STANDARD.decode(answer.approval.as_ref().unwrap()).unwrap()).unwrap()
    };
    let first = decode(&pool.access.approved("node-a", &token, client_key(1)).await);
    let second = decode(&pool.access.approved("node-a", &token, client_key(1)).await);
    assert_eq!(first.addresses, second.addresses);
    assert!(second.serial > first.serial);
    assert!(
        node.log
            .lock()
            .unwrap()
            .iter()
            .all(|event| matches!(event, Seen::Add(_))),
        "nothing was removed"
    );
    let fresh = decode(&pool.access.approved("node-a", &token, client_key(2)).await);
    assert_ne!(
        first.addresses, fresh.addresses,
        "an address rests before it is given again"
    );
}

#[tokio::test]
async fn asking_again_without_an_acknowledgement_keeps_the_peer() {
    let pool = TestPool::start(|config| config.timing.ack_timeout = Duration::from_millis(300)).await;
    let (node, mut events) = TestNode::by_hand(&pool.access, "node-a", 1).await;
    let token = pool.access.pay("user").await;
    let answering = async {
        let added = next(&mut events).await;
        node.ack(added.sequence(), Vec::new()).await;
    };
    let (first, ()) = tokio::join!(pool.access.approve("node-a", &token, client_key(1)), answering);
    assert_eq!(first.status(), 200);
    assert_eq!(pool.access.approve("node-a", &token, client_key(1)).await.status(), 503);
    let Seen::Snapshot(snapshot) = next(&mut node.open_stream().await).await else {
        panic!("a snapshot")
    };
    assert_eq!(snapshot.peers.len(), 1);
}

#[tokio::test]
async fn a_snapshot_equals_the_events_before_it() {
    let pool = TestPool::start(|_| {}).await;
    let serving = serving(&pool, "node-a", 1).await;
    for number in 0..4 {
        let token = pool.access.pay(&format!("user-{number}")).await;
        pool.access.approved("node-a", &token, client_key(number)).await;
        if number % 2 == 0 {
            pool.access.approved("node-a", &token, client_key(100 + number)).await;
        }
    }
    eventually(|| async { serving.peers.lock().unwrap().len() == 4 }).await;
    let before = serving.peers.lock().unwrap().clone();
    let last = serving.log.lock().unwrap().last().unwrap().sequence();
    let Seen::Snapshot(snapshot) = next(&mut serving.node.open_stream().await).await else {
        panic!("a snapshot")
    };
    assert_eq!(snapshot.sequence, last);
    assert_eq!(snapshot.networks, serving.networks);
    assert_eq!(
        snapshot
            .peers
            .into_iter()
            .map(|peer| (peer.public_key, peer))
            .collect::<std::collections::BTreeMap<_, _>>(),
        before
    );
}

#[tokio::test]
async fn a_node_with_a_new_wireguard_key_has_no_peers() {
    let pool = TestPool::start(|_| {}).await;
    let serving = serving(&pool, "node-a", 1).await;
    let token = pool.access.pay("user").await;
    pool.access.approved("node-a", &token, client_key(1)).await;
    let mut rekeyed = serving.node.registration();
    rekeyed["public_key"] = json!(PublicKey::from_bytes([9; 32]).unwrap().to_string());
    let answer: serde_json::Value = serving.node.post("/register", &rekeyed).await.json().await.unwrap();
    assert_eq!(answer["listed"], false, "its echo still answers with the old key");
    eventually(|| async { serving.peers.lock().unwrap().is_empty() }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_approvals_at_once_are_all_acknowledged() {
    let pool = TestPool::start(|_| {}).await;
    let node = serving(&pool, "node-a", 1).await;
    let mut tokens = Vec::new();
    for number in 0..100 {
        tokens.push(pool.access.pay(&format!("user-{number}")).await);
    }
    let asked = tokens
        .iter()
        .zip(0..)
        .map(|(token, number)| pool.access.approved("node-a", token, client_key(number)));
    let answers = futures::future::join_all(asked).await;
    let addresses: BTreeSet<_> = answers
        .iter()
        .flat_map(|answer| answer.addresses.clone().unwrap())
        .collect();
    assert_eq!(addresses.len(), 200);
    assert_eq!(node.peers.lock().unwrap().len(), 100);
    let sequences: Vec<u64> = node.log.lock().unwrap().iter().map(Seen::sequence).collect();
    assert!(
        sequences.windows(2).all(|pair| pair[0] + 1 == pair[1]),
        "events come in order: {sequences:?}"
    );
}

#[tokio::test]
async fn guessing_tokens_is_slowed_down() {
    let pool = TestPool::start(|_| {}).await;
    let token = pool.access.pay("user").await;
    for guess in 0..60 {
        assert_eq!(
            pool.access
                .approve("node-a", &format!("dev_{guess}"), client_key(1))
                .await
                .status(),
            401
        );
    }
    let response = pool.access.approve("node-a", &token, client_key(1)).await;
    assert_eq!(response.status(), 429);
    let wait: u64 = response.headers()["retry-after"].to_str().unwrap().parse().unwrap();
    assert!((1..=61).contains(&wait));
    assert_eq!(pool.access.get("/providers").await.status(), 200, "the list stays open");
}

#[tokio::test]
async fn a_token_gets_a_burst_of_approvals_and_then_has_to_wait() {
    let pool = TestPool::start(|_| {}).await;
    let _node = serving(&pool, "node-a", 1).await;
    let (token, other) = (pool.access.pay("user").await, pool.access.pay("other").await);
    let mut refused = None;
    for number in 0..40 {
        let response = pool.access.approve("node-a", &token, client_key(number % 2)).await;
        if response.status() == 429 {
            refused = Some((number, response));
            break;
        }
        assert_eq!(response.status(), 200);
    }
    let (number, response) = refused.expect("a limit");
    // On a slow machine a place or two came back meanwhile.
    assert!((12..20).contains(&number), "{number}");
    let wait: u64 = response.headers()["retry-after"].to_str().unwrap().parse().unwrap();
    assert!((1..=11).contains(&wait), "{wait}");
    assert_eq!(pool.access.release("node-a", &token, client_key(1)).await.status(), 204);
    pool.access.approved("node-a", &other, client_key(9)).await;
}
