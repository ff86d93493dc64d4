//! What one running pool is told.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use dvpn_common::limits::{APPROVE_ACK_TIMEOUT, MAX_APPROVAL_LIFE};
use url::Url;

/// Where, with which files, and by which policy the pool serves.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where it listens; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Certificate chain, PEM.
    pub tls_cert: PathBuf,
    /// Its private key, PEM.
    pub tls_key: PathBuf,
    /// The SQLite file; the pool's signing key lies beside it, with the extension `key`.
    pub database: PathBuf,
    /// Payments without coins and `dev_` tokens. This version has no other payment backend.
    pub development: bool,
    /// Nodes are listed without the operator's approval.
    pub open_registration: bool,
    /// Nodes may have private or loopback addresses.
    pub private_endpoints: bool,
    /// Where the world reaches `/payment` of this server; payment pages are linked below it.
    pub payment_url: Option<Url>,
    /// Most connections at one time.
    pub max_connections: usize,
    /// The pool's clockwork.
    pub timing: Timing,
}

/// The pool's clockwork; the defaults are the contract's.
#[derive(Debug, Clone, Copy)]
pub struct Timing {
    /// How often a node registers again; three times late it leaves the list.
    pub heartbeat: Duration,
    /// How long a node stays listed without its event stream.
    pub stream_grace: Duration,
    /// How long an approval waits for the node's acknowledgement.
    pub ack_timeout: Duration,
    /// Longest life of an approval; never more than the contract's 24 hours.
    pub approval_life: Duration,
    /// How long a checkout's quote holds.
    pub quote_life: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_secs(15),
            stream_grace: Duration::from_secs(10),
            ack_timeout: APPROVE_ACK_TIMEOUT,
            approval_life: MAX_APPROVAL_LIFE,
            quote_life: Duration::from_mins(15),
        }
    }
}

/// Default of [`Config::max_connections`].
pub const DEFAULT_MAX_CONNECTIONS: usize = 4096;
