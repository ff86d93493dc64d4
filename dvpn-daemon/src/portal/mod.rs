//! A network that wants a login: how it is looked at, and the proxy by which one user's browser is let out to log in.
//! [`dvpn_core::portal`] decides.
//!
//! The way out is a SOCKS5 proxy of this process and no rule for a program: a rule would need what not every machine has
//! (control groups of version 2), or would let out all that a user runs. In the firewall nothing opens but for our own
//! mark, and only [`Proxy`] makes such connections for others: names at the network's name servers, and from there to web
//! ports and the portal.

mod look;
mod owner;
mod proxy;

use std::{io, net::SocketAddr};

use dvpn_core::portal::Refusal;
use jiff::Timestamp;
pub use look::{Look, look};
pub use proxy::Proxy;
use url::Url;

use crate::host;

/// How to log in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Way {
    /// The SOCKS5 proxy for the browser.
    pub proxy: SocketAddr,
    /// What to open in it.
    pub page: Url,
    /// When it ends, at the latest.
    pub ends_at: Timestamp,
}

/// Why there is none.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is not allowed, or not needed.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// Nobody to ask.
    #[error("no pool is configured, so nobody can say whether this network wants a login: set POOL_URL")]
    NoPool,
    /// The firewall stays as it is.
    #[error("opening the firewall for the login")]
    Firewall(#[source] host::Error),
    /// No proxy.
    #[error("making the proxy for the login")]
    Proxy(#[source] io::Error),
}
