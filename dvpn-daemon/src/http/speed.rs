//! The speed server: a source and a sink for measuring the line.

use std::{path::Path, time::Duration};

use bytes::Bytes;
use dvpn_common::limits::MAX_BODY_BYTES;
use reqwest::{
    Body, Response,
    header::{ACCEPT, ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderValue},
};
use tokio::time::timeout;
use url::Url;

use super::{Client, Error, Options, Sender, Target, builder, check, pool::success, read_limited};

/// How long the head of an answer may take.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// No exchange is longer than this, whatever its caller forgets.
const LONGEST: Duration = Duration::from_mins(2);
/// Connections at once: more than one, because one does not fill a long line; no more than dvpn-pool lets one site have.
pub const SPEED_CONNECTIONS: usize = 4;

/// One speed server, on connections that nothing else uses. What it sends is counted as it came over the line: nothing
/// compressed is asked for, nor taken.
pub struct Speed {
    sender: Sender,
    url: Url,
}

impl Client {
    /// For the server at `BANDWIDTH_TEST_URL`.
    pub async fn speed(&self, url: &Url) -> Result<Speed, Error> {
        check(url)?;
        let relay = self.relay(url).await?;
        let options = self.0.options.clone();
        let through = relay.as_ref().map(|relay| relay.path().to_owned());
        // Reading the roots blocks.
        let client = tokio::task::spawn_blocking(move || build(&options, through.as_deref()))
            .await
            .map_err(|source| Error::Interrupted { source })??;
        Ok(Speed {
            sender: Sender { client, relay },
            url: url.clone(),
        })
    }
}

fn build(options: &Options, through: Option<&Path>) -> Result<reqwest::Client, Error> {
    let mut headers = HeaderMap::new();
    headers.insert(ACCEPT, HeaderValue::from_static("*/*"));
    headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
    builder(options, through)?
        .gzip(false)
        .default_headers(headers)
        .pool_max_idle_per_host(SPEED_CONNECTIONS)
        .timeout(LONGEST)
        .build()
        .map_err(|source| Error::Build { source })
}

impl Speed {
    /// Asks for so many bytes, or for whatever the address holds. Its head is judged; its body comes as it comes.
    pub async fn get(&self, bytes: Option<u64>) -> Result<Response, Error> {
        let mut url = self.url.clone();
        if let Some(bytes) = bytes {
            url.query_pairs_mut().append_pair("bytes", &bytes.to_string());
        }
        let request = self.sender.client.get(url);
        let response = self.head(self.sender.send(request, &self.url)).await?;
        let coding = response.headers().get(CONTENT_ENCODING);
        if coding.is_some_and(|coding| coding.as_bytes() != b"identity") {
            return Err(Error::Compressed {
                target: Target::of(&self.url),
            });
        }
        success(response).await
    }

    /// Sends a body of so many bytes and reads the answer, which has to come `within` the time.
    pub async fn post(&self, body: Body, bytes: u64, within: Duration) -> Result<Bytes, Error> {
        let request = self.sender.client.post(self.url.clone()).timeout(within);
        let request = request
            .header(CONTENT_TYPE, "application/octet-stream")
            .header(CONTENT_LENGTH, bytes)
            .body(body);
        let response = success(self.sender.send(request, &self.url).await?).await?;
        read_limited(response, MAX_BODY_BYTES).await
    }

    /// Whom errors are about.
    pub fn target(&self) -> Target {
        Target::of(&self.url)
    }

    async fn head(&self, answer: impl Future<Output = Result<Response, Error>>) -> Result<Response, Error> {
        match timeout(HEAD_TIMEOUT, answer).await {
            Ok(answer) => answer,
            Err(_) => Err(Error::Timeout {
                target: self.target(),
                what: "answer",
            }),
        }
    }
}
