//! The program itself: opened so that what is checked is what runs.
//!
//! Every directory from the root down is opened without following links and checked through its descriptor. The
//! program is then started with the last of them as its working directory, entered through that descriptor: the path
//! is walked once, nothing of ours is inherited, and an interpreter opens the same file. Inside that directory only
//! root could put another file in its place.

use std::{
    ffi::{OsStr, OsString},
    os::fd::{AsFd, AsRawFd as _, OwnedFd},
    path::{Component, Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, open, openat},
    sys::stat::{FileStat, Mode, SFlag, fstat},
    unistd::geteuid,
};

/// Why a program is not run.
#[derive(Debug, thiserror::Error)]
pub enum Untrusted {
    /// A path that depends on who walks it.
    #[error("FALLBACK_SCRIPT_PATH {} must be absolute and without `..`", path.display())]
    NotAbsolute {
        /// Which.
        path: PathBuf,
    },
    /// It cannot be opened.
    #[error(
        "FALLBACK_SCRIPT_PATH: {} does not open (a symbolic link is not followed): give the real path of a script",
        path.display()
    )]
    Open {
        /// What did not open.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: Errno,
    },
    /// Not root's.
    #[error(
        "FALLBACK_SCRIPT_PATH: {} belongs to user {owner}, who could change what is run: chown it to root, also if that is \
         the daemon's own user",
        path.display()
    )]
    Owner {
        /// What.
        path: PathBuf,
        /// Whose.
        owner: u32,
    },
    /// Others may write to it.
    #[error(
        "FALLBACK_SCRIPT_PATH: {} has mode {mode:04o}, others could change what is run: chmod go-w it",
        path.display()
    )]
    Writable {
        /// What.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// No program.
    #[error("FALLBACK_SCRIPT_PATH: {} is no executable file: chmod 755 it", path.display())]
    NotExecutable {
        /// Which.
        path: PathBuf,
    },
}

/// A program that only root could have written: not we ourselves, for then whoever breaks into this process could leave
/// something behind that it starts again.
#[derive(Debug)]
pub struct Script {
    directory: OwnedFd,
    name: OsString,
}

impl Script {
    /// Opens and checks `path` and every directory above it.
    pub fn open(path: &Path) -> Result<Self, Untrusted> {
        Self::open_as(path, geteuid().is_root())
    }

    /// As root, or not.
    pub(super) fn open_as(path: &Path, root: bool) -> Result<Self, Untrusted> {
        let not_absolute = || Untrusted::NotAbsolute { path: path.to_owned() };
        let name = path.file_name().ok_or_else(not_absolute)?.to_owned();
        let mut components = path.parent().ok_or_else(not_absolute)?.components();
        if components.next() != Some(Component::RootDir) {
            return Err(not_absolute());
        }
        let mut walked = PathBuf::from("/");
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let mut directory = open("/", flags, Mode::empty()).map_err(failed(&walked))?;
        check_directory(&status(&directory, &walked)?, &walked, root)?;
        for component in components {
            let Component::Normal(part) = component else {
                return Err(not_absolute());
            };
            walked.push(part);
            directory = openat(&directory, part, flags, Mode::empty()).map_err(failed(&walked))?;
            check_directory(&status(&directory, &walked)?, &walked, root)?;
        }
        // A pipe must not be waited for before it is seen to be one.
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let file = openat(&directory, name.as_os_str(), flags, Mode::empty()).map_err(failed(path))?;
        let seen = status(&file, path)?;
        check_owner(&seen, path)?;
        let mode = seen.st_mode & 0o7777;
        if mode & 0o022 != 0 {
            return Err(Untrusted::Writable {
                path: path.to_owned(),
                mode,
            });
        }
        if SFlag::from_bits_truncate(seen.st_mode) & SFlag::S_IFMT != SFlag::S_IFREG || mode & 0o111 == 0 {
            return Err(Untrusted::NotExecutable { path: path.to_owned() });
        }
        Ok(Self { directory, name })
    }

    /// The working directory to start it in: the checked one, whatever its path leads to by now.
    pub(super) fn directory(&self) -> PathBuf {
        // The child has its own copy of the descriptor until it executes the program.
        PathBuf::from(format!("/proc/self/fd/{}", self.directory.as_raw_fd()))
    }

    /// What to start there.
    pub(super) fn program(&self) -> PathBuf {
        Path::new(".").join(&self.name)
    }

    /// Its name, for messages.
    pub(super) fn name(&self) -> &OsStr {
        &self.name
    }
}

fn failed(path: &Path) -> impl FnOnce(Errno) -> Untrusted {
    let path = path.to_owned();
    move |source| Untrusted::Open { path, source }
}

fn status(descriptor: &impl AsFd, path: &Path) -> Result<FileStat, Untrusted> {
    fstat(descriptor).map_err(failed(path))
}

fn check_owner(seen: &FileStat, path: &Path) -> Result<(), Untrusted> {
    if seen.st_uid == 0 {
        Ok(())
    } else {
        Err(Untrusted::Owner {
            path: path.to_owned(),
            owner: seen.st_uid,
        })
    }
}

/// In a sticky directory, like /tmp, others can add entries and cannot touch root's. That is good enough for root alone:
/// a daemon that is not root has no reason to start anything from such a place.
fn check_directory(seen: &FileStat, path: &Path, root: bool) -> Result<(), Untrusted> {
    check_owner(seen, path)?;
    let mode = seen.st_mode & 0o7777;
    let sticky = mode & 0o1000 != 0;
    if mode & 0o022 != 0 && !(sticky && root) {
        return Err(Untrusted::Writable {
            path: path.to_owned(),
            mode,
        });
    }
    Ok(())
}
