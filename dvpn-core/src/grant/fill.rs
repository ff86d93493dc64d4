//! Max-min fairness by water filling (Bertsekas and Gallager, *Data Networks*, 6.5.2): whoever wants less than an even share
//! gets what he wants, and the rest is shared evenly by the others.

/// The water level: with `min(want, level)` each, all together get `capacity` and not more. Nothing when there is enough for
/// every want.
pub(super) fn level(wants: impl Iterator<Item = u64>, capacity: u64) -> Option<u64> {
    let mut wants: Vec<u64> = wants.collect();
    sort(&mut wants);
    let mut rest = capacity;
    let mut left = wants.len() as u64;
    for want in wants {
        // `left` counts this one, so it is never zero here.
        let share = rest.checked_div(left)?;
        if want > share {
            return Some(share);
        }
        rest -= want;
        left -= 1;
    }
    None
}

#[cfg(not(test))]
fn sort(wants: &mut [u64]) {
    wants.sort_unstable();
}

/// The same, and counts comparisons: what the allocator costs is asserted by counting.
#[cfg(test)]
fn sort(wants: &mut [u64]) {
    wants.sort_unstable_by(|a, b| {
        COMPARISONS.with(|count| count.set(count.get() + 1));
        a.cmp(b)
    });
}

#[cfg(test)]
thread_local! {
    pub(super) static COMPARISONS: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
}

#[cfg(test)]
mod tests {
    use super::level;

    #[test]
    fn small_wants_are_met_and_the_rest_is_shared_evenly() {
        for (wants, capacity, wanted) in [
            (&[][..], 10, None),
            (&[0], 0, None),
            (&[1], 0, Some(0)),
            (&[10], 10, None),
            (&[11], 10, Some(10)),
            (&[2, 8, 10], 20, None),
            (&[2, 9, 10], 20, Some(9)),
            (&[50, 50, 50], 100, Some(33)),
            (&[1, 50, 50], 100, Some(49)),
            (&[u64::MAX, u64::MAX], u64::MAX, Some(u64::MAX / 2)),
        ] {
            assert_eq!(
                level(wants.iter().copied(), capacity),
                wanted,
                "{wants:?} of {capacity}"
            );
        }
    }
}
