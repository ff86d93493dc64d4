//! A network that wants a login: its name server gives every name the portal's address, its web server sends everybody to
//! a page at a port of its own, and nothing further away answers until somebody has logged in there.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result};
use dvpn_tests::{
    namespace::Namespace,
    network::{CLIENT, POOL, ROUTER},
    world::World,
};

/// The pool's name there.
pub(super) const POOL_NAME: &str = "pool.dvpn.test";
/// Where everybody is sent.
pub(super) const LOGIN: &str = "http://login.hotel.test:8880/welcome";
/// Its port.
pub(super) const LOGIN_PORT: u16 = 8880;
const PAUSE: Duration = Duration::from_millis(5);

/// Running until dropped.
pub(super) struct Hotel {
    captive: Arc<AtomicBool>,
    logged_in: Arc<AtomicBool>,
    end: Arc<AtomicBool>,
}

impl Hotel {
    /// Opens in the namespace of the router; it lets everybody through for now.
    pub(super) fn open(internet: &Namespace) -> Result<Self> {
        let hotel = Self {
            captive: Arc::default(),
            logged_in: Arc::default(),
            end: Arc::default(),
        };
        let names = internet
            .run(|| UdpSocket::bind((ROUTER, 53)))?
            .context("the name server")?;
        let (captive, end) = (Arc::clone(&hotel.captive), Arc::clone(&hotel.end));
        names.set_read_timeout(Some(PAUSE))?;
        std::thread::spawn(move || serve_names(&names, &captive, &end));
        for port in [80, LOGIN_PORT] {
            let listener = internet.listen((ROUTER, port).into())?;
            listener.set_nonblocking(true)?;
            let (logged_in, end) = (Arc::clone(&hotel.logged_in), Arc::clone(&hotel.end));
            std::thread::spawn(move || serve_pages(&listener, &logged_in, &end));
        }
        Ok(hotel)
    }

    /// From now on nobody gets through.
    pub(super) fn close_doors(&self, world: &World) -> Result<()> {
        self.captive.store(true, Ordering::Relaxed);
        self.logged_in.store(false, Ordering::Relaxed);
        far_away(world, "add unreachable")
    }

    /// Waits for nothing: once somebody has logged in, lets everybody through.
    pub(super) fn welcome(&self, world: &World) -> Result<bool> {
        if !self.logged_in.load(Ordering::Relaxed) {
            return Ok(false);
        }
        self.captive.store(false, Ordering::Relaxed);
        far_away(world, "del unreachable").map(|()| true)
    }
}

impl Drop for Hotel {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
    }
}

/// Whether those far away can answer the client.
fn far_away(world: &World, change: &str) -> Result<()> {
    let providers = world.network.providers.iter();
    for machine in providers.chain([&world.network.pool]) {
        machine.namespace.ip(&format!("route {change} {CLIENT}/32"))?;
    }
    Ok(())
}

fn serve_names(socket: &UdpSocket, captive: &AtomicBool, end: &AtomicBool) {
    let mut buffer = [0; 512];
    while !end.load(Ordering::Relaxed) {
        let Ok((length, from)) = socket.recv_from(&mut buffer) else {
            continue;
        };
        let address = if captive.load(Ordering::Relaxed) { ROUTER } else { POOL };
        if let Some(answer) = buffer.get(..length).and_then(|query| name_answer(query, address)) {
            drop(socket.send_to(&answer, from));
        }
    }
}

/// Every name has this address (RFC 1035, section 4); none has another kind of record.
fn name_answer(query: &[u8], address: Ipv4Addr) -> Option<Vec<u8>> {
    let (header, question) = query.split_at_checked(12)?;
    let labels = question.iter().position(|byte| *byte == 0)?;
    let question = question.get(..labels.checked_add(5)?)?;
    let is_a = question.ends_with(&[0, 1, 0, 1]);
    let mut answer = header.get(..2)?.to_vec();
    answer.extend([0x81, 0x80, 0, 1, 0, u8::from(is_a), 0, 0, 0, 0]);
    answer.extend(question);
    if is_a {
        answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 5, 0, 4]);
        answer.extend(address.octets());
    }
    Some(answer)
}

fn serve_pages(listener: &TcpListener, logged_in: &AtomicBool, end: &AtomicBool) {
    while !end.load(Ordering::Relaxed) {
        match listener.accept() {
            Ok((stream, _)) => drop(serve_page(stream, logged_in)),
            Err(_) => std::thread::sleep(PAUSE),
        }
    }
}

fn serve_page(mut stream: TcpStream, logged_in: &AtomicBool) -> Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(Duration::from_secs(2)))?;
    let port = stream.local_addr()?.port();
    let mut lines = BufReader::new(stream.try_clone()?);
    let mut request = String::new();
    lines.read_line(&mut request)?;
    let mut body = 0;
    loop {
        let mut line = String::new();
        lines.read_line(&mut line)?;
        if line.trim_end().is_empty() {
            break;
        }
        if let Some(length) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            body = length.trim().parse().unwrap_or(0);
        }
    }
    lines.take(body).read_to_end(&mut Vec::new())?;
    let (head, page) = match (port, request.starts_with("POST /login ")) {
        (LOGIN_PORT, true) => {
            logged_in.store(true, Ordering::Relaxed);
            ("200 OK".to_owned(), "welcome")
        }
        (LOGIN_PORT, false) => ("200 OK".to_owned(), "log in here"),
        _ => (format!("302 Found\r\nLocation: {LOGIN}"), ""),
    };
    write!(
        stream,
        "HTTP/1.1 {head}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{page}",
        page.len()
    )?;
    Ok(())
}

/// The portal's own web server, which everybody's requests come to.
pub(super) fn front() -> SocketAddr {
    (ROUTER, 80).into()
}
