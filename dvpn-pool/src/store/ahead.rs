//! What a batch of changes reads at one time for all of them: each question by itself costs two hand-overs between threads,
//! several times its own work.

use std::collections::HashSet;

use dvpn_common::keys::PublicKey;
use sqlx::{FromRow, Sqlite, Transaction};

use super::{Error, NewApproval, TokenHash, plan::Held, query};
use crate::{
    hex,
    network::{FIRST_HOST, HOSTS},
};

#[derive(FromRow)]
struct Row {
    serial: i64,
    node_id: String,
    client_key: Vec<u8>,
    host: i64,
    token_hash: Vec<u8>,
    expires_at: i64,
    acknowledged: bool,
    renews: Option<Vec<u8>>,
    superseded: bool,
}

/// The approvals of all tokens and keys that a batch asks for, as they stood before its first change.
pub(super) struct Ahead {
    tokens: HashSet<[u8; 32]>,
    keys: HashSet<[u8; 32]>,
    /// In the order of their serials.
    rows: Vec<Row>,
    changed_tokens: HashSet<[u8; 32]>,
    changed_keys: HashSet<[u8; 32]>,
}

impl Ahead {
    pub(super) async fn read(
        change: &mut Transaction<'static, Sqlite>,
        wanted: &[&NewApproval],
    ) -> Result<Self, Error> {
        let tokens: HashSet<_> = wanted.iter().map(|wanted| wanted.token).collect();
        let keys: HashSet<_> = wanted.iter().map(|wanted| *wanted.client_key.as_bytes()).collect();
        let rows = sqlx::query_as(
            "SELECT serial, node_id, client_key, host, token_hash, expires_at, acknowledged, renews, \
             remove_at IS NOT NULL AS superseded \
             FROM approval WHERE token_hash IN (SELECT unhex(value) FROM json_each(?)) \
             UNION SELECT serial, node_id, client_key, host, token_hash, expires_at, acknowledged, renews, \
             remove_at IS NOT NULL \
             FROM approval WHERE client_key IN (SELECT unhex(value) FROM json_each(?)) ORDER BY serial",
        )
        .bind(list(&tokens))
        .bind(list(&keys))
        .fetch_all(&mut **change)
        .await
        .map_err(query("read the approvals of many tokens"))?;
        Ok(Self {
            tokens,
            keys,
            rows,
            changed_tokens: HashSet::new(),
            changed_keys: HashSet::new(),
        })
    }

    /// The keys of the token, and whoever else has this key, in the order of their serials; nothing if that was not read,
    /// or the batch has changed some of it since.
    pub(super) fn held(&self, wanted: &NewApproval) -> Option<Vec<Held>> {
        let (token, key) = (&wanted.token, wanted.client_key.as_bytes());
        let known = self.tokens.contains(token) && self.keys.contains(key);
        if !known || !self.is_unchanged(token, key) {
            return None;
        }
        let concerned = self
            .rows
            .iter()
            .filter(|row| row.token_hash == token || row.client_key == key);
        concerned
            .map(|row| {
                self.is_unchanged(&row.token_hash, &row.client_key)
                    .then(|| row.held(wanted))
            })
            .collect()
    }

    fn is_unchanged(&self, token: &[u8], key: &[u8]) -> bool {
        !self.changed_tokens.contains(token) && !self.changed_keys.contains(key)
    }

    /// The batch changes approvals of this token.
    pub(super) fn token_changes(&mut self, token: &TokenHash) {
        self.changed_tokens.insert(*token);
    }

    /// The batch changes an approval of this key.
    pub(super) fn key_changes(&mut self, key: &PublicKey) {
        self.changed_keys.insert(*key.as_bytes());
    }
}

impl Row {
    fn held(&self, wanted: &NewApproval) -> Held {
        Held {
            serial: self.serial,
            node_id: self.node_id.clone(),
            client_key: self.client_key.clone(),
            host: self.host,
            ours: self.token_hash == wanted.token,
            live: self.expires_at > wanted.now.as_second(),
            acknowledged: self.acknowledged,
            renews: self.renews.clone(),
            superseded: self.superseded,
        }
    }
}

/// As a list for `json_each`.
fn list(values: &HashSet<[u8; 32]>) -> String {
    let quoted: Vec<String> = values
        .iter()
        .map(|value| format!("\"{}\"", hex::encode(value)))
        .collect();
    format!("[{}]", quoted.join(","))
}

/// Addresses of one node that follow the last one given, wrapping, and are free; and how many clients it has: as long as
/// the batch does nothing else there than give them.
pub(super) struct Room {
    free: std::ops::Range<u32>,
    peers: i64,
}

#[derive(FromRow)]
struct RoomRow {
    next: i64,
    peers: i64,
    taken: Option<i64>,
}

impl Room {
    pub(super) async fn read(change: &mut Transaction<'static, Sqlite>, node: &str) -> Result<Self, Error> {
        let row: RoomRow = sqlx::query_as(
            "SELECT peers, ?2 + (last_host - ?2 + 1) % ?3 AS next, (SELECT min(host) FROM approval \
             WHERE node_id = node.id AND renews IS NULL AND host >= ?2 + (last_host - ?2 + 1) % ?3) AS taken \
             FROM node WHERE id = ?1",
        )
        .bind(node)
        .bind(i64::from(FIRST_HOST))
        .bind(i64::from(HOSTS))
        .fetch_one(&mut **change)
        .await
        .map_err(query("read the room of a node"))?;
        let number = |host: i64| u32::try_from(host).ok().ok_or(Error::Corrupt("host number"));
        let taken = row.taken.map(number).transpose()?;
        Ok(Self {
            free: number(row.next)?..taken.unwrap_or(FIRST_HOST + HOSTS),
            peers: row.peers,
        })
    }

    /// Whether there is a place for one more of which `ours` are to make room, and at most `most` may be.
    pub(super) fn has_place(&self, ours: i64, most: u32) -> bool {
        self.peers.saturating_sub(ours) < i64::from(most.min(HOSTS)) && self.peers < i64::from(HOSTS)
    }

    /// The next address, if one follows the last one given directly.
    pub(super) fn next(&self) -> Option<u32> {
        (!self.free.is_empty()).then_some(self.free.start)
    }

    /// The next address is given to a new client.
    pub(super) fn give(&mut self) {
        self.free.next();
        self.peers += 1;
    }

    /// Where to look for a gap: what follows the last address given, wrapping.
    pub(super) fn after_last(&self) -> u32 {
        FIRST_HOST + (self.free.start - FIRST_HOST) % HOSTS
    }
}
