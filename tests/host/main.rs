//! The host module and the provider side on real kernel interfaces, in network namespaces of their own. Needs root.
//!
//! Every test begins by leaving the machine's network for an empty one; nextest runs each in its own process.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test that cannot go on must fail"
)]

mod approvals;
mod cleanup;
mod client;
mod dns;
mod isolation;
mod limits;
mod namespace;
mod node;
mod owner;
mod pool;
mod responders;
#[path = "../tunnel/side.rs"]
mod side;
mod stream;
mod way_out;
