//! What leaks are, looked for on the wire: packets that a client in device mode sends beside its tunnel.
//!
//! A [`LeakWatch`] first shows that it sees planted leaks, then floods: every few hundred microseconds an application of
//! every kind tries to send, whatever happens to the daemon meanwhile. [`LeakWatch::end`] fails if a single packet of
//! theirs left by the uplink, and shows again that it would have been seen.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::socket::{setsockopt, sockopt::BindToDevice};

use crate::{
    capture::{Capture, Packet, hardware_address, is_housekeeping},
    namespace::Namespace,
    network::{Machine, POOL, ROUTER, WEB, provider_address},
    node::{NODE_PORT, POOL_PORT},
    process::slowness,
};

/// The interface by which the machines of the local network reach the internet.
pub const UPLINK: &str = "eth0";
/// A host of IPv6 on the client's own link; it does not exist, and packets to it are seen all the same.
const NEIGHBOUR: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x80);
/// A pause between two rounds of everybody's attempts.
const PAUSE: Duration = Duration::from_millis(1);
/// What every attempt carries.
const PAYLOAD: &[u8] = b"this must not leave beside the tunnel";

/// A flood and a capture on one client's uplink.
pub struct LeakWatch {
    capture: Capture,
    senders: Senders,
    flood: Option<Flood>,
}

struct Flood {
    end: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
    thread: JoinHandle<()>,
}

impl LeakWatch {
    /// Begins on a client that blocks nothing yet: the planted leaks must be seen.
    pub fn begin(client: &Machine) -> Result<Self> {
        Self::begin_with(client, |_| false)
    }

    /// The same where the network expects more of the client than it does usually.
    pub fn begin_with(client: &Machine, expected: impl Fn(&Packet) -> bool + Send + 'static) -> Result<Self> {
        let expected = move |frame: &[u8]| {
            let planted = frame.ends_with(PAYLOAD);
            !planted && Packet::in_frame(frame).is_some_and(|packet| expected(&packet))
        };
        let mine = hardware_address(&client.namespace, UPLINK)?;
        let capture = Capture::start(&client.namespace, UPLINK, move |frame| {
            frame.get(6..12) == Some(mine.as_slice())
                && !is_housekeeping(frame)
                && !is_expected(frame)
                && !expected(frame)
        })?;
        // IPv6 without a router: an application can reach its own link.
        client.namespace.ip(&format!(
            "addr replace 2001:db8::20/64 dev {UPLINK} nodad\nneigh replace {NEIGHBOUR} lladdr 02:00:00:00:00:80 dev {UPLINK}"
        ))?;
        let mut watch = Self {
            capture,
            senders: Senders::open(&client.namespace, client.address)?,
            flood: None,
        };
        watch.plant()?;
        Ok(watch)
    }

    /// Begins to flood; what is seen from now on is a leak. To be called once the client blocks.
    pub fn flood(&mut self) -> Result<()> {
        let (end, rounds) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let senders = self.senders.try_clone()?;
        let thread = std::thread::Builder::new()
            .name("flood".into())
            .spawn({
                let (end, rounds) = (Arc::clone(&end), Arc::clone(&rounds));
                // The one processor of an emulated machine has something else to do too.
                let pause = if slowness() > 1 { PAUSE * 50 } else { PAUSE };
                move || {
                    while !end.load(Ordering::Relaxed) {
                        senders.send();
                        rounds.fetch_add(1, Ordering::Relaxed);
                        std::thread::sleep(pause);
                    }
                }
            })
            .context("starting the flood's thread")?;
        self.capture.forget();
        self.flood = Some(Flood { end, rounds, thread });
        Ok(())
    }

    /// Fails if a packet leaked so far.
    pub fn check(&self, what: &str) -> Result<()> {
        ensure!(
            self.capture.matched() == 0,
            "{what}: {} packets leaked: {:?}",
            self.capture.matched(),
            self.capture.samples()
        );
        Ok(())
    }

    /// Ends the flood; fails if a packet leaked. The client must block nothing any more after `open`, so that the last
    /// planted leaks are seen: a capture that died half-way shows nothing either. Returns how often everybody tried.
    pub fn end(mut self, open: impl FnOnce() -> Result<()>) -> Result<u64> {
        let mut tried = 0;
        if let Some(flood) = self.flood.take() {
            flood.end.store(true, Ordering::Relaxed);
            ensure!(flood.thread.join().is_ok(), "the flood's thread panicked");
            tried = flood.rounds.load(Ordering::Relaxed);
        }
        // What is on its way to the capture arrives.
        std::thread::sleep(Duration::from_millis(50));
        self.check("to the end")?;
        open()?;
        self.plant()?;
        Ok(tried)
    }

    /// Every sender's packet must be seen.
    fn plant(&mut self) -> Result<()> {
        self.capture.forget();
        let wanted = u64::try_from(self.senders.0.len()).unwrap_or(u64::MAX);
        self.senders.send();
        let seen = self
            .capture
            .wait_for_more(wanted.saturating_sub(1), Duration::from_secs(5));
        seen.with_context(|| format!("{} of {wanted} planted leaks were seen", self.capture.matched()))?;
        self.capture.forget();
        Ok(())
    }
}

impl Drop for LeakWatch {
    fn drop(&mut self) {
        if let Some(flood) = &self.flood {
            flood.end.store(true, Ordering::Relaxed);
        }
    }
}

/// Each a socket and where it sends.
struct Senders(Vec<(UdpSocket, SocketAddr)>);

impl Senders {
    /// Every way that an application has: any address, the uplink's, the uplink itself; to far away, to the local
    /// network's name server, to the pool and to the very endpoints of providers without being allowed to; and IPv6.
    fn open(namespace: &Namespace, own: Ipv4Addr) -> Result<Self> {
        let mut senders = Vec::new();
        let targets = [
            SocketAddr::from((WEB, 7)),
            SocketAddr::from((ROUTER, 53)),
            SocketAddr::from((POOL, POOL_PORT)),
            SocketAddr::from((POOL, 53)),
        ];
        for to in targets {
            senders.push((namespace.udp(Ipv4Addr::UNSPECIFIED.into())?, to));
            senders.push((namespace.udp(own.into())?, to));
            let bound = namespace.udp(Ipv4Addr::UNSPECIFIED.into())?;
            setsockopt(&bound, BindToDevice, &UPLINK.into()).context("binding to the uplink")?;
            senders.push((bound, to));
        }
        let endpoint = SocketAddr::from((provider_address(0), NODE_PORT));
        senders.push((namespace.udp(own.into())?, endpoint));
        let six = SocketAddr::from((NEIGHBOUR, 7));
        senders.push((namespace.udp(Ipv6Addr::UNSPECIFIED.into())?, six));
        Ok(Self(senders))
    }

    fn try_clone(&self) -> Result<Self> {
        let copy = |(socket, to): &(UdpSocket, SocketAddr)| Ok((socket.try_clone()?, *to));
        self.0.iter().map(copy).collect::<Result<Vec<_>>>().map(Self)
    }

    /// Once each; a refusal is as good as silence.
    fn send(&self) {
        for (socket, to) in &self.0 {
            drop(socket.send_to(PAYLOAD, to));
        }
    }
}

/// What a client in device mode sends by its uplink and what is no application's: WireGuard and echoes to providers, TLS
/// to the pool, questions to a name server beside it. Told by what it says, where an application could send to the same place.
fn is_expected(frame: &[u8]) -> bool {
    Packet::in_frame(frame).is_some_and(|packet| {
        let to_provider = (0..8).any(|number| packet.destination == provider_address(number));
        match packet.protocol {
            17 => {
                let to_responder = to_provider && [NODE_PORT, NODE_PORT + 1].contains(&packet.destination_port);
                let to_name_server = packet.destination == POOL && packet.destination_port == 53;
                (to_responder || to_name_server) && !frame.ends_with(PAYLOAD)
            }
            6 => packet.destination == POOL && packet.destination_port == POOL_PORT,
            _ => false,
        }
    })
}

/// The address that a server far away sees of an ordinary program on this machine.
pub fn exit_address(namespace: &Namespace, patience: Duration) -> Result<IpAddr> {
    let stream = namespace.connect((WEB, 80).into(), patience)?;
    stream.set_read_timeout(Some(patience)).context("setting a timeout")?;
    let (status, text) = crate::http::get_text(stream, "web.dvpn.test", "/")?;
    ensure!(status == 200, "the web server answered {status}: {text:?}");
    text.trim()
        .parse()
        .with_context(|| format!("the web server answered {text:?}"))
}
