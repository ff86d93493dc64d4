//! The changes of a node's peers that clients ask for, many of them in one transaction: [`crate::ledger`] commits them
//! together, so that the disk is waited for once a batch. Every change of a node's peers raises its sequence number in
//! the same transaction, so the number grows across restarts and never stands for two states.

use std::{
    collections::{HashMap, hash_map::Entry},
    ops::Range,
};

use dvpn_common::{ids::ProviderId, keys::PublicKey};
use sqlx::{Sqlite, Transaction};

use super::{
    Acknowledged, Acknowledgement, ApprovalRow, ApproveOutcome, Error, NewApproval, Node, ReleaseOutcome, Removed,
    Store, TokenHash,
    ahead::{Ahead, Room},
    commit,
    plan::{Held, OwnerRow, plan},
    public_key, query,
};
use crate::network::{FIRST_HOST, HOSTS};

/// Serials that are taken from the counter at one time. Those that a batch does not use are never used: they grow, and
/// need not follow one another.
const SERIALS: i64 = 64;

/// A transaction under way. Every statement costs two hand-overs between threads, several times its own work: what can be
/// one is one.
pub struct Batch {
    change: Transaction<'static, Sqlite>,
    /// Taken from the counter and not used yet.
    serials: Range<i64>,
    /// What many approvals were asked for with one question.
    ahead: Option<Ahead>,
    /// Of nodes where this batch did nothing else yet than give addresses.
    rooms: HashMap<ProviderId, Room>,
}

impl Store {
    /// Begins a batch of changes. Dropped without [`Batch::commit`] it changes nothing.
    pub async fn batch(&self) -> Result<Batch, Error> {
        Ok(Batch {
            change: self.begin().await?,
            serials: 0..0,
            ahead: None,
            rooms: HashMap::new(),
        })
    }
}

impl Batch {
    /// Puts everything on the disk.
    pub async fn commit(self) -> Result<(), Error> {
        commit(self.change).await
    }

    /// Reads for all these approvals what each of them has to know first; they are asked for next, in any order.
    pub async fn read_ahead(&mut self, wanted: &[&NewApproval]) -> Result<(), Error> {
        if wanted.len() > 1 {
            self.ahead = Some(Ahead::read(&mut self.change, wanted).await?);
        }
        Ok(())
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
        if let Some(ahead) = &mut self.ahead {
            ahead.token_changes(&wanted.token);
            ahead.key_changes(&wanted.client_key);
        }
        let removed = self.remove(plan.evicted.into_iter().map(Held::owner).collect()).await?;
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
        match self.rooms.get_mut(&wanted.node.id) {
            Some(room) if plan.host.is_none() && plan.replaced.is_none() && room.next() == Some(host) => room.give(),
            Some(_) => drop(self.rooms.remove(&wanted.node.id)),
            None => {}
        }
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
        if let Some(held) = self.ahead.as_ref().and_then(|ahead| ahead.held(wanted)) {
            return Ok(held);
        }
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
        let room = match self.rooms.entry(node.id.clone()) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(unknown) => unknown.insert(Room::read(&mut self.change, node.id.as_str()).await?),
        };
        if !room.has_place(ours, node.max_peers.unwrap_or(HOSTS)) {
            return Ok(None);
        }
        if let Some(next) = room.next() {
            return Ok(Some(next));
        }
        let next = room.after_last();
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

    /// Marks approvals of tokens without other keys as acknowledged by their nodes; in the order given, nothing for one that
    /// went meanwhile.
    pub async fn acknowledge_alone(&mut self, done: &[&Acknowledgement]) -> Result<Vec<Option<Acknowledged>>, Error> {
        if done.is_empty() {
            return Ok(Vec::new());
        }
        let list = |all: bool| {
            let serials = done.iter().filter(|done| all || done.first_use);
            let serials: Vec<String> = serials.map(|done| done.serial.to_string()).collect();
            format!("[{}]", serials.join(","))
        };
        let marked: Vec<(i64, Vec<u8>, Vec<u8>)> = sqlx::query_as(
            "UPDATE token SET used = 1 WHERE hash IN \
             (SELECT token_hash FROM approval WHERE serial IN (SELECT value FROM json_each(?))); \
             UPDATE approval SET acknowledged = 1 WHERE serial IN (SELECT value FROM json_each(?)) \
             RETURNING serial, approval, signature",
        )
        .bind(list(false))
        .bind(list(true))
        .fetch_all(&mut *self.change)
        .await
        .map_err(query("acknowledge approvals"))?;
        let mut marked: HashMap<i64, (Vec<u8>, Vec<u8>)> = marked
            .into_iter()
            .map(|(serial, approval, signature)| (serial, (approval, signature)))
            .collect();
        done.iter()
            .map(|done| {
                let Some((approval, signature)) = marked.remove(&number(done.serial)?) else {
                    return Ok(None);
                };
                Ok(Some(Acknowledged {
                    approval,
                    signature: signature.try_into().map_err(|_length| Error::Corrupt("signature"))?,
                    removed: Vec::new(),
                }))
            })
            .collect()
    }

    /// Marks an approval as acknowledged by its node, and ends the other approvals of its token: the one it renews in
    /// a while, the others now. Nothing if the approval went meanwhile.
    pub async fn acknowledge(&mut self, done: &Acknowledgement) -> Result<Option<Acknowledged>, Error> {
        if !done.others {
            return Ok(self.acknowledge_alone(&[done]).await?.pop().flatten());
        }
        let serial = number(done.serial)?;
        if let Some(ahead) = &mut self.ahead {
            ahead.token_changes(&done.token);
        }
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
        Ok(Some(Acknowledged {
            approval,
            signature,
            removed: self.remove(others).await?,
        }))
    }

    async fn remove(&mut self, rows: Vec<OwnerRow>) -> Result<Vec<Removed>, Error> {
        if !rows.is_empty() {
            self.rooms.clear();
        }
        remove(&mut self.change, rows).await
    }

    /// Takes one approval back.
    pub async fn withdraw(&mut self, serial: u64) -> Result<Vec<Removed>, Error> {
        let rows = sqlx::query_as("SELECT serial, node_id, client_key FROM approval WHERE serial = ?")
            .bind(number(serial)?)
            .fetch_all(&mut *self.change)
            .await
            .map_err(query("read an approval"))?;
        // Whose it is, nobody said.
        self.ahead = None;
        self.remove(rows).await
    }

    /// Marks one key's connection as over.
    pub async fn release(&mut self, node: &str, key: &PublicKey, token: &TokenHash) -> Result<ReleaseOutcome, Error> {
        if let Some(ahead) = &mut self.ahead {
            ahead.token_changes(token);
            ahead.key_changes(key);
        }
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
                let removed = self.remove(vec![owner]).await?;
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
