//! A network that wants a login before it lets anything pass, as in hotels: the daemon says so, and while it blocks
//! everything lets one user's browser out to log in, for a while that the kernel ends.

mod hotel;

use std::{
    net::SocketAddr,
    os::unix::process::CommandExt as _,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use dvpn_common::{
    dbus::portal::{PAGE, PROXY},
    status::{ModeName, PortalSign, StateName},
};
use dvpn_daemon::tunnel::FWMARK;
use dvpn_tests::{
    capture::Packet,
    leak::LeakWatch,
    network::{NetworkConfig, POOL, ROOT, ROUTER, WEB},
    node::{Daemon, Environment, POOL_PORT},
    process::wait_for,
    world::{CONNECT_PATIENCE, World, unique_id},
};
use hotel::{Hotel, LOGIN, LOGIN_PORT, POOL_NAME, front};

const TIMEOUT: Duration = Duration::from_millis(700);
const PATIENCE: Duration = Duration::from_secs(10);
/// From a failed attempt to a verdict: three questions side by side, and what the attempt itself waited for.
const FOUND_WITHIN: Duration = Duration::from_secs(40);
/// `nobody`, who may not control the daemon.
const USER: u32 = 65534;

/// A client in device mode that has paid and wants to be connected, in a network that wants a login.
struct Stay {
    world: World,
    hotel: Hotel,
    watch: LeakWatch,
}

fn check_in(told: impl FnOnce(Environment) -> Environment) -> Result<Stay> {
    let network = NetworkConfig::with_round_trips(&unique_id(), &[8]);
    let names = std::path::Path::new(ROOT).join(&network.id).join("client/resolv.conf");
    let world = World::build_with(&network, |environment| {
        let written = std::fs::write(&names, format!("nameserver {ROUTER}\n"));
        assert!(written.is_ok(), "{written:?}");
        told(environment)
            .with("TUNNEL_MODE", "device")
            .with("POOL_URL", format!("https://{POOL_NAME}:{POOL_PORT}/providers"))
            .with("PAYMENT_API_URL", format!("https://{POOL_NAME}:{POOL_PORT}/payment"))
    })?;
    let hotel = Hotel::open(&world.network.internet)?;
    world.pay()?;
    hotel.close_doors(&world)?;
    // The daemon's own questions: to the name server, and to what it takes for the pool, by TLS and in the clear; and
    // the login.
    let mut watch = LeakWatch::begin_with(&world.network.client, |packet: &Packet| {
        match (packet.destination, packet.protocol) {
            (ROUTER, 17) => packet.destination_port == 53,
            (ROUTER, 6) => [80, LOGIN_PORT, POOL_PORT].contains(&packet.destination_port),
            (POOL, 6) => packet.destination_port == 80,
            _ => false,
        }
    })?;
    world.ask().start()?;
    world
        .ask()
        .wait_status("an attempt", PATIENCE, |status| status.attempts > 0)?;
    watch.flood()?;
    let status = world
        .ask()
        .wait_status("a network that wants a login", FOUND_WITHIN, |status| {
            status
                .portal
                .is_some_and(|portal| portal.sign == Some(PortalSign::Page))
        })
        .with_context(|| world.client.process.log_tail())?;
    ensure!((status.mode, status.blocking) == (ModeName::Device, true), "{status:?}");
    let problem = status.problem.context("a problem")?;
    ensure!(problem.what.contains("wants you to log in"), "{problem:?}");
    ensure!(problem.how.contains("Portal"), "{problem:?}");
    Ok(Stay { world, hotel, watch })
}

/// What `Portal` answers.
struct Way {
    proxy: SocketAddr,
    page: String,
}

impl Stay {
    fn let_out(&self, uid: u32) -> Result<Way> {
        let reply = self.world.ask().bus().call("Portal", &["u", &uid.to_string()])?;
        let text = |name: &str| {
            let value = reply.pointer(&format!("/data/0/{name}/data"));
            value
                .and_then(serde_json::Value::as_str)
                .with_context(|| reply.to_string())
        };
        let proxy = text(PROXY)?.strip_prefix("socks5://").context("a SOCKS5 proxy")?;
        Ok(Way {
            proxy: proxy.parse()?,
            page: text(PAGE)?.to_owned(),
        })
    }

    /// What a user's program gets through the proxy.
    fn browse(&self, uid: u32, way: &Way, arguments: &[&str]) -> Result<String> {
        let proxy = way.proxy.to_string();
        let output = self.world.ask().namespace().run(|| {
            Command::new("curl")
                .args([
                    "--silent",
                    "--show-error",
                    "--max-time",
                    "8",
                    "--socks5-hostname",
                    &proxy,
                ])
                .args(arguments)
                .current_dir("/")
                .uid(uid)
                .gid(uid)
                .output()
        })?;
        let output = output.context("running curl: install it")?;
        if !output.status.success() {
            bail!("curl {arguments:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Nothing without our mark passes, at whatever port and to whomever.
    fn nobody_passes(&self, when: &str) -> Result<()> {
        let login = SocketAddr::from((ROUTER, LOGIN_PORT));
        for to in [front(), login, (WEB, 80).into(), (POOL, 443).into()] {
            let passed = self.world.ask().namespace().connect(to, TIMEOUT).is_ok();
            ensure!(!passed, "{when}: a program without our mark reaches {to}");
        }
        self.watch.check(when)
    }

    /// Whether a socket with our mark, as only root can make one, reaches the portal: it sees what the firewall lets out
    /// for the login, and nothing else does.
    fn is_open(&self) -> Result<bool> {
        self.world.ask().namespace().run(|| -> Result<bool> {
            let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
            socket.set_mark(FWMARK)?;
            // An address and port that no other exemption names.
            let login = SocketAddr::from((ROUTER, LOGIN_PORT));
            Ok(socket.connect_timeout(&login.into(), TIMEOUT).is_ok())
        })?
    }

    fn wait_closed(&self, patience: Duration) -> Result<()> {
        wait_for("the end of the opening", patience, || {
            Ok((!self.is_open()?).then_some(()))
        })
    }
}

#[test]
fn a_browser_of_one_user_logs_in_while_nothing_else_passes_and_then_the_client_connects_by_itself() -> Result<()> {
    let stay = check_in(|environment| environment)?;
    let ask = stay.world.ask();
    stay.nobody_passes("before anybody asked")?;
    ensure!(!stay.is_open()?, "open before anybody asked");
    ensure!(
        ask.bus().call_as(USER, "Portal", &["u", "65534"]).is_err(),
        "somebody lets themselves out"
    );
    ensure!(!stay.is_open()?, "a refused call opened");

    let way = stay.let_out(USER)?;
    ensure!(way.page == LOGIN, "{}", way.page);
    ensure!(stay.is_open()?, "not open for the login");
    ensure!(ask.bus().property("PortalState")? == "open");
    let status = ask.wait_status("an open way", PATIENCE, |status| {
        status.portal.is_some_and(|portal| portal.open_until.is_some())
    })?;
    let left = status.portal.and_then(|portal| portal.open_until).context("an end")?;
    let left = left.duration_since(jiff::Timestamp::now()).as_secs();
    ensure!((200..=300).contains(&left), "open for {left} s");
    // Asked for again it is the same; another user has to wait, and cannot use this one, not even root.
    ensure!(stay.let_out(USER)?.proxy == way.proxy);
    ensure!(stay.let_out(1000).is_err(), "two at once");
    for uid in [0, 1000] {
        let other = stay.browse(uid, &way, &[LOGIN]);
        ensure!(other.is_err(), "user {uid} gets {other:?}");
    }

    // What a browser does: whatever it asks for, it is sent to the login.
    let sent = stay.browse(
        USER,
        &way,
        &["--write-out", "%{http_code} %{redirect_url}", "http://news.test/"],
    )?;
    ensure!(sent == format!("302 {LOGIN}"), "{sent}");
    ensure!(stay.browse(USER, &way, &[LOGIN])? == "log in here");
    stay.nobody_passes("during the login")?;
    // Not other ports, not this machine, and no other protocol.
    for refused in [
        "http://news.test:22/",
        "http://127.0.0.1:9808/health",
        "http://news.test:8881/",
    ] {
        ensure!(stay.browse(USER, &way, &[refused]).is_err(), "{refused} is reached");
    }
    ensure!(stay.browse(USER, &way, &["--data", "room=7", "http://login.hotel.test:8880/login"])? == "welcome");
    ensure!(stay.hotel.welcome(&stay.world)?, "nobody has logged in");

    // Nobody does anything any more.
    ask.wait_state(StateName::Connected, Duration::from_secs(30))
        .with_context(|| stay.world.client.process.log_tail())?;
    let (_, status) = ask.health()?;
    ensure!(status.portal.is_none() && status.problem.is_none(), "{status:?}");
    stay.wait_closed(PATIENCE)?;
    ensure!(
        ask.namespace().connect(way.proxy, TIMEOUT).is_err(),
        "the proxy is still there"
    );
    let log = stay.world.client.process.log_text();
    for event in ["portal_found", "portal_opened", "portal_closed"] {
        ensure!(log.contains(event), "no record of {event}");
    }
    let refused = stay.let_out(USER);
    ensure!(refused.is_err(), "let out while connected");
    let Stay { world, hotel, watch } = stay;
    let tried = watch.end(|| world.ask().disconnect(CONNECT_PATIENCE).map(drop))?;
    drop(hotel);
    ensure!(tried > 100, "the flood tried only {tried} times");
    Ok(())
}

#[test]
fn the_opening_ends_by_itself_also_when_the_daemon_is_killed() -> Result<()> {
    const SECONDS: u64 = 6;
    let mut stay = check_in(|environment| environment.with("CAPTIVE_PORTAL_SECONDS", SECONDS.to_string()))?;
    let begun = Instant::now();
    let way = stay.let_out(USER)?;
    ensure!(stay.is_open()?, "not open for the login");
    stay.wait_closed(PATIENCE)?;
    let lasted = begun.elapsed();
    ensure!(
        (Duration::from_secs(SECONDS - 1)..Duration::from_secs(SECONDS + 3)).contains(&lasted),
        "open for {lasted:?}"
    );
    wait_for("the end of the proxy", PATIENCE, || {
        Ok(stay
            .world
            .ask()
            .namespace()
            .connect(way.proxy, TIMEOUT)
            .is_err()
            .then_some(()))
    })?;
    // The network is what it was.
    let status = stay.world.ask().wait_status("the end", PATIENCE, |status| {
        status.portal.is_some_and(|p| p.open_until.is_none())
    })?;
    ensure!(status.blocking, "{status:?}");
    stay.nobody_passes("after the time")?;

    // The kernel keeps the time without the daemon.
    let begun = Instant::now();
    stay.let_out(USER)?;
    stay.world.client.process.kill()?;
    ensure!(
        stay.is_open()?,
        "with the daemon ended the opening: then this shows nothing"
    );
    stay.nobody_passes("after the daemon was killed")?;
    stay.wait_closed(Duration::from_secs(SECONDS + 4))?;
    let lasted = begun.elapsed();
    ensure!(
        lasted < Duration::from_secs(SECONDS + 3),
        "open for {lasted:?} without the daemon"
    );
    stay.nobody_passes("after the time, without the daemon")?;

    // A successor ends at once what it finds.
    let environment = stay
        .world
        .client
        .environment
        .clone()
        .with("CAPTIVE_PORTAL_SECONDS", "300");
    stay.world.client = Daemon::spawn(&stay.world.network, &stay.world.network.client, environment.clone())?;
    stay.world
        .ask()
        .wait_status("blocking", PATIENCE, |status| status.blocking)?;
    stay.let_out(USER)?;
    ensure!(stay.is_open()?, "not open for the login");
    // On another network nobody asked to be let out.
    let other = format!("ip route del default; ip route add default via {ROUTER} metric 7");
    stay.world.ask().namespace().output("sh", &["-euc", &other])?;
    stay.wait_closed(PATIENCE)?;
    stay.let_out(USER)?;
    ensure!(stay.is_open()?, "not open for the login");
    stay.world.client.process.kill()?;
    ensure!(stay.is_open()?, "closed by whom?");
    stay.world.client = Daemon::spawn(&stay.world.network, &stay.world.network.client, environment)?;
    stay.wait_closed(PATIENCE)?;
    stay.nobody_passes("with a successor")?;
    // Stop opens everything; there is nobody to let out then.
    let Stay { world, hotel, watch } = stay;
    watch.end(|| world.ask().disconnect(CONNECT_PATIENCE).map(drop))?;
    ensure!(
        world.ask().bus().call("Portal", &["u", "0"]).is_err(),
        "let out of nothing"
    );
    drop(hotel);
    Ok(())
}
