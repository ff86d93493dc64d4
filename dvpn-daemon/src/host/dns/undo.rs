//! Putting back what was there.

use dvpn_core::{
    dns::{Way, render},
    text::excerpt,
};
use zbus::Connection;

use super::{
    Dns, Error, bus,
    file::{self, Contents, Found},
    network_manager,
    record::{Owner, Record, Replaced},
    resolved,
};
use crate::run::chain;

impl Dns {
    /// Puts back what was changed, also by an earlier run that was killed. Says what, goes on after an error and reports
    /// each; nothing to undo is an empty answer. What failed is known the next time.
    pub async fn undo(&self) -> Vec<Result<String, Error>> {
        let _turn = self.inner.turn.lock().await;
        *self.state() = None;
        let mut record = match self.inner.store.load() {
            Ok(Some(record)) => record,
            Ok(None) => return self.lost().err().map(Err).into_iter().collect(),
            Err(error) => return vec![Err(error)],
        };
        let mut report = Vec::new();
        let hollow = self.hollow(&mut record).await;
        report.extend(undo_resolved(&mut record).await.transpose());
        if let Some(bus) = hollow {
            resolved::read_again(&bus).await;
        }
        report.extend(self.undo_file(&mut record).transpose());
        report.extend(undo_manager(&mut record).await.transpose());
        report.extend(self.inner.store.save(&record).err().map(Err));
        report
    }

    /// Has our file name nobody if systemd-resolved runs and a link comes back in its place. It reads a resolv.conf that is
    /// not its own, and would go on asking whom it found there when a link to its own files follows.
    pub(super) async fn hollow(&self, record: &mut Record) -> Option<Connection> {
        let leads_elsewhere = |replaced: &Replaced| matches!(replaced.before, Some(Found::Link(_)));
        if !record.file.as_ref().is_some_and(leads_elsewhere) {
            return None;
        }
        let bus = self.bus().await?;
        if !bus::runs(&bus, resolved::SERVICE).await {
            return None;
        }
        match self.put_hollow(record) {
            Ok(()) => Some(bus),
            // Putting the link back fails as this did, and says so.
            Err(error) => {
                tracing::debug!("{}", chain(&error));
                None
            }
        }
    }

    fn put_hollow(&self, record: &mut Record) -> Result<(), Error> {
        let path = self.resolv_conf();
        // What somebody wrote into it is still to be kept.
        if record.owner_of(&file::look(path)?) != Owner::Ours {
            return Ok(());
        }
        let text = render(&[], "", Way::File);
        if let Some(replaced) = &mut record.file {
            replaced.ours.push(text.clone());
        }
        self.inner.store.save(record)?;
        file::put(path, &Found::File(Contents::public(&text)))
    }

    /// An error if our file is there without a record. Whatever else is there is none of our business.
    fn lost(&self) -> Result<(), Error> {
        let path = self.resolv_conf().to_owned();
        let ours = |found: Found| Record::new().owner_of(&found) != Owner::Theirs;
        if file::look(&path).is_ok_and(ours) {
            Err(Error::Lost { path })
        } else {
            Ok(())
        }
    }

    /// Puts the file back if ours is there. One that somebody else wrote since stays, and ours is forgotten.
    pub(super) fn undo_file(&self, record: &mut Record) -> Result<Option<String>, Error> {
        let Some(replaced) = &record.file else { return Ok(None) };
        let path = self.resolv_conf();
        let found = file::look(path)?;
        let owner = record.owner_of(&found);
        let said = match (owner, &replaced.before) {
            (Owner::Ours | Owner::Edited, None) => return Err(Error::Lost { path: path.to_owned() }),
            (Owner::Ours, Some(before)) => {
                file::put(path, before)?;
                Some(format!("the tunnel's name servers from {}", path.display()))
            }
            (Owner::Edited, Some(before)) => {
                let kept = self.inner.store.keep_edited(&found)?;
                file::put(path, before)?;
                Some(format!(
                    "the tunnel's name servers from {}; somebody had changed that file, and their version is kept as {}",
                    path.display(),
                    kept.display()
                ))
            }
            // Not yet replaced, or put back already.
            (Owner::Theirs, Some(before)) if found == *before => None,
            (Owner::Theirs, Some(before @ Found::File(contents))) if matches!(&found, Found::File(now) if file::is_whole(&now.bytes, &contents.bytes)) =>
            {
                // Killed while it was written in place.
                file::put(path, before)?;
                None
            }
            (Owner::Theirs, _) => Some(format!(
                "our copy of what {} was: somebody else has written it since, and it stays as it is",
                path.display()
            )),
        };
        record.file = None;
        self.inner.store.save(record)?;
        Ok(said)
    }
}

async fn undo_resolved(record: &mut Record) -> Result<Option<String>, Error> {
    if !record.resolved {
        return Ok(None);
    }
    // With the link went what systemd-resolved knew of it, and its number may be another's now.
    let index = nix::net::if_::if_nametoindex(record.interface.as_str());
    if index == Ok(record.index) {
        let bus = bus::connect().await?;
        if bus::runs(&bus, resolved::SERVICE).await {
            resolved::revert(&bus, record.index).await?;
        }
    }
    record.resolved = false;
    Ok(Some(format!(
        "the name servers of {} from systemd-resolved",
        excerpt(&record.interface)
    )))
}

async fn undo_manager(record: &mut Record) -> Result<Option<String>, Error> {
    let Some(managed) = &record.network_manager else {
        return Ok(None);
    };
    let bus = bus::connect().await;
    let running = match &bus {
        Ok(bus) => bus::runs(bus, network_manager::SERVICE).await.then_some(bus),
        Err(_) => None,
    };
    let said = match running {
        Some(bus) if network_manager::restore(bus, managed).await? => "the tunnel's name servers from NetworkManager",
        Some(_) => {
            "our copy of NetworkManager's configuration: somebody else has changed it since, and it stays as it is"
        }
        None if network_manager::may_keep() => return Err(Error::ManagerAway),
        None => "our copy of NetworkManager's configuration, which is gone",
    };
    record.network_manager = None;
    Ok(Some(said.to_owned()))
}
