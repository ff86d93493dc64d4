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

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use rand::{SeedableRng as _, rngs::StdRng};

    use super::*;
    use crate::session::fixtures::{directory, provider};

    fn rng(seed: u8) -> StdRng {
        StdRng::from_seed([seed; 32])
    }

    fn measured(n: u8, milliseconds: Option<u64>, method: ProbeMethod) -> Measurement {
        Measurement {
            provider: provider(n).id,
            latency: milliseconds.map(Duration::from_millis),
            method,
        }
    }

    fn ids(providers: &VecDeque<Provider>) -> Vec<&str> {
        providers.iter().map(|provider| provider.id.as_str()).collect()
    }

    #[test]
    fn of_six_the_last_used_is_sampled_only_when_fewer_than_a_sample_of_others_remain() {
        let all = directory(6).providers;
        let last = provider(4).endpoint;
        let any = Choice::default();
        for seed in 0..200 {
            let mut order = order(&all, [&any, &any], Some(last), &mut rng(seed));
            let first = sample(&mut order, 3);
            assert!(
                first.iter().all(|provider| provider.endpoint != last),
                "five others are there"
            );
            let second = sample(&mut order, 3);
            assert!(
                second.iter().any(|provider| provider.endpoint == last),
                "two others are left"
            );
            assert!(order.is_empty());
        }
        for (others, sampled) in [(2, true), (3, false)] {
            let few: Vec<_> = all
                .iter()
                .filter(|p| p.endpoint == last)
                .chain(all.iter().take(others))
                .cloned()
                .collect();
            let mut order = order(&few, [&any, &any], Some(last), &mut rng(1));
            assert_eq!(
                sample(&mut order, 3).iter().any(|p| p.endpoint == last),
                sampled,
                "{others} others"
            );
        }
    }

    #[test]
    fn every_provider_comes_first_about_equally_often() {
        let all = directory(6).providers;
        let any = Choice::default();
        let mut rng = rng(9);
        let mut firsts = BTreeMap::new();
        for _ in 0..6_000 {
            *firsts
                .entry(order(&all, [&any, &any], None, &mut rng)[0].id.clone())
                .or_insert(0_u32) += 1;
        }
        assert_eq!(firsts.len(), 6);
        // 1,000 each; five standard deviations are 144.
        assert!(firsts.values().all(|count| (856..=1144).contains(count)), "{firsts:?}");
    }

    #[test]
    fn a_choice_takes_ids_or_regions_and_exclusion_wins() {
        let all = directory(6).providers;
        let pick = |choice: &Choice| {
            let mut chosen = order(&all, [choice, &Choice::default()], None, &mut rng(1));
            chosen.make_contiguous().sort_by(|a, b| a.id.cmp(&b.id));
            chosen
                .iter()
                .map(|p| p.id.as_str().trim_start_matches("provider-").to_owned())
                .collect::<Vec<_>>()
                .join(" ")
        };
        let id = |n: u8| vec![provider(n).id];
        let region = |name: &str| vec![name.parse().unwrap()];
        assert_eq!(pick(&Choice::default()), "1 2 3 4 5 6");
        assert_eq!(
            pick(&Choice {
                only_ids: id(3),
                ..Choice::default()
            }),
            "3"
        );
        assert_eq!(
            pick(&Choice {
                only_regions: region("even"),
                ..Choice::default()
            }),
            "2 4 6"
        );
        assert_eq!(
            pick(&Choice {
                only_ids: id(3),
                only_regions: region("even"),
                ..Choice::default()
            }),
            "2 3 4 6"
        );
        assert_eq!(
            pick(&Choice {
                exclude_regions: region("even"),
                ..Choice::default()
            }),
            "1 3 5"
        );
        assert_eq!(
            pick(&Choice {
                only_ids: id(3),
                exclude_ids: id(3),
                ..Choice::default()
            }),
            ""
        );
        let odd = Choice {
            only_regions: region("odd"),
            ..Choice::default()
        };
        let not_five = Choice {
            exclude_ids: id(5),
            ..Choice::default()
        };
        assert_eq!(
            order(&all, [&odd, &not_five], None, &mut rng(1)).len(),
            2,
            "both choices hold"
        );
    }

    #[test]
    fn the_fastest_comes_first_within_its_method_and_the_dead_and_the_strange_not_at_all() {
        let asked: Vec<_> = (1..=5).map(provider).collect();
        let ranked = rank(
            &asked,
            &[
                measured(1, Some(30), ProbeMethod::Echo),
                measured(2, Some(5), ProbeMethod::Icmp),
                measured(3, None, ProbeMethod::Echo),
                measured(4, Some(10), ProbeMethod::Echo),
                measured(5, Some(4), ProbeMethod::Icmp),
                measured(9, Some(1), ProbeMethod::Echo),
                measured(1, Some(1), ProbeMethod::Echo),
            ],
        );
        assert_eq!(ids(&ranked), ["provider-4", "provider-1", "provider-5", "provider-2"]);
    }
}
