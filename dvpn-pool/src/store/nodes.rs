//! Nodes: identity, addresses, and which inner networks are theirs.

use std::net::SocketAddr;

use dvpn_common::{
    ids::{ProviderId, Region},
    keys::{PublicKey, VerifyingKey},
    limits::MAX_PROVIDERS,
};
use jiff::Timestamp;
use sqlx::{FromRow, Sqlite, Transaction};

use super::{Error, Removed, Store, approvals, commit, public_key, query, verifying_key};
use crate::network::{FIRST_HOST, HOSTS};

/// How stale `seen_at` may get before a heartbeat is worth a write.
const SEEN_RESOLUTION_SECONDS: i64 = 600;
/// A node that was never listed nor approved, is no standby, and is silent for this long gives its id and networks back.
const FORGET_AFTER_SECONDS: i64 = 3600;
/// Nodes that were never listed nor approved, at one time.
const MOST_UNLISTED: i64 = 2048;
/// Where a new node's addresses begin: the one after this is the first.
const LAST_HOST: u32 = FIRST_HOST + HOSTS - 1;

/// One registered node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Its id.
    pub id: ProviderId,
    /// Which inner networks are its own; see [`crate::network`].
    pub index: u32,
    /// The key its requests verify with, bound to the id at the first registration.
    pub identity: VerifyingKey,
    /// Its WireGuard key.
    pub public_key: PublicKey,
    /// Outer address of its WireGuard socket.
    pub endpoint: SocketAddr,
    /// Where its latency echo answers.
    pub probe: Option<SocketAddr>,
    /// Where it stands.
    pub region: Option<Region>,
    /// Whether the operator approved it.
    pub approved: bool,
    /// Whether it takes no new clients.
    pub draining: bool,
    /// Most clients its owner admits.
    pub max_peers: Option<u32>,
}

impl Node {
    /// Whether this registration says something else than the node `known`. What is not the node's to say does not
    /// count.
    pub fn changes(&self, known: &Self) -> bool {
        let said = Self {
            index: known.index,
            approved: known.approved,
            ..self.clone()
        };
        said != *known
    }
}

/// What became of a registration.
#[derive(Debug)]
pub enum RegisterOutcome {
    /// Stored. `removed` are the peers that went because the WireGuard key changed.
    Stored {
        /// The node as it is now.
        node: Box<Node>,
        /// Peers whose approval named the old key.
        removed: Vec<Removed>,
    },
    /// The id belongs to another identity.
    ForeignIdentity,
    /// Another node has this WireGuard key.
    KeyTaken,
    /// No room for another node.
    Full,
}

#[derive(FromRow)]
struct NodeRow {
    id: String,
    network_index: i64,
    identity: Vec<u8>,
    public_key: Vec<u8>,
    endpoint: String,
    probe: Option<String>,
    region: Option<String>,
    approved: bool,
    draining: bool,
    max_peers: Option<i64>,
    seen_at: i64,
}

const COLUMNS_BY_ID: &str = "SELECT id, network_index, identity, public_key, endpoint, probe, region, approved, \
     draining, max_peers, seen_at FROM node WHERE id = ?";
const COLUMNS_ALL: &str = "SELECT id, network_index, identity, public_key, endpoint, probe, region, approved, \
     draining, max_peers, seen_at FROM node ORDER BY id";

impl TryFrom<NodeRow> for Node {
    type Error = Error;
    fn try_from(row: NodeRow) -> Result<Self, Error> {
        let address = |text: String| text.parse::<SocketAddr>().ok().ok_or(Error::Corrupt("node address"));
        Ok(Self {
            id: row.id.parse().ok().ok_or(Error::Corrupt("node id"))?,
            index: u32::try_from(row.network_index)
                .ok()
                .ok_or(Error::Corrupt("network index"))?,
            identity: verifying_key(&row.identity)?,
            public_key: public_key(&row.public_key, "node key")?,
            endpoint: address(row.endpoint)?,
            probe: row.probe.map(address).transpose()?,
            region: row
                .region
                .map(|text| text.parse().ok().ok_or(Error::Corrupt("region")))
                .transpose()?,
            approved: row.approved,
            draining: row.draining,
            max_peers: row
                .max_peers
                .map(|most| u32::try_from(most).ok().ok_or(Error::Corrupt("client limit")))
                .transpose()?,
        })
    }
}

impl Store {
    /// Every registered node.
    pub async fn nodes(&self) -> Result<Vec<Node>, Error> {
        let rows: Vec<NodeRow> = sqlx::query_as(COLUMNS_ALL)
            .fetch_all(&self.pool)
            .await
            .map_err(query("read the nodes"))?;
        rows.into_iter().map(Node::try_from).collect()
    }

    /// Sets or takes back the operator's approval; false if there is no such node.
    pub async fn set_approved(&self, id: &ProviderId, approved: bool) -> Result<bool, Error> {
        let done = sqlx::query("UPDATE node SET approved = ? WHERE id = ?")
            .bind(approved)
            .bind(id.as_str())
            .execute(&self.pool)
            .await
            .map_err(query("approve a node"))?;
        Ok(done.rows_affected() == 1)
    }

    /// Stores a registration. `wanted.index` and `wanted.approved` are ignored: the first is allocated here, the
    /// second is the operator's.
    pub async fn register(&self, wanted: &Node, now: Timestamp) -> Result<RegisterOutcome, Error> {
        let known: Option<NodeRow> = sqlx::query_as(COLUMNS_BY_ID)
            .bind(wanted.id.as_str())
            .fetch_optional(&self.pool)
            .await
            .map_err(query("read a node"))?;
        let Some(row) = known else {
            return self.insert(wanted, now).await;
        };
        let seen_at = row.seen_at;
        let known = Node::try_from(row)?;
        if known.identity != wanted.identity {
            return Ok(RegisterOutcome::ForeignIdentity);
        }
        let node = Node {
            index: known.index,
            approved: known.approved,
            ..wanted.clone()
        };
        if node == known && now.as_second() < seen_at.saturating_add(SEEN_RESOLUTION_SECONDS) {
            return Ok(RegisterOutcome::Stored {
                node: node.into(),
                removed: Vec::new(),
            });
        }
        let mut change = self.begin().await?;
        if key_is_taken(&mut change, &node).await? {
            return Ok(RegisterOutcome::KeyTaken);
        }
        let removed = if node.public_key == known.public_key {
            Vec::new()
        } else {
            approvals::remove_all_of_node(&mut change, &node.id).await?
        };
        sqlx::query(
            "UPDATE node SET public_key = ?, endpoint = ?, probe = ?, region = ?, draining = ?, max_peers = ?, seen_at = ? \
             WHERE id = ?",
        )
            .bind(node.public_key.as_bytes().as_slice())
            .bind(node.endpoint.to_string())
            .bind(node.probe.map(|address| address.to_string()))
            .bind(node.region.as_ref().map(Region::as_str))
            .bind(node.draining)
            .bind(node.max_peers)
            .bind(now.as_second())
            .bind(node.id.as_str())
            .execute(&mut *change)
            .await
            .map_err(query("update a node"))?;
        commit(change).await?;
        Ok(RegisterOutcome::Stored {
            node: node.into(),
            removed,
        })
    }

    async fn insert(&self, wanted: &Node, now: Timestamp) -> Result<RegisterOutcome, Error> {
        let mut change = self.begin().await?;
        if key_is_taken(&mut change, wanted).await? {
            return Ok(RegisterOutcome::KeyTaken);
        }
        let unlisted: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM node WHERE listed = 0 AND approved = 0")
            .fetch_one(&mut *change)
            .await
            .map_err(query("count the unlisted nodes"))?;
        if unlisted >= MOST_UNLISTED {
            return Ok(RegisterOutcome::Full);
        }
        // The lowest free index, so that the networks of forgotten nodes come back into use.
        let index: i64 = sqlx::query_scalar(
            "SELECT MIN(candidate) FROM (SELECT 0 AS candidate UNION ALL SELECT network_index + 1 FROM node) \
             WHERE candidate NOT IN (SELECT network_index FROM node)",
        )
        .fetch_one(&mut *change)
        .await
        .map_err(query("allocate a network"))?;
        let Some(index) = u32::try_from(index)
            .ok()
            .filter(|index| (*index as usize) < MAX_PROVIDERS)
        else {
            return Ok(RegisterOutcome::Full);
        };
        let node = Node {
            index,
            approved: false,
            ..wanted.clone()
        };
        sqlx::query(
            "INSERT INTO node \
             (id, network_index, identity, public_key, endpoint, probe, region, draining, max_peers, last_host, seen_at) \
             VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        )
        .bind(node.id.as_str())
        .bind(i64::from(index))
        .bind(node.identity.as_bytes().as_slice())
        .bind(node.public_key.as_bytes().as_slice())
        .bind(node.endpoint.to_string())
        .bind(node.probe.map(|address| address.to_string()))
        .bind(node.region.as_ref().map(Region::as_str))
        .bind(node.draining)
        .bind(node.max_peers)
        .bind(LAST_HOST)
        .bind(now.as_second())
        .execute(&mut *change)
        .await
        .map_err(query("store a node"))?;
        commit(change).await?;
        Ok(RegisterOutcome::Stored {
            node: node.into(),
            removed: Vec::new(),
        })
    }

    /// Keeps the ids of nodes that were listed: they are never given to another identity.
    pub async fn mark_listed(&self, ids: &[ProviderId]) -> Result<(), Error> {
        let mut change = self.begin().await?;
        for id in ids {
            sqlx::query("UPDATE node SET listed = 1 WHERE id = ?")
                .bind(id.as_str())
                .execute(&mut *change)
                .await
                .map_err(query("mark a node as listed"))?;
        }
        commit(change).await
    }

    /// Forgets nodes that were never listed nor approved, are no standbys, have no peers and are silent; returns which.
    pub async fn forget_silent_nodes(&self, now: Timestamp) -> Result<Vec<ProviderId>, Error> {
        let ids: Vec<String> = sqlx::query_scalar(
            "DELETE FROM node WHERE listed = 0 AND approved = 0 AND seen_at < ? \
             AND id NOT IN (SELECT node_id FROM approval) AND id NOT IN (SELECT node_id FROM standby) RETURNING id",
        )
        .bind(now.as_second().saturating_sub(FORGET_AFTER_SECONDS))
        .fetch_all(&self.pool)
        .await
        .map_err(query("forget silent nodes"))?;
        ids.into_iter()
            .map(|id| id.parse().ok().ok_or(Error::Corrupt("node id")))
            .collect()
    }
}

async fn key_is_taken(change: &mut Transaction<'static, Sqlite>, node: &Node) -> Result<bool, Error> {
    let holder: Option<String> = sqlx::query_scalar("SELECT id FROM node WHERE public_key = ? AND id <> ?")
        .bind(node.public_key.as_bytes().as_slice())
        .bind(node.id.as_str())
        .fetch_optional(&mut **change)
        .await
        .map_err(query("look a node key up"))?;
    Ok(holder.is_some())
}
