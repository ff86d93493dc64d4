//! One daemon for one state directory: two would write over each other's records.

use std::{
    fs::{File, OpenOptions, TryLockError},
    io::{self, Read as _, Seek as _, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
};

use super::{Error, files};

const LOCK: &str = "lock";
/// Longer than any process id.
const MAX_ID_BYTES: u64 = 32;

/// The directory is ours while this lives. The kernel gives it back when the process ends, however it ends.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

impl Lock {
    /// Takes the directory, making it if need be.
    pub fn take(directory: &Path) -> Result<Self, Error> {
        files::make(directory)?;
        let path = directory.join(LOCK);
        let failed = |source| Error::Lock {
            path: path.clone(),
            source,
        };
        // Not truncated: what another wrote into it is read if it holds it.
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let mut file = options.open(&path).map_err(failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(Error::Taken {
                    path: directory.to_owned(),
                    holder: holder(file),
                });
            }
            // A file system without locks: better unguarded than never started.
            Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Unsupported => {
                tracing::warn!("{} cannot be locked: see that no second daemon uses it", path.display());
            }
            Err(TryLockError::Error(source)) => return Err(failed(source)),
        }
        let named = file
            .set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| writeln!(file, "{}", std::process::id()));
        if let Err(error) = named {
            // It is only read by people.
            tracing::debug!("writing our process id into {}: {error}", path.display());
        }
        Ok(Self { _file: file })
    }
}

/// Who has it, as it says itself.
fn holder(file: File) -> String {
    let mut text = String::new();
    let read = file.take(MAX_ID_BYTES).read_to_string(&mut text);
    match read.ok().and_then(|_| text.trim().parse::<u32>().ok()) {
        Some(id) => format!("process {id}"),
        None => "another process".to_owned(),
    }
}
