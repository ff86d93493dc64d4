//! What each client is granted, in step with who is a peer: a grant stands before its peer and goes after it.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::{Duration, Instant},
};

use dvpn_common::{
    abi::{Counter, Traffic},
    rate::Rate,
};
use ipnetwork::IpNetwork;
use jiff::Timestamp;

use super::Admitted;
use crate::{
    ebpf::Loader,
    host::{self, Grant, Host, PROVIDER_INTERFACE, PeerNumber, Shaper, ShaperConfig},
    tunnel::DEFAULT_MTU_BYTES,
};

/// How the grants of a provider are enforced.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Enforcement {
    /// The mode, and why not a better one: [`host::Modes`].
    pub mode: String,
    /// What one connection is granted in each direction.
    pub share: Option<Rate>,
    /// What all have together in each direction.
    pub together: Option<Rate>,
    /// What was dropped, by reason.
    pub dropped: BTreeMap<&'static str, Counter>,
}

/// The grants of the clients that are peers.
pub(super) struct Grants {
    shaper: Shaper,
    /// What the line carries, of which a connection has half; nothing is granted while it is not known.
    total: Option<Rate>,
    /// `NODE_LIMIT_MBPS`.
    limit: Option<Rate>,
    held: BTreeMap<BTreeSet<IpAddr>, Held>,
}

struct Held {
    number: PeerNumber,
    ends_at: Timestamp,
}

impl Grants {
    /// Prepares the provider's interface, which is down.
    pub(super) async fn open(host: &Host, loader: &Loader, limit: Option<Rate>) -> Result<Self, host::Error> {
        let config = ShaperConfig::new(PROVIDER_INTERFACE, DEFAULT_MTU_BYTES);
        let mut shaper = Shaper::open(host, loader, config).await?;
        // Whatever is there is of a run whose peers are gone.
        shaper.retain(&BTreeSet::new()).await?;
        tracing::info!("grants are enforced by {}", shaper.modes());
        Ok(Self {
            shaper,
            total: None,
            limit,
            held: BTreeMap::new(),
        })
    }

    /// What one connection is granted in each direction.
    pub(super) fn share(&self) -> Option<Rate> {
        self.total.map(Rate::half).filter(|share| *share > Rate::ZERO)
    }

    fn together(&self) -> Option<Rate> {
        [self.total, self.limit].into_iter().flatten().min()
    }

    /// The line carries so much from now on. When nobody knows any more, those who have a grant keep it.
    pub(super) async fn set_total(&mut self, total: Option<Rate>) -> Result<(), host::Error> {
        if total.is_none() || total == self.total {
            return Ok(());
        }
        self.total = total;
        let together = self.together();
        self.shaper.set_node(together, together).await?;
        let share = self.share().unwrap_or(Rate::ZERO);
        let rates: Vec<_> = self.held.values().map(|held| (held.number, share, share)).collect();
        self.shaper.resize(&rates).await
    }

    /// Grants these clients their share, until their approvals end. Those who have it keep it.
    pub(super) async fn give<'a>(&mut self, clients: impl Iterator<Item = &'a Admitted>) -> Result<(), host::Error> {
        let Some(share) = self.share() else { return Ok(()) };
        let now = (Timestamp::now(), Instant::now());
        let mut granted = Vec::new();
        for client in clients {
            let addresses = addresses(client);
            let held = self.held.get(&addresses);
            if addresses.is_empty() || held.is_some_and(|held| held.ends_at == client.ends_at) {
                continue;
            }
            let grant = Grant {
                down: share,
                up: share,
                until: until(client.ends_at, now),
            };
            granted.push((addresses, client.ends_at, grant));
        }
        if granted.is_empty() {
            return Ok(());
        }
        let wanted: Vec<(Vec<IpAddr>, Grant)> = granted
            .iter()
            .map(|(addresses, _, grant)| (addresses.iter().copied().collect(), *grant))
            .collect();
        let numbers = self.shaper.grant_all(&wanted).await?;
        for ((addresses, ends_at, _), number) in granted.into_iter().zip(numbers) {
            self.held.insert(addresses, Held { number, ends_at });
        }
        Ok(())
    }

    /// Takes the grants back of all but these.
    pub(super) async fn keep_only<'a>(
        &mut self,
        clients: impl Iterator<Item = &'a Admitted>,
    ) -> Result<(), host::Error> {
        let kept: BTreeSet<_> = clients.map(addresses).collect();
        let gone: Vec<_> = self.held.keys().filter(|held| !kept.contains(*held)).cloned().collect();
        let numbers: Vec<_> = gone
            .iter()
            .filter_map(|addresses| self.held.remove(addresses))
            .map(|held| held.number)
            .collect();
        // A number whose addresses all moved to another client is that one's or nobody's.
        let still: BTreeSet<_> = self.held.values().map(|held| held.number).collect();
        let numbers: Vec<_> = numbers.into_iter().filter(|number| !still.contains(number)).collect();
        if numbers.is_empty() {
            return Ok(());
        }
        self.shaper.revoke_all(&numbers).await
    }

    /// Whether something is left to do for those who were granted their share; nothing of theirs passes until then.
    pub(super) fn is_settled(&self) -> bool {
        self.shaper.is_settled()
    }

    /// Does some of it.
    pub(super) async fn settle(&mut self) -> Result<(), host::Error> {
        self.shaper.settle().await
    }

    /// Repairs what others took away.
    pub(super) async fn reconcile(&mut self) -> Result<(), host::Error> {
        for repaired in self.shaper.reconcile().await? {
            tracing::warn!("{repaired} of the grants was gone and is there again");
        }
        Ok(())
    }

    /// What each client's connection carried and lost, towards it and from it.
    pub(super) fn traffic(&self) -> Result<BTreeMap<BTreeSet<IpAddr>, [Traffic; 2]>, host::Error> {
        let counters = self.shaper.counters()?;
        let held = self.held.iter();
        Ok(held
            .filter_map(|(addresses, held)| Some((addresses.clone(), *counters.get(&held.number)?)))
            .collect())
    }

    /// How it is done.
    pub(super) fn enforcement(&self) -> Result<Enforcement, host::Error> {
        Ok(Enforcement {
            mode: self.shaper.modes().to_string(),
            share: self.share(),
            together: self.together(),
            dropped: self.shaper.refused()?,
        })
    }

    /// Takes everything out; the interface is down after it.
    pub(super) async fn close(self) -> Result<(), host::Error> {
        self.shaper.close().await
    }
}

/// What a client's grant is known by: its addresses stay its own when it renews its key.
pub(super) fn addresses(client: &Admitted) -> BTreeSet<IpAddr> {
    client.addresses.iter().map(IpNetwork::ip).collect()
}

fn until(ends_at: Timestamp, (wall, instant): (Timestamp, Instant)) -> Instant {
    /// Approvals are shorter; this keeps sums within what clocks can say.
    const LONGEST: Duration = Duration::from_hours(24 * 30);
    let left = Duration::try_from(ends_at.duration_since(wall)).unwrap_or_default();
    instant + left.min(LONGEST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_ends_with_its_approval_and_one_that_is_over_at_once() {
        let (wall, instant) = (Timestamp::now(), Instant::now());
        let later = wall + jiff::SignedDuration::from_hours(3);
        assert_eq!(until(later, (wall, instant)), instant + Duration::from_hours(3));
        assert_eq!(
            until(wall - jiff::SignedDuration::from_hours(3), (wall, instant)),
            instant
        );
        assert_eq!(
            until(Timestamp::MAX, (wall, instant)),
            instant + Duration::from_hours(720)
        );
    }
}
