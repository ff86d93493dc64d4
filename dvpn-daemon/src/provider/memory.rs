//! What a provider remembers over restarts, and how often it is written.

use std::{sync::Arc, time::Duration};

use dvpn_common::keys::VerifyingKey;
use dvpn_core::node::Usage;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use super::Change;

/// No more often than this is the volume written.
const PAUSE: Duration = Duration::from_millis(300);
/// The pool waits two seconds for an acknowledgement.
const PATIENCE: Duration = Duration::from_secs(1);

/// Where a provider's memory is kept. Failures are the keeper's to log: a provider goes on without.
pub trait Memory: Send + Sync {
    /// The pool's key was learned, or followed to a new one.
    fn pool_key(&self, key: VerifyingKey);
    /// [`super::Serials::take_change`]: says whether it is kept now, over a loss of power too. May block for as long as a
    /// disk takes.
    fn serials(&self, change: &Change) -> bool;
    /// Volume of the month. May block for as long as a disk takes.
    fn usage(&self, usage: Usage);
}

/// A change of serials, and who waits until it is kept.
type Order = (Change, oneshot::Sender<bool>);

/// Writes off the threads that move packets: serials one after the other, while somebody waits for it; of the volume the
/// newest, a few times a second at most.
pub(super) struct Keeper {
    usage: watch::Sender<Option<Usage>>,
    serials: mpsc::Sender<Order>,
    end: CancellationToken,
    tasks: [AbortOnDropHandle<()>; 2],
}

impl Keeper {
    pub(super) fn spawn(memory: Arc<dyn Memory>) -> Self {
        let (usage, usage_seen) = watch::channel(None);
        let (serials, orders) = mpsc::channel(1);
        let end = CancellationToken::new();
        let tasks = [
            AbortOnDropHandle::new(tokio::spawn(keep_usage(Arc::clone(&memory), usage_seen, end.clone()))),
            AbortOnDropHandle::new(tokio::spawn(keep_serials(memory, orders))),
        ];
        Self {
            usage,
            serials,
            end,
            tasks,
        }
    }

    /// Waits until the change is kept, but not for ever: peers whose time is over must go, also while a disk hangs. False
    /// if it is not kept, or if nobody knows.
    pub(super) async fn serials(&self, change: Change) -> bool {
        let (done, kept) = oneshot::channel();
        let keeping = async {
            self.serials.send((change, done)).await.ok()?;
            kept.await.ok()
        };
        let kept = tokio::time::timeout(PATIENCE, keeping).await;
        kept.unwrap_or_else(|_elapsed| {
            tracing::error!("keeping serials takes longer than {PATIENCE:?}: see what keeps the disk busy");
            None
        })
        .unwrap_or(false)
    }

    pub(super) fn usage(&self, usage: Usage) {
        self.usage.send_replace(Some(usage));
    }

    /// Writes what is left.
    pub(super) async fn finish(self) {
        self.end.cancel();
        drop(self.serials);
        for task in self.tasks {
            // A write that fails was logged; a task that died wrote nothing more.
            task.await.ok();
        }
    }
}

async fn keep_serials(memory: Arc<dyn Memory>, mut orders: mpsc::Receiver<Order>) {
    while let Some((change, done)) = orders.recv().await {
        let memory = Arc::clone(&memory);
        let kept = tokio::task::spawn_blocking(move || memory.serials(&change)).await;
        let kept = kept.unwrap_or_else(|error| {
            tracing::error!("keeping serials: {error}");
            false
        });
        if done.send(kept).is_err() {
            tracing::debug!("nobody waited until the serials were kept");
        }
    }
}

async fn keep_usage(memory: Arc<dyn Memory>, mut newest: watch::Receiver<Option<Usage>>, end: CancellationToken) {
    let mut written = None;
    loop {
        let ending = tokio::select! {
            changed = newest.changed() => changed.is_err(),
            () = end.cancelled() => true,
        };
        let now = *newest.borrow_and_update();
        if let Some(usage) = now.filter(|_| now != written) {
            let memory = Arc::clone(&memory);
            if let Err(error) = tokio::task::spawn_blocking(move || memory.usage(usage)).await {
                tracing::error!("keeping the month's volume: {error}");
            }
        }
        written = now;
        if ending {
            return;
        }
        tokio::select! {
            () = tokio::time::sleep(PAUSE) => {}
            () = end.cancelled() => {}
        }
    }
}
