//! Files that are replaced whole or not at all.

use std::{
    fs::{self, DirBuilder, File, OpenOptions, Permissions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use dvpn_core::seal;
use zeroize::Zeroizing;

use super::{Error, random};

/// Largest file read, in bytes; ours are far smaller.
const MAX_FILE_BYTES: u64 = 4 << 20;
const TEMPORARY: &str = ".new";

/// One directory of files.
pub(super) struct Files {
    directory: PathBuf,
    /// Distinguishes the temporary files of threads that write at the same time.
    writes: AtomicU64,
}

/// Makes the directory, and makes it private.
pub(super) fn make(directory: &Path) -> Result<(), Error> {
    let failed = |source| Error::Directory {
        path: directory.to_owned(),
        source,
    };
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .map_err(failed)?;
    if fs::metadata(directory).map_err(failed)?.permissions().mode() & 0o777 != 0o700 {
        fs::set_permissions(directory, Permissions::from_mode(0o700)).map_err(failed)?;
    }
    Ok(())
}

/// The bytes, or nothing if there is no such file.
pub(super) fn read(path: &Path) -> Result<Option<Vec<u8>>, Error> {
    let path = path.to_owned();
    let mut bytes = Vec::new();
    match File::open(&path).and_then(|file| file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes)) {
        Ok(length) if length as u64 > MAX_FILE_BYTES => Err(Error::Damaged { path }),
        Ok(_) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(Error::Read { path, source }),
    }
}

impl Files {
    pub(super) fn open(directory: &Path) -> Result<Self, Error> {
        let failed = |source| Error::Directory {
            path: directory.to_owned(),
            source,
        };
        make(directory)?;
        for entry in fs::read_dir(directory).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            // Left by a crash in the middle of a write: the file it was to replace is whole.
            if entry.file_name().to_string_lossy().ends_with(TEMPORARY) {
                fs::remove_file(entry.path()).map_err(failed)?;
            }
        }
        Ok(Self {
            directory: directory.to_owned(),
            writes: AtomicU64::new(0),
        })
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    pub(super) fn sealed(&self, name: &str, source: seal::Error) -> Error {
        Error::Sealed {
            path: self.path(name),
            source,
        }
    }

    /// The bytes, or nothing if there is no such file.
    pub(super) fn read(&self, name: &str) -> Result<Option<Vec<u8>>, Error> {
        read(&self.path(name))
    }

    /// Replaces the file.
    pub(super) fn write(&self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        self.put(name, bytes, |from, to| fs::rename(from, to))
    }

    /// Adds to the end of a file that is there. A crash may leave any part of it: whoever reads sees that.
    pub(super) fn append(&self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        let path = self.path(name);
        let written = OpenOptions::new().append(true).open(&path).and_then(|mut file| {
            file.write_all(bytes)?;
            file.sync_data()
        });
        written.map_err(|source| Error::Write { path, source })
    }

    /// Makes the file unless it exists; then the existing one stays and that is no error.
    pub(super) fn create(&self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        self.put(name, bytes, |from, to| {
            let linked = match fs::hard_link(from, to) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
                other => other,
            };
            fs::remove_file(from).and(linked)
        })
    }

    fn put(&self, name: &str, bytes: &[u8], place: impl FnOnce(&Path, &Path) -> io::Result<()>) -> Result<(), Error> {
        let path = self.path(name);
        let number = self.writes.fetch_add(1, Ordering::Relaxed);
        let temporary = self
            .directory
            .join(format!("{name}.{}-{number}{TEMPORARY}", std::process::id()));
        let written = (|| {
            let mut file = OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&temporary)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            place(&temporary, &path)?;
            // The new name is on the disk only once its directory is.
            File::open(&self.directory)?.sync_all()
        })();
        written.map_err(|source| {
            // The error that is reported is the first one; the rest is swept at the next start.
            drop(fs::remove_file(&temporary));
            Error::Write { path, source }
        })
    }

    /// Removes the file; one that is not there is no error.
    pub(super) fn remove(&self, name: &str) -> Result<(), Error> {
        let path = self.path(name);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::Write { path, source: error }),
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// Gives the file another name beside its own and says which.
    pub(super) fn keep_aside(&self, name: &str) -> Result<PathBuf, Error> {
        let path = self.path(name);
        let mut number = 1_u32;
        loop {
            let kept = self.path(&format!("{name}.kept-{number}"));
            match fs::hard_link(&path, &kept) {
                Ok(()) => return Ok(kept),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists && number < 1000 => number += 1,
                Err(source) => return Err(Error::Write { path: kept, source }),
            }
        }
    }

    /// The random key file, made at first use.
    pub(super) fn sealing_key(&self, name: &str) -> Result<Zeroizing<[u8; 32]>, Error> {
        if self.read(name)?.is_none() {
            self.create(name, Zeroizing::new(random::<32>()?).as_slice())?;
        }
        let path = self.path(name);
        let mode = match fs::metadata(&path) {
            Ok(metadata) => metadata.permissions().mode() & 0o777,
            Err(source) => return Err(Error::Read { path, source }),
        };
        if mode & 0o077 != 0 {
            return Err(Error::Exposed { path, mode });
        }
        let bytes = Zeroizing::new(self.read(name)?.unwrap_or_default());
        let key: &[u8; 32] = bytes.as_slice().try_into().ok().ok_or(Error::Damaged { path })?;
        Ok(Zeroizing::new(*key))
    }
}
