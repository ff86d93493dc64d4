//! How often one source may do something, in bounded memory.

use std::{
    collections::HashMap,
    hash::Hash,
    net::IpAddr,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Counts events of each key in windows of fixed length.
pub struct Limiter<K> {
    allowed: u32,
    window: Duration,
    capacity: usize,
    counts: Mutex<HashMap<K, Count>>,
}

struct Count {
    since: Instant,
    events: u32,
}

impl<K: Hash + Eq + Clone> Limiter<K> {
    /// Allows `allowed` events of one key in `window`; remembers `capacity` keys at most.
    pub fn new(allowed: u32, window: Duration, capacity: usize) -> Self {
        Self {
            allowed,
            window,
            capacity,
            counts: Mutex::new(HashMap::new()),
        }
    }

    /// How long `key` has to wait because it used up its events; nothing if it has some left.
    pub fn blocked(&self, key: &K, now: Instant) -> Option<Duration> {
        let counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.get(key)?;
        let left = self.window.checked_sub(now.saturating_duration_since(count.since))?;
        (count.events >= self.allowed && !left.is_zero()).then_some(left)
    }

    /// Counts one event.
    pub fn count(&self, key: &K, now: Instant) {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        if !counts.contains_key(key) && counts.len() >= self.capacity {
            counts.retain(|_, count| now.saturating_duration_since(count.since) < self.window);
            if counts.len() >= self.capacity {
                // Full of fresh keys: forgetting some that failed least keeps the persistent ones blocked.
                let least = counts.values().map(|count| count.events).min().unwrap_or(0);
                counts.retain(|_, count| count.events > least);
            }
        }
        let count = counts.entry(key.clone()).or_insert(Count { since: now, events: 0 });
        if now.saturating_duration_since(count.since) >= self.window {
            *count = Count { since: now, events: 0 };
        }
        count.events = count.events.saturating_add(1);
    }

    /// [`Self::blocked`], and counts the event if it is not.
    pub fn take(&self, key: &K, now: Instant) -> Result<(), Duration> {
        if let Some(wait) = self.blocked(key, now) {
            return Err(wait);
        }
        self.count(key, now);
        Ok(())
    }
}

/// Lets each key do something at a steady pace, and several times at once after a rest.
pub struct Pace<K> {
    step: Duration,
    burst: u32,
    capacity: usize,
    /// When each key will have made up for what it did. A key that has is forgotten.
    even: Mutex<HashMap<K, Instant>>,
}

impl<K: Hash + Eq + Clone> Pace<K> {
    /// Allows `allowed` events (at least one) of one key in `window`, and twice as many at once after as long a rest;
    /// remembers `capacity` keys at most.
    pub fn new(allowed: u32, window: Duration, capacity: usize) -> Self {
        Self {
            step: window / allowed.max(1),
            burst: allowed.max(1).saturating_mul(2),
            capacity,
            even: Mutex::new(HashMap::new()),
        }
    }

    /// Counts one event, or says how long `key` has to wait for it.
    pub fn take(&self, key: &K, now: Instant) -> Result<(), Duration> {
        let mut even = self.even.lock().unwrap_or_else(PoisonError::into_inner);
        let from = even.get(key).copied().unwrap_or(now).max(now);
        let ahead = from.saturating_duration_since(now);
        let allowed = self.step.saturating_mul(self.burst - 1);
        if let Some(wait) = ahead.checked_sub(allowed).filter(|wait| !wait.is_zero()) {
            return Err(wait);
        }
        if !even.contains_key(key) && even.len() >= self.capacity {
            even.retain(|_, at| *at > now);
            if even.len() >= self.capacity {
                // Full of busy keys: forgetting those that did least keeps the persistent ones slow.
                let least = even.values().min().copied().unwrap_or(now);
                even.retain(|_, at| *at > least);
            }
        }
        even.insert(key.clone(), from + self.step);
        Ok(())
    }
}

/// The part of an address that one customer line has to itself: an IPv4 address, an IPv6 /64.
pub fn line(address: IpAddr) -> IpAddr {
    mask(address, 32, 64)
}

/// The part of an address that is costly to have many of: an IPv4 /24, an IPv6 /48.
pub fn site(address: IpAddr) -> IpAddr {
    mask(address, 24, 48)
}

fn mask(address: IpAddr, v4_bits: u32, v6_bits: u32) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(v4) => IpAddr::V4((v4.to_bits() & u32::MAX.checked_shl(u32::BITS - v4_bits).unwrap_or(0)).into()),
        IpAddr::V6(v6) => IpAddr::V6((v6.to_bits() & u128::MAX.checked_shl(u128::BITS - v6_bits).unwrap_or(0)).into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_that_failed_too_often_waits_for_the_end_of_the_window() {
        let limiter = Limiter::new(2, Duration::from_mins(1), 10);
        let start = Instant::now();
        assert!(limiter.take(&1, start).is_ok());
        assert!(limiter.take(&1, start).is_ok());
        assert_eq!(
            limiter.take(&1, start + Duration::from_secs(20)),
            Err(Duration::from_secs(40))
        );
        assert!(limiter.take(&2, start).is_ok());
        assert!(limiter.take(&1, start + Duration::from_mins(1)).is_ok());
    }

    #[test]
    fn memory_is_bounded_and_the_worst_stay_blocked() {
        let limiter = Limiter::new(3, Duration::from_mins(1), 100);
        let now = Instant::now();
        for _ in 0..3 {
            limiter.count(&0_u32, now);
        }
        for key in 1..10_000 {
            limiter.count(&key, now);
            assert!(limiter.counts.lock().unwrap().len() <= 100);
        }
        assert!(limiter.blocked(&0, now).is_some());
    }

    #[test]
    fn a_pace_allows_a_burst_and_then_one_event_a_step() {
        let pace = Pace::new(6, Duration::from_mins(1), 10);
        let start = Instant::now();
        for _ in 0..12 {
            assert!(pace.take(&1, start).is_ok());
        }
        assert_eq!(pace.take(&1, start), Err(Duration::from_secs(10)));
        assert!(pace.take(&2, start).is_ok(), "others are not slowed");
        let later = start + Duration::from_secs(10);
        assert!(pace.take(&1, later).is_ok());
        assert_eq!(
            pace.take(&1, later + Duration::from_secs(4)),
            Err(Duration::from_secs(6)),
            "a refused event is not counted"
        );
        let rested = later + Duration::from_mins(2);
        assert_eq!((0..20).filter(|_| pace.take(&1, rested).is_ok()).count(), 12);
    }

    #[test]
    fn a_pace_forgets_who_rested_first_and_the_busiest_last() {
        let pace = Pace::new(2, Duration::from_mins(1), 100);
        let now = Instant::now();
        while pace.take(&0_u32, now).is_ok() {}
        for key in 1..10_000 {
            assert!(pace.take(&key, now).is_ok());
            assert!(pace.even.lock().unwrap().len() <= 100);
        }
        assert!(pace.take(&0, now).is_err());
    }

    #[test]
    fn sources_are_grouped_by_line_and_site() {
        let parse = |text: &str| text.parse::<IpAddr>().unwrap();
        assert_eq!(line(parse("192.0.2.7")), parse("192.0.2.7"));
        assert_eq!(line(parse("::ffff:192.0.2.7")), parse("192.0.2.7"));
        assert_eq!(site(parse("192.0.2.7")), parse("192.0.2.0"));
        assert_eq!(line(parse("2001:db8:1:2:3::4")), parse("2001:db8:1:2::"));
        assert_eq!(site(parse("2001:db8:1:2:3::4")), parse("2001:db8:1::"));
    }
}
