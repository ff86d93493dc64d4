use std::{cell::RefCell, collections::BTreeSet};

use super::*;

fn key(number: u16) -> PublicKey {
    let mut bytes = [7; 32];
    bytes[..2].copy_from_slice(&number.to_be_bytes());
    PublicKey::from_bytes(bytes).unwrap()
}

fn refused(number: u16, reason: &str) -> RefusedPeer {
    RefusedPeer {
        public_key: key(number),
        reason: reason.to_owned(),
    }
}

/// A pool as far as acknowledgements go: who waits for which change, and what it was told.
#[derive(Default)]
struct Pool {
    waiting: BTreeMap<u64, PublicKey>,
    refused: BTreeMap<u64, String>,
    admitted: BTreeSet<u64>,
    bodies: Vec<usize>,
}

impl Pool {
    fn take(&mut self, ack: &Ack) {
        self.bodies.push(serde_json::to_vec(ack).unwrap().len());
        self.waiting.retain(|sequence, client| {
            let refused = ack.refused.iter().find(|peer| peer.public_key == *client);
            match refused {
                Some(peer) => drop(self.refused.insert(*sequence, peer.reason.clone())),
                None if *sequence <= ack.sequence => drop(self.admitted.insert(*sequence)),
                None => return true,
            }
            false
        });
    }
}

#[derive(Debug, thiserror::Error)]
#[error("busy")]
struct Busy;

/// Tells this pool, that takes only every so many, until nothing is left to be told.
async fn told_to(pool: &RefCell<Pool>, acks: &Acks, every: u32) {
    let asked = RefCell::new(0_u32);
    let telling = tell(acks.clone(), |ack| {
        *asked.borrow_mut() += 1;
        if !asked.borrow().is_multiple_of(every) {
            return std::future::ready(Err(Busy));
        }
        pool.borrow_mut().take(&ack);
        std::future::ready(Ok(()))
    });
    let all = async {
        while acks.next().is_some() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::select! {
        () = telling => {}
        told = tokio::time::timeout(Duration::from_mins(1), all) => told.unwrap(),
    }
}

#[tokio::test]
async fn every_refusal_of_a_thousand_changes_is_told_in_small_bodies_by_a_pool_that_mostly_fails() {
    let (acks, pool) = (Acks::default(), RefCell::new(Pool::default()));
    acks.snapshot(10, Vec::new());
    for number in 0..1000 {
        let sequence = 11 + u64::from(number);
        pool.borrow_mut().waiting.insert(sequence, key(number));
        let reason = "\"quoted\" ".repeat(number.into());
        let bad = (number % 3 == 0).then(|| refused(number, &reason));
        acks.one(sequence, &key(number), bad);
    }
    told_to(&pool, &acks, 2).await;
    let pool = pool.borrow();
    assert!(pool.waiting.is_empty());
    assert_eq!((pool.refused.len(), pool.admitted.len()), (334, 666));
    assert!(
        pool.refused.keys().all(|sequence| (sequence - 11) % 3 == 0),
        "whom it says"
    );
    assert!(
        pool.bodies.len() > 2 && pool.bodies.iter().all(|bytes| *bytes < MAX_BODY_BYTES),
        "{:?}",
        pool.bodies
    );
}

#[tokio::test]
async fn the_last_word_on_a_client_holds_and_a_snapshot_takes_all_earlier_ones_back() {
    let (acks, pool) = (Acks::default(), RefCell::new(Pool::default()));
    acks.one(1, &key(1), Some(refused(1, "full")));
    acks.one(2, &key(2), Some(refused(2, "full")));
    acks.one(3, &key(1), None);
    acks.snapshot(4, vec![refused(3, "late")]);
    pool.borrow_mut()
        .waiting
        .extend([(3, key(1)), (4, key(3)), (5, key(4))]);
    told_to(&pool, &acks, 1).await;
    {
        let pool = pool.borrow();
        assert_eq!(pool.refused, [(4, "late".to_owned())].into());
        assert_eq!(pool.admitted, [3].into());
        assert_eq!(pool.bodies.len(), 1, "one says it all");
    }
    // A pool that lost its numbers begins anew with a snapshot.
    acks.snapshot(2, Vec::new());
    let part = acks.next().expect("also a lower number is told");
    assert_eq!(part.ack.sequence, 2);
}

#[tokio::test]
async fn what_changes_while_a_body_is_on_its_way_is_told_afterwards() {
    let acks = Acks::default();
    acks.one(1, &key(1), Some(refused(1, "early")));
    let part = acks.next().unwrap();
    acks.one(2, &key(1), Some(refused(1, "again")));
    acks.taken(&part);
    let part = acks.next().unwrap();
    assert_eq!((part.ack.sequence, part.ack.refused[0].reason.as_str()), (2, "again"));
    acks.taken(&part);
    assert!(acks.next().is_none());
    acks.snapshot(2, Vec::new());
    assert!(
        acks.next().is_some(),
        "a snapshot is acknowledged, also at the same number"
    );
}

#[test]
fn the_slot_is_bounded() {
    let acks = Acks::default();
    for round in 0..3 {
        for number in 0..20_000 {
            acks.one(
                round * 20_000 + u64::from(number),
                &key(number),
                Some(refused(number, "full")),
            );
        }
    }
    let slot = acks.slot();
    assert!(slot.refused.len() <= MAX_REFUSED && slot.order.len() <= MAX_REFUSED);
}
