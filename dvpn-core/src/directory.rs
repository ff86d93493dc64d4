//! Whether a provider list is believed. The pool is hostile until proven otherwise.
//!
//! A list is taken whole or not at all: one bad entry means a pool that does not check what it publishes, or one that
//! probes what we accept. The caller keeps its last good list. Whose list it is, [`trust`] says.

pub mod trust;

use std::{
    collections::BTreeSet,
    fmt,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
};

use dvpn_common::{
    contract::{KeyRotation, ProviderEntry},
    ids::{ProviderId, Region},
    keys::{PublicKey, VerifyingKey},
    limits::{MAX_ALLOWED_IPS, MAX_LIST_BYTES, MAX_PROVIDERS},
};
use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};
use jiff::Timestamp;
use serde::{
    Deserialize, Deserializer,
    de::{Error as _, SeqAccess, Visitor},
};

use crate::{
    Failure, Retry,
    address::{is_global_unicast, is_unicast},
    text::excerpt,
};
use trust::{Claim, PoolRecord};

/// One offer, every field checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Provider {
    /// Its id.
    pub id: ProviderId,
    /// Outer address and port of its WireGuard socket.
    pub endpoint: SocketAddr,
    /// Its WireGuard key.
    pub public_key: PublicKey,
    /// What it carries; never empty.
    pub allowed_ips: Vec<IpNetwork>,
    /// Where its latency echo answers: the endpoint's address, any port.
    pub probe: Option<SocketAddr>,
    /// Where it stands.
    pub region: Option<Region>,
}

/// A believed list.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Directory {
    /// The offers, in the pool's order; ids and keys are unique.
    pub providers: Vec<Provider>,
    /// The pool's version of the list.
    pub version: Option<u64>,
    /// When this copy stops being good.
    pub expires_at: Option<Timestamp>,
    /// The pool's key that signed it; nothing from a pool that speaks only the user's contract.
    pub signer: Option<VerifyingKey>,
}

/// What a list is checked against.
#[derive(Debug, Clone, Copy, Default)]
pub struct Policy<'a> {
    /// Our own WireGuard keys: a list that offers us ourselves is refused.
    pub own_keys: &'a [PublicKey],
    /// This install as a provider, if it registered: exactly that entry is left out instead of refusing the list.
    pub own_node: Option<(&'a ProviderId, &'a PublicKey)>,
    /// True for a pool configured as private: endpoints may be private or loopback addresses.
    pub private_endpoints: bool,
}

/// Why a list, or a single offer, is not believed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// More bytes than [`MAX_LIST_BYTES`].
    #[error("the provider list has {bytes} bytes, {MAX_LIST_BYTES} are allowed")]
    TooLarge {
        /// How many.
        bytes: usize,
    },
    /// More entries than [`MAX_PROVIDERS`].
    #[error("the provider list has more than {MAX_PROVIDERS} providers")]
    TooMany,
    /// Not JSON, truncated, or not of the contract's shape.
    #[error("the provider list does not read: {reason}")]
    Unreadable {
        /// What the parser says, shortened.
        reason: String,
    },
    /// Over.
    #[error("the provider list ended at {expires_at}")]
    Expired {
        /// When.
        expires_at: Timestamp,
    },
    /// The pool's key is known, and the list is not signed (or lacks the version and expiry that are signed with it).
    #[error("the provider list is not signed, and this pool's key is known")]
    Unsigned,
    /// The signature is not by the pool's key.
    #[error("the provider list's signature is not the pool's")]
    Signature,
    /// The list names another key than the known one, and no chain of rotations leads there.
    #[error("the pool shows another key ({announced}) than the known one ({known}), which does not vouch for it")]
    OtherKey {
        /// The key configured or pinned.
        known: VerifyingKey,
        /// What the list says.
        announced: VerifyingKey,
    },
    /// A list from before one that was already taken.
    #[error("the provider list is version {version}, and version {seen} was already seen")]
    Older {
        /// Its version.
        version: u64,
        /// The highest seen.
        seen: u64,
    },
    /// A field of an entry is refused.
    #[error("provider {index} ({id}): {field} {reason}")]
    Entry {
        /// Position in the list, from 0.
        index: usize,
        /// Its id, shortened and printable.
        id: String,
        /// Which field.
        field: &'static str,
        /// Why.
        reason: String,
    },
}

impl Error {
    /// Whether asking again can help: always, since the pool may mend its list.
    pub fn retry(&self) -> Retry {
        Retry::Backoff
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let how = match &error {
            Error::Expired { .. } => "check this machine's clock; otherwise the pool must publish a fresh list",
            Error::Unreadable { .. } => "check that POOL_URL is a pool's provider list (it ends in /providers)",
            Error::Entry {
                field: "endpoint" | "probe",
                ..
            } => "tell the pool's operator; for a pool of your own inside a private network set POOL_PRIVATE=true",
            Error::Unsigned | Error::Signature | Error::OtherKey { .. } => {
                "somebody stands between, or the pool lost its key: ask its operator for the key by another way and set \
                 POOL_PUBLIC_KEY to it"
            }
            Error::Older { .. } => {
                "the pool, or somebody between, shows an old list; if the pool was set up anew, remove the file pool \
                 from the state directory"
            }
            Error::TooLarge { .. } | Error::TooMany | Error::Entry { .. } => {
                "tell the pool's operator; the whole list is refused until this is mended"
            }
        };
        Self {
            retry: error.retry(),
            how: how.to_owned(),
            what: error.to_string(),
        }
    }
}

/// Reads a provider list: an object with `providers`, or a bare array. `known` is what earlier lists and the
/// configuration say of this pool.
pub fn parse(body: &[u8], policy: &Policy<'_>, known: &PoolRecord, now: Timestamp) -> Result<Directory, Error> {
    if body.len() > MAX_LIST_BYTES {
        return Err(Error::TooLarge { bytes: body.len() });
    }
    let is_array = body.iter().find(|byte| !byte.is_ascii_whitespace()) == Some(&b'[');
    let list = if is_array {
        serde_json::from_slice(body).map(|providers| List {
            providers,
            ..List::default()
        })
    } else {
        serde_json::from_slice(body)
    }
    .map_err(|error| {
        let reason = error.to_string();
        if reason.contains(TOO_MANY) {
            Error::TooMany
        } else {
            Error::Unreadable {
                reason: excerpt(&reason),
            }
        }
    })?;
    let claim = Claim {
        providers: &list.providers.0,
        version: list.version,
        expires_at: list.expires_at,
        signature: list.signature.as_deref(),
        pool_key: list.pool_key,
        rotations: &list.rotations,
    };
    let signer = claim.check(known, now)?;

    let (mut ids, mut keys) = (BTreeSet::new(), BTreeSet::new());
    let mut providers = Vec::with_capacity(list.providers.0.len());
    for (index, entry) in list.providers.0.into_iter().enumerate() {
        let shown = excerpt(&entry.id);
        let refused = |(field, reason)| Error::Entry {
            index,
            id: shown.clone(),
            field,
            reason,
        };
        let provider = check(&entry, policy.private_endpoints).map_err(refused)?;
        if !ids.insert(provider.id.clone()) {
            return Err(refused(("id", "is in the list twice".to_owned())));
        }
        if !keys.insert(provider.public_key) {
            return Err(refused((
                "public_key",
                "belongs to two providers of the list".to_owned(),
            )));
        }
        if policy.own_node == Some((&provider.id, &provider.public_key)) {
            continue;
        }
        let is_own_node = policy.own_node.is_some_and(|(_, key)| *key == provider.public_key);
        if is_own_node || policy.own_keys.contains(&provider.public_key) {
            return Err(refused(("public_key", "is this machine's own key".to_owned())));
        }
        providers.push(provider);
    }
    Ok(Directory {
        providers,
        version: list.version,
        expires_at: list.expires_at,
        signer,
    })
}

/// Reads one offer made outside a list (by the orchestrator), with the same checks; errors speak of provider 0.
pub(crate) fn check_offer(entry: &Entry, policy: &Policy<'_>) -> Result<Provider, Error> {
    let id = excerpt(&entry.id);
    let refused = |(field, reason)| Error::Entry {
        index: 0,
        id: id.clone(),
        field,
        reason,
    };
    let provider = check(entry, policy.private_endpoints).map_err(refused)?;
    if policy.own_keys.contains(&provider.public_key)
        || policy.own_node.is_some_and(|(_, key)| *key == provider.public_key)
    {
        return Err(refused(("public_key", "is this machine's own key".to_owned())));
    }
    Ok(provider)
}

const TOO_MANY: &str = "more providers than allowed";

#[derive(Default, Deserialize)]
struct List {
    providers: Entries,
    #[serde(default)]
    version: Option<u64>,
    #[serde(default)]
    expires_at: Option<Timestamp>,
    #[serde(default)]
    signature: Option<String>,
    #[serde(default)]
    pool_key: Option<VerifyingKey>,
    #[serde(default)]
    rotations: Vec<KeyRotation>,
}

/// An offer as it stands in JSON; shape only.
pub(crate) type Entry = ProviderEntry;

#[derive(Default)]
struct Entries(Vec<Entry>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Bounded;
        impl<'de> Visitor<'de> for Bounded {
            type Value = Entries;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an array of providers")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Entries, A::Error> {
                let mut entries = Vec::new();
                loop {
                    let index = entries.len();
                    let entry = seq.next_element();
                    match entry.map_err(|error| A::Error::custom(format_args!("provider {index}: {error}")))? {
                        None => return Ok(Entries(entries)),
                        // Counted while reading, so that a list of empty objects costs no more than a full one.
                        Some(_) if index >= MAX_PROVIDERS => return Err(A::Error::custom(TOO_MANY)),
                        Some(entry) => entries.push(entry),
                    }
                }
            }
        }
        deserializer.deserialize_seq(Bounded)
    }
}

type Refusal = (&'static str, String);

fn check(entry: &Entry, private: bool) -> Result<Provider, Refusal> {
    let endpoint = socket_address("endpoint", &entry.endpoint, private)?;
    let probe = match &entry.probe {
        None => None,
        Some(text) => {
            let probe = socket_address("probe", text, private)?;
            // Probes go out in bursts to every sampled provider: a list must not aim them at a third party.
            if probe.ip() != endpoint.ip() {
                return Err((
                    "probe",
                    format!("{probe} is not at the endpoint's address {}", endpoint.ip()),
                ));
            }
            Some(probe)
        }
    };
    Ok(Provider {
        id: entry
            .id
            .parse()
            .map_err(|error| ("id", format!("is refused: {error}")))?,
        endpoint,
        public_key: entry
            .public_key
            .parse()
            .map_err(|error| ("public_key", format!("is refused: {error}")))?,
        allowed_ips: allowed_ips(entry)?,
        probe,
        region: match &entry.region {
            None => None,
            Some(text) => Some(
                text.parse()
                    .map_err(|error| ("region", format!("is refused: {error}")))?,
            ),
        },
    })
}

fn allowed_ips(entry: &Entry) -> Result<Vec<IpNetwork>, Refusal> {
    let Some(texts) = &entry.allowed_ips else {
        return Ok(everything());
    };
    if texts.is_empty() || texts.len() > MAX_ALLOWED_IPS {
        return Err((
            "allowed_ips",
            format!("has {} prefixes; 1 to {MAX_ALLOWED_IPS} are allowed", texts.len()),
        ));
    }
    texts.iter().map(|text| prefix(text)).collect()
}

fn everything() -> Vec<IpNetwork> {
    // A prefix length of 0 is always valid.
    let v4 = Ipv4Network::new(Ipv4Addr::UNSPECIFIED, 0).map(IpNetwork::V4);
    let v6 = Ipv6Network::new(Ipv6Addr::UNSPECIFIED, 0).map(IpNetwork::V6);
    v4.into_iter().chain(v6).collect()
}

fn prefix(text: &str) -> Result<IpNetwork, Refusal> {
    let network: IpNetwork = text
        .trim()
        .parse()
        .ok()
        .ok_or_else(|| ("allowed_ips", format!("\"{}\" is no prefix", excerpt(text))))?;
    // Host bits are cut off, as wg(8) does.
    IpNetwork::new(network.network(), network.prefix())
        .ok()
        .ok_or_else(|| ("allowed_ips", format!("\"{}\" is no prefix", excerpt(text))))
}

fn socket_address(field: &'static str, text: &str, private: bool) -> Result<SocketAddr, Refusal> {
    let parsed: SocketAddr = text.parse().ok().ok_or_else(|| {
        (
            field,
            format!("\"{}\" is no IP:port (names are not looked up)", excerpt(text)),
        )
    })?;
    if matches!(parsed, SocketAddr::V6(v6) if v6.scope_id() != 0) {
        return Err((
            field,
            format!("{parsed} has a zone; only addresses that mean the same everywhere are allowed"),
        ));
    }
    let address = SocketAddr::new(parsed.ip().to_canonical(), parsed.port());
    if address.port() == 0 {
        return Err((field, format!("{address} has port 0")));
    }
    if !is_unicast(address.ip()) {
        return Err((field, format!("{address} is no address of one host")));
    }
    if !private && !is_global_unicast(address.ip()) {
        return Err((field, format!("{address} is not a public address")));
    }
    Ok(address)
}

#[cfg(test)]
mod tests;
