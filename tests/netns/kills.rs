//! Pool, provider and client are killed at random points of all that they do together. Afterwards the pool's database,
//! the node and its WireGuard device agree, within 5 s of the killed one's return; no peer is ever there without an
//! approval; no approval is lost.

mod bed;
mod journal;
mod watcher;

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use bed::{AGREEMENT, Bed, Operation, Victim};
use dvpn_common::{keys::PublicKey, status::StateName};
use dvpn_tests::{process::wait_for, world::CONNECT_PATIENCE};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng, seq::SliceRandom as _};

/// What a service manager waits before it starts a service again (systemd.service(5), `RestartSec=`).
const RESTART_AFTER: Duration = Duration::from_millis(100);
/// A renewal's begin is known from the outside up to this.
const BEGINS_WITHIN: Duration = Duration::from_millis(100);
/// Until traffic flows again without anybody's doing: as for a provider that dies (`failover`).
const TRAFFIC: Duration = Duration::from_secs(13);
/// Until a new session stands, its payment known: a pause of the client included.
const AT_ONCE: Duration = Duration::from_secs(10);

/// What became of one kill.
struct Outcome {
    agreed: Duration,
    connected: Duration,
}

#[derive(Default)]
struct Report {
    rounds: BTreeMap<(Operation, Victim), u32>,
    agreed: BTreeMap<Victim, Duration>,
    connected: BTreeMap<Victim, Duration>,
}

impl Report {
    fn note(&mut self, operation: Operation, victim: Victim, outcome: &Outcome) {
        *self.rounds.entry((operation, victim)).or_default() += 1;
        let worst = |slot: &mut Duration, now: Duration| *slot = now.max(*slot);
        worst(self.agreed.entry(victim).or_default(), outcome.agreed);
        worst(self.connected.entry(victim).or_default(), outcome.connected);
    }

    fn text(&self) -> String {
        let rounds = self.rounds.iter();
        let rounds = rounds.map(|((operation, victim), rounds)| format!("{operation:?}/{victim:?} {rounds}"));
        format!(
            "{}; worst agreement {:?}, worst new session {:?}",
            rounds.collect::<Vec<_>>().join(", "),
            self.agreed,
            self.connected
        )
    }
}

fn rounds() -> usize {
    if std::env::var_os("DVPN_SOAK").is_some() {
        100
    } else {
        10
    }
}

fn seed() -> Result<u64> {
    match std::env::var("DVPN_KILLS_SEED") {
        Ok(text) => text.parse().context("DVPN_KILLS_SEED is a number"),
        Err(_) => Ok(rand::random()),
    }
}

/// Every operation with every victim, in random order, again and again.
fn plan(rounds: usize, random: &mut StdRng) -> Vec<(Operation, Victim)> {
    let mut plan = Vec::new();
    while plan.len() < rounds {
        let mut all: Vec<_> = Operation::ALL
            .into_iter()
            .flat_map(|operation| Victim::ALL.map(|victim| (operation, victim)))
            .collect();
        all.shuffle(random);
        plan.extend(all);
    }
    plan.truncate(rounds);
    plan
}

#[test]
fn killed_at_any_point_pool_node_and_device_agree_again_and_no_peer_is_without_approval() -> Result<()> {
    let seed = seed()?;
    eprintln!("DVPN_KILLS_SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let mut bed = Bed::build()?;
    faults_are_seen(&mut bed).context("with faults that were planted")?;
    let mut usual = BTreeMap::new();
    for operation in Operation::ALL {
        // A renewal is waited for, the others are not; how long they take depends on when the pool looks.
        let times = if operation == Operation::Renew { 1 } else { 3 };
        let mut slowest = Duration::ZERO;
        for _ in 0..times {
            let took = undisturbed(&mut bed, operation).with_context(|| format!("{operation:?}, undisturbed"))?;
            slowest = slowest.max(took);
        }
        eprintln!("{operation:?} takes up to {slowest:?}");
        usual.insert(operation, slowest);
    }
    let mut report = Report::default();
    for (number, (operation, victim)) in plan(rounds(), &mut random).into_iter().enumerate() {
        let usual = usual.get(&operation).copied().unwrap_or_default();
        let delay = usual.mul_f64(random.random_range(0.0..1.0));
        let what = format!("round {number}, seed {seed}: {victim:?} killed {delay:?} after the begin of {operation:?}");
        let outcome = round(&mut bed, operation, victim, delay).with_context(|| format!("{what}\n{}", bed.logs()))?;
        eprintln!(
            "{what}: agreed after {:?}, a new session after {:?}",
            outcome.agreed, outcome.connected
        );
        report.note(operation, victim, &outcome);
    }
    eprintln!("{}; {}", report.text(), bed.watcher.report());
    let looks = bed.watcher.looks();
    ensure!(looks > 1000, "the watcher looked only {looks} times");
    Ok(())
}

/// A check that cannot fail shows nothing: a peer that nobody approved and an approval that went behind everybody's back
/// are both seen, by the watcher and by the comparison; and both are mended by the product itself.
fn faults_are_seen(bed: &mut Bed) -> Result<()> {
    let planted = PublicKey::from_bytes([9; 32])?;
    bed.window.plant(&planted)?;
    wait_for("the watcher's word of a planted peer", Duration::from_secs(4), || {
        let faults = bed.watcher.take_faults();
        Ok(faults
            .iter()
            .any(|fault| fault.contains("without any approval"))
            .then_some(()))
    })?;
    ensure!(bed.disagreement()?.is_some(), "a planted peer is no disagreement");
    bed.agree(Instant::now(), Operation::Approve, AGREEMENT + Duration::from_secs(2))
        .context("the node takes a planted peer off its device")?;

    bed.world.ask().connect(CONNECT_PATIENCE)?;
    bed.agree(Instant::now(), Operation::Approve, AGREEMENT)?;
    let lost = *bed.journal.look()?.keys().next().context("an approval")?;
    bed.watcher.take_faults();
    bed.journal.lose(&lost)?;
    wait_for("the watcher's word of a lost approval", Duration::from_secs(12), || {
        let faults = bed.watcher.take_faults();
        Ok(faults
            .iter()
            .any(|fault| fault.contains("approval ended"))
            .then_some(()))
    })?;
    ensure!(bed.disagreement()?.is_some(), "a lost approval is no disagreement");
    bed.world.ask().disconnect(CONNECT_PATIENCE)?;
    bed.kill(Victim::Pool)?;
    bed.restart(Victim::Pool)?;
    bed.agree(Instant::now(), Operation::Approve, AGREEMENT)
        .context("the next snapshot says who is there")?;
    bed.watcher.take_faults();
    bed.world.ask().connect(CONNECT_PATIENCE).map(drop)
}

/// How long an operation takes from its begin until nothing of it is left to do.
fn undisturbed(bed: &mut Bed, operation: Operation) -> Result<Duration> {
    let begin = prepare(bed, operation)?;
    let before = bed.keys()?;
    let running = bed.begin(operation)?;
    wait_for("its end", Duration::from_secs(10), || {
        Ok(bed.is_complete(operation, &before)?.then_some(()))
    })?;
    let took = begin.elapsed();
    running.join()?;
    bed.agree(Instant::now(), operation, AGREEMENT)?;
    go_on(bed, operation)?;
    bed.watcher.check()?;
    Ok(took)
}

/// Brings the session to where the operation begins; when that is, which may be a moment ago or from now.
fn prepare(bed: &mut Bed, operation: Operation) -> Result<Instant> {
    let client = bed.world.ask();
    match operation {
        Operation::Approve => {
            client.disconnect(CONNECT_PATIENCE)?;
        }
        Operation::Release | Operation::Revoke => {
            client.wait_state(StateName::Connected, CONNECT_PATIENCE)?;
        }
        Operation::Renew => {
            client.disconnect(CONNECT_PATIENCE)?;
            client.connect(CONNECT_PATIENCE)?;
            let begin = bed.renewal_due()?.checked_sub(BEGINS_WITHIN).context("a begin")?;
            std::thread::sleep(begin.saturating_duration_since(Instant::now()));
            return Ok(begin);
        }
    }
    Ok(Instant::now())
}

fn round(bed: &mut Bed, operation: Operation, victim: Victim, delay: Duration) -> Result<Outcome> {
    let begin = prepare(bed, operation)?;
    let running = bed.begin(operation)?;
    std::thread::sleep((begin + delay).saturating_duration_since(Instant::now()));
    bed.kill(victim)?;
    std::thread::sleep(RESTART_AFTER);
    bed.restart(victim)?;
    let ready = Instant::now();
    let agreed = bed.agree(ready, operation, AGREEMENT)?;
    match running.join() {
        Err(error) if victim != Victim::Client => return Err(error).context("the operation itself"),
        // Its caller saw the daemon go.
        Err(_) | Ok(()) => {}
    }
    match (operation, victim) {
        // Somebody wants a session, and it is paid for.
        (Operation::Renew, _) | (Operation::Approve, Victim::Pool | Victim::Provider) => carries(bed)?,
        // Whether the wish, or the end of it, was on the disk is not known.
        (Operation::Approve | Operation::Release, Victim::Client) | (Operation::Revoke, _) => {}
        (Operation::Release, Victim::Pool | Victim::Provider) => {
            let state = bed.world.ask().health()?.1.state;
            ensure!(state == StateName::Disconnected, "stopped, and {}", state.as_str());
        }
    }
    let connected = go_on(bed, operation)?;
    bed.agree(Instant::now(), operation, AGREEMENT)
        .context("with a new session")?;
    bed.watcher.check()?;
    Ok(Outcome { agreed, connected })
}

/// The session that is wanted carries traffic: it goes on, or comes by itself.
fn carries(bed: &Bed) -> Result<()> {
    let deadline = Instant::now() + TRAFFIC;
    loop {
        match bed.world.ask().exit_address(Duration::from_secs(2)) {
            Ok(_) => return Ok(()),
            Err(error) if Instant::now() > deadline => {
                return Err(error).context("no session came or went on by itself");
            }
            Err(_) => std::thread::sleep(Duration::from_millis(100)),
        }
    }
}

/// A new session, with a new token if the old one was revoked; how long it took.
fn go_on(bed: &mut Bed, operation: Operation) -> Result<Duration> {
    bed.world.ask().disconnect(CONNECT_PATIENCE)?;
    if operation == Operation::Revoke {
        bed.pay()?;
    }
    let begun = Instant::now();
    bed.world.ask().connect(CONNECT_PATIENCE)?;
    let took = begun.elapsed();
    ensure!(
        took <= AT_ONCE,
        "a new session took {took:?}: is the token still taken?"
    );
    bed.world.ask().exit_address(Duration::from_secs(5))?;
    Ok(took)
}
