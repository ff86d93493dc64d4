//! The local network as a command: `one-click.sh` brings it up and down with this.

mod run;
mod up;

use std::{
    fs::File,
    io::Write as _,
    net::Ipv4Addr,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    sync::LazyLock,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use clap::{Args, Parser, Subcommand};
use dvpn_tests::{
    bus::BusAddress,
    namespace::{Namespace, names},
    network::{PREFIX, ROOT},
    sweep, web,
    wire::{self, End, Jitter, Wire},
};
use nix::sched::{CloneFlags, setns};

/// The id of the network that this is about; a test has one of its own.
static ID: LazyLock<String> = LazyLock::new(|| std::env::var("DVPN_LAB_ID").unwrap_or_else(|_| "one-click".to_owned()));

#[derive(Parser)]
#[command(about = "A DVPN on one machine: pool, providers, web server and client in network namespaces")]
struct Cli {
    #[command(subcommand)]
    command: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Bring the network up, pay, connect, fetch through the proxy; leave it running.
    Up(Files),
    /// Take the network down and remove everything of it.
    Down,
    /// Say what runs.
    Status,
    /// Run a command on a machine of the network: client, pool, provider-a, …, web, internet.
    Exec {
        /// Which machine.
        machine: String,
        /// The command and its arguments.
        #[arg(trailing_var_arg = true, required = true)]
        command: Vec<String>,
    },
    /// Join two namespaces by a wire until interrupted.
    Wire(WireArguments),
    /// Remove what networks left whose process was killed.
    Sweep,
    /// Hold the network in the foreground.
    #[command(hide = true)]
    Run(Files),
    /// Serve the web server beyond the providers.
    #[command(hide = true)]
    Web {
        /// Where to listen.
        #[arg(long)]
        address: Ipv4Addr,
        /// The name to answer for.
        #[arg(long)]
        name: String,
    },
}

/// What the network is made from.
#[derive(Args, Clone)]
struct Files {
    /// The authority that everybody trusts.
    #[arg(long, default_value = "certs/dev-ca.crt")]
    ca: PathBuf,
    /// The pool's certificate.
    #[arg(long, default_value = "certs/server.crt")]
    certificate: PathBuf,
    /// Its private key.
    #[arg(long, default_value = "certs/server.key")]
    key: PathBuf,
    /// Settings of the client.
    #[arg(long, default_value = ".env")]
    env: PathBuf,
    /// All of the client's traffic goes through the tunnel, not only what uses its proxy.
    #[arg(long)]
    device: bool,
    /// Round-trip times of the providers, in milliseconds.
    #[arg(long, value_delimiter = ',', default_values_t = [8, 10, 13])]
    round_trips: Vec<u64>,
}

#[derive(Args)]
struct WireArguments {
    /// `namespace:interface` of one end.
    a: String,
    /// `namespace:interface` of the other end.
    b: String,
    /// One way, in milliseconds.
    #[arg(long, default_value_t = 0.0)]
    delay_ms: f64,
    /// Evenly spread, plus and minus, in milliseconds.
    #[arg(long, default_value_t = 0.0)]
    jitter_ms: f64,
    /// Per cent of the frames.
    #[arg(long, default_value_t = 0.0)]
    loss_percent: f64,
    /// Megabits per second; 0 is as fast as it goes.
    #[arg(long, default_value_t = 0)]
    rate_mbps: u64,
    /// Decides losses and jitter.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

fn main() -> ExitCode {
    match dispatch(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&format!("dvpn-lab: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn dispatch(verb: Verb) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("network namespaces need root: run this with sudo");
    }
    match verb {
        Verb::Up(files) => up::up(&files),
        Verb::Down => run::down(),
        Verb::Status => up::status(),
        Verb::Run(files) => run::run(&files),
        Verb::Exec { machine, command } => exec(&machine, &command),
        Verb::Wire(arguments) => wire(&arguments),
        Verb::Sweep => {
            for id in sweep::dead()? {
                say(&format!("removed the network {id}"));
            }
            Ok(())
        }
        Verb::Web { address, name } => {
            let runtime = tokio::runtime::Runtime::new().context("starting the runtime")?;
            runtime.block_on(web::serve(address, name))
        }
    }
}

/// Replaces this process by a command on the machine: in its network, with its resolv.conf and its system bus.
fn exec(machine: &str, command: &[String]) -> Result<()> {
    let prefix = format!("{PREFIX}{}-", *ID);
    let name = format!("{prefix}{machine}");
    let existing = names(&prefix);
    if !existing.contains(&name) {
        let machines: Vec<&str> = existing.iter().filter_map(|name| name.strip_prefix(&prefix)).collect();
        bail!("there is no machine {machine}, only {machines:?}: `dvpn-lab up` makes them");
    }
    let Some((program, arguments)) = command.split_first() else {
        bail!("no command given")
    };
    let mut command = Command::new(program);
    command.args(arguments);
    let namespace = File::open(Namespace::open(&name)?.path()).context("opening the namespace")?;
    setns(namespace, CloneFlags::CLONE_NEWNET).context("entering the namespace")?;
    let machine = Path::new(ROOT).join(&*ID).join(machine);
    if let Some(pid) = run::running(&machine.join("pid")) {
        let mounts = File::open(format!("/proc/{pid}/ns/mnt")).context("opening the machine's mount namespace")?;
        let here = std::env::current_dir().context("asking for the working directory")?;
        setns(mounts, CloneFlags::CLONE_NEWNS).context("entering the machine's mount namespace")?;
        command.current_dir(here);
        command.env("DBUS_SYSTEM_BUS_ADDRESS", BusAddress::in_directory(&machine).as_str());
    }
    Err(command.exec()).with_context(|| format!("running {program}"))
}

fn wire(arguments: &WireArguments) -> Result<()> {
    let end = |text: &str| -> Result<(Namespace, String)> {
        let (namespace, interface) = text.split_once(':').context("an end is written namespace:interface")?;
        Ok((Namespace::open(namespace)?, interface.to_owned()))
    };
    let (a, b) = (end(&arguments.a)?, end(&arguments.b)?);
    let millis = |ms: f64| Duration::try_from_secs_f64(ms / 1e3).context("a time must not be negative");
    let path = wire::Path {
        delay: millis(arguments.delay_ms)?,
        jitter: Jitter::Uniform(millis(arguments.jitter_ms)?),
        loss: arguments.loss_percent / 100.0,
        rate_bits: Some(arguments.rate_mbps.saturating_mul(1_000_000)).filter(|rate| *rate > 0),
        reorder: false,
    };
    let ends = (
        End {
            namespace: &a.0,
            interface: &a.1,
        },
        End {
            namespace: &b.0,
            interface: &b.1,
        },
    );
    let wire = Wire::connect(ends.0, ends.1, path, arguments.seed)?;
    a.0.ip(&format!("link set {} up", a.1))?;
    b.0.ip(&format!("link set {} up", b.1))?;
    say("the wire carries frames; end it with Ctrl-C");
    run::wait_for_end()?;
    let (carried, lost) = wire.counts();
    say(&format!("{carried} frames carried, {lost} lost"));
    Ok(())
}

/// Writes a line for the person who watches. Nobody watching is no error.
fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    drop(writeln!(out, "{line}").and_then(|()| out.flush()));
}
