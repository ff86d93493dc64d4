//! A pool that turns hostile under a running client: the tunnel and the old state stay, and the problem is visible.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context as _, Result, ensure};
use dvpn_common::{
    limits::{REQUIRED_INTERVAL, REQUIRED_WALLET},
    status::StateName,
};
use dvpn_tests::{
    network::POOL,
    node::{self, POOL_PORT},
    process::wait_for,
    world::{CONNECT_PATIENCE, World},
};

use serde_json::Value;

use crate::counterpart::Counterpart;

#[test]
fn a_pool_that_turns_hostile_costs_no_tunnel_and_is_a_visible_problem() -> Result<()> {
    let mut world = World::build(&[8, 10])?;
    let before = world.pay_and_connect()?;
    world.pool.kill()?;
    let hostile = Counterpart::serve(
        &world.network.pool.namespace,
        SocketAddr::from((POOL, POOL_PORT)),
        &world.identity,
    )?;
    // One provider more than a list may have, all well formed.
    let list: Vec<String> = (0..10_001)
        .map(|n| format!(r#"{{"id":"evil-{n}","endpoint":"203.0.113.66:1","public_key":""}}"#))
        .collect();
    hostile.answer("GET", "/providers", 200, format!("[{}]", list.join(",")));
    let paid =
        format!(r#"{{"active":true,"wallet":"{REQUIRED_WALLET}","interval":"{REQUIRED_INTERVAL}","amount_usd":9.99}}"#);
    hostile.answer("POST", "/payment", 200, paid);

    // The tunnel does not care.
    let exit = world.ask().exit_address(Duration::from_secs(5))?;
    ensure!(exit == world.address_of(&before)?, "the exit became {exit}");
    let now = world.ask().health()?;
    ensure!(now.0 == 200 && now.1.switches == before.switches, "{now:?}");

    // Its provider dies: the list is asked for, refused whole, and /health says why.
    let number = world.provider_number(before.provider.context("a provider")?.id.as_str())?;
    world.providers.get_mut(number).context("its process")?.process.kill()?;
    wait_for("a question for the list", Duration::from_secs(20), || {
        Ok(Some(()).filter(|()| !hostile.asked("GET", "/providers").is_empty()))
    })?;
    let status = world
        .ask()
        .wait_status("the list as the problem", Duration::from_secs(10), |status| {
            status
                .problem
                .as_ref()
                .is_some_and(|problem| problem.what.contains("10000"))
        })?;
    let problem = status.problem.context("a problem")?;
    ensure!(!problem.how.is_empty(), "{problem:?}");
    let answered = status
        .candidates
        .iter()
        .any(|candidate| candidate.id.as_str().starts_with("evil"));
    ensure!(!answered, "candidates of a refused list: {:?}", status.candidates);
    // The list from before holds: its other provider is measured, and asked for.
    let other = format!("provider-{}", if number == 0 { "b" } else { "a" });
    wait_for(
        "an approval at a provider of the old list",
        Duration::from_secs(30),
        || {
            let asked = hostile.asked("POST", "/providers/approve");
            let bodies = asked
                .iter()
                .filter_map(|body| serde_json::from_slice::<Value>(body).ok());
            let mut ids = bodies.filter_map(|body| Some(body.get("provider_id")?.as_str()?.to_owned()));
            Ok(ids.any(|id| id == other).then_some(()))
        },
    )?;

    // The real pool comes back, and so does the client, by itself.
    drop(hostile);
    world.pool = node::spawn_pool(&world.network, &world.identity)?;
    let patience = CONNECT_PATIENCE + Duration::from_secs(40);
    let status = world.ask().wait_state(StateName::Connected, patience)?;
    ensure!(world.ask().exit_address(Duration::from_secs(5))? == world.address_of(&status)?);
    Ok(())
}
