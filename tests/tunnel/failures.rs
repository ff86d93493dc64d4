//! What goes wrong, and what is left then.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use dvpn_daemon::tunnel::Error;

use crate::{
    SLOWNESS,
    bed::{INTERFACE, SOON, Setup, config, eventually, key, open, pair},
    create, side,
};

#[test]
fn a_deleted_interface_is_reported() -> Result<()> {
    for offload in [true, false] {
        let pair = pair(Setup {
            offload,
            ..Setup::default()
        })?;
        pair.transfer("10.88.0.2", 1 << 16, SOON)?;
        let tunnel = pair.tunnels[0].clone();
        let started = Instant::now();
        pair.sides[0].sh(&format!("ip link del {INTERFACE}"))?;
        let reason = pair.sides[0].run(async move { tokio::time::timeout(SOON, tunnel.died()).await })??;
        ensure!(reason.contains("deleted"), "{reason}");
        ensure!(
            started.elapsed() < Duration::from_secs(1) * SLOWNESS,
            "reported after {:?}",
            started.elapsed()
        );
    }
    Ok(())
}

#[test]
fn a_stranger_gets_nothing() -> Result<()> {
    let sides = side::joined_pair()?;
    let provider = open(&sides[1], 2, config(2, Setup::default()))?;
    let mut stranger = config(1, Setup::default());
    stranger.private_key = key(9).0;
    let tunnel = open(&sides[0], 1, stranger)?;
    let timeout = Duration::from_millis(1500) * SLOWNESS;
    let shaken = sides[0].run(async move { tunnel.force_handshake(key(2).1, timeout).await })?;
    ensure!(matches!(shaken, Err(Error::NoHandshake(..))), "{shaken:?}");
    let stats = sides[1].run(async move { provider.stats().await })??;
    ensure!(
        stats.iter().all(|peer| peer.tx_bytes == 0 && peer.endpoint.is_none()),
        "{stats:?}"
    );
    Ok(())
}

#[test]
fn a_forced_handshake_recovers_a_forgotten_session() -> Result<()> {
    let mut pair = pair(Setup::default())?;
    pair.transfer("10.88.0.2", 1 << 16, SOON)?;
    // The provider restarts with the same key and knows no session.
    let stand_in = pair.tunnels[0].clone();
    let forgetful = std::mem::replace(&mut pair.tunnels[1], stand_in);
    ensure!(
        std::sync::Arc::strong_count(&forgetful) == 1,
        "the device would live on"
    );
    pair.sides[1].run(async move { drop(forgetful) })?;
    eventually("the interface is gone", || {
        Ok(!pair.sides[1].sh("ip -o link")?.contains(INTERFACE))
    })?;
    pair.tunnels[1] = open(&pair.sides[1], 2, config(2, Setup::default()))?;
    let tunnel = pair.tunnels[0].clone();
    let started = Instant::now();
    pair.sides[0].run(async move { tunnel.force_handshake(key(2).1, SOON).await })??;
    let took = started.elapsed();
    ensure!(took < Duration::from_secs(1) * SLOWNESS, "{took:?}");
    pair.transfer("10.88.0.2", 1 << 16, SOON)?;
    Ok(())
}

#[test]
fn a_missing_route_does_not_kill_the_tunnel() -> Result<()> {
    let pair = pair(Setup::default())?;
    pair.transfer("10.88.0.2", 1 << 16, SOON)?;
    pair.sides[0].sh("ip route del 10.77.0.0/24; ping -q -c 3 -i 0.01 -W 0.1 10.88.0.2 || true")?;
    pair.sides[0].sh("ip route add 10.77.0.0/24 dev outer")?;
    pair.transfer("10.88.0.2", 1 << 16, SOON)?;
    Ok(())
}

#[test]
fn closing_waits_until_the_interface_is_gone_and_leaks_no_descriptor() -> Result<()> {
    let side = side::Side::new()?;
    let descriptors = || Ok::<_, std::io::Error>(std::fs::read_dir("/proc/self/fd")?.count());
    let mut after_first = None;
    for round in 0..20 {
        let seen = side.run(async {
            let tunnel = create(config(2, Setup::default())).await?;
            tunnel.close().await;
            anyhow::Ok(std::fs::read_to_string("/proc/thread-self/net/dev")?)
        })??;
        ensure!(!seen.contains(INTERFACE), "round {round}: still there\n{seen}");
        eventually("descriptors are back", || {
            let now = descriptors()?;
            Ok(now <= *after_first.get_or_insert(now))
        })?;
    }
    Ok(())
}

#[test]
fn a_taken_port_is_named() -> Result<()> {
    let side = side::Side::new()?;
    let error = side.run(async {
        let _taken = tokio::net::UdpSocket::bind("[::]:51820").await?;
        anyhow::Ok(create(config(2, Setup::default())).await.err())
    })??;
    ensure!(matches!(error, Some(Error::Socket { port: 51_820, .. })), "{error:?}");
    Ok(())
}
