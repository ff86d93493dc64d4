//! Packet capture on one interface with a predicate. A row that shows "no packet leaked" is worth something only after
//! the same capture has caught a planted leak.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    net::Ipv4Addr,
    os::{fd::AsRawFd as _, unix::net::UnixStream},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use anyhow::{Context as _, Result};

use crate::{namespace::Namespace, process::wait_for, sys};

/// The part of an IPv4 packet that predicates ask about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet {
    /// Source address.
    pub source: Ipv4Addr,
    /// Destination address.
    pub destination: Ipv4Addr,
    /// 6 TCP, 17 UDP, 1 ICMP.
    pub protocol: u8,
    /// Source port of TCP and UDP, else 0.
    pub source_port: u16,
    /// Destination port of TCP and UDP, else 0.
    pub destination_port: u16,
}

impl Packet {
    /// Reads an Ethernet frame with IPv4 in it.
    pub fn in_frame(frame: &[u8]) -> Option<Self> {
        let (header, packet) = frame.split_at_checked(14)?;
        if header.get(12..14)? == [0x08, 0x00] {
            Self::read(packet)
        } else {
            None
        }
    }

    /// Reads an IPv4 packet.
    pub fn read(packet: &[u8]) -> Option<Self> {
        let first = *packet.first()?;
        if first >> 4 != 4 {
            return None;
        }
        let address = |at: usize| -> Option<Ipv4Addr> { Some(packet.get(at..)?.first_chunk::<4>().copied()?.into()) };
        let protocol = *packet.get(9)?;
        let ports = packet.get(usize::from(first & 0x0f) * 4..).unwrap_or_default();
        let port = |at: usize| match protocol {
            6 | 17 => ports
                .get(at..)
                .and_then(|rest| rest.first_chunk::<2>())
                .map_or(0, |b| u16::from_be_bytes(*b)),
            _ => 0,
        };
        Some(Self {
            source: address(12)?,
            destination: address(16)?,
            protocol,
            source_port: port(0),
            destination_port: port(2),
        })
    }
}

/// What the kernel sends of its own on any link: ARP, IGMP, and neighbour discovery or multicast listener reports of
/// IPv6, all of which stay on the link.
pub fn is_housekeeping(frame: &[u8]) -> bool {
    let (Some(kind), Some(packet)) = (frame.get(12..14), frame.get(14..)) else {
        return false;
    };
    match kind {
        [0x08, 0x06] => true,
        [0x08, 0x00] => Packet::read(packet)
            .is_some_and(|packet| packet.protocol == 2 && packet.destination.octets().starts_with(&[224, 0, 0])),
        [0x86, 0xdd] => {
            let (next, to) = (packet.get(6), packet.get(24..26));
            // Listener reports carry a hop-by-hop header (RFC 3810, section 5).
            matches!(next, Some(58 | 0)) && to.is_some_and(|to| matches!(to, [0xff, 0x02] | [0xfe, 0x80..=0xbf]))
        }
        _ => false,
    }
}

/// The hardware address of an interface.
pub fn hardware_address(namespace: &Namespace, interface: &str) -> Result<[u8; 6]> {
    let found = namespace.run(|| -> Result<Option<[u8; 6]>> {
        Ok(nix::ifaddrs::getifaddrs()
            .context("listing interfaces")?
            .filter(|entry| entry.interface_name == interface)
            .find_map(|entry| entry.address?.as_link_addr()?.addr()))
    })??;
    found.with_context(|| format!("{interface} has no hardware address"))
}

struct Shared {
    seen: AtomicU64,
    matched: AtomicU64,
    samples: Mutex<Vec<String>>,
}

/// A running capture; dropping it ends it.
pub struct Capture {
    shared: Arc<Shared>,
    wake: UnixStream,
    thread: Option<JoinHandle<()>>,
}

impl Capture {
    /// Captures on `interface` in `namespace` and counts the frames for which `predicate` holds.
    pub fn start(
        namespace: &Namespace,
        interface: &str,
        predicate: impl Fn(&[u8]) -> bool + Send + 'static,
    ) -> Result<Self> {
        let socket = namespace.run(|| -> Result<File> {
            let index =
                nix::net::if_::if_nametoindex(interface).with_context(|| format!("no interface {interface}"))?;
            Ok(sys::packet_socket(index)
                .context("opening a packet socket: this needs root")?
                .into())
        })??;
        let shared = Arc::new(Shared {
            seen: AtomicU64::new(0),
            matched: AtomicU64::new(0),
            samples: Mutex::default(),
        });
        let (wake, woken) = UnixStream::pair().context("making the capture's wake-up pipe")?;
        let thread = std::thread::Builder::new()
            .name("capture".into())
            .spawn({
                let shared = Arc::clone(&shared);
                move || read_frames(&socket, &woken, &shared, &predicate)
            })
            .context("starting the capture's thread")?;
        Ok(Self {
            shared,
            wake,
            thread: Some(thread),
        })
    }

    /// Frames seen so far, matching or not.
    pub fn seen(&self) -> u64 {
        self.shared.seen.load(Ordering::Acquire)
    }

    /// Matching frames so far.
    pub fn matched(&self) -> u64 {
        self.shared.matched.load(Ordering::Acquire)
    }

    /// Begins to count anew.
    pub fn forget(&self) {
        let mut samples = self.shared.samples.lock().unwrap_or_else(PoisonError::into_inner);
        samples.clear();
        self.shared.matched.store(0, Ordering::Release);
    }

    /// The first matching frames, for messages.
    pub fn samples(&self) -> Vec<String> {
        self.shared
            .samples
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Waits until more than `than` frames have matched.
    pub fn wait_for_more(&self, than: u64, patience: Duration) -> Result<u64> {
        wait_for("a matching packet", patience, || {
            Ok(Some(self.matched()).filter(|matched| *matched > than))
        })
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        drop(self.wake.write_all(&[1]));
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

fn read_frames(mut socket: &File, woken: &UnixStream, shared: &Shared, predicate: &dyn Fn(&[u8]) -> bool) {
    let mut buffer = vec![0_u8; 65_536];
    while let Ok([readable, ended]) = sys::wait_readable([socket.as_raw_fd(), woken.as_raw_fd()], None) {
        // Everything that has arrived is counted before the end is honoured.
        while readable && let Ok(length) = socket.read(&mut buffer) {
            let frame = buffer.get(..length).unwrap_or_default();
            if predicate(frame) {
                note(shared, frame);
            }
            shared.seen.fetch_add(1, Ordering::Release);
        }
        if ended {
            return;
        }
    }
}

fn note(shared: &Shared, frame: &[u8]) {
    let mut samples = shared.samples.lock().unwrap_or_else(PoisonError::into_inner);
    if samples.len() < 5 {
        samples.push(Packet::in_frame(frame).map_or_else(|| format!("{frame:02x?}"), |packet| format!("{packet:?}")));
    }
    shared.matched.fetch_add(1, Ordering::Release);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_stays_on_the_link_is_housekeeping() {
        let v4 = |protocol: u8, to: [u8; 4]| {
            let mut frame = vec![0_u8; 14 + 20];
            frame[12] = 0x08;
            frame[14] = 0x45;
            frame[14 + 9] = protocol;
            frame[30..34].copy_from_slice(&to);
            frame
        };
        let v6 = |next: u8, to: [u8; 2]| {
            let mut frame = vec![0_u8; 14 + 40];
            frame[12..14].copy_from_slice(&[0x86, 0xdd]);
            frame[14 + 6] = next;
            frame[14 + 24..14 + 26].copy_from_slice(&to);
            frame
        };
        assert!(is_housekeeping(&v4(2, [224, 0, 0, 22])));
        assert!(!is_housekeeping(&v4(2, [198, 51, 100, 80])));
        assert!(!is_housekeeping(&v4(17, [224, 0, 0, 251])), "mDNS is an application's");
        assert!(is_housekeeping(&v6(58, [0xff, 0x02])));
        assert!(!is_housekeeping(&v6(58, [0x20, 0x01])));
        assert!(!is_housekeeping(&v6(17, [0xff, 0x02])));
    }

    #[test]
    fn an_ipv4_packet_is_read_with_its_ports() {
        let mut frame = vec![0_u8; 14 + 28];
        frame[12] = 0x08;
        frame[14] = 0x45;
        frame[14 + 9] = 17;
        frame[14 + 12..14 + 16].copy_from_slice(&[10, 0, 0, 1]);
        frame[14 + 16..14 + 20].copy_from_slice(&[10, 0, 0, 2]);
        frame[34..38].copy_from_slice(&[0x12, 0x34, 0x00, 0x35]);
        let packet = Packet::in_frame(&frame).unwrap();
        assert_eq!(
            (packet.source_port, packet.destination_port, packet.protocol),
            (0x1234, 53, 17)
        );
        assert_eq!(packet.destination, Ipv4Addr::new(10, 0, 0, 2));
        for length in 0..30 {
            assert_eq!(Packet::in_frame(&frame[..length]), None, "{length}");
        }
    }
}
