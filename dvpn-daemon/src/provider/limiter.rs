//! Token buckets per source address, in a table that cannot grow without end.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
    time::{Duration, Instant},
};

/// Pause between two searches for sources that may be forgotten.
const SWEEP_EVERY: Duration = Duration::from_millis(100);

/// A rate and how much of it may come at once.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rate {
    pub(super) per_second: f64,
    pub(super) burst: f64,
}

#[derive(Clone, Copy)]
struct Bucket {
    tokens: f64,
    at: Instant,
}

impl Bucket {
    fn refilled(self, rate: Rate, now: Instant) -> f64 {
        (self.tokens + now.saturating_duration_since(self.at).as_secs_f64() * rate.per_second).min(rate.burst)
    }

    fn take(&mut self, rate: Rate, now: Instant) -> bool {
        self.tokens = self.refilled(rate, now);
        self.at = now;
        if self.tokens < 1.0 {
            return false;
        }
        self.tokens -= 1.0;
        true
    }
}

/// Limits each source, and all together.
pub(super) struct Limiter {
    each: Rate,
    all: Rate,
    total: Bucket,
    sources: HashMap<IpAddr, Bucket>,
    capacity: usize,
    swept: Option<Instant>,
}

impl Limiter {
    pub(super) fn new(each: Rate, all: Rate, capacity: usize, now: Instant) -> Self {
        let total = Bucket {
            tokens: all.burst,
            at: now,
        };
        Self {
            each,
            all,
            total,
            sources: HashMap::new(),
            capacity,
            swept: None,
        }
    }

    /// Whether one more from `source` is answered. While the table is full, newcomers are not.
    pub(super) fn allows(&mut self, source: IpAddr, now: Instant) -> bool {
        let source = site(source);
        if self.sources.len() >= self.capacity && !self.sources.contains_key(&source) && !self.make_room(now) {
            return false;
        }
        let new = Bucket {
            tokens: self.each.burst,
            at: now,
        };
        self.sources.entry(source).or_insert(new).take(self.each, now) && self.total.take(self.all, now)
    }

    fn make_room(&mut self, now: Instant) -> bool {
        if self
            .swept
            .is_some_and(|at| now.saturating_duration_since(at) < SWEEP_EVERY)
        {
            return false;
        }
        self.swept = Some(now);
        let rate = self.each;
        self.sources.retain(|_, bucket| bucket.refilled(rate, now) < rate.burst);
        self.sources.len() < self.capacity
    }
}

/// What one customer of a provider can vary without cost counts as one source: a /64.
fn site(source: IpAddr) -> IpAddr {
    match source.to_canonical() {
        IpAddr::V4(v4) => v4.into(),
        IpAddr::V6(v6) => {
            let [a, b, c, d, ..] = v6.segments();
            Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EACH: Rate = Rate {
        per_second: 1.0,
        burst: 2.0,
    };
    const ALL: Rate = Rate {
        per_second: 10.0,
        burst: 4.0,
    };

    fn address(last: u8) -> IpAddr {
        IpAddr::from([192, 0, 2, last])
    }

    #[test]
    fn a_source_has_its_burst_and_then_its_rate() {
        let now = Instant::now();
        let mut limiter = Limiter::new(EACH, ALL, 8, now);
        let answers: Vec<bool> = (0..3).map(|_| limiter.allows(address(1), now)).collect();
        assert_eq!(answers, [true, true, false]);
        assert!(limiter.allows(address(1), now + Duration::from_secs(1)));
        assert!(!limiter.allows(address(1), now + Duration::from_secs(1)));
    }

    #[test]
    fn all_sources_together_have_a_limit_too() {
        let now = Instant::now();
        let mut limiter = Limiter::new(EACH, ALL, 8, now);
        assert_eq!((1..=8).filter(|last| limiter.allows(address(*last), now)).count(), 4);
    }

    #[test]
    fn the_table_is_bounded_and_forgets_only_the_quiet() {
        let now = Instant::now();
        let mut limiter = Limiter::new(
            EACH,
            Rate {
                per_second: 1e6,
                burst: 1e6,
            },
            2,
            now,
        );
        assert!(limiter.allows(address(1), now) && limiter.allows(address(2), now));
        assert!(!limiter.allows(address(3), now), "full, and nobody is quiet");
        let later = now + Duration::from_secs(1);
        assert!(limiter.allows(address(3), later));
        assert!(limiter.sources.len() <= 2);
    }

    #[test]
    fn neighbours_in_one_ipv6_site_share_a_bucket() {
        let now = Instant::now();
        let mut limiter = Limiter::new(EACH, ALL, 8, now);
        let from = |last: u16| IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, last]);
        assert_eq!((1..=4).filter(|last| limiter.allows(from(*last), now)).count(), 2);
    }
}
