//! What does not count as paid, said by a real payment server: each is refused, names its rule, and makes no tunnel.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context as _, Result, ensure};
use dvpn_common::status::{PaymentStatus, StateName};
use dvpn_tests::{
    network::{NetworkConfig, POOL},
    world::{World, unique_id},
};

use crate::counterpart::Counterpart;

const WALLET: &str = "1MUss4jmaRJ2sMtS9gyZqeRw8WrhWTsrxn";

fn body(active: &str, wallet: &str, interval: &str, amount: &str) -> String {
    format!(r#"{{"active":{active},"wallet":"{wallet}","interval":"{interval}","amount_usd":{amount}}}"#)
}

/// Every refusal: what the server says, and the words that name the rule.
fn refusals() -> Vec<(&'static str, String, &'static str)> {
    let paid = |amount: &str| body("true", WALLET, "monthly", amount);
    vec![
        ("unpaid", body("false", WALLET, "monthly", "9.99"), "active"),
        ("active as text", body("\"true\"", WALLET, "monthly", "9.99"), "active"),
        (
            "wrong wallet",
            body("true", "1BoatSLRHtKNngkdXEeobR76b53LETtpyT", "monthly", "9.99"),
            "wallet",
        ),
        ("wrong interval", body("true", WALLET, "yearly", "9.99"), "interval"),
        ("9.98", paid("9.98"), "9.99"),
        ("9.99 as text", paid("\"9.99\""), "string"),
        ("NaN", paid("NaN"), "number"),
        ("9.99e0", paid("9.99e0"), "exponent"),
    ]
}

#[test]
fn an_answer_that_breaks_one_rule_is_refused_by_its_name_and_makes_no_tunnel() -> Result<()> {
    let at = SocketAddr::from((POOL, 9443));
    let config = NetworkConfig::with_round_trips(&unique_id(), &[4]);
    let world = World::build_with(&config, |environment| {
        environment
            .with("PAYMENT_API_URL", format!("https://{at}/payment"))
            .with("PAYMENT_TOKEN", "token-of-a-test")
    })?;
    let server = Counterpart::serve(&world.network.pool.namespace, at, &world.identity)?;
    for (case, answer, rule) in refusals() {
        server.answer("POST", "/payment", 200, answer);
        let before = (server.asked("POST", "/payment").len(), world.ask().health()?.1.attempts);
        world.ask().start()?;
        let status = world
            .ask()
            .wait_status(case, Duration::from_secs(10), |status| {
                status.attempts > before.1 && status.problem.is_some()
            })
            .with_context(|| format!("{case}: the log ends:\n{}", world.client.process.log_tail()))?;
        let problem = status.problem.context("a problem")?;
        ensure!(
            problem.what.contains(rule),
            "{case}: the rule {rule:?} is not named by {problem:?}"
        );
        ensure!(status.payment == PaymentStatus::Unpaid, "{case}: {:?}", status.payment);
        ensure!(
            server.asked("POST", "/payment").len() > before.0,
            "{case}: the payment server was not asked"
        );
        let links = world.ask().namespace().output("ip", &["-o", "link"])?;
        ensure!(!links.contains("dvpn0"), "{case}: a tunnel interface exists:\n{links}");
        world.ask().stop()?;
        world
            .ask()
            .wait_state(StateName::Disconnected, Duration::from_secs(5))?;
    }
    // The control: the same server, the same client, a good answer gets past the payment. (The pool, which does not
    // know this token, then refuses on its own.)
    server.answer("POST", "/payment", 200, body("true", WALLET, "monthly", "9.99"));
    world.ask().start()?;
    world
        .ask()
        .wait_status("a paid answer", Duration::from_secs(10), |status| {
            status.payment == PaymentStatus::Paid
        })?;
    Ok(())
}
