//! What the pool tries before it lists a node, and what it tells the owner.

use std::{
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use dvpn_common::{
    contract::{Reachability, RegisterResponse},
    keys::PrivateKey,
};

use sqlx::Connection as _;

use crate::{
    node::TestNode,
    support::{DEADLINE, TestPool},
};

/// Registers until the pool has found this.
async fn found(node: &TestNode, wanted: Reachability) -> RegisterResponse {
    let start = Instant::now();
    loop {
        let answer = node.register().await;
        if answer.reachability == Some(wanted) {
            return answer;
        }
        assert!(start.elapsed() < DEADLINE, "{:?}", answer.reachability);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn a_new_node_is_listed_about_a_second_after_it_registered() {
    let pool = TestPool::start(|_| {}).await;
    let node = TestNode::new(&pool.access, "node-a", 1).await;
    let start = Instant::now();
    node.register().await;
    let _stream = node.open_stream().await;
    pool.access.wait_for_list(&["node-a"]).await;
    let took = start.elapsed();
    println!("listed after {took:?}");
    // Four times the figure, for a machine that runs other tests at the same time.
    assert!(took < Duration::from_secs(4), "{took:?}");
}

#[tokio::test]
async fn a_node_that_answers_no_echo_is_told_which_port_to_open() {
    let pool = TestPool::start(|_| {}).await;
    let node = TestNode::new(&pool.access, "node-a", 1).await;
    node.responder.ignores_echo.store(true, Ordering::SeqCst);
    node.register().await;
    let _stream = node.open_stream().await;
    let answer = found(&node, Reachability::NoEcho).await;
    assert!(!answer.listed);
    let reason = answer.reason.unwrap();
    let port = format!("UDP port {} (the latency echo) is closed", node.address.port());
    assert!(reason.contains(&port) && reason.contains("forward"), "{reason}");
    assert_eq!(
        node.responder.initiations.load(Ordering::SeqCst),
        0,
        "one step after the other"
    );
    node.responder.ignores_echo.store(false, Ordering::SeqCst);
    node.register_until_listed().await;
}

#[tokio::test]
async fn a_node_whose_wireguard_does_not_answer_is_told_so() {
    let pool = TestPool::start(|_| {}).await;
    let node = TestNode::new(&pool.access, "node-a", 1).await;
    node.responder.ignores_handshake.store(true, Ordering::SeqCst);
    node.register().await;
    let _stream = node.open_stream().await;
    let answer = found(&node, Reachability::NoHandshake).await;
    assert!(!answer.listed);
    let reason = answer.reason.unwrap();
    assert!(
        reason.contains(&format!("UDP port {} (WireGuard) is closed", node.address.port())),
        "{reason}"
    );
    // One check sends a bounded number of initiations, however often the node asks.
    let sent = node.responder.initiations.load(Ordering::SeqCst);
    assert!((1..=32).contains(&sent), "{sent}");
    node.responder.ignores_handshake.store(false, Ordering::SeqCst);
    node.register_until_listed().await;
}

#[tokio::test]
async fn who_only_knows_a_public_key_cannot_answer_for_its_holder() {
    let pool = TestPool::start(|_| {}).await;
    let node = TestNode::new(&pool.access, "node-a", 1).await;
    let prober = node.register().await.prober_key.unwrap();
    // It answers the echo, which takes the public key alone, and handshakes with a key of its own.
    node.responder.answer_with(&PrivateKey::from_bytes([77; 32]), &prober);
    let _stream = node.open_stream().await;
    let answer = found(&node, Reachability::NoHandshake).await;
    assert!(!answer.listed);
    assert!(pool.access.listed_ids().await.is_empty());
}

#[tokio::test]
async fn checks_of_one_address_are_bounded() {
    let pool = TestPool::start(|config| config.limits.checks = 2).await;
    let mut nodes = Vec::new();
    for number in 1..=4 {
        let node = TestNode::new(&pool.access, &format!("node-{number}"), number).await;
        node.register().await;
        nodes.push(node);
    }
    for node in nodes.iter().take(2) {
        found(node, Reachability::Reachable).await;
    }
    for node in nodes.iter().skip(2) {
        assert_eq!(node.register().await.reachability, Some(Reachability::Untested));
        assert_eq!(node.responder.echoes.load(Ordering::SeqCst), 0);
    }
}

#[tokio::test]
async fn new_nodes_of_one_site_are_bounded_before_any_work() {
    let pool = TestPool::start(|config| config.limits.nodes = 2).await;
    for number in 1..=2 {
        let node = TestNode::new(&pool.access, &format!("node-{number}"), number).await;
        node.register().await;
        // Heartbeats of a known node are not new ones.
        node.register().await;
    }
    let third = TestNode::new(&pool.access, "node-3", 3).await;
    let response = third.post("/providers/register", &third.registration()).await;
    assert_eq!(response.status(), 429);
}

/// Whether the listed node's row says so.
async fn is_marked(pool: &TestPool) -> bool {
    let options = sqlx::sqlite::SqliteConnectOptions::new().filename(pool.database());
    let mut connection = sqlx::SqliteConnection::connect_with(&options).await.unwrap();
    sqlx::query_scalar("SELECT listed FROM node WHERE id = 'listed'")
        .fetch_one(&mut connection)
        .await
        .unwrap()
}

#[tokio::test]
async fn a_node_never_listed_is_forgotten_after_an_hour_and_a_listed_one_keeps_its_id() {
    let pool = TestPool::start(|_| {}).await;
    let listed = TestNode::new(&pool.access, "listed", 1).await.serve().await;
    let never = TestNode::new(&pool.access, "never", 2).await;
    never.register().await;
    let store = pool.store().await;
    // The mark is written by the next sweep.
    let soon = jiff::Timestamp::now() + jiff::SignedDuration::from_mins(59);
    let later = jiff::Timestamp::now() + jiff::SignedDuration::from_mins(61);
    crate::support::eventually(|| async { pool.access.listed_ids().await == ["listed"] && is_marked(&pool).await })
        .await;
    assert!(store.forget_silent_nodes(soon).await.unwrap().is_empty());
    let forgotten = store.forget_silent_nodes(later).await.unwrap();
    assert_eq!(forgotten, ["never".parse().unwrap()]);
    assert_eq!(store.nodes().await.unwrap().len(), 1);
    assert_eq!(store.nodes().await.unwrap()[0].identity, listed.node.identity());
}
