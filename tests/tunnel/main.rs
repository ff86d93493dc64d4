//! The userspace tunnel on real namespaces, TUN devices and sockets. Needs root; each test makes its own
//! namespaces and leaves nothing.

#![allow(clippy::expect_used, clippy::indexing_slicing, reason = "tests fail by panicking")]

mod bed;
mod failures;
mod peers;
mod renewal;
mod side;
mod traffic;
mod userspace;

use dvpn_daemon::tunnel::{Error, Tunnel, TunnelConfig, userspace::UserspaceTunnel};

/// How many times the usual everything may take.
const SLOWNESS: u32 = 1;

/// The backend under test.
async fn create(config: TunnelConfig) -> Result<Box<dyn Tunnel>, Error> {
    UserspaceTunnel::create(config).await
}
