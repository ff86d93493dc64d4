//! The DVPN daemon: all I/O. `dvpn-core` decides; the modules here ask, measure, configure and serve.
//!
//! | module | does |
//! |---|---|
//! | [`driver`] | feeds the session machine and carries out its actions |
//! | [`host`] | the only module that changes the machine: links, addresses, rules, nftables, name resolution |
//! | [`tunnel`] | WireGuard devices behind one trait |
//! | [`http`] | pool, payment and orchestrator clients |
//! | [`fallback`] | the script that has a provider made, and the lease of it |
//! | [`probe`] | latency of candidates |
//! | [`socks5`], [`resolve`] | the proxy and its names, through the tunnel or not at all |
//! | [`leak_test`] | sends what must not leave, and looks |
//! | [`portal`] | whether the network wants a login, and the way out for one user's browser |
//! | [`provider`] | the provider side: registration, peers, NAT, echo |
//! | [`ebpf`] | tc programs: load, attach, pin, read |
//! | [`line`] | measures the machine's line |
//! | [`control`] | D-Bus, /health, /metrics |
//! | [`settings`], [`state`] | what the operator said, what was stored |
//! | [`audit`], [`logs`] | the audit stream, the log and its tail |

pub mod audit;
pub mod clock;
pub mod control;
pub mod control_plane;
pub mod driver;
pub mod ebpf;
pub mod fallback;
pub mod host;
pub mod http;
pub mod leak_test;
pub mod line;
pub mod logs;
pub mod node;
pub mod portal;
pub mod probe;
pub mod provider;
mod race;
pub mod resolve;
pub mod run;
pub mod settings;
pub mod socks5;
pub mod state;
pub mod tunnel;
