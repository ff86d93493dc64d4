//! What each invocation of the program does.

mod check;
mod machine;

use std::{
    io::Write as _,
    path::Path,
    process::ExitCode,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context as _, anyhow};
use dvpn_common::status::{NodeStatus, Problem, Status};
use dvpn_core::{
    audit::Event,
    config::{Config, Mode},
    firewall::{Exemptions, Policy},
    line::Known,
    session::Restored,
};
use jiff::Timestamp;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use rand::{TryRng as _, rngs::SysRng};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    sync::{mpsc, watch},
};
use tokio_util::sync::CancellationToken;

pub use check::check_config;

use crate::{
    audit::Audit,
    control::{self, Control, metrics::Metrics, payments::Payments},
    control_plane::ControlPlane,
    driver::{Driver, Ended, Parts, Termination, Views, Watchdog},
    ebpf,
    host::{self, DeviceConfig, Host, dns::Dns},
    http::{self, Payment, Pool},
    leak_test::Tester,
    line,
    logs::{self, Tail},
    node::{self, Node},
    provider::{ProviderStatus, TunnelFactory},
    settings::{self, Arguments, EXIT_CONFIG},
    socks5,
    state::{self, Lock, State},
    tunnel::CLIENT_INTERFACE,
};

/// Threads that move packets and answer requests. Blocking work has threads of its own.
const WORKERS: usize = 2;
/// How long the end of the daemon waits for tasks that do not end by themselves.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(2);
/// For replies that are still on their way to callers on the bus.
const BUS_FAREWELL: Duration = Duration::from_millis(500);

/// Writes `text` to standard output.
pub fn print(text: &str) -> ExitCode {
    match writeln!(std::io::stdout().lock(), "{}", text.trim_end()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// Writes an error to standard error.
pub fn complain(text: &str) -> ExitCode {
    // There is nobody left to tell if this fails too.
    drop(writeln!(std::io::stderr().lock(), "dvpn-daemon: {text}"));
    ExitCode::FAILURE
}

/// `--help`, `--version`, or an argument that does not read.
pub fn usage(asked: &clap::Error) -> ExitCode {
    match asked.print() {
        Ok(()) if !asked.use_stderr() => ExitCode::SUCCESS,
        Ok(()) => ExitCode::from(EXIT_CONFIG),
        Err(_) => ExitCode::FAILURE,
    }
}

/// A configuration that is refused: everything wrong with it, and the exit status that keeps a service manager from
/// trying again.
pub fn refuse(error: &settings::Error) -> ExitCode {
    complain(&chain(error));
    ExitCode::from(EXIT_CONFIG)
}

/// `--simulate`: the session machine in `seeds` hostile worlds.
pub fn simulate(seeds: u64) -> ExitCode {
    let report = dvpn_core::sim::run(
        0..seeds,
        dvpn_core::Now {
            instant: Instant::now(),
            wall: Timestamp::now(),
        },
    );
    let printed = print(&report.to_string());
    if report.is_good() { printed } else { ExitCode::FAILURE }
}

/// `--cleanup`: takes everything of ours off the machine and says what it was.
pub fn cleanup(bpf_directory: &Path, state_directory: &Path) -> ExitCode {
    let report = runtime().and_then(|runtime| {
        runtime.block_on(async {
            let host = Host::open()?;
            // While the tunnel's link is there to be taken from systemd-resolved.
            let names = Dns::open(state_directory).undo().await;
            let mut report: Vec<_> = names.into_iter().map(|done| done.map_err(host::Error::from)).collect();
            report.extend(host.cleanup(bpf_directory).await);
            Ok(report)
        })
    });
    let report = match report {
        Ok(report) => report,
        Err(error) => return complain(&format!("{error:#}")),
    };
    let (mut code, mut lines) = (ExitCode::SUCCESS, Vec::new());
    for outcome in report {
        match outcome {
            Ok(removed) => lines.push(format!("removed {removed}")),
            Err(error) => {
                code = complain(&chain(&error));
            }
        }
    }
    if lines.is_empty() {
        lines.push("nothing of dvpn was left on this machine".to_owned());
    }
    let printed = print(&lines.join("\n"));
    if code == ExitCode::SUCCESS { printed } else { code }
}

/// `--early-boot`: blocks before there is a network, if the service is going to. The service adopts it.
pub fn early_boot(config: &Config) -> ExitCode {
    let tunnel = &config.tunnel;
    let blocks = tunnel.mode == Mode::Device
        && (tunnel.lockdown || (tunnel.kill_switch && state::stored_wish(&config.state_directory)));
    if !blocks {
        return print("nothing is to be blocked");
    }
    let blocked = runtime().and_then(|runtime| {
        runtime.block_on(async {
            let host = Host::open()?;
            host.device_mode(device_config(config)).await;
            host.apply_policy(&Policy::Blocked(Exemptions::default())).await?;
            Ok(())
        })
    });
    match blocked {
        Ok(()) => print("everything is blocked until the service runs"),
        Err(error) => complain(&format!("{error:#}")),
    }
}

pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .max_blocking_threads(8)
        .enable_all()
        .build()
        .context("starting the runtime")
}

/// Runs the service; a provider's device comes from `device`.
pub fn serve(arguments: Arguments, config: Config, device: TunnelFactory) -> ExitCode {
    let tail = match logs::init(&config.log) {
        Ok(tail) => tail,
        Err(error) => return complain(&error),
    };
    let runtime = match runtime() {
        Ok(runtime) => runtime,
        Err(error) => return complain(&format!("{error:#}")),
    };
    raise_descriptor_limit();
    let ended = runtime.block_on(service(arguments, config, tail, device));
    runtime.shutdown_timeout(SHUTDOWN_TIMEOUT);
    match ended {
        Ok(Ended::Exit | Ended::Terminated) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The proxy's connections need descriptors: the soft limit is raised to the hard one.
fn raise_descriptor_limit() {
    let raised =
        getrlimit(Resource::RLIMIT_NOFILE).and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::debug!("raising the limit of open files: {error}");
    }
}

async fn service(arguments: Arguments, config: Config, tail: Tail, device: TunnelFactory) -> anyhow::Result<Ended> {
    let config = Arc::new(config);
    let terminated = terminated()?;
    let (seed, run) = (random::<32>()?, random::<8>()?);
    let audit = Audit::open(format!("{:016x}", u64::from_be_bytes(run)));
    audit.record(&Event::Started {
        version: env!("CARGO_PKG_VERSION").to_owned(),
    });

    // Before anything is read or touched: a second daemon must not take down what the first has set up.
    let _lock = Lock::take(&config.state_directory)?;
    let state = State::open(&config.state_directory, config.token_passphrase.as_ref())?;
    let host = Arc::new(Host::open()?);
    let metrics = Metrics::new().context("registering the metrics")?;
    let dns = Dns::open(&config.state_directory);
    let control_plane = device_mode(&config, &host, &state, &dns).await;
    let client = http::Client::new(http::Options {
        ca_file: config.ssl_cert_file.clone(),
        control_plane: control_plane.clone(),
    });
    let payment = config.payment_api_url.clone();
    let payment = payment.map(|url| Payment::new(client.clone(), url));
    let pool = config.pool_url.clone().map(|url| Pool::new(client.clone(), url));
    let payments = Payments::new(payment.clone(), state.clone(), audit.clone(), &config);

    let views = Views::new(&config, found_blocking(&host));
    let (side, node_view) = control::Provider::none_yet();
    let (commands, orders) = mpsc::channel(16);
    let control = Control::new(
        commands.clone(),
        views.status(),
        tail,
        audit.clone(),
        control::Services {
            payments: payments.clone(),
            provider: side.clone(),
            tester: Tester::new(&host, config.tunnel.mode, control_plane.as_ref(), &audit),
        },
        nix::unistd::geteuid().as_raw(),
    );
    let lines = line::Views::new(&config, &state);
    let control = control.with_line(lines.status());
    let counters = Arc::new(Mutex::new(None));

    // Everything that others reach stands before anybody is told that it does.
    let page_listener = listen(config.control.listen, "CONTROL_LISTEN").await?;
    let proxy_listener = listen(config.socks5.listen, "SOCKS5_LISTEN").await?;
    let proxy_metrics = Arc::new(socks5::Metrics::default());
    let provider_seen = Arc::new(OnceLock::new());
    let refresh = refresh(&counters, &proxy_metrics, &provider_seen, &metrics);
    tokio::spawn(control::http::serve(
        page_listener,
        config.control.token.clone(),
        views.status(),
        side.status.clone(),
        lines.status(),
        metrics.clone(),
        refresh,
    ));
    let proxy_end = serve_proxy(&config, proxy_listener, views.path(), proxy_metrics);
    let bus = join_bus(control).await;
    notify("READY=1\nSTATUS=running");

    let machine = machine::watch_machine(&host, &dns, config.tunnel.mode).await;
    let (reload_sender, reload) = mpsc::channel(1);
    tokio::spawn(reload_on_hangup(arguments, reload_sender, audit.clone()));
    payments.resume(commands).await;
    let node = start_node(
        &config,
        &state,
        &host,
        &client,
        &audit,
        (side.drain.subscribe(), lines.known(), device),
        (node_view, &provider_seen),
    )
    .await;
    let sides = (views.status(), side.status);
    watch_line((&config, &client, &host, &state, &audit), sides, lines);
    let own_node = node.as_ref().map(|node| (node.id.clone(), node.public_key));
    let restored = restore(&state, &config).await;
    put_back_names(&dns, &restored, config.tunnel.mode).await;
    let parts = Parts {
        config,
        state,
        host,
        control_plane,
        dns,
        pool,
        payment,
        own_node,
        audit,
        metrics,
        counters,
        watchdog: watchdog(),
    };
    let driver = Driver::new(parts, seed, restored, views).await;
    let ended = driver.run(orders, reload, machine, terminated).await;
    notify("STOPPING=1");
    proxy_end.cancel();
    if let Some(node) = node {
        node.stop().await;
    }
    leave(bus).await;
    Ok(ended)
}

/// Serves the proxy until the token is cancelled.
fn serve_proxy(
    config: &Config,
    listener: TcpListener,
    path: socks5::TunnelWatch,
    metrics: Arc<socks5::Metrics>,
) -> CancellationToken {
    let end = CancellationToken::new();
    let login = config.socks5.login.as_ref();
    let login = login.map(|(user, password)| socks5::Credentials::new(user, password.expose()));
    tokio::spawn(socks5::serve(listener, login, path, metrics, end.clone()));
    end
}

/// Keeps the line known, beside everything else.
fn watch_line(
    (config, client, host, state, audit): (&Arc<Config>, &http::Client, &Arc<Host>, &State, &Audit),
    (status, node): (watch::Receiver<Status>, watch::Receiver<Option<NodeStatus>>),
    lines: line::Views,
) {
    let parts = line::Parts {
        config: Arc::clone(config),
        client: client.clone(),
        host: Arc::clone(host),
        state: state.clone(),
        audit: audit.clone(),
        status,
        node,
    };
    tokio::spawn(line::run(parts, lines));
}

/// Whether an earlier run left everything blocked.
fn found_blocking(host: &Host) -> bool {
    host.found_blocking().unwrap_or_else(|error| {
        tracing::debug!("looking for a firewall of an earlier run: {}", chain(&error));
        false
    })
}

/// Prepares device mode, if it is configured: how connections of our own go beside the tunnel.
async fn device_mode(config: &Config, host: &Arc<Host>, state: &State, dns: &Dns) -> Option<ControlPlane> {
    if config.tunnel.mode != Mode::Device {
        return None;
    }
    host.device_mode(device_config(config)).await;
    Some(ControlPlane::new(Arc::clone(host), state.clone(), dns.clone()))
}

fn device_config(config: &Config) -> DeviceConfig {
    let served = if config.node.register {
        vec![config.node.port, config.node.probe_port]
    } else {
        Vec::new()
    };
    DeviceConfig {
        allow_lan: config.tunnel.allow_lan,
        inbound: config.tunnel.allow_inbound.clone(),
        served,
    }
}

/// Undoes what a killed run did to the machine's name resolution; a session that goes on in device mode takes it over.
async fn put_back_names(dns: &Dns, restored: &Restored, mode: Mode) {
    if restored.wish && mode == Mode::Device {
        return;
    }
    for undone in dns.undo().await {
        match undone {
            Ok(what) => tracing::info!("put back after an earlier run: {what}"),
            Err(error) => tracing::warn!("{}", chain(&error)),
        }
    }
}

/// Bytes from the operating system's generator.
fn random<const N: usize>() -> anyhow::Result<[u8; N]> {
    let mut bytes = [0; N];
    SysRng
        .try_fill_bytes(&mut bytes)
        .map_err(|error| anyhow!("the operating system gives no random numbers: {error}"))?;
    Ok(bytes)
}

/// A container has no bus: that is logged once, and the daemon goes on.
async fn join_bus(control: Control) -> Option<zbus::Connection> {
    match control::dbus::serve(control).await {
        Ok(bus) => Some(bus),
        Err(error) => {
            tracing::warn!("no D-Bus control ({error}): start and stop by the stored wish only");
            None
        }
    }
}

/// Leaves the bus once the reply to `Exit` has been sent.
async fn leave(bus: Option<zbus::Connection>) {
    if let Some(bus) = bus
        && tokio::time::timeout(BUS_FAREWELL, bus.graceful_shutdown())
            .await
            .is_err()
    {
        tracing::debug!("the bus took no farewell");
    }
}

async fn listen(address: std::net::SocketAddr, setting: &str) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address)
        .await
        .with_context(|| format!("listening on {address}: is another program there? Change {setting}"))
}

/// The provider side, if its owner opted in. Whatever goes wrong with it, the client side goes on.
async fn start_node(
    config: &Arc<Config>,
    state: &State,
    host: &Host,
    client: &http::Client,
    audit: &Audit,
    (drained, line, device): (watch::Receiver<bool>, watch::Receiver<Known>, TunnelFactory),
    (view, seen): (
        watch::Sender<Option<NodeStatus>>,
        &OnceLock<watch::Receiver<ProviderStatus>>,
    ),
) -> Option<Node> {
    // Also what an earlier run left that was killed, or whose owner has changed their mind since. Its links go before its
    // firewall: while a link of ours stands, so does what keeps its peers off this machine.
    match host.remove_left_links().await {
        Err(error) => tracing::error!("an interface that an earlier run left stays: {}", chain(&error)),
        Ok(()) => {
            if let Err(error) = host.provider_down().await {
                tracing::debug!("an earlier provider side could not be taken down: {}", chain(&error));
            }
        }
    }
    if !config.node.register {
        return None;
    }
    match Node::start(config, state, host, client, audit, (drained, line), device).await {
        Ok(node) => {
            // Set once: there is one node in a daemon's life.
            drop(seen.set(node.status.clone()));
            tokio::spawn(node::show(node.id.clone(), node.status.clone(), view));
            Some(node)
        }
        Err(error) => {
            tracing::error!("this node is no provider: {}", chain(&error));
            view.send_replace(Some(NodeStatus {
                problem: Some(Problem {
                    what: "this node is no provider".to_owned(),
                    how: chain(&error),
                }),
                ..NodeStatus::default()
            }));
            None
        }
    }
}

/// What outlived the last run. A record that does not open is logged and counts as absent: the stricter reading.
async fn restore(state: &State, config: &Config) -> Restored {
    let token = match &config.payment_token {
        Some(token) => Ok(Some(token.clone())),
        None => state.token().await,
    };
    let subscription = match token {
        Ok(Some(token)) => state.subscription(&token).await.unwrap_or_else(|error| {
            tracing::warn!("the stored subscription is not used: {}", chain(&error));
            None
        }),
        Ok(None) => None,
        Err(error) => {
            tracing::warn!("the stored token is not used: {}", chain(&error));
            None
        }
    };
    Restored {
        wish: state.wish(),
        last_endpoint: state.last_endpoint(),
        subscription,
    }
}

/// Reads the programs' counters whenever the metrics page is asked for.
fn refresh(
    counters: &Arc<Mutex<Option<ebpf::Counters>>>,
    proxy: &Arc<socks5::Metrics>,
    provider: &Arc<OnceLock<watch::Receiver<ProviderStatus>>>,
    metrics: &Metrics,
) -> Arc<dyn Fn() + Send + Sync> {
    let (counters, proxy, metrics) = (Arc::clone(counters), Arc::clone(proxy), metrics.clone());
    let provider = Arc::clone(provider);
    Arc::new(move || {
        metrics.show_proxy(&proxy);
        if let Some(status) = provider.get() {
            metrics.show_provider(&status.borrow());
        }
        let counters = counters.lock().unwrap_or_else(PoisonError::into_inner);
        match counters.as_ref().map(ebpf::Counters::read) {
            Some(Ok([ingress, egress])) => {
                metrics.show_interface(CLIENT_INTERFACE, "ingress", ingress);
                metrics.show_interface(CLIENT_INTERFACE, "egress", egress);
            }
            Some(Err(error)) => tracing::debug!("reading the packet counters: {error}"),
            None => {}
        }
    })
}

/// Tells the service manager, if there is one.
fn notify(text: &str) {
    let pairs = text.lines().filter_map(|line| line.split_once('='));
    let pairs: Vec<(&str, &str)> = pairs.collect();
    match systemd::daemon::notify(pairs.iter()) {
        Ok(_) => {}
        Err(error) => tracing::warn!("telling the service manager {text:?}: {error}"),
    }
}

/// What the service manager asks for (`WatchdogSec=`, `sd_watchdog_enabled(3)`): signs of life, four in its limit.
fn watchdog() -> Option<Watchdog> {
    match systemd::daemon::watchdog_enabled() {
        Ok(0) => None,
        Ok(limit_us) => Some(Watchdog {
            every: Duration::from_micros(limit_us) / 4,
            feed: || notify("WATCHDOG=1"),
        }),
        Err(error) => {
            tracing::warn!("reading WATCHDOG_USEC: {error}; the service manager's watchdog gets no sign of life");
            None
        }
    }
}

/// Completes when the service manager or the terminal ends the daemon: SIGTERM and SIGINT stop it, SIGUSR1 (the unit's
/// `RestartKillSignal=`) ends it for a successor. Signals are caught from the call on, not from the first poll: one that
/// comes while the daemon is still starting is not lost and does not kill it half-way.
fn terminated() -> anyhow::Result<impl Future<Output = Termination>> {
    let mut term = signal(SignalKind::terminate()).context("catching SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("catching SIGINT")?;
    let mut restart = signal(SignalKind::user_defined1()).context("catching SIGUSR1")?;
    Ok(async move {
        tokio::select! {
            _ = term.recv() => Termination::Stop,
            _ = interrupt.recv() => Termination::Stop,
            _ = restart.recv() => Termination::Restart,
        }
    })
}

/// SIGHUP: reads the configuration again; a bad one is refused and the old one holds.
async fn reload_on_hangup(arguments: Arguments, reload: mpsc::Sender<Arc<Config>>, audit: Audit) {
    let Ok(mut hangup) = signal(SignalKind::hangup()) else {
        return;
    };
    while hangup.recv().await.is_some() {
        match arguments.load(std::env::vars_os()) {
            Ok(config) => {
                audit.record(&Event::ConfigReloaded {
                    accepted: true,
                    reason: None,
                });
                tracing::info!(
                    "the configuration was read again: the choice of providers, MESH_SAMPLE_SIZE and the fallback change \
                     now, everything else at the next restart"
                );
                if reload.send(Arc::new(config)).await.is_err() {
                    return;
                }
            }
            Err(refused) => {
                audit.record(&Event::ConfigReloaded {
                    accepted: false,
                    reason: Some(refused.to_string()),
                });
                tracing::error!("the new configuration is refused, the old one holds: {refused}");
            }
        }
    }
}
