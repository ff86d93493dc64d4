//! Removing what a network left when its process was killed.
//!
//! Every network has a directory under [`ROOT`] whose file `owner` its process holds locked. A lock that can be taken
//! means that the process is gone; whatever the directory's name prefixes goes then.

use std::{
    fs::{File, OpenOptions},
    os::unix::fs::MetadataExt as _,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use nix::{
    errno::Errno,
    mount::{MntFlags, umount2},
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    namespace,
    network::{PREFIX, ROOT},
};

const OWNER: &str = "owner";

/// Held while directories are claimed or swept, so that nobody sweeps one that is just being claimed.
fn registry() -> Result<File> {
    std::fs::create_dir_all(ROOT).with_context(|| format!("making {ROOT}: this needs root"))?;
    let path = Path::new(ROOT).join(".registry");
    let file = open_lock(&path)?;
    file.lock().with_context(|| format!("locking {}", path.display()))?;
    Ok(file)
}

fn open_lock(path: &Path) -> Result<File> {
    let mut options = OpenOptions::new();
    options.create(true).truncate(false).read(true).write(true);
    options
        .open(path)
        .with_context(|| format!("opening {}", path.display()))
}

/// Waits until no other test measures on this machine, and keeps the others waiting while the file is open: two cores
/// do not carry two networks whose delays must hold to a millisecond.
pub fn exclusive() -> Result<File> {
    drop(registry()?);
    let path = Path::new(ROOT).join(".exclusive");
    let file = open_lock(&path)?;
    file.lock().with_context(|| format!("locking {}", path.display()))?;
    Ok(file)
}

/// Makes the directory of a network and marks it as ours for as long as the file stays open.
pub(crate) fn claim(directory: &Path) -> Result<File> {
    let _registry = registry()?;
    std::fs::create_dir_all(directory).with_context(|| format!("making {}: this needs root", directory.display()))?;
    let file = open_lock(&directory.join(OWNER))?;
    if file.try_lock().is_err() {
        bail!(
            "the network {} is running: take it down first (dvpn-lab down)",
            directory.display()
        );
    }
    Ok(file)
}

/// Removes every network whose process is gone; says their names.
pub fn dead() -> Result<Vec<String>> {
    let _registry = registry()?;
    let mut removed = Vec::new();
    let Ok(entries) = std::fs::read_dir(ROOT) else {
        return Ok(removed);
    };
    for entry in entries.flatten() {
        let directory = entry.path();
        let Ok(owner) = File::open(directory.join(OWNER)) else {
            continue;
        };
        let Ok(id) = entry.file_name().into_string() else {
            continue;
        };
        if owner.try_lock().is_ok() {
            remove(&id)?;
            removed.push(id);
        }
    }
    Ok(removed)
}

/// Removes the processes, namespaces, mounts and files of one network. Its owner must be gone.
pub fn remove(id: &str) -> Result<()> {
    let directory = Path::new(ROOT).join(id);
    let names = namespace::names(&format!("{PREFIX}{id}-"));
    end_processes(&names)?;
    match umount2(&directory.join("bpf"), MntFlags::MNT_DETACH) {
        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
        Err(error) => bail!("unmounting {}/bpf: {error}", directory.display()),
    }
    for name in &names {
        namespace::ip(&["netns", "del", name])?;
    }
    match std::fs::remove_dir_all(&directory) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", directory.display()))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Ends every process whose network namespace is one of these: politely, then not.
pub(crate) fn end_processes(names: &[String]) -> Result<()> {
    let inodes: Vec<(u64, u64)> = names
        .iter()
        .filter_map(|name| std::fs::metadata(Path::new(namespace::DIRECTORY).join(name)).ok())
        .map(|meta| (meta.dev(), meta.ino()))
        .collect();
    for (signal, patience) in [
        (Signal::SIGTERM, Duration::from_secs(2)),
        (Signal::SIGKILL, Duration::from_secs(2)),
    ] {
        for pid in inside(&inodes) {
            if let Err(error) = kill(pid, signal) {
                // It may have ended meanwhile; what counts is the check below.
                tracing::debug!("sending {signal} to {pid}: {error}");
            }
        }
        let deadline = Instant::now() + patience;
        while Instant::now() < deadline {
            if inside(&inodes).is_empty() {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    bail!("processes {:?} in the network do not end", inside(&inodes))
}

fn inside(inodes: &[(u64, u64)]) -> Vec<Pid> {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| {
            std::fs::metadata(format!("/proc/{pid}/ns/net"))
                .is_ok_and(|meta| inodes.contains(&(meta.dev(), meta.ino())))
        })
        .map(Pid::from_raw)
        .collect()
}

/// Whether the process of this network lives.
pub fn is_running(id: &str) -> bool {
    File::open(Path::new(ROOT).join(id).join(OWNER)).is_ok_and(|owner| owner.try_lock().is_err())
}

/// Removes the lock files and the directory of all networks when no network is left in it.
pub fn forget_root() {
    let Ok(_registry) = registry() else { return };
    let others = std::fs::read_dir(ROOT).map_or(1, |entries| {
        entries
            .flatten()
            .filter(|entry| !entry.file_name().to_string_lossy().starts_with('.'))
            .count()
    });
    if others == 0
        && let Err(error) = std::fs::remove_dir_all(ROOT)
    {
        tracing::warn!("removing {ROOT}: {error}");
    }
}
