//! The highest serial seen of each client key, so that an older approval never comes back, also after a restart.
//!
//! Kept on disk without the keys themselves: 16 bytes of their SHA-256 tell them apart and say nothing of them. What is
//! new is written behind what is there, and the whole anew when that has grown: see [`Change`].
//!
//! The memory has an end. Keys that are dropped to make room leave a date behind: whatever was issued until their last
//! serial was noted, and is of a key that is not known, is refused. Serials grow with each approval of the pool, so what
//! a dropped key's last approval replaced was signed before that was noted, and the date refuses all of it.

use std::collections::{BTreeMap, BTreeSet};

use aws_lc_rs::digest::{SHA256, digest};
use dvpn_common::{
    keys::PublicKey,
    limits::{MAX_APPROVAL_LIFE, MAX_CLOCK_SKEW},
};
use jiff::{SignedDuration, Timestamp};

use super::Refusal;

/// Most client keys whose serials are remembered.
const MAX_SERIALS: usize = 65_536;
/// When there is no room, the oldest of this many parts goes at once.
const PARTS: usize = 16;
/// The first form had neither a date nor records behind others.
const FIRST_MAGIC: &[u8; 16] = b"dvpn-serials-v1\0";
/// Then the date, Unix seconds or [`NO_DATE`], and eight zeros: no record lies across the blocks of a disk.
const MAGIC: &[u8; 16] = b"dvpn-serials-v2\0";
const NO_DATE: i64 = i64::MIN;
const RECORD_BYTES: usize = 32;
/// Fewer records behind the whole than this are not worth writing it anew.
const FEW_RECORDS: usize = 1024;

type Name = [u8; 16];

/// What has to be on the disk before an approval that was just noted is used: else a crash would forget that it replaced
/// another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// This in place of everything.
    Whole(Vec<u8>),
    /// This behind what is there.
    More(Vec<u8>),
}

/// The highest serial seen of each client key, for as long as an older approval could still be valid.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Serials {
    /// The serial, and when it was first noted.
    seen: BTreeMap<Name, (u64, Timestamp)>,
    /// Of a key that is not in `seen`, only what was issued from then on is taken.
    not_before: Option<Timestamp>,
    capacity: usize,
    /// Not on the disk yet.
    fresh: BTreeSet<Name>,
    /// What is on the disk is no beginning to write behind.
    rewrite: bool,
    /// It is to be written also if nothing is fresh.
    due: bool,
    /// Records on the disk that others behind them may replace.
    behind: usize,
}

impl Default for Serials {
    fn default() -> Self {
        Self {
            seen: BTreeMap::new(),
            not_before: None,
            capacity: MAX_SERIALS,
            fresh: BTreeSet::new(),
            rewrite: true,
            due: false,
            behind: 0,
        }
    }
}

impl Serials {
    /// Reads what [`Serials::take_change`] had written. A record that does not read is the stricter answer: whatever was
    /// issued before `now` may have been replaced since, and is refused.
    pub fn decode(bytes: &[u8], now: Timestamp) -> Self {
        let mut read = Self::read(bytes).unwrap_or_else(|| Self {
            not_before: Some(now),
            due: true,
            ..Self::default()
        });
        read.correct_date(now);
        read
    }

    fn read(bytes: &[u8]) -> Option<Self> {
        let (not_before, records) = if let Some(records) = bytes.strip_prefix(FIRST_MAGIC) {
            (None, records)
        } else {
            let (date, rest) = bytes.strip_prefix(MAGIC)?.split_first_chunk::<8>()?;
            let (_zeros, records) = rest.split_first_chunk::<8>()?;
            match i64::from_be_bytes(*date) {
                NO_DATE => (None, records),
                second => (Some(Timestamp::from_second(second).ok()?), records),
            }
        };
        let (records, rest) = records.as_chunks::<RECORD_BYTES>();
        if !rest.is_empty() {
            return None;
        }
        let mut seen = BTreeMap::new();
        for record in records {
            let (name, numbers) = record.split_first_chunk::<16>()?;
            let (serial, until) = numbers.split_first_chunk::<8>()?;
            let until = i64::from_be_bytes(until.try_into().ok()?);
            let noted = Timestamp::from_second(until).ok()?.checked_sub(memory()).ok()?;
            seen.insert(*name, (u64::from_be_bytes(*serial), noted));
        }
        // The first thing that is noted is written with the whole: what is read may be of an older form.
        (seen.len() <= MAX_SERIALS).then(|| Self {
            seen,
            not_before,
            ..Self::default()
        })
    }

    /// Nothing that was issued later than the clocks of now can be meant by a date: it was taken from a clock that was
    /// ahead. As it stands it would refuse everybody until then.
    fn correct_date(&mut self, now: Timestamp) {
        let latest = after(now);
        if self.not_before.is_some_and(|date| date > latest) {
            self.not_before = Some(latest);
            self.rewrite();
        }
    }

    fn whole(&self) -> Vec<u8> {
        let date = self.not_before.map_or(NO_DATE, Timestamp::as_second);
        let mut out = [MAGIC, &date.to_be_bytes()[..], &[0; 8]].concat();
        for (name, (serial, noted)) in &self.seen {
            push_record(&mut out, name, *serial, *noted);
        }
        out
    }

    /// What has to be written now, if anything; asking makes it old.
    pub fn take_change(&mut self) -> Option<Change> {
        let fresh = std::mem::take(&mut self.fresh);
        if fresh.is_empty() && !self.due {
            return None;
        }
        if self.rewrite || self.behind + fresh.len() > FEW_RECORDS.max(self.seen.len() / 2) {
            self.rewrite = false;
            self.due = false;
            self.behind = 0;
            return Some(Change::Whole(self.whole()));
        }
        self.behind += fresh.len();
        let mut out = Vec::with_capacity(fresh.len() * RECORD_BYTES);
        for name in fresh {
            if let Some((serial, noted)) = self.seen.get(&name) {
                push_record(&mut out, &name, *serial, *noted);
            }
        }
        Some(Change::More(out))
    }

    /// What was to be written is not on the disk, or nobody knows: everything is written the next time.
    pub fn rewrite(&mut self) {
        self.rewrite = true;
        self.due = true;
    }

    pub(super) fn check(&self, key: &PublicKey, serial: u64, issued_at: Timestamp) -> Result<(), Refusal> {
        match self.seen.get(&name(key)) {
            Some((seen, _)) if serial < *seen => Err(Refusal::Serial {
                offered: serial,
                seen: *seen,
            }),
            None if self.not_before.is_some_and(|date| issued_at < date) => Err(Refusal::Forgotten),
            Some(_) | None => Ok(()),
        }
    }

    /// Drops the oldest if `wanted` more keys do not fit, but none of `kept`: a client that is here goes on, however long
    /// ago it was approved.
    pub(super) fn make_room<'a>(
        &mut self,
        wanted: usize,
        kept: impl IntoIterator<Item = &'a PublicKey>,
        now: Timestamp,
    ) {
        if self.seen.len() + wanted <= self.capacity {
            return;
        }
        let kept: BTreeSet<Name> = kept.into_iter().map(name).collect();
        let mut ages: Vec<(Timestamp, Name)> = self
            .seen
            .iter()
            .filter(|(name, _)| !kept.contains(*name))
            .map(|(name, (_, noted))| (*noted, *name))
            .collect();
        ages.sort_unstable();
        let too_many = (self.seen.len() + wanted).saturating_sub(self.capacity);
        for (noted, name) in ages.into_iter().take(too_many.max(self.capacity / PARTS)) {
            self.seen.remove(&name);
            self.fresh.remove(&name);
            self.not_before = self.not_before.max(Some(after(noted)));
        }
        self.rewrite();
        self.correct_date(now);
    }

    pub(super) fn note(&mut self, key: &PublicKey, serial: u64, now: Timestamp) -> Result<(), Refusal> {
        let name = name(key);
        match self.seen.get(&name) {
            // When it was first noted is what counts: what it replaced is older than that.
            Some((seen, _)) if *seen >= serial => return Ok(()),
            None if self.seen.len() >= self.capacity => return Err(Refusal::Full),
            Some(_) | None => {}
        }
        self.seen.insert(name, (serial, now));
        self.fresh.insert(name);
        Ok(())
    }
}

/// For this long after a serial was noted what it replaced could be valid.
fn memory() -> SignedDuration {
    SignedDuration::try_from(MAX_APPROVAL_LIFE + 2 * MAX_CLOCK_SKEW).unwrap_or(SignedDuration::MAX)
}

/// Later than anything that was issued by a good clock when ours said `noted`; issue times are whole seconds.
fn after(noted: Timestamp) -> Timestamp {
    let second = noted.as_second().saturating_add(1);
    Timestamp::from_second(second)
        .unwrap_or(Timestamp::MAX)
        .saturating_add(MAX_CLOCK_SKEW)
        .unwrap_or(Timestamp::MAX)
}

/// As the first form has it: the time up to which it matters, not the time when it was noted.
fn push_record(out: &mut Vec<u8>, name: &Name, serial: u64, noted: Timestamp) {
    let until = noted.saturating_add(memory()).unwrap_or(Timestamp::MAX);
    out.extend_from_slice(name);
    out.extend_from_slice(&serial.to_be_bytes());
    out.extend_from_slice(&until.as_second().to_be_bytes());
}

fn name(key: &PublicKey) -> Name {
    let hash = digest(&SHA256, key.as_bytes());
    let mut name = [0; 16];
    name.iter_mut().zip(hash.as_ref()).for_each(|(to, from)| *to = *from);
    name
}

#[cfg(test)]
mod tests;
