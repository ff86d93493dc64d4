//! One thread that loads and attaches, for as long as the daemon runs.

use std::{path::PathBuf, thread};

use tokio::sync::{mpsc, oneshot};

use super::{Counters, Error};

struct Order {
    interface: String,
    answer: oneshot::Sender<Result<Counters, Error>>,
}

/// Loads and attaches the programs off the runtime's threads; clones share the thread, which ends with the last.
///
/// Loading parses the kernel's own BTF: some 10 MB of small allocations and tens of milliseconds. On the threads of a
/// pool every one of them would grow an arena of that size and keep it (malloc(3), `M_ARENA_MAX`), so that each
/// reconnect would make the daemon larger; one thread uses the same memory again.
#[derive(Clone)]
pub struct Loader {
    orders: mpsc::Sender<Order>,
}

impl Loader {
    /// `pin_dir` is `BPF_DIRECTORY`.
    pub fn new(pin_dir: PathBuf) -> Self {
        let (orders, mut to_do) = mpsc::channel::<Order>(4);
        let spawned = thread::Builder::new().name("ebpf".to_owned()).spawn(move || {
            while let Some(Order { interface, answer }) = to_do.blocking_recv() {
                let result = Counters::attach(&interface, &pin_dir);
                if answer.send(result).is_err() {
                    tracing::debug!("nobody waits for the programs of {interface} any more");
                }
            }
        });
        if let Err(error) = spawned {
            tracing::warn!("starting the thread that attaches eBPF programs: {error}");
        }
        Self { orders }
    }

    /// As [`Counters::attach`].
    pub async fn attach(&self, interface: &str) -> Result<Counters, Error> {
        let (answer, answered) = oneshot::channel();
        let order = Order {
            interface: interface.to_owned(),
            answer,
        };
        if self.orders.send(order).await.is_err() {
            return Err(Error::NoThread);
        }
        answered.await.unwrap_or(Err(Error::NoThread))
    }
}
