//! A running daemon as its user meets it: `/health`, D-Bus, the SOCKS5 proxy.

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use dvpn_common::status::{StateName, Status};

use crate::{
    bus::BusAddress,
    http,
    namespace::Namespace,
    network::{WEB, WEB_NAME},
    process::wait_for,
    socks::{self, Target},
};

/// Where every daemon of the local network serves its proxy.
pub const SOCKS5: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 1080);
/// Where it serves `/health` and `/metrics`.
pub const CONTROL: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 9808);
const TIMEOUT: Duration = Duration::from_secs(5);

/// A way to ask one running daemon.
pub struct Client {
    namespace: Namespace,
    bus: BusAddress,
}

impl Client {
    /// For the daemon in the namespace of this name and on this bus.
    pub fn new(namespace: &str, bus: BusAddress) -> Result<Self> {
        Ok(Self {
            namespace: Namespace::open(namespace)?,
            bus,
        })
    }

    /// Where it lives.
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// Its bus.
    pub fn bus(&self) -> &BusAddress {
        &self.bus
    }

    /// `/health`: the HTTP status and the document.
    pub fn health(&self) -> Result<(u16, Status)> {
        let (code, text) = self.control("/health")?;
        let status = serde_json::from_str(&text).with_context(|| format!("reading /health: {text:?}"))?;
        Ok((code, status))
    }

    /// A page of the control listener.
    pub fn control(&self, path: &str) -> Result<(u16, String)> {
        let stream = self.namespace.connect(CONTROL, TIMEOUT)?;
        stream.set_read_timeout(Some(TIMEOUT)).context("setting a timeout")?;
        http::get_text(stream, "127.0.0.1", path)
    }

    /// Waits until `/health` shows what is wanted; the last document is part of the error.
    pub fn wait_status(&self, what: &str, patience: Duration, wanted: impl Fn(&Status) -> bool) -> Result<Status> {
        let mut last = None;
        let outcome = wait_for(what, patience, || {
            let Ok((_, status)) = self.health() else {
                return Ok(None);
            };
            if wanted(&status) {
                return Ok(Some(status));
            }
            last = Some(status);
            Ok(None)
        });
        outcome.with_context(|| match &last {
            Some(status) => format!(
                "state {}, payment {:?}, problem {:?}, provider {:?}",
                status.state.as_str(),
                status.payment,
                status.problem,
                status.provider.as_ref().map(|provider| &provider.id)
            ),
            None => "the daemon does not answer on /health".to_owned(),
        })
    }

    /// Waits for a state.
    pub fn wait_state(&self, state: StateName, patience: Duration) -> Result<Status> {
        self.wait_status(&format!("the state {}", state.as_str()), patience, |status| {
            status.state == state
        })
    }

    /// D-Bus `Start`.
    pub fn start(&self) -> Result<()> {
        self.bus.call("Start", &[]).map(drop)
    }

    /// D-Bus `Stop`.
    pub fn stop(&self) -> Result<()> {
        self.bus.call("Stop", &[]).map(drop)
    }

    /// `Start`, then waits until traffic may flow.
    pub fn connect(&self, patience: Duration) -> Result<Status> {
        self.start()?;
        self.wait_state(StateName::Connected, patience)
    }

    /// `Stop`, then waits until the session is over.
    pub fn disconnect(&self, patience: Duration) -> Result<Status> {
        self.stop()?;
        self.wait_state(StateName::Disconnected, patience)
    }

    /// D-Bus `Payments`: the open checkout's id.
    pub fn begin_checkout(&self) -> Result<String> {
        let id = self.checkout_field("session_id")?;
        id.context("Payments answered without a session_id")
    }

    /// What Payments says under this name, if anything.
    pub fn checkout_field(&self, name: &str) -> Result<Option<String>> {
        let reply = self.bus.call("Payments", &[])?;
        let field = reply.pointer(&format!("/data/0/{name}/data"));
        Ok(field.and_then(serde_json::Value::as_str).map(str::to_owned))
    }

    /// A page of the web server through the proxy, by name.
    pub fn fetch(&self, path: &str, timeout: Duration) -> Result<http::Response> {
        let target = Target::Name(WEB_NAME, 80);
        let stream = socks::connect(&self.namespace, SOCKS5, target, timeout)?;
        stream.set_read_timeout(Some(timeout)).context("setting a timeout")?;
        http::get(stream, WEB_NAME, path)
    }

    /// The address from which the web server was asked, seen through the proxy.
    pub fn exit_address(&self, timeout: Duration) -> Result<Ipv4Addr> {
        self.exit_address_to(Target::Name(WEB_NAME, 80), timeout)
    }

    /// The same with the server named in another way.
    pub fn exit_address_to(&self, target: Target<'_>, timeout: Duration) -> Result<Ipv4Addr> {
        let stream = socks::connect(&self.namespace, SOCKS5, target, timeout)?;
        stream.set_read_timeout(Some(timeout)).context("setting a timeout")?;
        let (status, text) = http::get_text(stream, WEB_NAME, "/")?;
        ensure!(status == 200, "the web server answered {status}: {text:?}");
        text.trim()
            .parse()
            .with_context(|| format!("the web server answered {text:?}"))
    }

    /// Fails unless the web server is out of reach without the tunnel: the ground under every other claim.
    pub fn check_no_way_around(&self) -> Result<()> {
        if self.namespace.connect((WEB, 80).into(), Duration::from_secs(1)).is_ok() {
            bail!("the client reaches {WEB} without a tunnel: the network is not what it should be");
        }
        Ok(())
    }
}
