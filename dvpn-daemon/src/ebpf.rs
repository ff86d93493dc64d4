//! The tc programs: load, attach, pin, read.
//!
//! Programs and map outlive the daemon: they are pinned under `{pin_dir}/v{VERSION}/{interface}/` on a bpffs, so a
//! restarted daemon adopts them and totals never run backwards. TCX links are used where the kernel has them (6.6);
//! elsewhere a clsact filter, which the kernel keeps by itself until the interface goes.
//!
//! Everything here blocks. Attaching also parses the kernel's own BTF, which is most of its time: call it off the
//! runtime's threads. Reading is one system call per direction.

mod loader;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use aya::maps::{Map, MapData, MapInfo, MapType, PerCpuArray};
use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::tc::{NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle, qdisc_add_clsact};
use aya::programs::{LinkOrder, ProgramError, SchedClassifier, TcAttachType};
use aya::{Ebpf, EbpfLoader};
use dvpn_common::abi::{self, Counter};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

pub use loader::Loader;

/// The object that `build.rs` made; empty where it could not be built.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/dvpn-ebpf"));

/// Whether this build has the programs.
pub const AVAILABLE: bool = !include_bytes!(concat!(env!("OUT_DIR"), "/dvpn-ebpf")).is_empty();

/// Where our clsact filters sit, so that a later daemon finds and replaces them: preference 17477 ("DE"), handle 1.
const FILTER_PRIORITY: u16 = 0x4445;
const FILTER_HANDLE: TcHandle = TcHandle::new(0, 1);

/// Both hooks: program, direction, stem of the link's pin.
const HOOKS: [(&str, TcAttachType, &str); 2] = [
    (abi::COUNT_INGRESS, TcAttachType::Ingress, "ingress"),
    (abi::COUNT_EGRESS, TcAttachType::Egress, "egress"),
];

/// What can go wrong with the tc programs. None of it stops a tunnel: the daemon says it once and goes on uncounted.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The build had no toolchain for the eBPF object.
    #[error("this build has no eBPF object; build with bpf-linker and the sources of core, see dvpn-daemon/build.rs")]
    NotBuilt,
    /// The name cannot name an interface, or not one that bpffs can hold.
    #[error("{interface:?} cannot be pinned: 1 to 15 characters without '/' and '.' are needed")]
    InterfaceName {
        /// What was asked for.
        interface: String,
    },
    /// No such interface in this network namespace.
    #[error("interface {interface} cannot be looked up; create it before its programs are attached")]
    Interface {
        /// What was asked for.
        interface: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The pin folder is not on a bpffs.
    #[error("{} is not on a BPF file system; mount one (mount -t bpf bpf /sys/fs/bpf) or set BPF_DIRECTORY", path.display())]
    NotBpffs {
        /// The nearest existing folder.
        path: PathBuf,
    },
    /// The pin folder cannot be made or read.
    #[error("cannot use the pin folder {}; the daemon's user needs it as its own", path.display())]
    PinDirectory {
        /// The folder.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A pinned map has another layout than this version's.
    #[error("the map pinned at {} is not ours; remove it with dvpn-daemon --cleanup", path.display())]
    ForeignMap {
        /// The pin.
        path: PathBuf,
    },
    /// The object does not parse, or its map cannot be made.
    #[error("the eBPF object cannot be loaded; CAP_BPF and CAP_NET_ADMIN are needed")]
    Load {
        /// What aya said.
        #[source]
        source: aya::EbpfError,
    },
    /// The kernel refused a program.
    #[error("the kernel refuses the program {program}")]
    Program {
        /// Its name.
        program: &'static str,
        /// What aya said.
        #[source]
        source: ProgramError,
    },
    /// A program does not attach.
    #[error("the program {program} cannot be attached to {interface}")]
    Attach {
        /// Its name.
        program: &'static str,
        /// The interface.
        interface: String,
        /// What aya said.
        #[source]
        source: ProgramError,
    },
    /// A link cannot be pinned.
    #[error("the link of {program} cannot be pinned at {}", path.display())]
    Pin {
        /// The program.
        program: &'static str,
        /// Where.
        path: PathBuf,
        /// What aya said.
        #[source]
        source: aya::pin::PinError,
    },
    /// The map cannot be opened or read.
    #[error("the counters of {interface} cannot be read")]
    Read {
        /// The interface.
        interface: String,
        /// What aya said.
        #[source]
        source: aya::maps::MapError,
    },
    /// The thread that attaches is gone.
    #[error("the thread that attaches eBPF programs is not there: restart the daemon")]
    NoThread,
    /// A pin cannot be removed.
    #[error("cannot remove {}; remove it as root", path.display())]
    Unpin {
        /// The pin or folder.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// Which of the kernel's two tc attachments carries the programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    /// A TCX link (Linux 6.6), pinned.
    Tcx,
    /// A direct-action filter on the interface's clsact qdisc.
    Clsact,
}

/// The counters of one interface. Dropping this leaves programs and map in the kernel; [`detach_all`] takes them out.
pub struct Counters {
    interface: String,
    hook: Hook,
    map: PerCpuArray<MapData, Counter>,
}

impl Counters {
    /// Attaches the counting programs to both directions of `interface`, or adopts those an earlier daemon left there.
    ///
    /// TCX where the kernel takes it, a clsact filter otherwise. `pin_dir` is `BPF_DIRECTORY`.
    pub fn attach(interface: &str, pin_dir: &Path) -> Result<Self, Error> {
        match Self::attach_through(interface, pin_dir, Hook::Tcx) {
            // Kernels before 6.6 do not know the attach type; some later ones say the same (no CONFIG_NET_XGRESS).
            Err(Error::Attach {
                source: ProgramError::SyscallError(error),
                ..
            }) if matches!(error.io_error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP)) => {
                Self::attach_through(interface, pin_dir, Hook::Clsact)
            }
            result => result,
        }
    }

    /// As [`Counters::attach`], through the given hook only. What the other hook holds of ours is taken out, so that
    /// no packet counts twice.
    pub fn attach_through(interface: &str, pin_dir: &Path, hook: Hook) -> Result<Self, Error> {
        if !AVAILABLE {
            return Err(Error::NotBuilt);
        }
        let link = Link::find(interface)?;
        let folder = pin_dir.join(format!("v{}", abi::VERSION)).join(interface);
        require_bpffs(&folder)?;
        fs::create_dir_all(&folder).map_err(|source| Error::PinDirectory {
            path: folder.clone(),
            source,
        })?;
        let pin = folder.join(abi::COUNTERS);
        check_layout(&pin)?;

        let mut object = EbpfLoader::new()
            .override_global("LINK_HEADER", &link.header_bytes, true)
            .map_pin_path(abi::COUNTERS, pin.as_path())
            .load(OBJECT)
            .map_err(|source| Error::Load { source })?;
        for (program, direction, stem) in HOOKS {
            let loaded = load(&mut object, program)?;
            match hook {
                Hook::Tcx => {
                    attach_tcx(loaded, program, direction, &link, &folder, stem)?;
                    detach_filter(interface, direction);
                }
                Hook::Clsact => {
                    attach_filter(loaded, program, direction, &link)?;
                    remove_links(&folder, stem, None)?;
                }
            }
        }
        let read = |source| Error::Read {
            interface: link.name.clone(),
            source,
        };
        let map: Map = object
            .take_map(abi::COUNTERS)
            .ok_or_else(|| Error::ForeignMap { path: pin.clone() })?;
        let map = PerCpuArray::try_from(map).map_err(read)?;
        Ok(Self {
            interface: link.name,
            hook,
            map,
        })
    }

    /// The hook that carries the programs.
    pub fn hook(&self) -> Hook {
        self.hook
    }

    /// What the interface carried since the map was made, all CPUs together, indexed by [`abi::INGRESS`] and
    /// [`abi::EGRESS`].
    pub fn read(&self) -> Result<[Counter; 2], Error> {
        Ok([self.total(abi::INGRESS)?, self.total(abi::EGRESS)?])
    }

    fn total(&self, direction: u32) -> Result<Counter, Error> {
        let read = |source| Error::Read {
            interface: self.interface.clone(),
            source,
        };
        let per_cpu = self.map.get(&direction, 0).map_err(read)?;
        Ok(per_cpu.iter().fold(Counter::default(), |sum, cpu| Counter {
            packets: sum.packets.wrapping_add(cpu.packets),
            bytes: sum.bytes.wrapping_add(cpu.bytes),
        }))
    }
}

/// Takes every program and map of ours out of the kernel, of all versions and interfaces, and removes the pin folder.
///
/// Goes on after a failure and answers with the first; a folder that is not there is no failure.
pub fn detach_all(pin_dir: &Path) -> Result<(), Error> {
    let mut result = Ok(());
    for version in folders(pin_dir)? {
        for folder in folders(&version)? {
            if let Some(interface) = folder.file_name().and_then(|name| name.to_str()) {
                for (_, direction, _) in HOOKS {
                    detach_filter(interface, direction);
                }
            }
            result = result.and(remove_folder(&folder));
        }
        result = result.and(remove(&version, |path| fs::remove_dir(path)));
    }
    result.and(remove(pin_dir, |path| fs::remove_dir(path)))
}

/// An interface as the loader needs it.
struct Link {
    name: String,
    index: u32,
    /// Bytes of link-layer header in its packets: 0 on a tunnel.
    header_bytes: u32,
}

impl Link {
    fn find(name: &str) -> Result<Self, Error> {
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

/// aya takes a pinned map as it is, so a map of another layout is found out here.
fn check_layout(pin: &Path) -> Result<(), Error> {
    let foreign = || Error::ForeignMap { path: pin.to_owned() };
    match pin.try_exists() {
        Ok(false) => return Ok(()),
        Ok(true) => {}
        Err(source) => {
            return Err(Error::PinDirectory {
                path: pin.to_owned(),
                source,
            });
        }
    }
    let info = MapInfo::from_pin(pin).map_err(|_not_a_map| foreign())?;
    let ours = info.map_type().is_ok_and(|kind| kind == MapType::PerCpuArray)
        && usize::try_from(info.value_size()) == Ok(size_of::<Counter>())
        && info.max_entries() == abi::COUNTERS_LEN;
    if ours { Ok(()) } else { Err(foreign()) }
}

fn load<'a>(object: &'a mut Ebpf, program: &'static str) -> Result<&'a mut SchedClassifier, Error> {
    let failed = |source| Error::Program { program, source };
    let loaded: &mut SchedClassifier = object
        .program_mut(program)
        .ok_or(Error::NotBuilt)?
        .try_into()
        .map_err(failed)?;
    loaded.load().map_err(failed)?;
    Ok(loaded)
}

/// Swaps the program into the pinned link, in one step, or makes and pins a new link.
///
/// The pin carries the interface's index: a link dies with its interface, and a new interface of the same name needs
/// a new one.
fn attach_tcx(
    loaded: &mut SchedClassifier,
    program: &'static str,
    direction: TcAttachType,
    link: &Link,
    folder: &Path,
    stem: &str,
) -> Result<(), Error> {
    let failed = |source| Error::Attach {
        program,
        interface: link.name.clone(),
        source,
    };
    let pin = folder.join(format!("{stem}-{}", link.index));
    remove_links(folder, stem, Some(&pin))?;
    if let Ok(pinned) = PinnedLink::from_pin(&pin) {
        let adopted = SchedClassifierLink::try_from(FdLink::from(pinned))
            .ok()
            .and_then(|old| loaded.attach_to_link(old).ok());
        if adopted.is_some() {
            return Ok(());
        }
        // The interface went and came back with the same index, in another namespace: the link is dead.
        remove(&pin, |path| fs::remove_file(path))?;
    }
    let id = loaded
        .attach_with_options(&link.name, direction, TcAttachOptions::TcxOrder(LinkOrder::default()))
        .map_err(failed)?;
    let owned = loaded.take_link(id).map_err(failed)?;
    let owned = FdLink::try_from(owned).map_err(|error| failed(ProgramError::IOError(io::Error::other(error))))?;
    owned.pin(&pin).map_err(|source| Error::Pin {
        program,
        path: pin,
        source,
    })?;
    Ok(())
}

/// Replaces our filter, or makes clsact and the filter.
fn attach_filter(
    loaded: &mut SchedClassifier,
    program: &'static str,
    direction: TcAttachType,
    link: &Link,
) -> Result<(), Error> {
    let failed = |source| Error::Attach {
        program,
        interface: link.name.clone(),
        source,
    };
    let replaced = filter(&link.name, direction)
        .ok()
        .and_then(|old| loaded.attach_to_link(old).ok());
    let id = if let Some(id) = replaced {
        id
    } else {
        // Somebody else's clsact serves as well; if there is none for another reason, attaching says why.
        drop(qdisc_add_clsact(&link.name));
        let options = NlOptions {
            priority: FILTER_PRIORITY,
            handle: FILTER_HANDLE,
            classid: None,
        };
        loaded
            .attach_with_options(&link.name, direction, TcAttachOptions::Netlink(options))
            .map_err(failed)?
    };
    // Dropping the link would remove the filter.
    std::mem::forget(loaded.take_link(id).map_err(failed)?);
    Ok(())
}

fn filter(interface: &str, direction: TcAttachType) -> io::Result<SchedClassifierLink> {
    SchedClassifierLink::attached(interface, direction, FILTER_PRIORITY, FILTER_HANDLE, None)
}

/// Removes our clsact filter where there is one. The qdisc stays: others may have filters on it.
fn detach_filter(interface: &str, direction: TcAttachType) {
    // Dropping a link detaches it; there is usually none, and its absence is the wish.
    drop(filter(interface, direction));
}

/// Removes the link pins of one direction, except `keep`: those of interfaces that had this name before.
fn remove_links(folder: &Path, stem: &str, keep: Option<&Path>) -> Result<(), Error> {
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

fn remove_folder(folder: &Path) -> Result<(), Error> {
    let mut result = Ok(());
    for pin in entries(folder)? {
        result = result.and(remove(&pin, |path| fs::remove_file(path)));
    }
    result.and(remove(folder, |path| fs::remove_dir(path)))
}

fn remove(path: &Path, with: impl Fn(&Path) -> io::Result<()>) -> Result<(), Error> {
    match with(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(Error::Unpin {
            path: path.to_owned(),
            source,
        }),
        _ => Ok(()),
    }
}

fn folders(path: &Path) -> Result<Vec<PathBuf>, Error> {
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
