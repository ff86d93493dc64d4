//! The command line and its environment.

use std::{net::SocketAddr, ops::RangeInclusive, path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand, builder::BoolishValueParser};
use dvpn_common::{
    ids::{CheckoutId, ProviderId},
    limits::MAX_APPROVAL_LIFE,
};
use url::Url;

use crate::{
    config::{Config, DEFAULT_MAX_CONNECTIONS, Limits, Timing},
    orchestrator::DEFAULT_LEASE_LIFE,
};

/// Below, clients would renew all the time; above, no approval lives.
const APPROVAL_SECONDS: std::ops::RangeInclusive<u64> = 20..=86_400;
const LEASE_SECONDS: RangeInclusive<u64> = 20..=86_400;

/// The DVPN pool server: provider list, approvals and payments.
#[derive(Debug, Parser)]
#[command(name = "dvpn-pool", version)]
pub struct Cli {
    /// Check the configuration, say everything that is wrong with it, and do nothing else.
    #[arg(long, global = true)]
    pub check_config: bool,
    /// The options.
    #[command(flatten)]
    pub options: Options,
    /// What to do.
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// What to do.
#[derive(Debug, Clone, Subcommand)]
pub enum Command {
    /// Serve until SIGTERM.
    Serve,
    /// List the registered nodes (needs --database).
    Nodes,
    /// Approve a node, so that clients are shown it (needs --database).
    ApproveNode {
        /// The node's id.
        id: ProviderId,
    },
    /// Take a node's approval back (needs --database).
    RevokeNode {
        /// The node's id.
        id: ProviderId,
    },
    /// Put a node on standby: it leaves the list, and the orchestrator may lend it (needs --database).
    StandbyNode {
        /// The node's id.
        id: ProviderId,
        /// Back to the list.
        #[arg(long)]
        off: bool,
    },
    /// Revoke a paid token: it verifies no more, and its connections end within a second (needs --database).
    Revoke(Revoke),
    /// Make a new signing key, vouched for by the old one; a running pool takes it up within a second (needs --database).
    RotateKey,
}

/// Which token to revoke, and why.
#[derive(Debug, Clone, Args)]
#[group(skip)]
pub struct Revoke {
    /// The checkout that it was, or would be, paid by.
    #[arg(
        long,
        value_name = "ID",
        required_unless_present = "token_stdin",
        conflicts_with = "token_stdin"
    )]
    pub checkout: Option<CheckoutId>,
    /// Read the token from standard input.
    #[arg(long)]
    pub token_stdin: bool,
    /// What its holder is told.
    #[arg(long, value_name = "TEXT", default_value = "ask the pool's operator")]
    pub reason: String,
}

/// Every option, also by environment.
#[expect(clippy::struct_excessive_bools, reason = "independent switches of the operator")]
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Options (also by environment)")]
pub struct Options {
    /// Address and port to listen on.
    #[arg(long, global = true, env = "DVPN_POOL_LISTEN", value_name = "ADDR")]
    pub listen: Option<SocketAddr>,
    /// Certificate chain, PEM.
    #[arg(long, global = true, env = "DVPN_POOL_TLS_CERT", value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,
    /// Private key of the certificate, PEM.
    #[arg(long, global = true, env = "DVPN_POOL_TLS_KEY", value_name = "FILE")]
    pub tls_key: Option<PathBuf>,
    /// SQLite file; made if missing, with the pool's signing key beside it (extension .key).
    #[arg(long, global = true, env = "DVPN_POOL_DATABASE", value_name = "PATH")]
    pub database: Option<PathBuf>,
    /// Payments without coins, tokens that begin with dev_: never for real customers.
    #[arg(long, global = true, env = "DVPN_POOL_DEVELOPMENT", value_parser = BoolishValueParser::new())]
    pub development: bool,
    /// List nodes without the operator's approval.
    #[arg(long, global = true, env = "DVPN_POOL_OPEN_REGISTRATION", value_parser = BoolishValueParser::new())]
    pub open_registration: bool,
    /// Let nodes have private and loopback addresses.
    #[arg(long, global = true, env = "DVPN_POOL_PRIVATE_ENDPOINTS", value_parser = BoolishValueParser::new())]
    pub private_endpoints: bool,
    /// Where people reach this server's /payment, for links to payment pages.
    #[arg(long, global = true, env = "DVPN_POOL_PAYMENT_URL", value_name = "URL")]
    pub payment_url: Option<Url>,
    /// Be an orchestrator too, at /orchestrator: lend standby nodes to clients that find no provider.
    #[arg(long, global = true, env = "DVPN_POOL_ORCHESTRATOR", value_parser = BoolishValueParser::new())]
    pub orchestrator: bool,
    /// How long a lease of a standby node lasts unless it is renewed.
    #[arg(long, global = true, env = "DVPN_POOL_LEASE_SECONDS", value_name = "N", default_value_t = DEFAULT_LEASE_LIFE.as_secs())]
    pub lease_seconds: u64,
    /// Life of an approval; clients renew theirs at half of it.
    #[arg(long, global = true, env = "DVPN_POOL_APPROVAL_SECONDS", value_name = "N", default_value_t = MAX_APPROVAL_LIFE.as_secs())]
    pub approval_seconds: u64,
    /// Most connections at one time.
    #[arg(long, global = true, env = "DVPN_POOL_MAX_CONNECTIONS", value_name = "N", default_value_t = DEFAULT_MAX_CONNECTIONS)]
    pub max_connections: usize,
    /// Connections from one address (IPv6 /64) at one time [default: an eighth of --max-connections].
    #[arg(long, global = true, env = "DVPN_POOL_LIMIT_CONNECTIONS", value_name = "N")]
    pub limit_connections: Option<usize>,
    /// Refused guesses from one address (IPv6 /64) a minute [default: 60].
    #[arg(long, global = true, env = "DVPN_POOL_LIMIT_FAILURES", value_name = "N")]
    pub limit_failures: Option<u32>,
    /// Approvals of one token a minute, twice as many at once after a rest; and as many releases [default: 6].
    #[arg(long, global = true, env = "DVPN_POOL_LIMIT_APPROVALS", value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub limit_approvals: Option<u32>,
    /// Registrations of one node a minute that change something, twice as many at once after a rest [default: 6].
    #[arg(long, global = true, env = "DVPN_POOL_LIMIT_CHANGES", value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub limit_changes: Option<u32>,
    /// New nodes from one /24 (IPv6 /48) an hour [default: 64].
    #[arg(long, global = true, env = "DVPN_POOL_LIMIT_NODES", value_name = "N")]
    pub limit_nodes: Option<u32>,
    /// New checkouts from one /24 (IPv6 /48) an hour [default: 256].
    #[arg(long, global = true, env = "DVPN_POOL_LIMIT_CHECKOUTS", value_name = "N")]
    pub limit_checkouts: Option<u32>,
    /// Reachability checks of nodes at one address (IPv6 /64) a minute [default: 240].
    #[arg(long, global = true, env = "DVPN_POOL_LIMIT_CHECKS", value_name = "N")]
    pub limit_checks: Option<u32>,
    /// Speed tests from one /24 (IPv6 /48) at one time [default: 4].
    #[arg(long, global = true, env = "DVPN_POOL_LIMIT_SPEED_TESTS", value_name = "N")]
    pub limit_speed_tests: Option<usize>,
}

impl Options {
    fn limits(&self) -> Limits {
        let usual = Limits::default();
        Limits {
            failures: self.limit_failures.unwrap_or(usual.failures),
            approvals: self.limit_approvals.unwrap_or(usual.approvals),
            changes: self.limit_changes.unwrap_or(usual.changes),
            nodes: self.limit_nodes.unwrap_or(usual.nodes),
            checkouts: self.limit_checkouts.unwrap_or(usual.checkouts),
            checks: self.limit_checks.unwrap_or(usual.checks),
            speed_tests: self.limit_speed_tests.unwrap_or(usual.speed_tests),
            connections: self.limit_connections,
        }
    }

    /// The configuration, or everything that is missing or wrong, one line each.
    pub fn config(self) -> Result<Config, Vec<String>> {
        let mut wrong = Vec::new();
        let mut missing = |name: &str, variable: &str| {
            wrong.push(format!("--{name} (or {variable}) is missing"));
        };
        if self.listen.is_none() {
            missing("listen", "DVPN_POOL_LISTEN");
        }
        if self.tls_cert.is_none() {
            missing("tls-cert", "DVPN_POOL_TLS_CERT");
        }
        if self.tls_key.is_none() {
            missing("tls-key", "DVPN_POOL_TLS_KEY");
        }
        if self.database.is_none() {
            missing("database", "DVPN_POOL_DATABASE");
        }
        if !self.development {
            wrong.push(crate::pool::Error::NoPaymentBackend.to_string());
        }
        if self.payment_url.as_ref().is_some_and(|url| url.scheme() != "https") {
            wrong.push("--payment-url must begin with https://".to_owned());
        }
        if !LEASE_SECONDS.contains(&self.lease_seconds) {
            wrong.push("--lease-seconds must be from 20 to 86400".to_owned());
        }
        if !APPROVAL_SECONDS.contains(&self.approval_seconds) {
            wrong.push("--approval-seconds must be from 20 to 86400".to_owned());
        }
        if self.max_connections == 0 {
            wrong.push("--max-connections must be 1 or more".to_owned());
        }
        let limits = self.limits();
        if limits.connections == Some(0) {
            wrong.push("--limit-connections must be 1 or more".to_owned());
        }
        if let (Some(cert), Some(key)) = (&self.tls_cert, &self.tls_key)
            && let Err(error) = crate::server::tls_config(cert, key)
        {
            wrong.push(with_causes(&error));
        }
        match (self.listen, self.tls_cert, self.tls_key, self.database) {
            (Some(listen), Some(tls_cert), Some(tls_key), Some(database)) if wrong.is_empty() => Ok(Config {
                listen,
                tls_cert,
                tls_key,
                database,
                development: self.development,
                open_registration: self.open_registration,
                private_endpoints: self.private_endpoints,
                payment_url: self.payment_url,
                orchestrator: self.orchestrator.then(|| Duration::from_secs(self.lease_seconds)),
                max_connections: self.max_connections,
                limits,
                timing: Timing {
                    approval_life: Duration::from_secs(self.approval_seconds),
                    ..Timing::default()
                },
            }),
            _ => Err(wrong),
        }
    }
}

/// An error with everything that caused it, on one line.
pub fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.ends_with(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = error.source();
    }
    text
}
