//! What must survive a restart, in one SQLite file. All SQL of the pool is below this module.

mod ahead;
mod approvals;
mod changes;
mod checkouts;
mod leases;
mod nodes;
mod plan;
mod rotations;
mod tokens;

use std::{
    fs::OpenOptions,
    io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use dvpn_common::keys::{PublicKey, VerifyingKey};
use jiff::Timestamp;
use sqlx::{
    Sqlite, SqlitePool, Transaction,
    migrate::MigrateError,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous},
};

pub use changes::Batch;
pub use checkouts::{CheckoutRow, OpenOutcome};
pub use leases::LeaseRow;
pub use nodes::{Node, RegisterOutcome};
pub use plan::{Acknowledged, Acknowledgement, ApprovalRow, ApproveOutcome, NewApproval, ReleaseOutcome, Removed};
pub use rotations::Signed;
pub use tokens::Token;

/// SHA-256 of a token: the only form in which one is stored.
pub type TokenHash = [u8; 32];

/// Why the database did not do it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be made.
    #[error("the database file {path} cannot be made: check its directory and permissions")]
    Create {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The file cannot be opened as a database.
    #[error("the database {path} cannot be opened: check that it is a pool's database and free for writing")]
    Open {
        /// Which file.
        path: PathBuf,
        /// What SQLite said.
        #[source]
        source: sqlx::Error,
    },
    /// The schema is newer than this program, or damaged.
    #[error("the database {path} cannot be brought to this version's schema: was it used by a newer dvpn-pool?")]
    Migrate {
        /// Which file.
        path: PathBuf,
        /// What the migrator said.
        #[source]
        source: MigrateError,
    },
    /// A statement failed.
    #[error("the database failed to {action}")]
    Query {
        /// What was being done.
        action: &'static str,
        /// What SQLite said.
        #[source]
        source: sqlx::Error,
    },
    /// A stored value does not read.
    #[error("the database holds an unreadable {0}: restore it from a backup")]
    Corrupt(&'static str),
}

/// The database.
#[derive(Clone)]
pub struct Store {
    pool: SqlitePool,
}

impl Store {
    /// Opens `path`, makes it (mode 0600) if it is missing, and brings the schema up to date.
    pub async fn open(path: &Path) -> Result<Self, Error> {
        match OpenOptions::new().write(true).create_new(true).mode(0o600).open(path) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(source) => {
                return Err(Error::Create {
                    path: path.to_owned(),
                    source,
                });
            }
        }
        // FULL: a confirmed payment or a minted token is on the disk before anybody is told of it.
        let options = SqliteConnectOptions::new()
            .filename(path)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .foreign_keys(true)
            .busy_timeout(Duration::from_secs(5));
        let pool = SqlitePoolOptions::new()
            .max_connections(4)
            // A file does not go away like a server does; the question would cost as much as most answers.
            .test_before_acquire(false)
            .acquire_timeout(Duration::from_secs(10))
            .connect_with(options)
            .await
            .map_err(|source| Error::Open {
                path: path.to_owned(),
                source,
            })?;
        sqlx::migrate!().run(&pool).await.map_err(|source| Error::Migrate {
            path: path.to_owned(),
            source,
        })?;
        Ok(Self { pool })
    }

    /// Closes every connection after its statement, so that the write-ahead log is folded into the file.
    pub async fn close(&self) {
        self.pool.close().await;
    }

    /// Whether the database answers.
    pub async fn ping(&self) -> Result<(), Error> {
        sqlx::query("SELECT 1")
            .execute(&self.pool)
            .await
            .map(drop)
            .map_err(query("answer"))
    }

    /// The value stored under `name`; `value` is stored first if there is none.
    pub async fn meta_or_insert(&self, name: &str, value: &str) -> Result<String, Error> {
        sqlx::query("INSERT INTO meta (name, value) VALUES (?, ?) ON CONFLICT (name) DO NOTHING")
            .bind(name)
            .bind(value)
            .execute(&self.pool)
            .await
            .map_err(query("store a setting"))?;
        sqlx::query_scalar("SELECT value FROM meta WHERE name = ?")
            .bind(name)
            .fetch_one(&self.pool)
            .await
            .map_err(query("read a setting"))
    }

    /// The value stored under `name`.
    pub async fn meta(&self, name: &str) -> Result<Option<String>, Error> {
        sqlx::query_scalar("SELECT value FROM meta WHERE name = ?")
            .bind(name)
            .fetch_optional(&self.pool)
            .await
            .map_err(query("read a setting"))
    }

    /// A write transaction. It takes the write lock at once: one that reads first and then writes would fail with
    /// "database is locked" when another writer came between.
    async fn begin(&self) -> Result<Transaction<'static, Sqlite>, Error> {
        self.pool
            .begin_with("BEGIN IMMEDIATE")
            .await
            .map_err(query("begin a change"))
    }
}

fn query(action: &'static str) -> impl FnOnce(sqlx::Error) -> Error {
    move |source| Error::Query { action, source }
}

async fn commit(transaction: Transaction<'static, Sqlite>) -> Result<(), Error> {
    transaction.commit().await.map_err(query("commit a change"))
}

fn timestamp(seconds: i64, what: &'static str) -> Result<Timestamp, Error> {
    Timestamp::from_second(seconds).ok().ok_or(Error::Corrupt(what))
}

fn public_key(bytes: &[u8], what: &'static str) -> Result<PublicKey, Error> {
    <[u8; 32]>::try_from(bytes)
        .ok()
        .and_then(|raw| PublicKey::from_bytes(raw).ok())
        .ok_or(Error::Corrupt(what))
}

fn verifying_key(bytes: &[u8]) -> Result<VerifyingKey, Error> {
    <[u8; 32]>::try_from(bytes)
        .ok()
        .and_then(|raw| VerifyingKey::from_bytes(raw).ok())
        .ok_or(Error::Corrupt("node identity"))
}
