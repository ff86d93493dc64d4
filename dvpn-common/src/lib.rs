//! What two DVPN processes, or the kernel programs and the daemon, must agree on.
//!
//! Without features this crate is `no_std` and holds only [`abi`], the layout of the eBPF maps, [`grant`], their
//! arithmetic, [`segments`] and [`rate`]. The feature `std` adds identifiers, keys, the HTTP contracts with their limits, the latency echo, the signed approval, D-Bus names
//! and the status document.
#![cfg_attr(not(feature = "std"), no_std)]

pub mod abi;
#[cfg(feature = "std")]
pub mod approval;
#[cfg(feature = "std")]
pub mod contract;
#[cfg(feature = "std")]
pub mod dbus;
#[cfg(feature = "std")]
pub mod directory;
#[cfg(feature = "std")]
pub mod echo;
pub mod grant;
#[cfg(feature = "std")]
pub mod ids;
#[cfg(feature = "std")]
pub mod keys;
#[cfg(feature = "std")]
pub mod limits;
#[cfg(feature = "std")]
pub mod node;
#[cfg(feature = "std")]
pub mod possession;
pub mod rate;
pub mod segments;
#[cfg(feature = "std")]
pub mod status;
