//! Pool, provider and client as programs, all tunnels in the kernel.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use dvpn_common::status::{StateName, TunnelBackend};
use dvpn_tests::{
    node::{self, Daemon},
    world::{CONNECT_PATIENCE, World},
};

const PATIENCE: Duration = Duration::from_secs(20);

#[test]
fn a_paid_session_runs_in_the_kernel_from_end_to_end_and_survives_a_killed_daemon() -> Result<()> {
    let mut world = World::build(&[8])?;
    let status = world.pay_and_connect()?;
    ensure!(status.backend == Some(TunnelBackend::Kernel), "{status:?}");
    let exit = world.ask().exit_address(PATIENCE)?;
    ensure!(exit == world.address_of(&status)?, "the web server saw {exit}");
    println!("exit address: {exit}, /health: {}", serde_json::to_string(&status)?);

    let kind = |world: &World| {
        world
            .ask()
            .namespace()
            .output("ip", &["-d", "-o", "link", "show", "dvpn0"])
    };
    ensure!(kind(&world)?.contains("wireguard"), "{}", kind(&world)?);
    for machine in &world.network.providers {
        let link = machine
            .namespace
            .output("ip", &["-d", "-o", "link", "show", "dvpnp0"])?;
        ensure!(link.contains("wireguard"), "{link}");
    }

    // The link of a killed daemon outlives it: the next one makes its own in its place.
    world.client.process.kill()?;
    ensure!(kind(&world)?.contains("wireguard"), "the link went with its daemon");
    let environment = node::client_environment(&world.ca());
    world.client = Daemon::spawn(&world.network, &world.network.client, environment)?;
    let status = world
        .ask()
        .wait_state(StateName::Connected, CONNECT_PATIENCE)
        .with_context(|| world.client.process.log_tail())?;
    ensure!(status.backend == Some(TunnelBackend::Kernel), "{status:?}");
    ensure!(world.ask().exit_address(PATIENCE)? == world.address_of(&status)?);

    let status = world.ask().disconnect(CONNECT_PATIENCE)?;
    ensure!(status.backend.is_none(), "{status:?}");
    ensure!(kind(&world).is_err(), "the link is left after Stop");
    Ok(())
}
