//! A way for the HTTP client, which makes its own sockets, to use ours: it connects to a socket of this process, and what
//! it sends there (TLS, end to end) goes on to one host through a marked connection.

use std::{
    fs::Permissions,
    io,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use rand::{TryRng as _, rngs::SysRng};
use tokio::{
    io::copy_bidirectional,
    net::{UnixListener, UnixStream},
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_util::task::AbortOnDropHandle;
use url::Host as UrlHost;

use super::{ControlPlane, Error};

/// Longest time for a name and a connection together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// One host's. Clones are the same; it lasts as long as the process.
#[derive(Debug, Clone)]
pub struct Relay {
    path: PathBuf,
    failure: Arc<Mutex<Option<Error>>>,
}

impl Relay {
    /// At an address that no file system has and nobody can guess; connections of other processes are closed unheard.
    pub(super) fn start(plane: ControlPlane, host: UrlHost<String>, port: u16) -> io::Result<Self> {
        let mut random = [0_u8; 16];
        SysRng.try_fill_bytes(&mut random).map_err(io::Error::other)?;
        let path = PathBuf::from(format!("\0dvpn-{:032x}", u128::from_ne_bytes(random)));
        let listener = UnixListener::bind(&path)?;
        let relay = Self {
            path,
            failure: Arc::default(),
        };
        tokio::spawn(serve(listener, plane, (host, port), Arc::clone(&relay.failure), by_us));
        Ok(relay)
    }

    /// What the HTTP client connects to.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Why the last connection did not come about, once.
    pub fn take_failure(&self) -> Option<Error> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// A socket in the file system, until dropped.
#[derive(Debug)]
pub struct Door {
    path: PathBuf,
    _serving: AbortOnDropHandle<()>,
}

impl Door {
    /// In a directory that only we can enter.
    pub(super) fn open(path: PathBuf, plane: ControlPlane, host: UrlHost<String>, port: u16) -> io::Result<Self> {
        remove(&path)?;
        let listener = UnixListener::bind(&path)?;
        std::fs::set_permissions(&path, Permissions::from_mode(0o600))?;
        let serving = tokio::spawn(serve(listener, plane, (host, port), Arc::default(), by_our_user));
        Ok(Self {
            path,
            _serving: AbortOnDropHandle::new(serving),
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.path) {
            tracing::debug!("removing {}: {error}", self.path.display());
        }
    }
}

fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

async fn serve(
    listener: UnixListener,
    plane: ControlPlane,
    target: (UrlHost<String>, u16),
    failure: Arc<Mutex<Option<Error>>>,
    admits: fn(&UnixStream) -> bool,
) {
    let mut carried = JoinSet::new();
    loop {
        while carried.try_join_next().is_some() {}
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::debug!("a request of our own is not taken: {error}");
                sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        if !admits(&stream) {
            continue;
        }
        let (plane, target, failure) = (plane.clone(), target.clone(), Arc::clone(&failure));
        carried.spawn(async move {
            if let Err(error) = carry(stream, &plane, &target).await {
                *failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
            }
        });
    }
}

/// To the end of either side. A way that breaks later is the HTTP client's to notice.
async fn carry(mut near: UnixStream, plane: &ControlPlane, (host, port): &(UrlHost<String>, u16)) -> Result<(), Error> {
    let connected = timeout(CONNECT_TIMEOUT, plane.connect(host, *port)).await;
    let mut far = connected.unwrap_or_else(|_| {
        Err(Error::Connect {
            name: host.to_string(),
            source: io::ErrorKind::TimedOut.into(),
        })
    })?;
    if let Err(error) = copy_bidirectional(&mut near, &mut far).await {
        tracing::debug!("a connection of the control plane broke: {error}");
    }
    Ok(())
}

fn by_us(stream: &UnixStream) -> bool {
    let own = i32::try_from(std::process::id()).ok();
    stream
        .peer_cred()
        .is_ok_and(|peer| peer.pid().is_some() && peer.pid() == own)
}

fn by_our_user(stream: &UnixStream) -> bool {
    let own = nix::unistd::geteuid().as_raw();
    stream.peer_cred().is_ok_and(|peer| peer.uid() == own)
}
