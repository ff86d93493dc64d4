//! What a program reads of a packet.
#![allow(
    unsafe_code,
    reason = "the context and its packet are reached by the kernel's pointers"
)]
#![allow(
    clippy::inline_always,
    reason = "one program is one function: calls cost, and the verifier knows less across them"
)]

use core::{mem, ptr};

use aya_ebpf::bindings::bpf_hdr_start_off::BPF_HDR_START_NET;
use aya_ebpf::helpers::bpf_skb_load_bytes_relative;
use aya_ebpf::programs::TcContext;
use dvpn_common::{abi, segments};

/// Bytes of link-layer header on this interface: 0 on a tunnel, 14 on Ethernet. The loader sets it.
#[unsafe(no_mangle)]
static LINK_HEADER: u32 = 0;

/// `ETH_P_IP` and `ETH_P_IPV6` as they are on the wire.
const IPV4: u32 = 0x0800_u16.to_be() as u32;
const IPV6: u32 = 0x86dd_u16.to_be() as u32;
const IPV6_HEADER: u32 = 40;

/// Reads a constant that the loader wrote.
#[inline(always)]
pub(crate) fn constant(value: &'static u32) -> u32 {
    // SAFETY: a reference is valid; the read is volatile so that the value in the object file is not folded in.
    unsafe { ptr::read_volatile(value) }
}

/// Whose address says which peer a packet is about.
#[derive(Clone, Copy)]
pub(crate) enum End {
    Source,
    Destination,
}

/// Packets and layer-3 bytes that a buffer stands for.
#[inline(always)]
pub(crate) fn size(ctx: &TcContext) -> (u64, u64) {
    let link_header = constant(&LINK_HEADER);
    // SAFETY: the kernel hands every run a valid __sk_buff.
    let (gso_size, wire_length) = unsafe { ((*ctx.skb.skb).gso_size, (*ctx.skb.skb).wire_len) };
    let length = ctx.len().saturating_sub(link_header);
    if gso_size == 0 {
        return (1, u64::from(length));
    }
    let (packets, bytes) = segments::count(length, headers(ctx), gso_size);
    // On the way out the kernel has counted too, and knows extension headers; on the way in it counts one header.
    let wire_bytes = u64::from(wire_length).saturating_sub(packets * u64::from(link_header));
    (packets, bytes.max(wire_bytes))
}

/// The address of one end, IPv4 as a mapped one; none when there is no whole IP header. Fragments and packets with
/// extension headers have it where all others have it.
#[inline(always)]
pub(crate) fn address(ctx: &TcContext, end: End) -> Option<[u8; 16]> {
    // SAFETY: the kernel hands every run a valid __sk_buff.
    let protocol = unsafe { (*ctx.skb.skb).protocol };
    if protocol == IPV4 {
        let header: [u8; 20] = load(ctx, 0)?;
        let [.., s0, s1, s2, s3, d0, d1, d2, d3] = header;
        Some(abi::mapped(match end {
            End::Source => [s0, s1, s2, s3],
            End::Destination => [d0, d1, d2, d3],
        }))
    } else if protocol == IPV6 {
        let addresses: [[u8; 16]; 2] = load(ctx, 8)?;
        let [source, destination] = addresses;
        Some(match end {
            End::Source => source,
            End::Destination => destination,
        })
    } else {
        None
    }
}

/// Bytes of network and transport header, 0 when they cannot be read.
#[inline(always)]
fn headers(ctx: &TcContext) -> u32 {
    const TCP: u8 = 6;
    const UDP: u8 = 17;
    const UDP_HEADER: u32 = 8;
    /// Where a TCP header says its own length, in its upper half, in words of 4 bytes.
    const TCP_DATA_OFFSET: u32 = 12;

    let Some(first) = load::<u8>(ctx, 0) else { return 0 };
    let (network, protocol) = match first >> 4 {
        4 => (u32::from(first & 0x0f) * 4, load::<u8>(ctx, 9)),
        6 => (IPV6_HEADER, load::<u8>(ctx, 6)),
        _ => return 0,
    };
    let transport = match protocol {
        Some(TCP) => match load::<u8>(ctx, network + TCP_DATA_OFFSET) {
            Some(offset) => u32::from(offset >> 4) * 4,
            None => 0,
        },
        Some(UDP) => UDP_HEADER,
        _ => 0,
    };
    network + transport
}

/// Bytes at `offset` from the network header.
#[inline(always)]
fn load<T: Copy>(ctx: &TcContext, offset: u32) -> Option<T> {
    let mut value = mem::MaybeUninit::<T>::uninit();
    // SAFETY: the destination is as long as the length says and on the stack; the helper checks the offset.
    let result = unsafe {
        bpf_skb_load_bytes_relative(
            ctx.skb.skb.cast(),
            offset,
            value.as_mut_ptr().cast(),
            size_of::<T>() as u32,
            BPF_HDR_START_NET,
        )
    };
    // SAFETY: the helper wrote all of it, and only bytes and arrays of bytes are asked for: every pattern is a value.
    (result == 0).then(|| unsafe { value.assume_init() })
}
