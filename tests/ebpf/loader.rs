//! Attaches programs and waits to be killed: stands for a daemon that dies.
//!
//! Arguments: interface, pin folder, and `tcx` or `clsact` for the counting programs, or `shape`, `shape-tcx` or
//! `shape-clsact`, an address and bits per second for a shaper that grants it so much both ways. Says `attached` or `shaped` and reads standard input
//! to its end.

use std::io::{self, Read as _, Write as _};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use dvpn_common::rate::Rate;
use dvpn_daemon::ebpf::{Counters, Hook, Loader};
use dvpn_daemon::host::{Grant, Host, Shaper, ShaperConfig};

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let interface = arguments.next().context("no interface")?;
    let pin_dir = PathBuf::from(arguments.next().context("no pin folder")?);
    let what = arguments.next().context("no hook")?;
    let (shape, hook) = match what.as_str() {
        "tcx" => (false, Some(Hook::Tcx)),
        "clsact" => (false, Some(Hook::Clsact)),
        "shape" => (true, None),
        "shape-tcx" => (true, Some(Hook::Tcx)),
        "shape-clsact" => (true, Some(Hook::Clsact)),
        other => bail!("no such hook: {other:?}"),
    };
    if let (false, Some(hook)) = (shape, hook) {
        let _counters = Counters::attach_through(&interface, &pin_dir, hook)?;
        return wait(b"attached\n");
    }
    let address = arguments.next().context("no address")?.parse()?;
    let rate = Rate::from_bits_per_second(arguments.next().context("no rate")?.parse()?);
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?
        .block_on(async {
            let config = ShaperConfig {
                hook,
                ..ShaperConfig::new(interface, 1420)
            };
            let (host, loader) = (Host::open()?, Loader::new(pin_dir));
            let mut shaper = Shaper::open(&host, &loader, config).await?;
            let grant = Grant {
                down: rate,
                up: rate,
                until: Instant::now() + Duration::from_hours(1),
            };
            shaper.grant(&[address], grant).await?;
            wait(b"shaped\n")
        })
}

fn wait(word: &[u8]) -> anyhow::Result<()> {
    io::stdout().write_all(word)?;
    io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}
