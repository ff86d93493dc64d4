//! Holds a machine's name resolution as the daemon does in device mode, for tests that kill it.
//!
//! `dns-holder STATE_DIRECTORY hold INTERFACE SERVERS` sets it, and again whenever that is needed; each time it prints a
//! line: the ways taken, or `error` and why. `dns-holder STATE_DIRECTORY network` prints the network's name servers,
//! `metered` whether that network costs by the byte.

use std::{io::Write as _, net::IpAddr, path::Path, pin::pin};

use anyhow::{Context as _, Result, bail};
use dvpn_daemon::host::dns::Dns;
use futures::StreamExt as _;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    match arguments[..] {
        [state, "hold", interface, servers] => {
            let servers = servers.split(',').map(str::parse).collect::<Result<Vec<IpAddr>, _>>()?;
            runtime.block_on(hold(&Dns::open(Path::new(state)), interface, &servers))
        }
        [_, "metered"] => say(&runtime.block_on(dvpn_daemon::host::is_metered()).to_string()),
        [state, "network"] => {
            let servers = runtime.block_on(Dns::open(Path::new(state)).network_servers());
            let servers: Vec<String> = servers.iter().map(ToString::to_string).collect();
            say(&servers.join(" "))
        }
        _ => bail!("dns-holder STATE_DIRECTORY hold INTERFACE SERVERS | network | metered"),
    }
}

async fn hold(dns: &Dns, interface: &str, servers: &[IpAddr]) -> Result<()> {
    let mut changes = pin!(dns.changes()?);
    loop {
        let index = nix::net::if_::if_nametoindex(interface).with_context(|| format!("finding {interface}"))?;
        match dns.set(interface, index, servers).await {
            Ok(ways) => {
                let ways: Vec<String> = ways.iter().map(ToString::to_string).collect();
                say(&ways.join(" "))?;
            }
            Err(error) => {
                say(&format!("error {:#}", anyhow::Error::new(error)))?;
            }
        }
        changes.next().await.context("the changes ended")?;
    }
}

fn say(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{text}")?;
    Ok(out.flush()?)
}
