//! Everything the program started, also what left its process group and its session.
//!
//! This process is the one to whom the kernel gives the children of those who die (`PR_SET_CHILD_SUBREAPER`, prctl(2)):
//! whoever the program started is, in the end, our child, however it hid. The daemon starts nothing else, so a child that
//! is no running program is one of those. They are killed, and reaped, until there are none.

use std::{
    collections::BTreeMap,
    fs, io,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, getpid, kill_process, set_child_subreaper, waitid};
use tokio::process::{Child, Command};

/// How long the killed get to be gone.
const PATIENCE: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(5);

/// The programs that were started here: false for those that nobody waits for any more. The runtime reaps them.
static MEMBERS: Mutex<BTreeMap<i32, bool>> = Mutex::new(BTreeMap::new());

fn members() -> MutexGuard<'static, BTreeMap<i32, bool>> {
    MEMBERS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// From now on orphans come to us. Without that, those who leave their group run on.
pub(super) fn adopt_orphans() {
    if let Err(error) = set_child_subreaper(Some(getpid())) {
        tracing::warn!("what leaves the fallback script's process group cannot be ended: {error}");
    }
}

/// A running program, which is no orphan.
pub(super) struct Member(i32);

/// Starts a program. Nobody takes it for an orphan, however early they look.
pub(super) fn start(command: &mut Command) -> io::Result<(Child, Option<Member>)> {
    let mut members = members();
    let child = command.spawn()?;
    let id = child.id().and_then(|id| i32::try_from(id).ok());
    members.extend(id.map(|id| (id, true)));
    Ok((child, id.map(Member)))
}

impl Member {
    /// Its process id.
    pub(super) fn leader(&self) -> Option<Pid> {
        Pid::from_raw(self.0)
    }

    /// It was killed and nobody waits for it: its orphans are ended beside.
    pub(super) fn abandon(self) {
        members().insert(self.0, false);
        std::mem::forget(self);
        std::thread::spawn(end_orphans);
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        members().remove(&self.0);
    }
}

/// Kills and reaps all of our children that are no running programs, and theirs, which become ours by that. Blocks for
/// as long as that takes, at most [`PATIENCE`].
pub(super) fn end_orphans() {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let children = children();
        let orphans: Vec<i32> = {
            let mut members = members();
            // Who was abandoned and is gone was reaped by the runtime.
            members.retain(|id, waited_for| *waited_for || children.contains(id));
            children.into_iter().filter(|id| !members.contains_key(id)).collect()
        };
        if orphans.is_empty() {
            return;
        }
        for orphan in orphans.into_iter().filter_map(Pid::from_raw) {
            // One that is gone already, or that may not be killed: the next look tells.
            kill_process(orphan, Signal::KILL).ok();
            waitid(WaitId::Pid(orphan), WaitIdOptions::EXITED | WaitIdOptions::NOHANG).ok();
        }
        if Instant::now() > deadline {
            tracing::warn!("something that the fallback script started cannot be ended: see ps");
            return;
        }
        std::thread::sleep(PAUSE);
    }
}

/// Process ids of our children, the dead among them (`proc_pid_stat(5)`: the fourth field, after a name that may hold
/// anything, is the parent).
fn children() -> Vec<i32> {
    let own = getpid().as_raw_nonzero().get();
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    let is_ours = |id: &i32| {
        let stat = fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
        let parent = stat
            .rsplit_once(')')
            .and_then(|(_, rest)| rest.split_whitespace().nth(1)?.parse().ok());
        parent == Some(own)
    };
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(is_ours)
        .collect()
}
