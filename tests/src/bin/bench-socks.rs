//! For `scripts/bench/socks.sh`: the daemon's proxy on an interface that stands for the tunnel, the server beyond it, and
//! the load.

use std::{
    net::{IpAddr, SocketAddr},
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use clap::{Parser, Subcommand};
use dvpn_daemon::socks5::{self, TunnelPath};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::{Barrier, watch},
    task::JoinSet,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

/// As the daemon has.
const WORKERS: usize = 2;
const CHUNK_BYTES: usize = 1 << 18;
const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    command: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// The daemon's proxy, its connections bound to an interface and an address of it.
    Proxy {
        listen: SocketAddr,
        interface: String,
        address: IpAddr,
    },
    /// Answers eight bytes, a number in network order, with as many bytes.
    Server { listen: SocketAddr },
    /// Opens connections, all before the first is used, and reads so many bytes by each. Prints the seconds from the first
    /// question to the last byte, then, while all connections stand, the KiB that `--watch` takes.
    Load {
        target: SocketAddr,
        #[arg(long)]
        proxy: Option<SocketAddr>,
        #[arg(long, default_value_t = 1)]
        connections: usize,
        #[arg(long)]
        bytes: u64,
        /// A process whose memory, with its children's, is read while all connections stand.
        #[arg(long)]
        watch: Option<u32>,
    },
}

fn main() -> ExitCode {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .enable_all()
        .build();
    let done = runtime
        .context("starting a runtime")
        .and_then(|runtime| runtime.block_on(run(Cli::parse().command)));
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&mut std::io::stderr(), &format!("bench-socks: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn say(out: &mut impl std::io::Write, line: &str) {
    drop(writeln!(out, "{line}").and_then(|()| out.flush()));
}

async fn run(verb: Verb) -> Result<()> {
    match verb {
        Verb::Proxy {
            listen,
            interface,
            address,
        } => proxy(listen, &interface, address).await,
        Verb::Server { listen } => server(listen).await,
        Verb::Load {
            target,
            proxy,
            connections,
            bytes,
            watch,
        } => load(target, proxy, connections, bytes, watch).await,
    }
}

async fn proxy(listen: SocketAddr, interface: &str, address: IpAddr) -> Result<()> {
    let listener = TcpListener::bind(listen).await.context("listening")?;
    let nobody = SocketAddr::new(address, 53);
    let path = TunnelPath::new(interface, &[address], &[], &[nobody]).context("preparing the way out")?;
    let (_stands, tunnel) = watch::channel(Some(Arc::new(path)));
    socks5::serve(listener, None, tunnel, Arc::default(), CancellationToken::new()).await;
    Ok(())
}

async fn server(listen: SocketAddr) -> Result<()> {
    let listener = TcpListener::bind(listen).await.context("listening")?;
    loop {
        let (mut client, _) = listener.accept().await.context("accepting")?;
        tokio::spawn(async move {
            let zeros = vec![0; CHUNK_BYTES];
            while let Ok(mut left) = client.read_u64().await {
                while left > 0 {
                    let chunk = usize::try_from(left).unwrap_or(CHUNK_BYTES).min(CHUNK_BYTES);
                    if client.write_all(zeros.get(..chunk).unwrap_or_default()).await.is_err() {
                        return;
                    }
                    left = left.saturating_sub(u64::try_from(chunk).unwrap_or(left));
                }
            }
        });
    }
}

/// A connection to `target`, by the proxy if there is one (RFC 1928).
async fn open(target: SocketAddr, proxy: Option<SocketAddr>) -> Result<TcpStream> {
    let Some(proxy) = proxy else {
        return TcpStream::connect(target).await.context("connecting");
    };
    let mut stream = TcpStream::connect(proxy).await.context("connecting to the proxy")?;
    stream.write_all(&[5, 1, 0]).await.context("greeting the proxy")?;
    let mut answer = [0; 2];
    stream.read_exact(&mut answer).await.context("reading its greeting")?;
    ensure!(answer == [5, 0], "the proxy wants {answer:?}");
    let SocketAddr::V4(v4) = target else {
        anyhow::bail!("the benchmark is for IPv4")
    };
    let mut request = vec![5, 1, 0, 1];
    request.extend(v4.ip().octets());
    request.extend(v4.port().to_be_bytes());
    stream.write_all(&request).await.context("asking the proxy")?;
    let mut answer = [0; 10];
    stream.read_exact(&mut answer).await.context("reading its answer")?;
    ensure!(answer.starts_with(&[5, 0, 0, 1]), "the proxy answered {answer:?}");
    Ok(stream)
}

async fn load(
    target: SocketAddr,
    proxy: Option<SocketAddr>,
    connections: usize,
    bytes: u64,
    watch: Option<u32>,
) -> Result<()> {
    // Beside the connections there is whoever takes the time.
    let stand = Arc::new(Barrier::new(connections.saturating_add(1)));
    let mut running = JoinSet::new();
    for _ in 0..connections {
        let mut stream = timeout(PATIENCE, open(target, proxy))
            .await
            .context("opening in time")??;
        let stand = Arc::clone(&stand);
        running.spawn(async move {
            stand.wait().await;
            stream.write_u64(bytes).await.context("asking")?;
            let size = usize::try_from(bytes).unwrap_or(CHUNK_BYTES).min(CHUNK_BYTES);
            let mut buffer = vec![0; size];
            let mut left = bytes;
            while left > 0 {
                let read = stream.read(&mut buffer).await.context("reading")?;
                ensure!(read > 0, "{left} bytes are missing");
                left = left.saturating_sub(u64::try_from(read).unwrap_or(left));
            }
            Ok(stream)
        });
    }
    stand.wait().await;
    let begun = Instant::now();
    let mut standing = Vec::new();
    while let Some(ended) = running.join_next().await {
        standing.push(ended.context("a connection's task")??);
    }
    let took = begun.elapsed().as_secs_f64();
    let resident = watch.map_or(Ok(0), resident_kib)?;
    drop(standing);
    say(&mut std::io::stdout(), &format!("{took:.4} {resident}"));
    Ok(())
}

/// Of a process and its children.
fn resident_kib(pid: u32) -> Result<u64> {
    let children =
        std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).context("reading its children")?;
    let children = children.split_whitespace().map(|child| resident_kib(child.parse()?));
    let own = own_resident_kib(pid);
    children.chain([own]).sum()
}

fn own_resident_kib(pid: u32) -> Result<u64> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = std::fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    // Private and its share of the rest: a proxy of many processes is not charged for its program once for each.
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"));
    line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse().ok())
        .with_context(|| format!("{path} has no Pss"))
}
