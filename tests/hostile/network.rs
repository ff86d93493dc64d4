//! Two network namespaces for one test: `near`, where the proxy runs, and `far`, the Internet. They are joined twice, by
//! `dvpn0` (stands for the tunnel) and by `uplink`, which has near's default route: whatever is not bound to the tunnel
//! leaves there and is counted.

use std::{
    future::Future,
    net::{Ipv4Addr, SocketAddr},
    os::fd::{AsRawFd, OwnedFd},
    process::Command,
    sync::mpsc,
};

use nix::{
    net::if_::if_nametoindex,
    sched::{CloneFlags, setns},
    sys::socket::{AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, recvfrom, socket},
};
use tokio::{
    io::AsyncWriteExt,
    net::{TcpListener, UdpSocket},
};

use crate::certificates::run;

/// Near's address in the tunnel.
pub(crate) const NEAR: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 2);
/// Far's address in the tunnel: the gateway, where names resolve.
pub(crate) const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 1);
/// A server on the Internet.
pub(crate) const SERVER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 80);
/// Far's address on the uplink.
const UPLINK_FAR: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

/// The namespaces; they go when this is dropped.
pub(crate) struct Network {
    near: String,
    far: String,
}

impl Network {
    pub(crate) fn new(test: &str) -> Self {
        let this = Self {
            near: format!("dvpn-{test}-n{}", std::process::id()),
            far: format!("dvpn-{test}-f{}", std::process::id()),
        };
        let (near, far) = (&this.near, &this.far);
        for line in [
            format!("netns add {near}"),
            format!("netns add {far}"),
            format!("-n {near} link add dvpn0 type veth peer name dvpn0 netns {far}"),
            format!("-n {near} link add uplink type veth peer name uplink netns {far}"),
            format!("-n {near} addr add {NEAR}/24 dev dvpn0"),
            format!("-n {far} addr add {GATEWAY}/24 dev dvpn0"),
            format!("-n {near} addr add 192.0.2.2/24 dev uplink"),
            format!("-n {far} addr add {UPLINK_FAR}/24 dev uplink"),
            format!("-n {far} addr add {SERVER}/32 dev lo"),
            format!("-n {far} addr add 169.254.169.254/32 dev lo"),
        ] {
            ip(&line);
        }
        for name in [near, far] {
            for device in ["lo", "dvpn0", "uplink"] {
                ip(&format!("-n {name} link set {device} up"));
            }
        }
        ip(&format!("-n {near} route add default via {UPLINK_FAR} dev uplink"));
        ip(&format!("-n {near} route add default dev dvpn0 table 100"));
        ip(&format!("-n {near} rule add oif dvpn0 lookup 100"));
        this
    }

    /// Runs something in near, on a thread of its own.
    pub(crate) fn near<T: Send + 'static>(&self, body: impl Future<Output = T> + Send + 'static) -> T {
        match enter(&self.near, body).join() {
            Ok(value) => value,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }

    /// Starts the Internet: TCP and UDP echo on port 7, which first say (TCP) or prefix (UDP) the source address, and
    /// names at the gateway. It ends with the process.
    pub(crate) fn start_far(&self) {
        let (ready, wait) = mpsc::channel();
        enter(&self.far, async move {
            let tcp = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 7)).await.unwrap();
            let udp = UdpSocket::bind((SERVER, 7)).await.unwrap();
            let dns = UdpSocket::bind((GATEWAY, 53)).await.unwrap();
            ready.send(()).unwrap();
            tokio::join!(echo_tcp(tcp), echo_udp(udp), names(dns));
        });
        wait.recv().unwrap();
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for name in [&self.near, &self.far] {
            Command::new("ip").args(["netns", "delete", name]).status().ok();
        }
    }
}

fn ip(line: &str) {
    run(Command::new("ip").args(line.split_whitespace()));
}

fn enter<T: Send + 'static>(
    namespace: &str,
    body: impl Future<Output = T> + Send + 'static,
) -> std::thread::JoinHandle<T> {
    let file = std::fs::File::open(format!("/run/netns/{namespace}")).unwrap();
    std::thread::spawn(move || {
        setns(file, CloneFlags::CLONE_NEWNET).unwrap();
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
            .block_on(body)
    })
}

async fn echo_tcp(listener: TcpListener) {
    loop {
        let (mut stream, from) = listener.accept().await.unwrap();
        tokio::spawn(async move {
            let (mut reader, mut writer) = stream.split();
            writer.write_all(format!("{}\n", from.ip()).as_bytes()).await.ok();
            tokio::io::copy(&mut reader, &mut writer).await.ok();
            writer.write_all(b"end").await.ok();
            writer.shutdown().await.ok();
        });
    }
}

async fn echo_udp(socket: UdpSocket) {
    let mut buffer = vec![0; 65_535];
    loop {
        let (length, from) = socket.recv_from(&mut buffer).await.unwrap();
        let reply = [from.ip().to_string().as_bytes(), b" ", &buffer[..length]].concat();
        socket.send_to(&reply, from).await.unwrap();
    }
}

/// `web.test` is the server, `inside.test` the gateway, `metadata.test` a cloud's metadata service; no other name and no
/// IPv6 address exists.
async fn names(socket: UdpSocket) {
    let mut buffer = [0; 512];
    loop {
        let (length, from) = socket.recv_from(&mut buffer).await.unwrap();
        let query = &buffer[..length];
        let end = 12 + query[12..].iter().position(|byte| *byte == 0).unwrap() + 5;
        let name = String::from_utf8_lossy(&query[13..end - 5]).to_lowercase();
        let address = match name.as_str() {
            "web\u{4}test" => Some(SERVER),
            "inside\u{4}test" => Some(GATEWAY),
            "metadata\u{4}test" => Some(Ipv4Addr::new(169, 254, 169, 254)),
            _ => None,
        };
        let is_a = query[end - 4..end - 2] == [0, 1];
        let mut reply = query[..2].to_vec();
        let answers = u8::from(is_a && address.is_some());
        reply.extend([
            0x81,
            if address.is_some() { 0x80 } else { 0x83 },
            0,
            1,
            0,
            answers,
            0,
            0,
            0,
            0,
        ]);
        reply.extend(&query[12..end]);
        if let (true, Some(address)) = (is_a, address) {
            reply.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
            reply.extend(address.octets());
        }
        socket.send_to(&reply, from).await.unwrap();
    }
}

/// Counts IPv4 packets on one interface of the namespace it is opened in.
pub(crate) struct Capture {
    socket: OwnedFd,
    index: usize,
}

impl Capture {
    pub(crate) fn open(interface: &str) -> Self {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let socket = socket(AddressFamily::Packet, SockType::Raw, flags, SockProtocol::EthAll).unwrap();
        Self {
            socket,
            index: if_nametoindex(interface).unwrap() as usize,
        }
    }

    /// Packets since the last call.
    pub(crate) fn count(&self) -> usize {
        let mut frame = [0; 2048];
        let mut seen = 0;
        while let Ok((length, Some(from))) = recvfrom::<LinkAddr>(self.socket.as_raw_fd(), &mut frame) {
            seen += usize::from(from.ifindex() == self.index && length > 14 && frame[12..14] == [0x08, 0x00]);
        }
        seen
    }

    /// Proves that the capture works: one packet is sent past the proxy and must be seen.
    pub(crate) async fn prove(&self) {
        let leak = UdpSocket::bind("0.0.0.0:0").await.unwrap();
        leak.send_to(b"leak", SocketAddr::new(SERVER.into(), 9)).await.unwrap();
        let deadline = tokio::time::Instant::now() + std::time::Duration::from_secs(5);
        while self.count() == 0 {
            assert!(tokio::time::Instant::now() < deadline, "the capture sees nothing");
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        // The far end's "port unreachable" may still arrive.
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        self.count();
    }
}
