//! Tells when somebody else took away something of the client's side: rules, routes, or the firewall.
//!
//! Our own changes are reported too; whoever listens looks whether everything stands ([`Host::repair_client`]), which
//! waits for a change of ours that is under way.

use std::{io, time::Duration};

use futures::{Stream, StreamExt as _, channel::mpsc::UnboundedReceiver, stream};
use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_route::{RouteNetlinkMessage, link::LinkFlags};
use netlink_sys::{AsyncSocket as _, AsyncSocketExt as _, SocketAddr, TokioSocket, protocols::NETLINK_NETFILTER};
use rtnetlink::MulticastGroup;
use tokio::time::sleep;
use tokio_util::task::AbortOnDropHandle;

use super::{
    CLIENT_INTERFACE, CLIENT_TABLE, Error, Host,
    netlink::{is_own_route, link_of, to_nobody},
    nft,
};

/// Several changes of one transaction are looked at together.
const TOGETHER: Duration = Duration::from_millis(10);
/// `NFNLGRP_NFTABLES`
const NFTABLES_GROUP: u32 = 7;

type Routes = UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, SocketAddr)>;

struct Watch {
    routes: Routes,
    firewall: TokioSocket,
    _connection: AbortOnDropHandle<()>,
}

impl Host {
    /// Yields soon after something of the client's side was taken away, by whomever. Ends only with the kernel's answers.
    /// Needs a tokio runtime.
    pub fn losses(&self) -> Result<impl Stream<Item = ()> + Send + use<>, Error> {
        // The kernel does not report each route that goes with an address or with a link that goes down.
        let groups = [
            MulticastGroup::Link,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv4Rule,
            MulticastGroup::Ipv6Route,
            MulticastGroup::Ipv6Rule,
        ];
        let (connection, _, routes) = rtnetlink::new_multicast_connection(&groups).map_err(Error::Open)?;
        let watch = Watch {
            routes,
            firewall: firewall_events().map_err(Error::Open)?,
            _connection: AbortOnDropHandle::new(tokio::spawn(connection)),
        };
        Ok(stream::unfold(watch, |mut watch| async move {
            watch.next_loss().await?;
            sleep(TOGETHER).await;
            watch.forget();
            Some(((), watch))
        }))
    }
}

impl Watch {
    async fn next_loss(&mut self) -> Option<()> {
        loop {
            tokio::select! {
                message = self.routes.next() => {
                    if is_loss(&message?.0) {
                        return Some(());
                    }
                }
                events = self.firewall.recv_from_full() => match events {
                    Ok((bytes, _)) if nft::takes_away(&bytes, CLIENT_TABLE) => return Some(()),
                    Ok(_) => {}
                    // More than the socket holds: something may have been among it.
                    Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => return Some(()),
                    Err(error) => {
                        tracing::warn!("changes of the firewall are not seen any more: {error}");
                        return None;
                    }
                },
            }
        }
    }

    /// What came meanwhile is part of what is looked at now.
    fn forget(&mut self) {
        while self.routes.try_recv().is_ok() {}
        while self.firewall.socket_ref().recv_from_full().is_ok() {}
    }
}

fn firewall_events() -> io::Result<TokioSocket> {
    let mut socket = TokioSocket::new(NETLINK_NETFILTER)?;
    socket.socket_mut().bind(&SocketAddr::new(0, 0))?;
    socket.socket_mut().add_membership(NFTABLES_GROUP)?;
    Ok(socket)
}

#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "the crate's enum is open; what is not named is not asked for"
)]
fn is_loss(message: &NetlinkMessage<RouteNetlinkMessage>) -> bool {
    let NetlinkPayload::InnerMessage(inner) = &message.payload else {
        return false;
    };
    match inner {
        RouteNetlinkMessage::DelRoute(route) => is_own_route(route) || to_nobody(route).is_some(),
        RouteNetlinkMessage::NewLink(link) => {
            link_of(link).name == CLIENT_INTERFACE && !link.header.flags.contains(LinkFlags::Up)
        }
        // The message of a rule that is gone does not always say whose it was.
        RouteNetlinkMessage::DelRule(_) | RouteNetlinkMessage::DelAddress(_) => true,
        _ => false,
    }
}
