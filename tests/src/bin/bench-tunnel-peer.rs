//! One end of a benchmarked tunnel: the daemon's own userspace WireGuard device and nothing else.
//!
//! `bench-tunnel-peer INTERFACE LISTEN_PORT PEER_KEY PEER_ENDPOINT ALLOWED_IPS [no-offload]`, the private key on
//! stdin's first line. Prints `up` when the interface exists; ends when stdin closes.

use std::io::{BufRead as _, Write as _};

use anyhow::{Context as _, Result};
use dvpn_common::keys::PrivateKey;
use dvpn_daemon::tunnel::{DEFAULT_MTU_BYTES, PeerConfig, TunnelConfig, userspace::UserspaceTunnel};

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let mut argument = |what: &'static str| arguments.next().context(what);
    let interface = argument("INTERFACE")?;
    let listen_port = argument("LISTEN_PORT")?.parse()?;
    let peer = PeerConfig {
        public_key: argument("PEER_KEY")?.parse()?,
        endpoint: Some(argument("PEER_ENDPOINT")?.parse()?),
        allowed_ips: argument("ALLOWED_IPS")?
            .split(',')
            .map(str::parse)
            .collect::<Result<_, _>>()?,
        keepalive: None,
    };
    let offload = arguments.next().is_none();
    let mut key = String::new();
    std::io::stdin().lock().read_line(&mut key)?;
    let private_key = PrivateKey::parse(&key)?;

    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async move {
        let tunnel = UserspaceTunnel::create(TunnelConfig {
            interface,
            private_key,
            listen_port,
            fwmark: 0,
            mtu_bytes: DEFAULT_MTU_BYTES,
            peers: vec![peer],
            offload,
        })
        .await?;
        writeln!(std::io::stdout(), "up")?;
        let stdin_closed = tokio::task::spawn_blocking(|| std::io::copy(&mut std::io::stdin(), &mut std::io::sink()));
        tokio::select! {
            reason = tunnel.died() => anyhow::bail!("the tunnel died: {reason}"),
            closed = stdin_closed => closed??,
        };
        tunnel.close().await;
        Ok(())
    })
}
