//! The HTTP bodies of the pool, the payment server and the orchestrator.
//!
//! The fields that are not `Option` are the user's contract, letter for letter. Everything else is an addition that a
//! peer may leave out, so a pool that speaks only the contract works. Unknown fields are ignored. What these types
//! accept is *shape*; `dvpn-core` decides what is true.

use ipnetwork::IpNetwork;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::net::IpAddr;

use crate::{
    ids::{CheckoutId, ProviderId, Region, UserId},
    keys::{PublicKey, VerifyingKey},
};

/// Path below `POOL_URL`: approve one client at one provider.
pub const APPROVE_PATH: &str = "approve";
/// Path below `POOL_URL`: register a node.
pub const REGISTER_PATH: &str = "register";
/// Path below `PAYMENT_API_URL`: begin a checkout.
pub const CHECKOUT_START_PATH: &str = "checkout/start";
/// Path below `PAYMENT_API_URL`: `checkout/{id}` tells its status.
pub const CHECKOUT_PATH: &str = "checkout";
/// Path below `POOL_URL`: `nodes/{id}/events`, the event stream of one node.
pub const NODES_PATH: &str = "nodes";

/// One provider of the list at `POOL_URL`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ProviderEntry {
    /// The provider's id.
    pub id: String,
    /// `address:port` of its WireGuard socket.
    pub endpoint: String,
    /// Its WireGuard public key, base64.
    pub public_key: String,
    /// What it carries, as prefixes; `0.0.0.0/0, ::/0` when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allowed_ips: Option<Vec<String>>,
    /// `address:port` of its latency echo.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub probe: Option<String>,
    /// Where it stands.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub region: Option<String>,
}

/// The list at `POOL_URL`: an object, or a bare array of providers.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(untagged)]
pub enum ProviderList {
    /// `{"providers": […], …}`
    Object {
        /// The offers.
        providers: Vec<ProviderEntry>,
        /// Grows with every change of the list.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        version: Option<u64>,
        /// When this copy stops being good.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        expires_at: Option<Timestamp>,
        /// Ed25519 over the list, base64.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        signature: Option<String>,
    },
    /// `[…]`
    Bare(Vec<ProviderEntry>),
}

/// `POST PAYMENT_API_URL`. The answer is read by `dvpn_core::payment`, digit by digit.
#[derive(Serialize, Deserialize)]
pub struct VerifyRequest {
    /// The customer's token.
    pub token: String,
    /// The provider about to be used.
    pub provider_id: String,
    /// [`crate::limits::REQUIRED_WALLET`].
    pub required_wallet: String,
    /// [`crate::limits::REQUIRED_PRICE_USD`].
    pub required_price_usd: f64,
    /// [`crate::limits::REQUIRED_INTERVAL`].
    pub required_interval: String,
}

/// `POST PAYMENT_API_URL/checkout/start`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CheckoutRequest {
    /// Who pays: a random number, not the node.
    pub user_id: UserId,
    /// [`crate::limits::REQUIRED_WALLET`].
    pub required_wallet: String,
    /// [`crate::limits::REQUIRED_PRICE_USD`].
    pub required_price_usd: f64,
    /// [`crate::limits::REQUIRED_INTERVAL`].
    pub required_interval: String,
}

/// The answer to [`CheckoutRequest`]. No Debug: `secret` fetches the token.
#[derive(Clone, Serialize, Deserialize)]
pub struct CheckoutResponse {
    /// Names this checkout.
    pub session_id: CheckoutId,
    /// A page a person can pay at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkout_url: Option<String>,
    /// BIP 21.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bitcoin_uri: Option<String>,
    /// Decimal bitcoin, as text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub amount_btc: Option<String>,
    /// The same in satoshi.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub amount_sats: Option<u64>,
    /// When the quote ends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<Timestamp>,
    /// Sent as `Authorization: Bearer …` when asking for the status; only its holder is given the token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret: Option<String>,
}

/// How far a checkout is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CheckoutState {
    /// Nothing seen yet.
    Pending,
    /// Seen on the network, no confirmation: no access.
    Seen,
    /// In a block, not deep enough yet.
    Confirming,
    /// Paid; carries the token, once.
    Confirmed,
    /// The quote ended unpaid.
    Expired,
}

/// `GET PAYMENT_API_URL/checkout/{id}`. No Debug: `token` is the access.
#[derive(Clone, Serialize, Deserialize)]
pub struct CheckoutStatus {
    /// How far it is.
    pub status: CheckoutState,
    /// Confirmations so far.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub confirmations: Option<u32>,
    /// Confirmations needed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub required_confirmations: Option<u32>,
    /// The token, handed out once to the holder of the checkout's secret.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<String>,
}

/// `POST POOL_URL/approve`. No Debug: it carries the token.
#[derive(Clone, Serialize, Deserialize)]
pub struct ApproveRequest {
    /// Where the client wants to go.
    pub provider_id: String,
    /// The customer's token; the pool verifies it itself.
    pub token: String,
    /// Always true; a pool that decides by it is broken.
    pub approved: bool,
    /// The key the provider shall admit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_public_key: Option<PublicKey>,
}

/// The answer to [`ApproveRequest`]. 2xx without `approved: false` is an approval.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct ApproveResponse {
    /// False denies even with 2xx.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub approved: Option<bool>,
    /// Echo of the request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub provider_id: Option<String>,
    /// The client's inner addresses, as prefixes (`10.96.0.2/32`, `fd…/128`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub addresses: Option<Vec<IpNetwork>>,
    /// The client's inner IPv4 address when only one is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<IpNetwork>,
    /// The provider's own inner addresses, where it answers DNS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateways: Option<Vec<IpAddr>>,
    /// When the approval ends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<Timestamp>,
    /// [`crate::approval`] bytes, base64: carried as they are, never rebuilt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub approval: Option<String>,
    /// Ed25519 over those bytes by the pool, base64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signature: Option<String>,
    /// Why not, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// The body of every refusal by our own servers.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ErrorBody {
    /// What failed and what to do.
    pub error: String,
}

/// `POST POOL_URL/register`, signed as [`crate::node`] says. Also the heartbeat.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RegisterRequest {
    /// The node's id, bound to `identity` at its first registration.
    pub node_id: ProviderId,
    /// Where clients reach its WireGuard socket.
    pub endpoint: String,
    /// Its WireGuard public key on the provider interface.
    pub public_key: PublicKey,
    /// Where its latency echo answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub probe: Option<String>,
    /// Where it stands.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub region: Option<Region>,
    /// The key its signed requests verify with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<VerifyingKey>,
    /// True takes the node off the list (it is leaving).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub leaving: bool,
}

/// The answer to [`RegisterRequest`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RegisterResponse {
    /// True once clients are shown this node.
    pub listed: bool,
    /// Why it is not, and what to do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The address the pool saw the request come from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_address: Option<IpAddr>,
    /// Send the next heartbeat within this many seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub heartbeat_seconds: Option<u64>,
    /// The pool's verifying key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool_key: Option<VerifyingKey>,
}

/// Names of the events on `nodes/{id}/events`; their data is the JSON of the type of the same name.
pub mod event {
    /// [`super::Snapshot`]
    pub const SNAPSHOT: &str = "snapshot";
    /// [`super::PeerAdded`]
    pub const ADD: &str = "add";
    /// [`super::PeerRemoved`]
    pub const REMOVE: &str = "remove";
}

/// One approved client, as a provider is told of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerEntry {
    /// The client's key.
    pub public_key: PublicKey,
    /// Its inner addresses: /32 and /128 only.
    pub addresses: Vec<IpNetwork>,
    /// When the peer must go even if nothing more is heard.
    pub expires_at: Timestamp,
    /// [`crate::approval`] bytes, base64.
    pub approval: String,
    /// Ed25519 over those bytes by the pool, base64.
    pub signature: String,
}

/// First event of every stream: all there is. The node makes its peers equal to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// The sequence number this state stands at.
    pub sequence: u64,
    /// The inner networks of this provider, its own address in each: `10.96.0.1/20`, `fd…::1/64`.
    pub networks: Vec<IpNetwork>,
    /// Every approved client.
    pub peers: Vec<PeerEntry>,
}

/// One client more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerAdded {
    /// Sequence number of the change.
    pub sequence: u64,
    /// The client.
    pub peer: PeerEntry,
}

/// One client less.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerRemoved {
    /// Sequence number of the change.
    pub sequence: u64,
    /// Whose peer goes.
    pub public_key: PublicKey,
}

/// `POST POOL_URL/nodes/{id}/ack`, signed: what the kernel holds now.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Ack {
    /// Everything up to this sequence number is applied.
    pub sequence: u64,
    /// Changes that could not be applied, by client key, with the reason.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub refused: Vec<RefusedPeer>,
}

/// A peer a node would not or could not admit.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RefusedPeer {
    /// Whose.
    pub public_key: PublicKey,
    /// Why.
    pub reason: String,
}

/// What the orchestrator (and the fallback script) answers: a provider made for us.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ProvisionResponse {
    /// Its id.
    pub id: String,
    /// `address:port`.
    pub endpoint: String,
    /// Its WireGuard key.
    pub public_key: String,
    /// What it carries.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allowed_ips: Option<Vec<String>>,
    /// Our inner address there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<IpNetwork>,
}
