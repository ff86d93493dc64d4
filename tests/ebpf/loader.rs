//! Attaches the counting programs and waits to be killed: stands for a daemon that dies.
//!
//! Arguments: interface, pin folder, hook (`tcx` or `clsact`). Says `attached` and reads standard input to its end.

use std::io::{self, Read as _, Write as _};
use std::path::PathBuf;

use anyhow::{Context as _, bail};
use dvpn_daemon::ebpf::{Counters, Hook};

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let interface = arguments.next().context("no interface")?;
    let pin_dir = PathBuf::from(arguments.next().context("no pin folder")?);
    let hook = match arguments.next().as_deref() {
        Some("tcx") => Hook::Tcx,
        Some("clsact") => Hook::Clsact,
        other => bail!("no such hook: {other:?}"),
    };
    let _counters = Counters::attach_through(&interface, &pin_dir, hook)?;
    io::stdout().write_all(b"attached\n")?;
    io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}
