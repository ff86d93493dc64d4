//! A network namespace with a runtime inside: everything a side runs, and every program it starts, is in it.

use std::{
    future::Future,
    process::Command,
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};

/// Longer than anything here takes.
const DEADLINE: Duration = Duration::from_mins(1);

/// One namespace. The kernel removes it, and all links in it, when the side is dropped.
pub(crate) struct Side {
    runtime: tokio::runtime::Handle,
    thread_id: nix::unistd::Pid,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Side {
    /// Makes a namespace on a thread of its own. Needs root.
    pub(crate) fn new() -> Result<Self> {
        let (ready, made) = mpsc::channel();
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let thread = thread::spawn(move || {
            let runtime = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)
                .context("unshare: these tests run as root")
                .and_then(|()| Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?));
            match runtime {
                Ok(runtime) => {
                    ready.send(Ok((runtime.handle().clone(), nix::unistd::gettid()))).ok();
                    runtime.block_on(stopped).ok();
                }
                Err(error) => drop(ready.send(Err(error))),
            }
        });
        let (runtime, thread_id) = made.recv_timeout(DEADLINE)??;
        let side = Self {
            runtime,
            thread_id,
            stop: Some(stop),
            thread: Some(thread),
        };
        side.sh("ip link set lo up")?;
        Ok(side)
    }

    /// Runs to the end inside the namespace.
    pub(crate) fn run<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> Result<T> {
        let (done, result) = mpsc::channel();
        self.runtime.spawn(async move { done.send(work.await).ok() });
        result.recv_timeout(DEADLINE).context("no result within the deadline")
    }

    /// Runs beside the test inside the namespace.
    pub(crate) fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        self.runtime.spawn(work);
    }

    /// Runs shell commands inside the namespace; prints what they printed when they fail.
    pub(crate) fn sh(&self, script: &str) -> Result<String> {
        let owned = script.to_owned();
        // On a thread that the runtime's own thread starts, which is in the namespace for that reason.
        let output = self.run(async move {
            tokio::task::spawn_blocking(move || Command::new("sh").args(["-ec", &owned]).output()).await
        })???;
        ensure!(
            output.status.success(),
            "{script}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// A path that names the namespace while the side lives.
    pub(crate) fn netns_path(&self) -> String {
        format!("/proc/{}/task/{}/ns/net", std::process::id(), self.thread_id)
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

/// Two sides joined by a veth: 10.77.0.1 and .2, `fd77::1` and `fd77::2`.
pub(crate) fn joined_pair() -> Result<[Arc<Side>; 2]> {
    let sides = [Arc::new(Side::new()?), Arc::new(Side::new()?)];
    let [left, right] = &sides;
    // The path as /proc/self of the child would name another task.
    left.sh(&format!(
        "ip link add outer type veth peer name outer netns {}",
        right.netns_path()
    ))?;
    for (side, end) in sides.iter().zip(1..) {
        side.sh(&format!(
            "ip address add 10.77.0.{end}/24 dev outer; ip address add fd77::{end}/64 dev outer nodad; ip link set outer up"
        ))?;
    }
    Ok(sides)
}
