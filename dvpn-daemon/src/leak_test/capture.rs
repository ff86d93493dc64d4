//! Looks at what leaves this machine, for the packets of one test alone: told by their length in the kernel, and then by
//! the test's random token.

use std::{
    collections::BTreeSet,
    io,
    os::fd::AsRawFd as _,
    time::{Duration, Instant},
};

use nix::sys::socket::{LinkAddr, recvfrom};
use socket2::{Domain, Protocol, SockFilter, Socket, Type};

use crate::tunnel::CLIENT_INTERFACE;

/// Length of a test's token.
pub(super) const TOKEN_BYTES: usize = 16;
/// Length of a payload: no usual one, so that the kernel hands over hardly anything else.
const PAYLOAD_BYTES: u32 = 57;
/// Of IPv4 and UDP, of IPv6 and UDP.
const HEADERS: [u32; 2] = [28, 48];
const PAUSE: Duration = Duration::from_millis(5);

/// What datagram `number` of a test carries.
pub(super) fn payload(token: [u8; TOKEN_BYTES], number: usize) -> Vec<u8> {
    let number = u32::try_from(number).unwrap_or(u32::MAX);
    let mut payload = token.to_vec();
    payload.extend(number.to_be_bytes());
    payload.resize(usize::try_from(PAYLOAD_BYTES).unwrap_or(0), 0);
    payload
}

fn number_in(packet: &[u8], token: [u8; TOKEN_BYTES]) -> Option<usize> {
    let from = packet.len().checked_sub(usize::try_from(PAYLOAD_BYTES).ok()?)?;
    let (found, rest) = packet.get(from..)?.split_first_chunk::<TOKEN_BYTES>()?;
    let number = u32::from_be_bytes(*rest.first_chunk::<4>()?);
    (*found == token).then(|| usize::try_from(number).unwrap_or(usize::MAX))
}

/// Looks while it lives.
pub(super) struct Listener {
    socket: Socket,
    token: [u8; TOKEN_BYTES],
    seen: BTreeSet<usize>,
}

impl Listener {
    /// On every interface.
    pub(super) fn open(token: [u8; TOKEN_BYTES]) -> io::Result<Self> {
        let all = u16::try_from(libc::ETH_P_ALL).unwrap_or_default().to_be();
        // Without a link header: the same on every kind of interface.
        let socket = Socket::new(Domain::PACKET, Type::DGRAM, Some(Protocol::from(i32::from(all))))?;
        socket.set_nonblocking(true)?;
        socket.attach_filter(&filter())?;
        Ok(Self {
            socket,
            token,
            seen: BTreeSet::new(),
        })
    }

    /// Whether datagram `number` leaves in time.
    pub(super) fn wait_for(&mut self, number: usize, patience: Duration) -> bool {
        let until = Instant::now() + patience;
        loop {
            self.take();
            if self.seen.contains(&number) {
                return true;
            }
            if Instant::now() >= until {
                return false;
            }
            std::thread::sleep(PAUSE);
        }
    }

    /// Looks for this long.
    pub(super) fn watch(&mut self, length: Duration) {
        std::thread::sleep(length);
        self.take();
    }

    /// All that left so far.
    pub(super) fn seen(self) -> impl Iterator<Item = usize> {
        self.seen.into_iter()
    }

    fn take(&mut self) {
        let mut buffer = [0; 256];
        while let Ok((length, from)) = recvfrom::<LinkAddr>(self.socket.as_raw_fd(), &mut buffer) {
            let Some(from) = from.filter(|from| from.pkttype() == libc::PACKET_OUTGOING) else {
                continue;
            };
            let index = u32::try_from(from.ifindex()).unwrap_or(0);
            let name = nix::net::if_::if_indextoname(index).unwrap_or_default();
            // Into the tunnel, or to this machine itself.
            if [CLIENT_INTERFACE, "lo"].map(str::as_bytes).contains(&name.to_bytes()) {
                continue;
            }
            self.seen
                .extend(number_in(buffer.get(..length).unwrap_or_default(), self.token));
        }
    }
}

/// Outgoing packets of the two lengths (Documentation/networking/filter.rst).
fn filter() -> Vec<SockFilter> {
    const LOAD_BYTE: u32 = libc::BPF_LD | libc::BPF_B | libc::BPF_ABS;
    const LOAD_LENGTH: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_LEN;
    const IF_EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    const RETURN: u32 = libc::BPF_RET | libc::BPF_K;
    // SKF_AD_OFF + SKF_AD_PKTTYPE
    const KIND: u32 = 0xffff_f000 + 4;
    let code = |code: u32| u16::try_from(code).unwrap_or_default();
    let [v4, v6] = HEADERS.map(|header| header + PAYLOAD_BYTES);
    vec![
        SockFilter::new(code(LOAD_BYTE), 0, 0, KIND),
        SockFilter::new(code(IF_EQUAL), 0, 4, u32::from(libc::PACKET_OUTGOING)),
        SockFilter::new(code(LOAD_LENGTH), 0, 0, 0),
        SockFilter::new(code(IF_EQUAL), 1, 0, v4),
        SockFilter::new(code(IF_EQUAL), 0, 1, v6),
        SockFilter::new(code(RETURN), 0, 0, 256),
        SockFilter::new(code(RETURN), 0, 0, 0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_packet_of_the_test_has_a_number() {
        let token = [7; TOKEN_BYTES];
        let mut packet = vec![0x45; 28];
        packet.extend(payload(token, 42));
        assert_eq!(packet.len(), 85);
        assert_eq!(number_in(&packet, token), Some(42));
        assert_eq!(number_in(&packet, [8; TOKEN_BYTES]), None);
        for length in 0..packet.len() {
            assert_eq!(number_in(&packet[..length], token), None, "{length}");
        }
    }
}
