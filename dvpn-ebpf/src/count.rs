//! Counts what an interface carries.
#![allow(unsafe_code, reason = "map values are reached by the kernel's pointers")]
#![allow(
    clippy::inline_always,
    reason = "one program is one function: calls cost, and the verifier knows less across them"
)]

use aya_ebpf::bindings::tcx_action_base::TCX_NEXT;
use aya_ebpf::macros::{classifier, map};
use aya_ebpf::maps::PerCpuArray;
use aya_ebpf::programs::TcContext;
use dvpn_common::abi::{COUNTERS_LEN, Counter, EGRESS, INGRESS};

use crate::packet;

/// What the interface carried, by direction; each CPU has its own, so no update is contended.
#[map]
static COUNTERS: PerCpuArray<Counter> = PerCpuArray::with_max_entries(COUNTERS_LEN, 0);

/// Counts packets that came out of the interface.
#[classifier]
pub(crate) fn count_ingress(ctx: TcContext) -> i32 {
    count(&ctx, INGRESS);
    TCX_NEXT
}

/// Counts packets that go into the interface.
#[classifier]
pub(crate) fn count_egress(ctx: TcContext) -> i32 {
    count(&ctx, EGRESS);
    TCX_NEXT
}

#[inline(always)]
fn count(ctx: &TcContext, direction: u32) {
    add(COUNTERS.get_ptr_mut(direction), packet::size(ctx));
}

/// Adds packets and bytes to a counter of the running CPU.
#[inline(always)]
pub(crate) fn add(counter: Option<*mut Counter>, (packets, bytes): (u64, u64)) {
    let Some(counter) = counter else { return };
    // SAFETY: the map returned this slot of the running CPU; a tc program is not preempted by another on its CPU.
    unsafe {
        (*counter).packets += packets;
        (*counter).bytes += bytes;
    }
}
