//! The pool as its clients and nodes meet it: a real server, real TLS, real signatures, echoes and event streams.

#![allow(
    unreachable_pub,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test crate: the helpers of the tests fail as the tests do"
)]

mod approvals;
mod batches;
mod leases;
mod node;
mod nodes;
mod operator;
mod payments;
mod possession;
mod process;
mod reachability;
mod renewals;
mod support;
mod throughput;
