//! The programs that enforce grants: loaded, attached, pinned, told and read.
//!
//! Maps and links are pinned beside those of the counting programs, so that a daemon that dies leaves grants enforced
//! and the next one takes them over in one step. [`crate::host::Shaper`] adds the qdiscs.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use aya::maps::{Array, HashMap, Map, MapData, MapError, MapType, PerCpuArray, PerCpuValues};
use aya::programs::tc::TcHandle;
use aya::programs::{SchedClassifier, TcAttachType};
use aya::util::nr_cpus;
use aya::{Ebpf, EbpfLoader};
use dvpn_common::abi::{self, Counter, DIRECTIONS, DOWN, Node, PeerAddress, State, Traffic, UP, mapped, refused, slot};
use dvpn_common::grant::Limit;

use super::attach::{self, Layout, Link, Place, lacks_tcx, load, prepare, remove_links};
use super::{AVAILABLE, Error, Hook, OBJECT};

/// Every program and where it belongs.
pub(super) const PLACES: [Place; 3] = [DOWNLOAD, ADMISSION, UPLOAD];
const FILTER: TcHandle = TcHandle::new(0, 2);
const DOWNLOAD: Place = Place {
    program: abi::SHAPE_DOWN,
    direction: TcAttachType::Egress,
    stem: "down",
    filter: FILTER,
};
const ADMISSION: Place = Place {
    program: abi::ADMIT_UP,
    direction: TcAttachType::Ingress,
    stem: "admit",
    filter: FILTER,
};
const UPLOAD: Place = Place {
    program: abi::SHAPE_UP,
    direction: TcAttachType::Egress,
    stem: "up",
    filter: FILTER,
};

/// Every map that is pinned.
pub(super) const LAYOUTS: [Layout; 7] = [
    layout::<u32>(abi::PEER_BY_ADDR, MapType::Hash, abi::MAX_ADDRESSES),
    layout::<Limit>(abi::GRANT, MapType::Array, abi::SLOTS),
    layout::<State>(abi::STATE, MapType::Array, abi::SLOTS),
    layout::<Traffic>(abi::PEER_COUNTERS, MapType::PerCpuArray, abi::SLOTS),
    layout::<Node>(abi::NODE, MapType::Array, 1),
    layout::<State>(abi::NODE_STATE, MapType::Array, DIRECTIONS),
    layout::<Counter>(abi::REFUSED, MapType::PerCpuArray, refused::LEN),
];

const fn layout<T>(name: &'static str, kind: MapType, entries: u32) -> Layout {
    Layout {
        name,
        kind,
        value_bytes: size_of::<T>(),
        entries,
    }
}

/// The programs of one tunnel. Dropping this leaves them enforcing; closing the interface or
/// [`super::detach_all`] takes them out.
pub struct Shaping {
    object: Ebpf,
    link: Link,
    folder: PathBuf,
    hook: Option<Hook>,
    up_mode: u32,
    peers: HashMap<MapData, PeerAddress, u32>,
    grants: Array<MapData, Limit>,
    traffic: PerCpuArray<MapData, Traffic>,
    node: Array<MapData, Node>,
    refused: PerCpuArray<MapData, Counter>,
}

impl Shaping {
    /// Loads the programs for a tunnel interface that enforce its download and upload so, with the maps that an earlier
    /// daemon left, if any. Nothing is attached yet.
    pub fn load(interface: &str, pin_dir: &Path, down_mode: u32, up_mode: u32) -> Result<Self, Error> {
        if !AVAILABLE {
            return Err(Error::NotBuilt);
        }
        let link = Link::find(interface)?;
        let folder = prepare(pin_dir, &link, &LAYOUTS)?;
        let pins = LAYOUTS.map(|layout| (layout.name, folder.join(layout.name)));
        let mut loader = EbpfLoader::new();
        loader
            .override_global(abi::LINK_HEADER, &link.header_bytes, true)
            .override_global(abi::TUNNEL, &link.index, true)
            .override_global(abi::DOWN_MODE, &down_mode, true)
            .override_global(abi::UP_MODE, &up_mode, true);
        for (name, pin) in &pins {
            loader.map_pin_path(name, pin.as_path());
        }
        let mut object = loader.load(OBJECT).map_err(|source| Error::Load { source })?;
        for place in places(up_mode) {
            load(&mut object, place.program)?;
        }
        Ok(Self {
            peers: map(&mut object, &link, abi::PEER_BY_ADDR, HashMap::try_from)?,
            grants: map(&mut object, &link, abi::GRANT, Array::try_from)?,
            traffic: map(&mut object, &link, abi::PEER_COUNTERS, PerCpuArray::try_from)?,
            node: map(&mut object, &link, abi::NODE, Array::try_from)?,
            refused: map(&mut object, &link, abi::REFUSED, PerCpuArray::try_from)?,
            object,
            link,
            folder,
            hook: None,
            up_mode,
        })
    }

    /// Whether an earlier daemon's programs are on the interface; those on an earlier one of its name do not count.
    pub fn is_attached(interface: &str, pin_dir: &Path) -> Result<bool, Error> {
        let link = Link::find(interface)?;
        let pin = attach::folder(pin_dir, &link).join(abi::NODE);
        // A clsact filter leaves no pin: the map says for which interface it was last used.
        let node = MapData::from_pin(&pin).and_then(|data| Array::<_, Node>::try_from(Map::Array(data))?.get(&0, 0));
        Ok(node.is_ok_and(|node| node.tunnel == link.index))
    }

    /// Takes the programs of an interface out and forgets what they knew.
    pub fn remove(interface: &str, pin_dir: &Path) -> Result<(), Error> {
        for place in PLACES {
            attach::detach_filter(interface, place);
        }
        let version = pin_dir.join(format!("v{}", abi::VERSION));
        attach::remove_folder(&version.join(interface))?;
        // Stays while another interface has something in it.
        match std::fs::remove_dir(&version) {
            Ok(()) => Ok(()),
            Err(error) => {
                tracing::debug!("{} stays: {error}", version.display());
                Ok(())
            }
        }
    }

    /// Makes sure that every program is where it belongs: on the tunnel, and on the intermediate device if the upload is
    /// paced. In place of an earlier daemon's, in one step. Through `hook` only, if given; else TCX where the kernel
    /// takes it, a clsact filter otherwise.
    pub fn attach(&mut self, intermediate: Option<&str>, hook: Option<Hook>) -> Result<Hook, Error> {
        let hook = match hook.or(self.hook) {
            Some(hook) => {
                self.attach_through(intermediate, hook)?;
                hook
            }
            None => match self.attach_through(intermediate, Hook::Tcx) {
                Err(error) if lacks_tcx(&error) => {
                    self.attach_through(intermediate, Hook::Clsact)?;
                    Hook::Clsact
                }
                result => {
                    result?;
                    Hook::Tcx
                }
            },
        };
        self.hook = Some(hook);
        Ok(hook)
    }

    fn attach_through(&mut self, intermediate: Option<&str>, hook: Hook) -> Result<(), Error> {
        // The interface may have gone, and another of its name may have come, which these programs are not about.
        let found = Link::find(&self.link.name)?;
        if found != self.link {
            return Err(Error::Replaced { interface: found.name });
        }
        // From where packets go to: none is taken to a device whose program is not there yet.
        for place in places(self.up_mode) {
            let link = if place.stem == UPLOAD.stem {
                Link::find(intermediate.unwrap_or_default())?
            } else {
                self.link.clone()
            };
            let program = program(&mut self.object, place.program)?;
            attach::attach(program, *place, &link, &self.folder, hook)?;
        }
        if self.up_mode == abi::mode::POLICE {
            remove_links(&self.folder, UPLOAD.stem, None)?;
        }
        Ok(())
    }

    /// The addresses of each peer that the map knows on this interface. Those on earlier interfaces of its name are
    /// forgotten.
    pub fn adopt(&mut self) -> Result<BTreeMap<u32, Vec<IpAddr>>, Error> {
        let failed = |source| self.failed(abi::PEER_BY_ADDR, source);
        let known: Vec<(PeerAddress, u32)> = self.peers.iter().collect::<Result<_, _>>().map_err(failed)?;
        let mut peers = BTreeMap::<u32, Vec<IpAddr>>::new();
        for (key, peer) in known {
            if key.interface == self.link.index {
                peers.entry(peer).or_default().push(plain(key.address));
            } else {
                self.forget_key(&key)?;
            }
        }
        Ok(peers)
    }

    /// Sets what a peer is granted, [`DOWN`] and [`UP`].
    pub fn set_limits(&mut self, peer: u32, limits: [Limit; 2]) -> Result<(), Error> {
        for (direction, limit) in [DOWN, UP].into_iter().zip(limits) {
            let set = self.grants.set(slot(peer, direction), limit, 0);
            set.map_err(|source| self.failed(abi::GRANT, source))?;
        }
        Ok(())
    }

    /// Sets a peer's counters to zero; for one that is new.
    pub fn clear_traffic(&mut self, peer: u32) -> Result<(), Error> {
        let cpus = nr_cpus().map_err(|(_, source)| self.failed(abi::PEER_COUNTERS, MapError::IoError(source)))?;
        for direction in [DOWN, UP] {
            let zeros = PerCpuValues::try_from(vec![Traffic::default(); cpus])
                .map_err(|source| self.failed(abi::PEER_COUNTERS, MapError::IoError(source)))?;
            let set = self.traffic.set(slot(peer, direction), zeros, 0);
            set.map_err(|source| self.failed(abi::PEER_COUNTERS, source))?;
        }
        Ok(())
    }

    /// An address is this peer's from now on.
    pub fn set_address(&mut self, address: IpAddr, peer: u32) -> Result<(), Error> {
        let key = self.key(address);
        match self.peers.insert(key, peer, 0) {
            Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::E2BIG) => {
                Err(Error::Full {
                    interface: self.link.name.clone(),
                })
            }
            result => result.map_err(|source| self.failed(abi::PEER_BY_ADDR, source)),
        }
    }

    /// An address is nobody's; none that is not there is missed.
    pub fn forget_address(&mut self, address: IpAddr) -> Result<(), Error> {
        self.forget_key(&self.key(address))
    }

    fn forget_key(&mut self, key: &PeerAddress) -> Result<(), Error> {
        match self.peers.remove(key) {
            Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            Err(MapError::KeyNotFound) => Ok(()),
            result => result.map_err(|source| self.failed(abi::PEER_BY_ADDR, source)),
        }
    }

    /// What holds for all peers together.
    pub fn set_node(&mut self, node: Node) -> Result<(), Error> {
        let set = self.node.set(0, node, 0);
        set.map_err(|source| self.failed(abi::NODE, source))
    }

    /// What a peer carried and lost since its counters were zero, [`DOWN`] and [`UP`].
    pub fn traffic(&self, peer: u32) -> Result<[Traffic; 2], Error> {
        let read = |direction| {
            let values = self.traffic.get(&slot(peer, direction), 0);
            let values = values.map_err(|source| self.failed(abi::PEER_COUNTERS, source))?;
            Ok(values
                .iter()
                .fold(Traffic::default(), |sum: Traffic, cpu| sum.plus(*cpu)))
        };
        Ok([read(DOWN)?, read(UP)?])
    }

    /// What was dropped since the maps were made, in the order of [`refused::NAMES`].
    pub fn refused(&self) -> Result<Vec<Counter>, Error> {
        let read = |reason| {
            let values = self.refused.get(&reason, 0);
            let values = values.map_err(|source| self.failed(abi::REFUSED, source))?;
            Ok(values.iter().fold(Counter::default(), |sum, cpu| Counter {
                packets: sum.packets.wrapping_add(cpu.packets),
                bytes: sum.bytes.wrapping_add(cpu.bytes),
            }))
        };
        (0..refused::LEN).map(read).collect()
    }

    fn key(&self, address: IpAddr) -> PeerAddress {
        PeerAddress {
            interface: self.link.index,
            address: match address {
                IpAddr::V4(v4) => mapped(v4.octets()),
                IpAddr::V6(v6) => v6.octets(),
            },
        }
    }

    fn failed(&self, map: &'static str, source: MapError) -> Error {
        Error::Map {
            map,
            interface: self.link.name.clone(),
            source: Box::new(source),
        }
    }
}

/// What is attached, from where packets go to first.
fn places(up_mode: u32) -> &'static [Place] {
    if up_mode == abi::mode::POLICE {
        &[DOWNLOAD, ADMISSION]
    } else {
        &[DOWNLOAD, UPLOAD, ADMISSION]
    }
}

fn plain(address: [u8; 16]) -> IpAddr {
    let v6 = std::net::Ipv6Addr::from(address);
    v6.to_ipv4_mapped().map_or(IpAddr::V6(v6), IpAddr::V4)
}

fn map<T>(
    object: &mut Ebpf,
    link: &Link,
    name: &'static str,
    typed: impl FnOnce(Map) -> Result<T, MapError>,
) -> Result<T, Error> {
    let taken = object.take_map(name).ok_or(Error::NotBuilt)?;
    typed(taken).map_err(|source| Error::Map {
        map: name,
        interface: link.name.clone(),
        source: Box::new(source),
    })
}

fn program<'a>(object: &'a mut Ebpf, name: &'static str) -> Result<&'a mut SchedClassifier, Error> {
    let found = object.program_mut(name).ok_or(Error::NotBuilt)?;
    found
        .try_into()
        .map_err(|source| Error::Program { program: name, source })
}
