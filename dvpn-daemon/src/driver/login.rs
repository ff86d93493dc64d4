//! The login to a network: what the driver does of [`dvpn_core::portal`]. The network is looked at when an attempt has
//! failed while everything is blocked, and all the time while somebody is let out.

use std::time::Instant;

use dvpn_common::status::StateName;
use dvpn_core::{
    audit::Event,
    config::Mode,
    firewall::Policy,
    portal::{Due, Ended, Portal, Verdict},
    session::Input,
};
use tokio::sync::{mpsc, oneshot};
use url::Url;

use super::{Driver, now};
use crate::{
    host::PortalOpening,
    portal::{Error, Look, Proxy, Way, look},
};

type Answer = oneshot::Sender<Result<Way, Error>>;

/// What the driver holds of it.
pub(super) struct Login {
    decided: Portal,
    /// What came of looking; nothing when there was nobody to ask.
    pub(super) looks: mpsc::Receiver<Option<Look>>,
    looked: mpsc::Sender<Option<Look>>,
    looking: bool,
    /// Who asked to be let out, and waits for the look.
    waiting: Vec<(u32, Answer)>,
    held: Option<(Proxy, Url)>,
    was: Option<StateName>,
}

impl Login {
    pub(super) fn new() -> Self {
        let (looked, looks) = mpsc::channel(1);
        Self {
            decided: Portal::default(),
            looks,
            looked,
            looking: false,
            waiting: Vec::new(),
            held: None,
            was: None,
        }
    }

    pub(super) fn due_at(&self) -> Option<Instant> {
        self.decided.due_at()
    }

    pub(super) fn decided(&self) -> &Portal {
        &self.decided
    }
}

impl Driver {
    /// Whether a browser has no way out but by the opening.
    fn is_blocking(&self) -> bool {
        let blocked = matches!(self.session.firewall(), Some(Policy::Blocked(_)));
        blocked && self.parts.config.tunnel.mode == Mode::Device
    }

    /// A user wants to log in.
    pub(super) async fn let_out(&mut self, uid: u32, done: Answer) {
        match self.login.decided.asked(uid, self.is_blocking()) {
            Err(refusal) => reply(done, Err(refusal.into())),
            Ok(Some(_standing)) => {
                let way = self.way();
                reply(done, way.ok_or(Error::NoPool));
            }
            Ok(None) => {
                self.login.waiting.push((uid, done));
                self.look_at_network().await;
            }
        }
    }

    /// One look at a time; its answer comes by the channel.
    async fn look_at_network(&mut self) {
        if self.login.looking {
            return;
        }
        let (Some(plane), Some(pool)) = (self.parts.control_plane.clone(), self.parts.pool.clone()) else {
            return self.network_looked(None).await;
        };
        self.login.looking = true;
        let (config, looked) = (self.parts.config.clone(), self.login.looked.clone());
        tokio::spawn(async move {
            let look = look(&plane, &pool, config.portal.url.as_ref(), config.pool_private).await;
            if looked.send(look).await.is_err() {
                tracing::debug!("the driver has ended; a look at the network is dropped");
            }
        });
    }

    /// What came of it.
    pub(super) async fn network_looked(&mut self, look: Option<Look>) {
        self.login.looking = false;
        let Some(look) = look else {
            for (_, done) in self.login.waiting.drain(..) {
                reply(done, Err(Error::NoPool));
            }
            return;
        };
        let before = self.login.decided.status().and_then(|status| status.sign);
        let ended = self.login.decided.looked(&look.verdict, self.is_blocking(), now());
        if let Verdict::Portal(sign) = look.verdict
            && before.is_none()
            && self.is_blocking()
        {
            tracing::warn!("this network wants a login");
            self.parts.audit.record(&Event::PortalFound { sign });
        }
        if let Some(ended) = ended {
            self.shut(ended).await;
        }
        // Whoever waits on the next attempt need not wait any longer.
        if look.verdict == Verdict::Reached && (ended.is_some() || before.is_some()) {
            self.feed(Input::NetworkChanged);
        }
        for (uid, done) in std::mem::take(&mut self.login.waiting) {
            let way = self.open(uid, &look).await;
            reply(done, way);
        }
    }

    async fn open(&mut self, uid: u32, look: &Look) -> Result<Way, Error> {
        let length = self.parts.config.portal.open_for;
        let blocking = self.is_blocking();
        let opening = self.login.decided.open(uid, blocking, &look.verdict, length, now())?;
        if let Some(way) = self.way() {
            return Ok(way);
        }
        match self.make(uid, look, opening.until).await {
            Ok(proxy) => {
                tracing::info!("user {uid} may log in to this network until {}", opening.ends_at);
                self.parts.audit.record(&Event::PortalOpened {
                    uid,
                    ends_at: opening.ends_at,
                });
                let way = Way {
                    proxy: proxy.address(),
                    page: look.login.clone(),
                    ends_at: opening.ends_at,
                };
                self.login.held = Some((proxy, look.login.clone()));
                Ok(way)
            }
            Err(error) => {
                self.login.decided.close();
                self.shut(Ended::Given).await;
                Err(error)
            }
        }
    }

    async fn make(&self, uid: u32, look: &Look, until: Instant) -> Result<Proxy, Error> {
        let plane = self.parts.control_plane.as_ref().ok_or(Error::NoPool)?;
        let servers = plane.allow_servers().await.unwrap_or_default();
        let places = look.places.clone();
        let proxy = Proxy::open(uid, places.clone(), &servers).await.map_err(Error::Proxy)?;
        let opened = self.parts.host.open_portal(PortalOpening { until, places }).await;
        opened.map_err(Error::Firewall).map(|()| proxy)
    }

    /// The standing opening's.
    fn way(&self) -> Option<Way> {
        let (proxy, page) = self.login.held.as_ref()?;
        Some(Way {
            proxy: proxy.address(),
            page: page.clone(),
            ends_at: self.login.decided.opening()?.ends_at,
        })
    }

    /// After every step of the session.
    pub(super) async fn follow_login(&mut self) {
        let state = self.session.state();
        let blocking = self.is_blocking();
        let entered = self.login.was != Some(state);
        self.login.was = Some(state);
        // Who refuses us for good has heard us.
        let answered = state == StateName::Connected || (entered && state == StateName::Blocked);
        if let Some(ended) = self.login.decided.follow(blocking, answered) {
            self.shut(ended).await;
        }
        let failed = entered && state == StateName::Backoff;
        if failed && blocking {
            self.look_at_network().await;
        }
    }

    /// The machine is on another network, or was asleep: neither the kernel's nor our own clock runs meanwhile.
    pub(super) async fn login_moved(&mut self) {
        if let Some(ended) = self.login.decided.moved() {
            self.shut(ended).await;
        }
    }

    /// At [`Login::due_at`].
    pub(super) async fn login_due(&mut self) {
        match self.login.decided.due(now()) {
            Some(Due::Close(ended)) => self.shut(ended).await,
            Some(Due::Look) => self.look_at_network().await,
            None => {}
        }
    }

    /// The daemon ends: what it opened does not wait for the kernel.
    pub(super) async fn end_login(&mut self) {
        if self.login.decided.close() {
            self.shut(Ended::Given).await;
        }
    }

    async fn shut(&mut self, reason: Ended) {
        let held = self.login.held.take();
        if let Err(error) = self.parts.host.close_portal().await {
            tracing::error!(
                "the opening for the login stays until its time is over: {}",
                crate::run::chain(&error)
            );
        }
        if held.is_some() {
            tracing::info!(?reason, "nobody is let out to log in any more");
            self.parts.audit.record(&Event::PortalClosed { reason });
        }
    }
}

fn reply(done: Answer, way: Result<Way, Error>) {
    if done.send(way).is_err() {
        tracing::debug!("a caller did not wait for the way to log in");
    }
}
