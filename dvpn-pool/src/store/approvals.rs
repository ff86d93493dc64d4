//! Approvals as they stand, which are also the peers of each node; and what time, a restart or the operator ends.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use dvpn_common::{contract::PeerEntry, ids::ProviderId};
use ipnetwork::IpNetwork;
use jiff::Timestamp;
use sqlx::{FromRow, Sqlite, Transaction};

use super::{Error, Node, Removed, Store, changes::remove, commit, plan::OwnerRow, public_key, query, timestamp};

#[derive(FromRow)]
struct PeerRow {
    client_key: Vec<u8>,
    host: i64,
    expires_at: i64,
    approval: Vec<u8>,
    signature: Vec<u8>,
    renews: Option<Vec<u8>>,
    released: bool,
}

impl Store {
    /// Removes what is over at `now`: approvals that ended, keys that were renewed, and everything of a revoked token.
    pub async fn remove_ended(&self, now: Timestamp) -> Result<Vec<Removed>, Error> {
        // Most sweeps find nothing: look before taking the write lock.
        let any: bool = sqlx::query_scalar(
            "SELECT EXISTS (SELECT 1 FROM approval WHERE expires_at <= ?1) \
             OR EXISTS (SELECT 1 FROM approval WHERE remove_at <= ?1) \
             OR EXISTS (SELECT 1 FROM token JOIN approval ON token_hash = hash WHERE revoked_at IS NOT NULL)",
        )
        .bind(now.as_second())
        .fetch_one(&self.pool)
        .await
        .map_err(query("look for ended approvals"))?;
        if !any {
            return Ok(Vec::new());
        }
        let mut change = self.begin().await?;
        let revoked: Vec<OwnerRow> = sqlx::query_as(
            "SELECT serial, node_id, client_key FROM token JOIN approval ON token_hash = hash \
             WHERE revoked_at IS NOT NULL ORDER BY serial",
        )
        .fetch_all(&mut *change)
        .await
        .map_err(query("read revoked approvals"))?;
        for row in &revoked {
            tracing::warn!(target: crate::AUDIT, node = row.node_id, serial = row.serial, "approval_revoked");
        }
        let mut removed = remove(&mut change, revoked).await?;
        let ended: Vec<OwnerRow> = sqlx::query_as(
            "SELECT serial, node_id, client_key FROM approval WHERE expires_at <= ?1 OR remove_at <= ?1 ORDER BY serial",
        )
        .bind(now.as_second())
        .fetch_all(&mut *change)
        .await
        .map_err(query("read ended approvals"))?;
        removed.extend(remove(&mut change, ended).await?);
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
            "SELECT client_key, host, expires_at, approval, signature, renews, released FROM approval \
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
                    renews: row.renews.map(|key| public_key(&key, "renewed key")).transpose()?,
                    released: row.released,
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
