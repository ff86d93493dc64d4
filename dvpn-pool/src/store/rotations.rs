//! Which of the pool's keys signs, and how it came after the others.

use dvpn_common::{contract::KeyRotation, keys::VerifyingKey};
use sqlx::FromRow;

use super::{Error, Store, commit, query};

#[derive(FromRow)]
struct Row {
    from_key: String,
    to_key: String,
    signature: String,
}

impl Store {
    /// The chain of key changes, oldest first.
    pub async fn rotations(&self) -> Result<Vec<KeyRotation>, Error> {
        let rows: Vec<Row> = sqlx::query_as("SELECT from_key, to_key, signature FROM rotation ORDER BY position")
            .fetch_all(&self.pool)
            .await
            .map_err(query("read the key rotations"))?;
        rows.into_iter()
            .map(|row| {
                let key = |text: String| text.parse().ok().ok_or(Error::Corrupt("rotated key"));
                Ok(KeyRotation {
                    from: key(row.from_key)?,
                    to: key(row.to_key)?,
                    signature: row.signature,
                })
            })
            .collect()
    }

    /// Lets `rotation.to` sign from now on; false if `rotation.from` does not sign any more.
    pub async fn rotate_key(&self, rotation: &KeyRotation) -> Result<bool, Error> {
        let mut change = self.begin().await?;
        let done = sqlx::query("UPDATE meta SET value = ? WHERE name = 'pool_key' AND value = ?")
            .bind(rotation.to.to_string())
            .bind(rotation.from.to_string())
            .execute(&mut *change)
            .await
            .map_err(query("change the pool's key"))?;
        if done.rows_affected() == 0 {
            return Ok(false);
        }
        sqlx::query("INSERT INTO rotation (from_key, to_key, signature) VALUES (?, ?, ?)")
            .bind(rotation.from.to_string())
            .bind(rotation.to.to_string())
            .bind(&rotation.signature)
            .execute(&mut *change)
            .await
            .map_err(query("store a key rotation"))?;
        commit(change).await?;
        Ok(true)
    }

    /// The key that signs.
    pub async fn pool_key(&self) -> Result<Option<VerifyingKey>, Error> {
        self.meta("pool_key")
            .await?
            .map(|text| text.parse().ok().ok_or(Error::Corrupt("pool key")))
            .transpose()
    }

    /// The highest list version that may be in use.
    pub async fn list_version(&self) -> Result<u64, Error> {
        self.meta("list_version")
            .await?
            .map_or(Ok(0), |text| text.parse().ok().ok_or(Error::Corrupt("list version")))
    }

    /// Raises [`Self::list_version`].
    pub async fn raise_list_version(&self, version: u64) -> Result<(), Error> {
        sqlx::query(
            "INSERT INTO meta (name, value) VALUES ('list_version', ?1) ON CONFLICT (name) DO UPDATE SET value = ?1",
        )
        .bind(version.to_string())
        .execute(&self.pool)
        .await
        .map(drop)
        .map_err(query("store the list's version"))
    }
}
