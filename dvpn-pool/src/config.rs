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
    /// How long a lease of a standby node lasts; nothing if this server is no orchestrator.
    pub orchestrator: Option<Duration>,
    /// Most connections at one time.
    pub max_connections: usize,
    /// How much one source may ask.
    pub limits: Limits,
    /// The pool's clockwork.
    pub timing: Timing,
}

/// How much one source may ask before it has to wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Refused guesses (of tokens, proofs, secrets, names) of one line a minute. A line is an IPv4 address, an IPv6 /64.
    pub failures: u32,
    /// Approvals of one token a minute, twice as many at once after a rest; and as many releases.
    pub approvals: u32,
    /// Registrations of one node a minute that change something, twice as many at once after a rest. Heartbeats are not
    /// counted.
    pub changes: u32,
    /// New node ids of one site an hour. A site is an IPv4 /24, an IPv6 /48.
    pub nodes: u32,
    /// New checkouts of one site an hour.
    pub checkouts: u32,
    /// Reachability checks of nodes of one line a minute.
    pub checks: u32,
    /// Speed tests of one site at one time.
    pub speed_tests: usize,
    /// Connections of one line at one time; an eighth of all when left out.
    pub connections: Option<usize>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            failures: 60,
            // A client that looks for another provider needs one for each it tries, and one a renewal.
            approvals: 6,
            // A node changes when its address does, and when it drains.
            changes: 6,
            nodes: 64,
            checkouts: 256,
            checks: 240,
            speed_tests: 4,
            connections: None,
        }
    }
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
    /// How long a key stays approved once another one renewed it.
    pub renewal_grace: Duration,
    /// How long a challenge is the current one; it is good for as long again.
    pub challenge_life: Duration,
    /// How long a checkout's quote holds.
    pub quote_life: Duration,
    /// How long one speed test runs at most.
    pub speed_test: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_secs(15),
            stream_grace: Duration::from_secs(10),
            ack_timeout: APPROVE_ACK_TIMEOUT,
            approval_life: MAX_APPROVAL_LIFE,
            // With the half second between two sweeps it stays below the 30 s of the contract.
            renewal_grace: Duration::from_secs(29),
            challenge_life: Duration::from_mins(1),
            quote_life: Duration::from_mins(15),
            speed_test: Duration::from_mins(1),
        }
    }
}

/// Default of [`Config::max_connections`].
pub const DEFAULT_MAX_CONNECTIONS: usize = 4096;
