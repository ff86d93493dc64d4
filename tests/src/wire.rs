//! A cable between two network namespaces with the faults of a long path: delay, jitter, loss, a rate, outages.
//!
//! The kernels this runs on have no netem, so each end is a TAP device and one thread carries the frames between them.
//! The thread runs with real-time priority when it may and waits with `ppoll`, so that a crossing takes
//! 0.1 ms more than asked (measured, two virtual cores) and not 0.1 ms more or less at random. ARP passes at once and is never lost: it stands for the local cable, and only
//! what goes "over the internet" suffers.

use std::{
    cmp::Reverse,
    collections::BinaryHeap,
    fs::File,
    io::{self, Read as _, Write as _},
    os::{fd::AsRawFd as _, unix::net::UnixStream},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

use crate::{namespace::Namespace, sys};

/// How the delay of a frame varies.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Jitter {
    /// Not at all.
    None,
    /// Evenly between minus and plus this.
    Uniform(Duration),
    /// Normally distributed with this standard deviation.
    Normal(Duration),
}

/// What a wire does to the frames of each direction.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Path {
    /// One way.
    pub delay: Duration,
    /// Added to or taken from it, never below zero in total.
    pub jitter: Jitter,
    /// Probability that a frame is lost, 0 to 1.
    pub loss: f64,
    /// Bits per second; nothing is as fast as the thread can carry.
    pub rate_bits: Option<u64>,
    /// Whether jitter may change the order of frames. Most real paths keep the order within a flow.
    pub reorder: bool,
}

impl Default for Path {
    fn default() -> Self {
        Self {
            delay: Duration::ZERO,
            jitter: Jitter::None,
            loss: 0.0,
            rate_bits: None,
            reorder: false,
        }
    }
}

impl Path {
    /// Half of `round_trip` each way and no other fault.
    pub fn round_trip(round_trip: Duration) -> Self {
        Self {
            delay: round_trip / 2,
            ..Self::default()
        }
    }
}

/// Most frames one direction holds; the next is dropped, as by a full router.
const QUEUE_FRAMES: usize = 20_000;
/// Longest that a rate limit lets frames queue, as in a router with a sane buffer.
const RATE_QUEUE: Duration = Duration::from_millis(100);
/// Frames taken from one end before the other end and the clock get their turn.
const BATCH: usize = 64;
const FRAME_BYTES: usize = 65_536;
const ETHERTYPE_ARP: [u8; 2] = [0x08, 0x06];

struct Shared {
    path: Mutex<Path>,
    dark: AtomicBool,
    stop: AtomicBool,
    carried: AtomicU64,
    lost: AtomicU64,
}

/// A running wire; dropping it removes both ends.
pub struct Wire {
    shared: Arc<Shared>,
    wake: UnixStream,
    thread: Option<JoinHandle<()>>,
}

/// One end of a wire: where it is and what it is called.
#[derive(Clone, Copy)]
pub struct End<'a> {
    /// The namespace.
    pub namespace: &'a Namespace,
    /// Interface name, at most 15 bytes.
    pub interface: &'a str,
}

impl Wire {
    /// Makes both ends and begins to carry frames. `seed` decides which frames are lost and how delays vary.
    pub fn connect(a: End<'_>, b: End<'_>, path: Path, seed: u64) -> Result<Self> {
        let open = |end: End<'_>| {
            end.namespace
                .run(|| sys::open_tap(end.interface))?
                .with_context(|| format!("making the TAP device {} in {}", end.interface, end.namespace.name()))
        };
        let taps = [open(a)?, open(b)?];
        let shared = Arc::new(Shared {
            path: Mutex::new(path),
            dark: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            carried: AtomicU64::new(0),
            lost: AtomicU64::new(0),
        });
        let (wake, woken) = UnixStream::pair().context("making the wire's wake-up pipe")?;
        woken.set_nonblocking(true).context("making the wire's wake-up pipe")?;
        let thread = std::thread::Builder::new()
            .name(format!("wire-{}", a.interface))
            .spawn({
                let shared = Arc::clone(&shared);
                move || carry(&taps, &woken, &shared, seed)
            })
            .context("starting the wire's thread")?;
        Ok(Self {
            shared,
            wake,
            thread: Some(thread),
        })
    }

    /// Changes the faults; frames already on the way keep theirs.
    pub fn set_path(&self, path: Path) {
        *self.shared.path.lock().unwrap_or_else(PoisonError::into_inner) = path;
    }

    /// The faults in force.
    pub fn path(&self) -> Path {
        *self.shared.path.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins or ends an outage: every frame but ARP is lost, those on the way too.
    pub fn set_outage(&self, dark: bool) {
        self.shared.dark.store(dark, Ordering::Relaxed);
    }

    /// Frames carried and lost so far, both directions together.
    pub fn counts(&self) -> (u64, u64) {
        (
            self.shared.carried.load(Ordering::Relaxed),
            self.shared.lost.load(Ordering::Relaxed),
        )
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        drop(self.wake.write_all(&[1]));
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

/// A frame waiting for its time. Ordered by when it is due, then by arrival.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Waiting {
    due: Instant,
    number: u64,
    frame: Vec<u8>,
}

/// One direction of the wire.
struct Lane {
    queue: BinaryHeap<Reverse<Waiting>>,
    number: u64,
    last_due: Instant,
    sender_free: Instant,
    random: StdRng,
}

impl Lane {
    fn new(seed: u64) -> Self {
        let now = Instant::now();
        Self {
            queue: BinaryHeap::new(),
            number: 0,
            last_due: now,
            sender_free: now,
            random: StdRng::seed_from_u64(seed),
        }
    }

    /// Takes a frame in; `false` if the path loses it.
    fn accept(&mut self, frame: &[u8], path: &Path, dark: bool, now: Instant) -> bool {
        let due = if frame.get(12..14) == Some(&ETHERTYPE_ARP) {
            now
        } else {
            // The draws are made for every frame so that a seed means the same fate whatever the settings are.
            let (lost, varied) = (self.random.random::<f64>() < path.loss, self.varied(path));
            if dark || lost || self.queue.len() >= QUEUE_FRAMES {
                return false;
            }
            let Some(sent) = self.serialise(frame.len(), path, now) else {
                return false;
            };
            let due = sent + varied;
            if path.reorder {
                due
            } else {
                self.last_due = self.last_due.max(due);
                self.last_due
            }
        };
        self.number += 1;
        self.queue.push(Reverse(Waiting {
            due,
            number: self.number,
            frame: frame.to_vec(),
        }));
        true
    }

    /// When the last bit of the frame is on a line of the path's rate; nothing when its buffer is full.
    fn serialise(&mut self, bytes: usize, path: &Path, now: Instant) -> Option<Instant> {
        let Some(rate) = path.rate_bits.filter(|rate| *rate > 0) else {
            return Some(now);
        };
        let start = self.sender_free.max(now);
        if start - now > RATE_QUEUE {
            return None;
        }
        let nanos = u128::try_from(bytes).ok()? * 8_000_000_000 / u128::from(rate);
        self.sender_free = start + Duration::from_nanos(u64::try_from(nanos).ok()?);
        Some(self.sender_free)
    }

    fn varied(&mut self, path: &Path) -> Duration {
        let (first, second): (f64, f64) = (self.random.random(), self.random.random());
        let shift = match path.jitter {
            Jitter::None => 0.0,
            Jitter::Uniform(width) => width.as_secs_f64() * (2.0 * first - 1.0),
            // Box–Muller: two uniform numbers make a normal one.
            Jitter::Normal(deviation) => {
                let radius = (-2.0 * (1.0 - first).ln()).sqrt();
                deviation.as_secs_f64() * radius * (std::f64::consts::TAU * second).cos()
            }
        };
        Duration::try_from_secs_f64(path.delay.as_secs_f64() + shift).unwrap_or(Duration::ZERO)
    }

    fn next_due(&self) -> Option<Instant> {
        self.queue.peek().map(|Reverse(waiting)| waiting.due)
    }

    fn deliver(&mut self, mut to: &File, dark: bool, shared: &Shared) {
        while self.next_due().is_some_and(|due| due <= Instant::now()) {
            let Some(Reverse(waiting)) = self.queue.pop() else {
                return;
            };
            // An outage swallows what is on the way. A write fails only while the far end is down: lost as well.
            let whole = waiting.frame.get(12..14) == Some(&ETHERTYPE_ARP) || !dark;
            if whole && to.write(&waiting.frame).is_ok() {
                shared.carried.fetch_add(1, Ordering::Relaxed);
            } else {
                shared.lost.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

fn carry(taps: &[File; 2], woken: &UnixStream, shared: &Shared, seed: u64) {
    // Both are about accuracy only; without them the wire works and its delays are coarser.
    let real_time = sys::run_first();
    let fine_timers = nix::sys::prctl::set_timerslack(1).is_ok();
    if !(real_time && fine_timers) {
        tracing::warn!("the wire runs without real-time priority: its delays vary by some 0.1 ms more");
    }
    let [a, b] = taps;
    let mut there = Lane::new(seed);
    let mut back = Lane::new(seed ^ 0x5bd1_e995);
    let mut buffer = vec![0_u8; FRAME_BYTES];
    while !shared.stop.load(Ordering::Relaxed) {
        let next = [there.next_due(), back.next_due()].into_iter().flatten().min();
        let timeout = next.map(|due| due.saturating_duration_since(Instant::now()));
        let Ok([from_a, from_b, _]) = sys::wait_readable([a.as_raw_fd(), b.as_raw_fd(), woken.as_raw_fd()], timeout)
        else {
            return;
        };
        let path = *shared.path.lock().unwrap_or_else(PoisonError::into_inner);
        let dark = shared.dark.load(Ordering::Relaxed);
        for (readable, tap, lane) in [(from_a, a, &mut there), (from_b, b, &mut back)] {
            if readable && drain(tap, lane, &path, dark, shared, &mut buffer).is_err() {
                return;
            }
        }
        there.deliver(b, dark, shared);
        back.deliver(a, dark, shared);
    }
}

fn drain(
    mut tap: &File,
    lane: &mut Lane,
    path: &Path,
    dark: bool,
    shared: &Shared,
    buffer: &mut [u8],
) -> io::Result<()> {
    for _ in 0..BATCH {
        match tap.read(buffer) {
            Ok(length) => {
                let frame = buffer.get(..length).unwrap_or_default();
                if !lane.accept(frame, path, dark, Instant::now()) {
                    shared.lost.fetch_add(1, Ordering::Relaxed);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            // The interface is down (EIO): nothing to carry, and the loop must not spin on it.
            Err(error) if error.raw_os_error() == Some(libc::EIO) => {
                std::thread::sleep(Duration::from_millis(1));
                return Ok(());
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const IP: [u8; 60] = {
        let mut frame = [0; 60];
        frame[12] = 0x08;
        frame
    };
    const ARP: [u8; 60] = {
        let mut frame = IP;
        frame[13] = 0x06;
        frame
    };

    fn dues(path: &Path, frames: usize, step: Duration) -> Vec<(Instant, Duration)> {
        let mut lane = Lane::new(7);
        let mut now = Instant::now();
        let mut out = Vec::new();
        for _ in 0..frames {
            if lane.accept(&IP, path, false, now) {
                let Reverse(newest) = lane.queue.iter().max_by_key(|Reverse(w)| w.number).unwrap();
                out.push((newest.due, newest.due - now));
            }
            now += step;
        }
        out
    }

    #[test]
    fn loss_is_as_asked_and_the_same_for_the_same_seed() {
        let path = Path {
            loss: 0.02,
            ..Path::default()
        };
        let first = dues(&path, 10_000, Duration::from_micros(10)).len();
        assert_eq!(first, dues(&path, 10_000, Duration::from_micros(10)).len());
        assert!((9_740..=9_860).contains(&first), "{first} of 10000 passed at 2 % loss");
    }

    #[test]
    fn jitter_stays_in_its_bounds_and_keeps_the_order() {
        let jitter = Jitter::Uniform(Duration::from_millis(1));
        let path = Path {
            delay: Duration::from_millis(5),
            jitter,
            ..Path::default()
        };
        let dues = dues(&path, 1_000, Duration::from_micros(100));
        assert!(dues.windows(2).all(|pair| pair[0].0 <= pair[1].0));
        let (least, most) = (
            dues.iter().map(|d| d.1).min().unwrap(),
            dues.iter().map(|d| d.1).max().unwrap(),
        );
        assert!(
            least >= Duration::from_millis(4) && most <= Duration::from_millis(6),
            "{least:?} to {most:?}"
        );
        assert!(most > least + Duration::from_millis(1));
    }

    #[test]
    fn a_rate_spaces_frames_and_drops_what_its_buffer_does_not_hold() {
        // 60 bytes at 480 kbit/s are 1 ms each; the buffer holds 100 ms.
        let path = Path {
            rate_bits: Some(480_000),
            ..Path::default()
        };
        let dues = dues(&path, 500, Duration::ZERO);
        assert!((100..=102).contains(&dues.len()), "{}", dues.len());
        assert!(
            dues.windows(2)
                .all(|pair| pair[1].0 - pair[0].0 == Duration::from_millis(1))
        );
    }

    #[test]
    fn an_outage_takes_everything_but_arp() {
        let mut lane = Lane::new(1);
        let now = Instant::now();
        assert!(!lane.accept(&IP, &Path::default(), true, now));
        assert!(lane.accept(
            &ARP,
            &Path {
                loss: 1.0,
                ..Path::default()
            },
            true,
            now
        ));
    }
}
