//! What the pool's database says: the approvals as they stand, and a journal of every one that ever was. The journal is
//! written by triggers inside the pool's own transactions, so that no approval is too short-lived to be in it.

use std::{collections::BTreeMap, path::Path, time::Duration};

use anyhow::{Context as _, Result};
use dvpn_common::keys::PublicKey;
use sqlx::{Connection as _, FromRow, SqliteConnection, sqlite::SqliteConnectOptions};
use tokio::runtime::Runtime;

const KEEP: &str = "
    CREATE TABLE kills_journal (at REAL NOT NULL, client_key BLOB NOT NULL);
    CREATE TRIGGER kills_issued AFTER INSERT ON approval BEGIN
        INSERT INTO kills_journal VALUES (unixepoch('subsec'), NEW.client_key);
    END;
    CREATE TRIGGER kills_ended AFTER DELETE ON approval BEGIN
        INSERT INTO kills_journal VALUES (unixepoch('subsec'), OLD.client_key);
    END;";

/// One approval.
#[derive(Debug, Clone, PartialEq, Eq, FromRow)]
pub(super) struct Row {
    client_key: Vec<u8>,
    /// Which address.
    pub(super) host: i64,
    /// Unix seconds, as all times of the pool.
    pub(super) expires_at: i64,
    /// When a renewed key goes; nothing for one that was not renewed.
    pub(super) remove_at: Option<i64>,
    /// When its token was revoked.
    pub(super) revoked_at: Option<i64>,
    pub(super) released: bool,
}

impl Row {
    pub(super) fn key(&self) -> Result<PublicKey> {
        public_key(&self.client_key)
    }
}

fn public_key(bytes: &[u8]) -> Result<PublicKey> {
    let raw: [u8; 32] = bytes.try_into().context("a key of 32 bytes")?;
    PublicKey::from_bytes(raw).context("a key in the pool's database")
}

/// Whether a key may be a peer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Standing {
    /// No approval of it was ever made.
    Unknown,
    /// It may.
    Approved,
    /// It might until then, in Unix seconds.
    Over(f64),
}

/// The database, beside the pool that uses it.
pub(super) struct Journal {
    runtime: Runtime,
    connection: SqliteConnection,
    read: i64,
    /// The last change of each key there ever was.
    last: BTreeMap<PublicKey, f64>,
    rows: BTreeMap<PublicKey, Row>,
}

impl Journal {
    pub(super) fn open(database: &Path) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("a runtime")?;
        let options = SqliteConnectOptions::new()
            .filename(database)
            .busy_timeout(Duration::from_secs(5));
        let connection = runtime
            .block_on(SqliteConnection::connect_with(&options))
            .with_context(|| format!("opening {}", database.display()))?;
        Ok(Self {
            runtime,
            connection,
            read: 0,
            last: BTreeMap::new(),
            rows: BTreeMap::new(),
        })
    }

    /// Begins the journal.
    pub(super) fn keep(&mut self) -> Result<()> {
        let done = sqlx::raw_sql(KEEP).execute(&mut self.connection);
        self.runtime
            .block_on(done)
            .map(drop)
            .context("making triggers in the pool's database")
    }

    /// Takes an approval out behind the pool's back.
    pub(super) fn lose(&mut self, key: &PublicKey) -> Result<()> {
        let done = sqlx::query("DELETE FROM approval WHERE client_key = ?")
            .bind(key.as_bytes().as_slice())
            .execute(&mut self.connection);
        self.runtime
            .block_on(done)
            .map(drop)
            .context("deleting from the pool's database")
    }

    /// Whether the token of a checkout was handed out.
    pub(super) fn has_token(&mut self, checkout: &str) -> Result<bool> {
        let found = sqlx::query_scalar("SELECT delivered FROM checkout WHERE id = ?")
            .bind(checkout)
            .fetch_one(&mut self.connection);
        self.runtime.block_on(found).context("looking a checkout up")
    }

    /// Reads all of one moment; the approvals as they stand.
    pub(super) fn look(&mut self) -> Result<&BTreeMap<PublicKey, Row>> {
        let Self {
            runtime,
            connection,
            read,
            last,
            ..
        } = self;
        let (rows, news) = runtime.block_on(async {
            let mut moment = connection.begin().await?;
            let rows: Vec<Row> = sqlx::query_as(
                "SELECT client_key, host, approval.expires_at, remove_at, revoked_at, released \
                 FROM approval JOIN token ON token_hash = hash",
            )
            .fetch_all(&mut *moment)
            .await?;
            let news: Vec<(i64, f64, Vec<u8>)> =
                sqlx::query_as("SELECT rowid, at, client_key FROM kills_journal WHERE rowid > ? ORDER BY rowid")
                    .bind(*read)
                    .fetch_all(&mut *moment)
                    .await?;
            moment.commit().await?;
            Ok::<_, sqlx::Error>((rows, news))
        })?;
        for (rowid, at, key) in news {
            last.insert(public_key(&key)?, at);
            *read = rowid;
        }
        let rows: Result<_> = rows.into_iter().map(|row| Ok((row.key()?, row))).collect();
        self.rows = rows?;
        Ok(&self.rows)
    }

    /// What was last read of a key, at a time in Unix seconds.
    pub(super) fn standing(&self, key: &PublicKey, at: f64) -> Standing {
        if let Some(row) = self.rows.get(key) {
            #[expect(clippy::cast_precision_loss, reason = "seconds of this century")]
            let end = [Some(row.expires_at), row.remove_at, row.revoked_at]
                .into_iter()
                .flatten()
                .map(|end| end as f64)
                .fold(f64::MAX, f64::min);
            return if end <= at {
                Standing::Over(end)
            } else {
                Standing::Approved
            };
        }
        match self.last.get(key) {
            None => Standing::Unknown,
            Some(at) => Standing::Over(*at),
        }
    }
}
