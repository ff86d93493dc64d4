//! Enforces what each peer is granted.
//!
//! The download passes `shape_down` on its way into the tunnel. The upload comes out of the tunnel at `admit_up`; what
//! passes there a filter behind all others takes to the intermediate device (act_mirred: some kernels drop there what a
//! program redirects), where `shape_up` paces it on the way out; from there it comes back into the tunnel interface and
//! goes on. Whoever is not listed gets nothing.
#![allow(
    unsafe_code,
    reason = "map values are reached by the kernel's pointers, and helpers are C functions"
)]
#![allow(
    clippy::inline_always,
    reason = "one program is one function: calls cost, and the verifier knows less across them"
)]

use aya_ebpf::bindings::tcx_action_base::{TCX_DROP, TCX_NEXT};
use aya_ebpf::helpers::{bpf_ktime_get_ns, bpf_skb_ecn_set_ce, bpf_skb_set_tstamp};
use aya_ebpf::macros::{classifier, map};
use aya_ebpf::maps::{Array, HashMap, PerCpuArray};
use aya_ebpf::programs::TcContext;
use dvpn_common::abi::{
    Counter, DIRECTIONS, DOWN, MAX_ADDRESSES, Node, PeerAddress, SLOTS, State, Traffic, UP, mode, refused, slot,
};
use dvpn_common::grant::{Limit, Meter, NodeLimit, Verdict, charge, charge_node};

use crate::cell::MapCell;
use crate::count::add;
use crate::packet::{End, address, constant, size};

#[map]
static PEER_BY_ADDR: HashMap<PeerAddress, u32> = HashMap::with_max_entries(MAX_ADDRESSES, 0);
#[map]
static GRANT: Array<Limit> = Array::with_max_entries(SLOTS, 0);
#[map]
static STATE: Array<State> = Array::with_max_entries(SLOTS, 0);
#[map]
static PEER_COUNTERS: PerCpuArray<Traffic> = PerCpuArray::with_max_entries(SLOTS, 0);
#[map]
static NODE: Array<Node> = Array::with_max_entries(1, 0);
#[map]
static NODE_STATE: Array<State> = Array::with_max_entries(DIRECTIONS, 0);
#[map]
static NODE_CREDIT: PerCpuArray<u64> = PerCpuArray::with_max_entries(DIRECTIONS, 0);
#[map]
static REFUSED: PerCpuArray<Counter> = PerCpuArray::with_max_entries(refused::LEN, 0);

/// The index of the tunnel interface. The loader sets it.
#[unsafe(no_mangle)]
static TUNNEL: u32 = 0;
/// How the download is enforced. The loader sets it; the verifier leaves out the rest.
#[unsafe(no_mangle)]
static DOWN_MODE: u32 = mode::POLICE;
/// How the upload is enforced.
#[unsafe(no_mangle)]
static UP_MODE: u32 = mode::POLICE;

/// `BPF_SKB_TSTAMP_DELIVERY_MONO`, since Linux 6.11 `BPF_SKB_CLOCK_MONOTONIC`.
const MONOTONIC: u32 = 1;

/// Into the tunnel, towards the peer.
#[classifier]
pub(crate) fn shape_down(ctx: TcContext) -> i32 {
    let size = size(&ctx);
    match Peer::find(&ctx, End::Destination, DOWN) {
        Ok(peer) => peer.pace(&ctx, size, constant(&DOWN_MODE)),
        Err(reason) => refuse(reason, size),
    }
}

/// Out of the tunnel, from the peer.
#[classifier]
pub(crate) fn admit_up(ctx: TcContext) -> i32 {
    let size = size(&ctx);
    let peer = match Peer::find(&ctx, End::Source, UP) {
        Ok(peer) => peer,
        Err(reason) => return refuse(reason, size),
    };
    if constant(&UP_MODE) == mode::POLICE {
        return peer.pace(&ctx, size, mode::POLICE);
    }
    if peer.charge_backstop(size.1) == Verdict::Drop {
        return peer.lose(refused::GRANT, size);
    }
    TCX_NEXT
}

/// Into the intermediate device, from the peer.
#[classifier]
pub(crate) fn shape_up(ctx: TcContext) -> i32 {
    // The packets are as they came out of the tunnel, although the device is an Ethernet one.
    let size = size(&ctx);
    match Peer::find(&ctx, End::Source, UP) {
        Ok(peer) => peer.pace(&ctx, size, constant(&UP_MODE)),
        Err(reason) => refuse(reason, size),
    }
}

/// One direction of a peer whose lease holds.
struct Peer {
    limit: *const Limit,
    state: *mut State,
    traffic: *mut Traffic,
    direction: u32,
    now_ns: u64,
}

impl Peer {
    #[inline(always)]
    fn find(ctx: &TcContext, end: End, direction: u32) -> Result<Self, u32> {
        let key = PeerAddress {
            interface: constant(&TUNNEL),
            address: address(ctx, end).ok_or(refused::MALFORMED)?,
        };
        // SAFETY: the value is a u32 that is read once; the daemon replaces it as a whole.
        let number = *unsafe { PEER_BY_ADDR.get(&key) }.ok_or(refused::UNKNOWN)?;
        let index = slot(number, direction);
        let peer = Self {
            limit: GRANT.get_ptr(index).ok_or(refused::UNKNOWN)?,
            state: STATE.get_ptr_mut(index).ok_or(refused::UNKNOWN)?,
            traffic: PEER_COUNTERS.get_ptr_mut(index).ok_or(refused::UNKNOWN)?,
            direction,
            // SAFETY: the helper has no arguments.
            now_ns: unsafe { bpf_ktime_get_ns() },
        };
        // SAFETY: the map returned the limit; the daemon writes each of its fields as a whole.
        if unsafe { (*peer.limit).holds(peer.now_ns) } {
            Ok(peer)
        } else {
            Err(refused::LEASE)
        }
    }

    /// Charges the grant and makes the packet leave when it should.
    #[inline(always)]
    fn pace(&self, ctx: &TcContext, size: (u64, u64), how: u32) -> i32 {
        if how == mode::HTB {
            // The class does the pacing. Should it be gone, this does it; the upload was charged at its admission.
            if self.direction == DOWN && self.charge_backstop(size.1) == Verdict::Drop {
                return self.lose(refused::GRANT, size);
            }
            // SAFETY: the map returned the limit, and the kernel hands every run a valid __sk_buff.
            unsafe { (*ctx.skb.skb).priority = (*self.limit).class };
            return self.pass(size, self.now_ns);
        }
        let (at_ns, marked) = match self.charge(size.1) {
            Verdict::Send { at_ns } => (at_ns, false),
            Verdict::Mark { at_ns } => (at_ns, true),
            Verdict::Drop => return self.lose(refused::GRANT, size),
        };
        let at_ns = match self.charge_node(size.1) {
            Verdict::Send { at_ns: node_ns } | Verdict::Mark { at_ns: node_ns } if node_ns > at_ns => node_ns,
            Verdict::Send { .. } | Verdict::Mark { .. } => at_ns,
            Verdict::Drop => return self.lose(refused::NODE, size),
        };
        // SAFETY: the kernel hands every run a valid __sk_buff.
        let skb = ctx.skb.skb;
        // SAFETY: as above; the helper says 1 when the packet can carry a mark and now does.
        if marked && unsafe { bpf_skb_ecn_set_ce(skb) } == 1 {
            // SAFETY: the map returned this slot of the running CPU.
            unsafe { (*self.traffic).marks += 1 };
        }
        if how == mode::POLICE {
            return self.pass(size, self.now_ns);
        }
        // Without its time it would leave at once: better not at all.
        // SAFETY: as above.
        if at_ns > self.now_ns && unsafe { bpf_skb_set_tstamp(skb, at_ns, MONOTONIC) } != 0 {
            return self.lose(refused::UNPACED, size);
        }
        self.pass(size, at_ns)
    }

    #[inline(always)]
    fn charge(&self, bytes: u64) -> Verdict {
        // SAFETY: the map returned state and limit.
        let (cell, meter) = unsafe {
            (
                MapCell::new(&raw mut (*self.state).vtime_ns),
                meter(&raw const (*self.limit).meter),
            )
        };
        charge(&cell, meter, self.now_ns, bytes)
    }

    #[inline(always)]
    fn charge_backstop(&self, bytes: u64) -> Verdict {
        // SAFETY: the map returned state and limit.
        let (cell, meter) = unsafe {
            (
                MapCell::new(&raw mut (*self.state).backstop_ns),
                meter(&raw const (*self.limit).backstop),
            )
        };
        charge(&cell, meter, self.now_ns, bytes)
    }

    #[inline(always)]
    fn charge_node(&self, bytes: u64) -> Verdict {
        let free = Verdict::Send { at_ns: self.now_ns };
        let (Some(node), Some(state), Some(credit)) = (
            NODE.get_ptr(0),
            NODE_STATE.get_ptr_mut(self.direction),
            NODE_CREDIT.get_ptr_mut(self.direction),
        ) else {
            return free;
        };
        // SAFETY: the maps returned these; the credit is the running CPU's own.
        unsafe {
            let limit = if self.direction == DOWN {
                &raw const (*node).down
            } else {
                &raw const (*node).up
            };
            let limit = NodeLimit {
                meter: meter(&raw const (*limit).meter),
                quantum: (&raw const (*limit).quantum).read_volatile(),
            };
            let cell = MapCell::new(&raw mut (*state).vtime_ns);
            charge_node(&cell, &mut *credit, limit, self.now_ns, bytes)
        }
    }

    #[inline(always)]
    fn pass(&self, (packets, bytes): (u64, u64), at_ns: u64) -> i32 {
        // SAFETY: the map returned this slot of the running CPU; a tc program is not preempted by another on its CPU.
        unsafe {
            (*self.traffic).packets += packets;
            (*self.traffic).bytes += bytes;
            if at_ns > self.now_ns {
                (*self.traffic).delayed += 1;
                (*self.traffic).delay_ns += at_ns - self.now_ns;
            }
        }
        TCX_NEXT
    }

    #[inline(always)]
    fn lose(&self, reason: u32, size: (u64, u64)) -> i32 {
        // SAFETY: as in `pass`.
        unsafe {
            (*self.traffic).dropped_packets += size.0;
            (*self.traffic).dropped_bytes += size.1;
        }
        refuse(reason, size)
    }
}

#[inline(always)]
fn refuse(reason: u32, size: (u64, u64)) -> i32 {
    add(REFUSED.get_ptr_mut(reason), size);
    TCX_DROP
}

/// Reads a meter that the daemon may be writing: each number is old or new, and either pair is a limit.
///
/// # Safety
///
/// `meter` points into a map value.
#[inline(always)]
unsafe fn meter(meter: *const Meter) -> Meter {
    // SAFETY: as the function's.
    unsafe {
        Meter {
            mult: (&raw const (*meter).mult).read_volatile(),
            horizon_ns: (&raw const (*meter).horizon_ns).read_volatile(),
        }
    }
}
