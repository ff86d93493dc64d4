//! Approvals, which are also the peers of each node. Every change of a node's peers raises its sequence number in the
//! same transaction, so the number grows across restarts and never stands for two states.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use dvpn_common::{contract::PeerEntry, ids::ProviderId, keys::PublicKey};
use ipnetwork::IpNetwork;
use jiff::Timestamp;
use sqlx::{FromRow, Sqlite, Transaction};

use super::{Error, Node, Store, TokenHash, commit, public_key, query, timestamp};
use crate::network::{FIRST_HOST, HOSTS};

/// What an approval is asked for.
#[derive(Debug, Clone, Copy)]
pub struct NewApproval<'a> {
    /// Whose.
    pub token: &'a TokenHash,
    /// At which node.
    pub node: &'a Node,
    /// The key to admit.
    pub client_key: PublicKey,
    /// The present.
    pub now: Timestamp,
    /// When it ends.
    pub expires_at: Timestamp,
}

/// A stored approval.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApprovalRow {
    /// Its serial.
    pub serial: u64,
    /// The node's sequence number that tells of it.
    pub sequence: u64,
    /// Which host of the node's networks the client is.
    pub host: u32,
    /// The signed bytes.
    pub approval: Vec<u8>,
    /// The signature over them.
    pub signature: [u8; 64],
    /// True if this client was already a peer of this node under this token.
    pub renewal: bool,
}

/// What became of a request for approval.
#[derive(Debug)]
pub enum ApproveOutcome {
    /// Stored, not yet acknowledged.
    Stored(ApprovalRow),
    /// The key belongs to another token.
    KeyTaken,
    /// Every address of the node is in use.
    NodeFull,
}

/// A peer that went from a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Removed {
    /// From which node.
    pub node: ProviderId,
    /// The sequence number that tells of it.
    pub sequence: u64,
    /// Whose peer.
    pub client_key: PublicKey,
}

#[derive(FromRow)]
struct PeerRow {
    client_key: Vec<u8>,
    host: i64,
    expires_at: i64,
    approval: Vec<u8>,
    signature: Vec<u8>,
}

#[derive(FromRow)]
struct OwnerRow {
    serial: i64,
    node_id: String,
    client_key: Vec<u8>,
}

impl Store {
    /// Stores an approval, in one transaction with its serial, its address and the node's next sequence number.
    /// `sign` makes the bytes and their signature from the serial and the host number.
    pub async fn approve(
        &self,
        wanted: NewApproval<'_>,
        sign: impl FnOnce(u64, u32) -> (Vec<u8>, [u8; 64]),
    ) -> Result<ApproveOutcome, Error> {
        let mut change = self.begin().await?;
        let node = wanted.node.id.as_str();
        let key = wanted.client_key.as_bytes().as_slice();
        let foreign: Option<i64> = sqlx::query_scalar(
            "SELECT serial FROM approval WHERE client_key = ? AND token_hash <> ? AND expires_at > ?",
        )
        .bind(key)
        .bind(wanted.token.as_slice())
        .bind(wanted.now.as_second())
        .fetch_optional(&mut *change)
        .await
        .map_err(query("look a client key up"))?;
        if foreign.is_some() {
            return Ok(ApproveOutcome::KeyTaken);
        }
        // What is left under this key and node is ours (a renewal) or over; both make room.
        let before: Option<(i64, bool)> = sqlx::query_as(
            "DELETE FROM approval WHERE node_id = ? AND client_key = ? RETURNING host, token_hash = ? AND expires_at > ?",
        )
        .bind(node)
        .bind(key)
        .bind(wanted.token.as_slice())
        .bind(wanted.now.as_second())
        .fetch_optional(&mut *change)
        .await
        .map_err(query("replace an approval"))?;
        let renewal = before.is_some_and(|(_, ours)| ours);
        let host = match before {
            Some((host, true)) => u32::try_from(host).ok().ok_or(Error::Corrupt("host number"))?,
            Some(_) | None => match free_host(&mut change, node).await? {
                Some(host) => host,
                None => return Ok(ApproveOutcome::NodeFull),
            },
        };
        let serial: i64 =
            sqlx::query_scalar("UPDATE counter SET value = value + 1 WHERE name = 'serial' RETURNING value")
                .fetch_one(&mut *change)
                .await
                .map_err(query("count an approval"))?;
        let serial_number = u64::try_from(serial).ok().ok_or(Error::Corrupt("serial"))?;
        let (approval, signature) = sign(serial_number, host);
        sqlx::query(
            "INSERT INTO approval (serial, token_hash, node_id, client_key, host, expires_at, approval, signature) \
             VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        )
        .bind(serial)
        .bind(wanted.token.as_slice())
        .bind(node)
        .bind(key)
        .bind(i64::from(host))
        .bind(wanted.expires_at.as_second())
        .bind(approval.as_slice())
        .bind(signature.as_slice())
        .execute(&mut *change)
        .await
        .map_err(query("store an approval"))?;
        let sequence = next_sequence(&mut change, node).await?;
        commit(change).await?;
        Ok(ApproveOutcome::Stored(ApprovalRow {
            serial: serial_number,
            sequence,
            host,
            approval,
            signature,
            renewal,
        }))
    }

    /// Marks an approval as acknowledged by its node and removes every other approval of its token.
    pub async fn acknowledge(&self, token: &TokenHash, serial: u64) -> Result<Vec<Removed>, Error> {
        let serial = i64::try_from(serial).ok().ok_or(Error::Corrupt("serial"))?;
        let mut change = self.begin().await?;
        sqlx::query("UPDATE approval SET acknowledged = 1 WHERE serial = ?")
            .bind(serial)
            .execute(&mut *change)
            .await
            .map_err(query("acknowledge an approval"))?;
        let others: Vec<OwnerRow> = sqlx::query_as(
            "SELECT serial, node_id, client_key FROM approval WHERE token_hash = ? AND serial <> ? ORDER BY serial",
        )
        .bind(token.as_slice())
        .bind(serial)
        .fetch_all(&mut *change)
        .await
        .map_err(query("read the approvals of a token"))?;
        let removed = remove(&mut change, others).await?;
        commit(change).await?;
        Ok(removed)
    }

    /// Takes one approval back.
    pub async fn withdraw(&self, serial: u64) -> Result<Vec<Removed>, Error> {
        let serial = i64::try_from(serial).ok().ok_or(Error::Corrupt("serial"))?;
        let mut change = self.begin().await?;
        let rows = sqlx::query_as("SELECT serial, node_id, client_key FROM approval WHERE serial = ?")
            .bind(serial)
            .fetch_all(&mut *change)
            .await
            .map_err(query("read an approval"))?;
        let removed = remove(&mut change, rows).await?;
        commit(change).await?;
        Ok(removed)
    }

    /// Removes what is over at `now`.
    pub async fn remove_expired(&self, now: Timestamp) -> Result<Vec<Removed>, Error> {
        // Most sweeps find nothing: look before taking the write lock.
        let any: Option<i64> = sqlx::query_scalar("SELECT serial FROM approval WHERE expires_at <= ? LIMIT 1")
            .bind(now.as_second())
            .fetch_optional(&self.pool)
            .await
            .map_err(query("look for ended approvals"))?;
        if any.is_none() {
            return Ok(Vec::new());
        }
        let mut change = self.begin().await?;
        let rows =
            sqlx::query_as("SELECT serial, node_id, client_key FROM approval WHERE expires_at <= ? ORDER BY serial")
                .bind(now.as_second())
                .fetch_all(&mut *change)
                .await
                .map_err(query("read ended approvals"))?;
        let removed = remove(&mut change, rows).await?;
        commit(change).await?;
        Ok(removed)
    }

    /// Removes what a crash left between "told the node" and "told the client": nobody was given these.
    pub async fn remove_unacknowledged(&self) -> Result<usize, Error> {
        let mut change = self.begin().await?;
        let rows = sqlx::query_as("SELECT serial, node_id, client_key FROM approval WHERE acknowledged = 0")
            .fetch_all(&mut *change)
            .await
            .map_err(query("read unacknowledged approvals"))?;
        let removed = remove(&mut change, rows).await?;
        commit(change).await?;
        Ok(removed.len())
    }

    /// The node's sequence number and its peers at `now`, of one moment.
    pub async fn peers(
        &self,
        node: &Node,
        now: Timestamp,
        addresses: impl Fn(u32) -> Vec<IpNetwork>,
    ) -> Result<(u64, Vec<PeerEntry>), Error> {
        let mut moment = self.pool.begin().await.map_err(query("begin to read"))?;
        let sequence: i64 = sqlx::query_scalar("SELECT sequence FROM node WHERE id = ?")
            .bind(node.id.as_str())
            .fetch_one(&mut *moment)
            .await
            .map_err(query("read a sequence number"))?;
        let rows: Vec<PeerRow> = sqlx::query_as(
            "SELECT client_key, host, expires_at, approval, signature FROM approval \
             WHERE node_id = ? AND expires_at > ? ORDER BY serial",
        )
        .bind(node.id.as_str())
        .bind(now.as_second())
        .fetch_all(&mut *moment)
        .await
        .map_err(query("read the peers of a node"))?;
        let peers = rows
            .into_iter()
            .map(|row| {
                let host = u32::try_from(row.host).ok().ok_or(Error::Corrupt("host number"))?;
                Ok(PeerEntry {
                    public_key: public_key(&row.client_key, "client key")?,
                    addresses: addresses(host),
                    expires_at: timestamp(row.expires_at, "approval expiry")?,
                    approval: STANDARD.encode(row.approval),
                    signature: STANDARD.encode(row.signature),
                    renews: None,
                    released: false,
                })
            })
            .collect::<Result<_, Error>>()?;
        Ok((
            u64::try_from(sequence).ok().ok_or(Error::Corrupt("sequence number"))?,
            peers,
        ))
    }
}

/// Removes every peer of a node: their approvals name a WireGuard key it no longer has.
pub(super) async fn remove_all_of_node(
    change: &mut Transaction<'static, Sqlite>,
    node: &ProviderId,
) -> Result<Vec<Removed>, Error> {
    let rows = sqlx::query_as("SELECT serial, node_id, client_key FROM approval WHERE node_id = ? ORDER BY serial")
        .bind(node.as_str())
        .fetch_all(&mut **change)
        .await
        .map_err(query("read the peers of a node"))?;
    remove(change, rows).await
}

async fn remove(change: &mut Transaction<'static, Sqlite>, rows: Vec<OwnerRow>) -> Result<Vec<Removed>, Error> {
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

/// The next free host after the last one given, wrapping: an address rests as long as possible, because the provider's
/// connection tracking may still hold flows of its previous owner.
async fn free_host(change: &mut Transaction<'static, Sqlite>, node: &str) -> Result<Option<u32>, Error> {
    let last: i64 = sqlx::query_scalar("SELECT last_host FROM node WHERE id = ?")
        .bind(node)
        .fetch_one(&mut **change)
        .await
        .map_err(query("read the last address"))?;
    let used: Vec<i64> = sqlx::query_scalar("SELECT host FROM approval WHERE node_id = ? ORDER BY host")
        .bind(node)
        .fetch_all(&mut **change)
        .await
        .map_err(query("read the used addresses"))?;
    let last = u32::try_from(last).ok().ok_or(Error::Corrupt("host number"))?;
    let Some(host) = (1..=HOSTS)
        .map(|step| FIRST_HOST + (last.saturating_sub(FIRST_HOST) + step) % HOSTS)
        .find(|host| used.binary_search(&i64::from(*host)).is_err())
    else {
        return Ok(None);
    };
    sqlx::query("UPDATE node SET last_host = ? WHERE id = ?")
        .bind(i64::from(host))
        .bind(node)
        .execute(&mut **change)
        .await
        .map_err(query("store the last address"))?;
    Ok(Some(host))
}
