//! What goes through.

use std::time::Duration;

use anyhow::{Result, ensure};

use crate::bed::{PORT, SOON, Setup, key, pair};

/// Enough for full super-packets and a grown window.
pub(crate) const BULK: usize = 2 << 20;
/// Also on a machine with other work to do.
pub(crate) const PATIENCE: Duration = Duration::from_secs(50);

#[test]
fn tcp_crosses_over_ipv4() -> Result<()> {
    let pair = pair(Setup::default())?;
    pair.transfer("10.88.0.2", BULK, PATIENCE)?;
    pair.transfer("fd88::2", BULK, PATIENCE)?;
    Ok(())
}

#[test]
fn tcp_crosses_over_ipv6() -> Result<()> {
    let pair = pair(Setup {
        outer_v6: true,
        ..Setup::default()
    })?;
    pair.transfer("10.88.0.2", BULK, PATIENCE)?;
    pair.transfer("fd88::2", BULK, PATIENCE)?;
    Ok(())
}

#[test]
fn pings_of_every_length_come_back() -> Result<()> {
    let pair = pair(Setup::default())?;
    for bytes in [0, 1, 15, 16, 17, 512, 1391, 1392, 3000] {
        pair.sides[0].sh(&format!("ping -q -c 2 -i 0.01 -W 2 -s {bytes} 10.88.0.2"))?;
        pair.sides[0].sh(&format!("ping -q -c 2 -i 0.01 -W 2 -s {bytes} fd88::2"))?;
    }
    Ok(())
}

#[test]
fn a_path_too_narrow_for_the_tunnel_still_carries_it() -> Result<()> {
    let pair = pair(Setup::default())?;
    // Outer messages of 1,480 bytes: the kernel refuses to cut them into segments, then has to fragment.
    for side in &pair.sides {
        side.sh("ip link set outer mtu 1300")?;
    }
    pair.transfer("10.88.0.2", BULK, PATIENCE)?;
    Ok(())
}

#[test]
fn rebinding_keeps_the_session_and_the_providers_port() -> Result<()> {
    let pair = pair(Setup::default())?;
    pair.transfer("10.88.0.2", 1 << 16, SOON)?;
    for end in [0, 1] {
        let tunnel = pair.tunnels[end].clone();
        let (before, after) = pair.sides[end].run(async move {
            let before = tunnel.listen_port().await?;
            tunnel.rebind().await?;
            anyhow::Ok((before, tunnel.listen_port().await?))
        })??;
        if end == 1 {
            ensure!(
                (before, after) == (PORT, PORT),
                "the provider moved from {before} to {after}"
            );
        } else {
            ensure!(before != after && after != 0, "the client stayed at {before}");
        }
        let took = pair.transfer("10.88.0.2", 1 << 16, SOON)?;
        ensure!(took < SOON / 2, "{took:?} after a rebind");
    }
    let tunnel = pair.tunnels[1].clone();
    let stats = pair.sides[1].run(async move { tunnel.stats().await })??;
    let tunnel = pair.tunnels[0].clone();
    let port = pair.sides[0].run(async move { tunnel.listen_port().await })??;
    ensure!(stats.len() == 1 && stats[0].public_key == key(1).1);
    ensure!(
        stats[0].endpoint.is_some_and(|at| at.port() == port),
        "{:?} is not port {port}",
        stats[0].endpoint
    );
    ensure!(stats[0].rx_bytes > 1 << 16 && stats[0].tx_bytes > 1 << 16 && stats[0].last_handshake.is_some());
    Ok(())
}
