//! Which providers are measured, and which is taken.
//!
//! The directory is shuffled anew at each attempt, with the endpoint used last moved to the end: it is measured only
//! if fewer than a sample of others remain. The first sample is measured; if all of it is dead, the next one is. What
//! answered is tried fastest first, echo before ICMP, because round trips of different methods do not compare.

use std::{cmp::Reverse, collections::VecDeque, net::SocketAddr, time::Duration};

use dvpn_common::status::ProbeMethod;
use rand::{Rng, seq::SliceRandom as _};

use crate::{
    directory::Provider,
    session::{Choice, Measurement},
};

impl Choice {
    /// Whether a provider may be used. Exclusion wins; `only` holds if an id or the region matches.
    pub fn allows(&self, provider: &Provider) -> bool {
        let region_in = |list: &[_]| provider.region.as_ref().is_some_and(|region| list.contains(region));
        let excluded = self.exclude_ids.contains(&provider.id) || region_in(&self.exclude_regions);
        let wanted = !self.is_narrow() || self.only_ids.contains(&provider.id) || region_in(&self.only_regions);
        wanted && !excluded
    }

    /// Whether it names whom to use, so that nobody else will do.
    pub fn is_narrow(&self) -> bool {
        !self.only_ids.is_empty() || !self.only_regions.is_empty()
    }
}

/// The allowed providers in the order in which they are sampled.
///
/// `choices` must all allow a provider. `last_used` goes to the end.
pub fn order<R: Rng + ?Sized>(
    providers: &[Provider],
    choices: [&Choice; 2],
    last_used: Option<SocketAddr>,
    rng: &mut R,
) -> VecDeque<Provider> {
    let mut order: Vec<Provider> = providers
        .iter()
        .filter(|provider| choices.iter().all(|choice| choice.allows(provider)))
        .cloned()
        .collect();
    order.shuffle(rng);
    // A stable sort: everybody else keeps the shuffled place.
    order.sort_by_key(|provider| Some(provider.endpoint) == last_used);
    order.into()
}

/// Takes the next sample off the front.
pub fn sample(order: &mut VecDeque<Provider>, sample_size: usize) -> Vec<Provider> {
    let count = sample_size.max(1).min(order.len());
    order.drain(..count).collect()
}

/// Those of `asked` that answered, fastest first: all measured by echo, then all measured by ICMP.
pub fn rank(asked: &[Provider], measurements: &[Measurement]) -> VecDeque<Provider> {
    let mut alive: Vec<(ProbeMethod, Duration, &Provider)> = asked
        .iter()
        .filter_map(|provider| {
            let measurement = measurements.iter().find(|m| m.provider == provider.id)?;
            measurement
                .latency
                .map(|latency| (measurement.method, latency, provider))
        })
        .collect();
    alive.sort_by_key(|(method, latency, _)| (Reverse(*method == ProbeMethod::Echo), *latency));
    alive.into_iter().map(|(_, _, provider)| provider.clone()).collect()
}
