//! The whole chain: discover, probe, verify, approve, tunnel, proxy.

use std::{
    io::Read as _,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use dvpn_common::status::{PaymentStatus, StateName};
use dvpn_tests::{
    client::SOCKS5,
    network::{NetworkConfig, WEB, lan_host},
    socks::{self, Target},
    wire::{Jitter, Path},
    world::{CONNECT_PATIENCE, World, unique_id},
};

const TIMEOUT: Duration = Duration::from_secs(5);

#[test]
fn traffic_leaves_through_the_paid_provider_and_not_before_it_is_paid() -> Result<()> {
    let world = World::build(&[8, 10, 13])?;
    // Not paid: Start is refused with what to do, and no tunnel comes.
    world.ask().start()?;
    let refused = world
        .ask()
        .wait_status("a problem", TIMEOUT, |status| status.problem.is_some())?;
    let problem = refused.problem.context("a problem")?;
    ensure!(problem.what.contains("token"), "{problem:?}");
    ensure!(
        socks::connect(
            world.ask().namespace(),
            SOCKS5,
            Target::Address((WEB, 80).into()),
            TIMEOUT
        )
        .is_err()
    );
    ensure!(world.ask().checkout_field("paid_until")?.is_none());
    world.ask().stop()?;

    let status = world.pay_and_connect()?;
    ensure!(status.payment == PaymentStatus::Paid, "{status:?}");
    ensure!(
        status.candidates.len() == 3,
        "three candidates are measured: {:?}",
        status.candidates
    );
    let (code, _) = world.ask().health()?;
    ensure!(code == 200, "/health is {code} while connected");
    // Who begins to pay again is told until when the month is paid.
    let paid_until = status.paid_until.context("the end of the month")?.to_string();
    ensure!(world.ask().checkout_field("paid_until")? == Some(paid_until));

    // By name (resolved through the tunnel) and by address; the exit is the provider in use.
    let exit = world.ask().exit_address(TIMEOUT)?;
    ensure!(
        exit == world.address_of(&status)?,
        "the web server saw {exit}, the status says {:?}",
        status.provider
    );
    let target = Target::Address((WEB, 80).into());
    ensure!(
        world.ask().exit_address_to(target, TIMEOUT)? == exit,
        "another exit by address"
    );

    // Ten megabytes arrive whole.
    let response = world.ask().fetch("/bytes/10000000", TIMEOUT)?;
    let received = std::io::copy(&mut response.take(20_000_000), &mut std::io::sink())?;
    ensure!(received == 10_000_000, "{received} of 10000000 bytes");

    // The provider's private network is nobody's business; the same host answers from the provider itself.
    let number = u8::try_from(world.provider_number(status.provider.context("a provider")?.id.as_str())?)?;
    let lan = SocketAddr::from((lan_host(number), 8080));
    let machine = world
        .network
        .providers
        .get(usize::from(number))
        .context("the machine")?;
    let _listener = machine.lan.as_ref().context("its private network")?.listen(lan)?;
    machine.namespace.connect(lan, TIMEOUT)?;
    ensure!(
        socks::connect(world.ask().namespace(), SOCKS5, Target::Address(lan), TIMEOUT).is_err(),
        "the provider's private network is reachable"
    );

    let status = world.ask().disconnect(CONNECT_PATIENCE)?;
    ensure!(status.state == StateName::Disconnected && !status.autostart);
    ensure!(
        world.ask().exit_address(TIMEOUT).is_err(),
        "the proxy still carries after Stop"
    );
    Ok(())
}

#[test]
fn datagrams_pass_the_proxy_to_the_echo_beyond_the_provider() -> Result<()> {
    let world = World::build(&[8])?;
    world.pay_and_connect()?;
    let (_control, relay) = socks::associate(world.ask().namespace(), SOCKS5, TIMEOUT)?;
    let socket = world.ask().namespace().udp(IpAddr::V4(Ipv4Addr::LOCALHOST))?;
    socket.set_read_timeout(Some(Duration::from_millis(500)))?;
    let question = socks::datagram(Target::Address((WEB, 7).into()), b"is anybody there")?;
    let deadline = Instant::now() + Duration::from_secs(5);
    let mut buffer = [0; 2048];
    loop {
        socket.send_to(&question, relay)?;
        if let Ok((length, _)) = socket.recv_from(&mut buffer) {
            ensure!(socks::payload(&buffer[..length]) == Some(b"is anybody there".as_slice()));
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "no echo came back through the relay {relay}");
    }
}

/// 8, 10 and 13 ms with ± 1 ms of jitter and 2 % of loss, each way.
fn faulty_paths(id: &str) -> NetworkConfig {
    let mut config = NetworkConfig::with_round_trips(id, &[8, 10, 13]);
    for path in &mut config.providers {
        *path = Path {
            jitter: Jitter::Uniform(Duration::from_millis(1)),
            loss: 0.02,
            ..*path
        };
    }
    config
}

#[test]
fn the_nearest_of_three_providers_is_taken_in_95_of_100_sessions_despite_jitter_and_loss() -> Result<()> {
    let rounds: u32 = if std::env::var_os("DVPN_SOAK").is_some() {
        1000
    } else {
        100
    };
    let world = World::build_with(&faulty_paths(&unique_id()), |environment| {
        // All three are sampled each time, so that the nearest is always among the candidates.
        environment.with("MESH_SAMPLE_SIZE", "3")
    })?;
    world.pay()?;
    let mut nearest = 0;
    let mut others = Vec::new();
    for _ in 0..rounds {
        let status = world.ask().connect(CONNECT_PATIENCE)?;
        let provider = status.provider.context("a provider")?;
        if provider.id.as_str() == "provider-a" {
            nearest += 1;
        } else {
            others.push((provider.id, status.candidates));
        }
        world.ask().disconnect(CONNECT_PATIENCE)?;
    }
    ensure!(
        nearest * 100 >= rounds * 95,
        "the nearest in {nearest} of {rounds}; instead: {others:?}"
    );
    Ok(())
}
