//! Marks of packets and connections, directions, and what rules ask of TCP.
//!
//! A mark of ours is the bits of [`FWMARK_MASK`]; the others belong to whoever set them and stay.

use netlink_packet_core::DefaultNla;
use netlink_packet_netfilter::nftables::{Bitwise, DataAttribute, Expressions, Meta, MetaKey, Operator, Register};

use super::{CT_ORIGINAL, CT_STATE, PAYLOAD_TRANSPORT, Rule, TCP, be32, other};
use crate::tunnel::{FWMARK, FWMARK_MASK};

const CT_DIRECTION: u32 = 1;
const CT_MARK: u32 = 3;
/// `NF_CT_STATE_BIT(IP_CT_NEW)`
const NEW: u32 = 1 << 3;
/// `IP_CT_DIR_REPLY`
const CT_REPLY: u8 = 1;
const TCP_FLAGS_OFFSET: u32 = 13;
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const ACK: u8 = 0x10;
/// `NFTA_FIB_F_DADDR`
const FIB_DESTINATION: u32 = 1 << 1;
/// `NFT_FIB_RESULT_ADDRTYPE`
const FIB_KIND: u32 = 3;
/// `RTN_LOCAL` (include/uapi/linux/rtnetlink.h)
const LOCAL: u32 = 2;
/// `NFT_RT_TCPMSS`
const RT_TCPMSS: u32 = 3;
/// `NFT_BYTEORDER_HTON`
const HTON: u32 = 1;
/// `NFT_EXTHDR_OP_TCPOPT`
const EXTHDR_TCPOPT: u32 = 1;
/// TCP option: maximum segment size (RFC 9293, section 3.2).
const TCP_MAXSEG: u8 = 2;

impl Rule {
    /// Only packets with our mark.
    pub(crate) fn marked(self) -> Self {
        self.meta(MetaKey::Mark).only_our_mark()
    }
    /// Only packets of a connection with our mark.
    pub(crate) fn connection_marked(self) -> Self {
        self.connection(CT_MARK).only_our_mark()
    }
    /// Puts our mark on the packet.
    pub(crate) fn mark(self) -> Self {
        let mut rule = self.meta(MetaKey::Mark).with_our_mark();
        rule.expressions.push(Expressions::Meta(vec![
            Meta::SourceRegister(Register::Reg1),
            Meta::Key(MetaKey::Mark),
        ]));
        rule
    }
    /// Puts our mark on the connection.
    pub(crate) fn mark_connection(self) -> Self {
        let mut rule = self.connection(CT_MARK).with_our_mark();
        let attributes = vec![be32(2, CT_MARK), be32(4, Register::Reg1.into())];
        rule.expressions.push(other("ct", attributes));
        rule
    }
    /// Only packets in the direction of their connection's first.
    pub(crate) fn original(self) -> Self {
        self.connection(CT_DIRECTION)
            .compare(Operator::Equal, vec![CT_ORIGINAL])
    }
    /// Only answers.
    pub(crate) fn reply(self) -> Self {
        self.connection(CT_DIRECTION).compare(Operator::Equal, vec![CT_REPLY])
    }
    /// Only packets to an address of this machine.
    pub(crate) fn for_this_machine(mut self) -> Self {
        let attributes = vec![
            be32(1, Register::Reg1.into()),
            be32(2, FIB_KIND),
            be32(3, FIB_DESTINATION),
        ];
        self.expressions.push(other("fib", attributes));
        self.compare(Operator::Equal, LOCAL.to_ne_bytes().to_vec())
    }
    /// Only packets of this protocol from this port.
    pub(crate) fn source_port(self, protocol: u8, port: u16) -> Self {
        self.protocol(protocol)
            .load(PAYLOAD_TRANSPORT, 0, 2)
            .compare(Operator::Equal, port.to_be_bytes().to_vec())
    }
    /// Only TCP packets that belong to a connection which was begun.
    pub(crate) fn tcp_goes_on(self) -> Self {
        self.tcp_flags(SYN | RST | ACK, ACK)
    }
    /// Only TCP packets from this port in the middle of a connection whose beginning connection tracking did not see.
    pub(crate) fn found_under_way(self, port: u16) -> Self {
        self.source_port(TCP, port)
            .tcp_goes_on()
            .connection(CT_STATE)
            .mask(&NEW.to_ne_bytes())
            .compare(Operator::NotEqual, vec![0; 4])
    }
    /// Makes the two ends of a TCP connection that begins here agree on segments that the way carries.
    pub(crate) fn clamp_segments(self) -> Self {
        let register = || be32(1, Register::Reg1.into());
        let mut rule = self.protocol(TCP).tcp_flags(SYN | RST, SYN);
        rule.expressions.push(other("rt", vec![register(), be32(2, RT_TCPMSS)]));
        let swap = vec![
            register(),
            be32(2, Register::Reg1.into()),
            be32(3, HTON),
            be32(4, 2),
            be32(5, 2),
        ];
        rule.expressions.push(other("byteorder", swap));
        let write = vec![
            DefaultNla::new(2, vec![TCP_MAXSEG]),
            be32(3, 2),
            be32(4, 2),
            be32(6, EXTHDR_TCPOPT),
            be32(7, Register::Reg1.into()),
        ];
        rule.expressions.push(other("exthdr", write));
        rule
    }

    fn tcp_flags(self, mask: u8, value: u8) -> Self {
        self.load(PAYLOAD_TRANSPORT, TCP_FLAGS_OFFSET, 1)
            .mask(&[mask])
            .compare(Operator::Equal, vec![value])
    }

    fn only_our_mark(self) -> Self {
        self.mask(&FWMARK_MASK.to_ne_bytes())
            .compare(Operator::Equal, FWMARK.to_ne_bytes().to_vec())
    }

    /// The register's other bits stay.
    fn with_our_mark(mut self) -> Self {
        self.expressions.push(Expressions::Bitwise(vec![
            Bitwise::SourceRegister(Register::Reg1),
            Bitwise::DestinationRegister(Register::Reg1),
            Bitwise::Length(4),
            Bitwise::Mask(DataAttribute::Value((!FWMARK_MASK).to_ne_bytes().to_vec())),
            Bitwise::Xor(DataAttribute::Value(FWMARK.to_ne_bytes().to_vec())),
        ]));
        self
    }
}
