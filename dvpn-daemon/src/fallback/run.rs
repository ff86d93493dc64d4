//! One run of the program: everything that it started dies with it, at its deadline, or when nobody waits any more.

use std::{
    ffi::OsString,
    io,
    process::{ExitStatus, Stdio},
    time::Duration,
};

use dvpn_core::config::Secret;
use rustix::process::{Pid, Resource, Rlimit, Signal, WaitId, WaitIdOptions, kill_process_group, prlimit, waitid};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _},
    process::{Child, ChildStdin, Command},
    sync::watch,
};

use super::{Error, Script, family};

/// Most bytes of standard output that are read.
pub(super) const MAX_OUTPUT_BYTES: usize = 64 * 1024;
/// Most bytes of standard error that are kept for the log; the rest is read and dropped.
const MAX_WORDS_BYTES: usize = 8 * 1024;
/// Most of them that become part of an error message.
const MAX_SAID_CHARS: usize = 200;
/// How long what is left in the pipes may take after the program ended and its group was killed.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);
/// Open files it may have: what programs expect, not what this daemon raised its own limit to.
const MAX_FILES: u64 = 1024;

/// The running program, first of its own process group. Dropping it kills the group, and who left it.
struct Group {
    child: Child,
    leader: Pid,
    exited: watch::Receiver<bool>,
    /// Until it is reaped.
    member: Option<family::Member>,
}

impl Group {
    fn watch(child: Child, member: Option<family::Member>) -> Result<Self, Error> {
        let leader = member
            .as_ref()
            .and_then(family::Member::leader)
            .ok_or_else(|| Error::Watch {
                action: "reading its process id",
                source: io::Error::from(io::ErrorKind::NotFound),
            })?;
        let (exiting, exited) = watch::channel(false);
        // It stays a zombie, so that its process id, which names the group, is nobody else's until the group is killed.
        tokio::task::spawn_blocking(move || {
            let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
            while matches!(waitid(WaitId::Pid(leader), options), Err(rustix::io::Errno::INTR)) {}
            exiting.send_replace(true);
        });
        Ok(Self {
            child,
            leader,
            exited,
            member,
        })
    }

    /// Waits until the program ended.
    async fn ended(&self) {
        if self.exited.clone().wait_for(|exited| *exited).await.is_err() {
            tracing::debug!("nobody watched for the end of the fallback script");
        }
    }

    /// Kills whatever it left behind. Only then are the pipes closed for sure.
    async fn end_family(&self) {
        kill_group(self.leader);
        if let Err(error) = tokio::task::spawn_blocking(family::end_orphans).await {
            tracing::warn!("ending what the fallback script left behind: {error}");
        }
    }

    /// Kills whatever it left behind, and reaps it.
    async fn reap(&mut self) -> Result<ExitStatus, Error> {
        self.end_family().await;
        let status = self.child.wait().await;
        self.member = None;
        status.map_err(|source| Error::Watch {
            action: "reading its exit status",
            source,
        })
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(member) = self.member.take() {
            kill_group(self.leader);
            member.abandon();
        }
    }
}

/// The leader must not be reaped yet.
fn kill_group(leader: Pid) {
    match kill_process_group(leader, Signal::KILL) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => {}
        Err(error) => tracing::warn!("killing the fallback script's process group: {error}"),
    }
}

/// Runs `script` with exactly this environment, `request` on its standard input, and returns what it printed.
pub(super) async fn run(
    script: &Script,
    environment: &[(&'static str, OsString)],
    request: &[u8],
    secret: &Secret,
    timeout: Duration,
) -> Result<Vec<u8>, Error> {
    family::adopt_orphans();
    let mut command = Command::new(script.program());
    command
        .current_dir(script.directory())
        .env_clear()
        .envs(environment.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true);
    let (mut child, member) = family::start(&mut command).map_err(|source| Error::Start {
        script: script.name().to_string_lossy().into_owned(),
        source,
    })?;
    let pipes = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let mut group = Group::watch(child, member)?;
    // Before it is told the token: a core file would hold it.
    limit(group.leader, Resource::Core, 0);
    limit(group.leader, Resource::Nofile, MAX_FILES);
    let (Some(input), Some(output), Some(words)) = pipes else {
        return Err(Error::Watch {
            action: "opening its pipes",
            source: io::Error::from(io::ErrorKind::BrokenPipe),
        });
    };
    let (mut answer, mut said) = (Vec::new(), Vec::new());
    // What is left out makes the rest shorter; a token that is cut in two at the end is left out as well.
    let keep = 2 * MAX_WORDS_BYTES + secret.expose().len();
    let outcome = tokio::time::timeout(timeout, async {
        let talk = async { tokio::try_join!(read_all(output, &mut answer), keep_some(words, &mut said, keep)) };
        let left_open = async {
            group.ended().await;
            group.end_family().await;
            tokio::time::sleep(DRAIN_TIMEOUT).await;
            Err(Error::StillOpen)
        };
        tokio::select! {
            talked = async { tokio::join!(feed(input, request), talk).1 } => talked.map(drop)?,
            open = left_open => open?,
        }
        group.ended().await;
        group.reap().await
    })
    .await
    .unwrap_or(Err(Error::TimedOut(timeout)));
    let said = redacted(&said, secret);
    for line in said.lines().filter(|line| !line.is_empty()) {
        tracing::info!("the fallback script said: {line}");
    }
    match outcome? {
        status if status.success() => Ok(answer),
        status => Err(Error::Failed {
            status,
            said: last_line(&said),
        }),
    }
}

/// Its limits are its own; without them it runs all the same.
fn limit(leader: Pid, resource: Resource, most: u64) {
    let limits = Rlimit {
        current: Some(most),
        maximum: Some(most),
    };
    if let Err(error) = prlimit(Some(leader), resource, limits) {
        tracing::debug!("limiting the fallback script's {resource:?}: {error}");
    }
}

/// Writes the request and closes the pipe. A program that does not read it shows that in its answer.
async fn feed(mut input: ChildStdin, request: &[u8]) {
    if let Err(error) = input.write_all(request).await {
        tracing::debug!("the fallback script did not read its request: {error}");
    }
}

async fn read_all(output: impl AsyncRead + Unpin, answer: &mut Vec<u8>) -> Result<(), Error> {
    let most = u64::try_from(MAX_OUTPUT_BYTES).unwrap_or(u64::MAX);
    output
        .take(most + 1)
        .read_to_end(answer)
        .await
        .map_err(|source| Error::Watch {
            action: "reading its output",
            source,
        })?;
    if answer.len() > MAX_OUTPUT_BYTES {
        return Err(Error::TooMuch);
    }
    Ok(())
}

async fn keep_some(mut words: impl AsyncRead + Unpin, kept: &mut Vec<u8>, most: usize) -> Result<(), Error> {
    let mut buffer = [0; 2048];
    loop {
        let read = words.read(&mut buffer).await.map_err(|source| Error::Watch {
            action: "reading its standard error",
            source,
        })?;
        if read == 0 {
            return Ok(());
        }
        let room = most.saturating_sub(kept.len()).min(read);
        kept.extend_from_slice(buffer.get(..room).unwrap_or_default());
    }
}

/// Fit for a log: no token nor the beginning of one at the end, where its reading or its writer was cut off, no control
/// characters but line ends, bounded.
pub(super) fn redacted(said: &[u8], secret: &Secret) -> String {
    let text = String::from_utf8_lossy(said);
    let mut clean: String = text.chars().filter(|c| *c == '\n' || !c.is_control()).collect();
    let token = secret.expose();
    if !token.is_empty() {
        clean = clean.replace(token, "[token]");
        let begun = (1..token.len())
            .rev()
            .find(|length| token.get(..*length).is_some_and(|beginning| clean.ends_with(beginning)));
        clean.truncate(clean.len() - begun.unwrap_or(0));
    }
    clean.truncate(clean.floor_char_boundary(MAX_WORDS_BYTES));
    clean
}

fn last_line(said: &str) -> String {
    match said.lines().rev().find(|line| !line.trim().is_empty()) {
        Some(line) => line.chars().take(MAX_SAID_CHARS).collect(),
        None => "it gave no reason".to_owned(),
    }
}
