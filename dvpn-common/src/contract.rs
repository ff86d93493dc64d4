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
/// Path below [`APPROVE_PATH`]: the pool's ephemeral key for a proof of possession.
pub const CHALLENGE_PATH: &str = "approve/challenge";
/// Path below `POOL_URL`: give a connection's grant back.
pub const RELEASE_PATH: &str = "release";
/// Path below `POOL_URL`: register a node.
pub const REGISTER_PATH: &str = "register";
/// Path below `PAYMENT_API_URL`: begin a checkout.
pub const CHECKOUT_START_PATH: &str = "checkout/start";
/// Path below `PAYMENT_API_URL`: `checkout/{id}` tells its status.
pub const CHECKOUT_PATH: &str = "checkout";
/// Path below `POOL_URL`: `nodes/{id}/events`, the event stream of one node.
pub const NODES_PATH: &str = "nodes";

/// One provider of the list at `POOL_URL`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
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
        /// Ed25519 over [`crate::directory::signed_bytes`], base64.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        signature: Option<String>,
        /// The pool's verifying key: pinned at first use, later a hint that it was rotated.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pool_key: Option<VerifyingKey>,
        /// How earlier keys of the pool led to `pool_key`, oldest first.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        rotations: Vec<KeyRotation>,
    },
    /// `[…]`
    Bare(Vec<ProviderEntry>),
}

/// The pool's key changed: the old one vouches for the new one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyRotation {
    /// The key that signed.
    pub from: VerifyingKey,
    /// The key that signs from then on.
    pub to: VerifyingKey,
    /// Ed25519 by `from` over [`crate::directory::rotation_bytes`], base64.
    pub signature: String,
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
    /// Paid; carries the token.
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
    /// The token, handed to the holder of the checkout's secret, again and again until it is first used: an answer
    /// that was lost on the way loses no payment.
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
    /// That the client holds the private half of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proof: Option<PossessionProof>,
    /// The client's key at the same provider that this one is to follow without a break. The new key is given the
    /// same tunnel addresses; they move to it at its first handshake.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub renews: Option<PublicKey>,
}

/// The answer to `GET POOL_URL/approve/challenge`; a pool without challenges answers 404.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ChallengeResponse {
    /// The pool's ephemeral X25519 key: good for every proof until `expires_at`.
    pub public_key: PublicKey,
    /// The pool forgets the private half then.
    pub expires_at: Timestamp,
}

/// HMAC-SHA256 keyed by X25519(client key, challenge) over [`crate::possession::bytes`]. No Debug: it is a credential
/// while its challenge lives.
#[derive(Clone, Serialize, Deserialize)]
pub struct PossessionProof {
    /// [`ChallengeResponse::public_key`], as it was given.
    pub challenge: PublicKey,
    /// 32 bytes, base64.
    pub mac: String,
}

/// `POST POOL_URL/release`: the connection is over; answered with 204. No Debug: it carries the token.
#[derive(Clone, Serialize, Deserialize)]
pub struct ReleaseRequest {
    /// Where the client was.
    pub provider_id: String,
    /// The token the key was approved for.
    pub token: String,
    /// The key that is used no more.
    pub client_public_key: PublicKey,
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
    /// The key that signed: a client that has pinned another one follows `rotations` to it first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool_key: Option<VerifyingKey>,
    /// How earlier keys of the pool led to `pool_key`, oldest first; the last [`crate::limits::MAX_ROTATIONS`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rotations: Vec<KeyRotation>,
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
    /// True takes no new clients but keeps those there are: drained, out of schedule, over its monthly cap.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub draining: bool,
    /// Most clients the owner admits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_peers: Option<u32>,
}

/// What the pool found when it tried to reach a node as a client would.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reachability {
    /// Not tried yet.
    Untested,
    /// Echo and handshake were answered.
    Reachable,
    /// The latency echo was not answered: its UDP port is closed on the way.
    NoEcho,
    /// The echo was, the WireGuard handshake was not.
    NoHandshake,
    /// The announced endpoint is not the address that the registration came from: a NAT in between (or a CGNAT), or
    /// somebody else's address.
    OtherAddress,
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
    /// How earlier keys of the pool led to `pool_key`, oldest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rotations: Vec<KeyRotation>,
    /// The WireGuard key that the pool shakes hands with before it lists the node: a peer without `allowed_ips`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prober_key: Option<PublicKey>,
    /// What the pool found.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reachability: Option<Reachability>,
}

/// Names of the events on `nodes/{id}/events`; their data is the JSON of the type of the same name.
pub mod event {
    /// [`super::Snapshot`]
    pub const SNAPSHOT: &str = "snapshot";
    /// [`super::PeerAdded`]
    pub const ADD: &str = "add";
    /// [`super::PeerRemoved`]
    pub const REMOVE: &str = "remove";
    /// [`super::PeerReleased`]
    pub const RELEASE: &str = "release";
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
    /// The key whose tunnel addresses this one takes over at its first handshake. Until then it has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub renews: Option<PublicKey>,
    /// The client released it: it holds no grant until it shakes hands again.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub released: bool,
}

/// First event of every stream, and of a change of the pool's key: all there is. The node makes its peers equal to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// The sequence number this state stands at.
    pub sequence: u64,
    /// The inner networks of this provider, its own address in each: `10.96.0.1/20`, `fd…::1/64`.
    pub networks: Vec<IpNetwork>,
    /// Every approved client.
    pub peers: Vec<PeerEntry>,
    /// The key that signed all of them: a node that has pinned another one follows `rotations` to it first. A pool that
    /// changes its key sends a new snapshot on every open stream.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool_key: Option<VerifyingKey>,
    /// How earlier keys of the pool led to `pool_key`, oldest first; the last [`crate::limits::MAX_ROTATIONS`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rotations: Vec<KeyRotation>,
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

/// A client ended its connection: its grant returns, its peer stays until expiry or removal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerReleased {
    /// Sequence number of the change.
    pub sequence: u64,
    /// Whose.
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

/// Path of the orchestrator below `FALLBACK_ORCHESTRATOR_URL`: its ephemeral key for a proof of possession, as
/// [`ChallengeResponse`]; an orchestrator without challenges answers 404.
pub const PROVISION_CHALLENGE_PATH: &str = "provision/challenge";
/// Path of the orchestrator below `FALLBACK_ORCHESTRATOR_URL`: ask for a provider.
pub const PROVISION_PATH: &str = "provision";
/// Path of the orchestrator below `FALLBACK_ORCHESTRATOR_URL`: `leases/{id}` renews (POST, answered with a fresh
/// [`ProvisionResponse`]) or returns (DELETE, answered with 204) one. The token comes as `Authorization: Bearer …`.
pub const LEASES_PATH: &str = "leases";

/// `POST FALLBACK_ORCHESTRATOR_URL/provision`, and what the fallback script reads on its standard input. No Debug: it
/// carries the token.
#[derive(Clone, Serialize, Deserialize)]
pub struct ProvisionRequest {
    /// Who pays: a random number, not the node.
    pub user_id: UserId,
    /// The customer's token; the orchestrator verifies it itself.
    pub token: String,
    /// The key the provider shall admit.
    pub public_key: PublicKey,
    /// That the client holds the private half of it: made for [`crate::possession::PROVISION`] in place of a provider's
    /// id, with a challenge of the orchestrator's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proof: Option<PossessionProof>,
    /// The script is ended then.
    pub timeout_seconds: u64,
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
    /// Echo of the key that was to be admitted: an answer for another key is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_public_key: Option<PublicKey>,
    /// Our inner address there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<IpNetwork>,
    /// Our inner addresses there, when there is more than one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub addresses: Option<Vec<IpNetwork>>,
    /// The provider's own inner addresses, where it answers DNS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateways: Option<Vec<IpAddr>>,
    /// Names the lease, to renew and to return it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease_id: Option<String>,
    /// When the provider is taken away unless the lease is renewed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease_expires_at: Option<Timestamp>,
}
