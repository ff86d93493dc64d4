//! Two ends of a tunnel, of whichever backend the test program is about.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use dvpn_common::keys::{PrivateKey, PublicKey};
use dvpn_daemon::tunnel::{DEFAULT_MTU_BYTES, PeerConfig, Tunnel, TunnelConfig};
use gotatun::x25519;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};

use crate::{
    SLOWNESS,
    side::{self, Side},
};

pub(crate) const INTERFACE: &str = "inner";
pub(crate) const PORT: u16 = 51_820;
pub(crate) const SOON: Duration = Duration::from_secs(5 * SLOWNESS as u64);

/// A key pair from a seed byte.
pub(crate) fn key(seed: u8) -> (PrivateKey, PublicKey) {
    let private = PrivateKey::from_bytes([seed; 32]);
    let public = x25519::PublicKey::from(&x25519::StaticSecret::from(*private.expose()));
    (private, PublicKey::from_bytes(*public.as_bytes()).expect("not zero"))
}

/// What varies between the tests.
#[derive(Clone, Copy)]
pub(crate) struct Setup {
    pub(crate) offload: bool,
    pub(crate) outer_v6: bool,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            offload: true,
            outer_v6: false,
        }
    }
}

pub(crate) fn outer(end: u8, v6: bool) -> SocketAddr {
    let address = if v6 {
        format!("fd77::{end}")
    } else {
        format!("10.77.0.{end}")
    };
    SocketAddr::new(address.parse().expect("an address"), PORT)
}

/// End 1 calls, end 2 answers and learns where end 1 is.
pub(crate) fn config(end: u8, setup: Setup) -> TunnelConfig {
    let other = 3 - end;
    let peer = PeerConfig {
        public_key: key(other).1,
        endpoint: (end == 1).then(|| outer(2, setup.outer_v6)),
        allowed_ips: vec![
            format!("10.88.0.{other}/32").parse().expect("a prefix"),
            format!("fd88::{other}/128").parse().expect("a prefix"),
        ],
        keepalive: None,
    };
    TunnelConfig {
        interface: INTERFACE.to_owned(),
        private_key: key(end).0,
        listen_port: if end == 1 { 0 } else { PORT },
        fwmark: 0,
        mtu_bytes: DEFAULT_MTU_BYTES,
        peers: vec![peer],
        offload: setup.offload,
    }
}

/// Makes the tunnel of one end and gives its interface addresses 10.88.0.N and `fd88::N`.
pub(crate) fn open(side: &Side, end: u8, config: TunnelConfig) -> Result<Arc<dyn Tunnel>> {
    let tunnel = side.run(crate::create(config))??;
    let other = 3 - end;
    side.sh(&format!(
        "ip address add 10.88.0.{end}/32 peer 10.88.0.{other} dev {INTERFACE}
         ip address add fd88::{end}/128 dev {INTERFACE} nodad
         ip link set {INTERFACE} up
         ip route add fd88::{other}/128 dev {INTERFACE}"
    ))?;
    Ok(Arc::from(tunnel))
}

pub(crate) struct Pair {
    pub(crate) sides: [Arc<Side>; 2],
    pub(crate) tunnels: [Arc<dyn Tunnel>; 2],
}

pub(crate) fn pair(setup: Setup) -> Result<Pair> {
    let sides = side::joined_pair()?;
    let tunnels = [
        open(&sides[0], 1, config(1, setup))?,
        open(&sides[1], 2, config(2, setup))?,
    ];
    Ok(Pair { sides, tunnels })
}

impl Pair {
    /// Sends `bytes` of a pattern from end 1 to end 2 and back over TCP; fails when a byte differs or nothing
    /// moves in time.
    pub(crate) fn transfer(&self, to: &str, bytes: usize, deadline: Duration) -> Result<Duration> {
        let address: IpAddr = to.parse()?;
        let listener = self.sides[1].run(async move { TcpListener::bind((address, 0)).await })??;
        let target = listener.local_addr()?;
        self.sides[1].spawn(async move {
            if let Ok((mut stream, _)) = listener.accept().await {
                let (mut read, mut write) = stream.split();
                tokio::io::copy(&mut read, &mut write).await.ok();
            }
        });
        self.sides[0].run(async move {
            let started = Instant::now();
            tokio::time::timeout(deadline, async move {
                let sent: Vec<u8> = (0..=250_u8).cycle().take(bytes).collect();
                let (mut read, mut write) = TcpStream::connect(target).await?.into_split();
                let copy = sent.clone();
                let sender = tokio::spawn(async move {
                    write.write_all(&copy).await?;
                    write.shutdown().await
                });
                let mut received = Vec::with_capacity(bytes);
                read.read_to_end(&mut received).await?;
                sender.await??;
                ensure!(
                    received == sent,
                    "{} of {bytes} bytes came back, or others",
                    received.len()
                );
                Ok(())
            })
            .await
            .context("nothing more moved through the tunnel")??;
            Ok(started.elapsed())
        })?
    }
}

/// Waits until `value` holds, at most [`SOON`].
pub(crate) fn eventually(what: &str, mut value: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + SOON;
    while !value()? {
        ensure!(Instant::now() < deadline, "not within {SOON:?}: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}
