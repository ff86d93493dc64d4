//! The one question that goes in the clear: whether the network answers it with a page of its own.

use std::time::Duration;

use reqwest::{header::LOCATION, redirect};
use url::Url;

use super::{Error, MAX_HEADERS, Target, tls};
use crate::control_plane::ControlPlane;

/// What came back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plain {
    /// HTTP status.
    pub status: u16,
    /// `Location`, if it is text.
    pub location: Option<String>,
}

impl Plain {
    /// Asks by a marked socket. The question says a host and a path and not who asks; the body is not read.
    pub async fn ask(plane: &ControlPlane, url: &Url, within: Duration) -> Result<Self, Error> {
        let way = plane.relay(url).await.map_err(|source| Error::NoWay {
            target: Target::of(url),
            source: Box::new(source),
        })?;
        let client = reqwest::Client::builder()
            .unix_socket(way.path())
            // Never used: what is asked is not https, and redirects are not followed.
            .tls_backend_preconfigured(tls::nobody()?)
            .http1_only()
            .http1_max_headers(MAX_HEADERS)
            .redirect(redirect::Policy::none())
            .no_proxy()
            .referer(false)
            .timeout(within)
            .pool_max_idle_per_host(0)
            .build()
            .map_err(|source| Error::Build { source })?;
        let sent = client.get(url.clone()).send().await;
        let response = sent.map_err(|source| Error::from_request(url, source))?;
        let location = response.headers().get(LOCATION);
        Ok(Self {
            status: response.status().as_u16(),
            location: location.and_then(|value| value.to_str().ok()).map(str::to_owned),
        })
    }
}
