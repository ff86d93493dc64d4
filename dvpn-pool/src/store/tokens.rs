//! Tokens: whether one is paid for, used, revoked.

use dvpn_common::ids::CheckoutId;
use jiff::Timestamp;
use sqlx::FromRow;

use super::{Error, Store, TokenHash, commit, query, timestamp};

/// What the pool knows of a token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    /// When its subscription ends.
    pub expires_at: Timestamp,
    /// Whether somebody verified it or had a key approved for it.
    pub used: bool,
    /// Why the operator revoked it, if so.
    pub revoked: Option<String>,
}

#[derive(FromRow)]
struct Row {
    expires_at: i64,
    used: bool,
    revoked_at: Option<i64>,
    revoke_reason: Option<String>,
}

impl Store {
    /// The token with this hash; nothing for one that nobody was given.
    pub async fn token(&self, hash: &TokenHash) -> Result<Option<Token>, Error> {
        let row: Option<Row> =
            sqlx::query_as("SELECT expires_at, used, revoked_at, revoke_reason FROM token WHERE hash = ?")
                .bind(hash.as_slice())
                .fetch_optional(&self.pool)
                .await
                .map_err(query("look a token up"))?;
        row.map(|row| {
            Ok(Token {
                expires_at: timestamp(row.expires_at, "token expiry")?,
                used: row.used,
                revoked: row.revoked_at.map(|_| row.revoke_reason.unwrap_or_default()),
            })
        })
        .transpose()
    }

    /// Marks a token as used: its checkout hands it out no more.
    pub async fn mark_used(&self, hash: &TokenHash) -> Result<(), Error> {
        sqlx::query("UPDATE token SET used = 1 WHERE hash = ? AND used = 0")
            .bind(hash.as_slice())
            .execute(&self.pool)
            .await
            .map(drop)
            .map_err(query("mark a token as used"))
    }

    /// Makes the token of a paid checkout known, once. Whoever asks is told which hash is the checkout's now; nothing
    /// for a checkout that is not paid, or one of a time when tokens were not derived.
    pub async fn mint_token(
        &self,
        id: &CheckoutId,
        hash: &TokenHash,
        expires_at: Timestamp,
    ) -> Result<Option<TokenHash>, Error> {
        let mut change = self.begin().await?;
        let done = sqlx::query(
            "UPDATE checkout SET delivered = 1, token_hash = ? WHERE id = ? AND delivered = 0 AND paid_at IS NOT NULL",
        )
        .bind(hash.as_slice())
        .bind(id.as_str())
        .execute(&mut *change)
        .await
        .map_err(query("mark a token as minted"))?;
        if done.rows_affected() == 1 {
            sqlx::query(
                "INSERT INTO token (hash, expires_at, revoked_at, revoke_reason) \
                 SELECT ?, ?, revoked_at, revoke_reason FROM checkout WHERE id = ?",
            )
            .bind(hash.as_slice())
            .bind(expires_at.as_second())
            .bind(id.as_str())
            .execute(&mut *change)
            .await
            .map_err(query("store a token"))?;
            commit(change).await?;
            return Ok(Some(*hash));
        }
        let known: Option<Option<Vec<u8>>> = sqlx::query_scalar("SELECT token_hash FROM checkout WHERE id = ?")
            .bind(id.as_str())
            .fetch_optional(&mut *change)
            .await
            .map_err(query("read the token of a checkout"))?;
        known
            .flatten()
            .map(|bytes| TokenHash::try_from(bytes).map_err(|_length| Error::Corrupt("token hash")))
            .transpose()
    }

    /// Revokes a token; false if there is none, or it was revoked before. A running pool follows within a second.
    pub async fn revoke_token(&self, hash: &TokenHash, reason: &str, now: Timestamp) -> Result<bool, Error> {
        sqlx::query("UPDATE token SET revoked_at = ?, revoke_reason = ? WHERE hash = ? AND revoked_at IS NULL")
            .bind(now.as_second())
            .bind(reason)
            .bind(hash.as_slice())
            .execute(&self.pool)
            .await
            .map(|done| done.rows_affected() == 1)
            .map_err(query("revoke a token"))
    }

    /// Revokes what came, or would come, of a checkout; false if there is no such checkout, or it was revoked before.
    pub async fn revoke_checkout(&self, id: &CheckoutId, reason: &str, now: Timestamp) -> Result<bool, Error> {
        let mut change = self.begin().await?;
        let done =
            sqlx::query("UPDATE checkout SET revoked_at = ?, revoke_reason = ? WHERE id = ? AND revoked_at IS NULL")
                .bind(now.as_second())
                .bind(reason)
                .bind(id.as_str())
                .execute(&mut *change)
                .await
                .map_err(query("revoke a checkout"))?;
        sqlx::query(
            "UPDATE token SET revoked_at = ?, revoke_reason = ? \
             WHERE hash = (SELECT token_hash FROM checkout WHERE id = ?) AND revoked_at IS NULL",
        )
        .bind(now.as_second())
        .bind(reason)
        .bind(id.as_str())
        .execute(&mut *change)
        .await
        .map_err(query("revoke the token of a checkout"))?;
        commit(change).await?;
        Ok(done.rows_affected() == 1)
    }
}
