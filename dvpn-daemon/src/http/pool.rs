//! The pool: provider list and approval.

use std::time::Duration;

use bytes::Bytes;
use dvpn_common::{
    contract::{
        APPROVE_PATH, ApproveRequest, CHALLENGE_PATH, ChallengeResponse, ErrorBody, RELEASE_PATH, ReleaseRequest,
    },
    limits::{MAX_BODY_BYTES, MAX_LIST_BYTES},
};
use reqwest::{Response, header::RETRY_AFTER};
use url::Url;

use super::{Client, EXCHANGE_TIMEOUT, Error, LIST_TIMEOUT, Target, below, read_limited};

/// Longest part of a server's own words that is passed on.
const MAX_SAID: usize = 200;

/// What the pool says to an approval request.
#[derive(Debug)]
pub struct Answer {
    /// HTTP status.
    pub status: u16,
    /// How long to wait before the next one (`Retry-After` in seconds).
    pub retry_after: Option<Duration>,
    /// As it came.
    pub body: Bytes,
}

/// A client of one pool. Clones share connections.
#[derive(Debug, Clone)]
pub struct Pool {
    client: Client,
    url: Url,
}

impl Pool {
    /// Of the pool at `POOL_URL`; a URL that is not https is refused by the first request.
    pub fn new(client: Client, url: Url) -> Self {
        Self { client, url }
    }

    /// The address of the list.
    pub fn url(&self) -> &Url {
        &self.url
    }

    /// The client underneath.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// The raw list, at most [`MAX_LIST_BYTES`]; `dvpn_core::directory` decides whether it is believed. Statuses other
    /// than 2xx are errors.
    pub async fn list(&self) -> Result<Bytes, Error> {
        let response = self.client.fetch(&self.url, None, LIST_TIMEOUT).await?;
        read_limited(success(response).await?, MAX_LIST_BYTES).await
    }

    /// Asks for admission at a provider; `dvpn_core::approval` judges the answer.
    pub async fn approve(&self, request: &ApproveRequest, within: Duration) -> Result<Answer, Error> {
        let url = below(&self.url, &[APPROVE_PATH])?;
        let response = self.client.post(&url, request, within).await?;
        let status = response.status().as_u16();
        let wait = response.headers().get(RETRY_AFTER);
        let wait = wait.and_then(|value| value.to_str().ok()?.trim().parse().ok());
        Ok(Answer {
            status,
            retry_after: wait.map(Duration::from_secs),
            body: read_limited(response, MAX_BODY_BYTES).await?,
        })
    }

    /// The key that proofs of possession are made for; nothing from a pool that asks for none. Such a pool may never have
    /// heard of the path: whatever it says there but "later" is taken for that. One that wants a proof refuses an
    /// approval without.
    pub async fn challenge(&self) -> Result<Option<ChallengeResponse>, Error> {
        challenge(&self.client, &self.url, CHALLENGE_PATH).await
    }

    /// Gives a connection's grant back: the status, which is 204 if the pool took it.
    pub async fn release(&self, request: &ReleaseRequest, within: Duration) -> Result<u16, Error> {
        let url = below(&self.url, &[RELEASE_PATH])?;
        let response = self.client.post(&url, request, within).await?;
        Ok(response.status().as_u16())
    }
}

/// [`Pool::challenge`] of any service that gives challenges, at `path` below `base`.
pub(crate) async fn challenge(client: &Client, base: &Url, path: &str) -> Result<Option<ChallengeResponse>, Error> {
    let segments: Vec<&str> = path.split('/').collect();
    let url = below(base, &segments)?;
    let response = client.fetch(&url, None, EXCHANGE_TIMEOUT).await?;
    let later = matches!(response.status().as_u16(), 408 | 425 | 429);
    if !later && (response.status().is_client_error() || response.status().as_u16() == 501) {
        return Ok(None);
    }
    let body = read_limited(success(response).await?, MAX_BODY_BYTES).await?;
    Ok(serde_json::from_slice(&body).ok())
}

/// Passes a 2xx on; makes anything else an error with the server's own words.
pub(super) async fn success(response: Response) -> Result<Response, Error> {
    let status = response.status();
    if status.is_success() {
        return Ok(response);
    }
    let target = Target::of(response.url());
    // The status is the news; a body that does not read only leaves out the words.
    let body = read_limited(response, MAX_BODY_BYTES).await.unwrap_or_default();
    let said = serde_json::from_slice::<ErrorBody>(&body)
        .ok()
        .map(|body| printable(&body.error));
    Err(Error::Status { target, status, said })
}

/// Foreign words, fit for a log line: short, no control characters.
fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(MAX_SAID).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_words_are_shortened_and_stripped_of_control_characters() {
        assert_eq!(printable("a\x1b[2Jb\nc"), "a[2Jbc");
        assert_eq!(printable(&"x".repeat(1000)).len(), MAX_SAID);
    }
}
