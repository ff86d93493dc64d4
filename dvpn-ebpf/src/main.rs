//! The DVPN tc programs: what an interface carries, counted in the kernel.
//!
//! One object for both hooks. A program never changes a packet's fate: it returns [`TCX_NEXT`], which a clsact
//! filter reads as `TC_ACT_UNSPEC`, so the programs of others on the same interface still run.
//!
//! Off the bpf target this builds a stub, so that `cargo check --workspace` works everywhere and the arithmetic in
//! [`segments`] is tested on the host.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(any(target_arch = "bpf", test))]
mod segments;

#[cfg(target_arch = "bpf")]
mod programs;

#[cfg(not(target_arch = "bpf"))]
fn main() {}
