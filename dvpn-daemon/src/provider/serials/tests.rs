use proptest::prelude::*;

use super::*;

fn key(byte: u8) -> PublicKey {
    PublicKey::from_bytes([byte; 32]).unwrap()
}
fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

/// The file, as the state directory has it.
fn write(disk: &mut Vec<u8>, change: Option<Change>) {
    match change {
        None => {}
        Some(Change::Whole(bytes)) => *disk = bytes,
        Some(Change::More(bytes)) => disk.extend(bytes),
    }
}

#[test]
fn serials_outlive_a_restart_and_name_nobody() {
    let (mut serials, mut disk) = (Serials::default(), Vec::new());
    assert_eq!(serials.take_change(), None, "nothing yet");
    serials.note(&key(1), 7, at(1000)).unwrap();
    write(&mut disk, serials.take_change());
    serials.note(&key(2), 9, at(1000)).unwrap();
    let more = serials.take_change();
    assert!(
        matches!(&more, Some(Change::More(bytes)) if bytes.len() == RECORD_BYTES),
        "{more:?}"
    );
    write(&mut disk, more);
    serials.note(&key(2), 9, at(2000)).unwrap();
    assert_eq!(serials.take_change(), None, "the same again is nothing new");
    serials.note(&key(2), 10, at(2500)).unwrap();
    write(&mut disk, serials.take_change());
    assert!(!disk.windows(8).any(|window| window == [1; 8] || window == [2; 8]));
    let again = Serials::decode(&disk, at(3000));
    for (client, serial) in [(1, 7), (2, 10)] {
        assert_eq!(
            again.check(&key(client), serial - 1, at(900)),
            Err(Refusal::Serial {
                offered: serial - 1,
                seen: serial
            })
        );
        assert_eq!(again.check(&key(client), serial, at(900)), Ok(()));
    }
    assert_eq!(again.check(&key(3), 1, at(900)), Ok(()));
}

#[test]
fn a_damaged_record_refuses_what_was_issued_before_and_goes_on_doing_so() {
    let mut serials = Serials::default();
    serials.note(&key(1), 7, at(1000)).unwrap();
    let mut bytes = Vec::new();
    write(&mut bytes, serials.take_change());
    for bad in [
        &bytes[..bytes.len() - 1],
        &[&bytes[..], &[0]].concat(),
        &bytes[..20],
        b"",
        b"something else",
    ] {
        let mut read = Serials::decode(bad, at(5000));
        let mut disk = bad.to_vec();
        for restart in 0..3 {
            assert_eq!(read.check(&key(9), 100, at(4999)), Err(Refusal::Forgotten), "{restart}");
            assert_eq!(read.check(&key(9), 100, at(5000)), Ok(()));
            write(&mut disk, read.take_change());
            read = Serials::decode(&disk, at(6000 + restart));
        }
    }
}

#[test]
fn a_record_of_the_first_form_is_read() {
    let mut bytes = FIRST_MAGIC.to_vec();
    push_record(&mut bytes, &name(&key(1)), 7, at(1000));
    let mut read = Serials::decode(&bytes, at(2000));
    assert!(read.check(&key(1), 6, at(900)).is_err() && read.check(&key(1), 7, at(900)).is_ok());
    read.note(&key(2), 8, at(2000)).unwrap();
    // A record of this form must not be written behind one of that.
    assert!(matches!(read.take_change(), Some(Change::Whole(bytes)) if bytes.starts_with(MAGIC)));
}

#[test]
fn a_date_from_a_clock_that_was_ahead_refuses_nobody_for_long() {
    let mut serials = Serials::decode(b"damaged", at(4_000_000_000));
    let mut disk = Vec::new();
    write(&mut disk, serials.take_change());
    let serials = Serials::decode(&disk, at(5000));
    assert_eq!(serials.check(&key(1), 1, at(5000)), Err(Refusal::Forgotten));
    assert_eq!(serials.check(&key(1), 1, at(5000 + 121)), Ok(()));
}

#[test]
fn the_record_is_written_anew_before_it_grows_beyond_what_is_read() {
    let (mut serials, mut disk, mut anew) = (Serials::default(), Vec::new(), 0);
    for serial in 0..10_000 {
        serials.note(&key(1 + (serial % 3) as u8), serial, at(1000)).unwrap();
        let change = serials.take_change();
        anew += usize::from(matches!(change, Some(Change::Whole(_))));
        write(&mut disk, change);
        assert!(disk.len() <= (FEW_RECORDS + 4) * RECORD_BYTES);
    }
    assert!((2..20).contains(&anew), "{anew}");
    assert!(Serials::decode(&disk, at(1000)).check(&key(1), 9998, at(999)).is_err());
}

#[test]
fn a_node_takes_new_clients_however_many_came_before() {
    let mut serials = Serials::default();
    let many = |number: usize| {
        let mut bytes = [7; 32];
        bytes[..8].copy_from_slice(&number.to_le_bytes());
        PublicKey::from_bytes(bytes).unwrap()
    };
    let held = many(0);
    let start = 1_800_000_000;
    // One a quarter of a second for ten hours.
    for number in 0..144_000_usize {
        let now = at(start + i64::try_from(number / 4).unwrap());
        serials.make_room(1, [&held], now);
        serials.check(&many(number), number as u64, now).unwrap();
        serials.note(&many(number), number as u64, now).unwrap();
    }
    assert!(serials.seen.len() <= MAX_SERIALS);
    assert_eq!(
        serials.check(&held, 0, at(start)),
        Ok(()),
        "a client that is here goes on"
    );
    // What a dropped key's approval replaced, and that approval itself, never come back.
    assert_eq!(serials.check(&many(1), 0, at(start)), Err(Refusal::Forgotten));
    let bytes = serials.whole();
    let again = Serials::decode(&bytes, at(start + 36_000));
    assert_eq!(again.check(&many(1), 0, at(start)), Err(Refusal::Forgotten));
    assert!(bytes.len() < 4 << 20, "more than the state directory reads");
}

#[derive(Debug, Clone)]
enum Step {
    /// A fresh approval of this key comes, by a pool whose clock is off by this much.
    Fresh {
        key: u8,
        skew: i64,
    },
    /// Any earlier approval is shown again.
    Replay(prop::sample::Index),
    /// The process ends between the note and its write, or between the write and the use of the next fresh approval.
    Crash {
        key: u8,
        written: bool,
    },
    /// Begun anew.
    Restart,
    Pass(i64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => (0..40_u8, -120..=120_i64).prop_map(|(key, skew)| Step::Fresh { key, skew }),
        6 => any::<prop::sample::Index>().prop_map(Step::Replay),
        2 => (0..40_u8, any::<bool>()).prop_map(|(key, written)| Step::Crash { key, written }),
        2 => Just(Step::Restart),
        3 => (0..40_000_i64).prop_map(Step::Pass),
        3 => (0..300_i64).prop_map(Step::Pass),
    ];
    prop::collection::vec(step, 1..120)
}

/// An approval as the pool signed it.
#[derive(Debug, Clone, Copy)]
struct Signed {
    key: u8,
    serial: u64,
    issued: i64,
}

/// A node as far as serials go: what is noted is written before it is used.
struct Node {
    serials: Serials,
    disk: Vec<u8>,
    now: i64,
    pool: u64,
    signed: Vec<Signed>,
    /// By key, the highest serial used so far.
    used: BTreeMap<u8, u64>,
    clients: BTreeSet<u8>,
}

impl Node {
    fn sign(&mut self, key: u8, skew: i64) -> Signed {
        self.pool += 1;
        let signed = Signed {
            key,
            serial: self.pool,
            issued: self.now + skew,
        };
        self.signed.push(signed);
        signed
    }

    /// As [`super::super::Ground::admit`] has it, with a life of a day.
    fn check_and_note(&mut self, approval: Signed) -> Result<(), Refusal> {
        let clients = self.clients.iter().chain([&approval.key]);
        let clients: Vec<PublicKey> = clients.map(|client| key(client + 1)).collect();
        self.serials.make_room(1, &clients, at(self.now));
        let over = approval.issued + 86_400 + 120 <= self.now;
        if over || approval.issued > self.now + 120 {
            return Err(Refusal::Encoding);
        }
        let client = key(approval.key + 1);
        self.serials.check(&client, approval.serial, at(approval.issued))?;
        self.serials.note(&client, approval.serial, at(self.now))
    }

    fn write(&mut self) {
        let change = self.serials.take_change();
        write(&mut self.disk, change);
    }

    fn offer(&mut self, approval: Signed) -> Result<(), Refusal> {
        self.check_and_note(approval)?;
        self.write();
        let used = self.used.entry(approval.key).or_insert(approval.serial);
        assert!(approval.serial >= *used, "{approval:?} after serial {used}");
        *used = approval.serial;
        Ok(())
    }

    fn start(&mut self) {
        let capacity = self.serials.capacity;
        self.serials = match self.disk.as_slice() {
            [] => Serials::default(),
            bytes => Serials::decode(bytes, at(self.now)),
        };
        self.serials.capacity = capacity;
        self.clients.clear();
    }
}

proptest! {
    #[test]
    fn nothing_that_was_replaced_is_ever_taken_again_and_nothing_fresh_is_refused(steps in steps()) {
        let serials = Serials { capacity: 16, ..Serials::default() };
        let mut node = Node {
            serials,
            disk: Vec::new(),
            now: 1_800_000_000,
            pool: 0,
            signed: Vec::new(),
            used: BTreeMap::new(),
            clients: BTreeSet::new(),
        };
        for step in steps {
            match step {
                Step::Fresh { key, skew } => {
                    let approval = node.sign(key, skew);
                    let known = node.serials.seen.contains_key(&name(&super::tests::key(key + 1)));
                    let taken = node.offer(approval);
                    // A date stands for whoever was dropped. Only where keys come as fast as here is it near.
                    let near = node.serials.not_before.is_some_and(|date| date.as_second() > node.now - 240);
                    prop_assert!(taken.is_ok() || (near && !known), "{taken:?}");
                    if taken.is_ok() && node.clients.len() < 4 {
                        node.clients.insert(key);
                    }
                    // Clients that are here may be named again and again.
                    for client in node.clients.clone() {
                        let newest = node.used[&client];
                        let issued = node.signed.iter().find(|signed| signed.serial == newest).unwrap().issued;
                        prop_assert_eq!(node.serials.check(&super::tests::key(client + 1), newest, at(issued)), Ok(()));
                    }
                }
                Step::Replay(which) if !node.signed.is_empty() => {
                    let approval = node.signed[which.index(node.signed.len())];
                    // Whether it is taken or not: `offer` sees to it that it is none that was replaced.
                    drop(node.offer(approval));
                }
                Step::Replay(_) => {}
                Step::Crash { key, written } => {
                    let approval = node.sign(key, 0);
                    let noted = node.check_and_note(approval);
                    if written && noted.is_ok() {
                        node.write();
                    }
                    node.start();
                }
                Step::Restart => node.start(),
                Step::Pass(seconds) => node.now += seconds,
            }
            prop_assert!(node.serials.seen.len() <= 16);
        }
    }
}
