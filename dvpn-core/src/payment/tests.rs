use proptest::prelude::*;

use super::*;

fn now() -> Timestamp {
    Timestamp::from_second(1_800_000_000).unwrap()
}

fn with_amount(amount: &str) -> String {
    format!(
        r#"{{"active":true,"wallet":"{REQUIRED_WALLET}","interval":"monthly","amount_usd":{amount},"extra":{{"a":[1]}}}}"#
    )
}

fn judged(body: &str) -> Verification {
    judge(200, body.as_bytes(), now())
}

fn not_paid_because(body: &str, rule: &str) {
    match judged(body) {
        Verification::NotPaid(failure) => {
            assert!(failure.what.contains(rule), "{body}: {failure}");
            assert_eq!(failure.retry, Retry::Never);
        }
        other @ (Verification::Paid(_) | Verification::CannotTell(_)) => panic!("{body}: {other:?}"),
    }
}

fn cannot_tell_of(status: u16, body: &[u8]) {
    match judge(status, body, now()) {
        Verification::CannotTell(failure) => assert_eq!(failure.retry, Retry::Backoff),
        other @ (Verification::Paid(_) | Verification::NotPaid(_)) => panic!("{status}: {other:?}"),
    }
}

#[test]
fn amounts_of_at_least_nine_ninety_nine_are_paid() {
    for amount in [
        "9.99",
        "9.990",
        "9.991",
        "10",
        "10.0",
        "9.99000000000000000000000000000001",
        "9007199254740991.99",
    ] {
        match judged(&with_amount(amount)) {
            Verification::Paid(subscription) => {
                assert_eq!(subscription.valid_until(), now() + DEFAULT_VALIDITY, "{amount}");
                assert_eq!(subscription.verified_at(), now());
            }
            other @ (Verification::NotPaid(_) | Verification::CannotTell(_)) => panic!("{amount}: {other:?}"),
        }
    }
}

#[test]
fn every_other_amount_is_refused_by_its_rule() {
    for (amount, reason) in [
        ("9.98", "at least 9.99"),
        ("9.989999", "at least 9.99"),
        ("9.9", "at least 9.99"),
        ("9", "at least 9.99"),
        ("0", "at least 9.99"),
        ("\"9.99\"", "is a string"),
        ("NaN", "not a number"),
        ("Infinity", "not a number"),
        ("-Infinity", "not a number"),
        ("9.99e0", "exponent"),
        ("999E-2", "exponent"),
        ("1e400", "exponent"),
        ("99999999999999999999", "beyond 2^53"),
        ("9007199254740993", "beyond 2^53"),
        ("-9.99", "negative"),
        ("-0", "negative"),
        ("true", "not a number"),
        ("[9.99]", "not a number"),
        ("{\"usd\":9.99}", "not a number"),
        ("null", "missing"),
    ] {
        not_paid_because(&with_amount(amount), "amount_usd");
        not_paid_because(&with_amount(amount), reason);
    }
}

#[test]
fn each_rule_is_named_when_it_does_not_hold() {
    let good = with_amount("9.99");
    for (from, to, rule) in [
        ("true", "false", "active"),
        ("true", "\"true\"", "active"),
        ("true", "1", "active"),
        ("\"active\":true,", "", "active"),
        ("1MUss4", "1MUss5", "wallet"),
        (
            "1MUss4jmaRJ2sMtS9gyZqeRw8WrhWTsrxn",
            " 1MUss4jmaRJ2sMtS9gyZqeRw8WrhWTsrxn",
            "wallet",
        ),
        ("\"wallet\"", "\"valet\"", "wallet"),
        ("monthly", "yearly", "interval"),
        ("monthly", "Monthly", "interval"),
        ("\"interval\"", "\"x\"", "interval"),
        ("\"amount_usd\"", "\"amount\"", "amount_usd"),
    ] {
        not_paid_because(&good.replacen(from, to, 1), rule);
    }
    not_paid_because("{}", "active");
    // The same text, written otherwise, is the same text.
    assert!(matches!(
        judged(&good.replacen("monthly", "month\\u006cy", 1)),
        Verification::Paid(_)
    ));
}

#[test]
fn an_end_is_read_from_text_or_seconds_and_must_be_ahead() {
    let with_end = |end: &str| with_amount("9.99").replacen('{', &format!("{{\"expires_at\":{end},"), 1);
    let end = now() + SignedDuration::from_hours(700);
    for text in [format!("\"{end}\""), end.as_second().to_string()] {
        match judged(&with_end(&text)) {
            Verification::Paid(subscription) => assert_eq!(subscription.valid_until(), end),
            other @ (Verification::NotPaid(_) | Verification::CannotTell(_)) => panic!("{text}: {other:?}"),
        }
    }
    assert!(matches!(judged(&with_end("null")), Verification::Paid(s) if s.valid_until() == now() + DEFAULT_VALIDITY));
    not_paid_because(&with_end(&format!("\"{}\"", now())), "ended");
    not_paid_because(&with_end("0"), "ended");
    for bad in ["\"soon\"", "1.5", "99999999999999999999", "[]", "\"\""] {
        cannot_tell_of(200, with_end(bad).as_bytes());
    }
}

#[test]
fn what_is_no_answer_says_nothing() {
    let good = with_amount("9.99");
    for status in [100, 301, 302, 400, 401, 403, 404, 429, 500, 502, 503] {
        cannot_tell_of(status, good.as_bytes());
    }
    for length in 0..good.len() {
        cannot_tell_of(200, &good.as_bytes()[..length]);
    }
    for body in [
        "<html>200 OK</html>",
        "[]",
        "null",
        "true",
        "\"yes\"",
        "[true,\"w\",\"monthly\",9.99,null]",
    ] {
        cannot_tell_of(200, body.as_bytes());
    }
    cannot_tell_of(200, good.replacen('{', "{\"active\":false,", 1).as_bytes());
    cannot_tell_of(200, &[0xff; 20]);
    cannot_tell_of(200, good.replacen("[1]", "NaN", 1).as_bytes());
    cannot_tell_of(200, &[good.as_bytes(), &vec![b' '; MAX_BODY_BYTES]].concat());
    assert!(matches!(judge(402, b"", now()), Verification::NotPaid(_)));
    assert!(matches!(judge(201, good.as_bytes(), now()), Verification::Paid(_)));
}

#[test]
fn development_tokens_need_a_development_machine() {
    assert_eq!(check_token("dvpn_abc", false), Ok(()));
    assert_eq!(check_token("dev_abc", true), Ok(()));
    let refused = check_token("dev_abc", false).unwrap_err();
    assert!(refused.how.contains("DVPN_DEVELOPMENT=true"));
    for bad in ["", "a b", "a\r\nb", "ü", &"x".repeat(513)] {
        assert!(!check_token(bad, true).unwrap_err().to_string().contains("a\r\nb"));
    }
}

#[test]
fn the_request_is_the_contract_to_the_letter() {
    let body = serde_json::to_value(verify_request("t", "provider-a")).unwrap();
    let wanted = serde_json::json!({
        "token": "t", "provider_id": "provider-a", "required_wallet": "1MUss4jmaRJ2sMtS9gyZqeRw8WrhWTsrxn",
        "required_price_usd": 9.99, "required_interval": "monthly",
    });
    assert_eq!(body, wanted);
}

#[test]
fn a_sealed_subscription_is_good_for_its_token_only() {
    let key = seal::Key::derive(&seal::Material::KeyFile(zeroize::Zeroizing::new([1; 32])), [2; 16]).unwrap();
    let Verification::Paid(subscription) = judged(&with_amount("9.99")) else {
        panic!("not paid")
    };
    let sealed = subscription.seal("token", &key, [3; 12]).unwrap();
    assert_eq!(Subscription::open(&sealed, "token", &key), Ok(Some(subscription)));
    assert_eq!(Subscription::open(&sealed, "other", &key), Ok(None));
    let foreign = key.seal("token", &[0; 48], [4; 12]).unwrap();
    assert_eq!(
        Subscription::open(&foreign, "token", &key),
        Err(seal::Error::OtherPurpose)
    );
}

proptest! {
    #[test]
    fn an_amount_is_compared_exactly(dollars in 0_u64..30, fraction in "[0-9]{1,30}") {
        let is_paid = matches!(judged(&with_amount(&format!("{dollars}.{fraction}"))), Verification::Paid(_));
        // Exact decimal comparison by text: more than 9, or 9 and a fraction that begins with 99.
        prop_assert_eq!(is_paid, dollars > 9 || (dollars == 9 && fraction.starts_with("99")));
    }

    #[test]
    fn nothing_but_a_whole_answer_is_paid(status in any::<u16>(), body in "\\PC{0,200}") {
        prop_assert!(!matches!(judge(status, body.as_bytes(), now()), Verification::Paid(_)));
    }
}
