//! A connection that ends while the pool is down is given back once the pool is there again.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use dvpn_tests::{
    node,
    process::wait_for,
    world::{CONNECT_PATIENCE, World},
};

use crate::database::Database;

/// The client's longest pause between two tries, and room.
const PATIENCE: Duration = Duration::from_secs(70);
/// After this the provider takes a connection without handshakes for over by itself.
const BY_ITSELF: Duration = Duration::from_mins(3);

#[test]
fn a_release_that_the_pool_did_not_hear_is_told_again_until_it_does() -> Result<()> {
    let mut world = World::build(&[8])?;
    world.pay_and_connect()?;
    let mut database = Database::open(&world)?;
    let standing = database.approvals()?;
    ensure!(
        standing.len() == 1 && standing.iter().all(|row| !row.released),
        "{standing:?}"
    );
    let active = |world: &World| -> Result<Option<u64>> {
        let provider = world.providers.first().context("a provider")?;
        Ok(provider.client.health()?.1.node.map(|node| node.active))
    };
    wait_for("an active connection", Duration::from_secs(20), || {
        Ok((active(&world)? == Some(1)).then_some(()))
    })?;

    world.pool.kill()?;
    let stopped = Instant::now();
    world.ask().disconnect(CONNECT_PATIENCE)?;
    wait_for("the client's word of it", Duration::from_secs(10), || {
        Ok(world
            .client
            .process
            .log_text()
            .contains("it is told again")
            .then_some(()))
    })
    .with_context(|| world.client.process.log_tail())?;
    let still = database.approvals()?;
    ensure!(still == standing, "{standing:?}, then {still:?}");

    world.pool = node::spawn_pool(&world.network, &world.identity)?;
    wait_for("the release at the pool", PATIENCE, || {
        let rows = database.approvals()?;
        Ok((rows.len() == 1 && rows.iter().all(|row| row.released)).then_some(()))
    })
    .with_context(|| world.client.process.log_tail())?;
    wait_for("the release at the provider", PATIENCE, || {
        Ok((active(&world)? == Some(0)).then_some(()))
    })?;
    let took = stopped.elapsed();
    ensure!(took < BY_ITSELF, "{took:?}: the provider may have found out by itself");

    // What comes next is not given back with it.
    node::wait_until_listed(&world.network, &world.ca(), 1, Duration::from_secs(30))?;
    world.ask().connect(CONNECT_PATIENCE)?;
    world.ask().exit_address(Duration::from_secs(5))?;
    let next = database.approvals()?;
    ensure!(next.iter().any(|row| !row.released && row.acknowledged), "{next:?}");
    Ok(())
}
