//! The eBPF maps as the tc programs and the daemon both see them. `no_std`, host byte order, fixed layout.

/// Version of the map layout. It is part of the pin path, so that two daemons of different layout never share a map.
pub const VERSION: u32 = 1;

/// Per-CPU array of [`Counter`], indexed by [`INGRESS`] and [`EGRESS`].
pub const COUNTERS: &str = "COUNTERS";
/// Index of packets that came out of the tunnel interface.
pub const INGRESS: u32 = 0;
/// Index of packets that went into the tunnel interface.
pub const EGRESS: u32 = 1;
/// Entries in [`COUNTERS`].
pub const COUNTERS_LEN: u32 = 2;

/// Program on the ingress hook.
pub const COUNT_INGRESS: &str = "count_ingress";
/// Program on the egress hook.
pub const COUNT_EGRESS: &str = "count_egress";

/// What one direction of one interface carried.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counter {
    /// Packets; a super-packet counts its segments.
    pub packets: u64,
    /// Layer-3 bytes, headers of every segment included.
    pub bytes: u64,
}

#[cfg(feature = "aya")]
#[allow(unsafe_code, reason = "aya reads and writes map values as bytes")]
// SAFETY: `Counter` is repr(C), two u64, no padding, and every bit pattern is a value.
unsafe impl aya::Pod for Counter {}
