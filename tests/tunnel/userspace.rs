//! What only a TUN does: segments cut and joined in this process, and sessions that outlast the link being down.

use anyhow::Result;

use crate::{
    bed::{INTERFACE, SOON, Setup, pair},
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
