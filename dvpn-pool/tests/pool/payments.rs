//! Checkout, token, verification.

use std::{collections::BTreeSet, time::Duration};

use dvpn_common::{
    contract::{CheckoutResponse, CheckoutState},
    limits::REQUIRED_WALLET,
};
use serde_json::json;

use crate::{
    node::TestNode,
    support::{Access, TestPool, client_key, refusal},
};

#[tokio::test]
async fn a_checkout_leads_to_a_token_that_verifies() {
    let pool = TestPool::start(|config| {
        config.payment_url = Some("https://pool.example/payment/".parse().unwrap());
    })
    .await;
    let checkout = pool.access.start_checkout("user").await;
    let sats = checkout.amount_sats.unwrap();
    assert!((9991..=10_089).contains(&sats));
    assert_eq!(checkout.amount_btc, Some(format!("0.{sats:08}")));
    let uri = checkout.bitcoin_uri.clone().unwrap();
    assert!(
        uri.starts_with(&format!("bitcoin:{REQUIRED_WALLET}?amount=0.000")),
        "{uri}"
    );
    let page = checkout.checkout_url.clone().unwrap();
    assert_eq!(
        page,
        format!("https://pool.example/payment/checkout/{}/page", checkout.session_id)
    );
    let html = pool
        .access
        .get(&format!("/payment/checkout/{}/page", checkout.session_id))
        .await
        .text()
        .await
        .unwrap();
    assert!(
        html.contains(checkout.amount_btc.as_deref().unwrap()) && html.contains("Development"),
        "{html}"
    );
    assert_eq!(
        pool.access.checkout_status(&checkout).await.status,
        CheckoutState::Pending
    );
    let token = pool.access.pay("user").await;
    assert!(token.starts_with("dev_") && token.len() == 68, "{token}");
    let verified = pool.access.verify(&token).await;
    assert!(verified.starts_with(
        r#"{"active":true,"wallet":"1MUss4jmaRJ2sMtS9gyZqeRw8WrhWTsrxn","interval":"monthly","amount_usd":9.99,"expires_at":"2"#
    ), "{verified}");
    assert!(pool.access.verify("dev_other").await.contains("\"active\":false"));
}

#[tokio::test]
async fn a_user_has_one_open_checkout_and_amounts_differ() {
    let pool = TestPool::start(|_| {}).await;
    let first = pool.access.start_checkout("user").await;
    let again = pool.access.start_checkout("user").await;
    assert_eq!(
        (&first.session_id, first.amount_sats, &first.secret),
        (&again.session_id, again.amount_sats, &again.secret)
    );
    let mut amounts = std::collections::BTreeSet::new();
    for number in 0..120 {
        assert!(
            amounts.insert(
                pool.access
                    .start_checkout(&format!("user-{number}"))
                    .await
                    .amount_sats
                    .unwrap()
            )
        );
    }
    pool.access.pay("user").await;
    assert_ne!(
        pool.access.start_checkout("user").await.session_id,
        first.session_id,
        "a paid one is over"
    );
}

/// A paid checkout, and the token that twenty questions at once are answered with.
async fn paid_checkout(pool: &TestPool) -> (CheckoutResponse, String) {
    let checkout = pool.access.start_checkout("user").await;
    assert!(pool.access.checkout_status(&checkout).await.token.is_none());
    pool.access
        .post(&format!("/payment/dev/pay/{}", checkout.session_id), &json!({}))
        .await;
    let asked = (0..20).map(|_| pool.access.checkout_status(&checkout));
    let answers = futures::future::join_all(asked).await;
    assert!(answers.iter().all(|answer| answer.status == CheckoutState::Confirmed));
    let tokens: BTreeSet<String> = answers.into_iter().map(|answer| answer.token.unwrap()).collect();
    assert_eq!(tokens.len(), 1, "the same token every time");
    (checkout, tokens.into_iter().next().unwrap())
}

#[tokio::test]
async fn a_token_is_repeated_until_it_is_verified_and_never_after() {
    let mut pool = TestPool::start(|_| {}).await;
    let (checkout, token) = paid_checkout(&pool).await;
    pool.restart().await;
    assert_eq!(
        pool.access.checkout_status(&checkout).await.token.as_deref(),
        Some(token.as_str()),
        "a restart loses no payment"
    );
    assert!(pool.access.verify("dev_other").await.contains("\"active\":false"));
    assert!(pool.access.checkout_status(&checkout).await.token.is_some());
    assert!(pool.access.verify(&token).await.contains("\"active\":true"));
    assert!(pool.access.checkout_status(&checkout).await.token.is_none());
}

#[tokio::test]
async fn a_token_is_repeated_until_a_key_is_approved_for_it() {
    let pool = TestPool::start(|_| {}).await;
    let _node = TestNode::new(&pool.access, "node-a", 1).await.serve().await;
    let (checkout, token) = paid_checkout(&pool).await;
    assert_eq!(pool.access.approve("node-x", &token, client_key(1)).await.status(), 404);
    assert!(pool.access.checkout_status(&checkout).await.token.is_some());
    pool.access.approved("node-a", &token, client_key(1)).await;
    assert!(pool.access.checkout_status(&checkout).await.token.is_none());
}

#[tokio::test]
async fn only_the_holder_of_the_secret_learns_the_state() {
    let pool = TestPool::start(|_| {}).await;
    let checkout = pool.access.start_checkout("user").await;
    let other = pool.access.start_checkout("other").await;
    let path = format!("/payment/checkout/{}", checkout.session_id);
    assert_eq!(refusal(pool.access.get(&path).await).await.0, 401);
    let url = format!("{}{path}", pool.access.base);
    let with_other = pool
        .access
        .client
        .get(&url)
        .bearer_auth(other.secret.as_deref().unwrap())
        .send()
        .await
        .unwrap();
    assert_eq!(with_other.status(), 401);
    assert_eq!(
        refusal(pool.access.post("/payment/dev/pay/none", &json!({})).await)
            .await
            .0,
        404
    );
}

#[tokio::test]
async fn other_terms_are_refused_by_name() {
    let pool = TestPool::start(|_| {}).await;
    for (field, value, says) in [
        ("required_wallet", json!("1Other"), "required_wallet"),
        ("required_price_usd", json!(9.98), "required_price_usd"),
        ("required_price_usd", json!("9.99"), "9.99"),
        ("required_interval", json!("yearly"), "required_interval"),
        ("user_id", json!("not an id"), "identifier"),
    ] {
        let mut wish = Access::checkout_wish("user");
        wish[field] = value;
        let (status, error) = refusal(pool.access.post("/payment/checkout/start", &wish).await).await;
        assert_eq!(status, 400);
        assert!(error.contains(says), "{error}");
    }
}

#[tokio::test]
async fn an_expired_quote_cannot_be_paid() {
    let pool = TestPool::start(|config| config.timing.quote_life = Duration::from_secs(1)).await;
    let checkout = pool.access.start_checkout("user").await;
    crate::support::eventually(|| async {
        pool.access.checkout_status(&checkout).await.status == CheckoutState::Expired
    })
    .await;
    let (status, error) = refusal(
        pool.access
            .post(&format!("/payment/dev/pay/{}", checkout.session_id), &json!({}))
            .await,
    )
    .await;
    assert_eq!(status, 409);
    assert!(error.contains("expired"), "{error}");
    assert_ne!(pool.access.start_checkout("user").await.session_id, checkout.session_id);
}

#[tokio::test]
async fn neither_tokens_nor_secrets_are_stored() {
    let mut pool = TestPool::start(|_| {}).await;
    let checkout = pool.access.start_checkout("user").await;
    let secret = checkout.secret.clone().unwrap();
    let token = pool.access.pay("user").await;
    pool.stop().await;
    let bytes = std::fs::read(pool.database()).unwrap();
    let holds = |text: &str| bytes.windows(text.len()).any(|window| window == text.as_bytes());
    assert!(holds(checkout.session_id.as_str()), "the search finds what is stored");
    assert!(!holds(&token) && !holds(token.trim_start_matches("dev_")) && !holds(&secret));
    assert!(
        !pool.database().with_extension("db-wal").exists(),
        "nothing is left in the log"
    );
}
