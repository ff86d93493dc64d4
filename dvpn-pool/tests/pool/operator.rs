//! What the operator does beside a running pool: revocation and key rotation. And the signature on the list.

use std::{
    io::Write as _,
    path::Path,
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use dvpn_common::{
    approval::ApprovalFields,
    contract::{ApproveResponse, KeyRotation, PeerEntry, ProviderEntry, ProviderList, RefusedPeer},
    directory::{rotation_bytes, signed_bytes},
    keys::VerifyingKey,
};
use dvpn_pool::signing::verify;
use jiff::Timestamp;
use serde_json::json;

use crate::{
    node::{Seen, ServingNode, TestNode, next},
    support::{Access, DEADLINE, TestPool, client_key, eventually, refusal},
};

fn operator(database: &Path, arguments: &[&str], input: &str) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_dvpn-pool"))
        .args(arguments)
        .env_clear()
        .env("DVPN_POOL_DATABASE", database)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A command that reads nothing may be gone already.
    drop(child.stdin.take().unwrap().write_all(input.as_bytes()));
    child.wait_with_output().unwrap()
}

struct SignedList {
    providers: Vec<ProviderEntry>,
    version: u64,
    expires_at: Timestamp,
    signature: Vec<u8>,
    pool_key: VerifyingKey,
    rotations: Vec<KeyRotation>,
}

impl SignedList {
    async fn fetch(access: &Access) -> Self {
        match access.get("/providers").await.json().await.unwrap() {
            ProviderList::Object {
                providers,
                version: Some(version),
                expires_at: Some(expires_at),
                signature: Some(signature),
                pool_key: Some(pool_key),
                rotations,
            } => Self {
                providers,
                version,
                expires_at,
                signature: STANDARD.decode(signature).unwrap(),
                pool_key,
                rotations,
            },
            ProviderList::Object { .. } | ProviderList::Bare(_) => panic!("our list is signed"),
        }
    }

    fn verifies(&self, key: &VerifyingKey) -> bool {
        verify(
            key,
            &signed_bytes(self.version, self.expires_at, &self.providers),
            &self.signature,
        )
    }
}

fn verifies(answer: &ApproveResponse, key: &VerifyingKey) -> bool {
    let bytes = STANDARD.decode(answer.approval.as_ref().unwrap()).unwrap();
    let id = ApprovalFields::decode(&bytes).unwrap().pool_id;
    assert_eq!(id, dvpn_pool::hex::encode(&key.as_bytes()[..16]));
    verify(
        key,
        &bytes,
        &STANDARD.decode(answer.signature.as_ref().unwrap()).unwrap(),
    )
}

#[tokio::test]
async fn the_list_is_signed_with_everything_in_it() {
    let pool = TestPool::start(|_| {}).await;
    let empty = SignedList::fetch(&pool.access).await;
    assert!(empty.verifies(&pool.key) && empty.pool_key == pool.key && empty.rotations.is_empty());
    let _node = TestNode::new(&pool.access, "node-a", 1).await.serve().await;
    let mut list = SignedList::fetch(&pool.access).await;
    assert!(list.verifies(&pool.key));
    assert_ne!(list.signature, empty.signature);
    let again = SignedList::fetch(&pool.access).await;
    assert_eq!(again.signature, list.signature, "signed once a version");
    list.providers[0].endpoint = "127.0.0.1:9".into();
    assert!(!list.verifies(&pool.key));
}

#[tokio::test]
async fn versions_grow_over_a_restart_whatever_was_used_before() {
    let mut pool = TestPool::start(|_| {}).await;
    let before = SignedList::fetch(&pool.access).await.version;
    pool.stop().await;
    // As after a run whose clock was a year ahead.
    let ahead = before + 365 * 24 * 3600 * 1000;
    pool.store().await.raise_list_version(ahead).await.unwrap();
    pool.start_again().await;
    assert!(SignedList::fetch(&pool.access).await.version > ahead);
}

#[tokio::test]
async fn a_revoked_token_is_over_within_a_second_and_stays_so() {
    let mut pool = TestPool::start(|_| {}).await;
    let node = TestNode::new(&pool.access, "node-a", 1).await.serve().await;
    let (token, other) = (pool.access.pay("user").await, pool.access.pay("other").await);
    pool.access.approved("node-a", &token, client_key(1)).await;
    pool.access.approved("node-a", &other, client_key(2)).await;
    let arguments = ["revoke", "--token-stdin", "--reason", "reported for abuse"];
    let done = operator(&pool.database(), &arguments, &format!("{token}\n"));
    let revoked = Instant::now();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    eventually(|| async { node.keys() == [client_key(2)] }).await;
    // The figure is one second; the rest is for a machine with other things to do.
    assert!(revoked.elapsed() < Duration::from_secs(5), "{:?}", revoked.elapsed());
    for _ in 0..2 {
        let verified = pool.access.verify(&token).await;
        assert!(
            verified.contains("\"active\":false") && verified.contains("reported for abuse"),
            "{verified}"
        );
        let (status, error) = refusal(pool.access.approve("node-a", &token, client_key(1)).await).await;
        assert_eq!(status, 403);
        assert!(
            error.contains("revoked") && error.contains("reported for abuse"),
            "{error}"
        );
        assert_eq!(pool.access.release("node-a", &token, client_key(1)).await.status(), 204);
        assert!(pool.access.verify(&other).await.contains("\"active\":true"));
        pool.restart().await;
    }
    let twice = operator(&pool.database(), &arguments, &token);
    assert_eq!(twice.status.code(), Some(1), "it was revoked before");
    assert_eq!(operator(&pool.database(), &["revoke"], "").status.code(), Some(2));
}

#[tokio::test]
async fn revoking_a_checkout_takes_its_token_used_or_not() {
    let pool = TestPool::start(|_| {}).await;
    let (fresh, unfetched) = (
        pool.access.start_checkout("fresh").await,
        pool.access.start_checkout("unfetched").await,
    );
    for checkout in [&fresh, &unfetched] {
        let path = format!("/payment/dev/pay/{}", checkout.session_id);
        assert_eq!(pool.access.post(&path, &json!({})).await.status(), 200);
    }
    let token = pool.access.checkout_status(&fresh).await.token.unwrap();
    for checkout in [&fresh, &unfetched] {
        let arguments = ["revoke", "--checkout", checkout.session_id.as_str()];
        assert!(operator(&pool.database(), &arguments, "").status.success());
        assert!(pool.access.checkout_status(checkout).await.token.is_none());
    }
    assert!(pool.access.verify(&token).await.contains("\"active\":false"));
    let nobody = operator(&pool.database(), &["revoke", "--checkout", "none"], "");
    assert_eq!(nobody.status.code(), Some(1));
}

#[tokio::test]
async fn a_rotated_key_signs_within_a_second_and_is_vouched_for() {
    let mut pool = TestPool::start(|_| {}).await;
    let node = TestNode::new(&pool.access, "node-a", 1).await.serve().await;
    let token = pool.access.pay("user").await;
    let waiting = pool.access.start_checkout("waiting").await;
    let before = SignedList::fetch(&pool.access).await;
    let prober = node.node.register().await.prober_key;
    assert!(verifies(
        &pool.access.approved("node-a", &token, client_key(1)).await,
        &pool.key
    ));
    for round in 1..=2 {
        let old = SignedList::fetch(&pool.access).await.pool_key;
        let done = operator(&pool.database(), &["rotate-key"], "");
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        eventually(|| async { SignedList::fetch(&pool.access).await.pool_key != old }).await;
        let list = SignedList::fetch(&pool.access).await;
        assert!(list.verifies(&list.pool_key) && !list.verifies(&old));
        assert!(list.version > before.version);
        assert_eq!(list.rotations.len(), round);
        // From the key pinned at first to the one of now, link by link.
        let mut known = pool.key;
        for rotation in &list.rotations {
            assert_eq!(rotation.from, known);
            let signature = STANDARD.decode(&rotation.signature).unwrap();
            assert!(verify(
                &known,
                &rotation_bytes(&rotation.from, &rotation.to),
                &signature
            ));
            known = rotation.to;
        }
        assert_eq!(known, list.pool_key);
        let answer = node.node.register().await;
        assert_eq!((answer.pool_key, answer.rotations.len()), (Some(known), round));
        assert_eq!(answer.prober_key, prober, "nodes need not learn another WireGuard key");
        let approval = pool.access.approved("node-a", &token, client_key(1)).await;
        assert!(verifies(&approval, &known));
        pool.restart().await;
        node.node.move_to(&pool.access);
        let node_again = node.node.open_stream().await;
        node.node.register_until_listed().await;
        assert_eq!(SignedList::fetch(&pool.access).await.pool_key, known);
        drop(node_again);
        node.follow().await;
    }
    // A checkout of before is still its holder's.
    let path = format!("/payment/dev/pay/{}", waiting.session_id);
    assert_eq!(pool.access.post(&path, &json!({})).await.status(), 200);
    let token = pool.access.checkout_status(&waiting).await.token.unwrap();
    assert!(pool.access.verify(&token).await.contains("\"active\":true"));
}

/// Whether `peer` is what `key` signed, for whom it says.
fn is_signed(peer: &PeerEntry, key: &VerifyingKey) -> bool {
    let answer = ApproveResponse {
        approval: Some(peer.approval.clone()),
        signature: Some(peer.signature.clone()),
        ..ApproveResponse::default()
    };
    verifies(&answer, key)
}

fn fields(peer: &PeerEntry) -> ApprovalFields {
    ApprovalFields::decode(&STANDARD.decode(&peer.approval).unwrap()).unwrap()
}

/// Has the operator change the key.
fn rotate(pool: &TestPool) {
    let done = operator(&pool.database(), &["rotate-key"], "");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
}

/// Follows the pool from the key pinned at first, link by link.
fn followed(from: VerifyingKey, rotations: &[KeyRotation]) -> VerifyingKey {
    rotations.iter().fold(from, |known, rotation| {
        let signature = STANDARD.decode(&rotation.signature).unwrap();
        let signed = verify(&known, &rotation_bytes(&rotation.from, &rotation.to), &signature);
        assert!(signed && rotation.from == known);
        rotation.to
    })
}

#[tokio::test]
async fn live_approvals_are_signed_again_on_the_open_stream_and_stay_what_they_were() {
    let mut pool = TestPool::start(|_| {}).await;
    let node = TestNode::new(&pool.access, "node-a", 1).await.serve().await;
    let idle = TestNode::new(&pool.access, "node-b", 2).await.serve().await;
    let (token, other) = (pool.access.pay("user").await, pool.access.pay("other").await);
    pool.access.approved("node-a", &token, client_key(1)).await;
    pool.access.approved("node-a", &other, client_key(2)).await;
    let before = [node.peer(client_key(1)).unwrap(), node.peer(client_key(2)).unwrap()];
    let events = node.log.lock().unwrap().len();
    rotate(&pool);
    let told = |node: &ServingNode| {
        let log = node.log.lock().unwrap();
        log.iter().rev().find_map(|event| match event {
            Seen::Snapshot(snapshot) => Some(snapshot.clone()),
            Seen::Add(_) | Seen::Remove(_) | Seen::Release(_) => None,
        })
    };
    eventually(|| async { told(&node).is_some() && told(&idle).is_some() }).await;
    let snapshot = told(&node).unwrap();
    let key = snapshot.pool_key.unwrap();
    assert_ne!(key, pool.key);
    assert_eq!(followed(pool.key, &snapshot.rotations), key);
    assert_eq!(
        told(&idle).unwrap().pool_key,
        Some(key),
        "a node without clients hears of it too"
    );
    assert_eq!(
        node.log.lock().unwrap().len(),
        events + 1,
        "one event on the stream there is"
    );
    let newest = before.iter().map(|peer| fields(peer).serial).max().unwrap();
    for old in &before {
        let now = node.peer(old.public_key).unwrap();
        assert!(is_signed(&now, &key) && !is_signed_by_old(&now, &pool.key));
        assert_eq!((&now.addresses, now.expires_at), (&old.addresses, old.expires_at));
        let (was, is) = (fields(old), fields(&now));
        assert!(is.serial > newest, "no replay: {} after {newest}", is.serial);
        assert_eq!((was.addresses, was.expires_at), (is.addresses, is.expires_at));
    }
    // A client goes on: its renewal says which key signed and how it came to that.
    let renewed = pool.access.renew("node-a", &token, client_key(3), client_key(1)).await;
    let renewed = crate::support::granted(renewed).await;
    assert_eq!(
        (renewed.pool_key, followed(pool.key, &renewed.rotations)),
        (Some(key), key)
    );
    assert!(verifies(&renewed, &key));
    assert_eq!(pool.access.release("node-a", &other, client_key(2)).await.status(), 204);

    // The same while nobody serves.
    pool.stop().await;
    rotate(&pool);
    pool.start_again().await;
    node.node.move_to(&pool.access);
    let Seen::Snapshot(later) = next(&mut node.node.open_stream().await).await else {
        panic!("a snapshot")
    };
    let latest = later.pool_key.unwrap();
    assert_eq!(
        (later.rotations.len(), followed(pool.key, &later.rotations)),
        (2, latest)
    );
    assert!(later.sequence > snapshot.sequence);
    assert_eq!(later.peers.len(), 3);
    assert!(later.peers.iter().all(|peer| is_signed(peer, &latest)));
    let released: Vec<_> = later.peers.iter().filter(|peer| peer.released).collect();
    assert_eq!(released.len(), 1, "what else is known of a peer stays");
}

fn is_signed_by_old(peer: &PeerEntry, key: &VerifyingKey) -> bool {
    verify(
        key,
        &STANDARD.decode(&peer.approval).unwrap(),
        &STANDARD.decode(&peer.signature).unwrap(),
    )
}

#[tokio::test]
async fn an_approval_under_way_while_the_key_changes_is_given_under_the_new_key() {
    let pool = TestPool::start(|config| config.timing.ack_timeout = DEADLINE).await;
    let (node, mut events) = TestNode::by_hand(&pool.access, "node-a", 1).await;
    let token = pool.access.pay("user").await;
    let approving = pool.access.approve("node-a", &token, client_key(1));
    let serving = async {
        let Seen::Add(added) = next(&mut events).await else {
            panic!("an approval")
        };
        assert!(is_signed(&added.peer, &pool.key));
        rotate(&pool);
        let Seen::Snapshot(snapshot) = next(&mut events).await else {
            panic!("a snapshot")
        };
        assert!(snapshot.sequence > added.sequence);
        // As of a node that had heard of the new key by its heartbeat before it came to the approval.
        let refused = RefusedPeer {
            public_key: client_key(1),
            reason: "the approval is not signed by this pool's key".into(),
        };
        node.ack(added.sequence, vec![refused]).await;
        node.ack(snapshot.sequence, Vec::new()).await;
        snapshot
    };
    let (answer, snapshot) = tokio::join!(approving, serving);
    let answer = crate::support::granted(answer).await;
    let key = snapshot.pool_key.unwrap();
    assert_eq!(answer.pool_key, Some(key));
    assert!(verifies(&answer, &key) && is_signed(&snapshot.peers[0], &key));
    assert_eq!(answer.approval.as_ref(), Some(&snapshot.peers[0].approval));
}
