//! When what was set has to be set again: a service was restarted, or somebody wrote the file.

use std::{
    io,
    os::fd::OwnedFd,
    path::Path,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use futures::{Stream, StreamExt as _, stream};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use tokio::{
    io::unix::AsyncFd,
    sync::{Notify, mpsc},
    time::{Instant, sleep, timeout_at},
};
use tokio_util::task::AbortOnDropHandle;
use zbus::{Connection, MatchRule, MessageStream, fdo::NameOwnerChanged, message::Type};

use super::{Dns, Error, bus, file, network_manager, resolved};

/// A change is looked at when nothing more happened for this long: programs look names up meanwhile.
const QUIET: Duration = Duration::from_millis(50);
/// Under changes without end it is looked at this often.
const AT_MOST: Duration = Duration::from_millis(500);
/// After a report. Whoever fights us for the file does not make us busy.
const PAUSE: Duration = Duration::from_millis(250);
/// How long a bus is waited for that is not there.
const BUS_INTERVAL: Duration = Duration::from_secs(1);
const MAX_BUS_INTERVAL: Duration = Duration::from_mins(1);

/// Yields when [`Dns::set`] is to be called again, or [`Dns::undo`] if that is what was last called and failed. Bursts
/// come as one. Ends never.
pub struct Changes {
    reports: mpsc::Receiver<()>,
    _tasks: [AbortOnDropHandle<()>; 3],
}

impl Stream for Changes {
    type Item = ();

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<()>> {
        self.reports.poll_recv(context)
    }
}

/// What the watchers saw and the judge has not looked at.
#[derive(Default)]
struct Seen {
    restarted: AtomicBool,
    anything: Notify,
}

impl Dns {
    /// Watches from now on. Needs a tokio runtime.
    pub fn changes(&self) -> Result<Changes, Error> {
        let seen = Arc::new(Seen::default());
        let path = self.resolv_conf().to_owned();
        let inotify = open().map_err(|source| Error::Watch {
            path: path.clone(),
            source,
        })?;
        watch(&inotify, &path)?;
        let (report, reports) = mpsc::channel(1);
        let files = {
            let seen = Arc::clone(&seen);
            tokio::spawn(async move { watch_files(&inotify, &path, &seen).await })
        };
        let services = {
            let seen = Arc::clone(&seen);
            tokio::spawn(async move { watch_services(&seen).await })
        };
        let judge = tokio::spawn(judge(self.clone(), seen, report));
        Ok(Changes {
            reports,
            _tasks: [files, services, judge].map(AbortOnDropHandle::new),
        })
    }
}

#[expect(
    deprecated,
    reason = "sound for an OwnedFd, which is the same descriptor as long as it lives; what replaces it is unsafe"
)]
fn open() -> io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::new(inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?)
}

async fn judge(dns: Dns, seen: Arc<Seen>, report: mpsc::Sender<()>) {
    loop {
        seen.anything.notified().await;
        let latest = Instant::now() + AT_MOST;
        while timeout_at(latest.min(Instant::now() + QUIET), seen.anything.notified())
            .await
            .is_ok()
        {
            if Instant::now() >= latest {
                break;
            }
        }
        let restarted = seen.restarted.swap(false, Ordering::AcqRel);
        if dns.is_disturbed(restarted).await {
            if report.send(()).await.is_err() {
                return;
            }
            sleep(PAUSE).await;
        }
    }
}

/// The file may be replaced in its folder, written where it is (also from another view of the file system), or be a link
/// to one of which both is true.
fn watch(inotify: &AsyncFd<OwnedFd>, path: &Path) -> Result<(), Error> {
    let folder = WatchFlags::CREATE
        | WatchFlags::MOVED_TO
        | WatchFlags::MOVED_FROM
        | WatchFlags::DELETE
        | WatchFlags::CLOSE_WRITE;
    let itself = WatchFlags::CLOSE_WRITE | WatchFlags::MODIFY | WatchFlags::DELETE_SELF | WatchFlags::MOVE_SELF;
    let target = file::look(path).ok().and_then(|found| found.target(path));
    let folders = [Some(path), target.as_deref()].into_iter().flatten();
    let folders = folders.filter_map(Path::parent).map(|parent| (parent, folder));
    let mut result = Ok(());
    // A watch that is there already stays.
    for (path, flags) in folders.chain([(path, itself)]) {
        match inotify::add_watch(inotify.get_ref(), path, flags) {
            Ok(_) | Err(rustix::io::Errno::NOENT) => {}
            Err(error) => {
                result = Err(Error::Watch {
                    path: path.to_owned(),
                    source: error.into(),
                });
            }
        }
    }
    result
}

async fn watch_files(inotify: &AsyncFd<OwnedFd>, path: &Path, seen: &Seen) {
    loop {
        let Ok(mut ready) = inotify.readable().await else {
            return;
        };
        // What happened is of no interest: it is looked at what is there now.
        let mut events = [0; 4096];
        while nix::unistd::read(inotify.get_ref(), &mut events).is_ok_and(|length| length > 0) {}
        ready.clear_ready();
        if let Err(error) = watch(inotify, path) {
            tracing::warn!("{error}: {}", crate::run::chain(&error));
        }
        seen.anything.notify_one();
    }
}

async fn watch_services(seen: &Seen) {
    let mut interval = BUS_INTERVAL;
    loop {
        if let Ok(connection) = bus::connect().await {
            interval = BUS_INTERVAL;
            if let Err(error) = watch_bus(&connection, seen).await {
                tracing::debug!("watching the system bus: {error}");
            }
        }
        // None here, or it was restarted.
        sleep(interval).await;
        interval = MAX_BUS_INTERVAL.min(interval * 2);
    }
}

async fn watch_bus(connection: &Connection, seen: &Seen) -> zbus::Result<()> {
    let mut streams = Vec::new();
    for service in [resolved::SERVICE, network_manager::SERVICE] {
        let rule = MatchRule::builder()
            .msg_type(Type::Signal)
            .sender("org.freedesktop.DBus")?
            .interface("org.freedesktop.DBus")?
            .member("NameOwnerChanged")?
            .arg(0, service)?
            .build();
        streams.push(MessageStream::for_match_rule(rule, connection, Some(8)).await?);
    }
    for path in [resolved::PATH, network_manager::PATH] {
        let rule = MatchRule::builder()
            .msg_type(Type::Signal)
            .interface("org.freedesktop.DBus.Properties")?
            .member("PropertiesChanged")?
            .path(path)?
            .build();
        streams.push(MessageStream::for_match_rule(rule, connection, Some(8)).await?);
    }
    // Whatever changed before it was watched.
    seen.restarted.store(true, Ordering::Release);
    seen.anything.notify_one();
    let mut messages = stream::select_all(streams);
    while let Some(message) = messages.next().await {
        let message = message?;
        if let Some(change) = NameOwnerChanged::from_message(message) {
            if change.args()?.new_owner().is_none() {
                continue;
            }
            seen.restarted.store(true, Ordering::Release);
        }
        seen.anything.notify_one();
    }
    Ok(())
}
