//! What is remembered of the networks that this machine was on.

use std::{collections::BTreeMap, fmt, str::FromStr};

use aws_lc_rs::digest::{SHA256, digest};
use dvpn_common::rate::Rate;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{MEASURED_FOR, Measured, PAYLOAD_BYTES, after};

/// Networks that are remembered; the one that was measured longest ago is forgotten first.
const MAX_NETWORKS: usize = 32;
/// Longest record that is read, in bytes.
const MAX_RECORD_BYTES: usize = 16 * 1024;
/// A rate above is none that this was ever measured on.
const MAX_BITS_PER_SECOND: u64 = 1_000_000_000_000;

/// A network, told from others by its router. What it is made of cannot be read from it at a glance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct NetworkId([u8; 16]);

impl NetworkId {
    /// Of what is particular to it, in order.
    pub fn of<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> Self {
        let mut bytes = b"dvpn-network-v1\0".to_vec();
        for part in parts {
            bytes.extend(u32::try_from(part.len()).unwrap_or(u32::MAX).to_be_bytes());
            bytes.extend(part);
        }
        let hash = digest(&SHA256, &bytes);
        let mut id = [0; 16];
        id.iter_mut().zip(hash.as_ref()).for_each(|(to, from)| *to = *from);
        Self(id)
    }
}

impl fmt::Display for NetworkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

impl FromStr for NetworkId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        let number = digits.then(|| u128::from_str_radix(text, 16).ok()).flatten();
        number
            .map(|number| Self(number.to_be_bytes()))
            .ok_or_else(|| "must be 32 hexadecimal digits".to_owned())
    }
}

/// Every network that was measured, or that somebody tried to measure.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Book {
    networks: BTreeMap<NetworkId, Entry>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry {
    measured: Option<Measured>,
    /// Payload since then; the day ends [`MEASURED_FOR`] later.
    spent: u64,
    since: Timestamp,
}

/// One entry on the disk.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    network: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    down_bits_per_second: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    up_bits_per_second: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    measured_at: Option<Timestamp>,
    spent_bytes: u64,
    spent_since: Timestamp,
}

/// The record does not read: somebody else wrote it, or it is damaged.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Unreadable(String);

impl Book {
    /// The last result on a network. One from the future is none: the clock was wrong then or is now.
    pub fn measured(&self, network: &NetworkId, now: Timestamp) -> Option<Measured> {
        let measured = self.networks.get(network)?.measured?;
        (measured.at <= now).then_some(measured)
    }

    /// The last result on any network: the likeliest one until it is known where this machine is.
    pub fn latest(&self, now: Timestamp) -> Option<Measured> {
        let measured = self.networks.keys().filter_map(|network| self.measured(network, now));
        measured.max_by_key(|measured| measured.at)
    }

    /// The payload that may still be spent on a network at `now`, and when it is whole again.
    pub fn allowance(&self, network: &NetworkId, now: Timestamp) -> (u64, Timestamp) {
        match self.networks.get(network) {
            Some(entry) if entry.is_today(now) => (
                PAYLOAD_BYTES.saturating_sub(entry.spent),
                after(entry.since, MEASURED_FOR),
            ),
            Some(_) | None => (PAYLOAD_BYTES, now),
        }
    }

    /// So much payload was moved.
    pub fn spend(&mut self, network: NetworkId, bytes: u64, now: Timestamp) {
        let fresh = Entry {
            measured: None,
            spent: 0,
            since: now,
        };
        let entry = self.networks.entry(network).or_insert(fresh);
        if !entry.is_today(now) {
            (entry.spent, entry.since) = (0, now);
        }
        entry.spent = entry.spent.saturating_add(bytes);
        while self.networks.len() > MAX_NETWORKS {
            let others = self.networks.iter().filter(|(other, _)| **other != network);
            let Some(oldest) = others.min_by_key(|(_, entry)| entry.since).map(|(id, _)| *id) else {
                return;
            };
            self.networks.remove(&oldest);
        }
    }

    /// The result of what was spent before.
    pub fn note(&mut self, network: NetworkId, measured: Measured) {
        self.spend(network, 0, measured.at);
        if let Some(entry) = self.networks.get_mut(&network) {
            entry.measured = Some(measured);
        }
    }

    /// As JSON, one entry a line.
    pub fn encode(&self) -> String {
        let mut text = String::new();
        for (network, entry) in &self.networks {
            let line = Line {
                network: network.to_string(),
                down_bits_per_second: entry.measured.map(|measured| measured.down.bits_per_second()),
                up_bits_per_second: entry.measured.and_then(|measured| Some(measured.up?.bits_per_second())),
                measured_at: entry.measured.map(|measured| measured.at),
                spent_bytes: entry.spent,
                spent_since: entry.since,
            };
            // A structure of texts and numbers has no way to fail.
            text.push_str(&serde_json::to_string(&line).unwrap_or_default());
            text.push('\n');
        }
        text
    }

    /// Reads what [`Book::encode`] wrote. Anything else in it, and nothing of it is believed.
    pub fn decode(record: &[u8]) -> Result<Self, Unreadable> {
        let wrong = |what: &str| Unreadable(what.to_owned());
        if record.len() > MAX_RECORD_BYTES {
            return Err(wrong("it is too long"));
        }
        let text = std::str::from_utf8(record).ok().ok_or_else(|| wrong("it is no text"))?;
        let mut book = Self::default();
        for line in text.lines() {
            let line: Line = serde_json::from_str(line).map_err(|error| Unreadable(error.to_string()))?;
            let rate = |bits: Option<u64>| match bits {
                Some(0 | MAX_BITS_PER_SECOND..) => Err(wrong("a rate that no line has")),
                bits => Ok(bits.map(Rate::from_bits_per_second)),
            };
            let (down, up) = (rate(line.down_bits_per_second)?, rate(line.up_bits_per_second)?);
            let measured = match (down, up, line.measured_at) {
                (Some(down), up, Some(at)) => Some(Measured { down, up, at }),
                (None, None, None) => None,
                (Some(_), _, None) | (None, Some(_), _) | (None, None, Some(_)) => return Err(wrong("half a result")),
            };
            let entry = Entry {
                measured,
                spent: line.spent_bytes,
                since: line.spent_since,
            };
            let twice = book.networks.insert(line.network.parse().map_err(Unreadable)?, entry);
            if twice.is_some() || book.networks.len() > MAX_NETWORKS {
                return Err(wrong("a network twice, or too many"));
            }
        }
        Ok(book)
    }
}

impl Entry {
    /// Spent within a day before `now`. What was spent in the future was spent by a wrong clock; it could bind for years.
    fn is_today(&self, now: Timestamp) -> bool {
        self.since <= now && now < after(self.since, MEASURED_FOR)
    }
}
