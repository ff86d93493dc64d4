//! Bringing the network up and showing that it works.

use std::{
    fs::{File, OpenOptions},
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc::{RecvTimeoutError, channel},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use dvpn_common::status::{CandidateStatus, PaymentStatus, StateName, Status};
use dvpn_tests::{
    bus::BusAddress,
    client::{Client, SOCKS5},
    https,
    network::{PREFIX, ROOT, WEB_NAME},
    node, sweep,
};

use super::{
    Files, ID,
    run::{CLIENT_SETTINGS, READY, client_environment, down, log_path, running},
    say,
};

/// The machines whose programs must run.
const MACHINES: [&str; 5] = ["pool", "provider-a", "provider-b", "provider-c", "client"];
/// How often at least something is said.
const HEARTBEAT: Duration = Duration::from_millis(1800);

/// Brings up what is not up, pays what is not paid, connects, fetches, and tells.
pub(super) fn up(files: &Files) -> Result<()> {
    for file in [&files.ca, &files.certificate, &files.key] {
        ensure!(
            file.is_file(),
            "{} is missing: run scripts/gen_dev_certs.sh",
            file.display()
        );
    }
    let missing = missing(files)?;
    if let Some(why) = &missing {
        if sweep::is_running(&ID) {
            say(&format!(
                "the network of an earlier run is of no use, {why}: taking it down first"
            ));
            down()?;
        }
        sweep::dead().context("removing what an earlier run left")?;
        start(files)?;
    } else {
        say("the network stands already");
    }
    let client = client()?;
    let status = patiently("the client", || Ok(client.health()?.1))?;
    if status.payment != PaymentStatus::Paid {
        pay(&client, &files.ca)?;
    }
    if status.state != StateName::Disconnected {
        patiently("disconnecting", || client.disconnect(Duration::from_secs(10)))?;
    }
    say("connecting (D-Bus Start)");
    let (exit, took) = patiently("the first byte through the proxy", || first_byte(&client))?;
    let status = client.wait_state(StateName::Connected, Duration::from_secs(5))?;
    show(&status, &exit, took, files.device);
    Ok(())
}

/// Why there is no network that can be used, if so: something does not run, or was started with other settings.
fn missing(files: &Files) -> Result<Option<String>> {
    let ready = || std::fs::read_to_string(log_path()).is_ok_and(|log| log.contains(READY));
    if !sweep::is_running(&ID) || !ready() {
        return Ok(Some("it did not come up".to_owned()));
    }
    for machine in MACHINES {
        if running(&pid_file(machine)).is_none() {
            return Ok(Some(format!("{machine} does not run")));
        }
    }
    let wanted = client_environment(files)?;
    if !running(&pid_file("client")).is_some_and(|pid| wanted.is_of(pid, &CLIENT_SETTINGS)) {
        return Ok(Some("its client has other settings".to_owned()));
    }
    let answers = client().is_ok_and(|client| client.health().is_ok());
    Ok((!answers).then(|| "its client does not answer".to_owned()))
}

/// Says what runs.
pub(super) fn status() -> Result<()> {
    if !sweep::is_running(&ID) {
        say("the network is down; `./one-click.sh` brings it up");
        return Ok(());
    }
    for machine in MACHINES {
        let state = running(&pid_file(machine))
            .map_or_else(|| "does not run".to_owned(), |pid| format!("runs as process {pid}"));
        say(&format!("{machine:<11} {state}"));
    }
    if running(&pid_file("client")).is_none() {
        say("`./one-click.sh` brings it up anew");
        return Ok(());
    }
    let (code, status) = client()?.health()?;
    say(&format!("client      {} (/health {code})", status.state.as_str()));
    candidates(&status);
    Ok(())
}

fn directory() -> PathBuf {
    Path::new(ROOT).join(&*ID)
}

fn pid_file(machine: &str) -> PathBuf {
    directory().join(machine).join("pid")
}

fn client() -> Result<Client> {
    Client::new(
        &format!("{PREFIX}{}-client", *ID),
        BusAddress::in_directory(&directory().join("client")),
    )
}

/// Starts the holder and passes its progress on until everything stands.
fn start(files: &Files) -> Result<()> {
    let path = log_path();
    std::fs::create_dir_all(ROOT).with_context(|| format!("making {ROOT}"))?;
    let log = OpenOptions::new()
        .create(true)
        .write(true)
        .truncate(true)
        .open(&path)
        .with_context(|| format!("opening {}", path.display()))?;
    let mut command = Command::new(std::env::current_exe().context("finding this program's own path")?);
    command
        .arg("run")
        .arg("--ca")
        .arg(&files.ca)
        .arg("--certificate")
        .arg(&files.certificate);
    command.arg("--key").arg(&files.key).arg("--env").arg(&files.env);
    let round_trips: Vec<String> = files.round_trips.iter().map(ToString::to_string).collect();
    command.arg("--round-trips").arg(round_trips.join(","));
    if files.device {
        command.arg("--device");
    }
    command
        .stdin(Stdio::null())
        .stdout(log.try_clone().context("sharing the log")?)
        .stderr(log);
    let mut holder = command.spawn().context("starting the holder of the network")?;
    follow(&path, &mut holder)
}

fn follow(path: &Path, holder: &mut Child) -> Result<()> {
    let mut lines = BufReader::new(File::open(path).with_context(|| format!("opening {}", path.display()))?);
    let deadline = Instant::now() + Duration::from_secs(90);
    let (mut line, mut last, mut said) = (String::new(), String::new(), Instant::now());
    loop {
        if lines.read_line(&mut line).context("reading the holder's progress")? > 0 {
            if !line.ends_with('\n') {
                continue;
            }
            line.trim_end().clone_into(&mut last);
            line.clear();
            say(&format!("  {last}"));
            if last == READY {
                return Ok(());
            }
            said = Instant::now();
            continue;
        }
        if let Some(status) = holder.try_wait().context("asking for the holder")? {
            bail!("the network did not come up ({status}): {last}");
        }
        if Instant::now() >= deadline {
            bail!(
                "the network did not come up in time: {last}; the logs are in {}",
                directory().display()
            );
        }
        if said.elapsed() >= HEARTBEAT {
            say(&format!("  … still {last}"));
            said = Instant::now();
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Does something while saying every two seconds that it still goes on.
fn patiently<T: Send>(what: &str, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let (done, waiting) = channel::<()>();
    std::thread::scope(|scope| {
        let started = Instant::now();
        scope.spawn(move || {
            while waiting.recv_timeout(HEARTBEAT) == Err(RecvTimeoutError::Timeout) {
                say(&format!(
                    "  … still waiting for {what} ({} s)",
                    started.elapsed().as_secs()
                ));
            }
        });
        let result = work();
        drop(done);
        result
    })
}

fn pay(client: &Client, ca: &Path) -> Result<()> {
    say("paying: a checkout by D-Bus Payments, then the development payment stands for the coins");
    let checkout = client.begin_checkout()?;
    https::development_pay(client.namespace(), ca, &node::payment_url(), &checkout)?;
    patiently("the token", || {
        client.wait_status("the token", Duration::from_secs(20), |status| {
            status.payment == PaymentStatus::Paid || status.problem.is_none()
        })
    })?;
    Ok(())
}

/// Start, then the proxy is asked until the first answer: the exit address and the time from Start.
fn first_byte(client: &Client) -> Result<(String, Duration)> {
    let started = Instant::now();
    client.start()?;
    let deadline = started + Duration::from_secs(20);
    loop {
        match client.exit_address(Duration::from_secs(2)) {
            Ok(address) => return Ok((address.to_string(), started.elapsed())),
            Err(error) if Instant::now() >= deadline => {
                let problem = client.health().ok().and_then(|(_, status)| status.problem);
                let told = problem.map_or_else(String::new, |problem| format!("; {}: {}", problem.what, problem.how));
                return Err(error.context(format!("nothing came through the proxy{told}")));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(2)),
        }
    }
}

fn candidates(status: &Status) {
    let used = status.provider.as_ref().map(|provider| &provider.id);
    let mut candidates: Vec<_> = status.candidates.iter().collect();
    candidates.sort_by(|a, b| {
        let latency = |candidate: &CandidateStatus| candidate.latency_ms.unwrap_or(f64::INFINITY);
        latency(a).total_cmp(&latency(b))
    });
    for candidate in candidates {
        let latency = candidate
            .latency_ms
            .map_or_else(|| "no answer".to_owned(), |ms| format!("{ms:.1} ms"));
        let mark = if Some(&candidate.id) == used { "  <- in use" } else { "" };
        say(&format!("candidate:    {} {latency}{mark}", candidate.id));
    }
}

fn show(status: &Status, exit: &str, took: Duration, device: bool) {
    say("");
    say(&format!("exit address: {exit}"));
    candidates(status);
    say(&format!("first byte:   {} ms after Start", took.as_millis()));
    let lab = std::env::current_exe().map_or_else(|_| "dvpn-lab".to_owned(), |path| path.display().to_string());
    let proxy = if device {
        String::new()
    } else {
        format!("--socks5-hostname {SOCKS5} ")
    };
    let provider = status
        .provider
        .as_ref()
        .map_or("provider-a", |provider| provider.id.as_str());
    say("");
    say("What to try next (as root):");
    say(&format!("  {lab} exec client curl {proxy}http://{WEB_NAME}/"));
    say(&format!(
        "  {lab} exec client curl {proxy}-o /dev/null http://{WEB_NAME}/bytes/1000000000"
    ));
    say(&format!("  {lab} exec client curl -s http://127.0.0.1:9808/health"));
    say(&format!(
        "  {lab} exec client busctl call org.dvpn.Daemon1 /org/dvpn/Daemon1 org.dvpn.Daemon1 Status"
    ));
    if !device {
        say("  ./one-click.sh --device    # the same with all of the client's traffic in the tunnel");
    }
    say(&format!(
        "  kill -9 $(cat {}/{provider}/pid)    # then fetch until it answers, some 12 s: another exit address",
        directory().display()
    ));
    say("  ./one-click.sh --down");
}
