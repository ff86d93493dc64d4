//! One netlink socket: a message goes out, its answers come back before the next.
//!
//! Buffers are wiped after use, as the kernel sends the private key back with every dump and, with an error, the
//! message it is about. That is why this is no stream of parsed messages: whatever parses, logs or queues them keeps
//! copies.

use std::io;

use netlink_packet_core::{NLM_F_DUMP_INTR, NetlinkBuffer};
use netlink_sys::SocketAddr;
use zeroize::Zeroizing;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// The kernel fills at most 32 KiB of a dump at once (`netlink_dump` in `net/netlink/af_netlink.c`).
const ROOM_BYTES: usize = 1 << 16;
/// Where the sequence number stands in a message (`struct nlmsghdr`).
const SEQUENCE: std::ops::Range<usize> = 8..12;

/// A socket of one netlink protocol, in the network namespace of the thread that opened it.
pub(super) struct Socket {
    socket: netlink_sys::Socket,
    sequence: u32,
}

impl Socket {
    /// Opens one (`netlink_sys::protocols`).
    pub(super) fn open(protocol: isize) -> io::Result<Self> {
        let mut socket = netlink_sys::Socket::new(protocol)?;
        socket.bind(&SocketAddr::new(0, 0))?;
        // The kernel carries a message out and queues its answers before `send` returns, and the next part of a dump
        // before `recv` returns: reading never has to wait.
        socket.set_non_blocking(true)?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Sends a whole message that asks for an acknowledgement or a dump, and gives what it is answered (without
    /// netlink headers) to `answer`. Returns false if a dump was overtaken by a change and has to be repeated.
    pub(super) fn request(
        &mut self,
        message: &mut [u8],
        mut answer: impl FnMut(&[u8]) -> io::Result<()>,
    ) -> io::Result<bool> {
        self.sequence = self.sequence.wrapping_add(1);
        message
            .get_mut(SEQUENCE)
            .ok_or(io::ErrorKind::InvalidInput)?
            .copy_from_slice(&self.sequence.to_ne_bytes());
        self.socket.send(message, 0)?;
        let mut room = Zeroizing::new(vec![0_u8; ROOM_BYTES]);
        let mut whole = true;
        loop {
            let length = self.socket.recv(&mut room.as_mut_slice(), 0)?;
            let mut rest = room.get(..length).unwrap_or_default();
            while !rest.is_empty() {
                let part = NetlinkBuffer::new_checked(rest).map_err(io::Error::other)?;
                let (kind, flags, payload) = (part.message_type(), part.flags(), part.payload());
                // What an earlier request left unread, because it failed half-way, is passed over.
                if part.sequence_number() == self.sequence {
                    whole &= flags & NLM_F_DUMP_INTR == 0;
                    match (kind, code(payload)) {
                        (NLMSG_ERROR, None) => return Err(io::ErrorKind::InvalidData.into()),
                        (NLMSG_ERROR | NLMSG_DONE, Some(error)) if error < 0 => {
                            return Err(io::Error::from_raw_os_error(-error));
                        }
                        (NLMSG_ERROR | NLMSG_DONE, _) => return Ok(whole),
                        _ => answer(payload)?,
                    }
                }
                let next = usize::try_from(part.length()).unwrap_or(rest.len()).next_multiple_of(4);
                rest = rest.get(next..).unwrap_or_default();
            }
        }
    }
}

fn code(payload: &[u8]) -> Option<i32> {
    payload.first_chunk::<4>().map(|code| i32::from_ne_bytes(*code))
}
