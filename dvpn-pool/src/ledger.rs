//! One writer for what clients change of nodes' peers. Whatever is asked while the disk is busy is committed together,
//! so a thousand approvals a second cost a few dozen waits for the disk; each is on it before anybody is told.

use std::{sync::Arc, time::Instant};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use dvpn_common::{
    approval::ApprovalFields,
    contract::{PeerAdded, PeerEntry, PeerReleased},
    ids::ProviderId,
    keys::PublicKey,
};
use tokio::sync::{mpsc, oneshot};

use crate::{
    live::{AckResult, NodeEvent},
    pool::Pool,
    refusal::Refusal,
    signing::Signer,
    store::{
        self, Acknowledged, Acknowledgement, ApprovalRow, ApproveOutcome, Batch, NewApproval, ReleaseOutcome, Removed,
        TokenHash,
    },
};

/// Changes that may wait; whoever comes later waits for a place.
const QUEUE: usize = 4096;
/// Most changes of one commit: a bound on how long the first one waits for the others.
const BATCH: usize = 256;

/// What to change.
enum Change {
    Approve(Box<NewApproval>),
    Acknowledge(Acknowledgement),
    Withdraw(u64),
    Release(Release),
}

impl Change {
    /// An acknowledgement of a token's only key.
    fn acknowledged_alone(&self) -> Option<&Acknowledgement> {
        match self {
            Self::Acknowledge(done) if !done.others => Some(done),
            Self::Acknowledge(_) | Self::Approve(_) | Self::Withdraw(_) | Self::Release(_) => None,
        }
    }
}

struct Release {
    node: ProviderId,
    key: PublicKey,
    token: TokenHash,
}

/// What was changed, before anybody is told.
enum Changed {
    Approve(ApproveOutcome),
    Acknowledge(Option<Acknowledged>),
    Withdraw(Vec<Removed>),
    Release(ReleaseOutcome),
}

/// The same, once nodes are told.
enum Told {
    Approve(ApproveOutcome, Option<oneshot::Receiver<AckResult>>),
    Acknowledge(Option<Given>),
    Withdraw,
    Release(ReleaseOutcome),
}

/// An approval as its client is given it.
pub struct Given {
    /// The signed bytes.
    pub approval: Vec<u8>,
    /// The signature over them.
    pub signature: [u8; 64],
    /// Who signed.
    pub signer: Arc<Signer>,
}

struct Job {
    change: Change,
    done: oneshot::Sender<Result<Told, store::Error>>,
}

/// Where changes are handed in.
#[derive(Clone)]
pub struct Ledger(mpsc::Sender<Job>);

/// The receiving end, until the writer starts.
pub struct Queue(mpsc::Receiver<Job>);

/// A ledger whose changes wait for [`write`].
pub fn open() -> (Ledger, Queue) {
    let (sender, receiver) = mpsc::channel(QUEUE);
    (Ledger(sender), Queue(receiver))
}

impl Ledger {
    /// Stores an approval and sends it to its node; the receiver tells what the node says.
    pub async fn approve(
        &self,
        wanted: NewApproval,
    ) -> Result<(ApproveOutcome, Option<oneshot::Receiver<AckResult>>), Refusal> {
        match self.hand_in(Change::Approve(Box::new(wanted))).await? {
            Told::Approve(outcome, answer) => Ok((outcome, answer)),
            Told::Acknowledge(_) | Told::Withdraw | Told::Release(_) => Err(stopping()),
        }
    }

    /// Stores an acknowledgement; nothing if the approval went meanwhile.
    pub async fn acknowledge(&self, done: Acknowledgement) -> Result<Option<Given>, Refusal> {
        match self.hand_in(Change::Acknowledge(done)).await? {
            Told::Acknowledge(given) => Ok(given),
            Told::Approve(..) | Told::Withdraw | Told::Release(_) => Err(stopping()),
        }
    }

    /// Takes one approval back.
    pub async fn withdraw(&self, serial: u64) -> Result<(), Refusal> {
        self.hand_in(Change::Withdraw(serial)).await.map(drop)
    }

    /// Notes that a connection is over.
    pub async fn release(&self, node: ProviderId, key: PublicKey, token: TokenHash) -> Result<ReleaseOutcome, Refusal> {
        match self.hand_in(Change::Release(Release { node, key, token })).await? {
            Told::Release(outcome) => Ok(outcome),
            Told::Approve(..) | Told::Acknowledge(_) | Told::Withdraw => Err(stopping()),
        }
    }

    async fn hand_in(&self, change: Change) -> Result<Told, Refusal> {
        let (done, answer) = oneshot::channel();
        self.0.send(Job { change, done }).await.map_err(|_closed| stopping())?;
        Ok(answer.await.map_err(|_closed| stopping())??)
    }
}

fn stopping() -> Refusal {
    Refusal::unavailable("the pool is stopping")
}

/// Writes until the last [`Ledger`] is gone or the task is ended.
pub async fn write(pool: Arc<Pool>, mut queue: Queue) {
    let mut jobs = Vec::with_capacity(BATCH);
    while queue.0.recv_many(&mut jobs, BATCH).await > 0 {
        let order = pool.changes.lock().await;
        match together(&pool, &jobs).await {
            Ok(changed) => {
                for (job, changed) in jobs.drain(..).zip(changed) {
                    answer(&pool, job, changed);
                }
            }
            // One that fails must not take the others with it.
            Err(error) => {
                tracing::warn!(%error, changes = jobs.len(), "a batch failed; each change is tried by itself");
                for job in jobs.drain(..) {
                    match together(&pool, std::slice::from_ref(&job)).await {
                        Ok(changed) => {
                            if let Some(changed) = changed.into_iter().next() {
                                answer(&pool, job, changed);
                            }
                        }
                        Err(error) => drop(job.done.send(Err(error))),
                    }
                }
            }
        }
        drop(order);
    }
}

async fn together(pool: &Pool, jobs: &[Job]) -> Result<Vec<Changed>, store::Error> {
    let mut batch = pool.store.batch().await?;
    // An acknowledgement that ends nothing has to do with no other change: all of them are one statement.
    let alone = jobs.iter().filter_map(|job| job.change.acknowledged_alone());
    let acknowledged = batch.acknowledge_alone(&alone.collect::<Vec<_>>()).await?;
    let mut acknowledged = acknowledged.into_iter();
    let wanted = jobs.iter().filter_map(|job| match &job.change {
        Change::Approve(wanted) => Some(&**wanted),
        Change::Acknowledge(_) | Change::Withdraw(_) | Change::Release(_) => None,
    });
    batch.read_ahead(&wanted.collect::<Vec<_>>()).await?;
    let mut changed = Vec::with_capacity(jobs.len());
    for job in jobs {
        changed.push(if job.change.acknowledged_alone().is_some() {
            Changed::Acknowledge(acknowledged.next().flatten())
        } else {
            apply(pool, &mut batch, &job.change).await?
        });
    }
    batch.commit().await?;
    Ok(changed)
}

async fn apply(pool: &Pool, batch: &mut Batch, change: &Change) -> Result<Changed, store::Error> {
    Ok(match change {
        Change::Approve(wanted) => Changed::Approve(
            batch
                .approve(wanted, |serial, host| sign(pool, wanted, serial, host))
                .await?,
        ),
        Change::Acknowledge(done) => Changed::Acknowledge(batch.acknowledge(done).await?),
        Change::Withdraw(serial) => Changed::Withdraw(batch.withdraw(*serial).await?),
        Change::Release(Release { node, key, token }) => {
            Changed::Release(batch.release(node.as_str(), key, token).await?)
        }
    })
}

fn sign(pool: &Pool, wanted: &NewApproval, serial: u64, host: u32) -> (Vec<u8>, [u8; 64]) {
    let signer = pool.signer();
    let key = signer.ring.current();
    let approval = ApprovalFields {
        pool_id: key.pool_id(),
        provider_id: wanted.node.id.clone(),
        provider_key: wanted.node.public_key,
        client_key: wanted.client_key,
        addresses: pool.networks(wanted.node.index).of_client(host),
        issued_at: wanted.now,
        expires_at: wanted.expires_at,
        serial,
    }
    .encode();
    let signature = key.sign(&approval);
    (approval, signature)
}

/// Tells the nodes, in the order of their sequence numbers, and then who asked.
fn answer(pool: &Pool, job: Job, changed: Changed) {
    let now = Instant::now();
    let told = match (changed, job.change) {
        (Changed::Approve(ApproveOutcome::Stored(mut row)), Change::Approve(wanted)) => {
            pool.announce_removed(std::mem::take(&mut row.removed));
            let added = NodeEvent::Add(PeerAdded {
                sequence: row.sequence,
                peer: entry(pool, &wanted, &row),
            });
            let answer = pool.live.expect_ack(&wanted.node.id, row.sequence, wanted.client_key);
            // Without a stream it waits all the same: a node that reconnects in time finds the peer in its snapshot.
            pool.live.send(&wanted.node.id, added, now);
            Told::Approve(ApproveOutcome::Stored(row), Some(answer))
        }
        (Changed::Approve(refused), _) => Told::Approve(refused, None),
        (Changed::Acknowledge(done), _) => Told::Acknowledge(done.map(|done| {
            pool.announce_removed(done.removed);
            Given {
                approval: done.approval,
                signature: done.signature,
                // With the order of changes held, the pool's key and those of all approvals change together.
                signer: pool.signer(),
            }
        })),
        (Changed::Withdraw(removed), _) => {
            pool.announce_removed(removed);
            Told::Withdraw
        }
        (Changed::Release(outcome), change) => {
            match (&outcome, change) {
                (ReleaseOutcome::Released(sequence), Change::Release(release)) => {
                    let released = PeerReleased {
                        sequence: *sequence,
                        public_key: release.key,
                    };
                    pool.live.send(&release.node, NodeEvent::Release(released), now);
                }
                (ReleaseOutcome::Removed(removed), _) => pool.announce_removed(vec![removed.clone()]),
                (ReleaseOutcome::Released(_) | ReleaseOutcome::Nothing | ReleaseOutcome::Foreign, _) => {}
            }
            Told::Release(outcome)
        }
    };
    // Who asked may have gone; what was changed stands.
    drop(job.done.send(Ok(told)));
}

fn entry(pool: &Pool, wanted: &NewApproval, row: &ApprovalRow) -> PeerEntry {
    PeerEntry {
        public_key: wanted.client_key,
        addresses: pool.networks(wanted.node.index).of_client(row.host),
        expires_at: wanted.expires_at,
        approval: STANDARD.encode(&row.approval),
        signature: STANDARD.encode(row.signature),
        renews: row.renews,
        released: false,
    }
}
