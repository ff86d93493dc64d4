//! The provider that is made for us when the pool fails: the one program this daemon runs, and the lease of what it got.
//!
//! | module | does |
//! |---|---|
//! | [`script`] | opens the program, and refuses one that somebody else could have written |
//! | `run` | runs it: bounded in time, output and surroundings |
//! | [`lease`] | renews and returns what the orchestrator lent |
//!
//! The program reads a [`ProvisionRequest`] on its standard input and prints a `ProvisionResponse`. The token is in
//! neither its arguments nor its environment, where others could read it. What it prints is believed by
//! `dvpn_core::approval` or not at all.

mod error;
mod family;
pub mod lease;
mod run;
pub mod script;
#[cfg(test)]
mod tests;

use std::{ffi::OsString, path::PathBuf, time::Duration};

use dvpn_common::contract::{ChallengeResponse, PROVISION_CHALLENGE_PATH, ProvisionRequest};
use dvpn_core::config::{Config, Secret};
use url::Url;
use zeroize::Zeroizing;

pub use error::Error;
pub use script::{Script, Untrusted};

use crate::{
    control_plane::ControlPlane,
    http::{self, Client, Options},
};

/// Where the program's own programs are looked for.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What is needed to ask for a provider.
#[derive(Debug, Clone)]
pub struct Fallback {
    script: PathBuf,
    url: Url,
    ca_file: Option<PathBuf>,
    timeout: Duration,
    control_plane: Option<ControlPlane>,
}

impl Fallback {
    /// As configured; nothing if the fallback is off. In device mode its requests go by `control_plane`.
    pub fn new(config: &Config, control_plane: Option<ControlPlane>) -> Option<Self> {
        let url = config.fallback.orchestrator_url.clone()?;
        config.fallback.enabled.then(|| Self {
            script: config.fallback.script.clone(),
            url,
            ca_file: config.fallback.ca_cert.clone().or_else(|| config.ssl_cert_file.clone()),
            timeout: config.fallback.timeout,
            control_plane,
        })
    }

    /// How long the program may take.
    pub fn timeout(&self) -> Duration {
        self.timeout
    }

    /// The key that a proof of possession is made for; nothing from an orchestrator that asks for none. The program never
    /// sees a private key: it passes the proof on.
    pub async fn challenge(&self) -> Result<Option<ChallengeResponse>, http::Error> {
        http::challenge(&self.client(), &self.url, PROVISION_CHALLENGE_PATH).await
    }

    /// The client that keeps what the program got.
    pub fn orchestrator(&self) -> lease::Orchestrator {
        lease::Orchestrator::new(self.client(), self.url.clone())
    }

    fn client(&self) -> Client {
        Client::new(Options {
            ca_file: self.ca_file.clone(),
            control_plane: self.control_plane.clone(),
        })
    }

    /// Runs the program and returns what it printed. Dropping the future kills it, and everything that it started.
    pub async fn provision(&self, request: &ProvisionRequest) -> Result<Vec<u8>, Error> {
        let path = self.script.clone();
        // Some stat calls, on whatever file system the operator chose.
        let script = tokio::task::spawn_blocking(move || Script::open(&path))
            .await
            .map_err(|source| Error::Interrupted { source })??;
        let input = Zeroizing::new(serde_json::to_vec(request).map_err(|source| Error::Encode { source })?);
        let secret = Secret::new(request.token.as_str());
        let mut environment = self.environment();
        // The program's own sockets would be blocked, and are to be: it gets one of ours, which leads to the orchestrator
        // and nowhere else, for as long as it runs.
        let door = match &self.control_plane {
            Some(plane) => Some(plane.door(&self.url).map_err(|source| Error::Door { source })?),
            None => None,
        };
        if let Some(door) = &door {
            environment.push(("FALLBACK_SOCKET", door.path().into()));
        }
        run::run(&script, &environment, &input, &secret, self.timeout).await
    }

    /// Everything the program is told besides the request.
    fn environment(&self) -> Vec<(&'static str, OsString)> {
        let mut environment = vec![
            ("PATH", PATH.into()),
            ("LANG", "C".into()),
            ("FALLBACK_ORCHESTRATOR_URL", self.url.as_str().into()),
        ];
        if let Some(file) = &self.ca_file {
            environment.push(("FALLBACK_CA_CERT", file.into()));
        }
        environment
    }
}
