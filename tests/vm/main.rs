//! The same tests for WireGuard in the kernel, what only that does, the whole chain on it, and the leak
//! table of device mode.
//!
//! Needs root and a kernel with WireGuard, eBPF, nftables and network namespaces: `scripts/test.sh vm` runs it in a
//! virtual machine under software emulation, where everything takes some twenty times as long.

#![allow(clippy::expect_used, clippy::indexing_slicing, reason = "tests fail by panicking")]

#[path = "../tunnel/bed.rs"]
mod bed;
mod chain;
#[path = "../netns/device.rs"]
mod device;
#[path = "../tunnel/failures.rs"]
mod failures;
mod kernel;
#[path = "../tunnel/peers.rs"]
mod peers;
#[path = "../tunnel/side.rs"]
mod side;
#[path = "../tunnel/traffic.rs"]
mod traffic;

use dvpn_daemon::tunnel::{Error, Tunnel, TunnelConfig, kernel::KernelTunnel};

/// How many times the usual everything may take.
const SLOWNESS: u32 = 6;

/// The backend under test.
async fn create(config: TunnelConfig) -> Result<Box<dyn Tunnel>, Error> {
    KernelTunnel::create(config).await
}
