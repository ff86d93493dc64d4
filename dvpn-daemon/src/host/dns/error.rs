//! What can go wrong with the machine's name resolution, and what to do about it.

use std::{io, path::PathBuf};

/// What could not be done to the machine's name resolution.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is nothing to point programs to.
    #[error("the tunnel has no name server: set TUNNEL_DNS")]
    NoServer,
    /// The system bus is not there.
    #[error("reaching the system bus: is dbus running?")]
    Bus(#[source] Box<zbus::Error>),
    /// A service refused.
    #[error("asking {service} for {what}: see its log (journalctl)")]
    Call {
        /// Its name on the bus.
        service: &'static str,
        /// Method or property.
        what: String,
        /// What it said.
        #[source]
        source: Box<zbus::Error>,
    },
    /// A service did not answer.
    #[error("{service} did not answer {what}: restart it")]
    Silent {
        /// Its name on the bus.
        service: &'static str,
        /// Method or property.
        what: String,
    },
    /// `NetworkManager` took the servers and the file did not change.
    #[error("NetworkManager took the tunnel's name servers, and {path} does not name them: see its log")]
    NotWritten {
        /// The file.
        path: PathBuf,
    },
    /// The tunnel's servers are still in a configuration that only `NetworkManager` can change.
    #[error(
        "the tunnel's name servers are still in NetworkManager's configuration, and it is not running: start it, then run \
         dvpn-daemon --cleanup"
    )]
    ManagerAway,
    /// A file could not be read.
    #[error("reading {path}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file could not be written. It is as it was.
    #[error("writing {path}: give the daemon write access to its directory")]
    Write {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Even root may not change the file. It is as it was.
    #[error("changing {path} is forbidden: if lsattr shows it as immutable, run chattr -i {path}")]
    Immutable {
        /// Which.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Neither a file of at most 1 MiB, nor a link. It was left alone.
    #[error("{path} is neither a file of ordinary size nor a link, and was left alone: make it a file")]
    NotAFile {
        /// Which.
        path: PathBuf,
    },
    /// The record of what to put back does not read. Nothing was changed.
    #[error("{path} does not read: see in it what is to be put back, do that, and remove it")]
    Damaged {
        /// Which.
        path: PathBuf,
        /// Why; nothing when a newer version wrote it.
        #[source]
        source: Option<serde_json::Error>,
    },
    /// Our file is there, and nobody knows what was there before.
    #[error(
        "{path} has the tunnel's name servers, and the record of what was there before is lost: write your own into it"
    )]
    Lost {
        /// Which.
        path: PathBuf,
    },
    /// Changes are not seen.
    #[error("watching {path}: raise fs.inotify.max_user_instances and max_user_watches")]
    Watch {
        /// Which.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}
