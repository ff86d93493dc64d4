//! Standby nodes and the leases at them.

use std::collections::{BTreeMap, BTreeSet};

use dvpn_common::{ids::ProviderId, keys::PublicKey};
use jiff::Timestamp;

use super::{Error, Store, TokenHash, commit, public_key, query};

/// One client's lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseRow {
    /// At which node.
    pub node: ProviderId,
    /// Whose peer.
    pub client_key: PublicKey,
    /// Serial of the approval that it lasts as long as.
    pub serial: u64,
}

impl Store {
    /// Sets or takes back that a node is a standby; false if there is no such node.
    pub async fn set_standby(&self, id: &ProviderId, standby: bool) -> Result<bool, Error> {
        let mut change = self.begin().await?;
        let known: Option<i64> = sqlx::query_scalar("SELECT 1 FROM node WHERE id = ?")
            .bind(id.as_str())
            .fetch_optional(&mut *change)
            .await
            .map_err(query("look a node up"))?;
        if known.is_none() {
            return Ok(false);
        }
        let statement = if standby {
            "INSERT INTO standby (node_id) VALUES (?) ON CONFLICT DO NOTHING"
        } else {
            "DELETE FROM standby WHERE node_id = ?"
        };
        sqlx::query(statement)
            .bind(id.as_str())
            .execute(&mut *change)
            .await
            .map_err(query("change a standby node"))?;
        commit(change).await?;
        Ok(true)
    }

    /// Every standby node.
    pub async fn standbys(&self) -> Result<BTreeSet<ProviderId>, Error> {
        let ids: Vec<String> = sqlx::query_scalar("SELECT node_id FROM standby")
            .fetch_all(&self.pool)
            .await
            .map_err(query("read the standby nodes"))?;
        ids.iter()
            .map(|id| id.parse().ok().ok_or(Error::Corrupt("node id")))
            .collect()
    }

    /// How many peers each node has that has any.
    pub async fn peer_counts(&self) -> Result<BTreeMap<ProviderId, u64>, Error> {
        let rows: Vec<(String, i64)> = sqlx::query_as("SELECT node_id, COUNT(*) FROM approval GROUP BY node_id")
            .fetch_all(&self.pool)
            .await
            .map_err(query("count peers"))?;
        rows.into_iter()
            .map(|(id, count)| {
                Ok((
                    id.parse().ok().ok_or(Error::Corrupt("node id"))?,
                    u64::try_from(count).ok().ok_or(Error::Corrupt("number of peers"))?,
                ))
            })
            .collect()
    }

    /// Names the approval of `client_key` at `node` as the token's one lease; an earlier lease of the token is forgotten.
    pub async fn store_lease(
        &self,
        id: &str,
        token: &TokenHash,
        node: &ProviderId,
        client_key: &PublicKey,
    ) -> Result<(), Error> {
        sqlx::query(
            "INSERT INTO lease (id, token_hash, node_id, client_key) VALUES (?, ?, ?, ?) ON CONFLICT (token_hash) \
             DO UPDATE SET id = excluded.id, node_id = excluded.node_id, client_key = excluded.client_key",
        )
        .bind(id)
        .bind(token.as_slice())
        .bind(node.as_str())
        .bind(client_key.as_bytes().as_slice())
        .execute(&self.pool)
        .await
        .map(drop)
        .map_err(query("store a lease"))
    }

    /// The token's lease of this name, while it lasts.
    pub async fn lease(&self, id: &str, token: &TokenHash, now: Timestamp) -> Result<Option<LeaseRow>, Error> {
        let row: Option<(String, Vec<u8>, i64)> = sqlx::query_as(
            "SELECT lease.node_id, lease.client_key, approval.serial FROM lease JOIN approval \
             ON approval.node_id = lease.node_id AND approval.client_key = lease.client_key \
             AND approval.token_hash = lease.token_hash \
             WHERE lease.id = ? AND lease.token_hash = ? AND approval.expires_at > ?",
        )
        .bind(id)
        .bind(token.as_slice())
        .bind(now.as_second())
        .fetch_optional(&self.pool)
        .await
        .map_err(query("look a lease up"))?;
        row.map(|(node, key, serial)| {
            Ok(LeaseRow {
                node: node.parse().ok().ok_or(Error::Corrupt("node id"))?,
                client_key: public_key(&key, "client key")?,
                serial: u64::try_from(serial).ok().ok_or(Error::Corrupt("serial"))?,
            })
        })
        .transpose()
    }

    /// Forgets a lease; its approval is withdrawn by itself.
    pub async fn forget_lease(&self, id: &str) -> Result<(), Error> {
        sqlx::query("DELETE FROM lease WHERE id = ?")
            .bind(id)
            .execute(&self.pool)
            .await
            .map(drop)
            .map_err(query("forget a lease"))
    }

    /// Forgets leases whose approval is gone.
    pub async fn forget_ended_leases(&self) -> Result<u64, Error> {
        sqlx::query(
            "DELETE FROM lease WHERE NOT EXISTS (SELECT 1 FROM approval WHERE approval.node_id = lease.node_id \
             AND approval.client_key = lease.client_key AND approval.token_hash = lease.token_hash)",
        )
        .execute(&self.pool)
        .await
        .map(|done| done.rows_affected())
        .map_err(query("forget ended leases"))
    }
}
