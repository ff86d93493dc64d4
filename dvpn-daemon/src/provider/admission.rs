//! Whether a client that the pool names is admitted: a pure check of its approval against what we know.

use aws_lc_rs::signature::{ED25519, UnparsedPublicKey};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use dvpn_common::{
    approval::{self, ApprovalFields, MAX_APPROVAL_BYTES},
    contract::PeerEntry,
    ids::ProviderId,
    keys::{PublicKey, VerifyingKey},
    limits::MAX_CLOCK_SKEW,
};
use ipnetwork::IpNetwork;
use jiff::Timestamp;

use super::Serials;

/// Why a client is refused. The pool is told.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No base64 of a bounded size.
    #[error("the approval or its signature is not base64 of a sensible length")]
    Encoding,
    /// Not signed by the pool's pinned key, over exactly these bytes.
    #[error("the approval is not signed by this pool's key")]
    Signature,
    /// It does not read, or its time is over or not come.
    #[error(transparent)]
    Approval(#[from] approval::Error),
    /// For another provider.
    #[error("the approval is for another provider")]
    OtherProvider,
    /// For another key of ours.
    #[error("the approval is for another provider key")]
    OtherProviderKey,
    /// The entry and its approval name different clients, or the client has our own key.
    #[error("the approval is for another client key")]
    OtherClient,
    /// The entry and its approval name different addresses.
    #[error("the approval is for other addresses")]
    OtherAddresses,
    /// An address that no client of ours can have.
    #[error("the address {0} is not a client's in our networks")]
    Address(IpNetwork),
    /// An address that another client has.
    #[error("the address {0} is another client's")]
    Taken(IpNetwork),
    /// Over already.
    #[error("the approval ended at {0}")]
    Over(Timestamp),
    /// An older approval than the newest seen for this client.
    #[error("serial {offered} is older than {seen}")]
    Serial {
        /// In this approval.
        offered: u64,
        /// The highest so far.
        seen: u64,
    },
    /// Issued before this node lost its record of serials.
    #[error("this node lost its record of serials: only approvals from after its start are taken")]
    Forgotten,
    /// More clients than its owner admits, or than there is memory for.
    #[error("this node is full")]
    Full,
    /// No new clients now.
    #[error("this node takes no new clients: {0}")]
    NotNow(&'static str),
}

/// A client that may be a peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Admitted {
    /// Its key.
    pub key: PublicKey,
    /// Its inner addresses.
    pub addresses: Vec<IpNetwork>,
    /// When the peer goes, whatever the pool says or does not say: the end of its approval, and not later than the
    /// allowed skew of clocks after it.
    pub ends_at: Timestamp,
    /// Of its approval.
    pub serial: u64,
}

/// What approvals are checked against.
#[derive(Debug, Clone)]
pub struct Ground {
    /// The pool's pinned key.
    pub pool_key: VerifyingKey,
    /// Our id.
    pub provider_id: ProviderId,
    /// Our WireGuard key.
    pub provider_key: PublicKey,
    /// Our inner networks, our own address in each.
    pub networks: Vec<IpNetwork>,
}

impl Ground {
    /// Checks one entry completely. `taken` says who has an address already.
    pub fn admit(
        &self,
        entry: &PeerEntry,
        serials: &mut Serials,
        taken: impl Fn(&IpNetwork) -> Option<PublicKey>,
        now: Timestamp,
    ) -> Result<Admitted, Refusal> {
        if entry.approval.len() > MAX_APPROVAL_BYTES * 2 || entry.signature.len() > 128 {
            return Err(Refusal::Encoding);
        }
        let bytes = STANDARD.decode(&entry.approval).ok().ok_or(Refusal::Encoding)?;
        let signature = STANDARD.decode(&entry.signature).ok().ok_or(Refusal::Encoding)?;
        UnparsedPublicKey::new(&ED25519, self.pool_key.as_bytes())
            .verify(&bytes, &signature)
            .ok()
            .ok_or(Refusal::Signature)?;
        let fields = ApprovalFields::decode(&bytes)?;
        if fields.provider_id != self.provider_id {
            return Err(Refusal::OtherProvider);
        }
        if fields.provider_key != self.provider_key {
            return Err(Refusal::OtherProviderKey);
        }
        if fields.client_key != entry.public_key || fields.client_key == self.provider_key {
            return Err(Refusal::OtherClient);
        }
        if fields.addresses != entry.addresses {
            return Err(Refusal::OtherAddresses);
        }
        for address in &fields.addresses {
            if !self.is_clients(address) {
                return Err(Refusal::Address(*address));
            }
            if taken(address).is_some_and(|holder| holder != fields.client_key) {
                return Err(Refusal::Taken(*address));
            }
        }
        fields.check_time(now)?;
        let expires_at = fields.expires_at.min(entry.expires_at);
        // Our clock may be ahead of the pool's by as much.
        let ends_at = expires_at.saturating_add(MAX_CLOCK_SKEW).unwrap_or(expires_at);
        if ends_at <= now {
            return Err(Refusal::Over(expires_at));
        }
        serials.check(&fields.client_key, fields.serial, fields.issued_at)?;
        serials.note(&fields.client_key, fields.serial, now)?;
        Ok(Admitted {
            key: fields.client_key,
            addresses: fields.addresses,
            ends_at,
            serial: fields.serial,
        })
    }

    /// A single host inside one of our networks that is neither we nor the network nor its broadcast.
    fn is_clients(&self, address: &IpNetwork) -> bool {
        let ip = address.ip();
        let single = IpNetwork::from(ip) == *address;
        single
            && self.networks.iter().any(|network| {
                let edge = network.network() == ip || (network.is_ipv4() && network.broadcast() == ip);
                network.contains(ip) && network.ip() != ip && !edge
            })
    }
}
