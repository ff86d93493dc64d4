//! One nftables rule, written as its meaning. Each method appends the expressions nft(8) would make of the same words.
//!
//! Numbers are those of `include/uapi/linux/netfilter/nf_tables.h`; values in registers are in network order, except
//! marks, interface indexes and connection tracking bits, which are in host order.

mod marks;

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use netlink_packet_core::{DefaultNla, Emitable as _, NLA_F_NESTED};
use netlink_packet_netfilter::nftables::{
    Bitwise, Cmp, DataAttribute, Expressions, Immediate, Meta, MetaKey, Operator, Payload, Register, Verdict,
    VerdictAttribute,
};

use super::batch::AddressSet;

const NFPROTO_IPV4: u8 = 2;
const NFPROTO_IPV6: u8 = 10;
const PAYLOAD_NETWORK: u32 = 1;
const PAYLOAD_TRANSPORT: u32 = 2;
const NF_DROP: u32 = 0;
const NF_ACCEPT: u32 = 1;
const CT_STATE: u32 = 0;
const CT_STATUS: u32 = 2;
const CT_ZONE: u32 = 17;
const CT_ORIGINAL: u8 = 0;
/// `NF_CT_STATE_INVALID_BIT`
const INVALID: u32 = 1;
/// `IPS_CONFIRMED`: a packet of this connection was let through before.
const CONFIRMED: u32 = 1 << 3;
const DYNSET_ADD: u32 = 0;
const DYNSET_UPDATE: u32 = 1;
const LIMIT_PACKETS: u32 = 0;
/// Matches above the limit and not below it (`NFT_LIMIT_F_INV`, `NFT_CONNLIMIT_F_INV`).
const ABOVE: u32 = 1;
/// `NF_CT_STATE_BIT(IP_CT_ESTABLISHED) | NF_CT_STATE_BIT(IP_CT_RELATED)`
const ESTABLISHED_OR_RELATED: u32 = 0b110;
const OBJECT_COUNTER: u32 = 1;
const NAT_RANDOM_FULLY: u32 = 1 << 4;
const REJECT_TCP_RST: u32 = 1;
const COMMENT: u8 = 0;

/// TCP's protocol number.
pub(crate) const TCP: u8 = 6;
/// UDP's protocol number.
pub(crate) const UDP: u8 = 17;
/// ICMP's protocol number.
pub(crate) const ICMP: u8 = 1;
/// `ICMPv6`'s protocol number.
pub(crate) const ICMPV6: u8 = 58;
/// ICMP type: echo request.
pub(crate) const ECHO_REQUEST: u8 = 8;
/// `ICMPv6` type: echo request.
pub(crate) const ECHO_REQUEST_V6: u8 = 128;

/// The family of an address, as rules distinguish it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both.
    pub(crate) const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// The family of a prefix.
    pub(crate) fn of(network: &IpNetwork) -> Self {
        if network.is_ipv4() { Self::V4 } else { Self::V6 }
    }
}

#[derive(Clone, Copy)]
enum Side {
    Source,
    Destination,
}

/// A rule under construction.
#[derive(Debug, Clone, Default)]
pub(crate) struct Rule {
    pub(super) expressions: Vec<Expressions>,
    pub(super) comment: Option<Vec<u8>>,
}

impl Rule {
    /// A rule that matches everything and does nothing.
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Only packets that came in by this interface.
    pub(crate) fn input_is(self, interface: &str) -> Self {
        self.interface(MetaKey::Iifname, Operator::Equal, interface)
    }
    /// Only packets that came in by another interface.
    pub(crate) fn input_is_not(self, interface: &str) -> Self {
        self.interface(MetaKey::Iifname, Operator::NotEqual, interface)
    }
    /// Only packets that leave by this interface.
    pub(crate) fn output_is(self, interface: &str) -> Self {
        self.interface(MetaKey::Oifname, Operator::Equal, interface)
    }
    /// Only packets that leave by another interface.
    pub(crate) fn output_is_not(self, interface: &str) -> Self {
        self.interface(MetaKey::Oifname, Operator::NotEqual, interface)
    }
    /// Only packets of this family.
    pub(crate) fn family(self, family: Family) -> Self {
        let number = match family {
            Family::V4 => NFPROTO_IPV4,
            Family::V6 => NFPROTO_IPV6,
        };
        self.meta(MetaKey::Nfproto).compare(Operator::Equal, vec![number])
    }
    /// Only packets from this prefix (and of its family).
    pub(crate) fn from(self, network: &IpNetwork) -> Self {
        self.family(Family::of(network)).address(Side::Source, network)
    }
    /// Only packets to this prefix (and of its family).
    pub(crate) fn to(self, network: &IpNetwork) -> Self {
        self.family(Family::of(network)).address(Side::Destination, network)
    }
    /// As [`Rule::to`], in a chain that sees only packets of the prefix's family.
    pub(crate) fn destination_in_family(self, network: &IpNetwork) -> Self {
        self.address(Side::Destination, network)
    }
    /// Only packets of this transport protocol.
    pub(crate) fn protocol(self, number: u8) -> Self {
        self.meta(MetaKey::L4Proto).compare(Operator::Equal, vec![number])
    }
    /// Only packets of a transport protocol that is in the set at this moment; see [`super::batch::Batch::lease`].
    pub(crate) fn while_leased(self, set: &str) -> Self {
        let mut rule = self.meta(MetaKey::L4Proto);
        let attributes = vec![DefaultNla::new(1, nul_terminated(set)), be32(2, Register::Reg1.into())];
        rule.expressions.push(other("lookup", attributes));
        rule
    }
    /// Only packets of this protocol to this port.
    pub(crate) fn port(self, protocol: u8, port: u16) -> Self {
        self.protocol(protocol)
            .load(PAYLOAD_TRANSPORT, 2, 2)
            .compare(Operator::Equal, port.to_be_bytes().to_vec())
    }
    /// Only ICMP (or `ICMPv6`) packets of this type.
    pub(crate) fn icmp(self, protocol: u8, kind: u8) -> Self {
        self.protocol(protocol)
            .load(PAYLOAD_TRANSPORT, 0, 1)
            .compare(Operator::Equal, vec![kind])
    }
    /// Only packets of a connection that was let through before, or that report about one.
    pub(crate) fn established(self) -> Self {
        self.connection(CT_STATE)
            .mask(&ESTABLISHED_OR_RELATED.to_ne_bytes())
            .compare(Operator::NotEqual, vec![0; 4])
    }
    /// Only packets that connection tracking can make nothing of: they would leave untranslated.
    pub(crate) fn invalid(self) -> Self {
        self.connection(CT_STATE)
            .mask(&INVALID.to_ne_bytes())
            .compare(Operator::NotEqual, vec![0; 4])
    }
    /// Only the first packet of a connection. A "new" connection is one until it is answered, this only until it is
    /// let through.
    pub(crate) fn first_of_connection(self) -> Self {
        self.connection(CT_STATUS)
            .mask(&CONFIRMED.to_ne_bytes())
            .compare(Operator::Equal, vec![0; 4])
    }
    /// Keeps the connections that begin here apart from all others, in this zone. Only their own direction: answers
    /// come to an address of this machine, where they are told apart by their ports.
    pub(crate) fn zone(mut self, zone: u16) -> Self {
        self.expressions.push(Expressions::Immediate(vec![
            Immediate::DestinationRegister(Register::Reg1),
            Immediate::Data(DataAttribute::Value(zone.to_ne_bytes().to_vec())),
        ]));
        let attributes = vec![
            be32(2, CT_ZONE),
            DefaultNla::new(3, vec![CT_ORIGINAL]),
            be32(4, Register::Reg1.into()),
        ];
        self.expressions.push(other("ct", attributes));
        self
    }
    /// Only when the packet's source has begun more connections a second than this, for each source by itself.
    pub(crate) fn source_faster_than(self, set: &AddressSet, per_second: u64, burst: u32) -> Self {
        let limit = [
            DefaultNla::new(1, per_second.to_be_bytes().to_vec()),
            DefaultNla::new(2, 1_u64.to_be_bytes().to_vec()),
            be32(3, burst),
            be32(4, LIMIT_PACKETS),
            be32(5, ABOVE),
        ];
        self.each(Side::Source, set, DYNSET_UPDATE, "limit", &limit)
    }
    /// Only when the packet's source has more open connections than this.
    pub(crate) fn source_with_more_than(self, set: &AddressSet, connections: u32) -> Self {
        let limit = [be32(1, connections), be32(2, ABOVE)];
        self.each(Side::Source, set, DYNSET_ADD, "connlimit", &limit)
    }
    /// Counts packets and bytes of each source.
    pub(crate) fn count_source(self, set: &AddressSet) -> Self {
        self.each(Side::Source, set, DYNSET_UPDATE, "counter", &COUNT_FROM_ZERO.map(zero))
    }
    /// Counts packets and bytes of each destination.
    pub(crate) fn count_destination(self, set: &AddressSet) -> Self {
        self.each(
            Side::Destination,
            set,
            DYNSET_UPDATE,
            "counter",
            &COUNT_FROM_ZERO.map(zero),
        )
    }

    /// Counts the packet on the table's counter of that name.
    pub(crate) fn count(mut self, counter: &str) -> Self {
        let name = DefaultNla::new(2, nul_terminated(counter));
        self.expressions
            .push(other("objref", vec![be32(1, OBJECT_COUNTER), name]));
        self
    }
    /// Lets it through this chain.
    pub(crate) fn accept(self) -> Self {
        self.verdict(vec![VerdictAttribute::Code(Verdict::Other(NF_ACCEPT))])
    }
    /// Discards it.
    pub(crate) fn drop(self) -> Self {
        self.verdict(vec![VerdictAttribute::Code(Verdict::Other(NF_DROP))])
    }
    /// Discards it and resets its TCP connection.
    pub(crate) fn reset(mut self) -> Self {
        self.expressions.push(other("reject", vec![be32(1, REJECT_TCP_RST)]));
        self
    }
    /// Goes through another chain and comes back.
    pub(crate) fn jump(self, chain: &str) -> Self {
        self.verdict(vec![
            VerdictAttribute::Code(Verdict::Jump),
            VerdictAttribute::Chain(chain.to_owned()),
        ])
    }
    /// Goes on in another chain and does not come back.
    pub(crate) fn goto(self, chain: &str) -> Self {
        self.verdict(vec![
            VerdictAttribute::Code(Verdict::Goto),
            VerdictAttribute::Chain(chain.to_owned()),
        ])
    }
    /// Leaves the chain.
    pub(crate) fn done(self) -> Self {
        self.verdict(vec![VerdictAttribute::Code(Verdict::Return)])
    }
    /// Replaces the source by the outgoing interface's address, at a port that nobody can guess.
    pub(crate) fn masquerade(mut self) -> Self {
        self.expressions.push(other("masq", vec![be32(1, NAT_RANDOM_FULLY)]));
        self
    }
    /// A comment, shown by nft(8); at most 127 bytes are kept.
    pub(crate) fn comment(mut self, text: &str) -> Self {
        let mut value = text.as_bytes().to_vec();
        value.truncate(127);
        value.push(0);
        let length = u8::try_from(value.len()).unwrap_or(u8::MAX);
        self.comment = Some([vec![COMMENT, length], value].concat());
        self
    }

    fn interface(self, key: MetaKey, operator: Operator, name: &str) -> Self {
        let mut value = name.as_bytes().to_vec();
        value.resize(libc::IFNAMSIZ, 0);
        self.meta(key).compare(operator, value)
    }

    fn address(self, side: Side, network: &IpNetwork) -> Self {
        let (address, mask) = (bytes(network.network()), bytes(network.mask()));
        let loaded = self.load_address(side, Family::of(network));
        let masked = if mask.iter().all(|byte| *byte == 0xff) {
            loaded
        } else {
            loaded.mask(&mask)
        };
        masked.compare(Operator::Equal, address)
    }

    fn load_address(self, side: Side, family: Family) -> Self {
        let (offset, length) = match (family, side) {
            (Family::V4, Side::Source) => (12, 4),
            (Family::V4, Side::Destination) => (16, 4),
            (Family::V6, Side::Source) => (8, 16),
            (Family::V6, Side::Destination) => (24, 16),
        };
        self.load(PAYLOAD_NETWORK, offset, length)
    }

    /// Runs an expression with the state that the packet's address has in the set.
    fn each(self, side: Side, set: &AddressSet, operation: u32, name: &str, state: &[DefaultNla]) -> Self {
        let mut rule = self.family(set.family).load_address(side, set.family);
        let expression = [DefaultNla::new(1, nul_terminated(name)), nested(2, state)];
        let attributes = vec![
            DefaultNla::new(1, nul_terminated(set.name)),
            be32(3, operation),
            be32(4, Register::Reg1.into()),
            nested(7, &expression),
        ];
        rule.expressions.push(other("dynset", attributes));
        rule
    }

    fn connection(mut self, key: u32) -> Self {
        let attributes = vec![be32(1, Register::Reg1.into()), be32(2, key)];
        self.expressions.push(other("ct", attributes));
        self
    }

    fn meta(mut self, key: MetaKey) -> Self {
        self.expressions.push(Expressions::Meta(vec![
            Meta::DestinationRegister(Register::Reg1),
            Meta::Key(key),
        ]));
        self
    }

    fn load(mut self, base: u32, offset: u32, length: u32) -> Self {
        self.expressions.push(Expressions::Payload(vec![
            Payload::DestinationRegister(Register::Reg1),
            Payload::Base(base),
            Payload::Offset(offset),
            Payload::Len(length),
        ]));
        self
    }

    fn mask(mut self, mask: &[u8]) -> Self {
        self.expressions.push(Expressions::Bitwise(vec![
            Bitwise::SourceRegister(Register::Reg1),
            Bitwise::DestinationRegister(Register::Reg1),
            Bitwise::Length(u32::try_from(mask.len()).unwrap_or(16)),
            Bitwise::Mask(DataAttribute::Value(mask.to_vec())),
            Bitwise::Xor(DataAttribute::Value(vec![0; mask.len()])),
        ]));
        self
    }

    fn compare(mut self, operator: Operator, value: Vec<u8>) -> Self {
        self.expressions.push(Expressions::Cmp(vec![
            Cmp::SourceRegister(Register::Reg1),
            Cmp::Op(operator),
            Cmp::Data(DataAttribute::Value(value)),
        ]));
        self
    }

    fn verdict(mut self, attributes: Vec<VerdictAttribute>) -> Self {
        self.expressions.push(Expressions::Immediate(vec![
            Immediate::DestinationRegister(Register::Verdict),
            Immediate::Data(DataAttribute::Verdict(attributes)),
        ]));
        self
    }
}

fn bytes(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

fn other(name: &str, attributes: Vec<DefaultNla>) -> Expressions {
    Expressions::Other {
        expression_type: name.to_owned(),
        attributes,
    }
}

/// Attributes of a counter: bytes and packets.
const COUNT_FROM_ZERO: [u16; 2] = [1, 2];

fn zero(kind: u16) -> DefaultNla {
    DefaultNla::new(kind, vec![0; 8])
}

pub(super) fn nested(kind: u16, attributes: &[DefaultNla]) -> DefaultNla {
    let mut value = vec![0; attributes.buffer_len()];
    attributes.emit(&mut value);
    DefaultNla::new(kind | NLA_F_NESTED, value)
}

pub(super) fn be32(kind: u16, value: u32) -> DefaultNla {
    DefaultNla::new(kind, value.to_be_bytes().to_vec())
}

pub(super) fn nul_terminated(text: &str) -> Vec<u8> {
    [text.as_bytes(), &[0]].concat()
}
