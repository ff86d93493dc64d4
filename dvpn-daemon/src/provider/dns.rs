//! DNS for the node's clients: a small forwarder at the gateway address that relays to the machine's own resolvers.
//!
//! It reads no names and logs none. A question leaves under a fresh id from a fresh port, and only an answer to exactly
//! that question comes back.

use std::{
    collections::BTreeMap,
    fs, io,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use ipnetwork::IpNetwork;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, UdpSocket},
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinSet,
    time::timeout,
};

mod question;

use question::{Asked, MAX_UDP_BYTES};

use super::limiter::{Limiter, Rate};
use crate::{control_plane::Marked, resolve::Sockets as _};

const PORT: u16 = 53;
const MAX_QUESTIONS: usize = 512;
const MAX_CONNECTIONS: usize = 128;
const MAX_CONNECTIONS_EACH: usize = 8;
const ANSWER_WITHIN: Duration = Duration::from_secs(2);
const IDLE: Duration = Duration::from_secs(10);
const EACH: Rate = Rate {
    per_second: 100.0,
    burst: 200.0,
};
const ALL: Rate = Rate {
    per_second: 5000.0,
    burst: 5000.0,
};

/// The machine's resolvers, as `/etc/resolv.conf` names them (resolv.conf(5)); loopback ones included.
pub fn system_resolvers() -> io::Result<Vec<SocketAddr>> {
    Ok(parse_resolv_conf(&fs::read_to_string("/etc/resolv.conf")?))
}

fn parse_resolv_conf(text: &str) -> Vec<SocketAddr> {
    let server = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let address = (words.next()? == "nameserver").then(|| words.next())??;
        address.parse::<IpAddr>().ok().map(|ip| SocketAddr::new(ip, PORT))
    };
    text.lines().filter_map(server).take(3).collect()
}

/// A bound forwarder.
pub struct Forwarder {
    shared: Arc<Shared>,
    udp: Vec<UdpSocket>,
    tcp: Vec<TcpListener>,
}

struct Shared {
    networks: Vec<IpNetwork>,
    resolvers: Vec<SocketAddr>,
    questions: Arc<Semaphore>,
    connections: Arc<Semaphore>,
    per_client: Mutex<BTreeMap<IpAddr, usize>>,
    limiter: Mutex<Limiter>,
}

impl Forwarder {
    /// Binds port 53 at our own address in each network. Needs `CAP_NET_BIND_SERVICE`.
    pub async fn bind(networks: Vec<IpNetwork>, resolvers: Vec<SocketAddr>) -> io::Result<Self> {
        let (mut udp, mut tcp) = (Vec::new(), Vec::new());
        for network in &networks {
            udp.push(UdpSocket::bind((network.ip(), PORT)).await?);
            tcp.push(TcpListener::bind((network.ip(), PORT)).await?);
        }
        let shared = Arc::new(Shared {
            networks,
            resolvers,
            questions: Arc::new(Semaphore::new(MAX_QUESTIONS)),
            connections: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
            per_client: Mutex::default(),
            limiter: Mutex::new(Limiter::new(EACH, ALL, 8192, Instant::now())),
        });
        Ok(Self { shared, udp, tcp })
    }

    /// Serves until dropped.
    pub async fn run(self) {
        let mut tasks = JoinSet::new();
        for socket in self.udp {
            tasks.spawn(serve_udp(Arc::new(socket), Arc::clone(&self.shared)));
        }
        for listener in self.tcp {
            tasks.spawn(serve_tcp(listener, Arc::clone(&self.shared)));
        }
        while tasks.join_next().await.is_some() {}
    }
}

async fn serve_udp(socket: Arc<UdpSocket>, shared: Arc<Shared>) {
    let mut questions = JoinSet::new();
    let mut buffer = vec![0; MAX_UDP_BYTES];
    loop {
        while questions.try_join_next().is_some() {}
        let Ok((length, client)) = socket.recv_from(&mut buffer).await else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let (Some(question), Some(permit)) = (buffer.get(..length), shared.admit_question(client.ip())) else {
            continue;
        };
        let (question, socket, shared) = (question.to_vec(), Arc::clone(&socket), Arc::clone(&shared));
        questions.spawn(async move {
            let _held = permit;
            if let Some(answer) = shared.ask_udp(&question).await {
                // The client asks again if this gets lost.
                drop(socket.send_to(&answer, client).await);
            }
        });
    }
}

async fn serve_tcp(listener: TcpListener, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let Ok((stream, client)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let Ok(permit) = Arc::clone(&shared.connections).try_acquire_owned() else {
            continue;
        };
        let Some(seat) = Seat::take(&shared, client.ip()) else {
            continue;
        };
        let shared = Arc::clone(&shared);
        connections.spawn(async move {
            let _held = (permit, seat);
            // A client that breaks off, or no resolver: closing says it.
            drop(shared.relay_tcp(stream, client.ip()).await);
        });
    }
}

/// One of a client's few connections.
struct Seat(Arc<Shared>, IpAddr);

impl Seat {
    fn take(shared: &Arc<Shared>, client: IpAddr) -> Option<Self> {
        if !shared.is_client(client) {
            return None;
        }
        let mut counts = shared.per_client.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(client).or_insert(0);
        if *count >= MAX_CONNECTIONS_EACH {
            return None;
        }
        *count += 1;
        Some(Self(Arc::clone(shared), client))
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut counts = self.0.per_client.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.1) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                counts.remove(&self.1);
            }
        }
    }
}

impl Shared {
    fn is_client(&self, client: IpAddr) -> bool {
        self.networks.iter().any(|network| network.contains(client))
    }

    fn admit_question(&self, client: IpAddr) -> Option<OwnedSemaphorePermit> {
        let mut limiter = self.limiter.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.is_client(client) || !limiter.allows(client, Instant::now()) {
            return None;
        }
        Arc::clone(&self.questions).try_acquire_owned().ok()
    }

    /// Asks each resolver in turn; nothing if none answers in time or the question is none.
    async fn ask_udp(&self, question: &[u8]) -> Option<Vec<u8>> {
        let asked = Asked::new(question, rand::random())?;
        for resolver in &self.resolvers {
            if let Ok(Ok(answer)) = timeout(ANSWER_WITHIN, asked.over_udp(*resolver)).await {
                return Some(asked.restore(answer));
            }
        }
        None
    }

    async fn relay_tcp(&self, mut client: TcpStream, address: IpAddr) -> io::Result<()> {
        loop {
            let question = timeout(IDLE, read_message(&mut client)).await??;
            let asked = Asked::new(&question, rand::random()).ok_or(io::ErrorKind::InvalidData)?;
            let _permit = self.admit_question(address).ok_or(io::ErrorKind::QuotaExceeded)?;
            let mut answer = None;
            for resolver in &self.resolvers {
                if let Ok(Ok(found)) = timeout(ANSWER_WITHIN, asked.over_tcp(*resolver)).await {
                    answer = Some(asked.restore(found));
                    break;
                }
            }
            let answer = answer.ok_or(io::ErrorKind::TimedOut)?;
            timeout(IDLE, write_message(&mut client, &answer)).await??;
        }
    }
}

impl Asked {
    async fn over_udp(&self, resolver: SocketAddr) -> io::Result<Vec<u8>> {
        let socket = Marked.udp(resolver.ip(), 0)?;
        socket.connect(resolver).await?;
        socket.send(&self.packet).await?;
        let mut buffer = vec![0; MAX_UDP_BYTES];
        loop {
            let length = socket.recv(&mut buffer).await?;
            if let Some(answer) = buffer.get(..length).filter(|answer| self.is_answered_by(answer)) {
                return Ok(answer.to_vec());
            }
        }
    }

    async fn over_tcp(&self, resolver: SocketAddr) -> io::Result<Vec<u8>> {
        let mut stream = Marked.connect(resolver).await?;
        write_message(&mut stream, &self.packet).await?;
        let answer = read_message(&mut stream).await?;
        if self.is_answered_by(&answer) {
            Ok(answer)
        } else {
            Err(io::ErrorKind::InvalidData.into())
        }
    }
}

async fn read_message(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let length = stream.read_u16().await?;
    let mut message = vec![0; usize::from(length)];
    stream.read_exact(&mut message).await?;
    Ok(message)
}

async fn write_message(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(|_long| io::ErrorKind::InvalidData)?;
    stream.write_all(&[&length.to_be_bytes(), message].concat()).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolv_conf_names_up_to_three_resolvers() {
        let text = "# nameserver 192.0.2.9\nsearch lan\nnameserver 192.0.2.1\nnameserver 2001:db8::1 \nnameserver x\n\
                    nameserver 192.0.2.2\nnameserver 192.0.2.3\n";
        let found: Vec<String> = parse_resolv_conf(text).iter().map(ToString::to_string).collect();
        assert_eq!(found, ["192.0.2.1:53", "[2001:db8::1]:53", "192.0.2.2:53"]);
    }
}
