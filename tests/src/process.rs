//! Real programs in a namespace: started, logged, watched, ended by their id.

use std::{
    fs::OpenOptions,
    os::unix::process::ExitStatusExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::namespace::Namespace;

/// A running program; killed when dropped.
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

/// What a program sees besides its arguments.
pub struct Surroundings<'a> {
    /// The network it lives in.
    pub namespace: &'a Namespace,
    /// Its standard output and error go here, appended.
    pub log: &'a Path,
    /// A file that it finds as /etc/resolv.conf instead of the machine's.
    pub resolv_conf: Option<&'a Path>,
}

impl Process {
    /// Starts a program. Its environment is exactly what `command` says.
    pub fn spawn(name: &str, mut command: Command, surroundings: &Surroundings<'_>) -> Result<Self> {
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(surroundings.log)
            .with_context(|| format!("opening {}", surroundings.log.display()))?;
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("sharing the log file")?)
            .stderr(log);
        // The child inherits the namespaces of the thread that makes it.
        let child = surroundings.namespace.run(|| -> Result<Child> {
            if let Some(file) = surroundings.resolv_conf {
                private_resolv_conf(file)?;
            }
            command
                .spawn()
                .with_context(|| format!("starting {}: build it first", command.get_program().display()))
        })??;
        Ok(Self {
            name: name.to_owned(),
            child,
            log: surroundings.log.to_owned(),
        })
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Everything it has logged.
    pub fn log_text(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// The last lines of its log, for error messages.
    pub fn log_tail(&self) -> String {
        let text = self.log_text();
        let lines: Vec<&str> = text.lines().collect();
        lines
            .get(lines.len().saturating_sub(15)..)
            .unwrap_or_default()
            .join("\n")
    }

    /// Fails with the end of the log when it has ended.
    pub fn check_running(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait().context("asking for a process")? {
            bail!(
                "{} ended ({status}); the end of {}:\n{}",
                self.name,
                self.log.display(),
                self.log_tail()
            );
        }
        Ok(())
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.child.id()).context("process id")?;
        kill(Pid::from_raw(pid), signal).with_context(|| format!("sending {signal} to {}", self.name))
    }

    /// Kills it at once (SIGKILL) and waits for its end.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill().with_context(|| format!("killing {}", self.name))?;
        self.child
            .wait()
            .with_context(|| format!("waiting for {}", self.name))?;
        Ok(())
    }

    /// Asks it to end (SIGTERM) and waits.
    pub fn stop(&mut self, patience: Duration) -> Result<ExitStatus> {
        if let Some(status) = self.child.try_wait().context("asking for a process")? {
            return Ok(status);
        }
        self.signal(Signal::SIGTERM)?;
        self.wait_exit(patience)
    }

    /// Waits for its end.
    pub fn wait_exit(&mut self, patience: Duration) -> Result<ExitStatus> {
        let what = format!("the end of {}", self.name);
        wait_for(&what, patience, || {
            self.child.try_wait().context("asking for a process")
        })
    }

    /// Resident memory, in KiB.
    pub fn resident_kib(&self) -> Result<u64> {
        let path = format!("/proc/{}/status", self.child.id());
        let text = std::fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
        text.lines()
            .find_map(|line| {
                line.strip_prefix("VmRSS:")?
                    .trim()
                    .strip_suffix("kB")?
                    .trim()
                    .parse()
                    .ok()
            })
            .with_context(|| format!("{path} has no VmRSS"))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.child.kill());
        match self.child.wait() {
            Ok(status) if status.core_dumped() => tracing::error!("{} dumped core", self.name),
            Ok(_) | Err(_) => {}
        }
    }
}

/// Whether this process runs: one that has ended and that nobody has waited for does not.
pub fn runs(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name before the state may hold anything (proc(5)).
    let state = stat
        .rsplit_once(')')
        .and_then(|(_, rest)| rest.trim_start().chars().next());
    state.is_some_and(|state| !matches!(state, 'Z' | 'X'))
}

/// Gives the calling thread, and what it starts, a view of the file system with another /etc/resolv.conf.
fn private_resolv_conf(file: &Path) -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS).context("making a mount namespace: this needs root")?;
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_REC | MsFlags::MS_SLAVE,
        None::<&str>,
    )
    .context("detaching the mount namespace")?;
    // A symbolic link (systemd-resolved) would be followed into a directory that may not exist here.
    let target = std::fs::canonicalize("/etc/resolv.conf").context("finding /etc/resolv.conf")?;
    mount(Some(file), &target, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .with_context(|| format!("binding {} over {}", file.display(), target.display()))
}

/// How many times the usual everything may take on this machine: `DVPN_LAB_SLOWNESS`, for one that is emulated.
pub fn slowness() -> u32 {
    std::env::var("DVPN_LAB_SLOWNESS")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(1)
}

/// Tries until something comes, an error comes, or the patience is over, [`slowness`] times as long as is said.
pub fn wait_for<T>(what: &str, patience: Duration, mut attempt: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let patience = patience * slowness();
    let deadline = Instant::now() + patience;
    loop {
        if let Some(value) = attempt()? {
            return Ok(value);
        }
        if Instant::now() >= deadline {
            bail!("{what} did not come within {patience:?}");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The path of one of the workspace's programs: in `DVPN_BIN_DIR`, or beside the running program.
pub fn program(name: &str) -> Result<PathBuf> {
    let directories = match std::env::var_os("DVPN_BIN_DIR") {
        Some(directory) => vec![PathBuf::from(directory)],
        None => std::env::current_exe()
            .context("finding this program's own path")?
            .ancestors()
            .skip(1)
            .take(2)
            .map(Path::to_owned)
            .collect(),
    };
    let found = directories
        .iter()
        .map(|directory| directory.join(name))
        .find(|path| path.is_file());
    found.with_context(|| {
        format!("{name} is not in {directories:?}: build it (cargo build --workspace) or set DVPN_BIN_DIR")
    })
}
