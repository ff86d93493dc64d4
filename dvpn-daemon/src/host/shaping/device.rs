//! The devices of a shaper: the tunnel with its qdisc, and the intermediate device that the upload is paced on.

use std::collections::BTreeSet;

use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoKind, LinkAttribute, LinkInfo, LinkMessage,
};
use rtnetlink::LinkUnspec;

use super::tc::{self, code, is_unknown};
use super::{Mode, Modes, ShaperConfig};
use crate::host::{Error, Host, netlink::or_gone};

/// Name of the device that paces the upload of a tunnel: `dvpnp0` has `dvpnp0up`.
pub(crate) fn intermediate_name(interface: &str) -> String {
    format!("{interface}up")
}

impl Host {
    /// Gives both directions the best qdisc that the kernel has, none better than `best`. Answers with the modes and the
    /// intermediate device.
    pub(super) async fn prepare_devices(
        &self,
        config: &ShaperConfig,
        tunnel: u32,
        best: Mode,
        mut reasons: BTreeSet<String>,
    ) -> Result<(Modes, Option<u32>), Error> {
        let down = self.best_root(tunnel, best, &mut reasons).await?;
        let name = intermediate_name(&config.interface);
        let (mut up, mut intermediate) = (Mode::Police, None);
        if best != Mode::Police {
            match self.intermediate(&name).await {
                Ok(index) => {
                    up = self.best_root(index, best, &mut reasons).await?;
                    intermediate = Some(index);
                    if up != Mode::Police
                        && let Err(error) = self.take_uploads(tunnel, index, true).await
                    {
                        if !is_unknown(&error) {
                            return Err(error);
                        }
                        reasons.insert("this kernel has no filters u32 with the action mirred".to_owned());
                        up = Mode::Police;
                    }
                }
                Err(error) if is_unknown(&error) => {
                    reasons.insert("this kernel has no devices of kind ifb".to_owned());
                }
                Err(error) => return Err(error),
            }
        }
        if up == Mode::Police {
            self.traffic_control(vec![tc::delete_redirect(tunnel)]).await?;
            self.remove_intermediate(&config.interface).await?;
            intermediate = None;
        }
        Ok((Modes { down, up, reasons }, intermediate))
    }

    /// Takes the tunnel's uploads to the intermediate device; `anew` when they may go to an earlier one.
    pub(super) async fn take_uploads(&self, tunnel: u32, intermediate: u32, anew: bool) -> Result<(), Error> {
        let ended = anew.then(|| tc::delete_redirect(tunnel));
        let requests = ended.into_iter().chain(tc::redirect(tunnel, intermediate));
        self.traffic_control(requests.collect()).await
    }

    async fn best_root(&self, index: u32, best: Mode, reasons: &mut BTreeSet<String>) -> Result<Mode, Error> {
        // What is there carries its peers: to try something better would take their classes away.
        if best <= Mode::Htb && self.has_root(index, Mode::Htb).await? {
            self.make_root(index, Mode::Htb, None).await?;
            if best < Mode::Htb {
                reasons.insert("what an earlier daemon set up goes on".to_owned());
            }
            return Ok(Mode::Htb);
        }
        for (mode, lack) in [
            (Mode::Edt, "this kernel has no qdisc fq"),
            (Mode::Htb, "this kernel has no qdiscs htb and tbf"),
        ] {
            if mode < best {
                continue;
            }
            match self.make_root(index, mode, None).await {
                Ok(()) => return Ok(mode),
                Err(error) if is_unknown(&error) => {
                    reasons.insert(lack.to_owned());
                }
                Err(error) => return Err(error),
            }
        }
        self.make_root(index, Mode::Police, None).await?;
        Ok(Mode::Police)
    }

    /// Whether the root qdisc of a mode is there.
    pub(super) async fn has_root(&self, index: u32, mode: Mode) -> Result<bool, Error> {
        Ok(self.our_root(index).await?.as_deref() == kind(mode))
    }

    /// Makes the root qdisc of a mode; one of ours of another mode goes.
    pub(super) async fn make_root(&self, index: u32, mode: Mode, node_bytes: Option<u64>) -> Result<(), Error> {
        let there = self.our_root(index).await?;
        let mut requests = Vec::new();
        if there.is_some() && there.as_deref() != kind(mode) {
            requests.push(tc::delete_root(index));
        }
        match mode {
            Mode::Edt => requests.push(tc::fq(index)),
            Mode::Htb => {
                // Its options do not change, and what is in it is enforced already.
                if there.as_deref() != kind(mode) {
                    requests.push(tc::htb(index));
                    requests.push(tc::node_class(index, node_bytes));
                }
                requests.extend(tc::closed_class(index));
            }
            Mode::Police => {}
        }
        self.traffic_control(requests).await
    }

    /// The intermediate device; made if it is not there.
    pub(super) async fn intermediate(&self, name: &str) -> Result<u32, Error> {
        if let Some(link) = self.link(name).await? {
            return match link.kind {
                Some(InfoKind::Ifb) => Ok(link.index),
                kind => Err(Error::ForeignInterface {
                    name: name.to_owned(),
                    kind: kind.map_or_else(|| "device without a kind".to_owned(), |kind| format!("{kind:?}")),
                }),
            };
        }
        let mut message = LinkMessage::default();
        message.attributes = vec![
            LinkAttribute::IfName(name.to_owned()),
            LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Ifb)]),
            LinkAttribute::NumTxQueues(1),
        ];
        let made = self.netlink().link().add(message).execute().await;
        match made {
            // Some kernels make two when they first hear of the kind, and one has the name already.
            Err(error) if code(&error) != libc::EEXIST => {
                return Err(Error::Change {
                    what: format!("making the device {name}"),
                    source: error,
                });
            }
            Ok(()) | Err(_) => {}
        }
        let index = self.interface_index(name).await?;
        let mut message = LinkMessage::default();
        message.header.index = index;
        // It is nobody's link: without an address of its own the kernel has nothing to say there.
        message.attributes = vec![LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![
            AfSpecInet6::AddrGenMode(In6AddrGenMode::None),
        ])])];
        if let Err(error) = self.netlink().link().set(message).execute().await {
            tracing::debug!("{name} keeps what IPv6 does on a new link, if there is IPv6: {error}");
        }
        Ok(index)
    }

    pub(super) async fn intermediate_up(&self, index: u32) -> Result<(), Error> {
        let message = LinkUnspec::new_with_index(index).up().build();
        let done = self.netlink().link().set(message).execute().await;
        done.map_err(|source| Error::Change {
            what: "bringing the device for uploads up".to_owned(),
            source,
        })
    }

    /// Removes the intermediate device of a tunnel; says whether there was one.
    pub(in crate::host) async fn remove_intermediate(&self, interface: &str) -> Result<bool, Error> {
        let name = intermediate_name(interface);
        match self.link(&name).await? {
            Some(link) if link.kind == Some(InfoKind::Ifb) => {
                let removed = self.netlink().link().del(link.index).execute().await;
                or_gone(removed, format!("removing the device {name}")).map(|()| true)
            }
            Some(_) | None => Ok(false),
        }
    }

    /// Limits the buffers of local senders on an interface. A kernel that cannot is no reason to do without it.
    pub(super) async fn limit_buffers(&self, index: u32, bytes: u32) -> Result<(), Error> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.attributes = vec![LinkAttribute::GsoMaxSize(bytes), LinkAttribute::GsoIpv4MaxSize(bytes)];
        match self.netlink().link().set(message).execute().await {
            Err(error) if code(&error) == libc::EINVAL => {
                tracing::debug!("this kernel does not limit buffers to {bytes} bytes: {error}");
                Ok(())
            }
            result => result.map_err(|source| Error::Change {
                what: format!("limiting buffers to {bytes} bytes"),
                source,
            }),
        }
    }
}

fn kind(mode: Mode) -> Option<&'static str> {
    match mode {
        Mode::Edt => Some("fq"),
        Mode::Htb => Some("htb"),
        Mode::Police => None,
    }
}
