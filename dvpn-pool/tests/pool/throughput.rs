//! How many approvals a second one node takes, and how fast a node with thousands of clients comes back.
//!
//! `DVPN_BENCH_APPROVALS=N` approves N clients instead of a few hundred; the figures mean something in an optimised
//! build only (`cargo nextest run --cargo-profile lab -p dvpn-pool throughput --no-capture`).

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use dvpn_common::{
    contract::{ApproveRequest, ApproveResponse},
    keys::PublicKey,
};
use dvpn_pool::{
    signing::sha256,
    store::{ApproveOutcome, NewApproval, Store},
};
use futures::StreamExt as _;
use jiff::{SignedDuration, Timestamp};

use crate::{
    node::{Seen, TestNode, next},
    support::{Access, TestPool, client_key, proof},
};

/// Requests at one time.
const AT_ONCE: usize = 256;

/// A paid token, without the way through the payment service.
pub async fn paid_token(store: &Store, number: usize) -> String {
    let token = format!("dev_bench{number}");
    let now = Timestamp::now();
    let (user, id) = (format!("user-{number}"), format!("checkout-{number}"));
    let (user, id) = (user.parse().unwrap(), id.parse().unwrap());
    let amount = [u64::try_from(number).unwrap() + 1];
    let end = now + SignedDuration::from_hours(24 * 30);
    store.open_checkout(&user, &id, &amount, now, end).await.unwrap();
    assert!(store.pay_checkout(&id, now).await.unwrap());
    let hash = sha256(token.as_bytes());
    assert_eq!(store.mint_token(&id, &hash, end).await.unwrap(), Some(hash));
    token
}

async fn timed(access: &Access, request: ApproveRequest) -> (Duration, ApproveResponse) {
    let start = Instant::now();
    let answer = crate::support::granted(access.send_approve(&request).await).await;
    (start.elapsed(), answer)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_approval_of_many_at_once_is_lost() {
    let clients: usize = std::env::var("DVPN_BENCH_APPROVALS").map_or(300, |text| text.parse().unwrap());
    let pool = TestPool::start(|config| {
        // An unoptimised build on a busy machine takes its time; the figure is in what is printed.
        config.timing.ack_timeout = Duration::from_secs(10);
        config.limits.failures = 100_000;
    })
    .await;
    let node = TestNode::new(&pool.access, "node-a", 1).await.serve().await;
    let store = pool.store().await;
    let challenge = pool.access.challenge().await.public_key;
    let mut requests = Vec::with_capacity(clients);
    for number in 0..clients {
        let token = paid_token(&store, number).await;
        let key = client_key(u32::try_from(number).unwrap());
        requests.push(ApproveRequest {
            provider_id: "node-a".into(),
            proof: Some(proof("node-a", &token, key, challenge)),
            token,
            approved: true,
            client_public_key: Some(key),
            renews: None,
        });
    }
    let keys: BTreeSet<PublicKey> = requests
        .iter()
        .filter_map(|request| request.client_public_key)
        .collect();
    let start = Instant::now();
    let answers: Vec<_> = futures::stream::iter(requests)
        .map(|request| timed(&pool.access, request))
        .buffer_unordered(AT_ONCE)
        .collect()
        .await;
    let took = start.elapsed();
    let mut latencies: Vec<Duration> = answers.iter().map(|(latency, _)| *latency).collect();
    latencies.sort();
    println!(
        "{clients} approvals into one node, {AT_ONCE} at once: {:.0}/s, approve to acknowledgement p50 {:?}, p99 {:?}",
        f64::from(u32::try_from(clients).unwrap()) / took.as_secs_f64(),
        latencies[clients / 2],
        latencies[clients * 99 / 100],
    );
    let addresses: BTreeSet<_> = answers
        .iter()
        .flat_map(|(_, answer)| answer.addresses.clone().unwrap())
        .collect();
    assert_eq!(addresses.len(), clients * 2, "everybody has addresses of their own");
    assert_eq!(node.keys().into_iter().collect::<BTreeSet<_>>(), keys);
    let sequences: Vec<u64> = node.log.lock().unwrap().iter().map(Seen::sequence).collect();
    assert!(
        sequences.windows(2).all(|pair| pair[0] + 1 == pair[1]),
        "in order, without a gap"
    );
    let Seen::Snapshot(snapshot) = next(&mut node.node.open_stream().await).await else {
        panic!("a snapshot")
    };
    let stored: BTreeSet<_> = snapshot.peers.iter().map(|peer| peer.public_key).collect();
    assert_eq!(stored, keys);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_has_room_for_4096_clients_and_their_snapshot_is_quick() {
    const CLIENTS: usize = 4096;
    let pool = TestPool::start(|_| {}).await;
    let node = TestNode::new(&pool.access, "node-a", 1).await.serve().await;
    let store = pool.store().await;
    let registered = store.nodes().await.unwrap().remove(0);
    // Two keys a token, as many as one may hold.
    let mut tokens = Vec::with_capacity(CLIENTS / 2);
    for number in 0..CLIENTS / 2 {
        tokens.push(sha256(paid_token(&store, number).await.as_bytes()));
    }
    let now = Timestamp::now();
    let mut batch = store.batch().await.unwrap();
    for number in 0..CLIENTS {
        let wanted = NewApproval {
            token: tokens[number % tokens.len()],
            node: registered.clone(),
            client_key: client_key(u32::try_from(number).unwrap()),
            renews: None,
            now,
            expires_at: now + SignedDuration::from_hours(24),
            only_again: false,
        };
        let outcome = batch.approve(&wanted, |_, _| (vec![7; 300], [9; 64])).await.unwrap();
        assert!(
            matches!(&outcome, ApproveOutcome::Stored(row) if row.removed.is_empty()),
            "client {number}: {outcome:?}"
        );
    }
    batch.commit().await.unwrap();
    let start = Instant::now();
    let Seen::Snapshot(snapshot) = next(&mut node.node.open_stream().await).await else {
        panic!("a snapshot")
    };
    let took = start.elapsed();
    println!("a snapshot of {} peers in {took:?}", snapshot.peers.len());
    assert_eq!(snapshot.peers.len(), CLIENTS);
    let addresses: BTreeSet<_> = snapshot.peers.iter().flat_map(|peer| &peer.addresses).collect();
    assert_eq!(addresses.len(), CLIENTS * 2);
    // The figure is 0.3 s in an optimised build; an unoptimised one spends most of it in the test's own reading.
    assert!(
        took < Duration::from_secs(if cfg!(debug_assertions) { 10 } else { 1 }),
        "{took:?}"
    );
}
