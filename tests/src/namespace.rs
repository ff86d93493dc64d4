//! Network namespaces: made, entered by throw-away threads, removed.

use std::{
    fs::File,
    io::Write as _,
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, ensure};
use nix::sched::{CloneFlags, setns};

/// Where ip(8) keeps the names.
pub const DIRECTORY: &str = "/run/netns";

/// A named network namespace. The one who made it removes it when dropped; one that was only opened stays.
pub struct Namespace {
    name: String,
    file: File,
    ours: bool,
}

impl Namespace {
    /// Makes a namespace with its loopback up.
    pub fn create(name: &str) -> Result<Self> {
        ip(&["netns", "add", name])?;
        let mut namespace = Self::open(name)?;
        namespace.ours = true;
        namespace.ip("link set lo up")?;
        // Duplicate address detection takes a second that nothing here is about, and what a machine looks like before
        // a test must not depend on whether it is over.
        namespace.sysctl("ipv6/conf/default/accept_dad", "0")?;
        namespace.sysctl("ipv6/conf/default/dad_transmits", "0")?;
        Ok(namespace)
    }

    /// Opens a namespace that somebody else made.
    pub fn open(name: &str) -> Result<Self> {
        let path = Path::new(DIRECTORY).join(name);
        let file = File::open(&path)
            .with_context(|| format!("opening the network namespace {name}: `ip netns list` shows which exist"))?;
        Ok(Self {
            name: name.to_owned(),
            file,
            ours: false,
        })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where it is mounted, for `nsenter --net=`.
    pub fn path(&self) -> PathBuf {
        Path::new(DIRECTORY).join(&self.name)
    }

    /// Runs `work` in a thread that lives in this namespace. Sockets made there stay there, children too.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        let inside = || -> Result<T> {
            setns(&self.file, CloneFlags::CLONE_NEWNET)
                .with_context(|| format!("entering the network namespace {}: this needs root", self.name))?;
            Ok(work())
        };
        std::thread::scope(|scope| scope.spawn(inside).join())
            .unwrap_or_else(|_| Err(anyhow!("a thread in the network namespace {} panicked", self.name)))
    }

    /// Runs `ip` commands in this namespace, one a line, all or an error that names the line.
    pub fn ip(&self, commands: &str) -> Result<()> {
        let mut child = Command::new("ip")
            .args(["-n", &self.name, "-batch", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("running ip: install iproute2")?;
        if let Some(mut input) = child.stdin.take() {
            input.write_all(commands.as_bytes()).context("writing to ip")?;
        }
        let output = child.wait_with_output().context("waiting for ip")?;
        let error = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "ip in {} refused: {}\n{commands}",
            self.name,
            error.trim()
        );
        Ok(())
    }

    /// What a program prints when it is run in this namespace.
    pub fn output(&self, program: &str, arguments: &[&str]) -> Result<String> {
        let output = self
            .run(|| Command::new(program).args(arguments).stdin(Stdio::null()).output())?
            .with_context(|| format!("running {program}"))?;
        let error = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "{program} {} failed: {}",
            arguments.join(" "),
            error.trim()
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Sets a value under /proc/sys/net of this namespace.
    pub fn sysctl(&self, path: &str, value: &str) -> Result<()> {
        let file = format!("/proc/sys/net/{path}");
        self.run(|| std::fs::write(&file, value))?
            .with_context(|| format!("writing {value} to {file}"))
    }

    /// A TCP connection from inside.
    pub fn connect(&self, to: SocketAddr, timeout: Duration) -> Result<TcpStream> {
        self.run(|| TcpStream::connect_timeout(&to, timeout))?
            .with_context(|| format!("connecting from {} to {to}", self.name))
    }

    /// A TCP listener inside.
    pub fn listen(&self, at: SocketAddr) -> Result<TcpListener> {
        self.run(|| TcpListener::bind(at))?
            .with_context(|| format!("listening in {} at {at}", self.name))
    }

    /// A UDP socket inside.
    pub fn udp(&self, at: IpAddr) -> Result<UdpSocket> {
        self.run(|| UdpSocket::bind((at, 0)))?
            .with_context(|| format!("binding UDP in {} at {at}", self.name))
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if self.ours
            && let Err(error) = ip(&["netns", "del", &self.name])
        {
            tracing::error!("{error:#}; remove it by hand: ip netns del {}", self.name);
        }
    }
}

/// Runs ip(8) outside of any namespace of ours.
pub fn ip(arguments: &[&str]) -> Result<()> {
    let output = Command::new("ip")
        .args(arguments)
        .output()
        .context("running ip: install iproute2")?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "ip {} failed: {}",
        arguments.join(" "),
        error.trim()
    );
    Ok(())
}

/// The names of all namespaces whose name begins with `prefix`.
pub fn names(prefix: &str) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(DIRECTORY) else {
        return Vec::new();
    };
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with(prefix))
        .collect();
    names.sort();
    names
}
