//! The pool changes its key under a running tunnel: nobody asks for a list, and nobody is cut off.

use std::{process::Command, time::Duration};

use anyhow::{Context as _, Result, ensure};
use dvpn_common::status::StateName;
use dvpn_tests::{
    node,
    process::{program, wait_for},
    world::World,
};

/// Renewed at half of it.
const APPROVAL_SECONDS: &str = "30";
const PATIENCE: Duration = Duration::from_mins(1);

fn context(world: &World) -> String {
    let provider = world.providers.first().map(|daemon| daemon.process.log_tail());
    format!(
        "the client's log ends:\n{}\nthe provider's:\n{}\nthe pool's:\n{}",
        world.client.process.log_tail(),
        provider.unwrap_or_default(),
        world.pool.log_tail()
    )
}

#[test]
fn a_tunnel_outlives_a_change_of_the_pools_key_and_is_renewed_under_the_new_one() -> Result<()> {
    let mut world = World::build(&[8])?;
    world.pool.kill()?;
    world.pool = node::spawn_pool_with(
        &world.network,
        &world.identity,
        &["--approval-seconds", APPROVAL_SECONDS],
    )?;
    node::wait_until_listed(&world.network, &world.ca(), 1, PATIENCE)?;
    let before = world.pay_and_connect()?;
    let said = |world: &World, what: &str| world.client.process.log_text().matches(what).count();
    let renewed_before = said(&world, "tunnel_renewed");

    let done = Command::new(program("dvpn-pool")?)
        .args(["rotate-key", "--database"])
        .arg(world.network.pool.directory.join("pool.sqlite"))
        .output()
        .context("running dvpn-pool rotate-key")?;
    ensure!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let provider = |world: &World| world.providers.first().map(|daemon| daemon.process.log_text());
    wait_for("the provider's word on the new key", PATIENCE, || {
        let log = provider(&world).unwrap_or_default();
        Ok(log.contains("the pool changed its key to").then_some(()))
    })
    .with_context(|| context(&world))?;
    let exit = world.ask().exit_address(Duration::from_secs(5))?;
    wait_for("a renewal under the new key", PATIENCE, || {
        Ok((said(&world, "tunnel_renewed") > renewed_before).then_some(()))
    })
    .with_context(|| context(&world))?;
    wait_for("the client's word on the new key", PATIENCE, || {
        Ok((said(&world, "the old one vouches for it") == 1).then_some(()))
    })
    .with_context(|| context(&world))?;

    let (_, after) = world.ask().health()?;
    ensure!(
        after.state == StateName::Connected && (after.attempts, after.switches) == (before.attempts, before.switches),
        "{before:?}, then {after:?}; {}",
        context(&world)
    );
    ensure!(said(&world, "approval_refused") == 0, "{}", context(&world));
    let refused = provider(&world).unwrap_or_default().matches("peer_refused").count();
    ensure!(refused == 0, "{}", context(&world));
    ensure!(world.ask().exit_address(Duration::from_secs(5))? == exit);
    Ok(())
}
