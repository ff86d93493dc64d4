//! Checkouts and the tokens that come of them.

use dvpn_common::ids::{CheckoutId, UserId};
use jiff::Timestamp;
use sqlx::FromRow;

use super::{Error, Store, commit, query, timestamp};

/// How long an unpaid checkout answers "expired" before it is forgotten.
const KEEP_UNPAID_SECONDS: i64 = 24 * 3600;
/// How long a paid one is remembered once its token was used.
const KEEP_PAID_SECONDS: i64 = 30 * 24 * 3600;

/// One checkout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckoutRow {
    /// Its id.
    pub id: CheckoutId,
    /// The exact amount that pays it.
    pub amount_sats: u64,
    /// When the quote ends.
    pub expires_at: Timestamp,
    /// When it was paid.
    pub paid_at: Option<Timestamp>,
    /// Whether its token exists.
    pub delivered: bool,
}

/// What became of a wish for a checkout.
#[derive(Debug)]
pub enum OpenOutcome {
    /// The open checkout of this user: this new one, or the one that was open already.
    Open(CheckoutRow),
    /// None of the amounts offered is free.
    NoAmount,
}

#[derive(FromRow)]
struct Row {
    id: String,
    amount_sats: i64,
    expires_at: i64,
    paid_at: Option<i64>,
    delivered: bool,
}

impl TryFrom<Row> for CheckoutRow {
    type Error = Error;
    fn try_from(row: Row) -> Result<Self, Error> {
        Ok(Self {
            id: row.id.parse().ok().ok_or(Error::Corrupt("checkout id"))?,
            amount_sats: u64::try_from(row.amount_sats).ok().ok_or(Error::Corrupt("amount"))?,
            expires_at: timestamp(row.expires_at, "checkout expiry")?,
            paid_at: row
                .paid_at
                .map(|seconds| timestamp(seconds, "payment time"))
                .transpose()?,
            delivered: row.delivered,
        })
    }
}

impl Store {
    /// The open checkout of `user`, or a new one with the first of `amounts` that no open checkout has.
    pub async fn open_checkout(
        &self,
        user: &UserId,
        new_id: &CheckoutId,
        amounts: &[u64],
        now: Timestamp,
        expires_at: Timestamp,
    ) -> Result<OpenOutcome, Error> {
        let mut change = self.begin().await?;
        sqlx::query("UPDATE checkout SET open = 0 WHERE open = 1 AND expires_at <= ?")
            .bind(now.as_second())
            .execute(&mut *change)
            .await
            .map_err(query("end old checkouts"))?;
        let known: Option<Row> = sqlx::query_as(
            "SELECT id, amount_sats, expires_at, paid_at, delivered FROM checkout WHERE user_id = ? AND open = 1",
        )
        .bind(user.as_str())
        .fetch_optional(&mut *change)
        .await
        .map_err(query("look an open checkout up"))?;
        if let Some(row) = known {
            commit(change).await?;
            return Ok(OpenOutcome::Open(row.try_into()?));
        }
        for amount in amounts {
            let amount_column = i64::try_from(*amount).ok().ok_or(Error::Corrupt("amount"))?;
            let done = sqlx::query(
                "INSERT INTO checkout (id, user_id, amount_sats, expires_at) VALUES (?, ?, ?, ?) \
                 ON CONFLICT (amount_sats) WHERE open = 1 DO NOTHING",
            )
            .bind(new_id.as_str())
            .bind(user.as_str())
            .bind(amount_column)
            .bind(expires_at.as_second())
            .execute(&mut *change)
            .await
            .map_err(query("store a checkout"))?;
            if done.rows_affected() == 1 {
                commit(change).await?;
                return Ok(OpenOutcome::Open(CheckoutRow {
                    id: new_id.clone(),
                    amount_sats: *amount,
                    expires_at,
                    paid_at: None,
                    delivered: false,
                }));
            }
        }
        Ok(OpenOutcome::NoAmount)
    }

    /// One checkout.
    pub async fn checkout(&self, id: &CheckoutId) -> Result<Option<CheckoutRow>, Error> {
        let row: Option<Row> =
            sqlx::query_as("SELECT id, amount_sats, expires_at, paid_at, delivered FROM checkout WHERE id = ?")
                .bind(id.as_str())
                .fetch_optional(&self.pool)
                .await
                .map_err(query("read a checkout"))?;
        row.map(CheckoutRow::try_from).transpose()
    }

    /// Marks an open checkout as paid; false if it is not open at `now`.
    pub async fn pay_checkout(&self, id: &CheckoutId, now: Timestamp) -> Result<bool, Error> {
        let done =
            sqlx::query("UPDATE checkout SET paid_at = ?1, open = 0 WHERE id = ?2 AND open = 1 AND expires_at > ?1")
                .bind(now.as_second())
                .bind(id.as_str())
                .execute(&self.pool)
                .await
                .map_err(query("credit a checkout"))?;
        Ok(done.rows_affected() == 1)
    }

    /// Forgets checkouts that nobody asks for any more, and tokens long over.
    pub async fn forget_old_payments(&self, now: Timestamp) -> Result<(), Error> {
        let seconds = now.as_second();
        sqlx::query(
            "DELETE FROM checkout WHERE (paid_at IS NULL AND expires_at < ?) OR (delivered = 1 AND paid_at < ? \
             AND (token_hash IS NULL OR token_hash NOT IN (SELECT hash FROM token WHERE used = 0)))",
        )
        .bind(seconds.saturating_sub(KEEP_UNPAID_SECONDS))
        .bind(seconds.saturating_sub(KEEP_PAID_SECONDS))
        .execute(&self.pool)
        .await
        .map_err(query("forget old checkouts"))?;
        sqlx::query("DELETE FROM token WHERE expires_at < ? AND hash NOT IN (SELECT token_hash FROM approval)")
            .bind(seconds.saturating_sub(KEEP_PAID_SECONDS))
            .execute(&self.pool)
            .await
            .map(drop)
            .map_err(query("forget old tokens"))
    }
}
