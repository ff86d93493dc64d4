//! One node is provider and client at once: its clients' traffic leaves by its uplink, its own through another provider.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use dvpn_common::{contract::Reachability, status::PaymentStatus};
use dvpn_tests::{
    https,
    network::NetworkConfig,
    node,
    world::{CONNECT_PATIENCE, World, unique_id},
};

const TIMEOUT: Duration = Duration::from_secs(5);
const PATIENCE: Duration = Duration::from_secs(30);

#[test]
fn a_node_serves_its_clients_by_its_uplink_while_it_is_itself_a_client_elsewhere() -> Result<()> {
    serves_and_connects("app")
}

#[test]
fn so_does_a_node_all_of_whose_own_traffic_goes_through_its_tunnel() -> Result<()> {
    serves_and_connects("device")
}

/// The node's own `TUNNEL_MODE`.
fn serves_and_connects(mode: &str) -> Result<()> {
    let config = NetworkConfig::with_round_trips(&unique_id(), &[8, 10]);
    let mut world = World::build_with(&config, |environment| environment.with("PROVIDERS_ONLY", "provider-a"))?;
    if mode == "device" {
        let mut daemon = world.providers.remove(0);
        daemon.process.kill()?;
        let environment = daemon.environment.clone().with("TUNNEL_MODE", mode);
        drop(daemon);
        let machine = world.network.providers.first().context("the node's machine")?;
        let again = node::Daemon::spawn(&world.network, machine, environment)?;
        world.providers.insert(0, again);
        node::wait_until_listed(&world.network, &world.ca(), 2, PATIENCE).with_context(|| {
            world
                .providers
                .first()
                .map(|daemon| daemon.process.log_tail())
                .unwrap_or_default()
        })?;
    }
    let [node, other] = world.network.providers.as_slice() else {
        anyhow::bail!("two providers")
    };
    let daemon = world.providers.first().context("the node's daemon")?;
    world.pay_and_connect()?;
    ensure!(
        world.ask().exit_address(TIMEOUT)? == node.address,
        "the client leaves through the node"
    );

    // The node pays and connects too: to the other one, never to itself.
    let checkout = daemon.client.begin_checkout()?;
    https::development_pay(&node.namespace, &world.ca(), &node::payment_url(), &checkout)?;
    daemon.client.wait_status("the token", CONNECT_PATIENCE, |status| {
        status.payment == PaymentStatus::Paid || status.problem.is_none()
    })?;
    let status = daemon
        .client
        .connect(CONNECT_PATIENCE)
        .with_context(|| format!("the node's log ends:\n{}", daemon.process.log_tail()))?;
    ensure!(
        status
            .candidates
            .iter()
            .all(|candidate| candidate.id.as_str() != "provider-a"),
        "a node is no candidate of its own: {:?}",
        status.candidates
    );
    ensure!(
        daemon.client.exit_address(TIMEOUT)? == other.address,
        "the node's own traffic leaves elsewhere"
    );
    if mode == "device" {
        let exit = dvpn_tests::leak::exit_address(&node.namespace, TIMEOUT)?;
        ensure!(
            exit == std::net::IpAddr::V4(other.address),
            "an ordinary program leaves through {exit}"
        );
    }
    ensure!(
        world.ask().exit_address(TIMEOUT)? == node.address,
        "its client's traffic goes by the node's uplink and not into the node's tunnel"
    );

    // A connection made while both sides stand, and after the node's own session is over.
    world.ask().disconnect(CONNECT_PATIENCE)?;
    world.ask().connect(CONNECT_PATIENCE)?;
    ensure!(world.ask().exit_address(TIMEOUT)? == node.address);
    let seen = daemon
        .client
        .wait_status("a client that is counted as active", PATIENCE, |status| {
            status
                .node
                .as_ref()
                .is_some_and(|node| node.clients >= 1 && node.active >= 1)
        })?;
    let side = seen.node.context("the provider side in /health")?;
    ensure!(side.listed && side.up && side.admission == "open", "{side:?}");
    ensure!(
        matches!(side.reachability, None | Some(Reachability::Reachable)),
        "{side:?}"
    );
    daemon.client.disconnect(CONNECT_PATIENCE)?;
    ensure!(world.ask().exit_address(TIMEOUT)? == node.address);
    let (_, metrics) = daemon.client.control("/metrics")?;
    ensure!(
        metrics.contains("dvpn_provider_client_bytes_total{client="),
        "clients are counted by number:\n{metrics}"
    );
    Ok(())
}

#[test]
fn an_owner_who_did_not_accept_the_terms_is_told_and_is_no_provider() -> Result<()> {
    let mut world = World::build(&[8])?;
    let machine = world.network.providers.first().context("a machine")?;
    let gone = world.providers.pop().context("its daemon")?;
    let environment = gone.environment.clone();
    // Killed: what it had set up is left behind for the next start to undo.
    let mut gone = gone;
    gone.process.kill()?;
    drop(gone);
    ensure!(
        machine
            .namespace
            .output("nft", &["list", "tables"])?
            .contains("dvpn_provider")
    );
    let daemon = node::Daemon::spawn(&world.network, machine, environment.with("NODE_ACCEPT_TERMS", "false"))?;
    let status = daemon
        .client
        .wait_status("the reason", PATIENCE, |status| status.node.is_some())?;
    let problem = status.node.and_then(|node| node.problem).context("a problem")?;
    ensure!(problem.how.contains("NODE_ACCEPT_TERMS=true"), "{problem:?}");
    ensure!(
        !machine
            .namespace
            .output("nft", &["list", "tables"])?
            .contains("dvpn_provider"),
        "nothing of an earlier provider side stands"
    );
    Ok(())
}
