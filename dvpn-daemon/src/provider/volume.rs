//! How much clients carried: each of them, and the month together. Totals never run backwards.

use std::{collections::BTreeMap, net::IpAddr};

use dvpn_common::keys::PublicKey;

use super::{Admitted, status::Numbers};
use crate::host::{Carried, CounterValue};

/// Sums over all that the kernel counts.
#[derive(Default)]
pub(super) struct Volume {
    /// The kernel's counters as they were last read.
    seen: BTreeMap<IpAddr, Carried>,
    /// Sums by client number.
    clients: BTreeMap<u64, Carried>,
}

impl Volume {
    /// What the kernel counts already was counted by an earlier run.
    pub(super) fn begin(&mut self, counted: BTreeMap<IpAddr, Carried>) {
        self.seen = counted;
    }

    /// Takes over what the kernel counts now for the clients that hold addresses. The answer is how many bytes passed
    /// since the last time, those of clients that are gone included.
    pub(super) fn add<'a>(
        &mut self,
        counted: BTreeMap<IpAddr, Carried>,
        holders: impl Iterator<Item = &'a Admitted>,
        numbers: &Numbers,
    ) -> u64 {
        let number_of: BTreeMap<IpAddr, PublicKey> = holders
            .flat_map(|client| client.addresses.iter().map(|address| (address.ip(), client.key)))
            .collect();
        let mut bytes = 0_u64;
        for (address, now) in &counted {
            let before = self.seen.get(address).copied().unwrap_or_default();
            let new = Carried {
                sent: grown(before.sent, now.sent),
                received: grown(before.received, now.received),
            };
            bytes = bytes.saturating_add(new.sent.bytes).saturating_add(new.received.bytes);
            if let Some(number) = number_of.get(address).and_then(|key| numbers.known(key)) {
                let sum = self.clients.entry(number).or_default();
                add(&mut sum.sent, new.sent);
                add(&mut sum.received, new.received);
            }
        }
        self.seen = counted;
        bytes
    }

    pub(super) fn of(&self, number: u64) -> Carried {
        self.clients.get(&number).copied().unwrap_or_default()
    }

    pub(super) fn forget(&mut self, number: u64) {
        self.clients.remove(&number);
    }
}

/// What a counter grew by; one that is smaller than it was has begun anew.
fn grown(before: CounterValue, now: CounterValue) -> CounterValue {
    if now.bytes < before.bytes || now.packets < before.packets {
        return now;
    }
    CounterValue {
        packets: now.packets - before.packets,
        bytes: now.bytes - before.bytes,
    }
}

fn add(sum: &mut CounterValue, more: CounterValue) {
    sum.packets = sum.packets.saturating_add(more.packets);
    sum.bytes = sum.bytes.saturating_add(more.bytes);
}

#[cfg(test)]
mod tests {
    use super::*;
    use jiff::Timestamp;

    fn client(byte: u8) -> Admitted {
        Admitted {
            key: PublicKey::from_bytes([byte; 32]).unwrap(),
            addresses: vec![format!("10.96.0.{byte}/32").parse().unwrap()],
            ends_at: Timestamp::MAX,
            serial: 1,
        }
    }

    #[test]
    fn totals_grow_when_a_counter_begins_anew_and_stay_with_the_connection() {
        let clients = [client(2)];
        let mut numbers = Numbers::default();
        let number = numbers.of(clients[0].key);
        let mut volume = Volume::default();
        let count = |bytes, packets| {
            let carried = Carried {
                sent: CounterValue { packets, bytes },
                received: CounterValue::default(),
            };
            [
                ("10.96.0.2".parse().unwrap(), carried),
                ("10.96.0.9".parse().unwrap(), carried),
            ]
            .into()
        };
        assert_eq!(
            volume.add(count(100, 1), clients.iter(), &numbers),
            200,
            "also of who is gone"
        );
        assert_eq!(volume.add(count(150, 2), clients.iter(), &numbers), 100);
        assert_eq!(volume.add(count(30, 1), clients.iter(), &numbers), 60);
        assert_eq!(volume.of(number).sent, CounterValue { packets: 3, bytes: 180 });
        volume.forget(number);
        assert_eq!(volume.of(number), Carried::default());
        let mut next = Volume::default();
        next.begin(count(30, 1));
        assert_eq!(
            next.add(count(35, 2), clients.iter(), &numbers),
            10,
            "not a second time"
        );
    }
}
