//! What was changed and what was there before: on the disk before anything is changed, gone when all is put back.

use std::{
    io,
    net::IpAddr,
    path::{Path, PathBuf},
};

use dvpn_core::dns::is_marked;
use serde::{Deserialize, Serialize};

use super::{
    Error,
    file::{self, Contents, Found},
};

const NAME: &str = "dns.json";
const VERSION: u32 = 1;
/// Versions of our file that somebody changed, kept at most.
const MAX_EDITED: u32 = 99;

/// The whole of it. Each part that is there is still to be undone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    version: u32,
    /// The tunnel's interface.
    pub(super) interface: String,
    /// Its index when systemd-resolved was told.
    pub(super) index: u32,
    /// The tunnel's name servers.
    pub(super) servers: Vec<IpAddr>,
    /// systemd-resolved was told about the interface.
    #[serde(default)]
    pub(super) resolved: bool,
    /// `NetworkManager` has a global configuration of ours.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) network_manager: Option<Managed>,
    /// What was at /etc/resolv.conf.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) file: Option<Replaced>,
}

/// The property as it is on the wire (D-Bus type `a{sv}`, little endian): whatever is in it comes back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Global(#[serde(with = "readable")] pub(super) Vec<u8>);

/// A configuration of ours is in the place of another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Managed {
    pub(super) before: Global,
    /// The servers that it may have: the newest last, and those before it until they have been replaced.
    pub(super) ours: Vec<Vec<IpAddr>>,
}

/// A file of ours is in the place of another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Replaced {
    /// Nothing when a file of ours was met whose record is lost.
    pub(super) before: Option<Found>,
    /// The texts that may be there: the newest last, and the one before it until that has been replaced.
    pub(super) ours: Vec<String>,
}

/// Whose a file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Owner {
    /// Ours as we wrote it.
    Ours,
    /// Ours, and somebody changed it.
    Edited,
    /// Somebody else's, or none.
    Theirs,
}

impl Record {
    pub(super) fn new() -> Self {
        Self {
            version: VERSION,
            interface: String::new(),
            index: 0,
            servers: Vec::new(),
            resolved: false,
            network_manager: None,
            file: None,
        }
    }

    fn is_empty(&self) -> bool {
        !self.resolved && self.network_manager.is_none() && self.file.is_none()
    }

    /// Whose the file is that was found at /etc/resolv.conf.
    pub(super) fn owner_of(&self, found: &Found) -> Owner {
        let Found::File(contents) = found else {
            return Owner::Theirs;
        };
        let ours = self.file.iter().flat_map(|replaced| &replaced.ours);
        if ours
            .into_iter()
            .any(|text| file::is_whole(&contents.bytes, text.as_bytes()))
        {
            Owner::Ours
        } else if is_marked(&found.text()) {
            Owner::Edited
        } else {
            Owner::Theirs
        }
    }
}

/// Where the record is.
#[derive(Debug, Clone)]
pub(super) struct Store {
    directory: PathBuf,
}

impl Store {
    pub(super) fn new(directory: &Path) -> Self {
        Self {
            directory: directory.to_owned(),
        }
    }

    fn path(&self) -> PathBuf {
        self.directory.join(NAME)
    }

    /// Nothing if nothing is to be undone. A record that does not read is an error: what it knew is in it.
    pub(super) fn load(&self) -> Result<Option<Record>, Error> {
        let path = self.path();
        let found = match file::look(&path) {
            // A state directory that is not there has no record.
            Err(Error::Read { source, .. }) if source.kind() == io::ErrorKind::NotADirectory => Found::Absent,
            other => other?,
        };
        match found {
            Found::Absent => Ok(None),
            Found::File(contents) => match serde_json::from_slice::<Record>(&contents.bytes) {
                Ok(record) if record.version == VERSION => Ok(Some(record)),
                Ok(_) => Err(Error::Damaged { path, source: None }),
                Err(source) => Err(Error::Damaged {
                    path,
                    source: Some(source),
                }),
            },
            Found::Link(_) => Err(Error::NotAFile { path }),
        }
    }

    /// Whether anything may be to be undone.
    pub(super) fn exists(&self) -> bool {
        self.path().exists()
    }

    /// Makes the record on the disk this one, which removes an empty one.
    pub(super) fn save(&self, record: &Record) -> Result<(), Error> {
        let path = self.path();
        if record.is_empty() {
            return file::remove(&path);
        }
        let text = serde_json::to_string_pretty(record).map_err(|source| Error::Damaged {
            path: path.clone(),
            source: Some(source),
        })?;
        let wanted = Found::File(Contents::of(&text, 0o600));
        if file::look(&path)? == wanted {
            return Ok(());
        }
        file::put(&path, &wanted)
    }

    /// Keeps a version that somebody made of our file, and says where.
    pub(super) fn keep_edited(&self, edited: &Found) -> Result<PathBuf, Error> {
        let name = |number| self.directory.join(format!("resolv.conf.edited-{number}"));
        let free = (1..MAX_EDITED).map(name).find(|path| !path.exists());
        let path = free.unwrap_or_else(|| name(MAX_EDITED));
        file::put(&path, edited)?;
        Ok(path)
    }
}

/// Bytes in JSON: as text where they are text, so that a person can read the record.
pub(super) mod readable {
    use base64::{Engine as _, engine::general_purpose::STANDARD};
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

    #[derive(Serialize, Deserialize)]
    #[serde(rename_all = "snake_case")]
    enum Form {
        Text(String),
        Base64(String),
    }

    pub(in super::super) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        let form = match std::str::from_utf8(bytes) {
            Ok(text) => Form::Text(text.to_owned()),
            Err(_) => Form::Base64(STANDARD.encode(bytes)),
        };
        form.serialize(serializer)
    }

    pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        match Form::deserialize(deserializer)? {
            Form::Text(text) => Ok(text.into_bytes()),
            Form::Base64(text) => STANDARD.decode(text).map_err(D::Error::custom),
        }
    }
}
