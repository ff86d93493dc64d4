//! What only a TUN does: segments cut and joined in this process, and sessions that outlast the link being down.

use std::sync::Arc;

use anyhow::{Result, ensure};

use crate::{
    bed::{INTERFACE, SOON, Setup, pair},
    renewal::{provide, renewal},
    side::Side,
    traffic::{BULK, PATIENCE},
};

#[test]
fn tcp_crosses_without_offload() -> Result<()> {
    let pair = pair(Setup {
        offload: false,
        ..Setup::default()
    })?;
    pair.transfer("10.88.0.2", BULK, PATIENCE)?;
    pair.transfer("fd88::2", BULK, PATIENCE)?;
    Ok(())
}

#[test]
fn a_device_that_does_not_segment_udp_still_carries_it() -> Result<()> {
    let pair = pair(Setup::default())?;
    for side in &pair.sides {
        side.sh("ethtool -K outer tx-udp-segmentation off tx-checksum-ip-generic off")?;
    }
    pair.transfer("10.88.0.2", BULK, PATIENCE)?;
    Ok(())
}

#[test]
fn a_link_that_is_down_for_a_while_does_not_kill_the_tunnel() -> Result<()> {
    let pair = pair(Setup::default())?;
    pair.transfer("10.88.0.2", 1 << 16, SOON)?;
    pair.sides[1].sh(&format!("ip link set {INTERFACE} down"))?;
    pair.sides[0].sh("ping -q -c 3 -i 0.01 -W 0.1 10.88.0.2 || true")?;
    pair.sides[1].sh(&format!(
        "ip link set {INTERFACE} up; ip route replace 10.88.0.1/32 dev {INTERFACE}"
    ))?;
    pair.transfer("10.88.0.2", 1 << 16, SOON)?;
    Ok(())
}

fn queue_length(side: &Side) -> Result<Option<u32>> {
    let shown = side.sh(&format!("ip -o link show {INTERFACE}"))?;
    // One line: what were lines end in a backslash.
    let mut words = shown.split([' ', '\\']).skip_while(|word| *word != "qlen");
    Ok(words.nth(1).and_then(|number| number.parse().ok()))
}

/// Changing the length of a link's queue while it is up drops what is sent meanwhile: the kernel takes the queue off for
/// a moment, and a moment is long on a busy machine.
#[test]
fn the_interfaces_queue_is_as_long_after_a_renewal_as_from_the_start() -> Result<()> {
    let pair = pair(Setup::default())?;
    pair.transfer("10.88.0.2", 1 << 16, SOON)?;
    ensure!(
        queue_length(&pair.sides[0])? == Some(4096),
        "a pause is to lose nothing"
    );
    let provider = Arc::clone(&pair.tunnels[1]);
    let (told, moved) = std::sync::mpsc::channel();
    pair.sides[1].spawn(async move { drop(told.send(provide(provider).await)) });
    let tunnel = Arc::clone(&pair.tunnels[0]);
    pair.sides[0].run(async move { tunnel.renew(renewal()).await })??;
    moved.recv_timeout(SOON)??;
    ensure!(queue_length(&pair.sides[0])? == Some(4096));
    pair.transfer("10.88.0.2", 1 << 16, SOON)?;
    Ok(())
}
