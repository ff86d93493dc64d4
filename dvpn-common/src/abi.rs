//! The eBPF maps as the tc programs and the daemon both see them. `no_std`, host byte order, fixed layout.
//!
//! What the daemon writes ([`GRANT`], [`NODE`], [`PEER_BY_ADDR`]), what the programs write ([`STATE`], [`NODE_STATE`])
//! and what they count ([`PEER_COUNTERS`], [`REFUSED`]) are maps of their own: an update of one never loses the other.

use crate::grant::NodeLimit;

/// Version of the map layout. It is part of the pin path, so that two daemons of different layout never share a map.
pub const VERSION: u32 = 2;

/// Per-CPU array of [`Counter`], indexed by [`INGRESS`] and [`EGRESS`].
pub const COUNTERS: &str = "COUNTERS";
/// Index of packets that came out of the tunnel interface.
pub const INGRESS: u32 = 0;
/// Index of packets that went into the tunnel interface.
pub const EGRESS: u32 = 1;
/// Entries in [`COUNTERS`].
pub const COUNTERS_LEN: u32 = 2;

/// Hash of [`PeerAddress`] to the peer's number.
pub const PEER_BY_ADDR: &str = "PEER_BY_ADDR";
/// Array of [`Limit`](crate::grant::Limit), indexed by [`slot`]. Zero is a lease that ran out.
pub const GRANT: &str = "GRANT";
/// Array of [`State`], indexed by [`slot`].
pub const STATE: &str = "STATE";
/// Per-CPU array of [`Traffic`], indexed by [`slot`].
pub const PEER_COUNTERS: &str = "PEER_COUNTERS";
/// Array of one [`Node`].
pub const NODE: &str = "NODE";
/// Array of [`State`], indexed by [`DOWN`] and [`UP`].
pub const NODE_STATE: &str = "NODE_STATE";
/// Per-CPU array of bytes, indexed by [`DOWN`] and [`UP`]: what a CPU took of the node's limit and has not used yet.
pub const NODE_CREDIT: &str = "NODE_CREDIT";
/// Per-CPU array of [`Counter`], indexed by the constants in [`refused`].
pub const REFUSED: &str = "REFUSED";

/// Most peers of one interface.
pub const MAX_PEERS: u32 = 4096;
/// Most inner addresses: one of each family for each peer.
pub const MAX_ADDRESSES: u32 = 2 * MAX_PEERS;
/// Entries of the arrays that are indexed by [`slot`].
pub const SLOTS: u32 = DIRECTIONS * MAX_PEERS;
/// Directions of a peer or node.
pub const DIRECTIONS: u32 = 2;
/// Towards the peer.
pub const DOWN: u32 = 0;
/// From the peer.
pub const UP: u32 = 1;

/// Where a peer's direction is in the arrays.
pub const fn slot(peer: u32, direction: u32) -> u32 {
    peer * DIRECTIONS + direction
}

/// Program on the ingress hook that counts.
pub const COUNT_INGRESS: &str = "count_ingress";
/// Program on the egress hook that counts.
pub const COUNT_EGRESS: &str = "count_egress";
/// Program on a tunnel's egress hook: the download of its peers.
pub const SHAPE_DOWN: &str = "shape_down";
/// Program on a tunnel's ingress hook: what of its peers' upload may go to the intermediate device.
pub const ADMIT_UP: &str = "admit_up";
/// Program on the intermediate device's egress hook: the upload of the tunnel's peers.
pub const SHAPE_UP: &str = "shape_up";

/// Name of the program constant: bytes of link-layer header.
pub const LINK_HEADER: &str = "LINK_HEADER";
/// Name of the program constant: the index of the tunnel interface that the programs are about.
pub const TUNNEL: &str = "TUNNEL";
/// Name of the program constant: how the download is enforced, one of [`mode`].
pub const DOWN_MODE: &str = "DOWN_MODE";
/// Name of the program constant: how the upload is enforced, one of [`mode`].
pub const UP_MODE: &str = "UP_MODE";

/// How a direction is enforced.
pub mod mode {
    /// Every packet gets its time of departure; the qdisc fq keeps it until then.
    pub const EDT: u32 = 0;
    /// Every packet gets its class of the qdisc htb, which does the rest.
    pub const HTB: u32 = 1;
    /// What comes too early is dropped.
    pub const POLICE: u32 = 2;
}

/// Why a packet was dropped: indexes of [`REFUSED`].
pub mod refused {
    /// No peer has this address.
    pub const UNKNOWN: u32 = 0;
    /// No IP header that reads.
    pub const MALFORMED: u32 = 1;
    /// The peer's lease ran out, or it has no grant.
    pub const LEASE: u32 = 2;
    /// Above the peer's grant.
    pub const GRANT: u32 = 3;
    /// Above the node's limit.
    pub const NODE: u32 = 4;
    /// The kernel did not take the time of departure.
    pub const UNPACED: u32 = 5;
    /// How many there are.
    pub const LEN: u32 = 6;
    /// Their names, in this order.
    pub const NAMES: [&str; LEN as usize] = ["unknown", "malformed", "lease", "grant", "node", "unpaced"];
}

/// What one direction of one interface carried.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counter {
    /// Packets; a super-packet counts its segments.
    pub packets: u64,
    /// Layer-3 bytes, headers of every segment included.
    pub bytes: u64,
}

/// An inner address on an interface.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct PeerAddress {
    /// Index of the tunnel interface, so that what is left of an earlier one of its name never matches.
    pub interface: u32,
    /// The address; IPv4 as `::ffff:a.b.c.d`.
    pub address: [u8; 16],
}

/// An IPv4 address as it is in [`PeerAddress`].
#[inline]
pub const fn mapped(v4: [u8; 4]) -> [u8; 16] {
    let [a, b, c, d] = v4;
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d]
}

/// What a program knows of one direction; a cache line, so that two never share one for long.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct State {
    /// Until when the limit is used up, in nanoseconds of the monotonic clock.
    pub vtime_ns: u64,
    /// The same for the limit behind it.
    pub backstop_ns: u64,
    reserved: [u64; 6],
}

impl State {
    /// Both limits used up until these moments.
    pub const fn new(vtime_ns: u64, backstop_ns: u64) -> Self {
        Self {
            vtime_ns,
            backstop_ns,
            reserved: [0; 6],
        }
    }
}

/// What one direction of one peer carried and lost; totals.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Packets that passed; a super-packet counts its segments.
    pub packets: u64,
    /// Their layer-3 bytes, headers of every segment included.
    pub bytes: u64,
    /// Packets that were dropped.
    pub dropped_packets: u64,
    /// Their layer-3 bytes.
    pub dropped_bytes: u64,
    /// Buffers that were marked as having met congestion (RFC 3168).
    pub marks: u64,
    /// Buffers that were held back.
    pub delayed: u64,
    /// How long all of them together.
    pub delay_ns: u64,
    reserved: u64,
}

impl Traffic {
    /// Both together.
    #[must_use]
    pub const fn plus(self, other: Self) -> Self {
        Self {
            packets: self.packets.wrapping_add(other.packets),
            bytes: self.bytes.wrapping_add(other.bytes),
            dropped_packets: self.dropped_packets.wrapping_add(other.dropped_packets),
            dropped_bytes: self.dropped_bytes.wrapping_add(other.dropped_bytes),
            marks: self.marks.wrapping_add(other.marks),
            delayed: self.delayed.wrapping_add(other.delayed),
            delay_ns: self.delay_ns.wrapping_add(other.delay_ns),
            reserved: 0,
        }
    }
}

/// What holds for all peers together.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Node {
    /// Towards all peers.
    pub down: NodeLimit,
    /// From all peers.
    pub up: NodeLimit,
    /// Index of the tunnel interface that the programs were attached to; the daemon's own.
    pub tunnel: u32,
    /// Always 0.
    pub reserved: u32,
}

#[cfg(feature = "aya")]
#[allow(unsafe_code, reason = "aya reads and writes map values as bytes")]
mod pod {
    use super::{Counter, Node, PeerAddress, State, Traffic};
    use crate::grant::Limit;

    // SAFETY: `Counter` is repr(C), two u64, no padding, and every bit pattern is a value.
    unsafe impl aya::Pod for Counter {}
    // SAFETY: `PeerAddress` is repr(C), a u32 and 16 bytes, no padding, and every bit pattern is a value.
    unsafe impl aya::Pod for PeerAddress {}
    // SAFETY: `Limit` is repr(C), five u64 and two u32 and one u64, no padding, and every bit pattern is a value.
    unsafe impl aya::Pod for Limit {}
    // SAFETY: `State` is repr(C), eight u64, no padding, and every bit pattern is a value.
    unsafe impl aya::Pod for State {}
    // SAFETY: `Traffic` is repr(C), eight u64, no padding, and every bit pattern is a value.
    unsafe impl aya::Pod for Traffic {}
    // SAFETY: `Node` is repr(C), six u64 and two u32, no padding, and every bit pattern is a value.
    unsafe impl aya::Pod for Node {}
}

#[cfg(test)]
mod tests {
    use super::{Node, NodeLimit, PeerAddress, SLOTS, State, Traffic, slot};
    use crate::grant::Limit;

    #[test]
    fn a_cache_line_holds_a_state_a_limit_and_a_peers_counters() {
        assert_eq!(
            [size_of::<State>(), size_of::<Limit>(), size_of::<Traffic>()],
            [64, 64, 64]
        );
        // No padding: the kernel compares keys and the daemon reads values byte by byte.
        assert_eq!(size_of::<PeerAddress>(), 4 + 16);
        assert_eq!(size_of::<Node>(), 2 * size_of::<NodeLimit>() + 8);
    }

    #[test]
    fn every_peer_has_two_slots_of_its_own() {
        assert_eq!([slot(0, 0), slot(0, 1), slot(1, 0)], [0, 1, 2]);
        assert_eq!(slot(super::MAX_PEERS - 1, super::UP), SLOTS - 1);
    }
}
