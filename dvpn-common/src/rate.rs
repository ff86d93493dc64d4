//! How fast: one unit for grants, totals and measurements.

use core::fmt;

/// A layer-3 rate, in bits per second: IP headers are counted, link and tunnel headers are not.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rate(u64);

impl Rate {
    /// Nothing may pass.
    pub const ZERO: Self = Self(0);

    /// Of `rate` bits per second.
    pub const fn from_bits_per_second(rate: u64) -> Self {
        Self(rate)
    }

    /// Bits per second.
    pub const fn bits_per_second(self) -> u64 {
        self.0
    }

    /// Whole bytes per second, rounded down.
    pub const fn bytes_per_second(self) -> u64 {
        self.0 / 8
    }

    /// The half of it that one connection is granted, rounded down.
    #[must_use]
    pub const fn half(self) -> Self {
        Self(self.0 / 2)
    }
}

/// In the largest unit that leaves a whole part, with at most one decimal, rounded down: `94 Mbit/s`, `2.5 Mbit/s`.
impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (unit, name) = match self.0 {
            1_000_000_000.. => (1_000_000_000, "Gbit/s"),
            1_000_000.. => (1_000_000, "Mbit/s"),
            1_000.. => (1_000, "kbit/s"),
            _ => (1, "bit/s"),
        };
        let (whole, tenths) = (self.0 / unit, self.0 % unit * 10 / unit);
        match tenths {
            0 => write!(f, "{whole} {name}"),
            _ => write!(f, "{whole}.{tenths} {name}"),
        }
    }
}

#[cfg(all(test, feature = "std"))]
mod tests {
    use super::Rate;

    #[test]
    fn a_rate_reads_in_its_largest_unit() {
        for (bits, text) in [
            (0, "0 bit/s"),
            (999, "999 bit/s"),
            (1_000, "1 kbit/s"),
            (2_500_000, "2.5 Mbit/s"),
            (94_090_000, "94 Mbit/s"),
            (999_999_999, "999.9 Mbit/s"),
            (1_000_000_000, "1 Gbit/s"),
            (u64::MAX, "18446744073.7 Gbit/s"),
        ] {
            assert_eq!(Rate::from_bits_per_second(bits).to_string(), text);
        }
    }

    #[test]
    fn half_of_a_rate_never_adds_up_to_more() {
        for bits in [0, 1, 9, 10, u64::MAX] {
            let half = Rate::from_bits_per_second(bits).half().bits_per_second();
            assert!(half <= bits - half, "{bits}");
        }
    }
}
