//! `org.dvpn.Daemon1` on the system bus.
//!
//! The caller is the user that the bus daemon names for the sender's unique name; a process id never decides who that is,
//! and any doubt denies. The object exists before the name is requested, so nobody ever meets an empty name. Properties are
//! broadcast to everybody and hold nothing private: details are in the replies of `Status`, `Payments` and `Logs`.

use std::collections::HashMap;

use dvpn_common::{
    dbus::{NAME, PATH, portal},
    status::{LineStatus, Status},
};
use dvpn_core::leak::Row;
use tokio::sync::watch;
use zbus::{
    Connection, connection, fdo,
    fdo::RequestNameFlags,
    message::Header,
    object_server::InterfaceRef,
    zvariant::{OwnedValue, Value},
};

use super::{Caller, Control, Error, line_word, origin};

impl From<Error> for fdo::Error {
    fn from(error: Error) -> Self {
        let text = error.to_string();
        match error {
            Error::Denied { .. } => Self::AccessDenied(text),
            Error::Argument(_) => Self::InvalidArgs(text),
            Error::Ending | Error::NoProvider | Error::LeakTest(_) | Error::Portal(_) | Error::Payment(_) => {
                Self::Failed(text)
            }
        }
    }
}

/// The one object.
pub struct Daemon {
    control: Control,
}

/// Resolves the sender to a user; every error is a denial.
async fn caller(header: &Header<'_>, connection: &Connection) -> fdo::Result<Caller> {
    let denied = || fdo::Error::AccessDenied("the bus does not say who is calling".into());
    let sender = header.sender().ok_or_else(denied)?.to_owned();
    let bus = fdo::DBusProxy::new(connection).await?;
    let uid = bus
        .get_connection_unix_user(sender.into())
        .await
        .ok()
        .ok_or_else(denied)?;
    Ok(Caller { uid })
}

/// A guess, which decides nothing but whether a start has to be confirmed.
async fn comes_over_ssh(header: &Header<'_>, connection: &Connection) -> bool {
    let asked = async {
        let sender = header.sender()?.to_owned();
        let bus = fdo::DBusProxy::new(connection).await.ok()?;
        bus.get_connection_unix_process_id(sender.into()).await.ok()
    };
    match asked.await {
        Some(pid) => tokio::task::spawn_blocking(move || origin::is_over_ssh(pid))
            .await
            .unwrap_or(false),
        None => false,
    }
}

#[zbus::interface(name = "org.dvpn.Daemon1")]
impl Daemon {
    /// Begins a session and stores the wish for one.
    async fn start(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> fdo::Result<()> {
        let caller = caller(&header, connection).await?;
        let from_afar = comes_over_ssh(&header, connection).await;
        Ok(self.control.start(caller, from_afar).await?)
    }

    /// Ends the session and stores the wish for none.
    async fn stop(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> fdo::Result<()> {
        Ok(self.control.stop(caller(&header, connection).await?).await?)
    }

    /// Limits the providers: ids or `region:NAME`; two empty lists lift the limits.
    async fn choose(
        &self,
        only: Vec<String>,
        exclude: Vec<String>,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> fdo::Result<()> {
        Ok(self
            .control
            .choose(caller(&header, connection).await?, &only, &exclude)
            .await?)
    }

    /// As a provider: true takes no new clients and keeps those there are, false takes them again.
    async fn drain(
        &self,
        drain: bool,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> fdo::Result<()> {
        Ok(self.control.drain(caller(&header, connection).await?, drain)?)
    }

    /// The last `lines` lines of the log.
    async fn logs(
        &self,
        lines: u32,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> fdo::Result<Vec<String>> {
        Ok(self.control.logs(caller(&header, connection).await?, lines)?)
    }

    /// Begins a checkout or returns the open one: what to pay, where, until when. Never a token.
    async fn payments(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> fdo::Result<HashMap<String, OwnedValue>> {
        let checkout = self.control.payments(caller(&header, connection).await?).await?;
        let mut reply = HashMap::new();
        for (key, value) in checkout.fields() {
            let value = Value::from(value)
                .try_into_owned()
                .map_err(|error| fdo::Error::Failed(error.to_string()))?;
            reply.insert(key.to_owned(), value);
        }
        Ok(reply)
    }

    /// Lets the browser of this user (a Unix uid) out beside the tunnel for a while, to log in to a network that wants
    /// that: `proxy`, the SOCKS5 proxy for it, `page`, what to open, and `ends_at`, Unix seconds. It ends earlier once the
    /// pool can be reached.
    async fn portal(
        &self,
        uid: u32,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> fdo::Result<HashMap<String, OwnedValue>> {
        let way = self.control.portal(caller(&header, connection).await?, uid).await?;
        let fields = [
            (portal::PROXY, Value::from(format!("socks5://{}", way.proxy))),
            (portal::PAGE, Value::from(way.page.as_str())),
            (portal::ENDS_AT, Value::from(way.ends_at.as_second())),
        ];
        let owned = fields
            .into_iter()
            .map(|(name, value)| Ok((name.to_owned(), value.try_into_owned()?)));
        owned
            .collect::<Result<_, zbus::zvariant::Error>>()
            .map_err(|error| fdo::Error::Failed(error.to_string()))
    }

    /// Tests whether anything leaves beside the tunnel: a name, a verdict (`good`, `not_promised`, `unknown`, `leak`) and
    /// the reason in words for everything that was looked at. At most three seconds.
    async fn leak_test(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> fdo::Result<Vec<(String, String, String)>> {
        let rows = self.control.leak_test(caller(&header, connection).await?).await?;
        let written = |row: Row| (row.name.to_owned(), row.verdict.as_str().to_owned(), row.detail);
        Ok(rows.into_iter().map(written).collect())
    }

    /// The whole status as JSON.
    async fn status(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> fdo::Result<String> {
        Ok(self.control.status_json(caller(&header, connection).await?)?)
    }

    /// Ends the daemon; what blocks traffic goes on blocking it.
    async fn exit(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> fdo::Result<()> {
        Ok(self.control.exit(caller(&header, connection).await?).await?)
    }

    /// Version of the daemon.
    #[zbus(property(emits_changed_signal = "const"))]
    #[expect(clippy::unused_self, reason = "a D-Bus property belongs to an object")]
    fn version(&self) -> String {
        env!("CARGO_PKG_VERSION").to_owned()
    }

    /// Name of the session's state.
    #[zbus(property)]
    fn state(&self) -> String {
        self.control.status.borrow().state.as_str().to_owned()
    }

    /// Since when it is in that state, Unix seconds.
    #[zbus(property)]
    fn since(&self) -> i64 {
        self.control.status.borrow().since.as_second()
    }

    /// Where the line's rates come from, or how far their measurement is: `set`, `measured`, `unmeasured`, `measuring 40 %`.
    #[zbus(property)]
    fn line(&self) -> String {
        self.control.line_word()
    }

    /// What goes through the tunnel: `app` or `device`.
    #[zbus(property(emits_changed_signal = "const"))]
    fn mode(&self) -> String {
        self.control.status.borrow().mode.as_str().to_owned()
    }

    /// Whether nothing passes beside the tunnel.
    #[zbus(property)]
    fn blocking(&self) -> bool {
        self.control.status.borrow().blocking
    }

    /// Whether the network wants a login: `none`, `found`, or `open` while somebody is let out for it.
    #[zbus(property)]
    fn portal_state(&self) -> String {
        login_of(&self.control.status.borrow()).to_owned()
    }

    /// Whether a restart goes on with a session.
    #[zbus(property)]
    fn autostart(&self) -> bool {
        self.control.status.borrow().autostart
    }
}

fn login_of(status: &Status) -> &'static str {
    match &status.portal {
        None => "none",
        Some(portal) if portal.open_until.is_some() => "open",
        Some(_) => "found",
    }
}

/// Serves the object, takes the name, and announces changes until the connection ends. Returns the connection; dropping
/// it gives the name back.
pub async fn serve(control: Control) -> zbus::Result<Connection> {
    let (status, line) = (control.status(), control.line.clone());
    let connection = connection::Builder::system()?
        .serve_at(PATH, Daemon { control })?
        .build()
        .await?;
    connection
        .request_name_with_flags(NAME, RequestNameFlags::DoNotQueue.into())
        .await?;
    let interface = connection.object_server().interface::<_, Daemon>(PATH).await?;
    if let Some(line) = line {
        tokio::spawn(announce_line(interface.clone(), line));
    }
    tokio::spawn(announce(interface, status));
    Ok(connection)
}

/// The same for the line.
async fn announce_line(interface: InterfaceRef<Daemon>, mut line: watch::Receiver<LineStatus>) {
    let mut last = line_word(&line.borrow_and_update());
    while line.changed().await.is_ok() {
        let now = line_word(&line.borrow_and_update());
        if now == last {
            continue;
        }
        last = now;
        let sent = interface.get().await.line_changed(interface.signal_emitter()).await;
        if let Err(error) = sent {
            tracing::warn!("announcing a change on the bus: {error}");
            return;
        }
    }
}

/// Emits `PropertiesChanged` for the session.
async fn announce(interface: InterfaceRef<Daemon>, mut status: watch::Receiver<Status>) {
    let mut last = status.borrow_and_update().clone();
    while status.changed().await.is_ok() {
        let now = status.borrow_and_update().clone();
        let emitter = interface.signal_emitter();
        let daemon = interface.get().await;
        let mut sent = Ok(());
        if now.state != last.state {
            sent = sent.and(daemon.state_changed(emitter).await);
        }
        if now.since != last.since {
            sent = sent.and(daemon.since_changed(emitter).await);
        }
        if now.blocking != last.blocking {
            sent = sent.and(daemon.blocking_changed(emitter).await);
        }
        if login_of(&now) != login_of(&last) {
            sent = sent.and(daemon.portal_state_changed(emitter).await);
        }
        if now.autostart != last.autostart {
            sent = sent.and(daemon.autostart_changed(emitter).await);
        }
        if let Err(error) = sent {
            tracing::warn!("announcing a change on the bus: {error}");
            return;
        }
        last = now;
    }
}
