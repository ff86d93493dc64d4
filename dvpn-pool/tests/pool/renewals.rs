//! Renewal without a break, release, and the bound of two keys a token.

use std::time::Duration;

use dvpn_common::{contract::Snapshot, keys::PublicKey};

use crate::{
    node::{Seen, ServingNode, TestNode, next},
    support::{TestPool, client_key, eventually, granted, refusal},
};

async fn serving(pool: &TestPool, id: &str, number: u8) -> ServingNode {
    TestNode::new(&pool.access, id, number).await.serve().await
}

async fn snapshot(node: &TestNode) -> Snapshot {
    match next(&mut node.open_stream().await).await {
        Seen::Snapshot(snapshot) => snapshot,
        other @ (Seen::Add(_) | Seen::Remove(_) | Seen::Release(_)) => panic!("a snapshot, not {other:?}"),
    }
}

fn sorted(mut keys: Vec<PublicKey>) -> Vec<PublicKey> {
    keys.sort();
    keys
}

#[tokio::test]
async fn a_renewed_key_hands_its_addresses_on_and_goes_after_the_grace() {
    let pool = TestPool::start(|config| config.timing.renewal_grace = Duration::from_secs(3)).await;
    let node = serving(&pool, "node-a", 1).await;
    let token = pool.access.pay("user").await;
    let (old, new) = (client_key(1), client_key(2));
    let first = pool.access.approved("node-a", &token, old).await;
    let second = granted(pool.access.renew("node-a", &token, new, old).await).await;
    let acknowledged = std::time::Instant::now();
    assert_eq!(first.addresses, second.addresses);
    assert_ne!(first.approval, second.approval);
    assert_eq!(
        sorted(node.keys()),
        sorted(vec![old, new]),
        "both are approved for a while"
    );
    assert_eq!(node.peer(new).unwrap().renews, Some(old));
    assert_eq!(node.peer(old).unwrap().renews, None);
    let state = snapshot(&node.node).await;
    let renews: Vec<_> = state.peers.iter().map(|peer| (peer.public_key, peer.renews)).collect();
    assert_eq!(renews, [(old, None), (new, Some(old))]);
    assert_eq!(state.peers[0].addresses, state.peers[1].addresses);
    // The stream of before was replaced by the one of the snapshot.
    let mut events = node.node.open_stream().await;
    next(&mut events).await;
    let Seen::Remove(removed) = next(&mut events).await else {
        panic!("the old key goes")
    };
    assert_eq!(removed.public_key, old);
    assert!(
        acknowledged.elapsed() <= Duration::from_secs(5),
        "{:?}",
        acknowledged.elapsed()
    );
    node.node.ack(removed.sequence, Vec::new()).await;
    let after = snapshot(&node.node).await;
    assert_eq!(after.peers.len(), 1);
    assert_eq!((after.peers[0].public_key, after.peers[0].renews), (new, None));
    assert_eq!(Some(&after.peers[0].addresses), first.addresses.as_ref());
}

#[tokio::test]
async fn a_renewal_whose_answer_was_lost_is_answered_again_also_when_the_renewed_key_is_gone() {
    let pool = TestPool::start(|config| config.timing.renewal_grace = Duration::from_secs(1)).await;
    let node = serving(&pool, "node-a", 1).await;
    let token = pool.access.pay("user").await;
    let (old, new) = (client_key(1), client_key(2));
    let first = pool.access.approved("node-a", &token, old).await;
    granted(pool.access.renew("node-a", &token, new, old).await).await;
    eventually(|| async { node.keys() == [new] }).await;
    let again = granted(pool.access.renew("node-a", &token, new, old).await).await;
    assert_eq!(again.addresses, first.addresses);
    assert_eq!(node.keys(), [new]);
    assert_eq!(
        node.peer(new).unwrap().renews,
        None,
        "there is nothing left to take over"
    );
    // Who was not there does not come in that way.
    let (status, error) = refusal(pool.access.renew("node-a", &token, client_key(3), old).await).await;
    assert_eq!(status, 409, "{error}");
    let released = pool.access.release("node-a", &token, old).await;
    assert_eq!(released.status(), 204, "there is nothing to release any more");
    assert_eq!(node.keys(), [new]);
}

#[tokio::test]
async fn the_next_renewal_works_once_the_one_before_is_over() {
    let pool = TestPool::start(|_| {}).await;
    let node = serving(&pool, "node-a", 1).await;
    let token = pool.access.pay("user").await;
    let keys: Vec<PublicKey> = (1..=4).map(client_key).collect();
    let first = pool.access.approved("node-a", &token, keys[0]).await;
    for pair in keys.windows(2) {
        let next = granted(pool.access.renew("node-a", &token, pair[1], pair[0]).await).await;
        assert_eq!(next.addresses, first.addresses);
        // Releasing the superseded key removes it at once, long before the half minute is over.
        assert_eq!(pool.access.release("node-a", &token, pair[0]).await.status(), 204);
        eventually(|| async { node.keys() == [pair[1]] }).await;
        assert_eq!(node.peer(pair[1]).unwrap().renews, None);
    }
}

#[tokio::test]
async fn a_token_never_holds_three_keys() {
    let pool = TestPool::start(|_| {}).await;
    let (node, other) = (serving(&pool, "node-a", 1).await, serving(&pool, "node-b", 2).await);
    let token = pool.access.pay("user").await;
    let (old, new, third) = (client_key(1), client_key(2), client_key(3));
    pool.access.approved("node-a", &token, old).await;
    granted(pool.access.renew("node-a", &token, new, old).await).await;
    for renewed in [old, new] {
        let (status, error) = refusal(pool.access.renew("node-a", &token, third, renewed).await).await;
        assert_eq!(status, 409, "{error}");
    }
    let (status, error) = refusal(pool.access.approve("node-a", &token, old).await).await;
    assert_eq!(status, 409);
    assert!(error.contains("renewed by another"), "{error}");
    // A lost answer is asked for again with the same key.
    let again = granted(pool.access.renew("node-a", &token, new, old).await).await;
    assert_eq!(again.addresses, Some(node.peer(old).unwrap().addresses));
    assert_eq!(sorted(node.keys()), sorted(vec![old, new]));
    // A reconnect is always possible, and what is oldest makes room before it comes.
    pool.access.approved("node-b", &token, third).await;
    eventually(|| async { node.keys().is_empty() }).await;
    assert_eq!(other.keys(), [third]);
    let mut held = 2_i32;
    for event in node.log.lock().unwrap().iter() {
        match event {
            Seen::Add(_) if matches!(event, Seen::Add(added) if added.peer.public_key == third) => held += 1,
            Seen::Remove(_) => held -= 1,
            Seen::Add(_) | Seen::Snapshot(_) | Seen::Release(_) => {}
        }
    }
    assert_eq!(held, 0);
}

#[tokio::test]
async fn only_ones_own_live_key_at_the_same_provider_can_be_renewed() {
    let pool = TestPool::start(|_| {}).await;
    let node = serving(&pool, "node-a", 1).await;
    serving(&pool, "node-b", 2).await;
    let (token, foreign) = (pool.access.pay("user").await, pool.access.pay("other").await);
    pool.access.approved("node-a", &token, client_key(1)).await;
    pool.access.approved("node-a", &foreign, client_key(2)).await;
    let refusals = [
        ("node-a", client_key(2), "somebody else's"),
        ("node-b", client_key(1), "at another provider"),
        ("node-a", client_key(7), "never approved"),
    ];
    for (provider, renewed, what) in refusals {
        let response = pool.access.renew(provider, &token, client_key(9), renewed).await;
        let (status, error) = refusal(response).await;
        assert_eq!(status, 409, "{what}: {error}");
        assert!(error.contains("live approval"), "{what}: {error}");
    }
    assert_eq!(
        pool.access
            .renew("node-a", &token, client_key(1), client_key(1))
            .await
            .status(),
        400
    );
    assert_eq!(sorted(node.keys()), sorted(vec![client_key(1), client_key(2)]));
}

#[tokio::test]
async fn a_renewal_that_is_not_acknowledged_leaves_the_old_key_as_it_was() {
    let pool = TestPool::start(|config| {
        config.timing.ack_timeout = Duration::from_millis(300);
        config.timing.renewal_grace = Duration::from_secs(1);
    })
    .await;
    let (node, mut events) = TestNode::by_hand(&pool.access, "node-a", 1).await;
    let token = pool.access.pay("user").await;
    let (old, new) = (client_key(1), client_key(2));
    let answering = async {
        let added = next(&mut events).await;
        node.ack(added.sequence(), Vec::new()).await;
    };
    let (first, ()) = tokio::join!(pool.access.approved("node-a", &token, old), answering);
    assert_eq!(pool.access.renew("node-a", &token, new, old).await.status(), 503);
    assert!(matches!(next(&mut events).await, Seen::Add(added) if added.peer.renews == Some(old)));
    let removed = next(&mut events).await;
    assert!(matches!(&removed, Seen::Remove(removed) if removed.public_key == new));
    node.ack(removed.sequence(), Vec::new()).await;
    // Well after the grace: the old key was never superseded.
    let deadline = std::time::Instant::now() + Duration::from_secs(3);
    eventually(|| async { std::time::Instant::now() > deadline }).await;
    let state = snapshot(&node).await;
    assert_eq!(state.peers.len(), 1);
    assert_eq!(
        (state.peers[0].public_key, Some(&state.peers[0].approval)),
        (old, first.approval.as_ref())
    );
}

#[tokio::test]
async fn a_release_is_told_once_and_cleared_by_the_next_approval() {
    let mut pool = TestPool::start(|_| {}).await;
    let node = serving(&pool, "node-a", 1).await;
    let (token, foreign) = (pool.access.pay("user").await, pool.access.pay("other").await);
    let key = client_key(1);
    pool.access.approved("node-a", &token, key).await;
    for _ in 0..2 {
        assert_eq!(pool.access.release("node-a", &token, key).await.status(), 204);
    }
    eventually(|| async { node.peer(key).unwrap().released }).await;
    for (provider, unknown) in [("node-a", client_key(9)), ("node-x", key), ("not an id", key)] {
        assert_eq!(pool.access.release(provider, &token, unknown).await.status(), 204);
    }
    let releases = |node: &ServingNode| {
        let log = node.log.lock().unwrap();
        log.iter().filter(|event| matches!(event, Seen::Release(_))).count()
    };
    assert_eq!(releases(&node), 1, "the second release changed nothing");
    assert_eq!(
        refusal(pool.access.release("node-a", "dev_nobody", key).await).await.0,
        401
    );
    assert_eq!(refusal(pool.access.release("node-a", &foreign, key).await).await.0, 403);
    assert_eq!(
        refusal(pool.access.post("/release", &serde_json::json!({})).await)
            .await
            .0,
        400
    );
    pool.access.approved("node-a", &token, key).await;
    assert!(!node.peer(key).unwrap().released);
    assert_eq!(pool.access.release("node-a", &token, key).await.status(), 204);
    // The released peer stays, also over a restart of the pool.
    pool.restart().await;
    node.node.move_to(&pool.access);
    let state = snapshot(&node.node).await;
    assert_eq!(state.peers.len(), 1);
    assert!(state.peers[0].released);
}

#[tokio::test]
async fn a_draining_node_keeps_and_renews_its_clients_and_takes_no_new_ones() {
    let pool = TestPool::start(|_| {}).await;
    let node = serving(&pool, "node-a", 1).await;
    let (token, new) = (pool.access.pay("user").await, pool.access.pay("new").await);
    pool.access.approved("node-a", &token, client_key(1)).await;
    let mut registration = node.node.registration();
    registration["draining"] = true.into();
    let answer = node.node.register_as(&registration).await;
    assert!(!answer.listed && answer.reason.unwrap().contains("draining"));
    assert!(pool.access.listed_ids().await.is_empty());
    for token in [&token, &new] {
        let (status, error) = refusal(pool.access.approve("node-a", token, client_key(5)).await).await;
        assert_eq!(status, 503);
        assert!(error.contains("no new clients"), "{error}");
    }
    assert_eq!(node.keys(), [client_key(1)], "those that are there stay");
    pool.access.approved("node-a", &token, client_key(1)).await;
    granted(pool.access.renew("node-a", &token, client_key(2), client_key(1)).await).await;
    node.node.register().await;
    assert_eq!(pool.access.listed_ids().await, ["node-a"]);
    pool.access.approved("node-a", &new, client_key(5)).await;
}

#[tokio::test]
async fn a_full_node_says_so_until_a_place_is_free() {
    let pool = TestPool::start(|_| {}).await;
    let node = serving(&pool, "node-a", 1).await;
    let mut registration = node.node.registration();
    registration["max_peers"] = 2.into();
    node.node.register_as(&registration).await;
    let tokens = [
        pool.access.pay("user-1").await,
        pool.access.pay("user-2").await,
        pool.access.pay("user-3").await,
    ];
    for (token, number) in tokens.iter().take(2).zip(1..) {
        pool.access.approved("node-a", token, client_key(number)).await;
    }
    let (status, error) = refusal(pool.access.approve("node-a", &tokens[2], client_key(3)).await).await;
    assert_eq!(status, 503);
    assert!(error.contains("full"), "{error}");
    // Renewals and reconnects of those that are there take no place.
    granted(
        pool.access
            .renew("node-a", &tokens[0], client_key(11), client_key(1))
            .await,
    )
    .await;
    pool.access.approved("node-a", &tokens[1], client_key(12)).await;
    eventually(|| async { !node.keys().contains(&client_key(2)) }).await;
    assert_eq!(
        pool.access.approve("node-a", &tokens[2], client_key(3)).await.status(),
        503
    );
    registration["max_peers"] = 3.into();
    node.node.register_as(&registration).await;
    pool.access.approved("node-a", &tokens[2], client_key(3)).await;
}
