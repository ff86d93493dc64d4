//! `dvpn-pool` and `dvpn-daemon` as real processes with directories of their own.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    os::unix::{ffi::OsStrExt as _, net::UnixDatagram},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

use crate::{
    bus::Bus,
    certs::Identity,
    client::Client,
    https,
    network::{Machine, Network, POOL, WEB, WEB_NAME},
    process::{Process, Surroundings, program, wait_for},
};

/// Port of the pool.
pub const POOL_PORT: u16 = 8443;
/// WireGuard port of the providers.
pub const NODE_PORT: u16 = 51820;

/// How long a lease of the local network's orchestrator lasts: short, so that renewals are seen.
pub const LEASE_SECONDS: u64 = 20;

/// `FALLBACK_ORCHESTRATOR_URL` of the local network.
pub fn orchestrator_url() -> String {
    format!("https://{POOL}:{POOL_PORT}/orchestrator")
}

/// `POOL_URL` of the local network.
pub fn pool_url() -> String {
    format!("https://{POOL}:{POOL_PORT}/providers")
}

/// `PAYMENT_API_URL` of the local network.
pub fn payment_url() -> String {
    format!("https://{POOL}:{POOL_PORT}/payment")
}

/// Environment of a program: its whole environment, nothing is inherited but PATH.
#[derive(Debug, Clone, Default)]
pub struct Environment(BTreeMap<String, OsString>);

impl Environment {
    /// Sets a variable.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl Into<OsString>) -> Self {
        self.0.insert(name.to_owned(), value.into());
        self
    }

    /// Takes a variable away.
    #[must_use]
    pub fn without(mut self, name: &str) -> Self {
        self.0.remove(name);
        self
    }

    /// A variable.
    pub fn value(&self, name: &str) -> Option<OsString> {
        self.0.get(name).cloned()
    }

    /// Whether the process was started with all of these, and without those of `others` that are none of these.
    pub fn is_of(&self, pid: u32, others: &[&str]) -> bool {
        let there = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        let there: BTreeMap<&[u8], &[u8]> = there
            .split(|byte| *byte == 0)
            .filter_map(|pair| {
                let (name, value) = pair.split_at_checked(pair.iter().position(|byte| *byte == b'=')?)?;
                Some((name, value.get(1..)?))
            })
            .collect();
        let names = self.0.keys().map(String::as_str).chain(others.iter().copied());
        let mut same = names.map(|name| {
            let wanted = self.0.get(name).map(|value| value.as_bytes());
            there.get(name.as_bytes()).copied() == wanted
        });
        same.all(|same| same)
    }

    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.env_clear();
        for name in ["PATH", "LLVM_PROFILE_FILE"] {
            if let Some(value) = std::env::var_os(name) {
                command.env(name, value);
            }
        }
        command.envs(&self.0);
        command
    }
}

/// The web server, its name server included, as a process.
pub fn spawn_web(network: &Network) -> Result<Process> {
    let mut command = Command::new(program("dvpn-lab")?);
    command.args(["web", "--address", &WEB.to_string(), "--name", WEB_NAME]);
    let log = network.directory.join("web.log");
    let surroundings = Surroundings {
        namespace: &network.web,
        log: &log,
        resolv_conf: None,
    };
    let mut web = Process::spawn("the web server", command, &surroundings)?;
    wait_for("the web server", Duration::from_secs(10), || {
        web.check_running()?;
        Ok(network.web.connect((WEB, 80).into(), Duration::from_millis(200)).ok())
    })?;
    Ok(web)
}

/// The reference pool as a process: list, approval, payment, all in its development form.
pub fn spawn_pool(network: &Network, identity: &Identity) -> Result<Process> {
    spawn_pool_with(network, identity, &[])
}

/// The same with more arguments.
pub fn spawn_pool_with(network: &Network, identity: &Identity, arguments: &[&str]) -> Result<Process> {
    let machine = &network.pool;
    let environment = Environment::default()
        .with("DVPN_LOG", "info")
        // Its clients connect as often as a test likes.
        .with("DVPN_POOL_LIMIT_APPROVALS", "240");
    let mut command = environment.command(&program("dvpn-pool")?);
    command
        .args(["serve", "--development", "--open-registration", "--private-endpoints"])
        .args(["--orchestrator", "--lease-seconds", &LEASE_SECONDS.to_string()])
        .arg("--listen")
        .arg(format!("{POOL}:{POOL_PORT}"))
        .arg("--tls-cert")
        .arg(&identity.certificate)
        .arg("--tls-key")
        .arg(&identity.key)
        .arg("--database")
        .arg(machine.directory.join("pool.sqlite"))
        .args(arguments);
    let log = machine.directory.join("log");
    let surroundings = Surroundings {
        namespace: &machine.namespace,
        log: &log,
        resolv_conf: None,
    };
    let mut pool = Process::spawn("dvpn-pool", command, &surroundings)?;
    wait_for("the pool's listener", Duration::from_secs(15), || {
        pool.check_running()?;
        Ok(machine
            .namespace
            .connect((POOL, POOL_PORT).into(), Duration::from_millis(200))
            .ok())
    })?;
    Ok(pool)
}

/// A daemon with its bus. Field order is drop order: the daemon goes before its bus.
pub struct Daemon {
    /// The process.
    pub process: Process,
    /// The way to ask it.
    pub client: Client,
    /// From the start of the process to `READY=1`.
    pub ready_after: Duration,
    /// Its whole environment, for a second start or `--cleanup`.
    pub environment: Environment,
    /// What it tells its service manager after `READY=1`, a datagram each; reading waits 200 ms.
    pub notifications: UnixDatagram,
    _bus: Bus,
}

/// What the client of the local network is told. `ca` is the certificate that it trusts.
pub fn client_environment(ca: &Path) -> Environment {
    Environment::default()
        .with("POOL_URL", pool_url())
        .with("PAYMENT_API_URL", payment_url())
        .with("SSL_CERT_FILE", ca)
        .with("POOL_PRIVATE", "true")
        .with("DVPN_DEVELOPMENT", "true")
        .with("UPNP_ENABLED", "false")
        .with("DVPN_LOG", "info")
}

/// What a provider of the local network is told.
pub fn provider_environment(machine: &Machine, ca: &Path) -> Environment {
    let probe_port = NODE_PORT.saturating_add(1);
    client_environment(ca)
        .with("NODE_REGISTER_ENABLED", "true")
        .with("NODE_ACCEPT_TERMS", "true")
        .with("NODE_ID", &machine.name)
        .with("NODE_PORT", NODE_PORT.to_string())
        .with("NODE_PUBLIC_ENDPOINT", format!("{}:{NODE_PORT}", machine.address))
        .with("NODE_PUBLIC_PROBE", format!("{}:{probe_port}", machine.address))
        .with("BANDWIDTH_TOTAL_MBPS", "1000")
}

impl Daemon {
    /// Starts a daemon on a machine and waits for `READY=1`.
    pub fn spawn(network: &Network, machine: &Machine, environment: Environment) -> Result<Self> {
        Self::spawn_by(network, machine, environment, |command| command)
    }

    /// The same with the command changed: wrapped into strace, with more arguments.
    pub fn spawn_by(
        network: &Network,
        machine: &Machine,
        environment: Environment,
        change: impl FnOnce(Command) -> Command,
    ) -> Result<Self> {
        let directory = &machine.directory;
        let bus = Bus::spawn(&machine.namespace, directory)?;
        let notify_path = directory.join("notify.socket");
        drop(std::fs::remove_file(&notify_path));
        let notify = UnixDatagram::bind(&notify_path).with_context(|| format!("binding {}", notify_path.display()))?;
        notify
            .set_read_timeout(Some(Duration::from_millis(200)))
            .context("setting a timeout")?;
        let state = directory.join("state");
        std::fs::create_dir_all(&state).with_context(|| format!("making {}", state.display()))?;
        let environment = environment
            .with("STATE_DIRECTORY", &state)
            .with("BPF_DIRECTORY", network.bpf_directory(machine))
            .with("DBUS_SYSTEM_BUS_ADDRESS", bus.address().as_str())
            .with("NOTIFY_SOCKET", &notify_path);
        let resolv_conf = resolv_conf(machine)?;
        let log = directory.join("log");
        let surroundings = Surroundings {
            namespace: &machine.namespace,
            log: &log,
            resolv_conf: Some(&resolv_conf),
        };
        let command = change(environment.command(&program("dvpn-daemon")?));
        let started = Instant::now();
        let mut process = Process::spawn(&format!("dvpn-daemon of {}", machine.name), command, &surroundings)?;
        let ready_after = wait_for("READY=1", Duration::from_secs(20), || {
            let mut buffer = [0; 4096];
            if let Ok(length) = notify.recv(&mut buffer) {
                let text = String::from_utf8_lossy(buffer.get(..length).unwrap_or_default()).into_owned();
                return Ok(text.lines().any(|line| line == "READY=1").then(|| started.elapsed()));
            }
            process.check_running()?;
            Ok(None)
        })
        .with_context(|| process.log_tail())?;
        let client = Client::new(machine.namespace.name(), bus.address().clone())?;
        Ok(Self {
            process,
            client,
            ready_after,
            environment,
            notifications: notify,
            _bus: bus,
        })
    }

    /// Runs `dvpn-daemon` with other arguments in the same place and waits for its end: `--cleanup`, `--check-config`.
    pub fn run(machine: &Machine, environment: &Environment, arguments: &[&str]) -> Result<String> {
        Self::run_by(machine, environment, arguments, |command| command)
    }

    /// The same with the command changed.
    pub fn run_by(
        machine: &Machine,
        environment: &Environment,
        arguments: &[&str],
        change: impl FnOnce(Command) -> Command,
    ) -> Result<String> {
        let mut command = environment
            .clone()
            .without("NOTIFY_SOCKET")
            .command(&program("dvpn-daemon")?);
        command.args(arguments);
        let log = machine.directory.join(format!("log{}", arguments.concat()));
        let resolv_conf = resolv_conf(machine)?;
        let surroundings = Surroundings {
            namespace: &machine.namespace,
            log: &log,
            resolv_conf: Some(&resolv_conf),
        };
        let mut process = Process::spawn("dvpn-daemon", change(command), &surroundings)?;
        let status = process.wait_exit(Duration::from_secs(20))?;
        anyhow::ensure!(
            status.success(),
            "dvpn-daemon {arguments:?} ended with {status}: {}",
            process.log_tail()
        );
        Ok(process.log_text())
    }
}

/// Waits until the pool lists this many providers.
pub fn wait_until_listed(network: &Network, ca: &Path, wanted: usize, patience: Duration) -> Result<()> {
    let what = format!("a list of {wanted} providers");
    wait_for(&what, patience, || Ok((listed(network, ca)? >= wanted).then_some(())))
}

/// How many providers the pool lists; none while it does not answer well.
pub fn listed(network: &Network, ca: &Path) -> Result<usize> {
    let (status, text) = https::request(&network.client.namespace, ca, &pool_url(), None)?;
    if status != 200 {
        return Ok(0);
    }
    let list: serde_json::Value = serde_json::from_str(&text).context("reading the pool's list")?;
    Ok(list
        .get("providers")
        .and_then(serde_json::Value::as_array)
        .map_or(0, Vec::len))
}

/// What a machine finds as its resolv.conf: it names the name server beyond the providers.
pub fn resolv_conf(machine: &Machine) -> Result<PathBuf> {
    let path = machine.directory.join("resolv.conf");
    if !path.exists() {
        std::fs::write(&path, format!("nameserver {WEB}\n")).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(path)
}
