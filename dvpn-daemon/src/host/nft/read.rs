//! What a table of ours holds: its counters and its comments.

use std::{collections::BTreeMap, io};

use netlink_packet_core::NlasIterator;

use super::{Answer, NLMSG_DONE, NLMSG_ERROR, answers, error_code, open};

const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFT_MSG_GETRULE: u16 = 7;
const NFT_MSG_GETOBJ: u16 = 19;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_DUMP: u16 = 0x300;
const NFPROTO_INET: u8 = 1;
const NETFILTER_HEADER_BYTES: usize = 4;

const NFTA_OBJ_TABLE: u16 = 1;
const NFTA_OBJ_NAME: u16 = 2;
const NFTA_OBJ_DATA: u16 = 4;
const NFTA_COUNTER_BYTES: u16 = 1;
const NFTA_COUNTER_PACKETS: u16 = 2;
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
    dump(NFT_MSG_GETOBJ, |attributes| {
        if text(attributes, NFTA_OBJ_TABLE).as_deref() != Some(table) {
            return;
        }
        if let (Some(name), Some(data)) = (text(attributes, NFTA_OBJ_NAME), attribute(attributes, NFTA_OBJ_DATA)) {
            let number =
                |kind| attribute(&data, kind).and_then(|v| v.first_chunk::<8>().map(|v| u64::from_be_bytes(*v)));
            found.insert(
                name,
                CounterValue {
                    packets: number(NFTA_COUNTER_PACKETS).unwrap_or(0),
                    bytes: number(NFTA_COUNTER_BYTES).unwrap_or(0),
                },
            );
        }
    })?;
    Ok(found)
}

/// The comments of a table's rules, in no particular order.
pub(crate) fn comments(table: &str) -> io::Result<Vec<String>> {
    let mut found = Vec::new();
    dump(NFT_MSG_GETRULE, |attributes| {
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

fn dump(request: u16, mut each: impl FnMut(&[u8])) -> io::Result<()> {
    let socket = open()?;
    let length: u32 = 20;
    let kind = (NFNL_SUBSYS_NFTABLES << 8) | request;
    let mut bytes = length.to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend((NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
    bytes.extend(1_u32.to_ne_bytes());
    bytes.extend(0_u32.to_ne_bytes());
    bytes.extend([NFPROTO_INET, 0, 0, 0]);
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

fn text(bytes: &[u8], wanted: u16) -> Option<String> {
    let value = attribute(bytes, wanted)?;
    let value = value.strip_suffix(&[0]).unwrap_or(&value);
    Some(String::from_utf8_lossy(value).into_owned())
}
