//! The requests to one candidate, their answers, and the figure made of them. No I/O.

use std::time::{Duration, Instant, SystemTime};

/// Requests in one train. Five leave three answered with two lost.
pub(super) const TRAIN: usize = 5;
/// Time between two requests of a train: they should not queue behind each other on the path.
pub(super) const SPACING: Duration = Duration::from_millis(4);
/// Who has not answered enough by now gets a second train.
pub(super) const RETRAIN_AFTER: Duration = Duration::from_millis(300);
/// Answers the figure is made of.
const FIGURE_OF: usize = 3;
/// The rest of a train is waited for this many round trips, and not less than [`MIN_GRACE`].
const GRACE_ROUND_TRIPS: u32 = 3;
const MIN_GRACE: Duration = Duration::from_millis(10);
/// Longest wait for a silent candidate while another has answered: 400 ms is the far side of the Earth and back.
const MIN_PATIENCE: Duration = Duration::from_millis(400);
/// The same in round trips of the nearest, for those who are far from everybody.
const PATIENCE_ROUND_TRIPS: u32 = 20;
/// A longer round trip is a step of the wall clock.
const MAX_ROUND_TRIP: Duration = Duration::from_secs(5);

/// How long others are waited for once the nearest has answered.
pub(super) fn patience(nearest: Duration) -> Duration {
    MIN_PATIENCE.max(nearest * PATIENCE_ROUND_TRIPS)
}

/// One candidate's requests and answers.
#[derive(Debug, Default)]
pub(super) struct Train {
    /// Unanswered requests with the wall clock at their sending: the kernel stamps arrivals by that clock.
    waiting: Vec<([u8; 8], SystemTime)>,
    round_trips: Vec<Duration>,
    sent: usize,
    last_sent: Option<Instant>,
}

impl Train {
    /// A request went out.
    pub(super) fn asked(&mut self, nonce: [u8; 8], wall: SystemTime, now: Instant) {
        self.waiting.push((nonce, wall));
        self.sent += 1;
        self.last_sent = Some(now);
    }

    /// An answer came in; each request counts once.
    pub(super) fn answered(&mut self, nonce: [u8; 8], at: SystemTime) {
        let Some(index) = self.waiting.iter().position(|(asked, _)| *asked == nonce) else {
            return;
        };
        let (_, sent) = self.waiting.swap_remove(index);
        if let Ok(round_trip) = at.duration_since(sent)
            && round_trip < MAX_ROUND_TRIP
        {
            self.round_trips.push(round_trip);
        }
    }

    /// Whether a second train would help.
    pub(super) fn needs_more(&self) -> bool {
        self.round_trips.len() < FIGURE_OF
    }

    /// When the rest of the train need no longer be waited for: known once there is enough for the figure.
    pub(super) fn settles_at(&self) -> Option<Instant> {
        if self.needs_more() || self.sent < TRAIN {
            return None;
        }
        let longest = self.round_trips.iter().max()?;
        Some(self.last_sent? + (*longest * GRACE_ROUND_TRIPS).max(MIN_GRACE))
    }

    /// The figure, once nothing more is waited for.
    pub(super) fn settled_latency(&self, now: Instant) -> Option<Duration> {
        self.is_settled(now).then(|| self.latency()).flatten()
    }

    /// Whether nothing more is waited for.
    pub(super) fn is_settled(&self, now: Instant) -> bool {
        self.settles_at().is_some_and(|at| self.waiting.is_empty() || now >= at)
    }

    /// The figure: median of the best three. Of two answers the slower one, so that a lucky packet wins nothing; of one,
    /// that one; of none, none.
    pub(super) fn latency(&self) -> Option<Duration> {
        let mut sorted = self.round_trips.clone();
        sorted.sort_unstable();
        sorted.get(1).or(sorted.first()).copied()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::{RngExt, SeedableRng, rngs::StdRng};

    use super::*;

    /// A train whose answers took this long; `None` is a lost one.
    fn train(round_trips: &[Option<Duration>]) -> Train {
        let mut train = Train::default();
        let wall = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        let now = Instant::now();
        for (index, round_trip) in round_trips.iter().enumerate() {
            let nonce = (index as u64).to_be_bytes();
            train.asked(nonce, wall, now);
            if let Some(round_trip) = round_trip {
                train.answered(nonce, wall + *round_trip);
            }
        }
        train
    }

    #[expect(clippy::unnecessary_wraps, reason = "short lists of answered and lost requests")]
    fn ms(milliseconds: u64) -> Option<Duration> {
        Some(Duration::from_millis(milliseconds))
    }

    #[test]
    fn the_figure_is_the_median_of_the_best_three() {
        assert_eq!(train(&[ms(9), ms(30), ms(8), ms(10), ms(50)]).latency(), ms(9));
        assert_eq!(train(&[ms(9), None, ms(8), ms(10), None]).latency(), ms(9));
        assert_eq!(train(&[None, None, ms(8), ms(10), None]).latency(), ms(10));
        assert_eq!(train(&[None, None, None, ms(10), None]).latency(), ms(10));
        assert_eq!(train(&[None; TRAIN]).latency(), None);
    }

    #[test]
    fn duplicates_and_foreign_nonces_count_for_nothing() {
        let mut train = train(&[ms(10), None]);
        train.answered(
            0_u64.to_be_bytes(),
            SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000),
        );
        train.answered(
            77_u64.to_be_bytes(),
            SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000),
        );
        assert_eq!(train.latency(), ms(10));
        assert!(train.needs_more());
    }

    #[test]
    fn a_clock_that_steps_back_or_far_ahead_gives_no_figure() {
        let mut train = Train::default();
        let wall = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        train.asked([1; 8], wall, Instant::now());
        train.asked([2; 8], wall, Instant::now());
        train.answered([1; 8], wall - Duration::from_secs(1));
        train.answered([2; 8], wall + Duration::from_hours(1));
        assert_eq!(train.latency(), None);
    }

    #[test]
    fn a_whole_train_settles_at_once_and_a_torn_one_after_three_round_trips() {
        let now = Instant::now();
        assert!(train(&[ms(10); TRAIN]).is_settled(now));
        let torn = train(&[ms(10), ms(10), ms(12), None, None]);
        assert!(!torn.is_settled(torn.last_sent.unwrap() + Duration::from_millis(35)));
        assert!(torn.is_settled(torn.last_sent.unwrap() + Duration::from_millis(36)));
        assert!(!train(&[ms(10), ms(10), None, None, None]).is_settled(now + Duration::from_hours(1)));
    }

    /// Candidates at 8, 10 and 13 ms, jitter 1 ms in each direction (normal, the wider of netem's usual forms), 2 % loss in
    /// each direction: the nearest must win 95 of 100.
    #[test]
    fn the_nearest_wins_through_jitter_and_loss() {
        let mut random = StdRng::seed_from_u64(1);
        // Sum of twelve uniforms: normal enough, variance 1.
        let normal = |random: &mut StdRng| (0..12).map(|_| random.random::<f64>()).sum::<f64>() - 6.0;
        let mut won = 0;
        for _ in 0..10_000 {
            let latency = [8.0, 10.0, 13.0].map(|base| {
                let trips: Vec<_> = (0..TRAIN)
                    .map(|_| {
                        let lost = random.random_bool(0.02) || random.random_bool(0.02);
                        let trip = base + normal(&mut random) * 0.5_f64.sqrt() + normal(&mut random) * 0.5_f64.sqrt();
                        (!lost).then(|| Duration::from_secs_f64(trip / 1000.0))
                    })
                    .collect();
                train(&trips).latency()
            });
            let [near, others @ ..] = latency;
            won +=
                usize::from(near.is_some() && others.iter().all(|other| other.is_none_or(|other| near < Some(other))));
        }
        assert!(won >= 9_700, "{won} of 10,000");
    }

    proptest! {
        #[test]
        fn the_figure_is_one_of_the_answers_and_no_more_than_their_median(
            trips in proptest::collection::vec(proptest::option::of(0_u64..2_000), 0..12)
        ) {
            let trips: Vec<_> = trips.into_iter().map(|trip| trip.map(Duration::from_millis)).collect();
            let mut answered: Vec<_> = trips.iter().flatten().copied().collect();
            answered.sort_unstable();
            let latency = train(&trips).latency();
            prop_assert_eq!(latency.is_some(), !answered.is_empty());
            if let Some(latency) = latency {
                prop_assert!(answered.contains(&latency));
                if answered.len() >= 3 {
                    prop_assert!(latency <= answered[answered.len() / 2]);
                }
            }
        }
    }
}
