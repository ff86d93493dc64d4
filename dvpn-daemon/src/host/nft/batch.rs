//! A transaction: the kernel applies all of it or nothing (`nfnetlink_rcv_batch`).

use std::time::Duration;

use netlink_packet_core::{
    DefaultNla, Emitable as _, NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_REQUEST, NetlinkMessage,
};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
    nftables::{
        ChainAttribute, ChainMessage, Hook, InetHookNumber, NfTablesMessage, RuleAttribute, RuleMessage, SetAttribute,
        SetMessage, TableAttribute, TableFlags, TableMessage,
    },
    none::ControlMessage,
};

use super::expr::{Family, Rule, be32, nested, nul_terminated};

const NFNL_SUBSYS_NFTABLES: u16 = 10;
/// Since Linux 6.3.
const NFT_MSG_DESTROYTABLE: u8 = 26;
const NFTA_TABLE_NAME: u16 = 1;
const NFTA_OBJ_TABLE: u16 = 1;
const NFTA_OBJ_NAME: u16 = 2;
const NFTA_OBJ_TYPE: u16 = 3;
const NFTA_OBJ_DATA: u16 = 4;
const NLA_F_NESTED: u16 = 1 << 15;
const OBJECT_COUNTER: u32 = 1;
const NFTA_SET_TABLE: u16 = 1;
const NFTA_SET_NAME: u16 = 2;
const NFTA_SET_FLAGS: u16 = 3;
const NFTA_SET_KEY_TYPE: u16 = 4;
const NFTA_SET_KEY_LEN: u16 = 5;
const NFTA_SET_DESC: u16 = 9;
const NFTA_SET_ID: u16 = 10;
const NFTA_SET_TIMEOUT: u16 = 11;
const NFTA_SET_DESC_SIZE: u16 = 1;
const SET_TIMEOUT: u32 = 0x10;
/// Rules may add elements (`NFT_SET_EVAL`).
const SET_DYNAMIC: u32 = 0x20;
const NFT_MSG_NEWSETELEM: u8 = 12;
const NFT_MSG_DELSETELEM: u8 = 14;
const NFTA_SET_ELEM_LIST_TABLE: u16 = 1;
const NFTA_SET_ELEM_LIST_SET: u16 = 2;
const NFTA_SET_ELEM_LIST_ELEMENTS: u16 = 3;
const NFTA_LIST_ELEM: u16 = 1;
const NFTA_SET_ELEM_KEY: u16 = 1;
const NFTA_SET_ELEM_TIMEOUT: u16 = 4;
const NFTA_DATA_VALUE: u16 = 1;
/// nft(8)'s number for `inet_proto`; the kernel only hands it back.
const TYPE_PROTOCOL: u32 = 12;
const NF_ACCEPT: u32 = 1;

/// Where a base chain is attached.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Attach {
    /// Which hook.
    pub(crate) hook: InetHookNumber,
    /// Its place among the chains of that hook: lower runs earlier.
    pub(crate) priority: i32,
    /// `filter`, `route` or `nat`.
    pub(crate) kind: &'static str,
}

impl Attach {
    /// A filter chain.
    pub(crate) const fn filter(hook: InetHookNumber, priority: i32) -> Self {
        Self {
            hook,
            priority,
            kind: "filter",
        }
    }
    /// A filter chain that may change where locally made packets go: the kernel looks for their route again.
    pub(crate) const fn route(priority: i32) -> Self {
        Self {
            hook: InetHookNumber::LocalOut,
            priority,
            kind: "route",
        }
    }
    /// A chain for address translation.
    pub(crate) const fn nat(hook: InetHookNumber, priority: i32) -> Self {
        Self {
            hook,
            priority,
            kind: "nat",
        }
    }
}

/// Operations on one table of family inet.
pub(crate) struct Batch {
    table: String,
    operations: Vec<(u16, NfTablesMessage)>,
    sets: u32,
    flags: TableFlags,
}

/// A set of addresses that rules fill, each address with a state of its own: a limit, a count, a counter.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AddressSet {
    /// Its name.
    pub(crate) name: &'static str,
    /// Whose addresses.
    pub(crate) family: Family,
    /// An address that was not seen for this long is forgotten; nothing leaves that to the state itself.
    pub(crate) forget_after: Option<Duration>,
    /// Most addresses; rules do not match for further ones.
    pub(crate) size: u32,
}

impl Batch {
    /// An empty transaction on that table.
    pub(crate) fn new(table: &str) -> Self {
        Self {
            table: table.to_owned(),
            operations: Vec::new(),
            sets: 0,
            flags: TableFlags::empty(),
        }
    }

    /// An empty transaction on a table that whoever commits it owns.
    pub(crate) fn owning(table: &str) -> Self {
        Self {
            flags: TableFlags::Owner | TableFlags::Persisent,
            ..Self::new(table)
        }
    }

    /// Makes the table, if it is not there.
    pub(crate) fn make_table(&mut self) {
        self.push(NLM_F_CREATE, NfTablesMessage::NewTable(self.table_message()));
    }

    /// Removes the table with all it holds. It must be there.
    pub(crate) fn delete_table(&mut self) {
        self.push(0, NfTablesMessage::DeleteTable(self.table_message()));
    }

    /// An empty table, whatever was there before.
    pub(crate) fn replace_table(&mut self) {
        if self.flags.is_empty() {
            self.make_table();
            self.delete_table();
        } else {
            // Somebody else's cannot be made again, and one that is not there cannot be deleted.
            self.push(
                0,
                NfTablesMessage::Other {
                    message_type: NFT_MSG_DESTROYTABLE,
                    attributes: vec![DefaultNla::new(NFTA_TABLE_NAME, nul_terminated(&self.table))],
                },
            );
        }
        self.make_table();
    }

    /// Makes a chain, if it is not there. A base chain accepts what its rules leave undecided.
    pub(crate) fn chain(&mut self, name: &str, attach: Option<Attach>) {
        let mut attributes = vec![
            ChainAttribute::Table(self.table.clone()),
            ChainAttribute::Name(name.to_owned()),
        ];
        if let Some(attach) = attach {
            let priority = u32::from_ne_bytes(attach.priority.to_ne_bytes());
            attributes.extend([
                ChainAttribute::Hook(vec![Hook::Number(attach.hook.into()), Hook::Priority(priority)]),
                ChainAttribute::Policy(NF_ACCEPT),
                ChainAttribute::Type(attach.kind.to_owned()),
            ]);
        }
        self.push(NLM_F_CREATE, NfTablesMessage::NewChain(ChainMessage { attributes }));
    }

    /// Empties a chain.
    pub(crate) fn flush_chain(&mut self, name: &str) {
        let attributes = vec![
            RuleAttribute::Table(self.table.clone()),
            RuleAttribute::Chain(name.to_owned()),
        ];
        self.push(0, NfTablesMessage::DeleteRule(RuleMessage { attributes }));
    }

    /// Makes a named counter that starts at zero.
    pub(crate) fn counter(&mut self, name: &str) {
        self.push(
            NLM_F_CREATE,
            NfTablesMessage::NewObject(vec![
                DefaultNla::new(NFTA_OBJ_TABLE, nul_terminated(&self.table)),
                DefaultNla::new(NFTA_OBJ_NAME, nul_terminated(name)),
                be32(NFTA_OBJ_TYPE, OBJECT_COUNTER),
                DefaultNla::new(NFTA_OBJ_DATA | NLA_F_NESTED, Vec::new()),
            ]),
        );
    }

    /// Makes an empty set.
    pub(crate) fn set(&mut self, set: &AddressSet) {
        self.sets += 1;
        // The types are nft(8)'s numbers for ipv4_addr and ipv6_addr; the kernel only hands them back.
        let (kind, bytes) = match set.family {
            Family::V4 => (7, 4),
            Family::V6 => (8, 16),
        };
        let timeout = set
            .forget_after
            .map(|after| u64::try_from(after.as_millis()).unwrap_or(u64::MAX));
        let flags = SET_DYNAMIC | if timeout.is_some() { SET_TIMEOUT } else { 0 };
        let mut attributes = vec![
            DefaultNla::new(NFTA_SET_TABLE, nul_terminated(&self.table)),
            DefaultNla::new(NFTA_SET_NAME, nul_terminated(set.name)),
            be32(NFTA_SET_FLAGS, flags),
            be32(NFTA_SET_KEY_TYPE, kind),
            be32(NFTA_SET_KEY_LEN, bytes),
            be32(NFTA_SET_ID, self.sets),
            nested(NFTA_SET_DESC, &[be32(NFTA_SET_DESC_SIZE, set.size)]),
        ];
        attributes.extend(timeout.map(|ms| DefaultNla::new(NFTA_SET_TIMEOUT, ms.to_be_bytes().to_vec())));
        let attributes = attributes.into_iter().map(SetAttribute::Other).collect();
        self.push(NLM_F_CREATE, NfTablesMessage::NewSet(SetMessage { attributes }));
    }

    /// Makes a set of transport protocols that holds `protocol` for as long as `left`, and nothing otherwise. It is the
    /// kernel that takes it out, whatever becomes of this process.
    pub(crate) fn lease(&mut self, name: &str, protocol: u8, left: Option<Duration>) {
        self.sets += 1;
        let whole = [
            DefaultNla::new(NFTA_SET_TABLE, nul_terminated(&self.table)),
            DefaultNla::new(NFTA_SET_NAME, nul_terminated(name)),
            be32(NFTA_SET_FLAGS, SET_TIMEOUT),
            be32(NFTA_SET_KEY_TYPE, TYPE_PROTOCOL),
            be32(NFTA_SET_KEY_LEN, 1),
            be32(NFTA_SET_ID, self.sets),
        ];
        let attributes = whole.map(SetAttribute::Other).to_vec();
        self.push(NLM_F_CREATE, NfTablesMessage::NewSet(SetMessage { attributes }));
        let which = || {
            vec![
                DefaultNla::new(NFTA_SET_ELEM_LIST_TABLE, nul_terminated(&self.table)),
                DefaultNla::new(NFTA_SET_ELEM_LIST_SET, nul_terminated(name)),
            ]
        };
        let mut element = which();
        // Without elements it is all of them.
        let all = NfTablesMessage::Other {
            message_type: NFT_MSG_DELSETELEM,
            attributes: which(),
        };
        self.push(0, all);
        let left = left.and_then(|left| u64::try_from(left.as_millis()).ok());
        // Zero would stand for ever.
        let Some(left_ms) = left.filter(|left| *left > 0) else {
            return;
        };
        let key = nested(NFTA_SET_ELEM_KEY, &[DefaultNla::new(NFTA_DATA_VALUE, vec![protocol])]);
        let timeout = DefaultNla::new(NFTA_SET_ELEM_TIMEOUT, left_ms.to_be_bytes().to_vec());
        element.push(nested(
            NFTA_SET_ELEM_LIST_ELEMENTS,
            &[nested(NFTA_LIST_ELEM, &[key, timeout])],
        ));
        let add = NfTablesMessage::Other {
            message_type: NFT_MSG_NEWSETELEM,
            attributes: element,
        };
        self.push(NLM_F_CREATE, add);
    }

    /// How many rules it makes.
    pub(crate) fn rules(&self) -> usize {
        let made = |operation: &&(u16, NfTablesMessage)| matches!(operation.1, NfTablesMessage::NewRule(_));
        self.operations.iter().filter(made).count()
    }

    /// Appends a rule to a chain.
    pub(crate) fn rule(&mut self, chain: &str, rule: Rule) {
        let mut attributes = vec![
            RuleAttribute::Table(self.table.clone()),
            RuleAttribute::Chain(chain.to_owned()),
            RuleAttribute::Expressions(rule.expressions.into_iter().map(Into::into).collect()),
        ];
        attributes.extend(rule.comment.map(RuleAttribute::UserData));
        self.push(
            NLM_F_CREATE | NLM_F_APPEND,
            NfTablesMessage::NewRule(RuleMessage { attributes }),
        );
    }

    fn table_message(&self) -> TableMessage {
        TableMessage {
            attributes: vec![
                TableAttribute::Name(self.table.clone()),
                TableAttribute::Flags(self.flags),
            ],
        }
    }

    fn push(&mut self, flags: u16, operation: NfTablesMessage) {
        self.operations.push((flags, operation));
    }

    /// The bytes to send, and the sequence number whose acknowledgement means that all was applied. Only the last
    /// operation asks for one: errors come unasked, and hundreds of acknowledgements would overflow the socket.
    pub(super) fn encode(self) -> (Vec<u8>, u32) {
        let mut out = Vec::new();
        let last = u32::try_from(self.operations.len()).unwrap_or(u32::MAX);
        let control = |inner: ControlMessage| {
            let header = NetfilterHeader::new(NetfilterProtoFamily::Unspec, 0, NFNL_SUBSYS_NFTABLES);
            message(header, inner, 0, 0)
        };
        append(&mut out, &control(ControlMessage::BatchBegin));
        for (sequence, (flags, operation)) in (1_u32..).zip(self.operations) {
            let ack = if sequence == last { NLM_F_ACK } else { 0 };
            let header = NetfilterHeader::new(NetfilterProtoFamily::Inet, 0, 0);
            append(&mut out, &message(header, operation, flags | ack, sequence));
        }
        append(&mut out, &control(ControlMessage::BatchEnd));
        (out, last)
    }
}

fn message(
    header: NetfilterHeader,
    inner: impl Into<NetfilterMessageInner>,
    flags: u16,
    sequence: u32,
) -> NetlinkMessage<NetfilterMessage> {
    let mut message = NetlinkMessage::from(NetfilterMessage::new(header, inner));
    message.header.flags = NLM_F_REQUEST | flags;
    message.header.sequence_number = sequence;
    message.finalize();
    message
}

fn append(out: &mut Vec<u8>, message: &NetlinkMessage<NetfilterMessage>) {
    let start = out.len();
    out.resize(start + message.buffer_len(), 0);
    if let Some(room) = out.get_mut(start..) {
        message.emit(room);
    }
}
