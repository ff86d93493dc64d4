//! Control: one set of commands and one status, served over D-Bus ([`dbus`]) and HTTP ([`http`]).
//!
//! Both servers are thin: they identify the caller and call [`Control`]. Whatever changes the session goes to the
//! driver as a [`Command`]; whatever is read comes from the one `watch` of [`Status`].

pub mod dbus;
mod denials;
pub mod http;
pub mod metrics;
mod origin;
pub mod payments;

use dvpn_common::status::{LineSource, LineStatus, NodeStatus, Status};
use dvpn_core::{audit::Event, leak::Row, session::Choice};
use jiff::Timestamp;
use tokio::sync::{mpsc, oneshot, watch};

use crate::{
    audit::Audit,
    leak_test::Tester,
    logs::Tail,
    portal::{self, Way},
    run::chain,
};
use denials::Denials;
use payments::{Checkout, Payments};

/// Most log lines one call returns.
pub const MAX_LOG_LINES: u32 = 500;

/// Who calls, as the transport vouches for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caller {
    /// The Unix user, from the bus daemon.
    pub uid: u32,
}

/// What the driver is asked to do. The answer comes when it is done, not when it is heard.
#[derive(Debug)]
pub enum Command {
    /// Begin a session; true when it is asked for over SSH.
    Start(bool, oneshot::Sender<()>),
    /// End it.
    Stop(oneshot::Sender<()>),
    /// Use only these providers; a session with another one ends for one of these.
    Choose(Choice, oneshot::Sender<()>),
    /// Let this user's browser out to log in to the network.
    Portal(u32, oneshot::Sender<Result<Way, portal::Error>>),
    /// The token changed.
    TokenChanged,
    /// End the daemon; what blocks goes on blocking.
    Exit(oneshot::Sender<()>),
}

/// Why a command was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not this caller.
    #[error("user {uid} may not do this: run it as root")]
    Denied {
        /// Who asked.
        uid: u32,
    },
    /// The driver is gone: the daemon is ending.
    #[error("the daemon is shutting down: start it again with systemctl start dvpn")]
    Ending,
    /// An argument does not read.
    #[error("{0}")]
    Argument(String),
    /// Nothing to drain.
    #[error("this install is no provider: set NODE_REGISTER_ENABLED=true and NODE_ACCEPT_TERMS=true")]
    NoProvider,
    /// No leak test.
    #[error("{0}")]
    LeakTest(String),
    /// Nobody is let out.
    #[error("{0}")]
    Portal(String),
    /// The checkout did not begin.
    #[error(transparent)]
    Payment(#[from] payments::Error),
}

/// The one handle both servers share.
#[derive(Clone)]
pub struct Control {
    commands: mpsc::Sender<Command>,
    status: watch::Receiver<Status>,
    tail: Tail,
    audit: Audit,
    denials: Denials,
    payments: Payments,
    provider: Provider,
    tester: Tester,
    line: Option<watch::Receiver<LineStatus>>,
    own_uid: u32,
}

/// The provider side, as far as it is seen and steered from here.
#[derive(Clone)]
pub struct Provider {
    /// How it is; nothing while this install is none.
    pub status: watch::Receiver<Option<NodeStatus>>,
    /// The owner's hand: true takes no new clients. Forgotten when the daemon ends.
    pub drain: watch::Sender<bool>,
}

impl Provider {
    /// No provider yet, and where one is shown once there is.
    pub fn none_yet() -> (Self, watch::Sender<Option<NodeStatus>>) {
        let (view, status) = watch::channel(None);
        let drain = watch::Sender::new(false);
        (Self { status, drain }, view)
    }
}

/// What calls lead to besides the driver.
pub struct Services {
    /// Checkouts.
    pub payments: Payments,
    /// The provider side.
    pub provider: Provider,
    /// Leak tests.
    pub tester: Tester,
}

impl Control {
    /// Makes the handle; `own_uid` is the user the daemon runs as, who may control it like root.
    pub fn new(
        commands: mpsc::Sender<Command>,
        status: watch::Receiver<Status>,
        tail: Tail,
        audit: Audit,
        services: Services,
        own_uid: u32,
    ) -> Self {
        let Services {
            payments,
            provider,
            tester,
        } = services;
        Self {
            commands,
            status,
            tail,
            denials: Denials::new(audit.clone()),
            audit,
            payments,
            provider,
            tester,
            line: None,
            own_uid,
        }
    }

    /// Shows the line too.
    #[must_use]
    pub fn with_line(self, line: watch::Receiver<LineStatus>) -> Self {
        Self {
            line: Some(line),
            ..self
        }
    }

    /// The status, as a channel that wakes on change.
    pub fn status(&self) -> watch::Receiver<Status> {
        self.status.clone()
    }

    /// Begins a session; `from_afar` when the caller sits at another machine.
    pub async fn start(&self, caller: Caller, from_afar: bool) -> Result<(), Error> {
        self.authorize(caller, "start")?;
        self.send(|done| Command::Start(from_afar, done)).await
    }

    /// Ends the session.
    pub async fn stop(&self, caller: Caller) -> Result<(), Error> {
        self.authorize(caller, "stop")?;
        self.send(Command::Stop).await
    }

    /// Narrows the providers: each entry is an id or `region:NAME`; two empty lists lift every limit.
    pub async fn choose(&self, caller: Caller, only: &[String], exclude: &[String]) -> Result<(), Error> {
        self.authorize(caller, "choose")?;
        let choice = dvpn_core::config::parse_choice(only, exclude).map_err(Error::Argument)?;
        self.send(|done| Command::Choose(choice, done)).await
    }

    /// Lets a user's browser out beside the tunnel for a while, to log in to the network.
    pub async fn portal(&self, caller: Caller, uid: u32) -> Result<Way, Error> {
        self.authorize(caller, "portal")?;
        let (done, wait) = oneshot::channel();
        self.commands
            .send(Command::Portal(uid, done))
            .await
            .ok()
            .ok_or(Error::Ending)?;
        let way = wait.await.ok().ok_or(Error::Ending)?;
        way.map_err(|error| Error::Portal(chain(&error)))
    }

    /// Tests whether anything leaves beside the tunnel.
    pub async fn leak_test(&self, caller: Caller) -> Result<Vec<Row>, Error> {
        self.authorize(caller, "leak_test")?;
        let tested = self.tester.run().await;
        tested.map_err(|error| Error::LeakTest(chain(&error)))
    }

    /// Ends the daemon. What blocks traffic goes on blocking it.
    pub async fn exit(&self, caller: Caller) -> Result<(), Error> {
        self.authorize(caller, "exit")?;
        self.send(Command::Exit).await
    }

    /// Stops or starts taking new clients as a provider; those there stay until their approvals end.
    pub fn drain(&self, caller: Caller, drain: bool) -> Result<(), Error> {
        self.authorize(caller, if drain { "drain" } else { "undrain" })?;
        if self.provider.status.borrow().is_none() {
            return Err(Error::NoProvider);
        }
        self.provider.drain.send_replace(drain);
        Ok(())
    }

    /// The last `lines` log lines.
    pub fn logs(&self, caller: Caller, lines: u32) -> Result<Vec<String>, Error> {
        self.authorize(caller, "logs")?;
        Ok(self.tail.last(usize::try_from(lines.min(MAX_LOG_LINES)).unwrap_or(0)))
    }

    /// Begins a checkout, or returns the one that is open.
    pub async fn payments(&self, caller: Caller) -> Result<Checkout, Error> {
        self.authorize(caller, "payments")?;
        let mut checkout = self.payments.checkout(self.commands.clone()).await?;
        let paid_until = self.status.borrow().paid_until;
        checkout.paid_until = paid_until.filter(|end| *end > Timestamp::now());
        Ok(checkout)
    }

    /// The whole status, as JSON.
    pub fn status_json(&self, caller: Caller) -> Result<String, Error> {
        self.authorize(caller, "status")?;
        let mut status = self.status.borrow().clone();
        status.node.clone_from(&self.provider.status.borrow());
        status.line = self.line.as_ref().map(|line| line.borrow().clone());
        serde_json::to_string(&status).map_err(|error| Error::Argument(error.to_string()))
    }

    fn line_word(&self) -> String {
        let word = self.line.as_ref().map(|line| line_word(&line.borrow()));
        word.unwrap_or_else(|| LineSource::Unmeasured.as_str().to_owned())
    }

    fn authorize(&self, caller: Caller, command: &str) -> Result<(), Error> {
        let allowed = caller.uid == 0 || caller.uid == self.own_uid;
        if !allowed {
            self.denials.record(caller.uid, command);
            return Err(Error::Denied { uid: caller.uid });
        }
        // Reading changes nothing; only a denied read is worth a record.
        if !matches!(command, "logs" | "status") {
            self.audit.record(&Event::Command {
                command: command.to_owned(),
                uid: Some(caller.uid),
                allowed,
            });
        }
        Ok(())
    }

    async fn send(&self, command: impl FnOnce(oneshot::Sender<()>) -> Command) -> Result<(), Error> {
        let (done, wait) = oneshot::channel();
        self.commands.send(command(done)).await.ok().ok_or(Error::Ending)?;
        wait.await.ok().ok_or(Error::Ending)
    }
}

/// The line in a word that may be broadcast: no figures.
fn line_word(line: &LineStatus) -> String {
    match line.measuring_percent {
        Some(percent) => format!("measuring {percent} %"),
        None => line.source.as_str().to_owned(),
    }
}
