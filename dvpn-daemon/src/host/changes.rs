//! Changes of the machine's network that others made.

use std::{
    collections::BTreeSet,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use futures::{Stream, StreamExt as _, channel::mpsc::UnboundedReceiver};
use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_route::{
    RouteNetlinkMessage,
    route::{RouteMessage, RouteProtocol},
};
use rtnetlink::{MulticastGroup, sys::SocketAddr};
use tokio::{sync::mpsc, time::Instant};
use tokio_util::task::AbortOnDropHandle;

use super::{
    CLIENT_INTERFACE, Error, Host, PROTOCOL, PROVIDER_INTERFACE, ROUTING_TABLE,
    netlink::{link_of, oif_of, table_of},
};

/// A change is reported when nothing more happened for this long.
const QUIET: Duration = Duration::from_millis(300);
/// A machine that never becomes quiet is still heard of this often.
const AT_MOST: Duration = Duration::from_secs(3);

/// Yields once after each burst of changes of links, addresses or routes, our own left out. Ends never.
pub struct NetworkChanges {
    bursts: mpsc::Receiver<()>,
    _tasks: [AbortOnDropHandle<()>; 2],
}

impl Stream for NetworkChanges {
    type Item = ();

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<()>> {
        self.bursts.poll_recv(context)
    }
}

impl Host {
    /// Subscribes to the machine's changes, from now on. Bursts are debounced by 300 ms.
    pub async fn network_changes(&self) -> Result<NetworkChanges, Error> {
        let groups = [
            MulticastGroup::Link,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv6Route,
        ];
        let (connection, _, messages) = rtnetlink::new_multicast_connection(&groups).map_err(Error::Open)?;
        let connection = AbortOnDropHandle::new(tokio::spawn(connection));
        let ours = self
            .links()
            .await?
            .into_iter()
            .filter(|link| is_ours(&link.name))
            .map(|link| link.index)
            .collect();
        let (report, bursts) = mpsc::channel(1);
        let watch = AbortOnDropHandle::new(tokio::spawn(watch(messages, ours, report)));
        Ok(NetworkChanges {
            bursts,
            _tasks: [connection, watch],
        })
    }
}

type Messages = UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, SocketAddr)>;

async fn watch(mut messages: Messages, mut ours: BTreeSet<u32>, report: mpsc::Sender<()>) {
    while let Some((message, _)) = messages.next().await {
        if !is_foreign(&message, &mut ours) {
            continue;
        }
        let first = Instant::now();
        let mut quiet_at = first + QUIET;
        while let Ok(next) = tokio::time::timeout_at(quiet_at.min(first + AT_MOST), messages.next()).await {
            match next {
                Some((message, _)) if is_foreign(&message, &mut ours) => quiet_at = Instant::now() + QUIET,
                Some(_) => {}
                None => return,
            }
        }
        if report.send(()).await.is_err() {
            return;
        }
    }
}

fn is_ours(name: &str) -> bool {
    name == CLIENT_INTERFACE || name == PROVIDER_INTERFACE
}

/// Whether the message is about something that is not ours. Keeps track of our interfaces' indexes.
#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "the crate's enum is open; what is not named is not asked for"
)]
fn is_foreign(message: &NetlinkMessage<RouteNetlinkMessage>, ours: &mut BTreeSet<u32>) -> bool {
    let NetlinkPayload::InnerMessage(inner) = &message.payload else {
        return false;
    };
    match inner {
        RouteNetlinkMessage::NewLink(link) | RouteNetlinkMessage::DelLink(link) => {
            let link = link_of(link);
            let own = is_ours(&link.name);
            if own {
                ours.insert(link.index);
            }
            !own
        }
        RouteNetlinkMessage::NewAddress(address) | RouteNetlinkMessage::DelAddress(address) => {
            !ours.contains(&address.header.index)
        }
        RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route) => !is_own_route(route, ours),
        _ => false,
    }
}

fn is_own_route(route: &RouteMessage, ours: &BTreeSet<u32>) -> bool {
    table_of(route) == ROUTING_TABLE
        || route.header.protocol == RouteProtocol::Other(PROTOCOL)
        || oif_of(route).is_some_and(|index| ours.contains(&index))
}
