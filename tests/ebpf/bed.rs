//! A network namespace, a bpffs and a TUN device of one test's own; all of it goes with the test's thread.

use std::fs;
use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use dvpn_common::abi::Counter;
use dvpn_daemon::ebpf::{Counters, Error};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{setsockopt, sockopt::UdpGsoSegment};
use tempfile::TempDir;
use tun_rs::{DeviceBuilder, Layer, SyncDevice};

/// The TUN of every test.
pub(crate) const INTERFACE: &str = "dvpn0";
const IPV4: usize = 20;
const TCP: usize = 20;
const UDP: usize = 8;
const ETHERNET: usize = 14;
/// `struct virtio_net_hdr` (`include/uapi/linux/virtio_net.h`).
const VNET: usize = 10;

/// Namespaces and a bpffs; the thread that made it lives in them.
pub(crate) struct Bed {
    folder: TempDir,
}

impl Bed {
    pub(crate) fn new() -> Self {
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS)
            .expect("new namespaces: run this tier as root, by scripts/test.sh netns");
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        // Without it the kernel sends neighbour discovery of its own, and counts would not be exact.
        for scope in ["all", "default"] {
            fs::write(format!("/proc/sys/net/ipv6/conf/{scope}/disable_ipv6"), "1").unwrap();
        }
        let folder = tempfile::tempdir().unwrap();
        mount(Some("bpf"), folder.path(), Some("bpf"), MsFlags::empty(), none).unwrap();
        Self { folder }
    }

    /// `BPF_DIRECTORY` of this test.
    pub(crate) fn pin_dir(&self) -> PathBuf {
        self.folder.path().join("dvpn")
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        // The folder can be removed only when nothing is mounted on it.
        nix::mount::umount(self.folder.path()).unwrap();
    }
}

/// A layer-3 device at 10.9.0.1/24 that takes super-packets.
pub(crate) fn tun() -> SyncDevice {
    DeviceBuilder::new()
        .name(INTERFACE)
        .ipv4("10.9.0.1", 24, None)
        .mtu(1420)
        .offload(true)
        .build_sync()
        .unwrap()
}

/// The same with Ethernet frames.
pub(crate) fn tap() -> SyncDevice {
    DeviceBuilder::new()
        .name(INTERFACE)
        .layer(Layer::L2)
        .ipv4("10.9.0.1", 24, None)
        .offload(true)
        .build_sync()
        .unwrap()
}

/// A plain UDP packet of `payload` bytes out of the tunnel; answers with its layer-3 length.
pub(crate) fn inject(tun: &SyncDevice, payload: usize) -> u64 {
    inject_behind(tun, &[], payload)
}

/// The same in an Ethernet frame.
pub(crate) fn inject_frame(tap: &SyncDevice, payload: usize) -> u64 {
    let mut header = [0xff; ETHERNET];
    header[12..].copy_from_slice(&[0x08, 0x00]);
    inject_behind(tap, &header, payload)
}

/// These bytes out of the tunnel, as they are.
pub(crate) fn inject_raw(tun: &SyncDevice, packet: &[u8]) {
    let buffer = [&[0; VNET], packet].concat();
    assert_eq!(tun.send(&buffer).unwrap(), buffer.len());
}

fn inject_behind(tun: &SyncDevice, link_header: &[u8], payload: usize) -> u64 {
    let mut buffer = vec![0; VNET];
    buffer.extend_from_slice(link_header);
    buffer.extend_from_slice(&ipv4(17, UDP + payload));
    buffer.extend_from_slice(&[0; UDP]);
    buffer.resize(buffer.len() + payload, 0);
    assert_eq!(tun.send(&buffer).unwrap(), buffer.len());
    (IPV4 + UDP + payload) as u64
}

/// A TCP super-packet of `segments` full segments of `size` bytes out of the tunnel.
pub(crate) fn inject_super_packet(tun: &SyncDevice, segments: u16, size: u16) -> Counter {
    const NEEDS_CHECKSUM: u8 = 1;
    const TCPV4: u8 = 1;
    let payload = usize::from(segments) * usize::from(size);
    let mut buffer = vec![NEEDS_CHECKSUM, TCPV4];
    let [headers, network] = [IPV4 + TCP, IPV4].map(|length| u16::try_from(length).unwrap());
    for field in [headers, size, network, 16] {
        buffer.extend_from_slice(&field.to_ne_bytes());
    }
    buffer.extend_from_slice(&ipv4(6, TCP + payload));
    let mut tcp = [0; TCP];
    tcp[12] = 5 << 4;
    buffer.extend_from_slice(&tcp);
    buffer.resize(buffer.len() + payload, 0);
    assert_eq!(tun.send(&buffer).unwrap(), buffer.len());
    let segments = u64::from(segments);
    Counter {
        packets: segments,
        bytes: segments * (IPV4 + TCP + usize::from(size)) as u64,
    }
}

fn ipv4(protocol: u8, payload: usize) -> [u8; IPV4] {
    let mut header = [0; IPV4];
    header[0] = 0x45;
    header[2..4].copy_from_slice(&u16::try_from(IPV4 + payload).unwrap().to_be_bytes());
    header[8] = 64;
    header[9] = protocol;
    header[12..16].copy_from_slice(&[10, 9, 0, 2]);
    header[16..20].copy_from_slice(&[10, 9, 0, 1]);
    header
}

/// A UDP packet of `payload` bytes into the tunnel; answers with its layer-3 length.
pub(crate) fn send(payload: usize) -> u64 {
    let socket = UdpSocket::bind("10.9.0.1:0").unwrap();
    socket.send_to(&vec![0; payload], "10.9.0.2:9").unwrap();
    (IPV4 + UDP + payload) as u64
}

/// One UDP super-packet of `segments` full segments of `size` bytes into the tunnel.
pub(crate) fn send_super_packet(segments: u16, size: u16) -> Counter {
    let socket = UdpSocket::bind("10.9.0.1:0").unwrap();
    setsockopt(&socket, UdpGsoSegment, &i32::from(size)).unwrap();
    socket
        .send_to(&vec![0; usize::from(segments) * usize::from(size)], "10.9.0.2:9")
        .unwrap();
    let segments = u64::from(segments);
    Counter {
        packets: segments,
        bytes: segments * (IPV4 + UDP + usize::from(size)) as u64,
    }
}

/// Packets come out of a device in softirq context: waits until the counters are as expected.
pub(crate) fn wait_for(counters: &Counters, expected: [Counter; 2]) {
    let mut seen = counters.read().unwrap();
    wait(|| {
        seen = counters.read().unwrap();
        seen == expected
    })
    .unwrap_or_else(|()| panic!("counted {seen:?}, expected {expected:?}"));
}

/// Asks until the answer is yes, for 5 seconds.
pub(crate) fn wait(mut condition: impl FnMut() -> bool) -> Result<(), ()> {
    let deadline = Instant::now() + Duration::from_secs(5);
    while !condition() {
        if Instant::now() > deadline {
            return Err(());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

/// What is pinned for the test's interface.
pub(crate) fn pins(pin_dir: &Path) -> Vec<String> {
    let folder = pin_dir.join(format!("v{}", dvpn_common::abi::VERSION)).join(INTERFACE);
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Attaches by whatever the kernel takes.
pub(crate) fn attach(bed: &Bed) -> Result<Counters, Error> {
    Counters::attach(INTERFACE, &bed.pin_dir())
}
