//! The changes of a node's peers that clients ask for, many of them in one transaction: [`crate::ledger`] commits them
//! together, so that the disk is waited for once a batch. Every change of a node's peers raises its sequence number in
//! the same transaction, so the number grows across restarts and never stands for two states.

use std::ops::Range;

use dvpn_common::keys::PublicKey;
use sqlx::{FromRow, Sqlite, Transaction};

use super::{
    Acknowledged, Acknowledgement, ApprovalRow, ApproveOutcome, Error, NewApproval, Node, ReleaseOutcome, Removed,
    Store, TokenHash, commit,
    plan::{Held, OwnerRow, plan},
    public_key, query,
};
use crate::network::{FIRST_HOST, HOSTS};

#[derive(FromRow)]
struct Room {
    last_host: i64,
    peers: i64,
    taken: bool,
}

/// Serials that are taken from the counter at one time. Those that a batch does not use are never used: they grow, and
/// need not follow one another.
const SERIALS: i64 = 64;

/// A transaction under way. Every statement costs two hand-overs between threads, several times its own work: what can be
/// one is one.
pub struct Batch {
    change: Transaction<'static, Sqlite>,
    /// Taken from the counter and not used yet.
    serials: Range<i64>,
}

impl Store {
    /// Begins a batch of changes. Dropped without [`Batch::commit`] it changes nothing.
    pub async fn batch(&self) -> Result<Batch, Error> {
        Ok(Batch {
            change: self.begin().await?,
            serials: 0..0,
        })
    }
}

impl Batch {
    /// Puts everything on the disk.
    pub async fn commit(self) -> Result<(), Error> {
        commit(self.change).await
    }

    /// Stores an approval with its serial, its address and the node's next sequence number. `sign` makes the bytes and
    /// their signature from the serial and the host number.
    pub async fn approve(
        &mut self,
        wanted: &NewApproval,
        sign: impl FnOnce(u64, u32) -> (Vec<u8>, [u8; 64]),
    ) -> Result<ApproveOutcome, Error> {
        let held = self.held(wanted).await?;
        let plan = match plan(&held, wanted) {
            Ok(plan) => plan,
            Err(refused) => return Ok(refused),
        };
        // Every refusal comes before the first change: the batch goes on without this one.
        let node = wanted.node.id.as_str();
        let host = match plan.host {
            Some(host) => u32::try_from(host).ok().ok_or(Error::Corrupt("host number"))?,
            None if wanted.node.draining => return Ok(ApproveOutcome::NodeDraining),
            None => match self.free_host(&wanted.node, plan.ours_here).await? {
                Some(host) => host,
                None => return Ok(ApproveOutcome::NodeFull),
            },
        };
        let removed = remove(&mut self.change, plan.evicted.into_iter().map(Held::owner).collect()).await?;
        if let Some(before) = plan.replaced {
            sqlx::query("DELETE FROM approval WHERE serial = ?")
                .bind(before)
                .execute(&mut *self.change)
                .await
                .map_err(query("replace an approval"))?;
        }
        let serial = self.next_serial().await?;
        let serial_number = u64::try_from(serial).ok().ok_or(Error::Corrupt("serial"))?;
        let (approval, signature) = sign(serial_number, host);
        let sequence: i64 = sqlx::query_scalar(
            "INSERT INTO approval \
             (serial, token_hash, node_id, client_key, host, expires_at, approval, signature, renews, acknowledged) \
             VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?); \
             UPDATE node SET sequence = sequence + 1, last_host = CASE WHEN ? THEN ? ELSE last_host END \
             WHERE id = ? RETURNING sequence",
        )
        .bind(serial)
        .bind(wanted.token.as_slice())
        .bind(node)
        .bind(wanted.client_key.as_bytes().as_slice())
        .bind(i64::from(host))
        .bind(wanted.expires_at.as_second())
        .bind(approval.as_slice())
        .bind(signature.as_slice())
        .bind(plan.renews.as_ref().map(|key| key.as_bytes().as_slice()))
        .bind(plan.acknowledged)
        .bind(plan.host.is_none())
        .bind(i64::from(host))
        .bind(node)
        .fetch_one(&mut *self.change)
        .await
        .map_err(query("store an approval"))?;
        Ok(ApproveOutcome::Stored(Box::new(ApprovalRow {
            serial: serial_number,
            sequence: u64::try_from(sequence).ok().ok_or(Error::Corrupt("sequence number"))?,
            host,
            approval,
            signature,
            renews: plan.renews,
            again: plan.replaced.is_some() && plan.host.is_some(),
            others: plan.others,
            removed,
        })))
    }

    async fn next_serial(&mut self) -> Result<i64, Error> {
        if self.serials.is_empty() {
            let last: i64 =
                sqlx::query_scalar("UPDATE counter SET value = value + ? WHERE name = 'serial' RETURNING value")
                    .bind(SERIALS)
                    .fetch_one(&mut *self.change)
                    .await
                    .map_err(query("count approvals"))?;
            self.serials = last + 1 - SERIALS..last + 1;
        }
        self.serials.next().ok_or(Error::Corrupt("serial"))
    }

    /// The keys of the token, and whoever else has this key.
    async fn held(&mut self, wanted: &NewApproval) -> Result<Vec<Held>, Error> {
        sqlx::query_as(
            "SELECT serial, node_id, client_key, host, token_hash = ?1 AS ours, expires_at > ?2 AS live, acknowledged, \
             renews, remove_at IS NOT NULL AS superseded \
             FROM approval WHERE client_key = ?3 OR token_hash = ?1 ORDER BY serial",
        )
        .bind(wanted.token.as_slice())
        .bind(wanted.now.as_second())
        .bind(wanted.client_key.as_bytes().as_slice())
        .fetch_all(&mut *self.change)
        .await
        .map_err(query("read the approvals of a token"))
    }

    /// The next free host after the last one given, wrapping: an address rests as long as possible, because the
    /// provider's connection tracking may still hold flows of its previous owner. `ours` clients of the node are the
    /// asking token's own and make room for it.
    async fn free_host(&mut self, node: &Node, ours: i64) -> Result<Option<u32>, Error> {
        let room: Room = sqlx::query_as(
            "SELECT last_host, peers, EXISTS (SELECT 1 FROM approval WHERE node_id = node.id AND renews IS NULL \
             AND host = ?2 + (last_host - ?2 + 1) % ?3) AS taken FROM node WHERE id = ?1",
        )
        .bind(node.id.as_str())
        .bind(i64::from(FIRST_HOST))
        .bind(i64::from(HOSTS))
        .fetch_one(&mut *self.change)
        .await
        .map_err(query("read the room of a node"))?;
        let others = room.peers.saturating_sub(ours);
        if others >= i64::from(node.max_peers.unwrap_or(HOSTS).min(HOSTS)) || room.peers >= i64::from(HOSTS) {
            return Ok(None);
        }
        let last = u32::try_from(room.last_host)
            .ok()
            .ok_or(Error::Corrupt("host number"))?;
        let next = FIRST_HOST + (last.saturating_sub(FIRST_HOST) + 1) % HOSTS;
        if !room.taken {
            return Ok(Some(next));
        }
        // After a run of used hosts: its end, first above the last one given, then from the beginning.
        for from in [next, FIRST_HOST] {
            let gap: Option<i64> = sqlx::query_scalar(
                "SELECT host + 1 FROM approval AS used WHERE node_id = ?1 AND renews IS NULL AND host >= ?2 AND host < ?3 \
                 AND NOT EXISTS (SELECT 1 FROM approval WHERE node_id = ?1 AND renews IS NULL AND host = used.host + 1) \
                 ORDER BY host LIMIT 1",
            )
            .bind(node.id.as_str())
            .bind(i64::from(from))
            .bind(i64::from(FIRST_HOST + HOSTS - 1))
            .fetch_optional(&mut *self.change)
            .await
            .map_err(query("look for a free address"))?;
            if let Some(host) = gap {
                return u32::try_from(host).map(Some).ok().ok_or(Error::Corrupt("host number"));
            }
            let first: Option<i64> =
                sqlx::query_scalar("SELECT 1 FROM approval WHERE node_id = ? AND renews IS NULL AND host = ?")
                    .bind(node.id.as_str())
                    .bind(i64::from(FIRST_HOST))
                    .fetch_optional(&mut *self.change)
                    .await
                    .map_err(query("look for a free address"))?;
            if first.is_none() {
                return Ok(Some(FIRST_HOST));
            }
        }
        Ok(None)
    }

    /// Marks an approval as acknowledged by its node, and ends the other approvals of its token: the one it renews in
    /// a while, the others now. Nothing if the approval went meanwhile.
    pub async fn acknowledge(&mut self, done: &Acknowledgement) -> Result<Option<Acknowledged>, Error> {
        let serial = number(done.serial)?;
        let marked: Option<(Vec<u8>, Vec<u8>)> = if done.first_use {
            sqlx::query_as(
                "UPDATE token SET used = 1 WHERE hash = ? AND EXISTS (SELECT 1 FROM approval WHERE serial = ?); \
                 UPDATE approval SET acknowledged = 1 WHERE serial = ? RETURNING approval, signature",
            )
            .bind(done.token.as_slice())
            .bind(serial)
        } else {
            sqlx::query_as("UPDATE approval SET acknowledged = 1 WHERE serial = ? RETURNING approval, signature")
        }
        .bind(serial)
        .fetch_optional(&mut *self.change)
        .await
        .map_err(query("acknowledge an approval"))?;
        let Some((approval, signature)) = marked else {
            return Ok(None);
        };
        let signature = <[u8; 64]>::try_from(signature).map_err(|_length| Error::Corrupt("signature"))?;
        let acknowledged = |removed| {
            Some(Acknowledged {
                approval,
                signature,
                removed,
            })
        };
        if !done.others {
            return Ok(acknowledged(Vec::new()));
        }
        let mut others: Vec<OwnerRow> = sqlx::query_as(
            "SELECT serial, node_id, client_key FROM approval WHERE token_hash = ? AND serial <> ? ORDER BY serial",
        )
        .bind(done.token.as_slice())
        .bind(serial)
        .fetch_all(&mut *self.change)
        .await
        .map_err(query("read the approvals of a token"))?;
        if let Some((key, until)) = &done.supersedes
            && let Some(at) = others.iter().position(|row| row.client_key == key.as_bytes())
        {
            let renewed = others.swap_remove(at);
            sqlx::query("UPDATE approval SET remove_at = ? WHERE serial = ? AND remove_at IS NULL")
                .bind(until.as_second())
                .bind(renewed.serial)
                .execute(&mut *self.change)
                .await
                .map_err(query("supersede an approval"))?;
        }
        remove(&mut self.change, others).await.map(acknowledged)
    }

    /// Takes one approval back.
    pub async fn withdraw(&mut self, serial: u64) -> Result<Vec<Removed>, Error> {
        let rows = sqlx::query_as("SELECT serial, node_id, client_key FROM approval WHERE serial = ?")
            .bind(number(serial)?)
            .fetch_all(&mut *self.change)
            .await
            .map_err(query("read an approval"))?;
        remove(&mut self.change, rows).await
    }

    /// Marks one key's connection as over.
    pub async fn release(&mut self, node: &str, key: &PublicKey, token: &TokenHash) -> Result<ReleaseOutcome, Error> {
        let row: Option<(i64, bool, bool, bool)> = sqlx::query_as(
            "SELECT serial, token_hash = ?, remove_at IS NOT NULL, released FROM approval \
             WHERE node_id = ? AND client_key = ?",
        )
        .bind(token.as_slice())
        .bind(node)
        .bind(key.as_bytes().as_slice())
        .fetch_optional(&mut *self.change)
        .await
        .map_err(query("look a client key up"))?;
        match row {
            None | Some((_, true, false, true)) => Ok(ReleaseOutcome::Nothing),
            Some((_, false, ..)) => Ok(ReleaseOutcome::Foreign),
            Some((serial, true, true, _)) => {
                let owner = OwnerRow {
                    serial,
                    node_id: node.to_owned(),
                    client_key: key.as_bytes().to_vec(),
                };
                let removed = remove(&mut self.change, vec![owner]).await?;
                Ok(removed
                    .into_iter()
                    .next()
                    .map_or(ReleaseOutcome::Nothing, ReleaseOutcome::Removed))
            }
            Some((serial, true, false, false)) => {
                sqlx::query("UPDATE approval SET released = 1 WHERE serial = ?")
                    .bind(serial)
                    .execute(&mut *self.change)
                    .await
                    .map_err(query("release an approval"))?;
                next_sequence(&mut self.change, node)
                    .await
                    .map(ReleaseOutcome::Released)
            }
        }
    }
}

pub(super) async fn remove(
    change: &mut Transaction<'static, Sqlite>,
    rows: Vec<OwnerRow>,
) -> Result<Vec<Removed>, Error> {
    let mut removed = Vec::with_capacity(rows.len());
    for row in rows {
        sqlx::query("DELETE FROM approval WHERE serial = ?")
            .bind(row.serial)
            .execute(&mut **change)
            .await
            .map_err(query("remove an approval"))?;
        removed.push(Removed {
            sequence: next_sequence(change, &row.node_id).await?,
            node: row.node_id.parse().ok().ok_or(Error::Corrupt("node id"))?,
            client_key: public_key(&row.client_key, "client key")?,
        });
    }
    Ok(removed)
}

async fn next_sequence(change: &mut Transaction<'static, Sqlite>, node: &str) -> Result<u64, Error> {
    let sequence: i64 = sqlx::query_scalar("UPDATE node SET sequence = sequence + 1 WHERE id = ? RETURNING sequence")
        .bind(node)
        .fetch_one(&mut **change)
        .await
        .map_err(query("raise a sequence number"))?;
    u64::try_from(sequence).ok().ok_or(Error::Corrupt("sequence number"))
}

fn number(serial: u64) -> Result<i64, Error> {
    i64::try_from(serial).ok().ok_or(Error::Corrupt("serial"))
}
