//! Connections as they are, on a virtual clock: senders that fill what they find, senders that send blindly, and pauses.

use std::time::{Duration, Instant};

use dvpn_common::rate::Rate;

use super::{Allocator, Budget, Counters, INTERVAL};

const STEP: Duration = Duration::from_millis(1);
/// How long the shaper lets packets wait, as the kernel programs do.
const HORIZON: f64 = 0.025;
const SEGMENT: f64 = 1448.0;

/// Who sends.
enum Sender {
    Nobody,
    /// At this rate, whatever happens.
    Constant(f64),
    /// A loss-based sender: slow start, then a third less at each loss and growth by a cubic.
    Tcp {
        round_trip: f64,
        window: f64,
        before_loss: f64,
        since_loss: f64,
        slow_start: bool,
    },
}

impl Sender {
    fn tcp(round_trip_ms: u32) -> Self {
        Self::Tcp {
            round_trip: f64::from(round_trip_ms) / 1e3,
            window: 10.0 * SEGMENT,
            before_loss: 0.0,
            since_loss: 0.0,
            slow_start: true,
        }
    }
}

struct Connection {
    sender: Sender,
    enforced: f64,
    queue: f64,
    passed: f64,
    packets: f64,
    drops: u64,
    held_back: f64,
    /// Bytes of the running and the earlier windows of 100 ms.
    windows: Vec<f64>,
}

impl Connection {
    fn new(sender: Sender) -> Self {
        Self {
            sender,
            enforced: 0.0,
            queue: 0.0,
            passed: 0.0,
            packets: 0.0,
            drops: 0,
            held_back: 0.0,
            windows: vec![0.0],
        }
    }

    /// Bytes that pass within one step.
    fn step(&mut self) -> f64 {
        let seconds = STEP.as_secs_f64();
        let rate = self.enforced / 8.0;
        let wait = if rate > 0.0 { self.queue / rate } else { 0.0 };
        let offered = match &self.sender {
            Sender::Nobody => 0.0,
            Sender::Constant(bytes) => bytes * seconds,
            Sender::Tcp { round_trip, window, .. } => window / (round_trip + wait) * seconds,
        };
        let most = (rate * HORIZON).max(16.0 * 1500.0);
        let room = (most - self.queue + rate * seconds).max(0.0);
        let lost = offered > room;
        self.queue += offered.min(room);
        let passed = self.queue.min(rate * seconds);
        self.queue -= passed;
        self.passed += passed;
        self.packets += passed / 1500.0;
        self.held_back += passed / 1500.0 * wait;
        self.drops += u64::from(lost);
        if let Sender::Tcp {
            round_trip,
            window,
            before_loss,
            since_loss,
            slow_start,
        } = &mut self.sender
        {
            *since_loss += seconds;
            if lost && *since_loss > *round_trip {
                *before_loss = *window;
                *window = (*window * 0.7).max(2.0 * SEGMENT);
                (*since_loss, *slow_start) = (0.0, false);
            } else if *slow_start {
                *window += passed;
            } else {
                // RFC 9438, with its C and beta.
                let (most, scale) = (*before_loss / SEGMENT, 0.4);
                let time = *since_loss - (most * 0.3 / scale).cbrt();
                let target = (scale * time.powi(3) + most) * SEGMENT;
                let reno = *window + SEGMENT * passed / *window;
                *window = reno.max(target.min(*window * 1.5).max(*window));
            }
        }
        passed
    }

    fn counters(&self) -> Counters {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "counts of a simulation"
        )]
        let whole = |value: f64| value as u64;
        Counters {
            bytes: whole(self.passed),
            packets: whole(self.packets),
            drops: self.drops,
            held_back: Duration::from_secs_f64(self.held_back),
        }
    }
}

struct World {
    total: f64,
    allocator: Allocator<u32>,
    connections: Vec<Connection>,
    start: Instant,
    at: Duration,
    next_look: Duration,
    /// Most that passed together within 100 ms, as a part of the line.
    busiest: f64,
}

impl World {
    fn new(megabits: u32, senders: Vec<Sender>) -> Self {
        let total = u64::from(megabits) * 1_000_000;
        let mut allocator = Allocator::new(Budget::new(Rate::from_bits_per_second(total), None));
        let connections: Vec<Connection> = senders.into_iter().map(Connection::new).collect();
        for key in 0..u32::try_from(connections.len()).unwrap() {
            allocator.connect(key, None);
        }
        let mut world = Self {
            total: f64::from(megabits) * 1e6,
            allocator,
            connections,
            start: super::beginning(),
            at: Duration::ZERO,
            next_look: Duration::ZERO,
            busiest: 0.0,
        };
        world.look();
        world
    }

    fn look(&mut self) {
        let counted = (0..).zip(self.connections.iter().map(Connection::counters));
        self.allocator.observe(counted, self.start + self.at);
        for change in self.allocator.plan() {
            #[expect(clippy::cast_precision_loss, reason = "rates far below 2^52")]
            let rate = change.enforced.bits_per_second() as f64;
            self.connections[change.connection as usize].enforced = rate;
            self.allocator.applied(change);
        }
        self.next_look = self.at + INTERVAL;
    }

    fn run(&mut self, for_ms: u64) {
        let end = self.at + Duration::from_millis(for_ms);
        while self.at < end {
            for connection in &mut self.connections {
                let passed = connection.step();
                *connection.windows.last_mut().unwrap() += passed;
            }
            self.at += STEP;
            if self.at.as_millis().is_multiple_of(100) {
                let sum: f64 = self
                    .connections
                    .iter()
                    .map(|connection| connection.windows.last().unwrap())
                    .sum();
                self.busiest = self.busiest.max(sum * 80.0 / self.total);
                for connection in &mut self.connections {
                    connection.windows.push(0.0);
                }
            }
            if self.at >= self.next_look {
                self.look();
            }
        }
    }

    /// Each one's part of the line over the last `windows` of 100 ms.
    fn parts(&self, windows: usize) -> Vec<f64> {
        let part = |connection: &Connection| {
            let whole = &connection.windows[..connection.windows.len() - 1];
            let last = &whole[whole.len() - windows..];
            last.iter().sum::<f64>() * 80.0 / self.total / f64::from(u32::try_from(windows).unwrap())
        };
        self.connections.iter().map(part).collect()
    }
}

/// What two busy connections, a third that begins, and one that pauses come to.
fn third_begins(megabits: u32, make: &dyn Fn() -> Sender) {
    let mut world = World::new(megabits, vec![make(), make(), Sender::Nobody]);
    // However the beginning lies between two looks.
    world.run(3000);
    let two = world.parts(5);
    assert!(two[0] >= 0.49 && two[1] >= 0.49, "{megabits}: {two:?}");

    world.connections[2].sender = make();
    world.run(1000);
    world.run(1000);
    let three = world.parts(10);
    assert!(three.iter().all(|part| *part >= 0.32), "{megabits}: {three:?}");

    world.connections[0].sender = Sender::Nobody;
    world.run(1000);
    world.run(500);
    let back = world.parts(5);
    assert!(back[1] >= 0.49 && back[2] >= 0.49, "{megabits}: {back:?}");
    assert!(world.busiest <= 1.02, "{megabits}: {}", world.busiest);
}

#[test]
fn a_third_busy_connection_has_its_third_within_a_second_and_the_others_their_half_when_one_pauses() {
    for megabits in [4, 20, 100, 1000] {
        third_begins(megabits, &|| Sender::Constant(f64::from(megabits) * 1e6 / 4.0));
    }
    for (megabits, round_trip_ms) in [
        (4, 2),
        (4, 20),
        (4, 60),
        (20, 2),
        (20, 20),
        (20, 60),
        (100, 2),
        (100, 20),
        (1000, 2),
    ] {
        third_begins(megabits, &move || Sender::tcp(round_trip_ms));
    }
}

#[test]
fn what_a_sender_far_away_can_not_use_yet_the_others_have() {
    // After a loss at the start a window for 33 Mbit/s and 60 ms takes seconds to grow, whoever shapes.
    let mut world = World::new(100, vec![Sender::tcp(20), Sender::tcp(20), Sender::Nobody]);
    world.run(3000);
    world.connections[2].sender = Sender::tcp(60);
    for _ in 0..10 {
        world.run(500);
        let parts = world.parts(5);
        assert!(parts.iter().sum::<f64>() >= 0.93, "{parts:?}");
    }
    let parts = world.parts(5);
    assert!(parts.iter().all(|part| *part >= 0.30), "{parts:?}");
}

#[test]
fn among_a_thousand_idle_connections_one_that_begins_has_its_half_within_a_second() {
    let mut senders: Vec<Sender> = (0..1000).map(|_| Sender::Nobody).collect();
    senders[0] = Sender::Constant(500e6 / 4.0);
    let mut world = World::new(500, senders);
    world.run(1000);
    world.connections[1].sender = Sender::Constant(500e6 / 4.0);
    world.run(1000);
    world.run(500);
    let parts = world.parts(5);
    // Idle connections hold at most a 32nd, all together.
    assert!(parts[0] >= 0.48 && parts[1] >= 0.48, "{:?}", &parts[..2]);
    assert!(world.busiest <= 1.02, "{}", world.busiest);
}

#[test]
fn a_thousand_connections_that_begin_together_share_evenly_within_a_second() {
    let mut world = World::new(500, (0..1000).map(|_| Sender::Nobody).collect());
    world.run(1000);
    for connection in &mut world.connections {
        connection.sender = Sender::Constant(1e6);
    }
    world.run(1000);
    world.run(500);
    let parts = world.parts(5);
    let least = parts.iter().copied().fold(f64::MAX, f64::min);
    assert!(least >= 0.98 / 1000.0, "{least}");
    assert!(world.busiest <= 1.02, "{}", world.busiest);
}

#[test]
fn a_little_traffic_costs_two_busy_connections_little() {
    let little = 2e6 / 8.0;
    let mut world = World::new(100, vec![Sender::tcp(20), Sender::tcp(20), Sender::Constant(little)]);
    world.run(3000);
    world.run(2000);
    let parts = world.parts(20);
    assert!(parts[2] >= 0.0199, "{parts:?}");
    assert!(parts[0] + parts[1] >= 0.96, "{parts:?}");
}
