//! The link: made, followed until it is deleted, deleted.

use std::io;

use futures::{StreamExt as _, TryStreamExt as _, channel::mpsc::UnboundedReceiver};
use netlink_packet_core::{NLM_F_ACK, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage},
};
use netlink_sys::{SocketAddr, protocols::NETLINK_ROUTE};
use rtnetlink::{LinkWireguard, MulticastGroup};
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use super::{message::encode, socket::Socket};

type Messages = UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, SocketAddr)>;

/// A WireGuard link of ours, deleted when dropped.
pub(in crate::tunnel) struct Link {
    index: u32,
    death: watch::Receiver<Option<String>>,
    socket: Socket,
    _watch: AbortOnDropHandle<()>,
}

impl Link {
    /// Makes it, down and without addresses. A WireGuard link of that name is what a killed daemon left, and goes:
    /// unlike a TUN, it outlives its maker.
    ///
    /// A kernel without WireGuard answers `EOPNOTSUPP`.
    pub(in crate::tunnel) async fn create(interface: &str, mtu_bytes: u16) -> io::Result<Self> {
        let socket = Socket::open(NETLINK_ROUTE)?;
        // Subscribed before there is anything to see.
        let (connection, handle, messages) = rtnetlink::new_multicast_connection(&[MulticastGroup::Link])?;
        let connection = AbortOnDropHandle::new(tokio::spawn(connection));
        let make = || {
            let link = LinkWireguard::new(interface).mtu(mtu_bytes.into()).build();
            handle.link().add(link).execute()
        };
        match make().await.map_err(os_error) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {
                let left = find(&handle, interface).await?;
                if !is_wireguard(&left) {
                    return Err(error);
                }
                tracing::info!(interface, "a WireGuard link that an earlier run left is replaced");
                handle.link().del(left.header.index).execute().await.map_err(os_error)?;
                make().await.map_err(os_error)?;
            }
            Err(error) => return Err(error),
        }
        let index = find(&handle, interface).await?.header.index;
        let (death, died) = watch::channel(None);
        let watch = AbortOnDropHandle::new(tokio::spawn(async move {
            let _connection = connection;
            follow(index, messages, &death).await;
        }));
        Ok(Self {
            index,
            death: died,
            socket,
            _watch: watch,
        })
    }

    /// Its interface index.
    pub(super) fn index(&self) -> u32 {
        self.index
    }

    /// Why it is gone, once it is.
    pub(super) fn death(&self) -> watch::Receiver<Option<String>> {
        self.death.clone()
    }
}

impl Drop for Link {
    /// Takes some 50 ms, until no packet uses the link any more.
    fn drop(&mut self) {
        let mut link = LinkMessage::default();
        link.header.index = self.index;
        let mut message = encode(NLM_F_ACK, RouteNetlinkMessage::DelLink(link));
        match self.socket.request(&mut message, |_| Ok(())) {
            Ok(_) => {}
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {}
            Err(error) => {
                tracing::warn!(index = self.index, %error, "the tunnel's link is left: dvpn-daemon --cleanup");
            }
        }
    }
}

async fn follow(index: u32, mut messages: Messages, death: &watch::Sender<Option<String>>) {
    while let Some((message, _)) = messages.next().await {
        if let NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelLink(link)) = message.payload
            && link.header.index == index
        {
            death.send_replace(Some("the interface was deleted".to_owned()));
            return;
        }
    }
}

async fn find(handle: &rtnetlink::Handle, interface: &str) -> io::Result<LinkMessage> {
    let found = handle.link().get().match_name(interface.to_owned()).execute();
    let link: Option<LinkMessage> = std::pin::pin!(found).try_next().await.map_err(os_error)?;
    link.ok_or_else(|| io::Error::from_raw_os_error(libc::ENODEV))
}

fn is_wireguard(link: &LinkMessage) -> bool {
    link.attributes.iter().any(|attribute| {
        matches!(attribute, LinkAttribute::LinkInfo(infos) if infos.contains(&LinkInfo::Kind(InfoKind::Wireguard)))
    })
}

/// The kernel's own answer, where the error is one.
#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "the crate's enum is open; what is not named is not asked for"
)]
fn os_error(error: rtnetlink::Error) -> io::Error {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io(),
        other => io::Error::other(other),
    }
}
