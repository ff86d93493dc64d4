//! Changes that are committed together are decided as if each came by itself.

use std::collections::HashMap;

use dvpn_common::keys::{PublicKey, VerifyingKey};
use dvpn_pool::{
    signing::sha256,
    store::{
        Acknowledgement, ApprovalRow, ApproveOutcome, Batch, NewApproval, Node, RegisterOutcome, Removed, Store,
        TokenHash,
    },
};
use jiff::{SignedDuration, Timestamp};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

use crate::{support::client_key, throughput::paid_token};

const TOKENS: usize = 4;
const KEYS: u32 = 6;
const BATCHES: u32 = 10;
const CHANGES: u32 = 12;

/// One change, by the numbers of tokens, nodes and keys.
#[derive(Debug, Clone, Copy)]
enum Op {
    Approve {
        token: usize,
        node: usize,
        key: u32,
        /// The token's last key, wherever that is.
        renews: bool,
        seconds: i64,
    },
    /// Of the token's last approval.
    Acknowledge(usize),
    Withdraw(usize),
    Release {
        token: usize,
        node: usize,
        key: u32,
    },
}

fn any_op(random: &mut StdRng) -> Op {
    let (token, node) = (random.random_range(0..TOKENS), random.random_range(0..2));
    let key = random.random_range(0..KEYS);
    match random.random_range(0..10) {
        0..=4 => Op::Approve {
            token,
            node,
            key,
            renews: random.random_bool(0.4),
            seconds: if random.random_bool(0.3) { 50 } else { 10_000 },
        },
        5..=7 => Op::Acknowledge(token),
        8 => Op::Withdraw(token),
        _ => Op::Release { token, node, key },
    }
}

/// A database with two nodes, one of them with little room, and what was done to it.
struct Ledger {
    store: Store,
    nodes: Vec<Node>,
    tokens: Vec<TokenHash>,
    last: HashMap<usize, (NewApproval, ApprovalRow)>,
    said: Vec<String>,
    _directory: tempfile::TempDir,
}

fn start() -> Timestamp {
    Timestamp::from_second(1_800_000_000).unwrap()
}

fn removed(removed: &[Removed]) -> String {
    let each = removed
        .iter()
        .map(|gone| format!("{}@{}#{}", gone.client_key, gone.node, gone.sequence));
    each.collect::<Vec<_>>().join(" ")
}

impl Ledger {
    async fn open() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(&directory.path().join("pool.sqlite")).await.unwrap();
        let mut nodes = Vec::new();
        for number in 0..2_u8 {
            let wanted = Node {
                id: format!("node-{number}").parse().unwrap(),
                index: 0,
                identity: VerifyingKey::from_bytes([number + 1; 32]).unwrap(),
                public_key: PublicKey::from_bytes([number + 1; 32]).unwrap(),
                endpoint: "192.0.2.1:51820".parse().unwrap(),
                probe: None,
                region: None,
                approved: true,
                draining: false,
                max_peers: (number == 1).then_some(2),
            };
            let RegisterOutcome::Stored { node, .. } = store.register(&wanted, start()).await.unwrap() else {
                panic!("a new node")
            };
            nodes.push(*node);
        }
        let mut tokens = Vec::new();
        for number in 0..TOKENS {
            tokens.push(sha256(paid_token(&store, number).await.as_bytes()));
        }
        Self {
            store,
            nodes,
            tokens,
            last: HashMap::new(),
            said: Vec::new(),
            _directory: directory,
        }
    }

    fn wanted(&self, op: Op, now: Timestamp) -> Option<NewApproval> {
        let Op::Approve {
            token,
            node,
            key,
            renews,
            seconds,
        } = op
        else {
            return None;
        };
        Some(NewApproval {
            token: self.tokens[token],
            node: self.nodes[node].clone(),
            client_key: client_key(key),
            renews: self
                .last
                .get(&token)
                .map(|(before, _)| before.client_key)
                .filter(|old| renews && *old != client_key(key)),
            now,
            expires_at: now + SignedDuration::from_secs(seconds),
            only_again: false,
        })
    }

    async fn carry_out(&mut self, batch: &mut Batch, op: Op, now: Timestamp) {
        let said = match op {
            Op::Approve { token, .. } => {
                let wanted = self.wanted(op, now).unwrap();
                match batch
                    .approve(&wanted, |_, host| (host.to_be_bytes().into(), [9; 64]))
                    .await
                    .unwrap()
                {
                    ApproveOutcome::Stored(row) => {
                        let said = format!(
                            "host {} at {}, renews {:?}, again {}, others {}, gone {}",
                            row.host,
                            row.sequence,
                            row.renews,
                            row.again,
                            row.others,
                            removed(&row.removed)
                        );
                        self.last.insert(token, (wanted, *row));
                        said
                    }
                    refused @ (ApproveOutcome::KeyTaken
                    | ApproveOutcome::NodeFull
                    | ApproveOutcome::NodeDraining
                    | ApproveOutcome::NothingToRenew
                    | ApproveOutcome::RenewalPending
                    | ApproveOutcome::Superseded
                    | ApproveOutcome::NotThere) => format!("{refused:?}"),
                }
            }
            Op::Acknowledge(token) => {
                let Some((wanted, row)) = self.last.get(&token) else {
                    return;
                };
                let done = Acknowledgement {
                    token: wanted.token,
                    serial: row.serial,
                    supersedes: wanted.renews.and(row.renews).map(|old| (old, now)),
                    others: row.others,
                    first_use: true,
                };
                match batch.acknowledge(&done).await.unwrap() {
                    Some(done) => format!("acknowledged, gone {}", removed(&done.removed)),
                    None => "nothing to acknowledge".to_owned(),
                }
            }
            Op::Withdraw(token) => {
                let Some((_, row)) = self.last.remove(&token) else {
                    return;
                };
                format!("withdrawn {}", removed(&batch.withdraw(row.serial).await.unwrap()))
            }
            Op::Release { token, node, key } => {
                let node = self.nodes[node].id.as_str();
                let outcome = batch
                    .release(node, &client_key(key), &self.tokens[token])
                    .await
                    .unwrap();
                format!("{outcome:?}")
            }
        };
        self.said.push(format!("{op:?}: {said}"));
    }

    /// What stands at the end.
    async fn peers(&self, now: Timestamp) -> Vec<String> {
        let mut peers = Vec::new();
        for node in &self.nodes {
            let (sequence, entries) = self.store.peers(node, now, |_| Vec::new()).await.unwrap();
            peers.push(format!("{sequence}"));
            peers.extend(entries.iter().map(|entry| {
                format!(
                    "{} {} {:?} {}",
                    entry.public_key, entry.approval, entry.renews, entry.released
                )
            }));
        }
        peers
    }
}

#[tokio::test]
async fn changes_of_one_batch_are_decided_as_one_after_the_other() {
    let mut all = Vec::new();
    for seed in 0..8 {
        let mut random = StdRng::seed_from_u64(seed);
        let (mut together, mut alone) = (Ledger::open().await, Ledger::open().await);
        for number in 0..BATCHES {
            let now = start() + SignedDuration::from_secs(i64::from(number) * 20);
            let ops: Vec<Op> = (0..CHANGES).map(|_| any_op(&mut random)).collect();
            let wanted: Vec<NewApproval> = ops.iter().filter_map(|op| together.wanted(*op, now)).collect();
            let mut batch = together.store.batch().await.unwrap();
            batch.read_ahead(&wanted.iter().collect::<Vec<_>>()).await.unwrap();
            for op in &ops {
                together.carry_out(&mut batch, *op, now).await;
            }
            batch.commit().await.unwrap();
            for op in &ops {
                let mut batch = alone.store.batch().await.unwrap();
                alone.carry_out(&mut batch, *op, now).await;
                batch.commit().await.unwrap();
            }
            assert_eq!(together.said, alone.said, "seed {seed}");
            assert_eq!(together.peers(now).await, alone.peers(now).await, "seed {seed}");
        }
        all.append(&mut together.said);
    }
    for kind in ["host", "KeyTaken", "NodeFull", "NothingToRenew", "renews Some"] {
        assert!(all.iter().any(|said| said.contains(kind)), "no {kind}");
    }
}

#[tokio::test]
async fn acknowledgements_together_say_of_each_whether_it_was_there() {
    let mut ledger = Ledger::open().await;
    let now = start();
    let mut batch = ledger.store.batch().await.unwrap();
    for token in 0..3 {
        let key = u32::try_from(token).unwrap();
        let op = Op::Approve {
            token,
            node: 0,
            key,
            renews: false,
            seconds: 50,
        };
        ledger.carry_out(&mut batch, op, now).await;
    }
    batch.commit().await.unwrap();
    let done: Vec<Acknowledgement> = [0, 1, 2]
        .map(|token| {
            let (wanted, row) = &ledger.last[&token];
            Acknowledgement {
                token: wanted.token,
                serial: row.serial,
                supersedes: None,
                others: false,
                first_use: token != 2,
            }
        })
        .into();
    let mut batch = ledger.store.batch().await.unwrap();
    batch.withdraw(done[1].serial).await.unwrap();
    let given = batch.acknowledge_alone(&done.iter().collect::<Vec<_>>()).await.unwrap();
    batch.commit().await.unwrap();
    let bytes: Vec<_> = given
        .iter()
        .map(|given| given.as_ref().map(|given| given.approval.clone()))
        .collect();
    let host = |token| Some(ledger.last[&token].1.host.to_be_bytes().to_vec());
    assert_eq!(bytes, [host(0), None, host(2)]);
    for (token, used) in [(0, true), (1, false), (2, false)] {
        let known = ledger.store.token(&ledger.tokens[token]).await.unwrap().unwrap();
        assert_eq!(known.used, used, "token {token}");
    }
    // None of the two is withdrawn by the next start.
    assert_eq!(ledger.store.remove_unacknowledged().await.unwrap(), 0);
    let (_, peers) = ledger.store.peers(&ledger.nodes[0], now, |_| Vec::new()).await.unwrap();
    assert_eq!(peers.len(), 2);
}
