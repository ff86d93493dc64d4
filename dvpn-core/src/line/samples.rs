//! What a transfer says of the line that it went over.

use std::time::Duration;

use dvpn_common::rate::Rate;

use super::rates;

/// Bytes are kept in slots of this length.
const SLOT: Duration = Duration::from_millis(10);
/// Longest transfer that is kept; what comes later is not counted.
const LONGEST: Duration = Duration::from_secs(70);
/// A bucket of the estimate; shorter where the whole transfer was.
const BUCKET: Duration = Duration::from_millis(100);
/// Buckets that a short transfer is cut into.
const LEAST_BUCKETS: usize = 10;
/// Less than this says nothing.
const LEAST_BYTES: u64 = 32 * 1024;
/// Until a bucket reaches this part of the later half's median, in percent, the transfer was still starting.
const STARTED_PERCENT: u64 = 90;
/// Part of the buckets that is left out at each end, by size: what a stall or a burst of the line did.
const TRIMMED: usize = 10;

/// The bytes of a transfer, over time.
#[derive(Debug, Clone, Default)]
pub struct Samples {
    slots: Vec<u64>,
    total: u64,
}

/// A transfer from which no rate can be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("only {bytes} bytes came through")]
pub struct TooLittle {
    /// How much it was.
    pub bytes: u64,
}

impl Samples {
    /// `bytes` passed evenly from `from` to `until`, both since the beginning of the transfer.
    pub fn add(&mut self, from: Duration, until: Duration, bytes: u64) {
        self.total = self.total.saturating_add(bytes);
        let until = until.min(LONGEST);
        let from = from.min(until);
        let (first, last) = (slot_of(from), slot_of(until));
        if self.slots.len() <= last {
            self.slots.resize(last + 1, 0);
        }
        // The first slots get what is left over from the even division, so that no byte is lost.
        let count = u64::try_from(last - first + 1).unwrap_or(1);
        let (share, mut rest) = (bytes / count, bytes % count);
        for slot in self.slots.iter_mut().skip(first).take(last - first + 1) {
            *slot = slot.saturating_add(share + u64::from(rest > 0));
            rest = rest.saturating_sub(1);
        }
    }

    /// All bytes.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// The line's layer-3 rate, from what passed until `until`: the start of the connections, stalls and bursts are left out.
    pub fn rate(&self, until: Duration) -> Result<Rate, TooLittle> {
        let nothing = TooLittle { bytes: self.total };
        let end = slot_of(until).min(self.slots.len());
        let slots = self.slots.get(..end).unwrap_or_default();
        if self.total < LEAST_BYTES {
            return Err(nothing);
        }
        let usual = slot_of(BUCKET);
        let width = usual.min(slots.len() / LEAST_BUCKETS).max(1);
        let buckets: Vec<u64> = slots.chunks_exact(width).map(|chunk| chunk.iter().sum()).collect();
        let steady = after_start(&buckets);
        let mean = trimmed_mean(steady).ok_or(nothing)?;
        let micros = SLOT.as_micros() * u128::try_from(width).unwrap_or(1) * mean.1;
        let bits = u128::from(mean.0) * 8 * 1_000_000 / micros.max(1);
        let goodput = Rate::from_bits_per_second(u64::try_from(bits).unwrap_or(u64::MAX));
        if goodput == Rate::ZERO {
            return Err(nothing);
        }
        Ok(rates::of_goodput(goodput))
    }
}

fn slot_of(at: Duration) -> usize {
    usize::try_from(at.as_millis() / SLOT.as_millis()).unwrap_or(usize::MAX)
}

/// Without the first eighth, and without what is slower than the rest and comes before it; at least the later half.
fn after_start(buckets: &[u64]) -> &[u64] {
    let half = buckets.len() / 2;
    let mut later = buckets.get(half..).unwrap_or_default().to_vec();
    later.sort_unstable();
    let median = later.get(later.len() / 2).copied().unwrap_or_default();
    let slow = |bytes: &u64| u128::from(*bytes) * 100 < u128::from(median) * u128::from(STARTED_PERCENT);
    let skipped = buckets.len() / 8;
    let rest = buckets.iter().skip(skipped);
    let start = skipped + rest.take_while(|bytes| slow(bytes)).count();
    buckets.get(start.min(half)..).unwrap_or_default()
}

/// Sum and count of what is left between the smallest and the largest tenth.
fn trimmed_mean(buckets: &[u64]) -> Option<(u64, u128)> {
    let mut sorted = buckets.to_vec();
    sorted.sort_unstable();
    let cut = sorted.len() / TRIMMED;
    let kept = sorted.get(cut..sorted.len() - cut)?;
    let sum = kept.iter().fold(0_u64, |sum, bytes| sum.saturating_add(*bytes));
    (!kept.is_empty()).then_some((sum, u128::try_from(kept.len()).unwrap_or(1)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// Goodput of the line in these tests: 12,500 bytes in 10 ms are 10 Mbit/s.
    const STEADY: u64 = 12_500;

    fn measured(seconds: u64, bytes_at: impl Fn(u64) -> u64) -> f64 {
        let mut samples = Samples::default();
        for slot in 0..seconds * 100 {
            samples.add(ms(slot * 10), ms(slot * 10 + 9), bytes_at(slot));
        }
        let rate = samples.rate(Duration::from_secs(seconds)).unwrap();
        // In parts of what the line carries at layer 3.
        f64::from(u32::try_from(rate.bits_per_second() / 1000).unwrap()) / 10_000.0 * 0.9634
    }

    #[test]
    fn slow_start_stalls_and_bursts_are_left_out() {
        let cases: [(&str, f64); 6] = [
            ("steady", measured(8, |_| STEADY)),
            ("two seconds of start", measured(8, |slot| STEADY * slot.min(200) / 200)),
            (
                "a burst first",
                measured(8, |slot| if slot < 50 { STEADY * 5 } else { STEADY }),
            ),
            (
                "a stall of half a second",
                measured(8, |slot| if (500..550).contains(&slot) { 0 } else { STEADY }),
            ),
            (
                "in lumps",
                measured(8, |slot| if slot % 5 == 0 { STEADY * 5 } else { 0 }),
            ),
            ("one second", measured(1, |slot| STEADY * slot.min(10) / 10)),
        ];
        for (what, part) in cases {
            assert!((0.97..1.03).contains(&part), "{what}: {part}");
        }
    }

    #[test]
    fn a_short_transfer_is_measured_in_short_buckets() {
        let mut samples = Samples::default();
        // 90 MB in 100 ms.
        samples.add(ms(0), ms(99), 90_000_000);
        let rate = samples.rate(ms(100)).unwrap();
        assert_eq!(rate, rates::of_goodput(Rate::from_bits_per_second(7_200_000_000)));
    }

    #[test]
    fn too_little_says_nothing() {
        let mut samples = Samples::default();
        assert_eq!(samples.rate(ms(8000)), Err(TooLittle { bytes: 0 }));
        samples.add(ms(0), ms(7999), LEAST_BYTES - 1);
        assert_eq!(samples.rate(ms(8000)), Err(TooLittle { bytes: 32_767 }));
        // All of it in the part that is not looked at.
        let mut late = Samples::default();
        late.add(ms(0), ms(900), 0);
        late.add(ms(900), ms(999), 1_000_000);
        assert!(late.rate(ms(900)).is_err());
    }

    #[test]
    fn no_byte_is_lost_and_nothing_overflows() {
        let mut samples = Samples::default();
        samples.add(ms(5), ms(57), 100);
        samples.add(ms(90), ms(20), 7);
        assert_eq!(samples.slots.iter().sum::<u64>(), 107);
        samples.add(ms(0), Duration::MAX, u64::MAX);
        samples.add(ms(0), Duration::MAX, u64::MAX);
        assert_eq!((samples.total(), samples.slots.len()), (u64::MAX, 7001));
        assert!(samples.rate(Duration::MAX).is_ok());
    }
}
