//! A machine with a file system view, a system bus and name services of its own, on a network and a tunnel that each have
//! a name server.

use std::{
    cell::Cell,
    fs,
    io::{BufRead as _, BufReader},
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc::{Receiver, channel},
    time::{Duration, Instant},
};

use dvpn_tests::process::program;
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use tempfile::TempDir;

use super::server::Server;
use crate::namespace::Namespace;

/// The file under test.
pub(super) const RESOLV_CONF: &str = "/etc/resolv.conf";
/// The network's name server and the tunnel's, and what each of them says to every question.
pub(super) const NETWORK: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 53);
pub(super) const TUNNEL: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 1);
/// The tunnel's other one; it is there for services to be told, and does not answer.
const TUNNEL_V6: &str = "fd00:96::1";
const BY_NETWORK: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
const BY_TUNNEL: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
/// No interface of the daemon's: cleaning up leaves it alone.
pub(super) const INTERFACE: &str = "tunnel0";
/// For a service to start. How soon something has to be set again is another figure.
const PATIENCE: Duration = Duration::from_secs(20);
/// How soon what was set is set again.
pub(super) const AGAIN: Duration = Duration::from_secs(2);

/// The machine; all that runs on it ends with it.
pub(super) struct Machine {
    pub(super) here: Namespace,
    /// Servers, and where they are.
    pub(super) network: Server,
    pub(super) tunnel: Server,
    _there: [Namespace; 2],
    folder: TempDir,
    names: Cell<u32>,
}

/// A program that runs.
pub(super) struct Running(Child);

impl Running {
    /// SIGKILL.
    pub(super) fn kill(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// What stands for the daemon, and what it says.
pub(super) struct Holder {
    pub(super) process: Running,
    said: Receiver<String>,
}

impl Holder {
    /// The ways of the next time it sets.
    pub(super) fn ways(&self) -> String {
        self.said.recv_timeout(PATIENCE).expect("it says what it did")
    }

    /// The same, without waiting: the last thing it said since.
    pub(super) fn latest(&self) -> Option<String> {
        self.said.try_iter().last()
    }
}

impl Machine {
    /// `services` names a folder of what `scripts/test.sh` unpacks; its files are laid over the machine's.
    pub(super) fn new(services: Option<&str>) -> Self {
        let here = Namespace::enter_new();
        let there = [Namespace::new(), Namespace::new()];
        for (link, ours, namespace, theirs) in [
            ("eth0", "192.0.2.2", &there[0], NETWORK),
            (INTERFACE, "10.96.0.2", &there[1], TUNNEL),
        ] {
            here.sh(&format!(
                "ip link add {link} type veth peer name far netns {}; ip addr add {ours}/24 dev {link}; \
                 echo 0 > /proc/sys/net/ipv6/conf/{link}/accept_dad; ip link set {link} up",
                namespace.path()
            ));
            namespace.sh(&format!("ip addr add {theirs}/24 dev far; ip link set far up"));
        }
        let network = Server::spawn(&there[0], NETWORK, BY_NETWORK);
        let tunnel = Server::spawn(&there[1], TUNNEL, BY_TUNNEL);
        let folder = tempfile::tempdir().unwrap();
        let machine = Self {
            here,
            network,
            tunnel,
            _there: there,
            folder,
            names: Cell::new(0),
        };
        machine.private_files(services);
        fs::create_dir(machine.state()).unwrap();
        machine
    }

    /// Gives this thread, and all that it starts, files that may be changed: /etc, /run and /var/lib.
    fn private_files(&self, services: Option<&str>) {
        let mount_at = |what: &str, at: &Path, kind: &str, flags, data: &str| {
            mount(Some(what), at, Some(kind), flags, Some(data))
                .unwrap_or_else(|error| panic!("mounting {kind} at {}: {error}", at.display()));
        };
        unshare(CloneFlags::CLONE_NEWNS).expect("these tests need root");
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        let layers = self.folder.path().join("layers");
        fs::create_dir(&layers).unwrap();
        mount_at("tmpfs", &layers, "tmpfs", MsFlags::empty(), "");
        let laid_over = |name: &str| match services {
            Some(services) => {
                let folder = unpacked(services).join(name);
                let lower = if folder.is_dir() {
                    format!("{}:", folder.display())
                } else {
                    String::new()
                };
                format!("lowerdir={lower}/{name}")
            }
            None => format!("lowerdir=/{name}"),
        };
        if services.is_some() {
            mount_at(
                "overlay",
                Path::new("/usr"),
                "overlay",
                MsFlags::MS_RDONLY,
                &laid_over("usr"),
            );
        }
        let (upper, work) = (layers.join("upper"), layers.join("work"));
        fs::create_dir(&upper).unwrap();
        fs::create_dir(&work).unwrap();
        let data = format!(
            "{},upperdir={},workdir={}",
            laid_over("etc"),
            upper.display(),
            work.display()
        );
        mount_at("overlay", Path::new("/etc"), "overlay", MsFlags::empty(), &data);
        for path in ["/run", "/var/lib"] {
            mount_at("tmpfs", Path::new(path), "tmpfs", MsFlags::empty(), "mode=755");
        }
        // Of this network. Read-only, as in a container: NetworkManager does not wait for udev then.
        mount_at("sysfs", Path::new("/sys"), "sysfs", MsFlags::MS_RDONLY, "");
        self.here.sh(
            "rm -f /etc/resolv.conf /etc/resolv.conf.bak; mkdir /run/systemd; \
             grep -q ^systemd-resolve: /etc/passwd || echo systemd-resolve:x:981:981::/:/usr/sbin/nologin >> /etc/passwd; \
             grep -q ^systemd-resolve: /etc/group || echo systemd-resolve:x:981: >> /etc/group; \
             printf 'hosts: files dns\\npasswd: files\\ngroup: files\\n' > /etc/nsswitch.conf; \
             printf '127.0.0.1 localhost\\n' > /etc/hosts",
        );
    }

    /// Where the daemon keeps what survives it.
    pub(super) fn state(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    /// A path of the test's own.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn bus_address(&self) -> String {
        format!("unix:path={}", self.path("bus").display())
    }

    fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        command
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("DBUS_SYSTEM_BUS_ADDRESS", self.bus_address())
            .env("RUST_BACKTRACE", "0")
            .stdin(Stdio::null());
        command
    }

    /// Starts a program; what it logs is in a file by its name.
    pub(super) fn spawn(&self, program: &str, arguments: &[&str]) -> Running {
        let name = Path::new(program).file_name().unwrap().to_string_lossy().into_owned();
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(self.path(&name))
            .unwrap();
        let mut command = self.command(program);
        command.args(arguments).stdout(log.try_clone().unwrap()).stderr(log);
        Running(
            command
                .spawn()
                .unwrap_or_else(|error| panic!("starting {program}: {error}")),
        )
    }

    /// Starts a system bus on which everybody may do everything.
    pub(super) fn bus(&self) -> Running {
        let config = self.path("bus.conf");
        let text = format!(
            "<!DOCTYPE busconfig PUBLIC \"-//freedesktop//DTD D-BUS Bus Configuration 1.0//EN\"\n \
             \"http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd\">\n\
             <busconfig><type>system</type><listen>{}</listen><auth>EXTERNAL</auth>\
             <policy context=\"default\"><allow user=\"*\"/><allow own=\"*\"/><allow send_type=\"method_call\"/>\
             <allow send_type=\"signal\"/><allow send_requested_reply=\"true\"/><allow receive_type=\"method_call\"/>\
             <allow receive_type=\"method_return\"/><allow receive_type=\"error\"/><allow receive_type=\"signal\"/>\
             </policy></busconfig>\n",
            self.bus_address()
        );
        fs::write(&config, text).unwrap();
        let config = format!("--config-file={}", config.display());
        let bus = self.spawn("dbus-daemon", &["--nofork", "--nopidfile", &config]);
        self.until("the bus", || self.path("bus").exists());
        bus
    }

    /// Starts a service and waits until it has its name.
    pub(super) fn service(&self, program: &str, arguments: &[&str], name: &str) -> Running {
        let service = self.spawn(program, arguments);
        let bus = "org.freedesktop.DBus";
        let ask = [
            "busctl",
            "--system",
            "call",
            bus,
            "/org/freedesktop/DBus",
            bus,
            "NameHasOwner",
            "s",
            name,
        ];
        self.until(name, || {
            self.try_run(&ask).is_ok_and(|answer| answer.trim() == "b true")
        });
        service
    }

    /// Runs a program of the machine; it must succeed. What it printed.
    pub(super) fn run(&self, line: &[&str]) -> String {
        self.try_run(line).unwrap_or_else(|error| panic!("{line:?}: {error}"))
    }

    fn try_run(&self, line: &[&str]) -> Result<String, String> {
        let mut line: Vec<&str> = line.to_vec();
        let address = format!("--address={}", self.bus_address());
        if line[0] == "busctl" {
            line.retain(|word| *word != "--system");
            line.insert(1, &address);
        }
        let output = self
            .command(line[0])
            .args(&line[1..])
            .output()
            .map_err(|error| error.to_string())?;
        if output.status.success() {
            Ok(String::from_utf8(output.stdout).unwrap())
        } else {
            Err(String::from_utf8_lossy(&output.stderr).into_owned())
        }
    }

    /// Starts what stands for the daemon; it has not set anything yet.
    pub(super) fn hold(&self) -> Holder {
        let mut command = self.command(program("dns-holder").unwrap());
        command
            .arg(self.state())
            .args(["hold", INTERFACE, &format!("{TUNNEL},{TUNNEL_V6}")]);
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let out = child.stdout.take().unwrap();
        let (sender, said) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(out).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Holder {
            process: Running(child),
            said,
        }
    }

    /// What the daemon's own sockets would ask.
    pub(super) fn network_servers(&self) -> String {
        self.ask("network")
    }

    /// Whether the daemon takes the network for one that costs by the byte.
    pub(super) fn is_metered(&self) -> bool {
        self.ask("metered") == "true"
    }

    fn ask(&self, what: &str) -> String {
        let holder = program("dns-holder").unwrap();
        let state = self.state();
        self.run(&[holder.to_str().unwrap(), state.to_str().unwrap(), what])
            .trim()
            .to_owned()
    }

    /// `dvpn-daemon --cleanup`, as after a crash; what it said.
    pub(super) fn cleanup(&self) -> String {
        let (succeeded, text) = self.try_cleanup();
        assert!(succeeded && !self.state().join("dns.json").exists(), "{text}");
        text
    }

    /// The same; whether all went well, and what it said.
    pub(super) fn try_cleanup(&self) -> (bool, String) {
        let output = self
            .command(program("dvpn-daemon").unwrap())
            .arg("--cleanup")
            .env("STATE_DIRECTORY", self.state())
            .env("BPF_DIRECTORY", self.path("no-pins"))
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap() + &String::from_utf8_lossy(&output.stderr);
        (output.status.success(), text)
    }

    /// Asks for a name that nobody asked for before, as any program does.
    pub(super) fn look_up(&self) -> Option<Ipv4Addr> {
        self.names.set(self.names.get() + 1);
        let name = format!("name-{}.example", self.names.get());
        let text = self.try_run(&["getent", "ahostsv4", &name]).ok()?;
        text.split_whitespace().next()?.parse().ok()
    }

    /// Look-ups go to the tunnel's server and nowhere else.
    pub(super) fn assert_tunnel(&self) {
        let before = (self.network.asked(), self.tunnel.asked());
        for _ in 0..5 {
            assert_eq!(self.look_up(), Some(BY_TUNNEL), "{}", self.logs());
        }
        assert_eq!(self.network.asked(), before.0, "the network's server was asked");
        assert!(self.tunnel.asked() >= before.1 + 5);
    }

    /// Look-ups go to the network's server and nowhere else, soon: services do what they are told a little later.
    pub(super) fn assert_network(&self) {
        let since = Instant::now();
        while self.look_up() != Some(BY_NETWORK) {
            assert!(since.elapsed() < AGAIN, "{}", self.logs());
        }
        let before = self.tunnel.asked();
        assert_eq!(self.look_up(), Some(BY_NETWORK), "{}", self.logs());
        assert_eq!(self.tunnel.asked(), before, "the tunnel's server was asked");
    }

    /// Look-ups go to the tunnel's server again, soon.
    pub(super) fn assert_tunnel_again(&self, since: Instant) {
        while self.look_up() != Some(BY_TUNNEL) {
            assert!(since.elapsed() < AGAIN, "{}", self.logs());
        }
        assert!(since.elapsed() < AGAIN, "it took {:?}", since.elapsed());
    }

    /// Waits for something.
    pub(super) fn until(&self, what: &str, mut is_there: impl FnMut() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !is_there() {
            assert!(Instant::now() < deadline, "{what} did not come: {}", self.logs());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn logs(&self) -> String {
        let state = self
            .here
            .sh("ls -l /etc/resolv.conf || true; cat /etc/resolv.conf || true");
        let files = fs::read_dir(self.folder.path()).unwrap().flatten();
        let logs = files.filter_map(|entry| Some((entry.path(), fs::read_to_string(entry.path()).ok()?)));
        let tail = |text: &str| text.lines().rev().take(15).collect::<Vec<_>>().join("\n");
        logs.fold(state, |all, (path, text)| {
            format!("{all}\n--- {} (latest first)\n{}", path.display(), tail(&text))
        })
    }
}

/// Where `scripts/test.sh` unpacks a name service.
fn unpacked(services: &str) -> PathBuf {
    let root = std::env::var_os("DVPN_NAME_SERVICES").map_or_else(
        || {
            let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
            let cache = cache.unwrap_or_else(|| Path::new(&std::env::var_os("HOME").unwrap()).join(".cache"));
            cache.join("dvpn/name-services-1")
        },
        PathBuf::from,
    );
    let folder = root.join(services);
    assert!(
        root.join("complete").exists() && folder.is_dir(),
        "{} is not there: scripts/test.sh netns unpacks it",
        folder.display()
    );
    folder
}
