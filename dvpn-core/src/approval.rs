//! Whether a tunnel may exist. An [`Approval`] is the only thing a tunnel can be configured from.
//!
//! It has two constructors, and both need a verified [`Subscription`]: the pool's answer for our key at a provider of
//! its list, or the orchestrator's answer that made a provider for our key.

mod error;
mod lease;

use std::net::IpAddr;

use aws_lc_rs::signature::{ED25519, UnparsedPublicKey};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use dvpn_common::{
    approval::{self as signed, ApprovalFields},
    contract::ApproveResponse,
    keys::{PublicKey, VerifyingKey},
    limits::{MAX_APPROVAL_LIFE, MAX_BODY_BYTES},
};
use ipnetwork::IpNetwork;
use jiff::Timestamp;
use serde::Deserialize;

pub use error::Error;
pub use lease::Lease;

use crate::{
    address::{is_private, is_unicast},
    directory::{self, Provider, check_offer},
    payment::Subscription,
    pool_key,
    text::{excerpt, excerpt_bytes},
};

/// Most inner addresses of the provider that an answer may name.
pub const MAX_GATEWAYS: usize = 4;

/// What the pool signed: carried as it came, shown to whoever must believe the approval.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignedApproval {
    /// The bytes of [`dvpn_common::approval`], exactly as they were signed.
    pub bytes: Vec<u8>,
    /// Ed25519 over them.
    pub signature: [u8; 64],
}

/// A verified subscription plus a pool's (or orchestrator's) yes, for one key at one provider.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Approval {
    provider: Provider,
    client_key: PublicKey,
    addresses: Vec<IpNetwork>,
    gateways: Vec<IpAddr>,
    expires_at: Timestamp,
    from_pool: bool,
    serial: Option<u64>,
    signed: Option<SignedApproval>,
    signer: Option<VerifyingKey>,
    lease: Option<Lease>,
}

/// What the pool was asked, and what its answer is held against.
#[derive(Debug, Clone, Copy)]
pub struct PoolRequest<'a> {
    /// Who we are to the payment server: verified, or there is nothing to ask.
    pub subscription: &'a Subscription,
    /// Where we want to go.
    pub provider: &'a Provider,
    /// The key to be admitted.
    pub client_key: &'a PublicKey,
    /// `WG_ADDRESS`: for a pool that gives no addresses.
    pub static_addresses: &'a [IpNetwork],
    /// The pool's key, configured or pinned. With one, an answer that is not signed by it, or by a key that its own chain
    /// of rotations leads to, is refused.
    pub pool_key: Option<&'a VerifyingKey>,
    /// The highest serial that this pool signed for us before: a lower one is an old approval shown again.
    pub last_serial: Option<u64>,
    /// The time of the answer.
    pub now: Timestamp,
}

/// What the orchestrator was asked, and what its answer is held against.
#[derive(Debug, Clone, Copy)]
pub struct ProvisionRequest<'a> {
    /// Who we are to the payment server: verified, or there is nothing to ask.
    pub subscription: &'a Subscription,
    /// The key the provider was to be made for.
    pub client_key: &'a PublicKey,
    /// What the provider is checked against, as one of a list would be.
    pub policy: &'a directory::Policy<'a>,
    /// `WG_ADDRESS`: for an orchestrator that gives no address.
    pub static_addresses: &'a [IpNetwork],
    /// The time of the answer.
    pub now: Timestamp,
}

impl Approval {
    /// Reads the pool's answer to the approval request.
    ///
    /// 2xx without `approved: false` approves, even with an empty body: a pool that speaks only the user's contract
    /// says no more.
    pub fn from_pool(asked: &PoolRequest<'_>, status: u16, body: &[u8]) -> Result<Self, Error> {
        check_paid(asked.subscription, asked.now)?;
        let answer = read_status(asked, status, body)?;
        if answer
            .provider_id
            .as_deref()
            .is_some_and(|id| id != asked.provider.id.as_str())
        {
            return Err(Error::Mismatch { field: "provider id" });
        }
        let given = answer
            .addresses
            .clone()
            .or_else(|| answer.address.map(|address| vec![address]));
        let pool_key = signer(asked, &answer)?;
        let signed = read_signed(asked, &answer, pool_key.as_ref())?;
        let addresses = match (&signed, given) {
            (Some((_, fields)), Some(given)) if !same(&given, &fields.addresses) => {
                return Err(Error::Mismatch { field: "addresses" });
            }
            (Some((_, fields)), _) => given_addresses(fields.addresses.clone())?,
            (None, Some(given)) => given_addresses(given)?,
            (None, None) => static_addresses(asked.static_addresses)?,
        };
        let ends = [answer.expires_at, signed.as_ref().map(|(_, fields)| fields.expires_at)];
        Ok(Self {
            provider: asked.provider.clone(),
            client_key: *asked.client_key,
            addresses,
            gateways: gateways(answer.gateways.unwrap_or_default())?,
            expires_at: end(asked.subscription, asked.now, &ends)?,
            from_pool: true,
            serial: signed.as_ref().map(|(_, fields)| fields.serial),
            signed: signed.map(|(signed, _)| signed),
            signer: pool_key,
            lease: None,
        })
    }

    /// Reads the orchestrator's answer (also the fallback script's): a provider made for our key. It is checked as an
    /// entry of a list is, and the approval is complete.
    pub fn from_provision(asked: &ProvisionRequest<'_>, body: &[u8]) -> Result<Self, Error> {
        check_paid(asked.subscription, asked.now)?;
        let answer: Provisioned = read("provisioning", body)?;
        let offer = directory::Entry {
            id: answer.id,
            endpoint: answer.endpoint,
            public_key: answer.public_key,
            allowed_ips: answer.allowed_ips,
            probe: None,
            region: None,
        };
        let provider = check_offer(&offer, asked.policy).map_err(Error::Offer)?;
        if provider.public_key == *asked.client_key {
            return Err(Error::Mismatch { field: "provider key" });
        }
        if answer.client_public_key.is_some_and(|key| key != *asked.client_key) {
            return Err(Error::Mismatch { field: "client key" });
        }
        let lease = answer.lease_id.map(Lease::parse).transpose()?;
        let given = answer.addresses.or_else(|| answer.address.map(|address| vec![address]));
        Ok(Self {
            provider,
            client_key: *asked.client_key,
            addresses: match given {
                Some(given) => given_addresses(given)?,
                None => static_addresses(asked.static_addresses)?,
            },
            gateways: gateways(answer.gateways.unwrap_or_default())?,
            expires_at: end(asked.subscription, asked.now, &[answer.lease_expires_at])?,
            from_pool: false,
            serial: None,
            signed: None,
            signer: None,
            lease,
        })
    }

    /// Takes the orchestrator's word that the lease lasts until `until`; the subscription and 24 hours still bound it.
    /// Without a lease there is nothing to extend.
    pub fn extend_lease(&mut self, subscription: &Subscription, until: Timestamp, now: Timestamp) -> Result<(), Error> {
        if self.lease.is_some() {
            check_paid(subscription, now)?;
            self.expires_at = end(subscription, now, &[Some(until)])?;
        }
        Ok(())
    }

    /// Whom it lets us use.
    pub fn provider(&self) -> &Provider {
        &self.provider
    }
    /// Our key that was approved.
    pub fn client_key(&self) -> &PublicKey {
        &self.client_key
    }
    /// Our inner addresses: single hosts, at most one of each family.
    pub fn addresses(&self) -> &[IpNetwork] {
        &self.addresses
    }
    /// The provider's inner addresses, where it answers DNS; empty from a pool that speaks only the user's contract.
    pub fn gateways(&self) -> &[IpAddr] {
        &self.gateways
    }
    /// End of the approval, never later than the subscription's or 24 hours.
    pub fn expires_at(&self) -> Timestamp {
        self.expires_at
    }
    /// Whether the pool admitted the key: then it is told when the key is used no more. Else the orchestrator did.
    pub fn is_from_pool(&self) -> bool {
        self.from_pool
    }
    /// The serial that the pool signed, if it signed.
    pub fn serial(&self) -> Option<u64> {
        self.serial
    }
    /// Whether a tunnel that stands under `old` can go on under this one without being taken down: same provider, same
    /// addresses, and either the same key or a gateway that shows when the addresses have moved to the new one.
    pub fn continues(&self, old: &Self) -> bool {
        let moves = self
            .gateways
            .iter()
            .any(|gateway| self.addresses.iter().any(|ours| ours.is_ipv4() == gateway.is_ipv4()));
        self.provider == old.provider
            && same(&self.addresses, &old.addresses)
            && (self.client_key == old.client_key || moves)
    }
    /// What names a provider of the orchestrator's to it, to be renewed and returned.
    pub fn lease(&self) -> Option<&Lease> {
        self.lease.as_ref()
    }
    /// The key that signed it, for a pool whose key is known: the key to pin from now on.
    pub fn signer(&self) -> Option<&VerifyingKey> {
        self.signer.as_ref()
    }
    /// What the pool signed, if it did.
    pub fn signed(&self) -> Option<&SignedApproval> {
        self.signed.as_ref()
    }
}

/// The orchestrator's answer; shape only.
#[derive(Deserialize)]
struct Provisioned {
    id: String,
    endpoint: String,
    public_key: String,
    #[serde(default)]
    allowed_ips: Option<Vec<String>>,
    #[serde(default)]
    client_public_key: Option<PublicKey>,
    #[serde(default)]
    address: Option<IpNetwork>,
    #[serde(default)]
    addresses: Option<Vec<IpNetwork>>,
    #[serde(default)]
    gateways: Option<Vec<IpAddr>>,
    #[serde(default)]
    lease_id: Option<String>,
    #[serde(default)]
    lease_expires_at: Option<Timestamp>,
}

fn check_paid(subscription: &Subscription, now: Timestamp) -> Result<(), Error> {
    if subscription.is_valid(now) {
        Ok(())
    } else {
        Err(Error::SubscriptionOver(subscription.valid_until()))
    }
}

fn read<'a, T: Deserialize<'a>>(from: &'static str, body: &'a [u8]) -> Result<T, Error> {
    if body.len() > MAX_BODY_BYTES {
        return Err(Error::Unreadable {
            from,
            reason: format!("{} bytes, {MAX_BODY_BYTES} are allowed", body.len()),
        });
    }
    // Serde would also take an array for a struct, field by field.
    if body.iter().find(|byte| !byte.is_ascii_whitespace()) != Some(&b'{') {
        return Err(Error::Unreadable {
            from,
            reason: format!("\"{}\" is no JSON object", excerpt_bytes(body)),
        });
    }
    serde_json::from_slice(body).map_err(|error| Error::Unreadable {
        from,
        reason: excerpt(&error.to_string()),
    })
}

fn read_status(asked: &PoolRequest<'_>, status: u16, body: &[u8]) -> Result<ApproveResponse, Error> {
    let said = || match read::<ApproveResponse>("approval", body) {
        Ok(ApproveResponse { error: Some(error), .. }) => excerpt(&error),
        Ok(_) | Err(_) if body.is_empty() => "no reason given".to_owned(),
        Ok(_) | Err(_) => excerpt_bytes(body),
    };
    let provider = || asked.provider.id.clone();
    match status {
        200..=299 if body.trim_ascii().is_empty() => Ok(ApproveResponse::default()),
        200..=299 => match read::<ApproveResponse>("approval", body)? {
            answer if answer.approved == Some(false) => Err(Error::Denied {
                provider: provider(),
                status,
                said: said(),
            }),
            answer => Ok(answer),
        },
        401 | 402 => Err(Error::Token { status, said: said() }),
        403 | 404 | 409 => Err(Error::Denied {
            provider: provider(),
            status,
            said: said(),
        }),
        503 => Err(Error::ProviderSilent { provider: provider() }),
        _ => Err(Error::Status { status, said: said() }),
    }
}

/// The key that must have signed: the known one, or the one that the answer's chain leads to from there. Where none is
/// known, none is learned here: a list is what a key is pinned by.
fn signer(asked: &PoolRequest<'_>, answer: &ApproveResponse) -> Result<Option<VerifyingKey>, Error> {
    match (asked.pool_key, answer.pool_key) {
        (Some(known), Some(announced)) => pool_key::follow(*known, announced, &answer.rotations)
            .map(Some)
            .map_err(Error::PoolKey),
        (known, _) => Ok(known.copied()),
    }
}

fn read_signed(
    asked: &PoolRequest<'_>,
    answer: &ApproveResponse,
    signer: Option<&VerifyingKey>,
) -> Result<Option<(SignedApproval, ApprovalFields)>, Error> {
    let (bytes, signature) = match (&answer.approval, &answer.signature) {
        (Some(bytes), Some(signature)) => (bytes, signature),
        // Half of the two is a broken signature, not an unsigned answer.
        (Some(_), None) | (None, Some(_)) => return Err(Error::Signature),
        (None, None) if asked.pool_key.is_some() => return Err(Error::Unsigned),
        (None, None) => return Ok(None),
    };
    let bytes = STANDARD
        .decode(bytes)
        .ok()
        .ok_or(Error::Signed(signed::Error::Format))?;
    let signature: [u8; 64] = STANDARD
        .decode(signature)
        .ok()
        .and_then(|raw| raw.try_into().ok())
        .ok_or(Error::Signature)?;
    if let Some(key) = signer {
        UnparsedPublicKey::new(&ED25519, key.as_bytes())
            .verify(&bytes, &signature)
            .ok()
            .ok_or(Error::Signature)?;
    }
    // Without the pool's key the signature says nothing to us, yet the provider will check it: what it is about must
    // be what was asked all the same.
    let fields = ApprovalFields::decode(&bytes).map_err(Error::Signed)?;
    fields.check_time(asked.now).map_err(Error::Signed)?;
    let mismatch = if fields.provider_id != asked.provider.id {
        Some("provider id")
    } else if fields.provider_key != asked.provider.public_key {
        Some("provider key")
    } else if fields.client_key != *asked.client_key {
        Some("client key")
    } else {
        None
    };
    if let Some(seen) = asked
        .last_serial
        .filter(|seen| asked.pool_key.is_some() && fields.serial < *seen)
    {
        let serial = fields.serial;
        return Err(Error::Older { serial, seen });
    }
    match mismatch {
        Some(field) => Err(Error::Mismatch { field }),
        None => Ok(Some((SignedApproval { bytes, signature }, fields))),
    }
}

fn same(a: &[IpNetwork], b: &[IpNetwork]) -> bool {
    a.len() == b.len() && a.iter().all(|address| b.contains(address))
}

/// Addresses that somebody else chose for our interface: inside private networks, or they would shadow real hosts.
fn given_addresses(addresses: Vec<IpNetwork>) -> Result<Vec<IpNetwork>, Error> {
    for address in &addresses {
        let refused = |reason| {
            Err(Error::Address {
                field: "address",
                address: address.to_string(),
                reason,
            })
        };
        if *address != IpNetwork::from(address.ip()) {
            return refused("it is not a single host (/32 or /128)");
        }
        if !is_private(address.ip()) {
            return refused("it is not inside a private network");
        }
    }
    one_per_family(addresses)
}

/// Our own choice: any unicast address; a prefix length, as wg-quick(8) takes it, is cut to the host.
fn static_addresses(addresses: &[IpNetwork]) -> Result<Vec<IpNetwork>, Error> {
    one_per_family(
        addresses
            .iter()
            .filter(|a| is_unicast(a.ip()))
            .map(|a| IpNetwork::from(a.ip()))
            .collect(),
    )
}

fn one_per_family(addresses: Vec<IpNetwork>) -> Result<Vec<IpNetwork>, Error> {
    let (v4, v6): (Vec<&IpNetwork>, Vec<&IpNetwork>) = addresses.iter().partition(|address| address.is_ipv4());
    match (v4.as_slice(), v6.as_slice()) {
        ([], []) => Err(Error::NoAddress),
        ([_, second, ..], _) | (_, [_, second, ..]) => Err(Error::Address {
            field: "address",
            address: second.to_string(),
            reason: "it is the second of its family",
        }),
        _ => Ok(addresses),
    }
}

fn gateways(gateways: Vec<IpAddr>) -> Result<Vec<IpAddr>, Error> {
    let refused = |gateway: &IpAddr, reason| Error::Address {
        field: "gateway",
        address: gateway.to_string(),
        reason,
    };
    if let Some(gateway) = gateways.get(MAX_GATEWAYS) {
        return Err(refused(gateway, "there are more than 4"));
    }
    match gateways.iter().find(|gateway| !is_private(**gateway)) {
        Some(gateway) => Err(refused(gateway, "it is not inside a private network")),
        None => Ok(gateways),
    }
}

/// The earliest of: the subscription's end, 24 hours from now, and what the answer says.
fn end(subscription: &Subscription, now: Timestamp, ends: &[Option<Timestamp>]) -> Result<Timestamp, Error> {
    let longest = now.saturating_add(MAX_APPROVAL_LIFE).unwrap_or(now);
    let limit = longest.min(subscription.valid_until());
    let end = ends.iter().flatten().fold(limit, |earliest, end| earliest.min(*end));
    if end <= now { Err(Error::Over(end)) } else { Ok(end) }
}

#[cfg(test)]
mod tests;
