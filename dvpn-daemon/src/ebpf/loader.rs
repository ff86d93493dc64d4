//! One thread that loads and attaches, for as long as the daemon runs.

use std::{
    path::{Path, PathBuf},
    thread,
};

use tokio::sync::{mpsc, oneshot};

use super::{Counters, Error};

type Work = Box<dyn FnOnce(&Path) + Send>;

/// Loads and attaches the programs off the runtime's threads; clones share the thread, which ends with the last.
///
/// Loading parses the kernel's own BTF: some 10 MB of small allocations and tens of milliseconds. On the threads of a
/// pool every one of them would grow an arena of that size and keep it (malloc(3), `M_ARENA_MAX`), so that each
/// reconnect would make the daemon larger; one thread uses the same memory again.
#[derive(Clone)]
pub struct Loader {
    works: mpsc::Sender<Work>,
}

impl Loader {
    /// `pin_dir` is `BPF_DIRECTORY`.
    pub fn new(pin_dir: PathBuf) -> Self {
        let (works, mut to_do) = mpsc::channel::<Work>(4);
        let spawned = thread::Builder::new().name("ebpf".to_owned()).spawn(move || {
            while let Some(work) = to_do.blocking_recv() {
                work(&pin_dir);
            }
        });
        if let Err(error) = spawned {
            tracing::warn!("starting the thread that attaches eBPF programs: {error}");
        }
        Self { works }
    }

    /// As [`Counters::attach`].
    pub async fn attach(&self, interface: &str) -> Result<Counters, Error> {
        let interface = interface.to_owned();
        self.run(move |pin_dir| Counters::attach(&interface, pin_dir)).await?
    }

    /// Does something on the thread; it is given the folder of pins.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Path) -> T + Send + 'static,
    ) -> Result<T, Error> {
        let (answer, answered) = oneshot::channel();
        let work: Work = Box::new(move |pin_dir| {
            if answer.send(work(pin_dir)).is_err() {
                tracing::debug!("nobody waits for what the eBPF thread did any more");
            }
        });
        if self.works.send(work).await.is_err() {
            return Err(Error::NoThread);
        }
        answered.await.map_err(|_gone| Error::NoThread)
    }
}
