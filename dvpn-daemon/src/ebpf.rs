//! The tc programs: load, attach, pin, read.
//!
//! Programs and map outlive the daemon: they are pinned under `{pin_dir}/v{VERSION}/{interface}/` on a bpffs, so a
//! restarted daemon adopts them and totals never run backwards. TCX links are used where the kernel has them (6.6);
//! elsewhere a clsact filter, which the kernel keeps by itself until the interface goes.
//!
//! Everything here blocks. Attaching also parses the kernel's own BTF, which is most of its time: call it off the
//! runtime's threads. Reading is one system call per direction.

mod attach;
mod error;
mod loader;
pub mod shaping;

use std::fs;
use std::path::Path;

use aya::EbpfLoader;
use aya::maps::{Map, MapData, MapType, PerCpuArray};
use aya::programs::TcAttachType;
use aya::programs::tc::TcHandle;
use dvpn_common::abi::{self, Counter};

use attach::{Layout, Link, Place, detach_filter, folders, lacks_tcx, load, prepare, remove, remove_folder};
pub use error::Error;
pub use loader::Loader;

/// The object that `build.rs` made; empty where it could not be built.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/dvpn-ebpf"));

/// Whether this build has the programs.
pub const AVAILABLE: bool = !include_bytes!(concat!(env!("OUT_DIR"), "/dvpn-ebpf")).is_empty();

/// The object as it was built, for who runs its programs by hand; empty when it was not.
pub fn object() -> &'static [u8] {
    OBJECT
}

/// Both hooks of the counting programs.
const PLACES: [Place; 2] = [
    Place {
        program: abi::COUNT_INGRESS,
        direction: TcAttachType::Ingress,
        stem: "ingress",
        filter: TcHandle::new(0, 1),
    },
    Place {
        program: abi::COUNT_EGRESS,
        direction: TcAttachType::Egress,
        stem: "egress",
        filter: TcHandle::new(0, 1),
    },
];

const COUNTERS: Layout = Layout {
    name: abi::COUNTERS,
    kind: MapType::PerCpuArray,
    value_bytes: size_of::<Counter>(),
    entries: abi::COUNTERS_LEN,
};

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
            Err(error) if lacks_tcx(&error) => Self::attach_through(interface, pin_dir, Hook::Clsact),
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
        let folder = prepare(pin_dir, &link, &[COUNTERS])?;
        let pin = folder.join(abi::COUNTERS);
        let mut loader = EbpfLoader::new();
        loader
            .override_global(abi::LINK_HEADER, &link.header_bytes, true)
            .map_pin_path(abi::COUNTERS, pin.as_path());
        // The object brings the maps of grants along, which are megabytes for thousands of peers.
        for map in shaping::LAYOUTS {
            loader.map_max_entries(map.name, 1);
        }
        let mut object = loader.load(OBJECT).map_err(|source| Error::Load { source })?;
        for place in PLACES {
            let program = load(&mut object, place.program)?;
            attach::attach(program, place, &link, &folder, hook)?;
        }
        let read = |source| Error::Map {
            map: abi::COUNTERS,
            interface: link.name.clone(),
            source: Box::new(source),
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
        let read = |source| Error::Map {
            map: abi::COUNTERS,
            interface: self.interface.clone(),
            source: Box::new(source),
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
                for place in PLACES.into_iter().chain(shaping::PLACES) {
                    detach_filter(interface, place);
                }
            }
            result = result.and(remove_folder(&folder));
        }
        result = result.and(remove(&version, |path| fs::remove_dir(path)));
    }
    result.and(remove(pin_dir, |path| fs::remove_dir(path)))
}
