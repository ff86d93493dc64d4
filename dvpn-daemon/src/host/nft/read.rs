//! What a table of ours holds: its counters, its comments and what its sets counted.

use std::{collections::BTreeMap, io, net::IpAddr};

use netlink_packet_core::{DefaultNla, Emitable as _, NlasIterator};

use super::{
    Answer, NETFILTER_HEADER_BYTES, NLMSG_DONE, NLMSG_ERROR, SUBSYSTEM, answers, error_code, expr::nul_terminated, open,
};

const NFT_MSG_GETRULE: u16 = 7;
const NFT_MSG_GETSETELEM: u16 = 13;
const NFT_MSG_GETOBJ: u16 = 19;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_DUMP: u16 = 0x300;
const NFPROTO_INET: u8 = 1;

const NFTA_OBJ_TABLE: u16 = 1;
const NFTA_OBJ_NAME: u16 = 2;
const NFTA_OBJ_DATA: u16 = 4;
const NFTA_COUNTER_BYTES: u16 = 1;
const NFTA_COUNTER_PACKETS: u16 = 2;
const NFTA_LIST_TABLE: u16 = 1;
const NFTA_LIST_SET: u16 = 2;
const NFTA_LIST_ELEMENTS: u16 = 3;
const NFTA_ELEMENT_KEY: u16 = 1;
const NFTA_ELEMENT_EXPRESSION: u16 = 7;
const NFTA_DATA_VALUE: u16 = 1;
const NFTA_EXPRESSION_DATA: u16 = 2;
const NFTA_RULE_TABLE: u16 = 1;
const NFTA_RULE_USERDATA: u16 = 7;
const KIND_MASK: u16 = 0x3fff;

/// What one named counter saw.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CounterValue {
    /// Packets.
    pub packets: u64,
    /// Their layer-3 bytes.
    pub bytes: u64,
}

/// Every named counter of a table; empty if there is no such table.
pub(crate) fn counters(table: &str) -> io::Result<BTreeMap<String, CounterValue>> {
    let mut found = BTreeMap::new();
    dump(NFT_MSG_GETOBJ, &[], |attributes| {
        if text(attributes, NFTA_OBJ_TABLE).as_deref() != Some(table) {
            return;
        }
        if let (Some(name), Some(data)) = (text(attributes, NFTA_OBJ_NAME), attribute(attributes, NFTA_OBJ_DATA)) {
            found.insert(name, counter(&data));
        }
    })?;
    Ok(found)
}

/// What a set of addresses counted for each; empty if there is no such table or set.
pub(crate) fn addresses(table: &str, set: &str) -> io::Result<BTreeMap<IpAddr, CounterValue>> {
    let mut found = BTreeMap::new();
    let which = [
        DefaultNla::new(NFTA_LIST_TABLE, nul_terminated(table)),
        DefaultNla::new(NFTA_LIST_SET, nul_terminated(set)),
    ];
    let dumped = dump(NFT_MSG_GETSETELEM, &which, |attributes| {
        let list = attribute(attributes, NFTA_LIST_ELEMENTS).unwrap_or_default();
        for element in NlasIterator::new(list.as_slice()).flatten() {
            let element = element.value();
            let key = attribute(element, NFTA_ELEMENT_KEY).and_then(|key| attribute(&key, NFTA_DATA_VALUE));
            let expression = attribute(element, NFTA_ELEMENT_EXPRESSION);
            let data = expression.and_then(|expression| attribute(&expression, NFTA_EXPRESSION_DATA));
            let address = key.and_then(|key| {
                let v4 = <[u8; 4]>::try_from(key.as_slice()).map(IpAddr::from);
                v4.or_else(|_longer| <[u8; 16]>::try_from(key.as_slice()).map(IpAddr::from))
                    .ok()
            });
            if let (Some(address), Some(data)) = (address, data) {
                found.insert(address, counter(&data));
            }
        }
    });
    match dumped {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(BTreeMap::new()),
        other => other.map(|()| found),
    }
}

fn counter(data: &[u8]) -> CounterValue {
    let number = |kind| attribute(data, kind).and_then(|v| v.first_chunk::<8>().map(|v| u64::from_be_bytes(*v)));
    CounterValue {
        packets: number(NFTA_COUNTER_PACKETS).unwrap_or(0),
        bytes: number(NFTA_COUNTER_BYTES).unwrap_or(0),
    }
}

/// How many rules a table has; none if there is no such table.
pub(crate) fn rules(table: &str) -> io::Result<usize> {
    let mut count = 0;
    dump(NFT_MSG_GETRULE, &[], |attributes| {
        count += usize::from(text(attributes, NFTA_RULE_TABLE).as_deref() == Some(table));
    })?;
    Ok(count)
}

/// The comments of a table's rules, in no particular order.
pub(crate) fn comments(table: &str) -> io::Result<Vec<String>> {
    let mut found = Vec::new();
    dump(NFT_MSG_GETRULE, &[], |attributes| {
        if text(attributes, NFTA_RULE_TABLE).as_deref() == Some(table)
            && let Some(data) = attribute(attributes, NFTA_RULE_USERDATA)
            && let Some((&[0, length], value)) = data.split_first_chunk::<2>()
            && let Some(value) = value.get(..usize::from(length).saturating_sub(1))
        {
            found.push(String::from_utf8_lossy(value).into_owned());
        }
    })?;
    Ok(found)
}

fn dump(request: u16, which: &[DefaultNla], mut each: impl FnMut(&[u8])) -> io::Result<()> {
    let socket = open()?;
    let mut selection = vec![0; which.buffer_len()];
    which.emit(&mut selection);
    let length = u32::try_from(20 + selection.len()).unwrap_or(u32::MAX);
    let kind = (SUBSYSTEM << 8) | request;
    let mut bytes = length.to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend((NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
    bytes.extend(1_u32.to_ne_bytes());
    bytes.extend(0_u32.to_ne_bytes());
    bytes.extend([NFPROTO_INET, 0, 0, 0]);
    bytes.extend(selection);
    socket.send(&bytes, 0)?;
    loop {
        let (answer, _) = socket.recv_from_full()?;
        for Answer { kind, payload, .. } in answers(&answer) {
            match kind {
                NLMSG_DONE => return Ok(()),
                NLMSG_ERROR => match error_code(payload) {
                    Some(code) if code != 0 => return Err(io::Error::from_raw_os_error(-code)),
                    Some(_) | None => return Ok(()),
                },
                _ => each(payload.get(NETFILTER_HEADER_BYTES..).unwrap_or_default()),
            }
        }
    }
}

fn attribute(bytes: &[u8], wanted: u16) -> Option<Vec<u8>> {
    NlasIterator::new(bytes)
        .flatten()
        .find(|nla| nla.kind() & KIND_MASK == wanted)
        .map(|nla| nla.value().to_vec())
}

pub(super) fn text(bytes: &[u8], wanted: u16) -> Option<String> {
    let value = attribute(bytes, wanted)?;
    let value = value.strip_suffix(&[0]).unwrap_or(&value);
    Some(String::from_utf8_lossy(value).into_owned())
}
