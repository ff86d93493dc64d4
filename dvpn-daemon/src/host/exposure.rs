//! How far this machine is exposed beside the tunnel: what a leak test has to know of the client's side.

use std::net::{IpAddr, SocketAddr};

use super::{CLIENT_TABLE, Error, Host, client_policy::BLOCKS, forwarding, nft};

/// The client's side at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exposure {
    /// Nothing is to pass beside the tunnel.
    pub blocking: bool,
    /// The provider in use.
    pub endpoint: Option<SocketAddr>,
    /// Our tunnel addresses.
    pub addresses: Vec<IpAddr>,
    /// The interfaces that lead to the internet, each with its addresses.
    pub uplinks: Vec<(String, Vec<IpAddr>)>,
    /// Firewall, rules and routes are what was made.
    pub stands: bool,
    /// So are the kernel's settings that device mode needs.
    pub settings: bool,
}

impl Host {
    /// Whether what stands in the firewall blocks, by whichever run of the daemon.
    pub fn found_blocking(&self) -> Result<bool, Error> {
        let comments = nft::read::comments(CLIENT_TABLE).map_err(|source| Error::FirewallRead {
            table: CLIENT_TABLE,
            source,
        })?;
        Ok(comments.iter().any(|comment| comment == BLOCKS))
    }

    /// Looks. A change of ours that is under way is waited for.
    pub async fn exposure(&self) -> Result<Exposure, Error> {
        let side = self.inner.client.lock().await;
        let found = self.uplinks().await?;
        let addresses = self.addresses().await?;
        let of = |index: u32| {
            let of_link = addresses.iter().filter(move |address| address.index == index);
            of_link.map(|address| address.network.ip()).filter(is_wide).collect()
        };
        let links = self.links().await?.into_iter();
        let uplinks: Vec<(String, Vec<IpAddr>)> = links
            .filter(|link| found.contains(&link.index))
            .map(|link| (link.name, of(link.index)))
            .collect();
        let names: Vec<String> = uplinks.iter().map(|(name, _)| name.clone()).collect();
        Ok(Exposure {
            blocking: side.exemptions().is_some(),
            endpoint: side.exemptions().and_then(|exemptions| exemptions.tunnel),
            addresses: side.addresses().iter().map(ipnetwork::IpNetwork::ip).collect(),
            stands: self.client_lost(&side).await?.is_none(),
            settings: forwarding::client_needs(&names).is_empty(),
            uplinks,
        })
    }
}

/// A program can send from it to far away.
fn is_wide(address: &IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => !v4.is_link_local(),
        IpAddr::V6(v6) => !v6.is_unicast_link_local(),
    }
}
