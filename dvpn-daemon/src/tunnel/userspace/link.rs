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

/// Sets how many packets the kernel keeps for the link. A queue that stays as it was loses packets only where the pause
/// is long, so a failure is no error.
pub(super) async fn set_queue(index: u32, packets: u32) {
    let changed = async {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        let _connection = AbortOnDropHandle::new(tokio::spawn(connection));
        let link = LinkMessageBuilder::<LinkUnspec>::new()
            .index(index)
            .append_extra_attribute(LinkAttribute::TxQueueLen(packets))
            .build();
        handle.link().set(link).execute().await.map_err(io::Error::other)
    };
    if let Err(error) = changed.await {
        tracing::debug!(index, packets, %error, "the interface's queue keeps its length");
    }
}

/// Turns IPv6 link-local addresses off (the peer's other end has none either, and router solicitations would
/// wake it), then follows the link until it is deleted. Ends when the handle is dropped.
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
