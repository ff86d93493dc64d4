//! A provider's view: thousands of peers.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use dvpn_common::keys::PublicKey;
use dvpn_daemon::tunnel::PeerConfig;

use crate::{
    SLOWNESS,
    bed::{SOON, Setup, config, key, pair},
    create, side,
};

pub(crate) const PEERS: u16 = 4096;

pub(crate) fn many() -> Vec<PeerConfig> {
    (0..PEERS)
        .map(|number| {
            let [high, low] = number.to_be_bytes();
            let mut bytes = [0x55; 32];
            bytes[0] = high;
            bytes[1] = low;
            PeerConfig {
                public_key: PublicKey::from_bytes(bytes).expect("not zero"),
                endpoint: None,
                allowed_ips: vec![
                    format!("10.89.{high}.{low}/32").parse().expect("a prefix"),
                    format!("fd89::{number:x}/128").parse().expect("a prefix"),
                ],
                keepalive: None,
            }
        })
        .collect()
}

#[test]
fn four_thousand_peers_are_set_listed_changed_and_removed_quickly() -> Result<()> {
    let side = side::Side::new()?;
    side.run(async {
        let tunnel = create(config(2, Setup::default())).await?;
        let limit = Duration::from_secs(10) * SLOWNESS;
        let started = Instant::now();
        tunnel.set_peers(many()).await?;
        ensure!(started.elapsed() < limit, "adding took {:?}", started.elapsed());
        let started = Instant::now();
        let stats = tunnel.stats().await?;
        ensure!(stats.len() == usize::from(PEERS) + 1, "{} peers", stats.len());
        ensure!(started.elapsed() < limit, "listing took {:?}", started.elapsed());
        let started = Instant::now();
        tunnel.set_peers(many()).await?;
        ensure!(
            started.elapsed() < limit / 10,
            "setting the same again took {:?}",
            started.elapsed()
        );
        let started = Instant::now();
        for peer in many().into_iter().step_by(16) {
            tunnel.remove_peer(peer.public_key).await?;
            tunnel.remove_peer(peer.public_key).await?;
        }
        ensure!(started.elapsed() < limit, "removing took {:?}", started.elapsed());
        ensure!(tunnel.stats().await?.len() == usize::from(PEERS) + 1 - usize::from(PEERS) / 16);
        tunnel.close().await;
        anyhow::Ok(())
    })??;
    Ok(())
}

#[test]
fn a_peer_gets_through_among_thousands_and_not_after_it_was_removed() -> Result<()> {
    let pair = pair(Setup::default())?;
    let provider = pair.tunnels[1].clone();
    pair.sides[1].run(async move { provider.set_peers(many()).await })??;
    pair.transfer("10.88.0.2", 1 << 20, SOON)?;
    let provider = pair.tunnels[1].clone();
    pair.sides[1].run(async move { provider.remove_peer(key(1).1).await })??;
    let refused = pair.transfer("10.88.0.2", 1 << 10, Duration::from_secs(1));
    ensure!(refused.is_err(), "a removed peer still got through");
    Ok(())
}

#[test]
fn changing_a_peer_keeps_its_session_and_its_learned_endpoint() -> Result<()> {
    let pair = pair(Setup::default())?;
    pair.transfer("10.88.0.2", 1 << 16, SOON)?;
    let provider = pair.tunnels[1].clone();
    let stats = pair.sides[1].run(async move {
        let mut peer = config(2, Setup::default()).peers.remove(0);
        peer.allowed_ips.push("10.90.0.0/24".parse()?);
        provider.set_peers(vec![peer]).await?;
        anyhow::Ok(provider.stats().await?)
    })??;
    ensure!(
        stats.len() == 1 && stats[0].endpoint.is_some() && stats[0].last_handshake.is_some(),
        "{stats:?}"
    );
    pair.transfer("10.88.0.2", 1 << 16, SOON)?;
    Ok(())
}
