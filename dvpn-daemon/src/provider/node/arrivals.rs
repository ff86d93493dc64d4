//! What the pool's stream brings, carried out and acknowledged.

use std::time::Instant;

use dvpn_common::{
    contract::RefusedPeer,
    keys::{PublicKey, VerifyingKey},
};

use super::{Error, Node, now};
use crate::provider::{pool::PoolEvent, status::Event, stream::Arrival};

/// A change of one client: its number, whose it is, and why it was refused.
type Change = (u64, PublicKey, Option<RefusedPeer>);

impl Node<'_> {
    /// Takes what has arrived. Changes that follow each other are carried out together: with thousands of peers a look at
    /// the device, and a write to the disk, for each of them would fall behind the pool.
    pub(super) async fn arrived(&mut self, arrived: Vec<Arrival>, mut pool_key: VerifyingKey) -> Result<(), Error> {
        let mut changes = Vec::new();
        for arrival in arrived {
            match arrival {
                Arrival::Connected => self.config.status.send_modify(|status| status.connected = true),
                Arrival::Lost(problem) => self.config.status.send_modify(|status| {
                    status.connected = false;
                    status.problem = Some(problem);
                }),
                Arrival::Event(PoolEvent::Snapshot(snapshot)) => {
                    self.carry_out_changes(std::mem::take(&mut changes)).await?;
                    match self.follow_key(&snapshot, pool_key) {
                        Ok(followed) => {
                            pool_key = followed;
                            self.replace(&snapshot, pool_key).await?;
                        }
                        Err(reason) => self.keep_only(&snapshot, &reason).await?,
                    }
                }
                Arrival::Event(PoolEvent::Added(added)) => {
                    let ground = self.ground(pool_key);
                    let refused = self.roster.add(&added.peer, &ground, now()).err();
                    changes.push((added.sequence, added.peer.public_key, refused));
                }
                Arrival::Event(PoolEvent::Removed(removed)) => {
                    self.roster.remove(&removed.public_key);
                    changes.push((removed.sequence, removed.public_key, None));
                }
                Arrival::Event(PoolEvent::Released(released)) => {
                    self.roster.release(&released.public_key, Instant::now());
                    self.report_soon();
                    if let Some(peer) = self.numbers.known(&released.public_key) {
                        (self.config.audit)(Event::PeerReleased { peer });
                    }
                    changes.push((released.sequence, released.public_key, None));
                }
            }
        }
        self.carry_out_changes(changes).await
    }

    async fn carry_out_changes(&mut self, changes: Vec<Change>) -> Result<(), Error> {
        if changes.is_empty() {
            return Ok(());
        }
        let refused: Vec<RefusedPeer> = changes.iter().filter_map(|(_, _, refused)| refused.clone()).collect();
        self.settle(&refused).await?;
        for (sequence, client, refused) in changes {
            self.acks.one(sequence, &client, refused);
        }
        Ok(())
    }

    /// Carries out what was decided, before the pool hears of it.
    pub(super) async fn settle(&mut self, refused: &[RefusedPeer]) -> Result<(), Error> {
        // Before anybody is a peer by them: a crash must not forget what they replaced.
        if let Some(change) = self.roster.changed_serials()
            && !self.keeper.serials(change).await
        {
            self.roster.serials_not_kept();
        }
        self.reconcile().await?;
        for peer in refused {
            tracing::warn!("a client was refused: {}", peer.reason);
            (self.config.audit)(Event::PeerRefused {
                reason: peer.reason.clone(),
            });
        }
        Ok(())
    }
}
