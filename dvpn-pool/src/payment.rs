//! What a month costs, what pays for it, and the token that comes of it.
//!
//! The development backend takes no coins: a checkout is paid by a request. Amounts, quotes and tokens are as they will
//! be with coins, except that the exchange rate is a constant and tokens begin with `dev_`, which clients refuse unless
//! told otherwise.

use dvpn_common::{
    contract::CheckoutState,
    ids::{CheckoutId, UserId},
    limits::{DEVELOPMENT_TOKEN_PREFIX, REQUIRED_PRICE_CENTS, REQUIRED_WALLET},
};
use jiff::{Timestamp, ToSpan, tz::TimeZone};
use rand::seq::SliceRandom;
use zeroize::Zeroizing;

use crate::{
    pool::Pool,
    refusal::Refusal,
    signing::sha256,
    store::{CheckoutRow, OpenOutcome},
};

const SATS_PER_BTC: u64 = 100_000_000;
/// US cents a bitcoin, for quotes that nobody pays.
const DEVELOPMENT_RATE_CENTS: u64 = 10_000_000;
/// Widths of the bands of tags that make an amount unique: a wider one is used when the narrower is taken.
const TAG_BANDS: [(u64, u64); 3] = [(1, 99), (100, 999), (1000, 4999)];
/// Tags tried of one band.
const TRIES_PER_BAND: usize = 64;

/// The price in satoshi at `cents_per_btc`, rounded up; nothing for a rate of zero.
fn price_sats(cents_per_btc: u64) -> Option<u64> {
    (REQUIRED_PRICE_CENTS * SATS_PER_BTC)
        .checked_add(cents_per_btc.checked_sub(1)?)?
        .checked_div(cents_per_btc)
}

/// The open checkout of `user`, or a new one.
pub async fn open_checkout(pool: &Pool, user: &UserId) -> Result<CheckoutRow, Refusal> {
    let now = Timestamp::now();
    let now = Timestamp::from_second(now.as_second()).unwrap_or(now);
    let expires_at = now
        .checked_add(pool.config.timing.quote_life)
        .map_err(|_overflow| Refusal::unavailable("the pool's clock is out of range"))?;
    let base = price_sats(DEVELOPMENT_RATE_CENTS).ok_or_else(|| Refusal::unavailable("there is no exchange rate"))?;
    let id: CheckoutId = crate::hex::encode(&rand::random::<[u8; 16]>())
        .parse()
        .map_err(|_never| Refusal::unavailable("no checkout id could be made"))?;
    match pool
        .store
        .open_checkout(user, &id, &amounts(base), now, expires_at)
        .await?
    {
        OpenOutcome::Open(row) => Ok(row),
        OpenOutcome::NoAmount => Err(Refusal::unavailable(
            "too many open checkouts; try again in a few minutes",
        )),
    }
}

/// Amounts to try, the narrowest band first, each band in random order.
fn amounts(base: u64) -> Vec<u64> {
    let mut amounts = Vec::with_capacity(TAG_BANDS.len() * TRIES_PER_BAND);
    for (first, last) in TAG_BANDS {
        let mut band: Vec<u64> = (first..=last).map(|tag| base + tag).collect();
        band.shuffle(&mut rand::rng());
        amounts.extend(band.into_iter().take(TRIES_PER_BAND));
    }
    amounts
}

/// The token of a paid checkout, until it is first used. It is derived, so the same one can be told again to a client
/// that lost the answer, and only its hash is kept.
pub async fn token(
    pool: &Pool,
    checkout: &CheckoutId,
    paid_at: Timestamp,
) -> Result<Option<Zeroizing<String>>, Refusal> {
    let expires_at = a_month_after(paid_at).ok_or_else(|| Refusal::unavailable("the pool's clock is out of range"))?;
    let signer = pool.signer();
    let mut tokens = signer
        .ring
        .tokens(checkout.as_str())
        .map(|digits| Zeroizing::new(format!("{DEVELOPMENT_TOKEN_PREFIX}{}", digits.as_str())));
    let Some(newest) = tokens.next() else { return Ok(None) };
    let wanted = sha256(newest.as_bytes());
    let Some(minted) = pool.store.mint_token(checkout, &wanted, expires_at).await? else {
        return Ok(None);
    };
    let known = pool.store.token(&minted).await?;
    if known.is_none_or(|token| token.used || token.revoked.is_some()) {
        return Ok(None);
    }
    // Minted before the pool's key changed, it is one of the older ones.
    Ok(std::iter::once(newest)
        .chain(tokens)
        .find(|token| sha256(token.as_bytes()) == minted))
}

/// The same day of the next month, or its last day.
fn a_month_after(start: Timestamp) -> Option<Timestamp> {
    start
        .to_zoned(TimeZone::UTC)
        .checked_add(1.month())
        .ok()
        .map(|end| end.timestamp())
}

/// Decimal bitcoin with all eight digits.
pub fn btc(sats: u64) -> String {
    format!("{}.{:08}", sats / SATS_PER_BTC, sats % SATS_PER_BTC)
}

/// BIP 21.
pub fn bitcoin_uri(sats: u64) -> String {
    format!("bitcoin:{REQUIRED_WALLET}?amount={}&label=DVPN", btc(sats))
}

/// The payment page. Nothing in it is anybody's input: an id is hexadecimal, an amount a number.
pub fn page(row: &CheckoutRow, state: CheckoutState) -> String {
    let (id, amount, uri, expires) = (
        &row.id,
        btc(row.amount_sats),
        bitcoin_uri(row.amount_sats),
        row.expires_at,
    );
    let body = match state {
        CheckoutState::Pending | CheckoutState::Seen | CheckoutState::Confirming => format!(
            "<p class=dev>Development pool: do not send coins. \
             <code>POST …/payment/dev/pay/{id}</code> stands for the payment.</p>\
             <p>Exactly <b>{amount} BTC</b> to <code>{REQUIRED_WALLET}</code>, until {expires}.</p>\
             <p><a href=\"{}\">Open in a wallet</a></p>",
            uri.replace('&', "&amp;")
        ),
        CheckoutState::Confirmed => "<p>Paid. The program that began this checkout fetches its token.</p>".to_owned(),
        CheckoutState::Expired => "<p>This quote has ended. Start another checkout.</p>".to_owned(),
    };
    format!(
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content=\"width=device-width\">\
         <title>DVPN: one month, $9.99</title>\
         <style>body{{font:16px sans-serif;max-width:40em;margin:3em auto;padding:0 1em}}.dev{{color:#a00}}</style>\
         <h1>DVPN: one month, $9.99</h1>{body}</html>"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_price_is_rounded_up_to_whole_satoshi() {
        assert_eq!(price_sats(10_000_000), Some(9990));
        assert_eq!(price_sats(9_990_000), Some(10_000));
        assert_eq!(price_sats(6_543_210), Some(15_268));
        assert_eq!(price_sats(0), None);
    }

    #[test]
    fn amounts_are_distinct_and_the_narrow_band_comes_first() {
        let amounts = amounts(9990);
        assert!(amounts[..64].iter().all(|amount| (9991..=10_089).contains(amount)));
        let distinct: std::collections::BTreeSet<_> = amounts.iter().collect();
        assert_eq!(distinct.len(), amounts.len());
    }

    #[test]
    fn bitcoin_amounts_have_eight_digits() {
        assert_eq!(btc(10_012), "0.00010012");
        assert_eq!(btc(123_456_789_012), "1234.56789012");
        assert_eq!(
            bitcoin_uri(1),
            "bitcoin:1MUss4jmaRJ2sMtS9gyZqeRw8WrhWTsrxn?amount=0.00000001&label=DVPN"
        );
    }

    #[test]
    fn a_month_ends_on_the_same_day_or_the_last() {
        let at = |text: &str| text.parse::<Timestamp>().unwrap();
        assert_eq!(
            a_month_after(at("2026-01-15T10:00:00Z")),
            Some(at("2026-02-15T10:00:00Z"))
        );
        assert_eq!(
            a_month_after(at("2026-01-31T10:00:00Z")),
            Some(at("2026-02-28T10:00:00Z"))
        );
    }
}
