//! What may be asked of a node's peers, what becomes of it, and the rules of one key, one token.

use dvpn_common::{ids::ProviderId, keys::PublicKey};
use jiff::Timestamp;
use sqlx::FromRow;

use super::{Node, TokenHash};

/// Keys one token holds at most: the one in use and the one that follows it.
const KEYS_PER_TOKEN: usize = 2;

/// What an approval is asked for.
#[derive(Debug, Clone)]
pub struct NewApproval {
    /// Whose.
    pub token: TokenHash,
    /// At which node.
    pub node: Node,
    /// The key to admit.
    pub client_key: PublicKey,
    /// The key whose addresses it takes over.
    pub renews: Option<PublicKey>,
    /// The present.
    pub now: Timestamp,
    /// When it ends.
    pub expires_at: Timestamp,
    /// Only to let this very key go on where it is: nothing is made anew.
    pub only_again: bool,
}

/// A stored approval.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApprovalRow {
    /// Names it. Signed as its serial, until a change of the pool's key has it signed again under a higher one.
    pub serial: u64,
    /// The node's sequence number that tells of it.
    pub sequence: u64,
    /// Which host of the node's networks the client is.
    pub host: u32,
    /// The signed bytes.
    pub approval: Vec<u8>,
    /// The signature over them.
    pub signature: [u8; 64],
    /// The key whose addresses it takes over.
    pub renews: Option<PublicKey>,
    /// True if this very key was a peer of this node under this token already.
    pub again: bool,
    /// Whether the token had other keys, which go or are superseded with the acknowledgement.
    pub others: bool,
    /// Keys of the token that had to go at once, before this one came.
    pub removed: Vec<Removed>,
}

/// What became of a request for approval.
#[derive(Debug)]
pub enum ApproveOutcome {
    /// Stored, not yet acknowledged.
    Stored(Box<ApprovalRow>),
    /// The key belongs to another token.
    KeyTaken,
    /// Every address of the node, or every place that its owner gives, is taken.
    NodeFull,
    /// The node takes no new clients.
    NodeDraining,
    /// `renews` is no live approval of this token at this node.
    NothingToRenew,
    /// Another renewal of this connection is not over yet.
    RenewalPending,
    /// The key itself was renewed by another one.
    Superseded,
    /// The key was to go on, and is no peer (any more).
    NotThere,
}

/// A peer that went from a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Removed {
    /// From which node.
    pub node: ProviderId,
    /// The sequence number that tells of it.
    pub sequence: u64,
    /// Whose peer.
    pub client_key: PublicKey,
}

/// An acknowledgement to be stored.
#[derive(Debug, Clone)]
pub struct Acknowledgement {
    /// Whose approval.
    pub token: TokenHash,
    /// Which.
    pub serial: u64,
    /// The key it renews, which goes at this time; every other key of the token goes at once.
    pub supersedes: Option<(PublicKey, Timestamp)>,
    /// Whether there are other keys at all.
    pub others: bool,
    /// Whether this is the first use of the token.
    pub first_use: bool,
}

/// An acknowledged approval.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Acknowledged {
    /// The signed bytes as they are by now: the pool's key may have changed while the node was waited for.
    pub approval: Vec<u8>,
    /// The signature over them.
    pub signature: [u8; 64],
    /// Keys of the token that went.
    pub removed: Vec<Removed>,
}

/// What became of a release.
#[derive(Debug, PartialEq, Eq)]
pub enum ReleaseOutcome {
    /// Released now; the sequence number tells of it.
    Released(u64),
    /// It had been renewed, so it is gone.
    Removed(Removed),
    /// There was nothing to release (any more).
    Nothing,
    /// The key belongs to another token.
    Foreign,
}

#[derive(FromRow)]
pub(super) struct OwnerRow {
    pub(super) serial: i64,
    pub(super) node_id: String,
    pub(super) client_key: Vec<u8>,
}

#[derive(Clone, FromRow)]
#[expect(clippy::struct_excessive_bools, reason = "columns of one row")]
pub(super) struct Held {
    pub(super) serial: i64,
    pub(super) node_id: String,
    pub(super) client_key: Vec<u8>,
    pub(super) host: i64,
    pub(super) ours: bool,
    pub(super) live: bool,
    pub(super) acknowledged: bool,
    pub(super) renews: Option<Vec<u8>>,
    pub(super) superseded: bool,
}

/// What a new approval does to those there are.
pub(super) struct Plan {
    /// The serial of the row it replaces: this very key's.
    pub(super) replaced: Option<i64>,
    /// The host it inherits.
    pub(super) host: Option<i64>,
    pub(super) renews: Option<PublicKey>,
    pub(super) evicted: Vec<Held>,
    pub(super) others: bool,
    /// Clients of the node that are the token's own.
    pub(super) ours_here: i64,
    /// Whether the node has this very key already: a renewal that fails leaves it as it was.
    pub(super) acknowledged: bool,
}

impl Held {
    pub(super) fn owner(self) -> OwnerRow {
        OwnerRow {
            serial: self.serial,
            node_id: self.node_id,
            client_key: self.client_key,
        }
    }
}

/// The rules of one key, one token; a refusal if they do not allow it.
pub(super) fn plan(held: &[Held], wanted: &NewApproval) -> Result<Plan, ApproveOutcome> {
    let (node, key) = (wanted.node.id.as_str(), wanted.client_key.as_bytes().as_slice());
    if held.iter().any(|row| !row.ours && row.live && row.client_key == key) {
        return Err(ApproveOutcome::KeyTaken);
    }
    let here = held.iter().find(|row| row.node_id == node && row.client_key == key);
    if here.is_some_and(|row| row.ours && row.superseded) {
        return Err(ApproveOutcome::Superseded);
    }
    let again = here.filter(|row| row.ours && row.live);
    if wanted.only_again && again.is_none() {
        return Err(ApproveOutcome::NotThere);
    }
    let renewed_by_this = again.and_then(|row| row.renews.as_deref());
    let (mut renews, mut host) = (None, again.map(|row| row.host));
    if let Some(before) = renewed_by_this {
        renews = <[u8; 32]>::try_from(before)
            .ok()
            .and_then(|raw| PublicKey::from_bytes(raw).ok());
    }
    if let Some(old) = wanted.renews
        && renews != Some(old)
    {
        let old_row = held
            .iter()
            .find(|row| row.ours && row.live && row.node_id == node && row.client_key == old.as_bytes());
        match old_row {
            // A key that is a peer already has addresses of its own and takes over none.
            Some(row) if row.acknowledged && again.is_none() => {
                let pending = held
                    .iter()
                    .any(|other| other.ours && other.live && (other.superseded || other.renews.is_some()));
                if pending {
                    return Err(ApproveOutcome::RenewalPending);
                }
                (renews, host) = (Some(old), Some(row.host));
            }
            // What it renewed is gone, and it stands by itself: its answer was lost, and it asks again.
            None if again.is_some_and(|row| row.acknowledged) => {}
            Some(_) | None => return Err(ApproveOutcome::NothingToRenew),
        }
    }
    // The new key is one more: the oldest go until there is room for it. What it renews stays.
    let mut others: Vec<&Held> = held
        .iter()
        .filter(|row| row.ours && row.serial != here.map_or(0, |here| here.serial))
        .collect();
    let kept = |row: &Held| renews.is_some_and(|old| row.node_id == node && row.client_key == old.as_bytes());
    others.sort_by_key(|row| (kept(row), !row.superseded, row.serial));
    let excess = (others.len() + 1).saturating_sub(KEYS_PER_TOKEN);
    let (evicted, stay) = others.split_at_checked(excess).unwrap_or((&[], &others));
    Ok(Plan {
        replaced: here.map(|row| row.serial),
        host,
        renews,
        ours_here: i64::try_from(
            others
                .iter()
                .filter(|row| row.node_id == node && row.renews.is_none())
                .count(),
        )
        .unwrap_or(0),
        acknowledged: again.is_some_and(|row| row.acknowledged),
        others: !stay.is_empty(),
        evicted: evicted.iter().map(|row| (*row).clone()).collect(),
    })
}
