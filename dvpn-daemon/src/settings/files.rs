//! Reading configuration and secret files.

use std::{
    fs::{self, File},
    io::{self, Read as _},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use dvpn_core::config::{Errors, SETTINGS, Secret, Source, secret_files};
use zeroize::Zeroizing;

use super::Error;

const MAX_FILE_BYTES: u64 = 64 * 1024;

/// `file` and `conf.d/*.toml` beside it, strongest first: of the parts, the last by name wins.
pub(super) fn configuration(file: &Path, must_exist: bool) -> Result<Vec<Source>, Error> {
    let mut paths = vec![];
    match fs::metadata(file) {
        Ok(_) => paths.push(file.to_owned()),
        Err(error) if error.kind() == io::ErrorKind::NotFound && !must_exist => {}
        Err(source) => {
            return Err(Error::Read {
                path: file.to_owned(),
                source,
            });
        }
    }
    let directory = file.parent().unwrap_or(Path::new(".")).join("conf.d");
    paths.extend(parts(&directory).map_err(|source| Error::Read {
        path: directory,
        source,
    })?);

    let (mut sources, mut values, mut errors) = (Vec::new(), Vec::new(), Vec::new());
    for path in paths {
        match text(&path, false) {
            Ok(text) => match Source::toml(&path.display().to_string(), &text) {
                Ok(source) => sources.insert(0, source),
                Err(wrong) => values.extend(wrong),
            },
            Err(error) => errors.push(error),
        }
    }
    if !values.is_empty() {
        errors.push(Error::Values(Errors(values)));
    }
    if errors.is_empty() {
        Ok(sources)
    } else {
        Err(Error::Many(errors))
    }
}

fn parts(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut paths = entries
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<io::Result<Vec<_>>>()?;
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "toml"));
    paths.sort();
    Ok(paths)
}

/// The secrets that stand in files: systemd's credentials first, then what `NAME_FILE` names.
pub(super) fn secrets(credentials: Option<&Path>, sources: &[Source]) -> Result<Vec<Source>, Error> {
    let (mut found, mut errors) = (Vec::new(), Vec::new());
    let named = secret_files(sources);
    for setting in SETTINGS.iter().filter(|setting| setting.secret) {
        let credential = credentials
            .map(|directory| directory.join(setting.name))
            .filter(|path| path.exists());
        let file = || {
            named
                .iter()
                .find(|(of, ..)| of.name == setting.name)
                .map(|(_, path, _)| path.clone())
        };
        let Some(path) = credential.or_else(file) else { continue };
        match text(&path, true) {
            Ok(text) => {
                let mut source = Source::new(path.display().to_string());
                source.insert(setting.name, Secret::new(text.as_str()));
                found.push(source);
            }
            Err(error) => errors.push(error),
        }
    }
    match errors.pop() {
        None => Ok(found),
        Some(only) if errors.is_empty() => Err(only),
        Some(last) => {
            errors.push(last);
            Err(Error::Many(errors))
        }
    }
}

fn text(path: &Path, is_secret: bool) -> Result<Zeroizing<String>, Error> {
    let failed = |source| Error::Read {
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(failed)?;
    // Of the opened file, not of the path: it cannot be exchanged in between.
    let mode = file.metadata().map_err(failed)?.permissions().mode() & 0o777;
    if is_secret && mode & 0o007 != 0 {
        return Err(Error::Exposed {
            path: path.to_owned(),
            mode,
        });
    }
    // The room is made at once, so that growing leaves no copies behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(4096));
    let length = file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(failed)?;
    let not_text = || Error::NotText { path: path.to_owned() };
    if length as u64 > MAX_FILE_BYTES {
        return Err(not_text());
    }
    let text = std::str::from_utf8(&bytes).ok().ok_or_else(not_text)?;
    Ok(Zeroizing::new(text.to_owned()))
}
