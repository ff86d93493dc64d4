//! What the pool is still to hear of its changes: one slot, so that nothing has to wait in a row or be dropped from one.
//!
//! An acknowledgement covers everything up to its sequence number. Whom it does not name as refused counts as admitted,
//! so a refusal that was not told must stay in the slot, and the number must not be told before the last of them. What
//! does not fit into one body goes ahead under a number that was told before.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use dvpn_common::{
    contract::{Ack, RefusedPeer},
    keys::PublicKey,
    limits::{APPROVE_ACK_TIMEOUT, MAX_BODY_BYTES},
};
use tokio::sync::Notify;

use super::registration::with_sources;

/// Leaves room in a body for the number and for what surrounds the refusals.
const MAX_REFUSED_BYTES: usize = MAX_BODY_BYTES - 1024;
/// Longest reason that is told, in bytes of JSON.
const MAX_REASON_BYTES: usize = 512;
/// Refusals that wait at most. The pool waits for each of them for two seconds; beyond this many it has not listened for
/// hours, and the oldest is let go.
const MAX_REFUSED: usize = 16_384;
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// Longest time for one, after the first was not answered in time.
const LONGEST_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Default)]
struct Slot {
    /// Everything up to here is carried out; nothing before the first change.
    sequence: Option<u64>,
    /// The highest number that the pool took; nothing since a snapshot that begins anew.
    told: Option<u64>,
    /// Why whom not, with the number of the change that says so.
    refused: BTreeMap<PublicKey, (u64, String)>,
    /// Their order, with some that are gone.
    order: VecDeque<(u64, PublicKey)>,
    changes: u64,
}

/// What is to be told. Clones are the same.
#[derive(Clone, Default)]
pub(super) struct Acks(Arc<(Mutex<Slot>, Notify)>);

/// One body, and what it says.
struct Part {
    ack: Ack,
    /// The refusals in it, each with the number of its change.
    named: Vec<(PublicKey, u64)>,
    /// Nothing is left behind.
    last: bool,
}

impl Acks {
    /// A snapshot was carried out: what was to be said of the time before it says nothing any more.
    pub(super) fn snapshot(&self, sequence: u64, refused: Vec<RefusedPeer>) {
        self.change(|slot| {
            slot.sequence = Some(sequence);
            // It is acknowledged also if it says nothing new: a pool that was begun anew waits for that.
            slot.told = slot.told.filter(|told| *told < sequence);
            slot.refused.clear();
            slot.order.clear();
            for peer in refused {
                slot.refuse(peer);
            }
        });
    }

    /// A change of one client was carried out, or refused. The last word on a client holds.
    pub(super) fn one(&self, sequence: u64, client: &PublicKey, refused: Option<RefusedPeer>) {
        self.change(|slot| {
            slot.sequence = slot.sequence.max(Some(sequence));
            slot.refused.remove(client);
            if let Some(peer) = refused {
                slot.refuse(peer);
            }
        });
    }

    fn change(&self, change: impl FnOnce(&mut Slot)) {
        change(&mut self.slot());
        self.0.1.notify_one();
    }

    fn slot(&self) -> std::sync::MutexGuard<'_, Slot> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next body, if there is something to tell.
    fn next(&self) -> Option<Part> {
        let slot = self.slot();
        let sequence = slot.sequence?;
        if slot.told == Some(sequence) && slot.refused.is_empty() {
            return None;
        }
        let (mut bytes, mut named, mut refused) = (0, Vec::new(), Vec::new());
        for (public_key, (change, reason)) in &slot.refused {
            let peer = RefusedPeer {
                public_key: *public_key,
                reason: reason.clone(),
            };
            // One more for the comma.
            bytes += serde_json::to_vec(&peer).map_or(MAX_REFUSED_BYTES, |json| json.len() + 1);
            if bytes > MAX_REFUSED_BYTES {
                break;
            }
            named.push((*public_key, *change));
            refused.push(peer);
        }
        let last = refused.len() == slot.refused.len();
        let sequence = if last { sequence } else { slot.told.unwrap_or_default() };
        Some(Part {
            ack: Ack { sequence, refused },
            named,
            last,
        })
    }

    /// The pool took it. What changed meanwhile stays.
    fn taken(&self, part: &Part) {
        let mut slot = self.slot();
        for (client, change) in &part.named {
            if slot.refused.get(client).is_some_and(|(of, _)| of == change) {
                slot.refused.remove(client);
            }
        }
        if part.last && slot.sequence >= Some(part.ack.sequence) {
            slot.told = slot.told.max(Some(part.ack.sequence));
        }
    }
}

impl Slot {
    fn refuse(&mut self, peer: RefusedPeer) {
        self.changes += 1;
        self.order.push_back((self.changes, peer.public_key));
        self.refused
            .insert(peer.public_key, (self.changes, bounded(peer.reason)));
        while self.order.len() > MAX_REFUSED {
            let Some((change, client)) = self.order.pop_front() else {
                return;
            };
            if self.refused.get(&client).is_some_and(|(of, _)| *of == change) {
                self.refused.remove(&client);
            }
        }
    }
}

/// A character of a reason takes at most six bytes of JSON.
fn bounded(mut reason: String) -> String {
    reason.retain(|c| !c.is_control());
    reason.truncate(reason.floor_char_boundary(MAX_REASON_BYTES));
    reason
}

/// Tells the pool, until it has taken it, and again whenever there is more. Ends never.
pub(super) async fn tell<E, F>(acks: Acks, send: impl Fn(Ack) -> F)
where
    E: std::error::Error,
    F: Future<Output = Result<(), E>>,
{
    let mut failures = 0_u32;
    loop {
        let Some(part) = acks.next() else {
            acks.0.1.notified().await;
            continue;
        };
        let timeout = (APPROVE_ACK_TIMEOUT * (failures + 1).min(8)).min(LONGEST_TIMEOUT);
        let sequence = part.ack.sequence;
        match tokio::time::timeout(timeout, send(part.ack.clone())).await {
            Ok(Ok(())) => {
                failures = 0;
                acks.taken(&part);
                continue;
            }
            Ok(Err(error)) => tracing::info!("acknowledging {sequence}: {}", with_sources(&error)),
            Err(_elapsed) => tracing::info!("acknowledging {sequence}: no answer within {timeout:?}"),
        }
        // Doubled up to 2^6: beyond it the longest pause holds anyway.
        let pause = (FIRST_PAUSE * (1 << failures.min(6))).min(LONGEST_PAUSE);
        failures = failures.saturating_add(1);
        tokio::time::sleep(pause.mul_f64(rand::random_range(0.8..1.2))).await;
    }
}

#[cfg(test)]
mod tests;
