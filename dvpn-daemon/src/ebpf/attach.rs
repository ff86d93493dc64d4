//! Programs at their places, and the pins that hold them there.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use aya::Ebpf;
use aya::maps::{MapInfo, MapType};
use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::tc::{NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle, qdisc_add_clsact};
use aya::programs::{LinkOrder, ProgramError, SchedClassifier, TcAttachType};
use dvpn_common::abi;
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use super::{Error, Hook};

/// Where our clsact filters sit, so that a later daemon finds and replaces them: preference 17477 ("DE").
const FILTER_PRIORITY: u16 = 0x4445;

/// An interface as the loader needs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) name: String,
    pub(super) index: u32,
    /// Bytes of link-layer header in its packets: 0 on a tunnel.
    pub(super) header_bytes: u32,
}

/// A program of ours at its place.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    pub(super) program: &'static str,
    pub(super) direction: TcAttachType,
    /// Stem of the name of its link's pin.
    pub(super) stem: &'static str,
    /// Handle of its clsact filter.
    pub(super) filter: TcHandle,
}

/// What a pinned map must be, for aya takes it as it is.
pub(super) struct Layout {
    pub(super) name: &'static str,
    pub(super) kind: MapType,
    pub(super) value_bytes: usize,
    pub(super) entries: u32,
}

impl Link {
    pub(super) fn find(name: &str) -> Result<Self, Error> {
        // bpffs refuses dots; the rest is what the kernel asks of a name (dev_valid_name, net/core/dev.c).
        if name.is_empty() || name.len() >= libc::IF_NAMESIZE || name.contains(['/', '.', '\0']) {
            return Err(Error::InterfaceName {
                interface: name.to_owned(),
            });
        }
        let failed = |errno: nix::Error| Error::Interface {
            interface: name.to_owned(),
            source: errno.into(),
        };
        let index = nix::net::if_::if_nametoindex(name).map_err(failed)?;
        // A tunnel has no link-layer address and so none here.
        let kind = nix::ifaddrs::getifaddrs()
            .map_err(failed)?
            .filter(|entry| entry.interface_name == name)
            .find_map(|entry| Some(entry.address?.as_link_addr()?.hatype()));
        let header_bytes = match kind {
            Some(libc::ARPHRD_ETHER | libc::ARPHRD_LOOPBACK) => 14,
            _ => 0,
        };
        Ok(Self {
            name: name.to_owned(),
            index,
            header_bytes,
        })
    }
}

/// The nearest existing ancestor must be on a bpffs, else `BPF_OBJ_PIN` fails with a bare EPERM later.
fn require_bpffs(folder: &Path) -> Result<(), Error> {
    for path in folder.ancestors() {
        match statfs(path) {
            Ok(answer) if answer.filesystem_type() == BPF_FS_MAGIC => return Ok(()),
            Ok(_) => return Err(Error::NotBpffs { path: path.to_owned() }),
            Err(nix::Error::ENOENT) => {}
            Err(errno) => {
                return Err(Error::PinDirectory {
                    path: path.to_owned(),
                    source: errno.into(),
                });
            }
        }
    }
    Err(Error::NotBpffs {
        path: folder.to_owned(),
    })
}

/// The folder of an interface's pins.
pub(super) fn folder(pin_dir: &Path, link: &Link) -> PathBuf {
    pin_dir.join(format!("v{}", abi::VERSION)).join(&link.name)
}

/// Makes the folder of an interface's pins and makes sure that the maps in it are as this version makes them.
pub(super) fn prepare(pin_dir: &Path, link: &Link, layouts: &[Layout]) -> Result<PathBuf, Error> {
    let folder = folder(pin_dir, link);
    require_bpffs(&folder)?;
    fs::create_dir_all(&folder).map_err(|source| Error::PinDirectory {
        path: folder.clone(),
        source,
    })?;
    layouts.iter().try_for_each(|layout| layout.check(&folder))?;
    Ok(folder)
}

impl Layout {
    fn check(&self, folder: &Path) -> Result<(), Error> {
        let pin = folder.join(self.name);
        match pin.try_exists() {
            Ok(false) => return Ok(()),
            Ok(true) => {}
            Err(source) => return Err(Error::PinDirectory { path: pin, source }),
        }
        let ours = MapInfo::from_pin(&pin).is_ok_and(|info| {
            info.map_type().is_ok_and(|kind| kind == self.kind)
                && usize::try_from(info.value_size()) == Ok(self.value_bytes)
                && info.max_entries() == self.entries
        });
        if ours {
            Ok(())
        } else {
            Err(Error::ForeignMap { path: pin })
        }
    }
}

pub(super) fn load<'a>(object: &'a mut Ebpf, program: &'static str) -> Result<&'a mut SchedClassifier, Error> {
    let failed = |source| Error::Program { program, source };
    let loaded: &mut SchedClassifier = object
        .program_mut(program)
        .ok_or(Error::NotBuilt)?
        .try_into()
        .map_err(failed)?;
    loaded.load().map_err(failed)?;
    Ok(loaded)
}

/// Attaches a loaded program, or swaps it in where one of ours is; takes out what the other hook holds of ours, so that
/// no packet meets two.
pub(super) fn attach(
    loaded: &mut SchedClassifier,
    place: Place,
    link: &Link,
    folder: &Path,
    hook: Hook,
) -> Result<(), Error> {
    match hook {
        Hook::Tcx => {
            attach_tcx(loaded, place, link, folder)?;
            detach_filter(&link.name, place);
            Ok(())
        }
        Hook::Clsact => {
            attach_filter(loaded, place, link)?;
            remove_links(folder, place.stem, None)
        }
    }
}

/// Whether an error says that this kernel has no TCX: before 6.6 it does not know the attach type; some later ones say
/// the same (no `CONFIG_NET_XGRESS`).
pub(super) fn lacks_tcx(error: &Error) -> bool {
    matches!(
        error,
        Error::Attach { source: ProgramError::SyscallError(error), .. }
            if matches!(error.io_error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP))
    )
}

/// Swaps the program into the pinned link, in one step, or makes and pins a new link.
///
/// The pin carries the interface's index: a link dies with its interface, and a new interface of the same name needs
/// a new one.
fn attach_tcx(loaded: &mut SchedClassifier, place: Place, link: &Link, folder: &Path) -> Result<(), Error> {
    let failed = |source| place.failed(link, source);
    let pin = folder.join(format!("{}-{}", place.stem, link.index));
    remove_links(folder, place.stem, Some(&pin))?;
    if let Ok(pinned) = PinnedLink::from_pin(&pin) {
        let adopted = SchedClassifierLink::try_from(FdLink::from(pinned))
            .ok()
            .and_then(|old| loaded.attach_to_link(old).ok());
        if let Some(id) = adopted {
            // The pin holds the link; a handle of ours besides would only be one more at every look.
            drop(loaded.take_link(id).map_err(failed)?);
            return Ok(());
        }
        // The interface went and came back with the same index, in another namespace: the link is dead.
        remove(&pin, |path| fs::remove_file(path))?;
    }
    let id = loaded
        .attach_with_options(
            &link.name,
            place.direction,
            TcAttachOptions::TcxOrder(LinkOrder::last()),
        )
        .map_err(failed)?;
    let owned = loaded.take_link(id).map_err(failed)?;
    let owned = FdLink::try_from(owned).map_err(|error| failed(ProgramError::IOError(io::Error::other(error))))?;
    owned.pin(&pin).map_err(|source| Error::Pin {
        program: place.program,
        path: pin,
        source,
    })?;
    Ok(())
}

/// Replaces our filter, or makes clsact and the filter.
fn attach_filter(loaded: &mut SchedClassifier, place: Place, link: &Link) -> Result<(), Error> {
    let failed = |source| place.failed(link, source);
    let replaced = filter(&link.name, place)
        .ok()
        .and_then(|old| loaded.attach_to_link(old).ok());
    let id = if let Some(id) = replaced {
        id
    } else {
        // Somebody else's clsact serves as well; if there is none for another reason, attaching says why.
        drop(qdisc_add_clsact(&link.name));
        let options = NlOptions {
            priority: FILTER_PRIORITY,
            handle: place.filter,
            classid: None,
        };
        loaded
            .attach_with_options(&link.name, place.direction, TcAttachOptions::Netlink(options))
            .map_err(failed)?
    };
    // Dropping the link would remove the filter.
    std::mem::forget(loaded.take_link(id).map_err(failed)?);
    Ok(())
}

impl Place {
    fn failed(&self, link: &Link, source: ProgramError) -> Error {
        Error::Attach {
            program: self.program,
            interface: link.name.clone(),
            source,
        }
    }
}

fn filter(interface: &str, place: Place) -> io::Result<SchedClassifierLink> {
    SchedClassifierLink::attached(interface, place.direction, FILTER_PRIORITY, place.filter, None)
}

/// Removes our clsact filter where there is one. The qdisc stays: others may have filters on it.
pub(super) fn detach_filter(interface: &str, place: Place) {
    // Dropping a link detaches it; there is usually none, and its absence is the wish.
    drop(filter(interface, place));
}

/// Removes the link pins of one direction, except `keep`: those of interfaces that had this name before.
pub(super) fn remove_links(folder: &Path, stem: &str, keep: Option<&Path>) -> Result<(), Error> {
    let prefix = format!("{stem}-");
    for pin in entries(folder)? {
        let ours = pin
            .file_name()
            .and_then(|name| name.to_str())
            .is_some_and(|name| name.starts_with(&prefix));
        if ours && keep != Some(pin.as_path()) {
            remove(&pin, |path| fs::remove_file(path))?;
        }
    }
    Ok(())
}

pub(super) fn remove_folder(folder: &Path) -> Result<(), Error> {
    let mut result = Ok(());
    for pin in entries(folder)? {
        result = result.and(remove(&pin, |path| fs::remove_file(path)));
    }
    result.and(remove(folder, |path| fs::remove_dir(path)))
}

pub(super) fn remove(path: &Path, with: impl Fn(&Path) -> io::Result<()>) -> Result<(), Error> {
    match with(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(Error::Unpin {
            path: path.to_owned(),
            source,
        }),
        _ => Ok(()),
    }
}

pub(super) fn folders(path: &Path) -> Result<Vec<PathBuf>, Error> {
    Ok(entries(path)?.into_iter().filter(|entry| entry.is_dir()).collect())
}

/// What is in a folder; nothing when it is not there.
fn entries(path: &Path) -> Result<Vec<PathBuf>, Error> {
    let failed = |source| Error::PinDirectory {
        path: path.to_owned(),
        source,
    };
    match fs::read_dir(path) {
        Ok(entries) => entries.map(|entry| Ok(entry.map_err(failed)?.path())).collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(source) => Err(failed(source)),
    }
}
