//! The DVPN reference pool: provider list, node registration, approvals and payments behind one HTTPS address, with one
//! SQLite file. [`serve`] runs it; the binary `dvpn-pool` adds the command line.
//!
//! | module | does |
//! |---|---|
//! | [`server`] | listens, serves and stops |
//! | [`api`] | the HTTP handlers |
//! | [`pool`] | what the handlers share |
//! | [`ledger`] | the one writer of approvals, many in one commit |
//! | [`challenge`] | proof that a client holds the key it wants approved |
//! | [`live`], [`list`] | nodes while they live, and the signed provider list that follows |
//! | [`store`] | what survives a restart: all SQL |
//! | [`orchestrator`] | lends standby nodes to clients that find no provider |
//! | [`payment`] | price, quotes, tokens |
//! | [`signed`], [`signing`] | requests that nodes sign, the key that the pool signs with |
//! | [`reach`], [`prober`] | whether a node answers: its echo, its WireGuard |
//! | [`network`] | which inner addresses are whose |
//! | [`limiter`], [`connections`] | bounds on what one source may do |

pub mod api;
pub mod challenge;
pub mod cli;
pub mod config;
pub mod connections;
pub mod hex;
pub mod ledger;
pub mod limiter;
pub mod list;
pub mod live;
pub mod network;
pub mod orchestrator;
pub mod payment;
pub mod pool;
pub mod prober;
pub mod reach;
pub mod refusal;
pub mod request;
pub mod server;
pub mod signed;
pub mod signing;
pub mod store;

pub use config::{Config, Limits, Timing};
pub use server::{Server, serve};

/// The log target of what an operator must be able to look up later: refused proofs, revocations, changes of the key.
pub(crate) const AUDIT: &str = "dvpn_pool::audit";
