//! What happens to the link outside this process: its MTU is changed, it is deleted.

use std::io;

use futures::StreamExt as _;
use netlink_packet_core::NetlinkPayload;
use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute},
};
use rtnetlink::{LinkMessageBuilder, LinkUnspec, MulticastGroup};
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use super::Death;

/// Packets that the kernel keeps for the link while nobody reads it; 500 is its usual.
const QUEUE_PACKETS: u32 = 4096;

/// Makes the queue to us long, on a link that is still down. Once it is up its length must stay: to change it the kernel
/// takes the link's queueing discipline off, and whatever is sent until it is on again is dropped without a word
/// (`dev_qdisc_change_tx_queue_len` in Linux). A queue that stays short loses packets only where a pause
/// is long, so a failure is no error.
async fn lengthen_queue(handle: &rtnetlink::Handle, index: u32) {
    let link = LinkMessageBuilder::<LinkUnspec>::new()
        .index(index)
        .append_extra_attribute(LinkAttribute::TxQueueLen(QUEUE_PACKETS))
        .build();
    if let Err(error) = handle.link().set(link).execute().await {
        tracing::debug!(index, %error, "the interface's queue keeps its length");
    }
}

/// Gives the link, which is still down, its long queue, turns IPv6 link-local addresses off (the peer's other end has none
/// either, and router solicitations would wake it), then follows the link until it is deleted. Ends when the handle is
/// dropped.
pub(super) async fn watch(index: u32, mtu: watch::Sender<u16>, death: Death) -> io::Result<AbortOnDropHandle<()>> {
    let (connection, handle, mut messages) = rtnetlink::new_multicast_connection(&[MulticastGroup::Link])?;
    let connection = AbortOnDropHandle::new(tokio::spawn(connection));
    let no_link_local = LinkMessageBuilder::<LinkUnspec>::new()
        .index(index)
        .append_extra_attribute(LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![
            AfSpecInet6::AddrGenMode(In6AddrGenMode::None),
        ])]))
        .build();
    if let Err(error) = handle.link().set(no_link_local).execute().await {
        // A machine without IPv6 has nothing to turn off.
        tracing::debug!(index, %error, "IPv6 link-local addresses stay as they are");
    }
    lengthen_queue(&handle, index).await;
    Ok(AbortOnDropHandle::new(tokio::spawn(async move {
        let _connection = connection;
        while let Some((message, _)) = messages.next().await {
            let NetlinkPayload::InnerMessage(message) = message.payload else {
                continue;
            };
            if let RouteNetlinkMessage::DelLink(link) = &message
                && link.header.index == index
            {
                death.report("the interface was deleted".to_owned());
                return;
            }
            if let RouteNetlinkMessage::NewLink(link) = message
                && link.header.index == index
            {
                for attribute in link.attributes {
                    if let LinkAttribute::Mtu(bytes) = attribute {
                        let bytes = u16::try_from(bytes).unwrap_or(u16::MAX);
                        mtu.send_if_modified(|old| std::mem::replace(old, bytes) != bytes);
                    }
                }
            }
        }
    })))
}
