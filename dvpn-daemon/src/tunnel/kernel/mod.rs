//! WireGuard in the kernel, by netlink: packets never come into this process.

mod device;
mod dump;
mod link;
mod message;
mod socket;
#[cfg(test)]
mod tests;

use std::{
    net::{Ipv4Addr, Ipv6Addr, UdpSocket},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use dvpn_common::{keys::PublicKey, status::TunnelBackend};
use futures::future::BoxFuture;
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};

use self::device::Device;
pub(super) use self::link::Link;
use super::{Error, PeerConfig, PeerStats, Renewal, Tunnel, TunnelConfig};

/// How soon an unanswered initiation is repeated while somebody waits for a handshake; each time twice as long. By
/// itself WireGuard repeats after 5 s.
const FIRST_RETRY: Duration = Duration::from_secs(1);
/// How long the peer may take to answer under a new key.
const HAND_OVER_LIMIT: Duration = Duration::from_secs(3);
/// The first and the longest pause between two looks whether hands were shaken: nothing reports it.
const LOOK_AFTER: Duration = Duration::from_millis(2);
const LOOK_AT_LEAST_EVERY: Duration = Duration::from_millis(50);

/// A WireGuard device in the kernel.
pub struct KernelTunnel {
    interface: String,
    device: Arc<Mutex<Device>>,
    death: watch::Receiver<Option<String>>,
    link: Link,
}

impl KernelTunnel {
    /// Makes the interface with its MTU, keys and peers. The link is left down and without addresses: routes and
    /// policy come first. The outer socket is there once the link is up. Needs `CAP_NET_ADMIN` and a kernel with
    /// WireGuard; without it the error is [`Error::Create`] with `EOPNOTSUPP` or `ENOENT`.
    pub async fn create(config: TunnelConfig) -> Result<Box<dyn Tunnel>, Error> {
        let link = Link::create(&config.interface, config.mtu_bytes)
            .await
            .map_err(|source| Error::Create {
                interface: config.interface.clone(),
                source,
            })?;
        Self::on(link, config).await
    }

    /// Sets up a link that is there; it is deleted when that fails.
    pub(super) async fn on(link: Link, config: TunnelConfig) -> Result<Box<dyn Tunnel>, Error> {
        let TunnelConfig {
            interface,
            private_key,
            listen_port,
            fwmark,
            peers,
            mtu_bytes: _,
            offload: _,
        } = config;
        // The kernel binds when the link comes up, which is too late for a useful error.
        try_port(listen_port).map_err(|source| Error::Socket {
            port: listen_port,
            source,
        })?;
        let device = Device::open(interface.clone(), link.index(), private_key, listen_port).map_err(|source| {
            Error::Create {
                interface: interface.clone(),
                source,
            }
        })?;
        let tunnel = Self {
            interface,
            device: Arc::new(Mutex::new(device)),
            death: link.death(),
            link,
        };
        tunnel
            .work(move |device| {
                device.configure(fwmark)?;
                device.set_peers(peers)
            })
            .await?;
        Ok(Box::new(tunnel))
    }

    /// Runs to its end on a thread that may block, whether or not anybody waits for it.
    async fn work<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Device) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let device = Arc::clone(&self.device);
        tokio::task::spawn_blocking(move || work(&mut device.lock().unwrap_or_else(PoisonError::into_inner)))
            .await
            .unwrap_or_else(|_stopping| Err(Error::Stopped(self.interface.clone())))
    }

    async fn shake_hands(&self, peer: PublicKey, patience: Duration) -> Result<(), Error> {
        let shaken = timeout(patience, async {
            let mut retry = FIRST_RETRY;
            loop {
                let before = self.work(move |device| device.begin_handshake(peer)).await?;
                if self.wait_for_handshake(peer, before, retry).await? {
                    return Ok(());
                }
                retry *= 2;
            }
        });
        shaken.await.unwrap_or(Err(Error::NoHandshake(peer, patience)))
    }

    /// The kernel keeps up to 128 packets for the peer until hands are shaken (`MAX_STAGED_PACKETS` in
    /// drivers/net/wireguard/messages.h) and sends them then, which may be before the peer has given our addresses to
    /// the new key.
    async fn hand_over(&self, renewal: Renewal) -> Result<(), Error> {
        let Renewal {
            private_key,
            peer,
            source: _,
            gateway: _,
        } = renewal;
        let key = peer.public_key;
        let last = self.work(move |device| device.replace_key(private_key)).await?;
        if let Err(error) = self.shake_hands(key, HAND_OVER_LIMIT).await {
            self.work(move |device| {
                device.replace_key(last)?;
                device.begin_handshake(key)
            })
            .await?;
            return Err(error);
        }
        self.set_peers(vec![peer]).await
    }

    async fn wait_for_handshake(
        &self,
        peer: PublicKey,
        before: Option<Duration>,
        patience: Duration,
    ) -> Result<bool, Error> {
        let begun = Instant::now();
        let mut pause = LOOK_AFTER;
        while begun.elapsed() < patience {
            sleep(pause).await;
            pause = (pause * 2).min(LOOK_AT_LEAST_EVERY);
            let last = self.work(move |device| device.last_handshake(peer)).await?;
            if last.is_some() && last != before {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

impl Tunnel for KernelTunnel {
    fn interface(&self) -> &str {
        &self.interface
    }

    fn backend(&self) -> TunnelBackend {
        TunnelBackend::Kernel
    }

    fn set_peers(&self, peers: Vec<PeerConfig>) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(self.work(|device| device.set_peers(peers)))
    }

    fn remove_peer(&self, peer: PublicKey) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(self.work(move |device| device.remove_peer(peer)))
    }

    fn stats(&self) -> BoxFuture<'_, Result<Vec<PeerStats>, Error>> {
        Box::pin(self.work(|device| {
            let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
            device.stats(now.unwrap_or_default())
        }))
    }

    fn force_handshake(&self, peer: PublicKey, timeout: Duration) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(self.shake_hands(peer, timeout))
    }

    fn rebind(&self) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(self.work(Device::rebind))
    }

    fn renew(&self, renewal: Renewal) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(self.hand_over(renewal))
    }

    fn listen_port(&self) -> BoxFuture<'_, Result<u16, Error>> {
        Box::pin(self.work(Device::port))
    }

    fn died(&self) -> BoxFuture<'_, String> {
        Box::pin(crate::tunnel::reason_of_death(self.death.clone()))
    }

    fn close(self: Box<Self>) -> BoxFuture<'static, ()> {
        Box::pin(async move {
            if tokio::task::spawn_blocking(move || drop(self.link)).await.is_err() {
                tracing::debug!("the runtime ended before the tunnel's link was deleted");
            }
        })
    }
}

/// Whether the port can be had now, as the kernel will want it: for both families, where there are two.
fn try_port(port: u16) -> std::io::Result<()> {
    if port == 0 {
        return Ok(());
    }
    match UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port)) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => Err(error),
        Err(_no_ipv6) => UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)).map(drop),
    }
}
