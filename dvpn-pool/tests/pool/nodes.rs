//! Registration, the list, and the event stream.

use std::{sync::atomic::Ordering, time::Duration};

use dvpn_common::contract::Reachability;
use serde_json::json;

use crate::{
    node::{Seen, TestNode, next, now},
    support::{Access, DEADLINE, TestPool, refusal},
};

const REGISTER: &str = "/providers/register";

#[tokio::test]
async fn a_node_is_listed_once_it_answers_echo_and_handshake_and_has_a_stream() {
    let pool = TestPool::start(|_| {}).await;
    let (before, first_version) = pool.access.list().await;
    assert!(before.is_empty());
    let node = TestNode::new(&pool.access, "node-a", 1).await;
    let answer = node.register().await;
    assert!(!answer.listed);
    assert_eq!(answer.reachability, Some(Reachability::Untested));
    assert_eq!(answer.observed_address, Some("127.0.0.1".parse().unwrap()));
    assert_eq!(answer.pool_key, Some(pool.key));
    assert_eq!(answer.heartbeat_seconds, Some(15));
    let answer = node.register().await;
    assert!(!answer.listed);
    assert_eq!(answer.reachability, Some(Reachability::Reachable));
    assert!(answer.reason.unwrap().contains("event stream"));
    let _stream = node.open_stream().await;
    let answer = node.register().await;
    assert!(answer.listed && answer.reason.is_none());
    let (list, version) = pool.access.list().await;
    assert!(version > first_version);
    assert_eq!(list.len(), 1);
    assert_eq!(
        (list[0].id.as_str(), list[0].region.as_deref()),
        ("node-a", Some("test"))
    );
    assert_eq!(list[0].endpoint, node.address.to_string());
    assert_eq!(list[0].probe, Some(node.address.to_string()));
    assert_eq!(list[0].public_key, node.key.to_string());
}

#[tokio::test]
async fn the_list_is_not_sent_again_to_who_has_it() {
    let pool = TestPool::start(|_| {}).await;
    let first = pool.access.get("/providers").await;
    let etag = first.headers()["etag"].clone();
    let again = || async {
        let url = format!("{}/providers", pool.access.base);
        pool.access
            .client
            .get(url)
            .header("if-none-match", &etag)
            .send()
            .await
            .unwrap()
    };
    let unchanged = again().await;
    assert_eq!(unchanged.status(), 304);
    assert_eq!(unchanged.headers()["etag"], etag);
    assert!(unchanged.bytes().await.unwrap().is_empty());
    let _node = TestNode::new(&pool.access, "node-a", 1).await.serve().await;
    assert_eq!(again().await.status(), 200);
}

#[tokio::test]
async fn a_signed_request_is_good_once() {
    let pool = TestPool::start(|_| {}).await;
    let node = TestNode::new(&pool.access, "node-a", 1).await;
    let body = node.registration().to_string();
    let headers = node.sign("POST", REGISTER, body.as_bytes(), now());
    assert_eq!(node.post_with(REGISTER, &body, &headers).await.status(), 200);
    let (status, error) = refusal(node.post_with(REGISTER, &body, &headers).await).await;
    assert_eq!(status, 401);
    assert!(error.contains("received before"), "{error}");
}

#[tokio::test]
async fn a_signature_covers_time_path_body_and_node() {
    let pool = TestPool::start(|_| {}).await;
    let node = TestNode::new(&pool.access, "node-a", 1).await;
    let body = node.registration().to_string();
    for (time, says) in [(now() - 125, "clock"), (now() + 125, "clock")] {
        let headers = node.sign("POST", REGISTER, body.as_bytes(), time);
        let (status, error) = refusal(node.post_with(REGISTER, &body, &headers).await).await;
        assert_eq!(status, 401);
        assert!(error.contains(says), "{error}");
    }
    let edge = node.sign("POST", REGISTER, body.as_bytes(), now() - 110);
    assert_eq!(node.post_with(REGISTER, &body, &edge).await.status(), 200);
    let elsewhere = node.sign("POST", "/register", body.as_bytes(), now());
    assert_eq!(node.post_with(REGISTER, &body, &elsewhere).await.status(), 401);
    let other_method = node.sign("GET", REGISTER, body.as_bytes(), now());
    assert_eq!(node.post_with(REGISTER, &body, &other_method).await.status(), 401);
    let altered = node.sign("POST", REGISTER, body.as_bytes(), now());
    assert_eq!(
        node.post_with(REGISTER, &body.replace("test", "best"), &altered)
            .await
            .status(),
        401
    );
    assert_eq!(node.post_with(REGISTER, &body, &[]).await.status(), 401);
    let mut renamed = node.sign("POST", REGISTER, body.as_bytes(), now());
    renamed[0].1 = "node-b".into();
    assert_eq!(node.post_with(REGISTER, &body, &renamed).await.status(), 401);
}

#[tokio::test]
async fn an_id_stays_with_its_first_identity() {
    let pool = TestPool::start(|_| {}).await;
    let owner = TestNode::new(&pool.access, "node-a", 1).await.serve().await;
    let thief = TestNode::new(&pool.access, "node-a", 2).await;
    let (status, error) = refusal(thief.post(REGISTER, &thief.registration()).await).await;
    assert_eq!(status, 403);
    assert!(error.contains("another identity"), "{error}");
    let mut quiet = thief.registration();
    quiet.as_object_mut().unwrap().remove("identity");
    assert_eq!(thief.post(REGISTER, &quiet).await.status(), 401);
    assert_eq!(thief.ack(99, Vec::new()).await.status(), 401);
    assert_eq!(pool.access.list().await.0[0].public_key, owner.node.key.to_string());
    let namesake = TestNode::new(&pool.access, "node-b", 1).await;
    assert_eq!(
        namesake.post(REGISTER, &namesake.registration()).await.status(),
        409,
        "the WireGuard key is taken"
    );
}

#[tokio::test]
async fn an_endpoint_elsewhere_needs_the_operator_and_gets_no_packet_before() {
    let pool = TestPool::start(|_| {}).await;
    let node = TestNode::new(&pool.access, "node-a", 1).await;
    let mut elsewhere = node.registration();
    for name in ["endpoint", "probe"] {
        elsewhere[name] = json!(format!("127.0.0.2:{}", node.address.port()));
    }
    let answer: serde_json::Value = node.post(REGISTER, &elsewhere).await.json().await.unwrap();
    assert_eq!(answer["listed"], false);
    assert!(
        answer["reason"].as_str().unwrap().contains("not the address"),
        "{answer}"
    );
    assert_eq!(answer["reachability"], "other_address");
    let reason = answer["reason"].as_str().unwrap();
    assert!(
        reason.contains("NODE_PUBLIC_ENDPOINT") && reason.contains("127.0.0.1"),
        "{reason}"
    );
    assert_eq!(node.responder.echoes.load(Ordering::SeqCst), 0);
    assert_eq!(node.responder.initiations.load(Ordering::SeqCst), 0);
    let mut split = node.registration();
    split["probe"] = json!("127.0.0.2:9");
    assert_eq!(node.post(REGISTER, &split).await.status(), 400);
}

#[tokio::test]
async fn without_open_registration_the_operator_decides() {
    let pool = TestPool::start(|config| config.open_registration = false).await;
    let node = TestNode::new(&pool.access, "node-a", 1).await;
    node.register().await;
    let _stream = node.open_stream().await;
    assert!(node.register().await.reason.unwrap().contains("operator"));
    assert_eq!(node.responder.echoes.load(Ordering::SeqCst), 0);
    let (store, id) = (pool.store().await, node.id.parse().unwrap());
    assert!(store.set_approved(&id, true).await.unwrap());
    assert!(node.register().await.listed);
    assert!(store.set_approved(&id, false).await.unwrap());
    assert!(!node.register().await.listed);
    assert!(pool.access.listed_ids().await.is_empty());
}

#[tokio::test]
async fn a_public_pool_takes_public_addresses_only() {
    let pool = TestPool::start(|config| config.private_endpoints = false).await;
    let node = TestNode::new(&pool.access, "node-a", 1).await;
    for endpoint in [
        "127.0.0.1:51820",
        "10.1.2.3:51820",
        "[fd00::1]:51820",
        "8.8.8.8:0",
        "host.example:1",
        "8.8.8.8",
    ] {
        let mut wish = node.registration();
        wish["endpoint"] = json!(endpoint);
        wish.as_object_mut().unwrap().remove("probe");
        let (status, error) = refusal(node.post(REGISTER, &wish).await).await;
        assert_eq!(status, 400, "{endpoint}");
        assert!(error.contains("endpoint"), "{error}");
    }
}

#[tokio::test]
async fn a_node_that_loses_its_stream_leaves_the_list_after_the_grace() {
    let pool = TestPool::start(|config| config.timing.stream_grace = Duration::from_secs(2)).await;
    let node = TestNode::new(&pool.access, "node-a", 1).await;
    node.register().await;
    let stream = node.open_stream().await;
    assert!(node.register().await.listed);
    drop(stream);
    assert_eq!(
        pool.access.listed_ids().await,
        ["node-a"],
        "it may come back within the grace"
    );
    pool.access.wait_for_list(&[]).await;
    let _stream = node.open_stream().await;
    pool.access.wait_for_list(&["node-a"]).await;
}

#[tokio::test]
async fn a_node_without_heartbeats_leaves_the_list() {
    let pool = TestPool::start(|config| config.timing.heartbeat = Duration::from_secs(1)).await;
    let node = TestNode::new(&pool.access, "node-a", 1).await;
    node.register().await;
    let _stream = node.open_stream().await;
    assert!(node.register().await.listed);
    pool.access.wait_for_list(&[]).await;
    assert!(node.register().await.listed);
}

#[tokio::test]
async fn a_leaving_node_leaves_at_once() {
    let pool = TestPool::start(|_| {}).await;
    let serving = TestNode::new(&pool.access, "node-a", 1).await.serve().await;
    let mut farewell = serving.node.registration();
    farewell["leaving"] = json!(true);
    assert_eq!(serving.node.post(REGISTER, &farewell).await.status(), 200);
    assert!(pool.access.listed_ids().await.is_empty());
    assert!(serving.node.register().await.listed);
}

#[tokio::test]
async fn a_second_stream_replaces_the_first() {
    let pool = TestPool::start(|_| {}).await;
    let node = TestNode::new(&pool.access, "node-a", 1).await;
    node.register().await;
    let mut first = node.open_stream().await;
    assert!(matches!(next(&mut first).await, Seen::Snapshot(_)));
    let mut second = node.open_stream().await;
    assert!(matches!(next(&mut second).await, Seen::Snapshot(_)));
    assert_eq!(
        tokio::time::timeout(DEADLINE, first.recv())
            .await
            .expect("the first stream ends"),
        None
    );
    assert!(
        node.register().await.listed,
        "the end of the first stream says nothing of the second"
    );
}

#[tokio::test]
async fn a_node_sees_its_own_stream_only() {
    let pool = TestPool::start(|_| {}).await;
    let one = TestNode::new(&pool.access, "node-a", 1).await;
    let other = TestNode::new(&pool.access, "node-b", 2).await;
    one.register().await;
    let get = |path: String, headers| {
        let Access { base, client } = pool.access.clone();
        async move {
            let mut request = client.get(format!("{base}{path}"));
            for (name, value) in headers {
                request = request.header(name, value);
            }
            request.send().await.unwrap().status()
        }
    };
    let path = one.events_path();
    assert_eq!(get(path.clone(), other.sign("GET", &path, b"", now())).await, 403);
    assert_eq!(get(path.clone(), Vec::new()).await, 401);
    let path = other.events_path();
    assert_eq!(
        get(path.clone(), other.sign("GET", &path, b"", now())).await,
        404,
        "not registered"
    );
}

#[tokio::test]
async fn providers_get_networks_that_do_not_overlap() {
    let pool = TestPool::start(|_| {}).await;
    let one = TestNode::new(&pool.access, "node-a", 1).await.serve().await;
    let other = TestNode::new(&pool.access, "node-b", 2).await.serve().await;
    assert_eq!(one.networks[0].to_string(), "10.96.0.1/19");
    assert_eq!(other.networks[0].to_string(), "10.96.32.1/19");
    for (a, b) in one.networks.iter().zip(&other.networks) {
        assert!(!a.contains(b.ip()) && !b.contains(a.ip()));
    }
    assert_eq!(pool.access.listed_ids().await, ["node-a", "node-b"]);
}

#[tokio::test]
async fn a_node_that_changes_in_a_loop_has_to_wait_and_its_heartbeats_do_not() {
    let pool = TestPool::start(|config| config.limits.changes = 2).await;
    let node = TestNode::new(&pool.access, "node-a", 1).await;
    let other = TestNode::new(&pool.access, "node-b", 2).await;
    node.register().await;
    other.register().await;
    let mut body = node.registration();
    let mut answers = Vec::new();
    for number in 0..6 {
        body["region"] = json!(format!("region-{number}"));
        let response = node.post(REGISTER, &body).await;
        if response.status() == 429 {
            let wait: u64 = response.headers()["retry-after"].to_str().unwrap().parse().unwrap();
            assert!((1..=31).contains(&wait), "{wait}");
        }
        answers.push(response.status().as_u16());
    }
    assert_eq!(answers, [200, 200, 200, 200, 429, 429], "twice the pace at once");
    body["region"] = json!("region-3");
    for _ in 0..20 {
        assert_eq!(
            node.post(REGISTER, &body).await.status(),
            200,
            "a heartbeat as it stands"
        );
    }
    let mut moved = other.registration();
    moved["region"] = json!("elsewhere");
    assert_eq!(other.post(REGISTER, &moved).await.status(), 200);
    // A stranger cannot use the node's changes up: only what it signed is counted.
    let stranger = TestNode::new(&pool.access, "node-b", 3).await;
    for number in 0..6 {
        moved["region"] = json!(format!("stranger-{number}"));
        assert_ne!(stranger.post(REGISTER, &moved).await.status(), 200);
    }
    moved["region"] = json!("again-elsewhere");
    assert_eq!(other.post(REGISTER, &moved).await.status(), 200);
}

#[tokio::test]
async fn a_standby_node_is_not_forgotten_however_silent() {
    let pool = TestPool::start(|_| {}).await;
    let node = TestNode::new(&pool.access, "node-s", 1).await;
    node.register().await;
    let (store, id) = (pool.store().await, "node-s".parse().unwrap());
    assert!(store.set_standby(&id, true).await.unwrap());
    let in_two_hours = jiff::Timestamp::now() + jiff::SignedDuration::from_hours(2);
    assert!(store.forget_silent_nodes(in_two_hours).await.unwrap().is_empty());
    assert!(store.standbys().await.unwrap().contains(&id));
    assert!(store.set_standby(&id, false).await.unwrap());
    assert_eq!(store.forget_silent_nodes(in_two_hours).await.unwrap(), [id]);
}

#[tokio::test]
async fn that_a_node_was_listed_is_stored_also_when_the_disk_fails_at_first() {
    let pool = TestPool::start(|_| {}).await;
    let url = format!("sqlite://{}", pool.database().display());
    let raw = sqlx::SqlitePool::connect(&url).await.unwrap();
    let failing = "CREATE TRIGGER failing BEFORE UPDATE OF listed ON node BEGIN SELECT RAISE(FAIL, 'disk'); END";
    sqlx::raw_sql(failing).execute(&raw).await.unwrap();
    let _node = TestNode::new(&pool.access, "node-a", 1).await.serve().await;
    let listed = || async {
        sqlx::query_scalar::<_, i64>("SELECT listed FROM node WHERE id = 'node-a'")
            .fetch_one(&raw)
            .await
            .unwrap()
    };
    // Each sweep takes the operator's standbys up, and then stores: once it took two changes up, it tried to.
    let (store, id) = (pool.store().await, "node-a".parse().unwrap());
    for (standby, list) in [(true, &[][..]), (false, &["node-a"])] {
        assert!(store.set_standby(&id, standby).await.unwrap());
        pool.access.wait_for_list(list).await;
    }
    assert_eq!(listed().await, 0);
    sqlx::raw_sql("DROP TRIGGER failing").execute(&raw).await.unwrap();
    tokio::time::timeout(DEADLINE, async {
        while listed().await == 0 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await
    .expect("it is stored by a later sweep");
}
