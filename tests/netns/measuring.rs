//! The line as a daemon measures it at the pool, over links of a known rate.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use dvpn_common::status::{LineSource, LineStatus, StateName, Status};
use dvpn_tests::{
    certs::Authority,
    namespace::{Namespace, ip},
    network::{Network, NetworkConfig, POOL},
    node::{self, Daemon, Environment, POOL_PORT},
    process::Process,
    sweep,
    world::{CONNECT_PATIENCE, World, unique_id},
};

const PATIENCE: Duration = Duration::from_secs(30);

/// A client whose uplinks are made by the test, and the pool with its speed server. Field order is drop order.
struct Bed {
    network: Network,
    authority: Authority,
    _pool: Process,
    _alone: std::fs::File,
}

impl Bed {
    fn new() -> Result<Self> {
        let alone = sweep::exclusive()?;
        let network = Network::build(&NetworkConfig::with_round_trips(&unique_id(), &[]))?;
        let authority = Authority::create(&network.directory.join("certs"))?;
        let identity = authority.issue("pool", &[POOL.into()], &[])?;
        let pool = node::spawn_pool(&network, &identity)?;
        network
            .internet
            .ip(&format!("rule add pref 700 iif br0 from {POOL} lookup main"))?;
        network.client.namespace.ip("link set eth0 down")?;
        Ok(Self {
            network,
            authority,
            _pool: pool,
            _alone: alone,
        })
    }

    fn client(&self) -> &Namespace {
        &self.network.client.namespace
    }

    /// A link to the internet with these layer-2 rates, in Mbit/s; the machine's only way out from now on.
    fn uplink(&self, number: u8, shape: Option<(u32, u32)>) -> Result<()> {
        let (near, far) = (format!("up{number}"), format!("to-up{number}"));
        let internet = &self.network.internet;
        ip(&[
            "link",
            "add",
            "name",
            &near,
            "netns",
            self.client().name(),
            "type",
            "veth",
            "peer",
            "name",
            &far,
            "netns",
            internet.name(),
        ])?;
        internet.ip(&format!("link set {far} up\naddr add 192.0.{number}.1/24 dev {far}"))?;
        if let Some((down, up)) = shape {
            for (namespace, interface, rate) in [(internet, &far, down), (self.client(), &near, up)] {
                let rate = format!("{rate}mbit");
                let tbf = [
                    "qdisc", "add", "dev", interface, "root", "tbf", "rate", &rate, "burst", "20kb", "latency", "50ms",
                ];
                namespace.output("tc", &tbf)?;
            }
        }
        self.client()
            .ip(&format!("link set {near} up\naddr add 192.0.{number}.2/24 dev {near}"))?;
        self.client().ip(&format!("route replace default via 192.0.{number}.1"))
    }

    /// Bytes that an uplink carried, both ways, with link headers.
    fn carried(&self, number: u8) -> Result<u64> {
        let read = |way: &str| -> Result<u64> {
            let path = format!("/sys/class/net/up{number}/statistics/{way}_bytes");
            let output = self
                .client()
                .output("ip", &["-s", "-j", "link", "show", "dev", &format!("up{number}")])?;
            let links: serde_json::Value = serde_json::from_str(&output).context("reading ip")?;
            let bytes = links.pointer(&format!("/0/stats64/{way}/bytes"));
            bytes.and_then(serde_json::Value::as_u64).context(path)
        };
        Ok(read("rx")? + read("tx")?)
    }

    fn environment(&self, seconds: u32) -> Environment {
        node::client_environment(&self.authority.certificate())
            .with("BANDWIDTH_TEST_URL", format!("https://{POOL}:{POOL_PORT}/speed"))
            .with("BANDWIDTH_SAMPLE_SECONDS", seconds.to_string())
    }

    fn daemon(&self, environment: Environment) -> Result<Daemon> {
        Daemon::spawn(&self.network, &self.network.client, environment)
    }
}

fn line(daemon: &Daemon) -> Result<LineStatus> {
    daemon.client.health()?.1.line.context("the status tells of no line")
}

fn wait_for_line(daemon: &Daemon, what: &str, wanted: impl Fn(&LineStatus) -> bool) -> Result<LineStatus> {
    let status = daemon
        .client
        .wait_status(what, PATIENCE, |status| status.line.as_ref().is_some_and(&wanted));
    let status = status.with_context(|| format!("{:?}\n{}", line(daemon), daemon.process.log_tail()))?;
    status.line.context("a line")
}

/// Within 5 % of what a link of this layer-2 rate carries at layer 3: 1500 of 1514 bytes.
fn check_rate(way: &str, measured: Option<u64>, megabits: u32) -> Result<()> {
    let measured = f64::from(u32::try_from(measured.context("not measured")?)?);
    let part = measured / (f64::from(megabits) * 1e6 * 1500.0 / 1514.0);
    ensure!(
        (0.95..=1.05).contains(&part),
        "{way}: {measured} of {megabits} Mbit/s are {part}"
    );
    Ok(())
}

fn check_measured(line: &LineStatus, down: u32, up: u32) -> Result<()> {
    check_rate("down", line.down_bits_per_second, down)?;
    check_rate("up", line.up_bits_per_second, up)
}

fn is_measured(line: &LineStatus) -> bool {
    line.source == LineSource::Measured && line.measuring_percent.is_none()
}

#[test]
fn a_line_is_measured_once_a_network_and_remembered_over_a_restart() -> Result<()> {
    let bed = Bed::new()?;
    bed.uplink(2, Some((100, 20)))?;
    let daemon = bed.daemon(bed.environment(2))?;
    let before = line(&daemon)?;
    ensure!(before.source == LineSource::Unmeasured, "{before:?}");
    ensure!(before.summary.contains("not shaped"), "{before:?}");
    wait_for_line(&daemon, "the beginning", |line| line.measuring_percent.is_some())?;
    let word = daemon.client.bus().property("Line")?;
    ensure!(
        word.as_str().is_some_and(|word| word.starts_with("measuring ")),
        "{word}"
    );
    let first = wait_for_line(&daemon, "the first line", is_measured)?;
    check_measured(&first, 100, 20)?;
    ensure!(
        first.problem.is_none() && first.next_at > first.measured_at,
        "{first:?}"
    );
    ensure!(first.summary.contains("your grant"), "{first:?}");
    ensure!(
        daemon.client.bus().property("Line")? == "measured",
        "{:?}",
        daemon.client.bus().property("Line")
    );
    let (_, metrics) = daemon.client.control("/metrics")?;
    let gauge = format!(
        "dvpn_line_bits_per_second{{direction=\"down\"}} {}",
        first.down_bits_per_second.unwrap_or(0)
    );
    ensure!(
        metrics.contains(&gauge) && metrics.contains("dvpn_line_source{source=\"measured\"} 1"),
        "{metrics}"
    );
    ensure!(
        daemon.process.log_text().contains("\"event\":\"line_measured\""),
        "{}",
        daemon.process.log_tail()
    );

    // Another network: what was known of the first says nothing of it.
    bed.uplink(3, Some((20, 100)))?;
    wait_for_line(&daemon, "the second line's beginning", |line| {
        line.source == LineSource::Unmeasured
    })?;
    let second = wait_for_line(&daemon, "the second line", is_measured)?;
    check_measured(&second, 20, 100)?;

    // Back on the first one, and over a restart: remembered.
    bed.client().ip("route replace default via 192.0.2.1")?;
    let back = wait_for_line(&daemon, "the first line again", |line| {
        line.measured_at == first.measured_at
    })?;
    ensure!(back.down_bits_per_second == first.down_bits_per_second, "{back:?}");
    let environment = daemon.environment.clone();
    drop(daemon);
    let daemon = bed.daemon(environment)?;
    // Only what holds has a time when it is over.
    let again = wait_for_line(&daemon, "the remembered line", |line| line.next_at.is_some())?;
    ensure!(
        again.measured_at == first.measured_at && again.next_at == first.next_at,
        "{again:?}"
    );
    Ok(())
}

#[test]
fn a_fast_line_is_measured_with_less_than_200_megabytes() -> Result<()> {
    let bed = Bed::new()?;
    bed.uplink(2, None)?;
    let daemon = bed.daemon(bed.environment(8))?;
    wait_for_line(&daemon, "the line", is_measured)?;
    let carried = bed.carried(2)?;
    ensure!((100_000_000..200_000_000).contains(&carried), "{carried}");
    Ok(())
}

#[test]
fn a_session_that_begins_breaks_a_measurement_off_and_its_end_lets_it_begin_again() -> Result<()> {
    let bed = Bed::new()?;
    bed.uplink(2, Some((20, 20)))?;
    let daemon = bed.daemon(bed.environment(2).with("PAYMENT_TOKEN", "dev_nobody-paid"))?;
    wait_for_line(&daemon, "the beginning", |line| {
        line.measuring_percent.is_some_and(|percent| percent >= 10)
    })?;
    daemon.client.start()?;
    let broken = wait_for_line(&daemon, "its end", |line| line.measuring_percent.is_none())?;
    ensure!(broken.source == LineSource::Unmeasured, "{broken:?}");
    ensure!(
        daemon.process.log_text().contains("broken off"),
        "{}",
        daemon.process.log_tail()
    );
    daemon.client.stop()?;
    let line = wait_for_line(&daemon, "the line", is_measured)?;
    check_measured(&line, 20, 20)
}

#[test]
fn in_device_mode_the_line_is_measured_beside_the_tunnel_and_stop_breaks_that_off() -> Result<()> {
    let mut config = NetworkConfig::with_round_trips(&unique_id(), &[8]);
    config.client.rate_bits = Some(50_000_000);
    let world = World::build_with(&config, |environment| {
        environment
            .with("TUNNEL_MODE", "device")
            .with("BANDWIDTH_TEST_URL", format!("https://{POOL}:{POOL_PORT}/speed"))
            .with("BANDWIDTH_SAMPLE_SECONDS", "4")
    })?;
    let wait = |what: &str, state: StateName, wanted: &dyn Fn(&LineStatus) -> bool| {
        let seen = |status: &Status| status.state == state && status.line.as_ref().is_some_and(wanted);
        let status = world.ask().wait_status(what, PATIENCE, seen);
        status.with_context(|| world.client.process.log_tail())
    };
    // One that began before the session was broken off by it.
    world.pay_and_connect()?;
    wait("a measurement", StateName::Connected, &|line| {
        line.measuring_percent.is_some_and(|percent| percent >= 10)
    })?;
    world.ask().stop()?;
    wait("its end", StateName::Disconnected, &|line| {
        line.source == LineSource::Unmeasured && line.measuring_percent.is_none()
    })?;

    world.ask().connect(CONNECT_PATIENCE)?;
    let status = wait("the line", StateName::Connected, &is_measured)?;
    let line = status.line.context("a line")?;
    let way = |bits: Option<u64>| bits.is_some_and(|bits| (30_000_000..55_000_000).contains(&bits));
    ensure!(
        way(line.down_bits_per_second) && way(line.up_bits_per_second),
        "{line:?}"
    );
    let inside = status.rx_bytes + status.tx_bytes;
    ensure!(inside < 1_000_000, "{inside} bytes went through the tunnel");
    Ok(())
}
