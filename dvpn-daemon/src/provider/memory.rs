//! What a provider remembers over restarts, and how often it is written.

use std::{sync::Arc, time::Duration};

use dvpn_common::keys::VerifyingKey;
use dvpn_core::node::Usage;
use tokio::sync::watch;
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

/// No more often than this is anything written.
const PAUSE: Duration = Duration::from_millis(300);

/// Where a provider's memory is kept. Failures are the keeper's to log: a provider goes on without.
pub trait Memory: Send + Sync {
    /// The pool's key was learned, or followed to a new one.
    fn pool_key(&self, key: VerifyingKey);
    /// [`super::Serials::encode`]. May block for as long as a disk takes.
    fn serials(&self, record: &[u8]);
    /// Volume of the month. May block for as long as a disk takes.
    fn usage(&self, usage: Usage);
}

/// The newest of each; older ones that were not written yet are nobody's loss.
#[derive(Clone, Default)]
struct Newest {
    serials: Option<Arc<[u8]>>,
    usage: Option<Usage>,
}

/// Writes off the threads that move packets, the newest state a few times a second at most.
pub(super) struct Keeper {
    newest: watch::Sender<Newest>,
    end: CancellationToken,
    task: AbortOnDropHandle<()>,
}

impl Keeper {
    pub(super) fn spawn(memory: Arc<dyn Memory>) -> Self {
        let (newest, seen) = watch::channel(Newest::default());
        let end = CancellationToken::new();
        let task = AbortOnDropHandle::new(tokio::spawn(keep(memory, seen, end.clone())));
        Self { newest, end, task }
    }

    pub(super) fn serials(&self, record: Vec<u8>) {
        self.newest.send_modify(|newest| newest.serials = Some(record.into()));
    }

    pub(super) fn usage(&self, usage: Usage) {
        self.newest.send_modify(|newest| newest.usage = Some(usage));
    }

    /// Writes what is left.
    pub(super) async fn finish(self) {
        self.end.cancel();
        // A write that fails was logged; a task that died wrote nothing more.
        self.task.await.ok();
    }
}

async fn keep(memory: Arc<dyn Memory>, mut newest: watch::Receiver<Newest>, end: CancellationToken) {
    let mut written = Newest::default();
    loop {
        let ending = tokio::select! {
            changed = newest.changed() => changed.is_err(),
            () = end.cancelled() => true,
        };
        let now = newest.borrow_and_update().clone();
        let serials = now.serials.clone().filter(|new| Some(new) != written.serials.as_ref());
        let usage = now.usage.filter(|new| Some(*new) != written.usage);
        written = now;
        let memory = Arc::clone(&memory);
        let done = tokio::task::spawn_blocking(move || {
            if let Some(serials) = serials {
                memory.serials(&serials);
            }
            if let Some(usage) = usage {
                memory.usage(usage);
            }
        });
        if let Err(error) = done.await {
            tracing::error!("keeping what a provider remembers: {error}");
        }
        if ending {
            return;
        }
        tokio::select! {
            () = tokio::time::sleep(PAUSE) => {}
            () = end.cancelled() => {}
        }
    }
}
