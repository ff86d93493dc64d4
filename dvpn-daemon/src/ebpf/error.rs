//! What can go wrong with the tc programs.

use std::io;
use std::path::PathBuf;

use aya::programs::ProgramError;

/// What can go wrong with the tc programs. A client's tunnel goes on uncounted; a provider takes no peers.
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
    /// A map cannot be opened, read or written.
    #[error("the eBPF map {map} of {interface} cannot be used")]
    Map {
        /// Its name.
        map: &'static str,
        /// The interface.
        interface: String,
        /// What aya said.
        #[source]
        source: Box<aya::maps::MapError>,
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
    /// The interface that the programs were loaded for is gone, and another has its name.
    #[error("the interface {interface} was made anew: its programs must be too")]
    Replaced {
        /// The interface.
        interface: String,
    },
    /// More addresses than the map holds.
    #[error(
        "the eBPF maps of {interface} are full: NODE_MAX_PEERS must be at most {}",
        dvpn_common::abi::MAX_PEERS
    )]
    Full {
        /// The interface.
        interface: String,
    },
}
