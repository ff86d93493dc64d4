//! The approvals in the pool's database, read beside the pool that uses it.

use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result};
use dvpn_tests::world::World;
use sqlx::{Connection as _, FromRow, SqliteConnection, sqlite::SqliteConnectOptions};
use tokio::runtime::Runtime;

/// One approval.
#[derive(Debug, Clone, PartialEq, Eq, FromRow)]
pub(super) struct Row {
    pub(super) client_key: Vec<u8>,
    /// The key that it follows, until that one is gone.
    pub(super) renews: Option<Vec<u8>>,
    /// The node has said that it has the peer.
    pub(super) acknowledged: bool,
    pub(super) released: bool,
    expires_at: i64,
}

impl Row {
    pub(super) fn ends_at(&self) -> Result<SystemTime> {
        let seconds = u64::try_from(self.expires_at).context("an end in this age")?;
        Ok(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds))
    }
}

pub(super) struct Database {
    runtime: Runtime,
    connection: SqliteConnection,
}

impl Database {
    pub(super) fn open(world: &World) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("a runtime")?;
        let path = world.network.pool.directory.join("pool.sqlite");
        let options = SqliteConnectOptions::new()
            .filename(&path)
            .busy_timeout(Duration::from_secs(5));
        let connection = runtime
            .block_on(SqliteConnection::connect_with(&options))
            .with_context(|| format!("opening {}", path.display()))?;
        Ok(Self { runtime, connection })
    }

    /// All approvals, oldest first.
    pub(super) fn approvals(&mut self) -> Result<Vec<Row>> {
        let read = sqlx::query_as(
            "SELECT client_key, renews, acknowledged, released, expires_at FROM approval ORDER BY serial",
        )
        .fetch_all(&mut self.connection);
        self.runtime.block_on(read).context("reading the pool's approvals")
    }
}
