//! A tunnel interface with its shaper, and its peers in another network namespace at the other end of a pump.
//!
//! The tunnel is a TUN device whose packets a thread carries to another one: a tunnel in user space without the
//! encryption.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    path::PathBuf,
    process::{Command, Stdio},
    sync::Arc,
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use dvpn_common::rate::Rate;
use dvpn_daemon::{
    ebpf::Loader,
    host::{Grant, Host, Mode, Shaper, ShaperConfig},
};
use dvpn_tests::namespace::Namespace;
use tokio::runtime::Runtime;
use tun_rs::{DeviceBuilder, SyncDevice};

use crate::bed::Bed;

/// The tunnel's interface.
pub(crate) const TUNNEL: &str = "dvpnp0";
/// Our address in it.
pub(crate) const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 1);
pub(crate) const MTU: u16 = 1420;

/// The address of a peer, beginning with 0.
pub(crate) fn peer(number: u8) -> IpAddr {
    Ipv4Addr::new(10, 9, 0, 2 + number).into()
}

/// A rate of a test. An emulated machine carries less: `DVPN_TEST_RATE_DIVISOR` makes all of them smaller.
pub(crate) fn mbit(rate: u64) -> Rate {
    let divisor = std::env::var("DVPN_TEST_RATE_DIVISOR").map_or(1, |divisor| divisor.parse().unwrap());
    Rate::from_bits_per_second(rate * 1_000_000 / divisor)
}

/// So many tenths of it.
pub(crate) fn tenths(rate: Rate, tenths: u64) -> Rate {
    Rate::from_bits_per_second(rate.bits_per_second() * tenths / 10)
}

/// The program that stands for a daemon.
pub(crate) fn holder() -> PathBuf {
    std::env::var_os("DVPN_BIN_DIR").map_or_else(
        || PathBuf::from(env!("CARGO_BIN_EXE_ebpf-loader")),
        |folder| PathBuf::from(folder).join("ebpf-loader"),
    )
}

pub(crate) fn grant(down: Rate, up: Rate) -> Grant {
    Grant {
        down,
        up,
        until: Instant::now() + Duration::from_hours(1),
    }
}

/// Everything of one test.
pub(crate) struct Live {
    pub(crate) runtime: Runtime,
    pub(crate) host: Host,
    pub(crate) loader: Loader,
    peers: Namespace,
    pump: Option<Pump>,
    offload: bool,
    // Last: it takes the file system of the pins down.
    pub(crate) bed: Bed,
}

impl Live {
    pub(crate) fn new() -> Self {
        Self::with_offload(true)
    }

    pub(crate) fn with_offload(offload: bool) -> Self {
        let bed = Bed::new();
        let peers = Namespace::create(&format!("dvpn-ebpf-{}", std::process::id())).unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let host = runtime.block_on(async { Host::open() }).unwrap();
        let loader = Loader::new(bed.pin_dir());
        let mut live = Self {
            runtime,
            host,
            loader,
            peers,
            pump: None,
            offload,
            bed,
        };
        live.connect();
        live
    }

    /// Makes the tunnel and its other end; both are up.
    pub(crate) fn connect(&mut self) {
        let ours = tunnel(self.offload, GATEWAY);
        let offload = self.offload;
        let theirs = self.peers.run(|| tunnel(offload, Ipv4Addr::new(10, 9, 0, 2))).unwrap();
        let more = (1..8).map(|number| format!("addr add {}/24 dev {TUNNEL}\n", peer(number)));
        self.peers.ip(&more.collect::<String>()).unwrap();
        self.pump = Some(Pump::start(ours, theirs));
    }

    /// Takes the tunnel away.
    pub(crate) fn disconnect(&mut self) {
        if let Some(pump) = self.pump.take() {
            // A test may have removed it.
            if nix::net::if_::if_nametoindex(TUNNEL).is_ok() {
                ip(&["link", "del", TUNNEL]);
            }
            self.peers.ip(&format!("link del {TUNNEL}")).unwrap();
            pump.end();
        }
    }

    pub(crate) fn config(best: Mode) -> ShaperConfig {
        ShaperConfig {
            best,
            ..ShaperConfig::new(TUNNEL, MTU)
        }
    }

    pub(crate) fn open(&self, best: Mode) -> Shaper {
        self.open_with(Self::config(best)).unwrap()
    }

    pub(crate) fn open_with(&self, config: ShaperConfig) -> Result<Shaper, dvpn_daemon::host::Error> {
        self.runtime.block_on(Shaper::open(&self.host, &self.loader, config))
    }

    /// A shaper with these peers granted, the first first, and the tunnel up.
    pub(crate) fn shaped(&self, best: Mode, grants: &[Grant]) -> Shaper {
        let mut shaper = self.open(best);
        for (number, grant) in grants.iter().enumerate() {
            let address = peer(u8::try_from(number).unwrap());
            self.runtime.block_on(shaper.grant(&[address], *grant)).unwrap();
        }
        Self::up();
        shaper
    }

    pub(crate) fn up() {
        ip(&["link", "set", TUNNEL, "up"]);
    }

    /// With IPv6 too: ours is `fd00:9::1`, the first peer's `fd00:9::2`.
    pub(crate) fn add_ipv6(&self) {
        fs::write(format!("/proc/sys/net/ipv6/conf/{TUNNEL}/disable_ipv6"), "0").unwrap();
        ip(&["addr", "add", "fd00:9::1/64", "dev", TUNNEL, "nodad"]);
        self.peers
            .ip(&format!("addr add fd00:9::2/64 dev {TUNNEL} nodad"))
            .unwrap();
    }

    /// TCP from us to a peer.
    pub(crate) fn download(&self, to: IpAddr, time: Duration) -> Carried {
        let listener = self.peers.listen(SocketAddr::new(to, 0)).unwrap();
        carry(listener, |at| TcpStream::connect_timeout(&at, time).ok(), time)
    }

    /// TCP from a peer to us.
    pub(crate) fn upload(&self, from: IpAddr, time: Duration) -> Carried {
        let gateway: IpAddr = if from.is_ipv4() {
            GATEWAY.into()
        } else {
            "fd00:9::1".parse().unwrap()
        };
        let listener = TcpListener::bind((gateway, 0)).unwrap();
        carry(listener, |at| connect_from(&self.peers, from, at, time), time)
    }

    /// UDP from us to a peer for so long, in packets of so many bytes of payload, faster than anything: the bytes of
    /// payload that arrive.
    pub(crate) fn flood(&self, to: IpAddr, payload: usize, time: Duration) -> (u64, Duration) {
        let receiver = self.peers.run(|| UdpSocket::bind((to, 0))).unwrap().unwrap();
        receiver.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        let at = receiver.local_addr().unwrap();
        let begin = Instant::now();
        let counting = thread::spawn(move || {
            let (mut bytes, mut buffer) = (0, [0; 2048]);
            while let Ok(length) = receiver.recv(&mut buffer) {
                bytes += length as u64;
            }
            bytes
        });
        let socket = UdpSocket::bind((GATEWAY, 0)).unwrap();
        let packet = vec![0; payload];
        while begin.elapsed() < time {
            // What the qdisc or the program drops is an error of the sender.
            for _ in 0..32 {
                socket.send_to(&packet, at).ok();
            }
            thread::yield_now();
        }
        let sent = begin.elapsed();
        (counting.join().unwrap(), sent)
    }

    /// Whether a packet of the peer reaches us.
    pub(crate) fn reaches_us(&self, from: IpAddr) -> bool {
        let receiver = UdpSocket::bind((GATEWAY, 0)).unwrap();
        receiver.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        let at = receiver.local_addr().unwrap();
        let sender = self.peers.run(|| UdpSocket::bind((from, 0))).unwrap().unwrap();
        sender.send_to(b"hello", at).ok();
        receiver.recv(&mut [0; 16]).is_ok()
    }

    /// Whether a packet of ours reaches the peer.
    pub(crate) fn reaches(&self, to: IpAddr) -> bool {
        let receiver = self.peers.run(|| UdpSocket::bind((to, 0))).unwrap().unwrap();
        receiver.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        let socket = UdpSocket::bind((GATEWAY, 0)).unwrap();
        socket.send_to(b"hello", receiver.local_addr().unwrap()).ok();
        receiver.recv(&mut [0; 16]).is_ok()
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        if thread::panicking() && self.pump.is_some() {
            // Where the packets of a failed test went.
            let links = Command::new("ip")
                .args(["-s", "-s", "link"])
                .output()
                .map(|output| output.stdout);
            let links = String::from_utf8_lossy(&links.unwrap_or_default()).into_owned();
            eprintln!("{}\n{links}", tc(&["-s", "qdisc", "show"]));
        }
        self.disconnect();
    }
}

/// What one TCP connection carried, in bytes of payload, from its first packet to its last.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Carried {
    pub(crate) bytes: u64,
    pub(crate) time: Duration,
}

impl Carried {
    /// Of what a grant allows, as a fraction: goodput of full packets is 1368 of 1420 bytes.
    pub(crate) fn of(&self, rate: Rate) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "a few percent are meant")]
        let (bytes, possible) = (
            self.bytes as f64,
            rate.bytes_per_second() as f64 * self.time.as_secs_f64(),
        );
        bytes / (possible * 1368.0 / 1420.0)
    }
}

/// Writes for so long into a connection that `connect` makes; what arrives.
fn carry(listener: TcpListener, connect: impl FnOnce(SocketAddr) -> Option<TcpStream>, time: Duration) -> Carried {
    let at = listener.local_addr().unwrap();
    let begin = Instant::now();
    let reader = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(time)).unwrap();
        let (mut bytes, mut last, mut buffer) = (0, Instant::now(), vec![0; 65_536]);
        while let Ok(length @ 1..) = stream.read(&mut buffer) {
            bytes += length as u64;
            last = Instant::now();
        }
        (bytes, last)
    });
    let mut stream = connect(at).expect("a connection");
    stream.set_write_timeout(Some(time)).unwrap();
    let buffer = vec![0; 32_768];
    while begin.elapsed() < time && stream.write(&buffer).is_ok() {}
    drop(stream);
    let (bytes, last) = reader.join().unwrap();
    Carried {
        bytes,
        time: last - begin,
    }
}

fn connect_from(namespace: &Namespace, from: IpAddr, to: SocketAddr, time: Duration) -> Option<TcpStream> {
    namespace
        .run(|| {
            let domain = socket2::Domain::for_address(to);
            let socket = socket2::Socket::new(domain, socket2::Type::STREAM, None).ok()?;
            socket.bind(&SocketAddr::new(from, 0).into()).ok()?;
            socket.connect_timeout(&to.into(), time).ok()?;
            Some(socket.into())
        })
        .unwrap()
}

pub(crate) fn ip(arguments: &[&str]) {
    let status = Command::new("ip")
        .args(arguments)
        .stdin(Stdio::null())
        .status()
        .expect("ip(8): install iproute2");
    assert!(status.success(), "ip {arguments:?}");
}

/// What tc(8) says of a device.
pub(crate) fn tc(arguments: &[&str]) -> String {
    let output = Command::new("tc")
        .args(arguments)
        .output()
        .expect("tc(8): install iproute2");
    assert!(output.status.success(), "tc {arguments:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn tunnel(offload: bool, address: Ipv4Addr) -> SyncDevice {
    DeviceBuilder::new()
        .name(TUNNEL)
        .ipv4(address, 24, None)
        .mtu(MTU)
        .offload(offload)
        .build_sync()
        .unwrap()
}

/// Carries packets between two devices until both are gone.
struct Pump([JoinHandle<()>; 2]);

impl Pump {
    fn start(ours: SyncDevice, theirs: SyncDevice) -> Self {
        let (ours, theirs) = (Arc::new(ours), Arc::new(theirs));
        let carry = |from: &Arc<SyncDevice>, to: &Arc<SyncDevice>| {
            let (from, to) = (Arc::clone(from), Arc::clone(to));
            thread::spawn(move || {
                let mut buffer = vec![0; 66_000];
                while let Ok(length) = from.recv(&mut buffer) {
                    // The other side may be down for now.
                    to.send(&buffer[..length]).ok();
                }
            })
        };
        Self([carry(&ours, &theirs), carry(&theirs, &ours)])
    }

    fn end(self) {
        for thread in self.0 {
            thread.join().unwrap();
        }
    }
}
