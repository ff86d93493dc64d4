//! Which of the pool's keys signs, and how it came after the others.

use dvpn_common::{approval::ApprovalFields, contract::KeyRotation, ids::ProviderId, keys::VerifyingKey};
use jiff::Timestamp;
use sqlx::FromRow;

use super::{Error, Store, commit, query};
use crate::signing::PoolKey;

/// The setting that says which key every stored approval is signed with.
const APPROVALS_KEY: &str = "approvals_key";

#[derive(FromRow)]
struct Row {
    from_key: String,
    to_key: String,
    signature: String,
}

/// What was signed again.
#[derive(Debug)]
pub struct Signed {
    /// How many approvals.
    pub approvals: i64,
    /// The sequence number of every node.
    pub sequences: Vec<(ProviderId, u64)>,
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

    /// Signs every live approval again with `key`, under new serials, unless all are its own. Returns the new sequence
    /// number of every node: what each knew is signed by a key that is over.
    pub async fn sign_again(&self, key: &PoolKey, now: Timestamp) -> Result<Option<Signed>, Error> {
        let name = key.public().to_string();
        if self.meta(APPROVALS_KEY).await?.as_deref() == Some(&name) {
            return Ok(None);
        }
        let mut change = self.begin().await?;
        let rows: Vec<(i64, Vec<u8>)> =
            sqlx::query_as("SELECT serial, approval FROM approval WHERE expires_at > ? ORDER BY serial")
                .bind(now.as_second())
                .fetch_all(&mut *change)
                .await
                .map_err(query("read the approvals"))?;
        let count = i64::try_from(rows.len())
            .ok()
            .ok_or(Error::Corrupt("number of approvals"))?;
        let last: i64 =
            sqlx::query_scalar("UPDATE counter SET value = value + ? WHERE name = 'serial' RETURNING value")
                .bind(count)
                .fetch_one(&mut *change)
                .await
                .map_err(query("count the approvals"))?;
        let first = u64::try_from(last - count + 1).ok().ok_or(Error::Corrupt("serial"))?;
        // Whole seconds, as they are signed.
        let issued_at = Timestamp::from_second(now.as_second()).unwrap_or(now);
        for ((row, bytes), serial) in rows.into_iter().zip(first..) {
            let Ok(before) = ApprovalFields::decode(&bytes) else {
                tracing::error!(
                    row,
                    "a stored approval does not read and is not signed again: it ends by itself"
                );
                continue;
            };
            let approval = ApprovalFields {
                pool_id: key.pool_id(),
                issued_at,
                serial,
                ..before
            }
            .encode();
            // The row keeps its own number: whoever waits for it knows it by that.
            sqlx::query("UPDATE approval SET approval = ?, signature = ? WHERE serial = ?")
                .bind(approval.as_slice())
                .bind(key.sign(&approval).as_slice())
                .bind(row)
                .execute(&mut *change)
                .await
                .map_err(query("sign an approval again"))?;
        }
        let sequences: Vec<(String, i64)> =
            sqlx::query_as("UPDATE node SET sequence = sequence + 1 RETURNING id, sequence")
                .fetch_all(&mut *change)
                .await
                .map_err(query("raise the sequence numbers"))?;
        sqlx::query("INSERT INTO meta (name, value) VALUES (?1, ?2) ON CONFLICT (name) DO UPDATE SET value = ?2")
            .bind(APPROVALS_KEY)
            .bind(name)
            .execute(&mut *change)
            .await
            .map_err(query("store the key of the approvals"))?;
        commit(change).await?;
        let sequences = sequences
            .into_iter()
            .map(|(id, sequence)| {
                Ok((
                    id.parse().ok().ok_or(Error::Corrupt("node id"))?,
                    u64::try_from(sequence).ok().ok_or(Error::Corrupt("sequence number"))?,
                ))
            })
            .collect::<Result<_, Error>>()?;
        Ok(Some(Signed {
            approvals: count,
            sequences,
        }))
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
