//! A number in a map that every CPU may change.
#![allow(
    unsafe_code,
    reason = "map values are reached by the kernel's pointers, and atomic operations on them are intrinsics"
)]
#![allow(
    clippy::inline_always,
    reason = "one program is one function: calls cost, and the verifier knows less across them"
)]

use core::intrinsics::{AtomicOrdering::Relaxed, atomic_cxchg, atomic_xadd};
use core::ptr;

use dvpn_common::grant::Cell;

/// A u64 in a map.
pub(crate) struct MapCell(*mut u64);

impl MapCell {
    /// # Safety
    ///
    /// `value` points to a u64 of a map value that the running program was given.
    #[inline(always)]
    pub(crate) unsafe fn new(value: *mut u64) -> Self {
        Self(value)
    }
}

impl Cell for MapCell {
    #[inline(always)]
    fn load(&self) -> u64 {
        // SAFETY: the pointer is valid for the run (`new`); an aligned u64 is read in one instruction.
        unsafe { ptr::read_volatile(self.0) }
    }

    #[inline(always)]
    fn exchange(&self, current: u64, new: u64) -> Result<(), u64> {
        // SAFETY: the pointer is valid for the run (`new`), and all who change the value do so atomically.
        let (seen, done) = unsafe { atomic_cxchg::<u64, { Relaxed }, { Relaxed }>(self.0, current, new) };
        if done { Ok(()) } else { Err(seen) }
    }

    #[inline(always)]
    fn add(&self, value: u64) -> u64 {
        // SAFETY: as in `exchange`.
        unsafe { atomic_xadd::<u64, u64, { Relaxed }>(self.0, value) }
    }
}
