//! /etc/resolv.conf as a file: looked at without following it, replaced whole, written in place only where it is mounted.

use std::{
    fs::{self, File, OpenOptions, Permissions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _, fchown, symlink},
    path::{Component, Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::Error;

/// Largest file that is taken for a resolv.conf.
const MAX_BYTES: u64 = 1 << 20;
/// Permission bits, and those for a file that everybody reads.
const MODE_MASK: u32 = 0o7777;
const WORLD_READABLE: u32 = 0o644;

/// What is at a path, the path itself not followed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Found {
    /// Nothing.
    Absent,
    /// A symbolic link with this text.
    Link(PathBuf),
    /// A regular file.
    File(Contents),
}

/// A regular file, as far as it can be put back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Contents {
    #[serde(with = "super::record::readable")]
    pub(super) bytes: Vec<u8>,
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
}

impl Contents {
    /// A file of ours that everybody may read.
    pub(super) fn public(text: &str) -> Self {
        Self::of(text, WORLD_READABLE)
    }

    /// A file of ours.
    pub(super) fn of(text: &str, mode: u32) -> Self {
        Self {
            bytes: text.as_bytes().to_vec(),
            mode,
            uid: nix::unistd::geteuid().as_raw(),
            gid: nix::unistd::getegid().as_raw(),
        }
    }
}

impl Found {
    /// What is in it; empty for what is no file.
    pub(super) fn text(&self) -> String {
        match self {
            Self::File(contents) => String::from_utf8_lossy(&contents.bytes).into_owned(),
            Self::Absent | Self::Link(_) => String::new(),
        }
    }

    /// What a program reads that opens it at `path`: a link's target is followed, an unreadable one is empty.
    pub(super) fn text_behind(&self, path: &Path) -> String {
        match self {
            Self::File(_) | Self::Absent => self.text(),
            Self::Link(link) => read(&follow(path, link), true)
                .ok()
                .flatten()
                .map(|contents| String::from_utf8_lossy(&contents.bytes).into_owned())
                .unwrap_or_default(),
        }
    }

    /// Where it leads if it is a link.
    pub(super) fn target(&self, path: &Path) -> Option<PathBuf> {
        match self {
            Self::Link(link) => Some(follow(path, link)),
            Self::Absent | Self::File(_) => None,
        }
    }
}

/// The end of a link at `path`; where that does not exist, as far as the link's text goes.
fn follow(path: &Path, link: &Path) -> PathBuf {
    let joined = path.parent().unwrap_or(Path::new("/")).join(link);
    if let Ok(end) = fs::canonicalize(&joined) {
        return end;
    }
    let mut plain = PathBuf::new();
    for component in joined.components() {
        match component {
            Component::ParentDir => {
                plain.pop();
            }
            Component::CurDir => {}
            Component::Prefix(_) | Component::RootDir | Component::Normal(_) => plain.push(component),
        }
    }
    plain
}

/// Looks, and reads a regular file whole.
pub(super) fn look(path: &Path) -> Result<Found, Error> {
    let failed = |source| Error::Read {
        path: path.to_owned(),
        source,
    };
    let kind = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata.file_type(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Found::Absent),
        Err(source) => return Err(failed(source)),
    };
    if kind.is_symlink() {
        return fs::read_link(path).map(Found::Link).map_err(failed);
    }
    match read(path, false).map_err(failed)? {
        Some(contents) => Ok(Found::File(contents)),
        None => Err(Error::NotAFile { path: path.to_owned() }),
    }
}

/// Nothing if it is no regular file of a reasonable size.
fn read(path: &Path, follow: bool) -> io::Result<Option<Contents>> {
    // Never waits for the other end of a pipe.
    let flags = libc::O_NONBLOCK | if follow { 0 } else { libc::O_NOFOLLOW };
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Ok(None);
    }
    let mut bytes = Vec::new();
    if file.take(MAX_BYTES + 1).read_to_end(&mut bytes)? as u64 > MAX_BYTES {
        return Ok(None);
    }
    Ok(Some(Contents {
        bytes,
        mode: metadata.mode() & MODE_MASK,
        uid: metadata.uid(),
        gid: metadata.gid(),
    }))
}

/// Makes what is at `path` this, in one step: a reader sees the old or the new. Links are replaced, not followed.
///
/// A file that is mounted there (as in containers), or whose directory cannot be written, is written in place. A kill in
/// the middle of that leaves line ends behind its text, which [`is_whole`] knows.
pub(super) fn put(path: &Path, wanted: &Found) -> Result<(), Error> {
    let temporary = temporary(path);
    let placed = place(&temporary, path, wanted).or_else(|error| {
        drop(fs::remove_file(&temporary));
        let in_place = matches!(
            error.raw_os_error(),
            Some(libc::EBUSY | libc::EROFS | libc::EACCES | libc::EXDEV)
        );
        match wanted {
            Found::File(contents) if in_place => write_in_place(path, contents).map_err(|second| {
                // Why there is no other way than this one, unless the way itself says more.
                if second.kind() == io::ErrorKind::NotFound {
                    error
                } else {
                    second
                }
            }),
            Found::Absent | Found::Link(_) | Found::File(_) => Err(error),
        }
    });
    placed.map_err(|source| {
        let path = path.to_owned();
        if source.raw_os_error() == Some(libc::EPERM) {
            Error::Immutable { path, source }
        } else {
            Error::Write { path, source }
        }
    })
}

/// Beside the file, for names are only exchanged within a directory. The state directory's start sweeps this ending away.
fn temporary(path: &Path) -> PathBuf {
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(".dvpn.new");
    path.with_file_name(name)
}

fn place(temporary: &Path, path: &Path, wanted: &Found) -> io::Result<()> {
    // Left by a kill.
    gone(fs::remove_file(temporary))?;
    match wanted {
        Found::Absent => gone(fs::remove_file(path))?,
        Found::Link(target) => {
            symlink(target, temporary)?;
            fs::rename(temporary, path)?;
        }
        Found::File(contents) => {
            let mut options = OpenOptions::new();
            // Whoever made it meanwhile, it is not opened.
            let mut file = options.write(true).create_new(true).mode(0o600).open(temporary)?;
            file.write_all(&contents.bytes)?;
            own(&file, contents)?;
            file.sync_all()?;
            fs::rename(temporary, path)?;
        }
    }
    // The new name is on the disk only once its directory is.
    match path.parent() {
        Some(directory) => File::open(directory)?.sync_all(),
        None => Ok(()),
    }
}

fn own(file: &File, contents: &Contents) -> io::Result<()> {
    let metadata = file.metadata()?;
    if (metadata.uid(), metadata.gid()) != (contents.uid, contents.gid) {
        fchown(file, Some(contents.uid), Some(contents.gid))?;
    }
    if metadata.mode() & MODE_MASK != contents.mode {
        file.set_permissions(Permissions::from_mode(contents.mode))?;
    }
    Ok(())
}

fn write_in_place(path: &Path, contents: &Contents) -> io::Result<()> {
    let mut options = OpenOptions::new();
    let options = options.write(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    let mut file = options.open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // One write that covers all that was there; nothing of it is ever read together with the new.
    let mut bytes = contents.bytes.clone();
    let length = usize::try_from(metadata.len()).unwrap_or(usize::MAX).min(1 << 21);
    bytes.resize(bytes.len().max(length), b'\n');
    file.write_all(&bytes)?;
    file.set_len(contents.bytes.len() as u64)?;
    // Owner and mode stay: it is the same file for whoever mounted it.
    file.sync_all()
}

/// Whether these are the bytes of `contents`, or those with the line ends that an interrupted writing left behind them.
pub(super) fn is_whole(bytes: &[u8], contents: &[u8]) -> bool {
    bytes
        .strip_prefix(contents)
        .is_some_and(|rest| rest.iter().all(|byte| *byte == b'\n'))
}

fn gone(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Removes a file; one that is not there is no error.
pub(super) fn remove(path: &Path) -> Result<(), Error> {
    gone(fs::remove_file(path)).map_err(|source| Error::Write {
        path: path.to_owned(),
        source,
    })
}
