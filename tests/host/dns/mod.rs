//! Name resolution by the tunnel, by each way there is, with the real services.
//!
//! A program of its own stands for the daemon, because it is killed; what puts everything back afterwards is
//! `dvpn-daemon --cleanup`.

mod machine;
mod network_manager;
mod plain;
mod resolvconf;
mod resolved;
mod server;
