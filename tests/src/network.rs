//! The layout: everything a DVPN needs, with addresses that look public.
//!
//! ```text
//!   client .20 ──wire──┐                        ┌── web server 198.51.100.80
//!   pool   .10 ──wire──┤ internet 203.0.113.0/24 ├
//!   providers  ──wire──┘ (bridge, router .1)     └ routed only for the providers' addresses,
//!   .31 .32 .33                                    so an answer proves through whom it went
//!     └─ lan0 192.168.31.0/24 … a private network behind each provider
//! ```
//! Dropping a [`Network`] removes all of it; what a killed process leaves is removed by [`crate::sweep`].

use std::{
    fs::File,
    net::Ipv4Addr,
    path::{Path as FilePath, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::{
    namespace::{self, Namespace},
    sweep,
    wire::{End, Path, Wire},
};

/// Where running networks keep their files: one directory each.
pub const ROOT: &str = "/run/dvpn-lab";
/// Every namespace of ours begins with this.
pub const PREFIX: &str = "dvpnlab-";
/// The router of the internet.
pub const ROUTER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
/// The pool, its payment server included.
pub const POOL: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
/// The client.
pub const CLIENT: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 20);
/// The web server that only providers reach.
pub const WEB: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 80);
/// The name it has at its own name server.
pub const WEB_NAME: &str = "web.dvpn.test";

const WEB_ROUTER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);

/// The outer address of the provider with this number, counted from 0.
pub fn provider_address(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(203, 0, 113, 31_u8.saturating_add(number))
}

/// The host in the private network behind the provider with this number.
pub fn lan_host(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(192, 168, 31_u8.saturating_add(number), 2)
}

/// What to build.
pub struct NetworkConfig {
    /// Part of every name; unique among the networks of this machine.
    pub id: String,
    /// The wire of each provider, at most 200.
    pub providers: Vec<Path>,
    /// The client's wire.
    pub client: Path,
    /// The pool's wire.
    pub pool: Path,
    /// Decides losses and jitter.
    pub seed: u64,
}

impl NetworkConfig {
    /// Providers at these round-trip times from the client, and no other fault.
    pub fn with_round_trips(id: &str, millis: &[u64]) -> Self {
        let providers = millis
            .iter()
            .map(|ms| Path::round_trip(Duration::from_millis(*ms)))
            .collect();
        Self {
            id: id.to_owned(),
            providers,
            client: Path::default(),
            pool: Path::default(),
            seed: 1,
        }
    }
}

/// One machine of the network.
pub struct Machine {
    /// Its name: `client`, `pool`, `provider-a`, …
    pub name: String,
    /// Its outer address.
    pub address: Ipv4Addr,
    /// The way to the internet.
    pub wire: Wire,
    /// Where its processes live.
    pub namespace: Namespace,
    /// Its files: settings, state, logs.
    pub directory: PathBuf,
    /// The private network behind it; providers have one.
    pub lan: Option<Namespace>,
}

/// The whole network. Field order is drop order.
pub struct Network {
    /// The client.
    pub client: Machine,
    /// The pool.
    pub pool: Machine,
    /// The providers, in the order of their configuration.
    pub providers: Vec<Machine>,
    /// The web server's namespace.
    pub web: Namespace,
    /// The bridge and router in the middle.
    pub internet: Namespace,
    /// `/run/dvpn-lab/<id>`.
    pub directory: PathBuf,
    bpf: PathBuf,
    _owner: File,
}

impl Network {
    /// Builds it. What dead networks left is removed first.
    pub fn build(config: &NetworkConfig) -> Result<Self> {
        sweep::dead().context("removing what earlier networks left")?;
        let directory = FilePath::new(ROOT).join(&config.id);
        let owner = sweep::claim(&directory)?;
        let name = |part: &str| format!("{PREFIX}{}-{part}", config.id);
        let internet = Namespace::create(&name("internet"))?;
        internet.ip(&format!(
            "link add br0 type bridge\naddr add {ROUTER}/24 dev br0\nlink set br0 up"
        ))?;
        internet.sysctl("ipv4/ip_forward", "1")?;
        let web = Namespace::create(&name("web"))?;
        link(&internet, "beyond", &web, "eth0")?;
        internet.ip(&format!("addr add {WEB_ROUTER}/24 dev beyond"))?;
        web.ip(&format!(
            "addr add {WEB}/24 dev eth0\nroute add default via {WEB_ROUTER}"
        ))?;
        // Only providers' addresses are routed to the web server; the rule after them turns everybody else away.
        internet.ip("rule add pref 900 iif br0 unreachable")?;

        let machine = |part: &str, address: Ipv4Addr, path: Path, seed: u64| -> Result<Machine> {
            let namespace = Namespace::create(&name(part))?;
            let port = format!("to-{part}");
            let (inside, outside) = (
                End {
                    namespace: &namespace,
                    interface: "eth0",
                },
                End {
                    namespace: &internet,
                    interface: &port,
                },
            );
            let wire = Wire::connect(inside, outside, path, seed)?;
            namespace.ip(&format!(
                "link set eth0 txqueuelen 4000\nlink set eth0 up\naddr add {address}/24 dev eth0\n\
                 route add default via {ROUTER}"
            ))?;
            internet.ip(&format!(
                "link set {port} txqueuelen 4000\nlink set {port} master br0\nlink set {port} up"
            ))?;
            let directory = directory.join(part);
            std::fs::create_dir_all(&directory).with_context(|| format!("making {}", directory.display()))?;
            Ok(Machine {
                name: part.to_owned(),
                address,
                wire,
                namespace,
                directory,
                lan: None,
            })
        };
        let seed = config.seed.wrapping_mul(1000);
        let pool = machine("pool", POOL, config.pool, seed)?;
        let client = machine("client", CLIENT, config.client, seed.wrapping_add(1))?;
        let mut providers = Vec::new();
        for (number, path) in (0_u8..200).zip(&config.providers) {
            let letter = provider_name(number);
            let address = provider_address(number);
            let mut provider = machine(&letter, address, *path, seed.wrapping_add(2 + u64::from(number)))?;
            internet.ip(&format!("rule add pref 800 iif br0 from {address} lookup main"))?;
            provider.lan = Some(private_network(&provider, &name(&format!("{letter}-lan")), number)?);
            providers.push(provider);
        }
        let bpf = directory.join("bpf");
        std::fs::create_dir_all(&bpf).with_context(|| format!("making {}", bpf.display()))?;
        mount(Some("bpf"), &bpf, Some("bpf"), MsFlags::empty(), None::<&str>)
            .with_context(|| format!("mounting a BPF file system at {}", bpf.display()))?;
        Ok(Self {
            client,
            pool,
            providers,
            web,
            internet,
            directory,
            bpf,
            _owner: owner,
        })
    }

    /// A BPF file system of this network's own, one directory a machine.
    pub fn bpf_directory(&self, machine: &Machine) -> PathBuf {
        self.bpf.join(&machine.name)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        // Nearly all processes have ended with their handles; a traced or forgotten one has not.
        let id = self
            .directory
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default();
        if let Err(error) = sweep::end_processes(&namespace::names(&format!("{PREFIX}{id}-"))) {
            tracing::error!("{error:#}");
        }
        if let Err(error) = umount2(&self.bpf, MntFlags::MNT_DETACH) {
            tracing::error!("unmounting {}: {error}", self.bpf.display());
        }
        // With DVPN_LAB_KEEP the logs stay for whoever looks into a failure; `dvpn-lab sweep` removes them.
        if std::env::var_os("DVPN_LAB_KEEP").is_none()
            && let Err(error) = std::fs::remove_dir_all(&self.directory)
        {
            tracing::error!("removing {}: {error}", self.directory.display());
        }
    }
}

/// `provider-a`, `provider-b`, …; numbers from the 27th on.
pub fn provider_name(number: u8) -> String {
    if number < 26 {
        format!("provider-{}", char::from(b'a' + number))
    } else {
        format!("provider-{number}")
    }
}

fn private_network(provider: &Machine, name: &str, number: u8) -> Result<Namespace> {
    let lan = Namespace::create(name)?;
    link(&provider.namespace, "lan0", &lan, "eth0")?;
    let host = lan_host(number);
    let [a, b, c, _] = host.octets();
    let gateway = Ipv4Addr::new(a, b, c, 1);
    provider.namespace.ip(&format!("addr add {gateway}/24 dev lan0"))?;
    lan.ip(&format!("addr add {host}/24 dev eth0\nroute add default via {gateway}"))?;
    Ok(lan)
}

/// Joins two namespaces by a veth pair, both ends up.
fn link(a: &Namespace, a_end: &str, b: &Namespace, b_end: &str) -> Result<()> {
    namespace::ip(&[
        "link",
        "add",
        "name",
        a_end,
        "netns",
        a.name(),
        "type",
        "veth",
        "peer",
        "name",
        b_end,
        "netns",
        b.name(),
    ])?;
    a.ip(&format!("link set {a_end} up"))?;
    b.ip(&format!("link set {b_end} up"))
}
