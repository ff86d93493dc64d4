//! What the node does for the grants of its clients.

use dvpn_common::rate::Rate;
use dvpn_core::line::Known;

use super::{Error, Grants, Node, with_sources};

impl Node<'_> {
    /// Gets ready to enforce grants. A machine that cannot is no provider for anybody; it stays registered and says so.
    pub(super) async fn prepare_grants(&mut self) {
        let config = self.config;
        let limit = config.limit_bits_per_second.map(Rate::from_bits_per_second);
        let total = carried(*config.line.borrow());
        let opened = match Grants::open(&config.host, &config.loader, limit).await {
            Ok(mut grants) => grants.set_total(total).await.map(|()| grants),
            Err(error) => Err(error),
        };
        match opened {
            Ok(grants) => {
                if grants.share().is_none() {
                    tracing::warn!("what the line carries is not known yet: no clients are taken until it is");
                }
                self.grants = Some(grants);
            }
            Err(error) => {
                let problem = format!(
                    "grants cannot be enforced, no clients are taken: {}",
                    with_sources(&error)
                );
                tracing::error!("{problem}");
                config.status.send_modify(|status| status.problem = Some(problem));
            }
        }
    }

    pub(super) async fn settle_grants(&mut self) -> Result<(), Error> {
        match &mut self.grants {
            Some(grants) => grants.settle().await.map_err(Error::Host),
            None => Ok(()),
        }
    }

    pub(super) async fn size_grants(&mut self) -> Result<(), Error> {
        let total = carried(*self.config.line.borrow());
        match &mut self.grants {
            Some(grants) => grants.set_total(total).await.map_err(Error::Host),
            None => Ok(()),
        }
    }
}

/// What the line carries for others in each direction.
fn carried(line: Known) -> Option<Rate> {
    line.forwarded().map(|total| total.down)
}
