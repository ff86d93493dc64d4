//! The local network that DVPN is shown and tested in: real processes in network namespaces on one machine.
//!
//! | module | does |
//! |---|---|
//! | [`network`] | the whole layout: an internet, a pool, providers with LANs, a client, a web server |
//! | [`namespace`] | one network namespace |
//! | [`wire`] | a cable with delay, jitter, loss, rate and outages |
//! | [`process`] | real programs in namespaces, their logs and their end |
//! | [`bus`] | a private D-Bus system bus with the shipped policy |
//! | [`world`] | all of it running, for tests and benchmarks |
//! | [`node`] | `dvpn-pool` and `dvpn-daemon` as processes |
//! | [`client`] | a running daemon, asked over HTTP, D-Bus and SOCKS5 |
//! | [`http`] | a small HTTP client over any stream |
//! | [`https`] | one HTTPS request from a namespace |
//! | [`certs`] | certificates of a throw-away authority |
//! | [`web`] | the server beyond the providers: exit address, bytes, UDP echo, names |
//! | [`socks`] | a small SOCKS5 client |
//! | [`snapshot`] | the network side of a machine as text |
//! | [`capture`] | packet capture with a predicate |
//! | [`window`] | which peers a provider's device really has |
//! | [`sweep`] | removes what a crashed run left |

pub mod bus;
pub mod capture;
pub mod certs;
pub mod client;
pub mod hours;
pub mod http;
pub mod https;
pub mod leak;
pub mod namespace;
pub mod network;
pub mod node;
pub mod process;
pub mod snapshot;
pub mod socks;
pub mod sweep;
mod sys;
pub mod web;
pub mod window;
pub mod wire;
pub mod world;
