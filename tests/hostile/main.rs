//! Hostile peers against the daemon's network edges, over real sockets: HTTPS servers that lie, stall, flood and break off,
//! and SOCKS5 clients that do what they should not, with the proxy's way out in a network namespace of its own.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "a test that can not go on fails"
)]

mod certificates;
mod https;
mod line;
mod network;
mod socks5;
