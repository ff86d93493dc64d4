//! What each peer of a tunnel is granted, made true: programs, qdiscs, and the device that paces the upload.
//!
//! How a direction is enforced is found out by trying, best first: **edt** (programs and the qdisc fq), **htb** (programs
//! and the qdisc htb), **police** (programs alone). Nothing is open at any step: programs are attached before a grant
//! exists, and whoever has none is dropped.

mod device;
mod mode;
mod tc;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fmt,
    net::IpAddr,
    time::{Duration, Instant},
};

use dvpn_common::{
    abi::{self, Counter, MAX_PEERS, Node, Traffic},
    grant::{Limit, Meter, NodeLimit},
    rate::Rate,
};
use nix::time::{ClockId, clock_gettime};

use super::{Error, Host};
use crate::ebpf::{Hook, Loader, shaping::Shaping};
use tc::{ClassRate, Request};

pub(super) use device::intermediate_name;
pub use mode::{Mode, Modes};

/// What one buffer of TCP may take of a grant, so that nobody waits long behind it.
const LONGEST_BUFFER: Duration = Duration::from_millis(5);

/// So many peers get their classes at once: each takes the kernel some tenth of a millisecond.
const CLASSES_AT_ONCE: usize = 256;

/// What a shaper is for.
#[derive(Debug, Clone)]
pub struct ShaperConfig {
    /// The tunnel's interface.
    pub interface: String,
    /// The longest packet in it, in bytes.
    pub mtu_bytes: u16,
    /// The best mode to try; all by default.
    pub best: Mode,
    /// The hook to use; by default TCX where the kernel has it.
    pub hook: Option<Hook>,
}

impl ShaperConfig {
    /// The best that the kernel has for this interface.
    pub fn new(interface: impl Into<String>, mtu_bytes: u16) -> Self {
        Self {
            interface: interface.into(),
            mtu_bytes,
            best: Mode::Edt,
            hook: None,
        }
    }
}

/// A peer of a shaper; its number is its place in the kernel's maps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerNumber(u32);

impl fmt::Display for PeerNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What a peer is granted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grant {
    /// Towards it.
    pub down: Rate,
    /// From it.
    pub up: Rate,
    /// Until when; nothing passes after that.
    pub until: Instant,
}

struct Peer {
    addresses: BTreeSet<IpAddr>,
    /// None for one that an earlier daemon left: its grant is in the kernel.
    grant: Option<Grant>,
}

/// The grants of one tunnel's peers. Dropping this leaves them enforced; [`Shaper::close`] takes everything out.
pub struct Shaper {
    host: Host,
    loader: Loader,
    config: ShaperConfig,
    modes: Modes,
    hook: Hook,
    /// Index of the tunnel's interface, and of the device that paces the upload.
    tunnel: u32,
    intermediate: Option<u32>,
    /// None while the thread that attaches has it.
    shaping: Option<Shaping>,
    peers: BTreeMap<u32, Peer>,
    owners: BTreeMap<IpAddr, u32>,
    /// Where to look for a free number: none below is.
    next: u32,
    /// Whose classes are still to be made.
    unsettled: VecDeque<u32>,
    node: [Option<Rate>; 2],
    gso_bytes: Option<u32>,
}

impl Shaper {
    /// Puts programs and qdiscs in place, or takes over those of an earlier daemon, with its peers: until
    /// [`Shaper::retain`] they keep their grants.
    ///
    /// An interface that has no programs of ours is taken down first and left down, so that no packet passes unseen: to
    /// be brought up when the grants are there.
    pub async fn open(host: &Host, loader: &Loader, config: ShaperConfig) -> Result<Self, Error> {
        let tunnel = host.interface_index(&config.interface).await?;
        let name = config.interface.clone();
        let attached = loader.run(move |pins| Shaping::is_attached(&name, pins)).await??;
        if !attached {
            host.set_down(tunnel, &config.interface).await?;
        }
        let interface = config.interface.clone();
        let opened = Self::open_on(host, loader, config, tunnel).await;
        if opened.is_err() && !attached {
            // The interface is down: nothing is open without them.
            let requests = vec![tc::delete_root(tunnel), tc::delete_redirect(tunnel)];
            let root = host.traffic_control(requests).await;
            let device = host.remove_intermediate(&interface).await;
            for error in [root.err(), device.err()].into_iter().flatten() {
                tracing::debug!("tidying up after {interface}: {error}");
            }
        }
        opened
    }

    async fn open_on(host: &Host, loader: &Loader, config: ShaperConfig, tunnel: u32) -> Result<Self, Error> {
        let mut best = config.best;
        let mut reasons = BTreeSet::new();
        loop {
            let (modes, intermediate) = host.prepare_devices(&config, tunnel, best, reasons.clone()).await?;
            let (name, down, up) = (config.interface.clone(), modes.down.number(), modes.up.number());
            let answer = loader.run(move |pins| Shaping::load(&name, pins, down, up)).await?;
            let shaping = match answer {
                // Before Linux 5.18 a program cannot set the time of departure.
                Err(crate::ebpf::Error::Program { source, .. }) if best == Mode::Edt => {
                    tracing::debug!("the kernel refuses programs that set departure times: {source}");
                    reasons.insert("this kernel's programs cannot set departure times".to_owned());
                    best = Mode::Htb;
                    continue;
                }
                answer => answer?,
            };
            let mut shaper = Self {
                host: host.clone(),
                loader: loader.clone(),
                modes,
                hook: Hook::Tcx,
                tunnel,
                intermediate,
                shaping: Some(shaping),
                peers: BTreeMap::new(),
                owners: BTreeMap::new(),
                next: 0,
                unsettled: VecDeque::new(),
                node: [None, None],
                gso_bytes: None,
                config,
            };
            shaper.put_in_place().await?;
            return Ok(shaper);
        }
    }

    /// How grants are enforced, and why not better.
    pub fn modes(&self) -> &Modes {
        &self.modes
    }

    /// The hook that carries the programs.
    pub fn hook(&self) -> Hook {
        self.hook
    }

    /// Programs to their places, then the peers that are known there.
    async fn put_in_place(&mut self) -> Result<(), Error> {
        for (number, addresses) in self.shaping()?.adopt()? {
            let addresses: BTreeSet<_> = addresses.into_iter().collect();
            self.owners.extend(addresses.iter().map(|address| (*address, number)));
            self.peers.insert(number, Peer { addresses, grant: None });
        }
        self.write_node()?;
        self.attach().await?;
        if let Some(index) = self.intermediate {
            self.host.intermediate_up(index).await?;
        }
        Ok(())
    }

    async fn attach(&mut self) -> Result<(), Error> {
        let mut shaping = self.shaping.take().ok_or(Error::NoShaper)?;
        let name = self.intermediate.map(|_| intermediate_name(&self.config.interface));
        let hook = self.config.hook;
        let (shaping, attached) = self
            .loader
            .run(move |_| {
                let attached = shaping.attach(name.as_deref(), hook);
                (shaping, attached)
            })
            .await?;
        self.shaping = Some(shaping);
        self.hook = attached?;
        Ok(())
    }

    fn shaping(&mut self) -> Result<&mut Shaping, Error> {
        self.shaping.as_mut().ok_or(Error::NoShaper)
    }

    /// Grants a peer with these addresses something, or changes what it is granted; from then on its packets pass. An
    /// address that was another's is this one's.
    pub async fn grant(&mut self, addresses: &[IpAddr], grant: Grant) -> Result<PeerNumber, Error> {
        let numbers = self.grant_all(&[(addresses.to_vec(), grant)]).await?;
        numbers.first().copied().ok_or(Error::NoShaper)
    }

    /// The same for many at once; their numbers in the same order.
    pub async fn grant_all(&mut self, grants: &[(Vec<IpAddr>, Grant)]) -> Result<Vec<PeerNumber>, Error> {
        let mut numbers = Vec::with_capacity(grants.len());
        for (addresses, grant) in grants {
            numbers.push(self.enter(addresses, *grant)?);
        }
        // Classes before limits: a packet that is let in has somewhere to go. With thousands at once most classes are
        // left to [`Shaper::settle`]; until then their packets are in the closed class.
        let classes = numbers.iter().zip(grants).map(|(number, (_, grant))| (*number, *grant));
        let classes: Vec<_> = classes.collect();
        let (now, later) = classes.split_at(classes.len().min(CLASSES_AT_ONCE));
        self.send_classes(now).await?;
        if self.htb_devices().next().is_some() {
            self.unsettled.extend(later.iter().map(|(number, _)| *number));
        }
        for (number, (addresses, grant)) in numbers.iter().zip(grants) {
            let limits = self.limits(*number, *grant);
            let shaping = self.shaping()?;
            shaping.set_limits(*number, limits)?;
            for address in addresses {
                shaping.set_address(*address, *number)?;
            }
        }
        let emptied: Vec<_> = self
            .peers
            .iter()
            .filter(|(_, peer)| peer.addresses.is_empty())
            .map(|(number, _)| PeerNumber(*number))
            .collect();
        self.revoke_all(&emptied).await?;
        self.fit_buffers().await?;
        Ok(numbers.into_iter().map(PeerNumber).collect())
    }

    /// Whether every peer has its classes.
    pub fn is_settled(&self) -> bool {
        self.unsettled.is_empty()
    }

    /// Makes some of the classes that are still to be made.
    pub async fn settle(&mut self) -> Result<(), Error> {
        let mut classes = Vec::new();
        while classes.len() < CLASSES_AT_ONCE
            && let Some(number) = self.unsettled.pop_front()
        {
            let peer = self.peers.get(&number);
            classes.extend(peer.and_then(|peer| peer.grant).map(|grant| (number, grant)));
        }
        self.send_classes(&classes).await
    }

    /// Notes a peer and who has its addresses; answers with its number.
    fn enter(&mut self, addresses: &[IpAddr], grant: Grant) -> Result<u32, Error> {
        let wanted: BTreeSet<IpAddr> = addresses.iter().copied().collect();
        let owner = wanted.first().and_then(|address| self.owners.get(address)).copied();
        let known = owner.filter(|number| self.peers.get(number).is_some_and(|peer| peer.addresses == wanted));
        let number = match known {
            Some(number) => number,
            None => self.free_number()?,
        };
        if known.is_none() {
            self.shaping()?.clear_traffic(number)?;
        }
        for address in &wanted {
            if let Some(before) = self.owners.insert(*address, number)
                && before != number
                && let Some(peer) = self.peers.get_mut(&before)
            {
                peer.addresses.remove(address);
            }
        }
        let peer = Peer {
            addresses: wanted,
            grant: Some(grant),
        };
        self.peers.insert(number, peer);
        Ok(number)
    }

    /// Takes a peer's grant away; from then on nothing of it passes. One that is not there is no error.
    pub async fn revoke(&mut self, number: PeerNumber) -> Result<(), Error> {
        self.revoke_all(&[number]).await
    }

    /// The same for many at once.
    pub async fn revoke_all(&mut self, numbers: &[PeerNumber]) -> Result<(), Error> {
        let mut requests = Vec::new();
        for PeerNumber(number) in numbers {
            let Some(peer) = self.peers.remove(number) else {
                continue;
            };
            self.next = self.next.min(*number);
            for address in &peer.addresses {
                self.owners.remove(address);
            }
            let shaping = self.shaping()?;
            for address in peer.addresses {
                shaping.forget_address(address)?;
            }
            shaping.set_limits(*number, [Limit::default(); 2])?;
            let class = tc::peer_class(*number);
            requests.extend(self.htb_devices().map(|(index, _)| tc::delete_class(index, class)));
        }
        self.host.traffic_control(requests).await
    }

    /// Takes every peer's grant away that is not among these: what an earlier daemon left and nobody wants any more.
    pub async fn retain(&mut self, wanted: &BTreeSet<PeerNumber>) -> Result<(), Error> {
        let numbers = self.peers.keys().map(|number| PeerNumber(*number));
        let gone: Vec<_> = numbers.filter(|number| !wanted.contains(number)).collect();
        self.revoke_all(&gone).await
    }

    /// Changes what peers are granted, [`abi::DOWN`] and [`abi::UP`]; those that are not there are left out. Who gets
    /// less comes first, so that together they never have more than before and after.
    pub async fn resize(&mut self, rates: &[(PeerNumber, Rate, Rate)]) -> Result<(), Error> {
        let mut changes: Vec<(u32, Grant, bool)> = rates
            .iter()
            .filter_map(|(number, down, up)| {
                let before = self.peers.get(&number.0)?.grant?;
                let grant = Grant {
                    down: *down,
                    up: *up,
                    ..before
                };
                let more = grant.down > before.down || grant.up > before.up;
                (grant != before).then_some((number.0, grant, more))
            })
            .collect();
        changes.sort_by_key(|(_, _, more)| *more);
        for (number, grant, _) in &changes {
            let limits = self.limits(*number, *grant);
            self.shaping()?.set_limits(*number, limits)?;
            if let Some(peer) = self.peers.get_mut(number) {
                peer.grant = Some(*grant);
            }
        }
        let classes: Vec<_> = changes.into_iter().map(|(number, grant, _)| (number, grant)).collect();
        self.send_classes(&classes).await?;
        self.fit_buffers().await
    }

    /// Limits all peers together; `None` is no limit.
    pub async fn set_node(&mut self, down: Option<Rate>, up: Option<Rate>) -> Result<(), Error> {
        self.node = [down, up];
        self.write_node()?;
        let requests = self.htb_devices().map(|(index, up)| {
            let rate = self.node.get(usize::from(up)).copied().flatten();
            tc::node_class(index, rate.map(Rate::bytes_per_second))
        });
        self.host.traffic_control(requests.collect()).await
    }

    fn write_node(&mut self) -> Result<(), Error> {
        let limit = |mode: Mode, rate: Option<Rate>| match (mode, rate) {
            // There htb has a class for all together.
            (Mode::Htb, _) | (_, None) => NodeLimit::default(),
            (_, Some(rate)) => NodeLimit::new(mode.meter(rate)),
        };
        let [down, up] = self.node;
        let node = Node {
            down: limit(self.modes.down, down),
            up: limit(self.modes.up, up),
            tunnel: self.tunnel,
            reserved: 0,
        };
        Ok(self.shaping()?.set_node(node)?)
    }

    /// What every peer carried and lost since it was first granted something, [`abi::DOWN`] and [`abi::UP`].
    pub fn counters(&self) -> Result<BTreeMap<PeerNumber, [Traffic; 2]>, Error> {
        let shaping = self.shaping.as_ref().ok_or(Error::NoShaper)?;
        let read = |number: &u32| Ok((PeerNumber(*number), shaping.traffic(*number)?));
        self.peers.keys().map(read).collect()
    }

    /// The addresses of every peer.
    pub fn peers(&self) -> BTreeMap<PeerNumber, BTreeSet<IpAddr>> {
        let peers = self.peers.iter();
        peers
            .map(|(number, peer)| (PeerNumber(*number), peer.addresses.clone()))
            .collect()
    }

    /// What was dropped, by reason.
    pub fn refused(&self) -> Result<BTreeMap<&'static str, Counter>, Error> {
        let shaping = self.shaping.as_ref().ok_or(Error::NoShaper)?;
        let counters = shaping.refused()?;
        Ok(abi::refused::NAMES.into_iter().zip(counters).collect())
    }

    /// Compares the machine with what it should be and repairs what others took away. Says what that was.
    ///
    /// Until then nothing is open: without its qdisc a program drops what it cannot pace, without the intermediate device
    /// the upload goes nowhere. An interface that is gone is an error: its shaper is to be opened anew.
    pub async fn reconcile(&mut self) -> Result<Vec<String>, Error> {
        let (mut repaired, mut anew) = (Vec::new(), false);
        if self.host.interface_index(&self.config.interface).await? != self.tunnel {
            return Err(Error::NoInterface(self.config.interface.clone()));
        }
        if let Some(before) = self.intermediate {
            let name = intermediate_name(&self.config.interface);
            let now = self.host.intermediate(&name).await?;
            if now != before {
                repaired.push(format!("the device {name}"));
                self.intermediate = Some(now);
                anew = true;
            }
        }
        for (index, up) in self.devices() {
            let mode = if up { self.modes.up } else { self.modes.down };
            if self.host.has_root(index, mode).await? {
                continue;
            }
            repaired.push(format!("the qdisc of the {}", if up { "upload" } else { "download" }));
            let node = self.node.get(usize::from(up)).copied().flatten();
            let node = node.map(Rate::bytes_per_second);
            self.host.make_root(index, mode, node).await?;
        }
        if !repaired.is_empty() {
            let peers = self.peers.iter();
            let granted: Vec<_> = peers
                .filter_map(|(number, peer)| Some((*number, peer.grant?)))
                .collect();
            self.send_classes(&granted).await?;
        }
        self.attach().await?;
        self.write_node()?;
        if let Some(index) = self.intermediate {
            self.host.take_uploads(self.tunnel, index, anew).await?;
            self.host.intermediate_up(index).await?;
        }
        Ok(repaired)
    }

    /// Takes everything of this shaper out of the machine. The interface is taken down first: nothing is open.
    pub async fn close(mut self) -> Result<(), Error> {
        let interface = self.config.interface.clone();
        // One that is gone took its programs along.
        let index = self.host.interface_index(&interface).await;
        if let Ok(index) = index {
            self.host.set_down(index, &interface).await?;
        }
        drop(self.shaping.take());
        let name = interface.clone();
        self.loader.run(move |pins| Shaping::remove(&name, pins)).await??;
        if index.is_ok_and(|index| index == self.tunnel) {
            let requests = vec![tc::delete_root(self.tunnel), tc::delete_redirect(self.tunnel)];
            self.host.traffic_control(requests).await?;
        }
        self.host.remove_intermediate(&interface).await?;
        Ok(())
    }

    fn free_number(&mut self) -> Result<u32, Error> {
        let free = (self.next..MAX_PEERS)
            .find(|number| !self.peers.contains_key(number))
            .ok_or_else(|| {
                Error::from(crate::ebpf::Error::Full {
                    interface: self.config.interface.clone(),
                })
            })?;
        self.next = free + 1;
        Ok(free)
    }

    fn limits(&self, number: u32, grant: Grant) -> [Limit; 2] {
        let class = tc::peer_class(number).into();
        let until_ns = monotonic_ns(grant.until);
        [
            Limit::new(self.modes.down.meter(grant.down), until_ns, class),
            Limit::new(self.modes.up.meter(grant.up), until_ns, class),
        ]
    }

    /// The devices with a qdisc of ours, and whether it is the upload's.
    fn devices(&self) -> impl Iterator<Item = (u32, bool)> + use<> {
        let upload = self.intermediate.map(|index| (index, true));
        [(self.tunnel, false)].into_iter().chain(upload)
    }

    fn htb_devices(&self) -> impl Iterator<Item = (u32, bool)> + use<> {
        let (down, up) = (self.modes.down, self.modes.up);
        self.devices()
            .filter(move |(_, upload)| (if *upload { up } else { down }) == Mode::Htb)
    }

    async fn send_classes(&self, grants: &[(u32, Grant)]) -> Result<(), Error> {
        let mut requests: Vec<Request> = Vec::new();
        for (index, up) in self.htb_devices() {
            for (number, grant) in grants {
                let rate = if up { grant.up } else { grant.down };
                let class = ClassRate {
                    bytes: rate.bytes_per_second().max(1),
                    queue_bytes: Meter::paced(rate).horizon_bytes(),
                    packet_bytes: u32::from(self.config.mtu_bytes) + 32,
                };
                requests.extend(tc::peer(index, tc::peer_class(*number), class));
            }
        }
        self.host.traffic_control(requests).await
    }

    /// Limits what one buffer of a local sender may be to what the fastest grant carries in 5 ms; in powers of two, for
    /// every change of a link is told to everybody who listens.
    async fn fit_buffers(&mut self) -> Result<(), Error> {
        let grants = self.peers.values().filter_map(|peer| peer.grant);
        let Some(fastest) = grants.map(|grant| grant.down).max() else {
            return Ok(());
        };
        let bytes = u128::from(fastest.bytes_per_second()) * LONGEST_BUFFER.as_micros() / 1_000_000;
        let (least, most) = ((2 * u32::from(self.config.mtu_bytes)).next_power_of_two(), 65_536);
        let bytes = u32::try_from(bytes).unwrap_or(most).clamp(1, most);
        let bytes = (1 << bytes.ilog2()).clamp(least.min(most), most);
        if self.gso_bytes != Some(bytes) {
            self.host.limit_buffers(self.tunnel, bytes).await?;
            self.gso_bytes = Some(bytes);
        }
        Ok(())
    }
}

/// A moment in nanoseconds of the clock that programs read.
fn monotonic_ns(at: Instant) -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from);
    let until = now.saturating_add(at.saturating_duration_since(Instant::now()));
    u64::try_from(until.as_nanos()).unwrap_or(u64::MAX)
}
