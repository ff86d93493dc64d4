//! The opening for a login to the network ([`dvpn_core::portal`]), as the firewall knows it.

use std::time::Instant;

use dvpn_core::portal::Place;

use super::{Error, Host, client::commit_standing};

/// How long, and where besides the usual ports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortalOpening {
    /// The kernel ends it then, whether this process lives or not.
    pub until: Instant,
    /// The portal's own addresses.
    pub places: Vec<Place>,
}

impl Host {
    /// Lets our marked sockets reach what a login needs. It opens nothing in a firewall that does not stand.
    pub async fn open_portal(&self, opening: PortalOpening) -> Result<(), Error> {
        self.set_portal(Some(opening)).await
    }

    /// Ends that.
    pub async fn close_portal(&self) -> Result<(), Error> {
        self.set_portal(None).await
    }

    async fn set_portal(&self, opening: Option<PortalOpening>) -> Result<(), Error> {
        let mut side = self.inner.client.lock().await;
        if side.portal == opening {
            return Ok(());
        }
        side.portal = opening;
        commit_standing(&mut side)
    }
}
