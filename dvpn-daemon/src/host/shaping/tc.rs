//! Qdiscs and classes by rtnetlink: fq, and htb with a class for each peer (`linux/pkt_sched.h`).

use futures::StreamExt as _;
use netlink_packet_core::{DefaultNla, NLM_F_ACK, NLM_F_CREATE, NLM_F_ECHO, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST};
use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{TcAttribute, TcHandle, TcMessage};

use crate::host::{Error, Host};

/// Major number of our root qdiscs and their classes.
const MAJOR: u16 = 0x0d01;
/// The class of all peers together.
const NODE_CLASS: u16 = 1;
/// The class of whatever no program gave one: nothing leaves it.
const CLOSED_CLASS: u16 = 0xffff;
/// Minor numbers of the peers' classes begin here.
const FIRST_PEER: u16 = 0x10;
/// Requests that are sent before the first answer is read: their answers fit in a socket's buffer.
const AT_ONCE: usize = 100;

/// The least that a class is promised; the rest it borrows, so that together they get no more than the node's class.
const PROMISED_BYTES: u64 = 1000;
/// For a node without a limit: more than any line.
const UNLIMITED_BYTES: u64 = 125_000_000_000;

const TCA_OPTIONS: u16 = 2;

/// What one class may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ClassRate {
    /// Bytes a second.
    pub(super) bytes: u64,
    /// How much its queue holds, in bytes.
    pub(super) queue_bytes: u64,
    /// The largest packet, in bytes; larger buffers are cut into such.
    pub(super) packet_bytes: u32,
}

/// Which class a peer has.
pub(super) fn peer_class(peer: u32) -> TcHandle {
    // 4096 peers fit between the first and the closed class.
    let minor = u16::try_from(peer).unwrap_or(CLOSED_CLASS - FIRST_PEER);
    TcHandle {
        major: MAJOR,
        minor: FIRST_PEER + minor,
    }
}

fn root() -> TcHandle {
    handle(0)
}

fn handle(minor: u16) -> TcHandle {
    TcHandle { major: MAJOR, minor }
}

/// A request and what it is about.
pub(super) struct Request {
    message: RouteNetlinkMessage,
    flags: u16,
    what: String,
    or: Or,
}

/// What is as good as done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Or {
    /// Nothing else.
    Nothing,
    /// There is nothing to act on.
    Gone,
    /// It is there already.
    There,
}

impl Or {
    fn is_good(self, code: i32) -> bool {
        match self {
            Self::Nothing => false,
            // A class without its qdisc is EINVAL, and so is a qdisc whose handle is another's.
            Self::Gone => matches!(code, libc::ENOENT | libc::ESRCH | libc::ENODEV | libc::EINVAL),
            // A filter whose handle is taken finds no room for it.
            Self::There => matches!(code, libc::EEXIST | libc::ENOSPC),
        }
    }
}

fn message(index: u32, parent: TcHandle, handle: TcHandle, kind: Option<&str>, options: Option<Vec<u8>>) -> TcMessage {
    let mut message = TcMessage::default();
    message.header.index = index.cast_signed();
    message.header.parent = parent;
    message.header.handle = handle;
    message.attributes = kind
        .map(|kind| TcAttribute::Kind(kind.to_owned()))
        .into_iter()
        .collect();
    let options = options.map(|options| TcAttribute::Other(DefaultNla::new(TCA_OPTIONS, options)));
    message.attributes.extend(options);
    message
}

/// fq as the root, every option explicit: what is left out keeps the value that another program gave it.
pub(super) fn fq(index: u32) -> Request {
    const LIMIT: u16 = 1;
    const FLOW_LIMIT: u16 = 2;
    const QUANTUM: u16 = 3;
    const INITIAL_QUANTUM: u16 = 4;
    const PACING: u16 = 5;
    const FLOW_MAX_RATE: u16 = 7;
    const BUCKETS_LOG: u16 = 8;
    const REFILL_DELAY: u16 = 9;
    const ORPHAN_MASK: u16 = 10;
    const LOW_RATE_THRESHOLD: u16 = 11;
    const CE_THRESHOLD: u16 = 12;
    const TIMER_SLACK: u16 = 13;
    const HORIZON: u16 = 14;
    const HORIZON_DROP: u16 = 15;
    let mut options = Options::default();
    for (kind, value) in [
        // With 100 a flow of small packets lost half of a few megabits.
        (FLOW_LIMIT, 2000),
        (LIMIT, 20_000),
        (QUANTUM, 2 * 1514),
        (INITIAL_QUANTUM, 10 * 1514),
        (PACING, 1),
        (FLOW_MAX_RATE, u32::MAX),
        (BUCKETS_LOG, 10),
        (REFILL_DELAY, 40_000),
        (ORPHAN_MASK, 1023),
        (LOW_RATE_THRESHOLD, 550_000 / 8),
        (CE_THRESHOLD, u32::MAX),
        (TIMER_SLACK, 10_000),
        // Ours are at most some hundred milliseconds ahead.
        (HORIZON, 10_000_000),
    ] {
        options.attribute(kind, &value.to_ne_bytes());
    }
    options.attribute(HORIZON_DROP, &[1]);
    new_qdisc(index, TcHandle::ROOT, root(), "fq", Some(options.0))
}

/// htb as the root; what no program gave a class has [`CLOSED_CLASS`]. One that is there already is not changed by this:
/// the kernel refuses.
pub(super) fn htb(index: u32) -> Request {
    const INIT: u16 = 2;
    const VERSION: u32 = 3;
    let mut options = Options::default();
    let fields = [VERSION, 10, u32::from(CLOSED_CLASS), 0, 0];
    options.attribute(INIT, &fields.map(u32::to_ne_bytes).concat());
    new_qdisc(index, TcHandle::ROOT, root(), "htb", Some(options.0))
}

/// The closed class.
pub(super) fn closed_class(index: u32) -> Vec<Request> {
    let closed = ClassRate {
        bytes: PROMISED_BYTES,
        queue_bytes: 0,
        packet_bytes: 1600,
    };
    vec![
        new_class(index, root(), handle(CLOSED_CLASS), PROMISED_BYTES, closed),
        new_qdisc(index, handle(CLOSED_CLASS), TcHandle::UNSPEC, "blackhole", None),
    ]
}

/// The class of all together.
pub(super) fn node_class(index: u32, bytes: Option<u64>) -> Request {
    let bytes = bytes.unwrap_or(UNLIMITED_BYTES);
    let rate = ClassRate {
        bytes,
        queue_bytes: 0,
        packet_bytes: 1600,
    };
    new_class(index, root(), handle(NODE_CLASS), bytes, rate)
}

/// A peer's class and its queue.
pub(super) fn peer(index: u32, class: TcHandle, rate: ClassRate) -> Vec<Request> {
    let promised = rate.bytes.min(PROMISED_BYTES);
    vec![
        new_class(index, handle(NODE_CLASS), class, promised, rate),
        queue(index, class, rate),
    ]
}

/// Takes a peer's class out, and its queue with it.
pub(super) fn delete_class(index: u32, class: TcHandle) -> Request {
    Request {
        message: RouteNetlinkMessage::DelTrafficClass(message(index, handle(NODE_CLASS), class, None, None)),
        flags: 0,
        what: format!("removing the class {:x}:{:x}", class.major, class.minor),
        or: Or::Gone,
    }
}

/// Where filters for what comes out of an interface are (`TC_H_CLSACT`, `TC_H_MIN_INGRESS`).
const INGRESS: TcHandle = TcHandle {
    major: 0xffff,
    minor: 0xfff2,
};
/// The last preference: filters of others come before ours.
const LAST: u32 = 0xffff;

/// Takes all that comes out of an interface, and that its programs and filters let pass, to another device. What is
/// there already is left as it is.
///
/// A filter and not the program: some kernels drop on the device what a program redirects there (6.1 does), and this
/// way every program and filter on the interface sees the packet.
pub(super) fn redirect(from: u32, to: u32) -> Vec<Request> {
    const SELECTOR: u16 = 5;
    const ACTIONS: u16 = 7;
    const ACTION: u16 = 1;
    const ACTION_KIND: u16 = 1;
    const ACTION_OPTIONS: u16 = 2;
    const PARAMETERS: u16 = 2;
    const TERMINAL: u8 = 1;
    const STOLEN: u32 = 4;
    const EGRESS_REDIRECT: u32 = 1;
    // `tc_u32_sel` with one key that matches everything.
    let mut selector = vec![TERMINAL, 0, 1, 0];
    selector.resize(16 + 16, 0);
    // `tc_mirred`: index, capabilities, action, two counts of references, what, where.
    let parameters = [0, 0, STOLEN, 0, 0, EGRESS_REDIRECT, to];
    let mut options = Options::default();
    options.attribute(PARAMETERS, &parameters.map(u32::to_ne_bytes).concat());
    let mut action = Options::default();
    action.attribute(ACTION_KIND, b"mirred\0");
    action.attribute(ACTION_OPTIONS, &options.0);
    let mut actions = Options::default();
    actions.attribute(ACTION, &action.0);
    let mut filter = Options::default();
    filter.attribute(SELECTOR, &selector);
    filter.attribute(ACTIONS, &actions.0);
    let mut message = message(from, INGRESS, TcHandle::from(1), Some("u32"), Some(filter.0));
    message.header.info = filter_info();
    let clsact = TcHandle {
        major: 0xffff,
        minor: 0,
    };
    let mut qdisc = new_qdisc(from, TcHandle::CLSACT, clsact, "clsact", None);
    qdisc.flags = NLM_F_CREATE | NLM_F_EXCL;
    qdisc.or = Or::There;
    vec![
        qdisc,
        Request {
            message: RouteNetlinkMessage::NewTrafficFilter(message),
            flags: NLM_F_CREATE | NLM_F_EXCL,
            what: "taking uploads to the device that paces them".to_owned(),
            or: Or::There,
        },
    ]
}

/// Ends that.
pub(super) fn delete_redirect(from: u32) -> Request {
    let mut message = message(from, INGRESS, TcHandle::UNSPEC, Some("u32"), None);
    message.header.info = filter_info();
    Request {
        message: RouteNetlinkMessage::DelTrafficFilter(message),
        flags: 0,
        what: "no longer taking uploads to the device that paces them".to_owned(),
        or: Or::Gone,
    }
}

/// Preference and protocol (`ETH_P_ALL`) as a filter's message has them.
fn filter_info() -> u32 {
    LAST << 16 | u32::from(3_u16.to_be())
}

/// Takes our root qdisc out.
pub(super) fn delete_root(index: u32) -> Request {
    Request {
        message: RouteNetlinkMessage::DelQueueDiscipline(message(index, TcHandle::ROOT, root(), None, None)),
        flags: 0,
        what: "removing our queueing discipline".to_owned(),
        or: Or::Gone,
    }
}

fn new_qdisc(index: u32, parent: TcHandle, handle: TcHandle, kind: &str, options: Option<Vec<u8>>) -> Request {
    Request {
        message: RouteNetlinkMessage::NewQueueDiscipline(message(index, parent, handle, Some(kind), options)),
        flags: NLM_F_CREATE | NLM_F_REPLACE,
        what: format!("setting up the queueing discipline {kind}"),
        or: Or::Nothing,
    }
}

/// `tc_htb_opt`: what is promised, and what may be borrowed up to.
fn new_class(index: u32, parent: TcHandle, class: TcHandle, promised: u64, rate: ClassRate) -> Request {
    const PARAMETERS: u16 = 1;
    const RATE64: u16 = 6;
    const CEIL64: u16 = 7;
    let packet = u64::from(rate.packet_bytes);
    // Tokens for a millisecond, and for a packet at least.
    let ticks = |bytes: u64| ticks(packet.max(bytes / 1000), bytes);
    // What one class sends before it is another's turn: a packet, and at high rates a millisecond of them.
    let quantum = (rate.bytes / 1000).clamp(packet, 60_000.max(packet));
    let mut parameters = rate_spec(promised);
    parameters.extend(rate_spec(rate.bytes));
    for field in [
        ticks(promised),
        ticks(rate.bytes),
        u32::try_from(quantum).unwrap_or(u32::MAX),
        0,
        0,
    ] {
        parameters.extend(field.to_ne_bytes());
    }
    let mut options = Options::default();
    options.attribute(PARAMETERS, &parameters);
    options.attribute(RATE64, &promised.to_ne_bytes());
    options.attribute(CEIL64, &rate.bytes.to_ne_bytes());
    Request {
        message: RouteNetlinkMessage::NewTrafficClass(message(index, parent, class, Some("htb"), Some(options.0))),
        flags: NLM_F_CREATE | NLM_F_REPLACE,
        what: format!("setting the class {:x}:{:x}", class.major, class.minor),
        or: Or::Nothing,
    }
}

/// The queue of a class: tbf at a rate that never holds anything back, because it is the one queue that cuts
/// super-packets into packets; whole they would not fit in what a slow peer's queue may hold.
fn queue(index: u32, class: TcHandle, rate: ClassRate) -> Request {
    const PARAMETERS: u16 = 1;
    const RATE64: u16 = 4;
    const BURST: u16 = 6;
    let mut parameters = rate_spec(UNLIMITED_BYTES);
    parameters.extend(rate_spec(0));
    let limit = u32::try_from(rate.queue_bytes)
        .unwrap_or(u32::MAX)
        .max(rate.packet_bytes);
    for field in [limit, 0, 0] {
        parameters.extend(field.to_ne_bytes());
    }
    let mut options = Options::default();
    options.attribute(PARAMETERS, &parameters);
    options.attribute(RATE64, &UNLIMITED_BYTES.to_ne_bytes());
    options.attribute(BURST, &rate.packet_bytes.to_ne_bytes());
    new_qdisc(index, class, TcHandle::UNSPEC, "tbf", Some(options.0))
}

/// `tc_ratespec`: the packet's length as it is (`TC_LINKLAYER_ETHERNET`), which needs no table of rates.
fn rate_spec(bytes: u64) -> Vec<u8> {
    const ETHERNET: u8 = 1;
    let mut spec = vec![0, ETHERNET, 0, 0, 0, 0, 0, 0];
    spec.extend(u32::try_from(bytes).unwrap_or(u32::MAX).to_ne_bytes());
    spec
}

/// How long `bytes` take at a rate, in the scheduler's ticks of 64 ns (`PSCHED_SHIFT`).
fn ticks(bytes: u64, bytes_per_second: u64) -> u32 {
    let ns = u128::from(bytes) * 1_000_000_000 / u128::from(bytes_per_second.max(1));
    u32::try_from(ns / 64).unwrap_or(u32::MAX).max(1)
}

/// Netlink attributes as bytes (netlink(7)): lengths without, places with their padding.
#[derive(Default)]
struct Options(Vec<u8>);

impl Options {
    fn attribute(&mut self, kind: u16, value: &[u8]) {
        const HEADER: usize = 4;
        let length = u16::try_from(HEADER + value.len()).unwrap_or(u16::MAX);
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }
}

impl Host {
    /// Carries requests out in their order; many are on their way at once. Answers with the first that failed.
    pub(super) async fn traffic_control(&self, requests: Vec<Request>) -> Result<(), Error> {
        let mut requests = requests.into_iter().peekable();
        while requests.peek().is_some() {
            let mut answers = Vec::new();
            for request in requests.by_ref().take(AT_ONCE) {
                let mut message = NetlinkMessage::from(request.message);
                message.header.flags = NLM_F_REQUEST | NLM_F_ACK | request.flags;
                let failed = |source| Error::Change {
                    what: request.what.clone(),
                    source,
                };
                let answer = self.netlink().clone().request(message).map_err(failed)?;
                answers.push((answer, request.what, request.or));
            }
            for (mut answer, what, or) in answers {
                while let Some(message) = answer.next().await {
                    if let NetlinkPayload::Error(error) = message.payload
                        && error.code.is_some()
                    {
                        let source = rtnetlink::Error::NetlinkError(error);
                        if or.is_good(code(&source)) {
                            continue;
                        }
                        return Err(Error::Change { what, source });
                    }
                }
            }
        }
        Ok(())
    }

    /// The kind of our root qdisc, if the interface has it.
    pub(super) async fn our_root(&self, index: u32) -> Result<Option<String>, Error> {
        let question = message(index, TcHandle::ROOT, root(), None, None);
        let mut message = NetlinkMessage::from(RouteNetlinkMessage::GetQueueDiscipline(question));
        // Without the echo the kernel answers to those who listen to all changes, and not to who asked.
        message.header.flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_ECHO;
        let read = |source| Error::Read {
            what: "a queueing discipline",
            source,
        };
        let mut answer = self.netlink().clone().request(message).map_err(read)?;
        let mut kind = None;
        while let Some(message) = answer.next().await {
            if let NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewQueueDiscipline(found)) = message.payload {
                kind = found.attributes.iter().find_map(|attribute| {
                    if let TcAttribute::Kind(kind) = attribute {
                        Some(kind.clone())
                    } else {
                        None
                    }
                });
            }
        }
        Ok(kind)
    }
}

/// The positive number of what the kernel said; 0 for anything else.
pub(super) fn code(error: &rtnetlink::Error) -> i32 {
    if let rtnetlink::Error::NetlinkError(message) = error {
        -message.raw_code()
    } else {
        0
    }
}

/// Whether the kernel does not know a kind of qdisc or link.
pub(super) fn is_unknown(error: &Error) -> bool {
    matches!(error, Error::Change { source, .. } if matches!(code(source), libc::ENOENT | libc::EOPNOTSUPP))
}

#[cfg(test)]
mod tests {
    use super::{Options, handle, peer_class, rate_spec, ticks};

    #[test]
    fn attributes_are_padded_and_their_lengths_are_not() {
        let mut options = Options::default();
        options.attribute(15, &[1]);
        options.attribute(1, &7_u32.to_ne_bytes());
        let expected = [
            5_u16.to_ne_bytes(),
            15_u16.to_ne_bytes(),
            [1, 0],
            [0, 0],
            8_u16.to_ne_bytes(),
            1_u16.to_ne_bytes(),
        ];
        assert_eq!(options.0, [expected.concat(), 7_u32.to_ne_bytes().to_vec()].concat());
    }

    #[test]
    fn a_tick_is_64_nanoseconds() {
        assert_eq!(ticks(1600, 1_600_000), 1_000_000 / 64);
        assert_eq!(ticks(u64::MAX, 1), u32::MAX);
        assert_eq!(rate_spec(u64::MAX).len(), 12);
    }

    #[test]
    fn every_peer_has_a_class_of_its_own() {
        let last = peer_class(dvpn_common::abi::MAX_PEERS - 1);
        assert_eq!(peer_class(0), handle(0x10));
        assert!(last.minor < super::CLOSED_CLASS && last.minor == 0x100f);
    }
}
