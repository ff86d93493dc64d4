//! nftables over netlink: transactions, counters and rule comments. No C library and no nft program.

pub(crate) mod batch;
pub(crate) mod expr;
pub(crate) mod read;

use std::io;

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};

use batch::Batch;

const HEADER_BYTES: usize = 16;
const NETFILTER_HEADER_BYTES: usize = 4;
/// `NFNL_SUBSYS_NFTABLES`
const SUBSYSTEM: u16 = 10;
/// `NFT_MSG_DELTABLE`, `NFT_MSG_DELCHAIN`, `NFT_MSG_DELRULE`
const GONE: [u16; 3] = [2, 5, 8];
/// `NFTA_TABLE_NAME`, `NFTA_CHAIN_TABLE`, `NFTA_RULE_TABLE`
const NAME_OF_TABLE: u16 = 1;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;

/// One message of an answer, as far as this module reads it.
pub(super) struct Answer<'a> {
    kind: u16,
    sequence: u32,
    /// After the netlink header.
    payload: &'a [u8],
}

fn answers(mut bytes: &[u8]) -> Vec<Answer<'_>> {
    let mut found = Vec::new();
    while let Some((header, _)) = bytes.split_first_chunk::<HEADER_BYTES>() {
        let [l0, l1, l2, l3, k0, k1, _, _, s0, s1, s2, s3, ..] = *header;
        let length = usize::try_from(u32::from_ne_bytes([l0, l1, l2, l3])).unwrap_or(0);
        let Some(payload) = bytes.get(HEADER_BYTES..length) else {
            break;
        };
        found.push(Answer {
            kind: u16::from_ne_bytes([k0, k1]),
            sequence: u32::from_ne_bytes([s0, s1, s2, s3]),
            payload,
        });
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    found
}

fn error_code(payload: &[u8]) -> Option<i32> {
    payload.first_chunk::<4>().map(|code| i32::from_ne_bytes(*code))
}

fn open() -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind(&SocketAddr::new(0, 0))?;
    // Each refusal would bring the refused message back.
    socket.set_cap_ack(true)?;
    // Answers are queued before `send` returns, so reading never has to wait.
    socket.set_non_blocking(true)?;
    Ok(socket)
}

/// Who makes changes. With a socket of its own it can own a table: then nobody else can change it while this process lives,
/// and it stays when that ends (`NFT_TABLE_F_OWNER`, `NFT_TABLE_F_PERSIST`: Linux 6.9).
pub(crate) struct Committer {
    socket: Socket,
    /// What the kernel can do; nothing while that is not known.
    owns: Option<bool>,
}

impl Committer {
    /// Opens its socket.
    pub(crate) fn open() -> io::Result<Self> {
        Ok(Self {
            socket: open()?,
            owns: None,
        })
    }

    /// Applies the whole transaction that `make` makes, or nothing: for a table that is owned, or where the kernel does
    /// not know that, for one that is not. Says how many rules it made.
    pub(crate) fn commit(&mut self, make: impl Fn(bool) -> Batch) -> io::Result<usize> {
        let owned = self.owns.unwrap_or(true);
        match self.try_commit(owned, &make) {
            Err(error) if self.owns.is_none() && is_unknown(&error) => self.try_commit(false, &make),
            done => done,
        }
    }

    fn try_commit(&mut self, owned: bool, make: impl Fn(bool) -> Batch) -> io::Result<usize> {
        let batch = make(owned);
        let rules = batch.rules();
        commit_by(&self.socket, batch)?;
        self.owns = Some(owned);
        Ok(rules)
    }

    /// Removes a table; false if there was none.
    pub(crate) fn delete_table(&self, table: &str) -> io::Result<bool> {
        delete_by(&self.socket, table)
    }
}

/// What kernels say to a flag or a message that they do not know.
fn is_unknown(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EINVAL))
}

/// Applies the whole transaction or nothing.
pub(crate) fn commit(batch: Batch) -> io::Result<()> {
    commit_by(&open()?, batch)
}

fn commit_by(socket: &Socket, batch: Batch) -> io::Result<()> {
    let (bytes, last) = batch.encode();
    socket.send(&bytes, 0)?;
    let (mut applied, mut failed) = (false, None);
    // To the last answer, also after an error: what is left would be taken for the next transaction's.
    loop {
        let answer = match socket.recv_from_full() {
            Ok((answer, _)) => answer,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            // More answers than the socket holds: some are lost, the last among them or not.
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                failed.get_or_insert(error);
                continue;
            }
            Err(error) => return Err(error),
        };
        for message in answers(&answer) {
            if message.kind != NLMSG_ERROR {
                continue;
            }
            match error_code(message.payload) {
                Some(0) => applied |= message.sequence == last,
                Some(code) => {
                    failed.get_or_insert(io::Error::from_raw_os_error(-code));
                }
                None => {
                    failed.get_or_insert(io::ErrorKind::InvalidData.into());
                }
            }
        }
    }
    match failed {
        Some(error) => Err(error),
        None if applied => Ok(()),
        None => Err(io::Error::other("the kernel did not acknowledge the transaction")),
    }
}

/// Whether one of these messages says that the table, or something in it, is gone.
pub(crate) fn takes_away(events: &[u8], table: &str) -> bool {
    answers(events).iter().any(|event| {
        let attributes = event.payload.get(NETFILTER_HEADER_BYTES..).unwrap_or_default();
        GONE.map(|message| (SUBSYSTEM << 8) | message).contains(&event.kind)
            && read::text(attributes, NAME_OF_TABLE).as_deref() == Some(table)
    })
}

/// Removes a table; false if there was none.
pub(crate) fn delete_table(table: &str) -> io::Result<bool> {
    delete_by(&open()?, table)
}

fn delete_by(socket: &Socket, table: &str) -> io::Result<bool> {
    let mut batch = Batch::new(table);
    batch.delete_table();
    match commit_by(socket, batch) {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}
