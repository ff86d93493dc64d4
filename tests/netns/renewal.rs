//! An approval is renewed under a running tunnel, with a fresh key, and no packet is lost.

use std::{
    collections::HashSet,
    net::{SocketAddr, TcpStream, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, Result, ensure};
use dvpn_common::status::{StateName, Status, TunnelBackend};
use dvpn_tests::{
    client::SOCKS5,
    namespace::Namespace,
    network::{CLIENT, WEB},
    node,
    process::wait_for,
    socks::{self, Target},
    world::World,
};

use crate::database::Database;

/// Renewed at half of it.
const APPROVAL: Duration = Duration::from_secs(30);
const PACKETS: u32 = 24_000;
const PAUSE: Duration = Duration::from_millis(1);
/// How long before a renewal its answer is prepared for.
const AHEAD: Duration = Duration::from_secs(1);
const PATIENCE: Duration = Duration::from_secs(40);

/// A world whose pool gives approvals that are soon renewed.
fn world() -> Result<World> {
    let mut world = World::build(&[8])?;
    world.pool.kill()?;
    world.pool = node::spawn_pool_with(
        &world.network,
        &world.identity,
        &["--approval-seconds", &APPROVAL.as_secs().to_string()],
    )?;
    node::wait_until_listed(&world.network, &world.ca(), 1, Duration::from_secs(30))?;
    Ok(world)
}

/// How often a line of the daemon's log, its audit stream among them, says that.
fn said(world: &World, what: &str) -> usize {
    world.client.process.log_text().matches(what).count()
}

/// Packets through the tunnel to an echo, one every [`PAUSE`], and what comes back of them.
struct Flow {
    sending: JoinHandle<Result<()>>,
    collecting: JoinHandle<Result<HashSet<u32>>>,
    ended: Arc<AtomicBool>,
    packets: u32,
    _control: TcpStream,
}

impl Flow {
    fn begin(world: &World, packets: u32) -> Result<Self> {
        let (control, relay) = socks::associate(world.ask().namespace(), SOCKS5, Duration::from_secs(5))?;
        let socket = Arc::new(world.ask().namespace().udp(SOCKS5.ip())?);
        nix::sys::socket::setsockopt(&*socket, nix::sys::socket::sockopt::RcvBuf, &(4 << 20))?;
        socket.set_read_timeout(Some(Duration::from_millis(100)))?;
        let ended = Arc::new(AtomicBool::new(false));
        let collecting = {
            let (socket, ended) = (Arc::clone(&socket), Arc::clone(&ended));
            thread::spawn(move || collect(&socket, &ended))
        };
        let sending = thread::spawn(move || {
            let echo = Target::Address(SocketAddr::from((WEB, 7)));
            let start = Instant::now();
            for number in 0..packets {
                socket.send_to(&socks::datagram(echo, &number.to_be_bytes())?, relay)?;
                let due = start + PAUSE * number;
                thread::sleep(due.saturating_duration_since(Instant::now()));
            }
            Ok(())
        });
        Ok(Self {
            sending,
            collecting,
            ended,
            packets,
            _control: control,
        })
    }

    /// Waits for the last one; the numbers of those that did not come back.
    fn lost(self) -> Result<Vec<u32>> {
        self.sending.join().ok().context("the sending thread panicked")??;
        // What is still on its way comes within a second.
        thread::sleep(Duration::from_secs(1));
        self.ended.store(true, Ordering::Release);
        let came = self.collecting.join().ok().context("the receiving thread panicked")??;
        Ok((0..self.packets).filter(|number| !came.contains(number)).collect())
    }
}

/// Takes what comes back until told to end; the numbers that came.
fn collect(socket: &UdpSocket, ended: &AtomicBool) -> Result<HashSet<u32>> {
    let mut seen = HashSet::new();
    let mut buffer = [0; 256];
    while !ended.load(Ordering::Acquire) {
        if let Ok(length) = socket.recv(&mut buffer)
            && let Some(number) = socks::payload(buffer.get(..length).context("its length")?)
                .and_then(|payload| payload.first_chunk::<4>())
        {
            seen.insert(u32::from_be_bytes(*number));
        }
    }
    Ok(seen)
}

fn check_lost(lost: &[u32], packets: u32, status: &Status) -> Result<()> {
    // The kernel's device has one key at a time: what is on its way while that changes is lost (dvpn_daemon::tunnel).
    let bearable = match status.backend {
        Some(TunnelBackend::Kernel) => packets as usize / 50,
        // None, while the machine keeps up; tests/tunnel asks for none at all. On a machine that is starved of time bursts of
        // them were lost now and then, most of them at moments that no renewal has to do with.
        Some(TunnelBackend::Userspace) | None => 10,
    };
    ensure!(
        lost.len() <= bearable,
        "{} of {packets} packets lost: {lost:?}",
        lost.len()
    );
    Ok(())
}

#[test]
fn an_approval_is_renewed_at_half_of_its_life_and_the_packets_on_their_way_arrive() -> Result<()> {
    let world = world()?;
    let before = world.pay_and_connect()?;
    let renewed_before = said(&world, "tunnel_renewed");
    let begun = Instant::now();
    let lost = Flow::begin(&world, PACKETS)?.lost()?;
    let renewed = said(&world, "tunnel_renewed") - renewed_before;
    ensure!(
        renewed >= 1,
        "no renewal within {:?}; the log ends:\n{}",
        begun.elapsed(),
        world.client.process.log_tail()
    );
    let (_, after) = world.ask().health()?;
    check_lost(&lost, PACKETS, &after)?;

    // It is the same session at the same provider, and it outlives the first approval.
    ensure!(
        after.attempts == before.attempts && after.switches == before.switches,
        "{before:?}, then {after:?}"
    );
    wait_for("the second renewal", PATIENCE, || {
        Ok((said(&world, "tunnel_renewed") - renewed_before >= 2).then_some(()))
    })?;
    let (_, after) = world.ask().health()?;
    ensure!(
        after.state == StateName::Connected && after.attempts == before.attempts,
        "{after:?}"
    );
    ensure!(world.ask().exit_address(Duration::from_secs(5))? == world.address_of(&after)?);
    Ok(())
}

/// Makes packets disappear at the pool.
struct Cut<'a>(&'a Namespace);

impl<'a> Cut<'a> {
    fn new(world: &'a World) -> Result<Self> {
        let cut = Self(&world.network.pool.namespace);
        cut.nft("add table ip cut")?;
        cut.nft("add chain ip cut heard { type filter hook input priority 0; }")?;
        cut.nft("add chain ip cut said { type filter hook output priority 0; }")?;
        Ok(cut)
    }

    fn nft(&self, command: &str) -> Result<()> {
        self.0.output("nft", &[command]).map(drop)
    }

    /// Nothing of what the provider says arrives, until [`Self::let_through`].
    fn provider(&self, world: &World) -> Result<()> {
        let provider = world.network.providers.first().context("a provider's machine")?;
        self.nft(&format!(
            "add rule ip cut heard ip saddr {} counter drop",
            provider.address
        ))
    }

    /// Nothing of what the pool says reaches the client.
    fn client(&self) -> Result<()> {
        self.nft(&format!("add rule ip cut said ip daddr {CLIENT} counter drop"))
    }

    fn let_through(&self, chain: &str) -> Result<()> {
        self.nft(&format!("flush chain ip cut {chain}"))
    }
}

#[test]
fn a_renewal_whose_answer_is_lost_is_asked_for_again_and_the_packets_on_their_way_arrive() -> Result<()> {
    let world = world()?;
    let before = world.pay_and_connect()?;
    let context = || {
        format!(
            "the client's log ends:\n{}\nthe pool's:\n{}",
            world.client.process.log_tail(),
            world.pool.log_tail()
        )
    };
    let mut database = Database::open(&world)?;
    let first = database.approvals()?.pop().context("an approval")?;
    let renewed_before = said(&world, "tunnel_renewed");
    let down_before = said(&world, "\"to\":\"disconnecting\"");
    let refused_before = said(&world, "approval_refused");
    let flow = Flow::begin(&world, PACKETS)?;
    let cut = Cut::new(&world)?;
    let due = first.ends_at()? - APPROVAL / 2;
    thread::sleep((due - AHEAD).duration_since(SystemTime::now()).unwrap_or_default());

    // The pool is held up by its provider until it is cut off from the client: what it answers is lost.
    cut.provider(&world)?;
    let asked = wait_for("the renewal at the pool", Duration::from_secs(10), || {
        let rows = database.approvals()?;
        Ok(rows
            .into_iter()
            .find(|row| row.renews.as_ref() == Some(&first.client_key)))
    })
    .with_context(context)?;
    ensure!(!asked.acknowledged, "the provider was heard");
    cut.client()?;
    cut.let_through("heard")?;
    wait_for("the pool's decision", Duration::from_secs(5), || {
        let rows = database.approvals()?;
        Ok(rows
            .iter()
            .any(|row| row.client_key == asked.client_key && row.acknowledged)
            .then_some(()))
    })
    .with_context(context)?;
    wait_for(
        "the client's word that there was no answer",
        Duration::from_secs(12),
        || Ok((said(&world, "approval_refused") > refused_before).then_some(())),
    )
    .with_context(context)?;
    cut.let_through("said")?;

    wait_for("the renewal", Duration::from_secs(15), || {
        Ok((said(&world, "tunnel_renewed") > renewed_before).then_some(()))
    })
    .with_context(context)?;
    let keys: Vec<_> = database.approvals()?.into_iter().map(|row| row.client_key).collect();
    ensure!(
        keys.contains(&asked.client_key),
        "another key than was asked for at first"
    );
    let lost = flow.lost()?;
    let (_, after) = world.ask().health()?;
    check_lost(&lost, PACKETS, &after).with_context(context)?;
    ensure!(
        said(&world, "\"to\":\"disconnecting\"") == down_before,
        "the tunnel was taken down; {}",
        context()
    );
    ensure!(
        after.state == StateName::Connected && (after.attempts, after.switches) == (before.attempts, before.switches),
        "{before:?}, then {after:?}; {}",
        context()
    );
    // The key that was renewed is gone at the pool, which was told of it, and the next renewal is like any other.
    wait_for("the second renewal", PATIENCE, || {
        Ok((said(&world, "tunnel_renewed") - renewed_before >= 2).then_some(()))
    })
    .with_context(context)?;
    ensure!(world.ask().exit_address(Duration::from_secs(5))? == world.address_of(&after)?);
    Ok(())
}
