//! A window onto the tunnel of a provider: which peers its device has, asked of the device itself and not of what the
//! node believes, and a way to plant one. The daemon that has it is `watched-daemon`; the product has none.
//!
//! One question a line, one answer a line, over a Unix socket:
//!
//! | question | answer |
//! |---|---|
//! | `peers` | `peers` and the keys, separated by spaces |
//! | `plant KEY` | `planted` |
//! | else, or a device that does not answer | `error` and why |

use std::{
    collections::BTreeSet,
    io::{BufRead as _, BufReader, ErrorKind, Write as _},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use dvpn_common::{keys::PublicKey, status::TunnelBackend};
use dvpn_daemon::{
    provider::TunnelFactory,
    tunnel::{self, Error, PeerConfig, PeerStats, Renewal, Tunnel},
};
use futures::future::BoxFuture;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _},
    net::UnixListener,
    sync::RwLock,
    task::JoinHandle,
};

/// Environment of `watched-daemon`: where the window is.
pub const VARIABLE: &str = "WATCHED_DAEMON_WINDOW";
const TIMEOUT: Duration = Duration::from_secs(5);

/// The machine's WireGuard devices, each with a window at `socket`.
pub fn device(socket: PathBuf) -> TunnelFactory {
    Arc::new(move |config| {
        let socket = socket.clone();
        Box::pin(async move {
            let tunnel = tunnel::create(config).await?;
            Ok(Box::new(Watched::open(tunnel, &socket)?) as Box<dyn Tunnel>)
        })
    })
}

/// Nothing once the device is closed.
type Device = Arc<RwLock<Option<Box<dyn Tunnel>>>>;

struct Watched {
    interface: String,
    backend: TunnelBackend,
    device: Device,
    window: JoinHandle<()>,
}

impl Watched {
    fn open(tunnel: Box<dyn Tunnel>, socket: &Path) -> Result<Self, Error> {
        let (interface, backend) = (tunnel.interface().to_owned(), tunnel.backend());
        // A killed run leaves its socket.
        drop(std::fs::remove_file(socket));
        let listener = UnixListener::bind(socket).map_err(|source| Error::Create {
            interface: interface.clone(),
            source,
        })?;
        let device = Arc::new(RwLock::new(Some(tunnel)));
        let window = tokio::spawn(serve(listener, Arc::clone(&device)));
        Ok(Self {
            interface,
            backend,
            device,
            window,
        })
    }

    fn closed(&self) -> Error {
        Error::Stopped(self.interface.clone())
    }
}

async fn serve(listener: UnixListener, device: Device) {
    while let Ok((stream, _)) = listener.accept().await {
        tokio::spawn(answer(stream, Arc::clone(&device)));
    }
}

async fn answer(mut stream: tokio::net::UnixStream, device: Device) {
    let (questions, mut answers) = stream.split();
    let mut questions = tokio::io::BufReader::new(questions).lines();
    while let Ok(Some(question)) = questions.next_line().await {
        let mut answer = match &*device.read().await {
            Some(tunnel) => reply(tunnel.as_ref(), &question).await,
            None => "error the device is closed".to_owned(),
        };
        answer.push('\n');
        // Who asked may have gone.
        if answers.write_all(answer.as_bytes()).await.is_err() {
            return;
        }
    }
}

async fn reply(tunnel: &dyn Tunnel, question: &str) -> String {
    let done = match question.split_once(' ') {
        None if question == "peers" => tunnel.stats().await.map(|stats| {
            let keys = stats.iter().map(|peer| format!(" {}", peer.public_key));
            format!("peers{}", keys.collect::<String>())
        }),
        Some(("plant", key)) => match key.parse() {
            Ok(public_key) => {
                let peer = PeerConfig {
                    public_key,
                    endpoint: None,
                    allowed_ips: Vec::new(),
                    keepalive: None,
                };
                tunnel.set_peers(vec![peer]).await.map(|()| "planted".to_owned())
            }
            Err(error) => return format!("error {error}"),
        },
        None | Some(_) => return "error no such question".to_owned(),
    };
    done.unwrap_or_else(|error| format!("error {error}"))
}

impl Tunnel for Watched {
    fn interface(&self) -> &str {
        &self.interface
    }

    fn backend(&self) -> TunnelBackend {
        self.backend
    }

    fn set_peers(&self, peers: Vec<PeerConfig>) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(async move {
            let device = self.device.read().await;
            device.as_ref().ok_or_else(|| self.closed())?.set_peers(peers).await
        })
    }

    fn remove_peer(&self, peer: PublicKey) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(async move {
            let device = self.device.read().await;
            device.as_ref().ok_or_else(|| self.closed())?.remove_peer(peer).await
        })
    }

    fn stats(&self) -> BoxFuture<'_, Result<Vec<PeerStats>, Error>> {
        Box::pin(async move {
            let device = self.device.read().await;
            device.as_ref().ok_or_else(|| self.closed())?.stats().await
        })
    }

    fn force_handshake(&self, peer: PublicKey, timeout: Duration) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(async move {
            let device = self.device.read().await;
            let device = device.as_ref().ok_or_else(|| self.closed())?;
            device.force_handshake(peer, timeout).await
        })
    }

    fn rebind(&self) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(async move {
            let device = self.device.read().await;
            device.as_ref().ok_or_else(|| self.closed())?.rebind().await
        })
    }

    fn renew(&self, renewal: Renewal) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(async move {
            let device = self.device.read().await;
            device.as_ref().ok_or_else(|| self.closed())?.renew(renewal).await
        })
    }

    fn listen_port(&self) -> BoxFuture<'_, Result<u16, Error>> {
        Box::pin(async move {
            let device = self.device.read().await;
            device.as_ref().ok_or_else(|| self.closed())?.listen_port().await
        })
    }

    fn died(&self) -> BoxFuture<'_, String> {
        Box::pin(async move {
            match &*self.device.read().await {
                Some(tunnel) => tunnel.died().await,
                None => "the device is closed".to_owned(),
            }
        })
    }

    fn close(self: Box<Self>) -> BoxFuture<'static, ()> {
        Box::pin(async move {
            self.window.abort();
            if let Some(tunnel) = self.device.write().await.take() {
                tunnel.close().await;
            }
        })
    }
}

/// The outside of a window. It outlives the daemon: whoever runs next at the same socket is asked.
pub struct Window {
    socket: PathBuf,
    stream: Option<BufReader<UnixStream>>,
}

impl Window {
    /// Onto the daemon whose window is at `socket`.
    pub fn new(socket: &Path) -> Self {
        Self {
            socket: socket.to_owned(),
            stream: None,
        }
    }

    /// The device's peers; nothing while there is no device.
    pub fn peers(&mut self) -> Result<Option<BTreeSet<PublicKey>>> {
        let Some(answer) = self.ask("peers")? else {
            return Ok(None);
        };
        let keys = answer
            .strip_prefix("peers")
            .with_context(|| format!("the window says {answer:?}"))?;
        let keys: Result<BTreeSet<_>, _> = keys.split_whitespace().map(str::parse).collect();
        keys.map(Some).context("reading the keys of peers")
    }

    /// Makes a key a peer behind the node's back.
    pub fn plant(&mut self, key: &PublicKey) -> Result<()> {
        match self.ask(&format!("plant {key}"))?.as_deref() {
            Some("planted") => Ok(()),
            answer => bail!("the window says {answer:?}"),
        }
    }

    fn ask(&mut self, question: &str) -> Result<Option<String>> {
        let answer = self.exchange(question);
        if !matches!(answer, Ok(Some(_))) {
            self.stream = None;
        }
        answer
    }

    fn exchange(&mut self, question: &str) -> Result<Option<String>> {
        let stream = match &mut self.stream {
            Some(stream) => stream,
            None => match UnixStream::connect(&self.socket) {
                Ok(stream) => {
                    stream.set_read_timeout(Some(TIMEOUT)).context("setting a timeout")?;
                    self.stream.insert(BufReader::new(stream))
                }
                Err(error) if is_gone(&error) => return Ok(None),
                Err(error) => return Err(error).with_context(|| format!("opening {}", self.socket.display())),
            },
        };
        match stream.get_mut().write_all(format!("{question}\n").as_bytes()) {
            Ok(()) => {}
            Err(error) if is_gone(&error) => return Ok(None),
            Err(error) => return Err(error).context("asking at the window"),
        }
        let mut answer = String::new();
        match stream.read_line(&mut answer) {
            Ok(_) if answer.ends_with('\n') => Ok(Some(answer.trim_end().to_owned())),
            // Killed in the middle of an answer.
            Ok(_) => Ok(None),
            Err(error) if is_gone(&error) => Ok(None),
            Err(error) => Err(error).context("listening at the window"),
        }
    }
}

/// Whether the daemon is not there.
fn is_gone(error: &std::io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::NotFound | ErrorKind::ConnectionRefused | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe
    )
}
