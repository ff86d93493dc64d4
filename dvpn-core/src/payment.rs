//! Paid, not paid, or cannot tell: three answers that are never mixed up.
//!
//! Access needs all four rules in one answer of the payment server: `active` is true, `wallet` is ours, `interval` is
//! monthly, `amount_usd` is at least 9.99. The amount is read digit by digit from the JSON text, never through a
//! float: what is compared is what was sent.

use aws_lc_rs::digest::{SHA256, digest};
use dvpn_common::{
    contract::VerifyRequest,
    limits::{
        DEVELOPMENT_TOKEN_PREFIX, MAX_BODY_BYTES, REQUIRED_INTERVAL, REQUIRED_PRICE_CENTS, REQUIRED_PRICE_USD,
        REQUIRED_WALLET,
    },
};
use jiff::{SignedDuration, Timestamp};
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::{
    Failure, Retry, seal,
    text::{excerpt, excerpt_bytes},
};

/// How long a yes without `expires_at` is good.
pub const DEFAULT_VALIDITY: SignedDuration = SignedDuration::from_hours(24);

/// Proof that a payment was verified. It is made only by reading a verify answer, or by opening a sealed record of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Subscription {
    valid_until: Timestamp,
    verified_at: Timestamp,
}

impl Subscription {
    /// End of access.
    pub fn valid_until(&self) -> Timestamp {
        self.valid_until
    }
    /// When the payment server last said yes.
    pub fn verified_at(&self) -> Timestamp {
        self.verified_at
    }
    /// Whether access holds at `now`.
    pub fn is_valid(&self, now: Timestamp) -> bool {
        now < self.valid_until
    }
    /// The sealed record of this subscription; it is good only together with the token it was verified for.
    pub fn seal(&self, token: &str, key: &seal::Key, nonce: [u8; seal::NONCE_BYTES]) -> Result<Vec<u8>, seal::Error> {
        let mut record = Vec::with_capacity(48);
        record.extend_from_slice(&self.valid_until.as_second().to_be_bytes());
        record.extend_from_slice(&self.verified_at.as_second().to_be_bytes());
        record.extend_from_slice(digest(&SHA256, token.as_bytes()).as_ref());
        key.seal(RECORD_PURPOSE, &record, nonce)
    }
    /// Opens a sealed record; nothing if it is about another token.
    pub fn open(sealed: &[u8], token: &str, key: &seal::Key) -> Result<Option<Self>, seal::Error> {
        let record = key.open(RECORD_PURPOSE, sealed)?;
        let (valid_until, rest) = record.split_first_chunk::<8>().ok_or(seal::Error::Damaged)?;
        let (verified_at, of_token) = rest.split_first_chunk::<8>().ok_or(seal::Error::Damaged)?;
        if digest(&SHA256, token.as_bytes()).as_ref() != of_token {
            return Ok(None);
        }
        let time = |bytes| {
            Timestamp::from_second(i64::from_be_bytes(bytes))
                .ok()
                .ok_or(seal::Error::Damaged)
        };
        Ok(Some(Self {
            valid_until: time(*valid_until)?,
            verified_at: time(*verified_at)?,
        }))
    }
}

const RECORD_PURPOSE: &str = "subscription";

/// What one verify request told us.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verification {
    /// All four rules hold.
    Paid(Subscription),
    /// The payment server answered, and a rule does not hold: the failure names it.
    NotPaid(Failure),
    /// No answer, or none that reads: says nothing about the payment.
    CannotTell(Failure),
}

/// Whether a token was made without a payment.
pub fn is_development_token(token: &str) -> bool {
    token.starts_with(DEVELOPMENT_TOKEN_PREFIX)
}

/// Refuses what cannot be a token before it is sent anywhere: it must fit one HTTP header, and a development token
/// needs `DVPN_DEVELOPMENT=true`.
pub fn check_token(token: &str, development: bool) -> Result<(), Failure> {
    let never = |what: &str, how: &str| Failure {
        what: what.to_owned(),
        how: how.to_owned(),
        retry: Retry::Never,
    };
    if token.is_empty() || token.len() > MAX_TOKEN_BYTES || !token.bytes().all(|b| b.is_ascii_graphic()) {
        Err(never(
            "the payment token is not 1 to 512 printable characters",
            "store the token again as it was given",
        ))
    } else if is_development_token(token) && !development {
        Err(never(
            "the payment token is a development token (dev_…): nobody paid for it",
            "pay for a real one, or set DVPN_DEVELOPMENT=true on a machine that only tests",
        ))
    } else {
        Ok(())
    }
}

/// Longest payment token, in bytes.
pub const MAX_TOKEN_BYTES: usize = 512;

/// The body of `POST PAYMENT_API_URL`.
pub fn verify_request(token: &str, provider_id: &str) -> VerifyRequest {
    VerifyRequest {
        token: token.to_owned(),
        provider_id: provider_id.to_owned(),
        required_wallet: REQUIRED_WALLET.to_owned(),
        required_price_usd: REQUIRED_PRICE_USD,
        required_interval: REQUIRED_INTERVAL.to_owned(),
    }
}

/// Judges the payment server's answer.
///
/// 2xx with a JSON object decides by the rules, 402 is "not paid"; everything else (5xx, 403, HTML, a truncated body)
/// says nothing about the payment. `expires_at` is RFC 3339 text or whole Unix seconds; without it a yes is good for
/// [`DEFAULT_VALIDITY`].
pub fn judge(status: u16, body: &[u8], now: Timestamp) -> Verification {
    match status {
        200..=299 => {}
        402 => return not_paid("the payment server answers 402 Payment Required".to_owned()),
        401 | 403 => return cannot_tell(format!("the payment server answers {status}: it does not let us ask")),
        _ => return cannot_tell(format!("the payment server answers {status}")),
    }
    if body.len() > MAX_BODY_BYTES {
        return cannot_tell(format!(
            "the verify answer has {} bytes, {MAX_BODY_BYTES} are allowed",
            body.len()
        ));
    }
    // Serde would also take an array for a struct, value by value.
    if body.trim_ascii_start().first() != Some(&b'{') {
        return cannot_tell(format!(
            "the verify answer is no JSON object: \"{}\"",
            excerpt_bytes(body)
        ));
    }
    match serde_json::from_slice::<Answer<'_>>(body) {
        Ok(answer) => match answer.judge(now) {
            Ok(subscription) => Verification::Paid(subscription),
            Err(Doubt::Rule(what)) => not_paid(what),
            Err(Doubt::Unreadable(what)) => cannot_tell(what),
        },
        Err(_) if amount_is_not_a_number(body) => not_paid(format!("{AMOUNT_RULE}, and it is not a number")),
        Err(_) => cannot_tell(format!("the verify answer does not read: \"{}\"", excerpt_bytes(body))),
    }
}

fn not_paid(what: String) -> Verification {
    let how = "pay for this month (the D-Bus method Payments)".to_owned();
    Verification::NotPaid(Failure {
        what,
        how,
        retry: Retry::Never,
    })
}

fn cannot_tell(what: String) -> Verification {
    let how = "it will be asked again; check PAYMENT_API_URL if this stays".to_owned();
    Verification::CannotTell(Failure {
        what,
        how,
        retry: Retry::Backoff,
    })
}

const ACTIVE_RULE: &str = "the subscription is not active (active must be true)";
const AMOUNT_RULE: &str = "the payment is not enough (amount_usd must be a plain number of at least 9.99)";

/// Why an answer is no yes.
enum Doubt {
    /// It reads, and a rule does not hold.
    Rule(String),
    /// It does not read.
    Unreadable(String),
}

/// The answer with its values as they were written. An object only: a duplicate of one of these fields is refused.
#[derive(Deserialize)]
struct Answer<'a> {
    #[serde(default, borrow)]
    active: Option<&'a RawValue>,
    #[serde(default, borrow)]
    wallet: Option<&'a RawValue>,
    #[serde(default, borrow)]
    interval: Option<&'a RawValue>,
    #[serde(default, borrow)]
    amount_usd: Option<&'a RawValue>,
    #[serde(default, borrow)]
    expires_at: Option<&'a RawValue>,
}

impl Answer<'_> {
    fn judge(&self, now: Timestamp) -> Result<Subscription, Doubt> {
        let rule = |what: &str| Err(Doubt::Rule(what.to_owned()));
        if self.active.map(RawValue::get) != Some("true") {
            return rule(ACTIVE_RULE);
        }
        if !is_text(self.wallet, REQUIRED_WALLET) {
            return rule(&format!(
                "the payment went to another wallet (wallet must be {REQUIRED_WALLET})"
            ));
        }
        if !is_text(self.interval, REQUIRED_INTERVAL) {
            return rule(&format!(
                "the payment is for another interval (interval must be {REQUIRED_INTERVAL})"
            ));
        }
        match self.amount_usd.map(|raw| whole_cents(raw.get())) {
            Some(Ok(cents)) if cents >= REQUIRED_PRICE_CENTS => {}
            Some(Ok(_)) => return rule(AMOUNT_RULE),
            Some(Err(reason)) => return rule(&format!("{AMOUNT_RULE}, and it {reason}")),
            None => return rule(&format!("{AMOUNT_RULE}, and it is missing")),
        }
        let valid_until = match self.expires_at {
            None => now.saturating_add(DEFAULT_VALIDITY).unwrap_or(now),
            Some(raw) => read_time(raw.get()).ok_or_else(|| {
                Doubt::Unreadable(format!(
                    "the verify answer's expires_at does not read: {}",
                    excerpt(raw.get())
                ))
            })?,
        };
        if valid_until <= now {
            return rule(&format!(
                "the subscription ended at {valid_until} (expires_at must be in the future)"
            ));
        }
        Ok(Subscription {
            valid_until,
            verified_at: now,
        })
    }
}

fn is_text(raw: Option<&RawValue>, wanted: &str) -> bool {
    raw.is_some_and(|raw| serde_json::from_str::<String>(raw.get()).is_ok_and(|text| text == wanted))
}

fn read_time(raw: &str) -> Option<Timestamp> {
    match serde_json::from_str::<String>(raw) {
        Ok(text) => text.parse().ok(),
        Err(_) => raw
            .parse::<i64>()
            .ok()
            .and_then(|seconds| Timestamp::from_second(seconds).ok()),
    }
}

/// The amount in whole cents, rounded down, from the text of a JSON number. The price is a whole number of cents, so
/// rounding down changes no comparison with it.
fn whole_cents(text: &str) -> Result<u64, &'static str> {
    const EXACT: u64 = 1 << 53;
    if text.starts_with('"') {
        return Err("is a string");
    }
    if text.starts_with('-') {
        return Err("is negative");
    }
    if !text.starts_with(|first: char| first.is_ascii_digit()) {
        return Err("is not a number");
    }
    if text.contains(['e', 'E']) {
        return Err("has an exponent");
    }
    let (whole, fraction) = text.split_once('.').unwrap_or((text, "0"));
    let is_digits = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
    if !is_digits(whole) || !is_digits(fraction) {
        return Err("is not a number");
    }
    // Beyond 2^53 a sender that used floats no longer knew what it wrote.
    let dollars = whole
        .parse::<u64>()
        .ok()
        .filter(|n| *n < EXACT)
        .ok_or("is beyond 2^53")?;
    let cents = fraction
        .bytes()
        .chain([b'0', b'0'])
        .take(2)
        .fold(0, |sum, digit| sum * 10 + u64::from(digit - b'0'));
    Ok(dollars * 100 + cents)
}

/// Whether a body that is no JSON becomes an answer once `NaN` and `Infinity`, which some encoders write, are taken
/// for what they are: an amount that is no number. Such a body never counts as paid.
fn amount_is_not_a_number(body: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(body) else {
        return false;
    };
    let mended: String = text
        .split('"')
        .enumerate()
        // Every second part lies between quotes. An escaped quote shifts that, and then the body stays unreadable.
        .map(|(i, part)| {
            if i % 2 == 0 {
                part.replace("-Infinity", "NaN").replace("Infinity", "NaN")
            } else {
                part.to_owned()
            }
        })
        .enumerate()
        .map(|(i, part)| if i % 2 == 0 { part.replace("NaN", "[]") } else { part })
        .collect::<Vec<_>>()
        .join("\"");
    serde_json::from_str::<Answer<'_>>(&mended)
        .is_ok_and(|answer| answer.amount_usd.is_some_and(|raw| raw.get() == "[]"))
}

#[cfg(test)]
mod tests;
