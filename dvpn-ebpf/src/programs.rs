//! The programs as the kernel loads them.
#![allow(unsafe_code, reason = "buffers and map values are reached by the kernel's pointers")]
#![allow(
    clippy::inline_always,
    reason = "one program is one function: calls cost, and the verifier knows less across them"
)]

use core::ptr;

use aya_ebpf::bindings::bpf_hdr_start_off::BPF_HDR_START_NET;
use aya_ebpf::bindings::tcx_action_base::TCX_NEXT;
use aya_ebpf::helpers::bpf_skb_load_bytes_relative;
use aya_ebpf::macros::{classifier, map};
use aya_ebpf::maps::PerCpuArray;
use aya_ebpf::programs::TcContext;
use dvpn_common::abi::{COUNTERS_LEN, Counter, EGRESS, INGRESS};

use crate::segments;

/// What the interface carried, by direction; each CPU has its own, so no update is contended.
#[map]
static COUNTERS: PerCpuArray<Counter> = PerCpuArray::with_max_entries(COUNTERS_LEN, 0);

/// Bytes of link-layer header on this interface: 0 on a tunnel, 14 on Ethernet. The loader sets it.
#[unsafe(no_mangle)]
static LINK_HEADER: u32 = 0;

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
    let Some(counter) = COUNTERS.get_ptr_mut(direction) else {
        return;
    };
    // SAFETY: LINK_HEADER lives in .rodata, which the loader writes before the program runs; the read is volatile so
    // that the value in the object file is not folded in.
    let link_header = unsafe { ptr::read_volatile(&raw const LINK_HEADER) };
    // SAFETY: the kernel hands every run a valid __sk_buff.
    let gso_size = unsafe { (*ctx.skb.skb).gso_size };
    let length = ctx.len().saturating_sub(link_header);
    let headers = if gso_size == 0 { 0 } else { headers(ctx) };
    let (packets, bytes) = segments::count(length, headers, gso_size);
    // SAFETY: the map returned this slot of the running CPU; a tc program is not preempted by another on its CPU.
    unsafe {
        (*counter).packets += packets;
        (*counter).bytes += bytes;
    }
}

/// Bytes of network and transport header, 0 when they cannot be read.
#[inline(always)]
fn headers(ctx: &TcContext) -> u32 {
    const IPV4: u8 = 4;
    const IPV6: u8 = 6;
    const IPV6_HEADER: u32 = 40;
    const TCP: u8 = 6;
    const UDP: u8 = 17;
    const UDP_HEADER: u32 = 8;
    /// Where a TCP header says its own length, in its upper half, in words of 4 bytes.
    const TCP_DATA_OFFSET: u32 = 12;

    let Some(first) = byte(ctx, 0) else { return 0 };
    let (network, protocol) = match first >> 4 {
        IPV4 => (u32::from(first & 0x0f) * 4, byte(ctx, 9)),
        IPV6 => (IPV6_HEADER, byte(ctx, 6)),
        _ => return 0,
    };
    let transport = match protocol {
        Some(TCP) => match byte(ctx, network + TCP_DATA_OFFSET) {
            Some(offset) => u32::from(offset >> 4) * 4,
            None => 0,
        },
        Some(UDP) => UDP_HEADER,
        _ => 0,
    };
    network + transport
}

/// The byte at `offset` from the network header.
#[inline(always)]
fn byte(ctx: &TcContext, offset: u32) -> Option<u8> {
    let mut value = 0u8;
    // SAFETY: the destination is one byte on the stack and the length says so; the helper checks the offset.
    let result = unsafe {
        bpf_skb_load_bytes_relative(
            ctx.skb.skb.cast(),
            offset,
            (&raw mut value).cast(),
            1,
            BPF_HDR_START_NET,
        )
    };
    (result == 0).then_some(value)
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// The kernel gives some helpers only to programs of a GPL-compatible licence (include/linux/license.h).
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
