//! The payment service: verify, checkout, and (in development) the coins' stand-in.

use std::{sync::Arc, time::Instant};

use axum::{
    Json,
    extract::{Path, State},
    http::{HeaderValue, header},
    response::{Html, IntoResponse},
};
use dvpn_common::{
    contract::{CheckoutRequest, CheckoutResponse, CheckoutState, CheckoutStatus, VerifyRequest},
    ids::CheckoutId,
    limits::{REQUIRED_INTERVAL, REQUIRED_PRICE_USD, REQUIRED_WALLET},
};
use jiff::Timestamp;
use serde::Serialize;

use crate::{
    limiter::site,
    payment::{self, bitcoin_uri, btc},
    pool::Pool,
    refusal::Refusal,
    request::Incoming,
    signing::sha256,
    store::{CheckoutRow, Token},
};

/// The answer to a verify request: the user's contract, and when it ends.
#[derive(Debug, Serialize)]
pub struct VerifyAnswer {
    active: bool,
    wallet: &'static str,
    interval: &'static str,
    amount_usd: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    expires_at: Option<Timestamp>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

/// `POST /payment`. Which provider the customer is about to use is not looked at, and not kept.
pub async fn verify(State(pool): State<Arc<Pool>>, request: Incoming) -> Result<impl IntoResponse, Refusal> {
    let answer = pool
        .guarded(request.source, async {
            let body: VerifyRequest = request.json()?;
            check_terms(&body.required_wallet, body.required_price_usd, &body.required_interval)?;
            let hash = sha256(body.token.as_bytes());
            let token = pool.store.token(&hash).await?;
            let answer = answer(token.as_ref(), Timestamp::now());
            if answer.active && token.is_some_and(|token| !token.used) {
                pool.store.mark_used(&hash).await?;
            }
            Ok(answer)
        })
        .await?;
    if answer.error.as_deref() == Some(UNKNOWN) {
        pool.count_failure(request.source);
    }
    Ok(private(Json(answer)))
}

const UNKNOWN: &str = "nobody paid for this token here";

fn answer(token: Option<&Token>, now: Timestamp) -> VerifyAnswer {
    let error = match token {
        None => Some(UNKNOWN.to_owned()),
        Some(Token {
            revoked: Some(reason), ..
        }) => Some(format!("the operator revoked this token: {reason}")),
        Some(token) if token.expires_at <= now => Some("the subscription is over: pay for another month".to_owned()),
        Some(_) => None,
    };
    VerifyAnswer {
        active: error.is_none(),
        wallet: REQUIRED_WALLET,
        interval: REQUIRED_INTERVAL,
        amount_usd: if token.is_some() { REQUIRED_PRICE_USD } else { 0.0 },
        expires_at: token.map(|token| token.expires_at),
        error,
    }
}

/// `POST /payment/checkout/start`
pub async fn start(State(pool): State<Arc<Pool>>, request: Incoming) -> Result<impl IntoResponse, Refusal> {
    let response = pool
        .guarded(request.source, async {
            let body: CheckoutRequest = request.json()?;
            check_terms(&body.required_wallet, body.required_price_usd, &body.required_interval)?;
            pool.checkouts
                .take(&site(request.source), Instant::now())
                .map_err(Refusal::too_many)?;
            let row = payment::open_checkout(&pool, &body.user_id).await?;
            let page = pool
                .config
                .payment_url
                .as_ref()
                .map(|base| format!("{}/checkout/{}/page", base.as_str().trim_end_matches('/'), row.id));
            Ok(CheckoutResponse {
                checkout_url: page,
                bitcoin_uri: Some(bitcoin_uri(row.amount_sats)),
                amount_btc: Some(btc(row.amount_sats)),
                amount_sats: Some(row.amount_sats),
                expires_at: Some(row.expires_at),
                secret: Some(
                    pool.signer()
                        .ring
                        .current()
                        .checkout_secret(row.id.as_str())
                        .to_string(),
                ),
                session_id: row.id,
            })
        })
        .await?;
    Ok(private(Json(response)))
}

/// `GET /payment/checkout/{id}`, for the holder of its secret.
pub async fn status(
    State(pool): State<Arc<Pool>>,
    Path(id): Path<String>,
    request: Incoming,
) -> Result<impl IntoResponse, Refusal> {
    let status = pool
        .guarded(request.source, async {
            let holder = request
                .bearer()
                .is_some_and(|given| pool.signer().ring.is_checkout_secret(&id, given));
            if !holder {
                return Err(Refusal::unauthorized(
                    "send `Authorization: Bearer` with the secret of this checkout",
                ));
            }
            let row = find(&pool, &id).await?;
            let now = Timestamp::now();
            let state = state_of(&row, now);
            let token = match row.paid_at {
                Some(paid_at) => payment::token(&pool, &row.id, paid_at).await?,
                None => None,
            };
            Ok(CheckoutStatus {
                status: state,
                confirmations: None,
                required_confirmations: None,
                token: token.map(|token| token.to_string()),
            })
        })
        .await?;
    Ok(private(Json(status)))
}

/// `POST /payment/dev/pay/{id}`, in development only: the coins arrived.
pub async fn development_pay(
    State(pool): State<Arc<Pool>>,
    Path(id): Path<String>,
    request: Incoming,
) -> Result<Json<CheckoutStatus>, Refusal> {
    pool.guarded(request.source, async {
        let row = find(&pool, &id).await?;
        let now = Timestamp::now();
        if row.paid_at.is_none() && !pool.store.pay_checkout(&row.id, now).await? {
            return Err(Refusal::conflict("this checkout has expired: start another"));
        }
        tracing::warn!(checkout = %row.id, "paid WITHOUT COINS, as --development allows");
        Ok(Json(CheckoutStatus {
            status: CheckoutState::Confirmed,
            confirmations: None,
            required_confirmations: None,
            token: None,
        }))
    })
    .await
}

/// `GET /payment/checkout/{id}/page`: what a person sees. Who has the link sees the amount, never the token.
pub async fn page(
    State(pool): State<Arc<Pool>>,
    Path(id): Path<String>,
    request: Incoming,
) -> Result<impl IntoResponse, Refusal> {
    let row = pool.guarded(request.source, find(&pool, &id)).await?;
    let html = payment::page(&row, state_of(&row, Timestamp::now()));
    let policy = HeaderValue::from_static("default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'");
    Ok(([(header::CONTENT_SECURITY_POLICY, policy)], private(Html(html))))
}

fn state_of(row: &CheckoutRow, now: Timestamp) -> CheckoutState {
    if row.paid_at.is_some() {
        CheckoutState::Confirmed
    } else if row.expires_at <= now {
        CheckoutState::Expired
    } else {
        CheckoutState::Pending
    }
}

async fn find(pool: &Pool, id: &str) -> Result<CheckoutRow, Refusal> {
    let unknown = || Refusal::not_found("there is no such checkout here (any more): start another");
    let id: CheckoutId = id.parse().ok().ok_or_else(unknown)?;
    pool.store.checkout(&id).await?.ok_or_else(unknown)
}

/// The three terms of sale; the refusal names the one that does not hold.
fn check_terms(wallet: &str, price_usd: f64, interval: &str) -> Result<(), Refusal> {
    if wallet != REQUIRED_WALLET {
        return Err(Refusal::bad_request(format!(
            "`required_wallet` must be {REQUIRED_WALLET}"
        )));
    }
    // The two are the same literal read by the same rules, so equality is exact.
    if price_usd.to_bits() != REQUIRED_PRICE_USD.to_bits() {
        return Err(Refusal::bad_request(format!(
            "`required_price_usd` must be {REQUIRED_PRICE_USD}"
        )));
    }
    if interval != REQUIRED_INTERVAL {
        return Err(Refusal::bad_request(format!(
            "`required_interval` must be {REQUIRED_INTERVAL:?}"
        )));
    }
    Ok(())
}

fn private(body: impl IntoResponse) -> impl IntoResponse {
    ([(header::CACHE_CONTROL, HeaderValue::from_static("no-store"))], body)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(expires_at: Timestamp) -> Token {
        Token {
            expires_at,
            used: false,
            revoked: None,
        }
    }

    #[test]
    fn a_paid_month_reads_as_the_contract_writes_it() {
        let end = Timestamp::from_second(2_000_000_000).unwrap();
        let json = serde_json::to_string(&answer(Some(&token(end)), Timestamp::from_second(1).unwrap())).unwrap();
        assert_eq!(
            json,
            r#"{"active":true,"wallet":"1MUss4jmaRJ2sMtS9gyZqeRw8WrhWTsrxn","interval":"monthly","amount_usd":9.99,"expires_at":"2033-05-18T03:33:20Z"}"#
        );
    }

    #[test]
    fn over_revoked_and_unknown_are_not_active() {
        let end = Timestamp::from_second(1000).unwrap();
        assert!(!answer(Some(&token(end)), end).active);
        let before = Timestamp::from_second(999).unwrap();
        assert!(answer(Some(&token(end)), before).active);
        let revoked = Token {
            revoked: Some("abuse".into()),
            ..token(end)
        };
        let refused = answer(Some(&revoked), before);
        assert!(!refused.active && refused.error.unwrap().contains("abuse"));
        let unknown = answer(None, end);
        assert!(!unknown.active && unknown.error.is_some() && unknown.expires_at.is_none());
    }

    #[test]
    fn each_term_of_sale_is_named_when_it_does_not_hold() {
        assert!(check_terms(REQUIRED_WALLET, 9.99, "monthly").is_ok());
        for (wallet, price, interval, named) in [
            ("1Else", 9.99, "monthly", "required_wallet"),
            (REQUIRED_WALLET, 9.98, "monthly", "required_price_usd"),
            (REQUIRED_WALLET, f64::NAN, "monthly", "required_price_usd"),
            (REQUIRED_WALLET, 9.99, "yearly", "required_interval"),
        ] {
            let refusal = check_terms(wallet, price, interval).unwrap_err();
            assert!(format!("{refusal:?}").contains(named), "{refusal:?}");
        }
    }
}
