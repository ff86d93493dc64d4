//! The machine's name resolution goes through the tunnel as long as that is up, and is afterwards what it was.
//!
//! Which service or file has to be told is decided at every [`Dns::set`] (`dvpn_core::dns`). What was there before is
//! written down first, in the state directory, so that [`Dns::undo`] also undoes what a killed run did. What somebody
//! else writes meanwhile is never lost: it becomes what is put back. The guarantee that nothing is asked outside the
//! tunnel is the firewall's, not this module's.

pub(in crate::host) mod bus;
mod changes;
mod error;
mod file;
mod network_manager;
mod record;
mod resolved;
mod servers;
#[cfg(test)]
mod tests;
mod undo;

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex as StdMutex, MutexGuard, PoisonError},
    time::Duration,
};

use dvpn_core::dns::{Facts, Manager, Way, parse, render, way_of_file, ways};
use tokio::{
    sync::Mutex,
    time::{Instant, sleep},
};
use zbus::Connection;

pub use changes::Changes;
pub use error::Error;
use file::{Contents, Found};
use record::{Managed, Owner, Record, Replaced, Store};

use crate::run::chain;

const RESOLV_CONF: &str = "/etc/resolv.conf";
/// Where name servers listen.
const PORT: u16 = 53;
/// How long `NetworkManager` may take to write the file.
const WRITE_PATIENCE: Duration = Duration::from_secs(2);

/// A handle on the machine's name resolution. Cheap to clone.
#[derive(Clone)]
pub struct Dns {
    inner: Arc<Inner>,
}

struct Inner {
    resolv_conf: PathBuf,
    store: Store,
    /// One change at a time.
    turn: Mutex<()>,
    /// What was there when the last change was done.
    state: StdMutex<Option<State>>,
}

/// What [`Dns::is_disturbed`] compares with.
#[derive(Clone)]
struct State {
    /// /etc/resolv.conf, and what is read there.
    file: (Found, String),
    /// By which ways it was done.
    taken: Vec<Way>,
    /// What systemd-resolved was told of which link, and `NetworkManager` of all.
    index: u32,
    servers: Vec<IpAddr>,
}

impl Dns {
    /// Remembers in `state_directory` what it changes; nothing is read or written yet.
    pub fn open(state_directory: &Path) -> Self {
        Self::at(Path::new(RESOLV_CONF), state_directory)
    }

    fn at(resolv_conf: &Path, state_directory: &Path) -> Self {
        Self {
            inner: Arc::new(Inner {
                resolv_conf: resolv_conf.to_owned(),
                store: Store::new(state_directory),
                turn: Mutex::new(()),
                state: StdMutex::new(None),
            }),
        }
    }

    fn resolv_conf(&self) -> &Path {
        &self.inner.resolv_conf
    }

    /// Sends every look-up of the machine's programs to these servers, by way of this interface where a service can be
    /// told so. Says by which ways, the first one that works for the machine as it is now.
    ///
    /// Repeated with the same servers it changes nothing that still holds. After an error the machine may be half
    /// changed: call it again, or [`Dns::undo`].
    pub async fn set(&self, interface: &str, index: u32, servers: &[IpAddr]) -> Result<Vec<Way>, Error> {
        if servers.is_empty() {
            return Err(Error::NoServer);
        }
        let _turn = self.inner.turn.lock().await;
        let mut record = self.inner.store.load()?.unwrap_or_else(Record::new);
        record.interface = interface.to_owned();
        record.index = index;
        record.servers = servers.to_vec();
        let bus = self.bus().await;
        let taken = self.take_ways(bus.as_ref(), &mut record).await;
        let file = self.observe()?;
        *self.state() = Some(State {
            file,
            taken: taken.as_ref().cloned().unwrap_or_default(),
            index,
            servers: servers.to_vec(),
        });
        taken
    }

    async fn bus(&self) -> Option<Connection> {
        match bus::connect().await {
            Ok(bus) => Some(bus),
            Err(error) => {
                tracing::debug!("{}", chain(&error));
                None
            }
        }
    }

    async fn take_ways(&self, bus: Option<&Connection>, record: &mut Record) -> Result<Vec<Way>, Error> {
        let (target, text) = self.before(record)?;
        let mut facts = Facts {
            target: target.as_deref(),
            text: &text,
            ..Facts::default()
        };
        let mut modes = None;
        if let Some(bus) = bus {
            facts.resolved = bus::runs(bus, resolved::SERVICE).await;
            if bus::runs(bus, network_manager::SERVICE).await {
                modes = network_manager::modes(bus).await.ok();
            }
        }
        facts.network_manager = modes.as_ref().map(|(mode, rc_manager)| Manager { mode, rc_manager });
        let mut taken = Vec::new();
        let mut wanted = ways(&facts);
        if !wanted.iter().any(|way| *way != Way::Resolved) {
            // Only if programs can be sent to systemd-resolved is it enough.
            match self.set_resolved(bus, record).await {
                Ok(()) => {
                    if let Some(bus) = self.hollow(record).await {
                        resolved::read_again(&bus).await;
                    }
                    self.undo_file(record)?;
                    return Ok(vec![Way::Resolved]);
                }
                Err(error) => {
                    tracing::warn!(
                        "systemd-resolved is not told the tunnel's name servers: {}",
                        chain(&error)
                    );
                    wanted = vec![way_of_file(&facts)];
                }
            }
        }
        for way in wanted {
            match way {
                Way::Resolved => match self.set_resolved(bus, record).await {
                    Ok(()) => taken.push(way),
                    Err(error) => {
                        tracing::warn!(
                            "systemd-resolved is not told the tunnel's name servers: {}",
                            chain(&error)
                        );
                    }
                },
                Way::NetworkManager => match self.set_manager(bus, record, &facts).await {
                    Ok(()) => taken.push(way),
                    Err(error) => {
                        tracing::warn!(
                            "NetworkManager does not take the tunnel's name servers: {}",
                            chain(&error)
                        );
                        self.set_file(record, &text, Way::File)?;
                        taken.push(Way::File);
                    }
                },
                Way::Resolvconf | Way::Openresolv | Way::File => {
                    self.set_file(record, &text, way)?;
                    taken.push(way);
                }
            }
        }
        Ok(taken)
    }

    /// What /etc/resolv.conf is without us: where it leads, and what is read there.
    fn before(&self, record: &Record) -> Result<(Option<PathBuf>, String), Error> {
        let path = self.resolv_conf();
        let found = file::look(path)?;
        let before = match (record.owner_of(&found), &record.file) {
            (Owner::Theirs, _) => Some(&found),
            (Owner::Ours | Owner::Edited, Some(replaced)) => replaced.before.as_ref(),
            (Owner::Ours | Owner::Edited, None) => None,
        };
        Ok(before.map_or((None, String::new()), |before| {
            (before.target(path), before.text_behind(path))
        }))
    }

    async fn set_resolved(&self, bus: Option<&Connection>, record: &mut Record) -> Result<(), Error> {
        let bus = match bus {
            Some(bus) => bus,
            // Says why there is none.
            None => &bus::connect().await?,
        };
        if !record.resolved || !resolved::is_set(bus, record.index, &record.servers).await {
            record.resolved = true;
            self.inner.store.save(record)?;
            resolved::set(bus, record.index, &record.servers).await?;
        }
        self.inner.store.save(record)
    }

    async fn set_manager(&self, bus: Option<&Connection>, record: &mut Record, facts: &Facts<'_>) -> Result<(), Error> {
        let bus = match bus {
            Some(bus) => bus,
            None => &bus::connect().await?,
        };
        let now = network_manager::global(bus).await?;
        let servers = record.servers.clone();
        let is_ours = |managed: &Managed| managed.ours.iter().any(|ours| network_manager::is_set(&now, ours));
        match &mut record.network_manager {
            Some(managed) if is_ours(managed) => managed.ours.push(servers.clone()),
            // The same servers for all names, by somebody else's wish: nothing to do, and nothing to undo.
            other if network_manager::is_set(&now, &servers) => *other = None,
            // Whoever said this, also after us: it comes back.
            other => {
                *other = Some(Managed {
                    before: now.clone(),
                    ours: vec![servers.clone()],
                });
            }
        }
        if !network_manager::is_set(&now, &servers) {
            self.inner.store.save(record)?;
            network_manager::set(bus, &servers).await?;
        }
        if let Some(managed) = &mut record.network_manager {
            managed.ours = vec![servers.clone()];
        }
        self.inner.store.save(record)?;
        // What it runs between itself and programs is told over its own channels.
        if facts.network_manager.is_some_and(|manager| manager.mode == "default") {
            self.written(&servers).await?;
        }
        self.undo_file(record).map(drop)
    }

    /// Until programs read these servers and no others.
    async fn written(&self, servers: &[IpAddr]) -> Result<(), Error> {
        let deadline = Instant::now() + WRITE_PATIENCE;
        loop {
            let (_, text) = self.observe()?;
            if parse(&text)
                .servers
                .iter()
                .map(|server| server.address)
                .eq(servers.iter().copied())
            {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(Error::NotWritten {
                    path: self.resolv_conf().to_owned(),
                });
            }
            sleep(Duration::from_millis(20)).await;
        }
    }

    fn set_file(&self, record: &mut Record, before: &str, way: Way) -> Result<(), Error> {
        let path = self.resolv_conf();
        let text = render(&record.servers, before, way);
        let found = file::look(path)?;
        let whole = |found: &Found| matches!(found, Found::File(contents) if contents.bytes == text.as_bytes());
        match (record.owner_of(&found), &mut record.file) {
            (Owner::Ours, Some(_)) if whole(&found) => return self.inner.store.save(record),
            (Owner::Ours, Some(replaced)) => replaced.ours.push(text.clone()),
            (Owner::Edited, replaced) => {
                let kept = self.inner.store.keep_edited(&found)?;
                tracing::warn!(
                    "somebody changed our {}; that version is kept as {}: what should outlast the tunnel belongs into the \
                     file as it is without it",
                    path.display(),
                    kept.display()
                );
                replaced
                    .get_or_insert_with(|| Replaced {
                        before: None,
                        ours: Vec::new(),
                    })
                    .ours
                    .push(text.clone());
            }
            (Owner::Ours | Owner::Theirs, _) => {
                record.file = Some(Replaced {
                    before: Some(found),
                    ours: vec![text.clone()],
                });
            }
        }
        self.inner.store.save(record)?;
        file::put(path, &Found::File(Contents::public(&text)))?;
        if let Some(replaced) = &mut record.file {
            replaced.ours = vec![text];
        }
        self.inner.store.save(record)
    }

    /// What is there now, and what programs read there.
    fn observe(&self) -> Result<(Found, String), Error> {
        let found = file::look(self.resolv_conf())?;
        let text = found.text_behind(self.resolv_conf());
        Ok((found, text))
    }

    fn state(&self) -> MutexGuard<'_, Option<State>> {
        self.inner.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether what was set no longer holds, or what was to be undone may be undone now.
    async fn is_disturbed(&self, restarted: bool) -> bool {
        let _turn = self.inner.turn.lock().await;
        let Some(state) = self.state().clone() else {
            return restarted && self.inner.store.exists();
        };
        if restarted {
            return true;
        }
        match self.observe() {
            Ok(file) if file == state.file => {}
            Ok(_) => return true,
            Err(error) => tracing::debug!("{}", chain(&error)),
        }
        let told = |way| state.taken.contains(&way);
        if !told(Way::Resolved) && !told(Way::NetworkManager) {
            return false;
        }
        // Without a bus they cannot be told anything.
        let Some(bus) = self.bus().await else { return false };
        (told(Way::Resolved) && !resolved::is_set(&bus, state.index, &state.servers).await)
            || (told(Way::NetworkManager)
                && !network_manager::global(&bus)
                    .await
                    .is_ok_and(|now| network_manager::is_set(&now, &state.servers)))
    }
}
