//! How many packets a super-packet stands for, and how many bytes they put on the wire.

/// Packets and layer-3 bytes of one buffer of `length` layer-3 bytes.
///
/// With segmentation offload the kernel carries one buffer whose payload is cut into pieces of `gso_size` bytes, each
/// of which leaves with its own copy of the `headers` bytes (network and transport header). `gso_size` 0 means an
/// ordinary packet. The number of segments is computed from the lengths because `gso_segs` is 0 for buffers that come
/// from a TUN device (`SKB_GSO_DODGY`, `include/linux/virtio_net.h`); `qdisc_pkt_len_init` (`net/core/dev.c`)
/// does the same.
#[inline]
pub fn count(length: u32, headers: u32, gso_size: u32) -> (u64, u64) {
    if gso_size == 0 || length <= headers {
        return (1, u64::from(length));
    }
    let packets = u64::from((length - headers).div_ceil(gso_size));
    (packets, u64::from(length) + (packets - 1) * u64::from(headers))
}

#[cfg(test)]
mod tests {
    use super::count;

    #[test]
    fn an_ordinary_packet_counts_as_it_is() {
        assert_eq!(count(1420, 0, 0), (1, 1420));
    }

    #[test]
    fn a_super_packet_counts_its_segments_and_their_headers() {
        assert_eq!(count(40 + 3 * 1380, 40, 1380), (3, 3 * 1420));
    }

    #[test]
    fn the_last_segment_may_be_short() {
        assert_eq!(count(40 + 1380 + 1, 40, 1380), (2, 1420 + 41));
    }

    #[test]
    fn a_super_packet_of_one_segment_counts_once() {
        assert_eq!(count(40 + 700, 40, 1380), (1, 740));
    }

    #[test]
    fn headers_longer_than_the_buffer_are_not_believed() {
        assert_eq!(count(30, 40, 1380), (1, 30));
    }

    #[test]
    fn the_largest_buffer_does_not_overflow() {
        let (longest, segments) = (u64::from(u32::MAX), u64::from(u32::MAX) - 40);
        assert_eq!(count(u32::MAX, 40, 1), (segments, longest + (segments - 1) * 40));
    }
}
