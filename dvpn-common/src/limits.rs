//! Limits that both ends of a contract enforce, and the terms of the subscription.

use std::time::Duration;

/// Largest provider list after decoding, in bytes.
pub const MAX_LIST_BYTES: usize = 4 * 1024 * 1024;
/// Most providers one list may hold.
pub const MAX_PROVIDERS: usize = 10_000;
/// Largest body of every other request and answer, in bytes.
pub const MAX_BODY_BYTES: usize = 64 * 1024;
/// Most prefixes one provider may announce in `allowed_ips`.
pub const MAX_ALLOWED_IPS: usize = 64;
/// How far two clocks may be apart before a signed message is refused.
pub const MAX_CLOCK_SKEW: Duration = Duration::from_mins(2);
/// Longest life of an approval.
pub const MAX_APPROVAL_LIFE: Duration = Duration::from_hours(24);
/// How long the pool waits for a provider to acknowledge a new peer before it answers 503.
pub const APPROVE_ACK_TIMEOUT: Duration = Duration::from_secs(2);
/// Most changes of the pool's key that are told and read: one that changes its key monthly is five years old by then.
pub const MAX_ROTATIONS: usize = 64;
/// How often an idle event stream carries a ping.
pub const STREAM_PING: Duration = Duration::from_secs(15);

/// The one wallet that subscriptions are paid to.
pub const REQUIRED_WALLET: &str = "1MUss4jmaRJ2sMtS9gyZqeRw8WrhWTsrxn";
/// The price of one interval, in US cents.
pub const REQUIRED_PRICE_CENTS: u64 = 999;
/// The same price as it stands in a JSON body, in US dollars.
pub const REQUIRED_PRICE_USD: f64 = 9.99;
/// The only interval sold.
pub const REQUIRED_INTERVAL: &str = "monthly";
/// Prefix of tokens made without a real payment; refused unless `DVPN_DEVELOPMENT=true`.
pub const DEVELOPMENT_TOKEN_PREFIX: &str = "dev_";
