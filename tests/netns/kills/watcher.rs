//! Looks at a provider's device all the time, and compares it with the pool's database.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Result, ensure};
use dvpn_common::keys::PublicKey;
use dvpn_tests::window::Window;

use super::journal::{Journal, Standing};

/// How often it looks.
const EVERY: Duration = Duration::from_millis(10);
/// What is later than this is counted.
const LATE: Duration = Duration::from_millis(20);
/// How long a peer may outlive its approval while pool and provider run: the pool looks for what ended twice a second
/// and promises its operator a second; the rest is for a busy machine.
const STEADY: f64 = 2.0;
/// And from when the last killed one of them runs again: the claim.
const AGREED: f64 = 5.0;

/// Where it looks.
pub(super) struct View {
    pub(super) socket: PathBuf,
    pub(super) database: PathBuf,
    /// The pool's own peer, which needs no approval.
    pub(super) prober: PublicKey,
}

#[derive(Default)]
struct Seen {
    ended: AtomicBool,
    looks: AtomicU64,
    /// Those that came more than [`LATE`] after the one before, with a device there all the time.
    late: AtomicU64,
    /// The slowest answers of device and database, in microseconds.
    slowest: [AtomicU64; 2],
    /// Since when pool and provider run, in Unix seconds; nothing while one of them is down.
    calm: Mutex<Option<f64>>,
    faults: Mutex<BTreeMap<String, String>>,
}

/// The watching thread.
pub(super) struct Watcher {
    seen: Arc<Seen>,
    thread: Option<JoinHandle<()>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Unix seconds, like the journal's.
fn wall() -> f64 {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs_f64()
}

impl Watcher {
    pub(super) fn start(view: View) -> Self {
        let seen = Arc::new(Seen::default());
        *lock(&seen.calm) = Some(wall());
        let shared = Arc::clone(&seen);
        let thread = std::thread::spawn(move || {
            if let Err(error) = watch(&view, &shared) {
                lock(&shared.faults).insert("the watcher".to_owned(), format!("it failed: {error:#}"));
            }
        });
        Self {
            seen,
            thread: Some(thread),
        }
    }

    /// Pool or provider is about to go: what ended cannot be carried out.
    pub(super) fn trouble(&self) {
        *lock(&self.seen.calm) = None;
    }

    /// Both run again.
    pub(super) fn calm(&self) {
        *lock(&self.seen.calm) = Some(wall());
    }

    /// Everything wrong so far, once.
    pub(super) fn take_faults(&self) -> Vec<String> {
        let faults = std::mem::take(&mut *lock(&self.seen.faults));
        faults.into_iter().map(|(who, what)| format!("{who}: {what}")).collect()
    }

    /// Fails if anything was wrong.
    pub(super) fn check(&self) -> Result<()> {
        let faults = self.take_faults();
        ensure!(faults.is_empty(), "the watcher saw:\n{}", faults.join("\n"));
        Ok(())
    }

    /// How often it looked.
    pub(super) fn looks(&self) -> u64 {
        self.seen.looks.load(Ordering::Relaxed)
    }

    /// How well it looked.
    pub(super) fn report(&self) -> String {
        let [device, database] = &self.seen.slowest;
        let slowest = |of: &AtomicU64| Duration::from_micros(of.load(Ordering::Relaxed));
        format!(
            "{} looks, {} of them more than {LATE:?} after the one before; the slowest answer of the device took {:?}, of \
             the database {:?}",
            self.looks(),
            self.seen.late.load(Ordering::Relaxed),
            slowest(device),
            slowest(database)
        )
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.seen.ended.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

fn watch(view: &View, seen: &Seen) -> Result<()> {
    let mut window = Window::new(&view.socket);
    let mut journal = Journal::open(&view.database)?;
    let mut last: Option<Instant> = None;
    while !seen.ended.load(Ordering::Relaxed) {
        let begun = Instant::now();
        // A peer comes after its approval is on the disk: the device is asked first, the database then.
        let at = wall();
        if let Some(mut peers) = window.peers()? {
            let answered = Instant::now();
            peers.remove(&view.prober);
            journal.look()?;
            note(&seen.slowest[0], answered.duration_since(begun));
            note(&seen.slowest[1], answered.elapsed());
            for key in &peers {
                judge(seen, &journal, key, at);
            }
            seen.looks.fetch_add(1, Ordering::Relaxed);
            if last
                .replace(begun)
                .is_some_and(|last| begun.duration_since(last) > LATE)
            {
                seen.late.fetch_add(1, Ordering::Relaxed);
            }
        } else {
            last = None;
        }
        std::thread::sleep(EVERY.saturating_sub(begun.elapsed()));
    }
    Ok(())
}

fn note(slowest: &AtomicU64, took: Duration) {
    slowest.fetch_max(u64::try_from(took.as_micros()).unwrap_or(u64::MAX), Ordering::Relaxed);
}

fn judge(seen: &Seen, journal: &Journal, key: &PublicKey, at: f64) {
    let fault = match journal.standing(key, at) {
        Standing::Approved => return,
        Standing::Unknown => "a peer without any approval".to_owned(),
        Standing::Over(end) => {
            let Some(calm) = *lock(&seen.calm) else { return };
            if at <= (end + STEADY).max(calm + AGREED) {
                return;
            }
            format!(
                "a peer {:.3} s after its approval ended and {:.3} s after the last restart",
                at - end,
                at - calm
            )
        }
    };
    lock(&seen.faults).entry(key.to_string()).or_insert(fault);
}
