//! Removal of everything of ours, also what `kill -9` left.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
};

use netlink_packet_route::link::InfoKind;
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use super::{
    CLIENT_INTERFACE, CLIENT_TABLE, Error, Host, NOBODY_TABLE, PROVIDER_INTERFACE, PROVIDER_TABLE, ROUTING_TABLE,
    netlink::or_gone, nft, provider::restore_settings, shaping::intermediate_name,
};

impl Host {
    /// Removes our rules, routes, links, changed settings, firewall tables and eBPF pins. Says what it removed, goes on
    /// after an error and reports each; nothing to remove is an empty answer.
    ///
    /// The firewall goes last: nothing is open while something of ours still carries traffic.
    pub async fn cleanup(&self, bpf_directory: &Path) -> Vec<Result<String, Error>> {
        let mut report = Vec::new();
        for name in [CLIENT_INTERFACE, PROVIDER_INTERFACE] {
            report.extend(
                self.remove_link(name)
                    .await
                    .map(|removed| removed.then(|| format!("interface {name}")))
                    .transpose(),
            );
            report.extend(
                self.remove_intermediate(name)
                    .await
                    .map(|removed| removed.then(|| format!("interface {}", intermediate_name(name))))
                    .transpose(),
            );
        }
        report.extend(counted(
            self.delete_routes(&[]).await,
            &format!("routes in table {ROUTING_TABLE}"),
        ));
        report.extend(counted(
            self.set_dead_ends(&BTreeSet::new()).await,
            &format!("routes in table {NOBODY_TABLE}"),
        ));
        let rules = match self.own_rules().await {
            Ok(rules) => self.delete_rules(rules).await,
            Err(error) => Err(error),
        };
        report.extend(counted(rules, &format!("rules for table {ROUTING_TABLE}")));
        for table in [CLIENT_TABLE, PROVIDER_TABLE] {
            match restore_settings(table) {
                Ok(settings) => report.extend(settings.into_iter().map(|setting| Ok(format!("setting {setting}")))),
                Err(error) => report.push(Err(error)),
            }
        }
        for table in [CLIENT_TABLE, PROVIDER_TABLE] {
            let removed = nft::delete_table(table).map_err(|source| Error::Firewall { table, source });
            report.extend(
                removed
                    .map(|removed| removed.then(|| format!("nftables table inet {table}")))
                    .transpose(),
            );
        }
        remove_pins(bpf_directory, &mut report);
        report
    }

    /// Removes the tunnel links that a killed daemon left: one in the kernel goes on carrying its peers, and nothing ends
    /// their approvals any more. The firewall stands until they are gone. To be called before there are new ones.
    pub async fn remove_left_links(&self) -> Result<(), Error> {
        let mut result = Ok(());
        for name in [CLIENT_INTERFACE, PROVIDER_INTERFACE] {
            match self.remove_link(name).await {
                Ok(true) => tracing::info!("removed the interface {name} that an earlier run left"),
                Ok(false) => {}
                Err(error) => result = Err(error),
            }
            // Nothing is taken there any more.
            result = result.and(self.remove_intermediate(name).await.map(drop));
        }
        result
    }

    async fn remove_link(&self, name: &str) -> Result<bool, Error> {
        let Some(link) = self.link(name).await? else {
            return Ok(false);
        };
        match link.kind {
            Some(InfoKind::Tun | InfoKind::Wireguard) => {
                let removed = self.netlink().link().del(link.index).execute().await;
                or_gone(removed, format!("removing the interface {name}")).map(|()| true)
            }
            other => {
                let kind = other.map_or_else(
                    || "device without a kind".to_owned(),
                    |kind| format!("{kind:?}").to_lowercase(),
                );
                Err(Error::ForeignInterface {
                    name: name.to_owned(),
                    kind,
                })
            }
        }
    }
}

fn counted(result: Result<usize, Error>, what: &str) -> Option<Result<String, Error>> {
    result
        .map(|count| (count > 0).then(|| format!("{count} {what}")))
        .transpose()
}

fn remove_pins(directory: &Path, report: &mut Vec<Result<String, Error>>) {
    match statfs(directory) {
        Ok(stat) if stat.filesystem_type() == BPF_FS_MAGIC => {}
        Ok(_) => {
            // An empty or absent folder is what a machine without pins looks like.
            if fs::read_dir(directory).is_ok_and(|mut entries| entries.next().is_some()) {
                report.push(Err(Error::NotBpf(directory.to_owned())));
            }
            return;
        }
        Err(nix::errno::Errno::ENOENT) => return,
        Err(error) => {
            report.push(Err(Error::Pin {
                path: directory.to_owned(),
                source: error.into(),
            }));
            return;
        }
    }
    // Only folders of ours: BPF_DIRECTORY may be shared with others.
    for version in folders(directory) {
        let ours = version
            .file_name()
            .and_then(|name| name.to_str())
            .and_then(|name| name.strip_prefix('v'));
        if ours.is_none_or(|number| number.parse::<u32>().is_err()) {
            continue;
        }
        for name in [CLIENT_INTERFACE, PROVIDER_INTERFACE] {
            let folder = version.join(name);
            if folder.is_dir() {
                remove_below(&folder, report);
                report.extend(pin_removed(folder.clone(), fs::remove_dir(&folder)));
            }
        }
        // Stays while somebody else has something in it.
        if fs::remove_dir(&version).is_ok() {
            report.push(Ok(format!("eBPF pins in {}", version.display())));
        }
    }
}

fn folders(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.path())
        .filter(|path| path.is_dir() && !path.is_symlink())
        .collect()
}

/// Removes what is in a folder of a BPF file system, not the folder itself: it may be the service manager's.
fn remove_below(directory: &Path, report: &mut Vec<Result<String, Error>>) {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(source) => {
            report.push(Err(Error::Pin {
                path: directory.to_owned(),
                source,
            }));
            return;
        }
    };
    for entry in entries {
        let path = match entry {
            Ok(entry) => entry.path(),
            Err(source) => {
                report.push(Err(Error::Pin {
                    path: directory.to_owned(),
                    source,
                }));
                continue;
            }
        };
        let folder = path.symlink_metadata().is_ok_and(|data| data.is_dir());
        if folder {
            remove_below(&path, report);
        }
        let removed = if folder {
            fs::remove_dir(&path)
        } else {
            fs::remove_file(&path)
        };
        report.extend(pin_removed(path, removed));
    }
}

fn pin_removed(path: PathBuf, result: io::Result<()>) -> Option<Result<String, Error>> {
    match result {
        Ok(()) => Some(Ok(format!("eBPF pin {}", path.display()))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(source) => Some(Err(Error::Pin { path, source })),
    }
}
