//! The DVPN tc programs: what an interface carries, counted, and what its peers are granted, enforced in the kernel.
//!
//! One object for both hooks and both tunnels. [`count`] never changes a packet's fate; [`shape`] paces, redirects or
//! drops what is its own, and what passes goes on: the programs return `TCX_NEXT`, which a clsact filter reads as
//! `TC_ACT_UNSPEC`, so that the programs of others on the same interface still run.
//!
//! Off the bpf target this builds a stub, so that `cargo check --workspace` works everywhere; the arithmetic is in
//! dvpn-common and tested there.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]
#![cfg_attr(target_arch = "bpf", feature(core_intrinsics))]
#![cfg_attr(
    target_arch = "bpf",
    allow(
        internal_features,
        reason = "core's AtomicU64 does not compile for the bpf target, its intrinsics do"
    )
)]

#[cfg(target_arch = "bpf")]
mod cell;
#[cfg(target_arch = "bpf")]
mod count;
#[cfg(target_arch = "bpf")]
mod packet;
#[cfg(target_arch = "bpf")]
mod shape;

#[cfg(not(target_arch = "bpf"))]
fn main() {}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// The kernel gives some helpers only to programs of a GPL-compatible licence (include/linux/license.h).
#[cfg(target_arch = "bpf")]
#[allow(unsafe_code, reason = "the kernel looks for this name in this section")]
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
