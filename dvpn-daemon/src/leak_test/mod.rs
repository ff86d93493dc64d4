//! The leak test on demand: sends what must not leave by sockets like any program's, and looks at what leaves. What is sent
//! and what follows from it is [`dvpn_core::leak`]'s.

mod capture;

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use dvpn_core::{
    audit::Event,
    config::Mode,
    leak::{Capture, Facts, NOWHERE_V4, NOWHERE_V6, Probe, Route, Row, Verdict, judge, plan, plants, worst},
};
use rand::{TryRng as _, rngs::SysRng};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::sync::Semaphore;

use crate::{
    audit::Audit,
    control_plane::{ControlPlane, mark},
    host::{self, Host},
    tunnel::CLIENT_INTERFACE,
};
use capture::{Listener, TOKEN_BYTES, payload};

/// How long a planted packet may take from the socket to the interface.
const PLANT_PATIENCE: Duration = Duration::from_millis(400);
/// How long it is watched for what was sent: also for what first has to find its neighbour's hardware address.
const WATCH: Duration = Duration::from_millis(900);

/// Why there is no test.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// One at a time.
    #[error("a leak test is running: wait for its end")]
    Running,
    /// The machine cannot be looked at.
    #[error("looking at this machine's network")]
    Host(#[source] host::Error),
    /// No random numbers, or the test's thread broke off.
    #[error("making the packets of the test")]
    Packets(#[source] io::Error),
}

/// Makes the tests. Clones share everything.
#[derive(Clone)]
pub struct Tester {
    host: Arc<Host>,
    mode: Mode,
    control_plane: Option<ControlPlane>,
    audit: Audit,
    one: Arc<Semaphore>,
}

impl Tester {
    /// On this machine; `control_plane` knows the network's name servers in device mode.
    pub fn new(host: &Arc<Host>, mode: Mode, control_plane: Option<&ControlPlane>, audit: &Audit) -> Self {
        Self {
            host: Arc::clone(host),
            mode,
            control_plane: control_plane.cloned(),
            audit: audit.clone(),
            one: Arc::new(Semaphore::new(1)),
        }
    }

    /// One test; at most three seconds.
    pub async fn run(&self) -> Result<Vec<Row>, Error> {
        let _one = self.one.try_acquire().ok().ok_or(Error::Running)?;
        let name_servers = match &self.control_plane {
            Some(plane) => plane.allow_servers().await.unwrap_or_default(),
            None => Vec::new(),
        };
        let exposure = self.host.exposure().await.map_err(Error::Host)?;
        let facts = Facts {
            mode: self.mode,
            blocking: exposure.blocking,
            interface: CLIENT_INTERFACE.to_owned(),
            endpoint: exposure.endpoint,
            addresses: exposure.addresses,
            uplinks: exposure.uplinks,
            name_servers,
            stands: exposure.stands,
            settings: exposure.settings,
        };
        let mut token = [0; TOKEN_BYTES];
        let random = SysRng.try_fill_bytes(&mut token);
        random.map_err(|error| Error::Packets(io::Error::other(error)))?;
        let rows = tokio::task::spawn_blocking(move || test(&facts, token)).await;
        let rows = rows.map_err(|error| Error::Packets(io::Error::other(error)))?;
        let leaks = rows.iter().filter(|row| row.verdict == Verdict::Leak);
        self.audit.record(&Event::LeakTested {
            verdict: worst(&rows),
            leaks: leaks.map(|row| row.name).collect(),
        });
        Ok(rows)
    }
}

/// Numbers of planted packets, which are no probe's.
const PLANTED: [usize; 2] = [60_000, 60_001];

fn test(facts: &Facts, token: [u8; TOKEN_BYTES]) -> Vec<Row> {
    let planted = plants(facts);
    let listener = Listener::open(token);
    let mut blind = listener
        .as_ref()
        .err()
        .map(|error| format!("no packets can be captured ({error}): give the daemon CAP_NET_RAW"));
    let mut listener = listener.ok();
    let mut plant = |listener: &mut Option<Listener>, number: usize, when: &str| {
        let Some(listener) = listener else { return };
        for to in &planted {
            if let Err(error) = send(&Plain::marked(), *to, &payload(token, number)) {
                tracing::debug!("planting a packet to {to}: {error}");
            }
        }
        if !listener.wait_for(number, PLANT_PATIENCE) {
            let why = if planted.is_empty() {
                "there is nobody to whom a packet could be planted: no name server of this network is known".to_owned()
            } else {
                format!("no planted packet was seen {when} the test: is there a network?")
            };
            blind.get_or_insert(why);
        }
    };
    plant(&mut listener, PLANTED[0], "before");
    let probes: Vec<(Probe, Option<String>)> = plan(facts)
        .into_iter()
        .enumerate()
        .map(|(number, probe)| {
            let sent = send(&Plain::of(&probe), probe.to, &payload(token, number));
            (probe, sent.err().map(|error| error.to_string()))
        })
        .collect();
    if let Some(listener) = &mut listener {
        listener.watch(WATCH);
    }
    plant(&mut listener, PLANTED[1], "after");
    let capture = match (blind, listener) {
        (Some(why), _) => Capture::Blind(why),
        (None, Some(listener)) => Capture::Saw(listener.seen().filter(|number| !PLANTED.contains(number)).collect()),
        (None, None) => Capture::Blind("no packets can be captured".to_owned()),
    };
    judge(facts, &probes, &capture, [route(NOWHERE_V4), route(NOWHERE_V6)])
}

/// A socket as a program makes it.
#[derive(Default)]
struct Plain {
    marked: bool,
    address: Option<IpAddr>,
    interface: Option<String>,
}

impl Plain {
    fn of(probe: &Probe) -> Self {
        Self {
            marked: false,
            address: probe.from.address,
            interface: probe.from.interface.clone(),
        }
    }

    fn marked() -> Self {
        Self {
            marked: true,
            ..Self::default()
        }
    }

    fn open(&self, to: SocketAddr) -> io::Result<Socket> {
        let socket = Socket::new(Domain::for_address(to), Type::DGRAM, Some(Protocol::UDP))?;
        socket.set_nonblocking(true)?;
        if self.marked {
            mark(&socket);
        }
        if let Some(interface) = &self.interface {
            socket.bind_device(Some(interface.as_bytes()))?;
        }
        let any = if to.is_ipv4() {
            IpAddr::V4(Ipv4Addr::UNSPECIFIED)
        } else {
            IpAddr::V6(Ipv6Addr::UNSPECIFIED)
        };
        socket.bind(&SocketAddr::new(self.address.unwrap_or(any), 0).into())?;
        Ok(socket)
    }
}

fn send(from: &Plain, to: SocketAddr, payload: &[u8]) -> io::Result<()> {
    from.open(to)?.send_to(payload, &to.into()).map(|_sent| ())
}

/// The address from which a program would send there: what connecting a socket, which sends nothing, says.
fn route(to: IpAddr) -> Route {
    let to = SocketAddr::new(to, 9);
    let connected = || -> io::Result<Option<SocketAddr>> {
        let socket = Plain::default().open(to)?;
        socket.connect(&to.into())?;
        Ok(socket.local_addr()?.as_socket())
    };
    match connected() {
        Ok(Some(from)) => Route::From(from.ip()),
        Ok(None) | Err(_) => Route::Nowhere,
    }
}
