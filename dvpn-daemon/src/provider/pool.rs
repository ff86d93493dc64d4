//! The node's side of the pool: registration, the event stream, acknowledgements. Every request is signed.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use dvpn_common::{
    contract::{
        Ack, ErrorBody, NODES_PATH, PeerAdded, PeerReleased, PeerRemoved, REGISTER_PATH, RegisterRequest,
        RegisterResponse, Snapshot, event,
    },
    limits::{MAX_BODY_BYTES, MAX_LIST_BYTES, STREAM_PING},
};
use eventsource_stream::{Event, Eventsource as _};
use futures::Stream;
use jiff::Timestamp;
use reqwest::{Method, RequestBuilder, Response, StatusCode, Url, header};
use serde::de::DeserializeOwned;
use tokio_stream::StreamExt as _;

use super::Identity;

/// For one request with a short answer.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// A stream is opened anew at least this often; the client's own time limit is for short answers.
const STREAM_LIFE: Duration = Duration::from_hours(24);

/// Why the pool could not be asked, or what it said.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No connection, a time limit, a broken answer.
    #[error("asking the pool at {url}: check POOL_URL, the network and SSL_CERT_FILE")]
    Request {
        /// What was asked.
        url: Url,
        /// Why it failed.
        #[source]
        source: reqwest::Error,
    },
    /// It refused.
    #[error("the pool answered {status} to {url}: {reason}")]
    Refused {
        /// What was asked.
        url: Url,
        /// The answer.
        status: StatusCode,
        /// In its words.
        reason: String,
    },
    /// An answer or event beyond its limit.
    #[error("the pool's answer to {url} is longer than {limit} bytes")]
    TooLong {
        /// What was asked.
        url: Url,
        /// The limit.
        limit: usize,
    },
    /// An answer or event that does not read.
    #[error("the pool's {what} does not read")]
    Format {
        /// Which.
        what: &'static str,
        /// Where it stops making sense.
        #[source]
        source: serde_json::Error,
    },
    /// The stream ended or fell silent.
    #[error("the pool's event stream ended: {0}")]
    Ended(&'static str),
}

/// What the pool tells a node.
#[derive(Debug)]
pub(super) enum PoolEvent {
    /// All there is.
    Snapshot(Snapshot),
    /// One client more.
    Added(PeerAdded),
    /// One client less.
    Removed(PeerRemoved),
    /// One connection given back.
    Released(PeerReleased),
}

/// The pool, as this node asks it. Cheap to clone.
#[derive(Clone)]
pub(super) struct Pool {
    http: reqwest::Client,
    base: Url,
    identity: Arc<Identity>,
}

impl Pool {
    /// `base` is `POOL_URL`.
    pub(super) fn new(http: reqwest::Client, base: Url, identity: Arc<Identity>) -> Self {
        Self { http, base, identity }
    }

    pub(super) fn identity(&self) -> &Identity {
        &self.identity
    }

    pub(super) async fn register(&self, request: &RegisterRequest) -> Result<RegisterResponse, Error> {
        let body = serde_json::to_vec(request).map_err(|source| Error::Format {
            what: "registration",
            source,
        })?;
        let response = self.post(&[REGISTER_PATH], body).await?;
        read_json(response, "answer to our registration").await
    }

    pub(super) async fn acknowledge(&self, ack: &Ack) -> Result<(), Error> {
        let body = serde_json::to_vec(ack).map_err(|source| Error::Format {
            what: "acknowledgement",
            source,
        })?;
        self.post(&[NODES_PATH, self.identity.node().as_str(), "ack"], body)
            .await
            .map(drop)
    }

    /// Opens the event stream. It fails when nothing, not even a ping, came for 2.5 pings, and ends never otherwise.
    pub(super) async fn events(
        &self,
        last_id: Option<&str>,
    ) -> Result<impl Stream<Item = Result<(String, PoolEvent), Error>> + Unpin + use<>, Error> {
        let url = self.url(&[NODES_PATH, self.identity.node().as_str(), "events"]);
        let mut request = self.signed(Method::GET, &url, &[]).timeout(STREAM_LIFE);
        request = request.header(header::ACCEPT, "text/event-stream");
        if let Some(id) = last_id {
            request = request.header("Last-Event-ID", id);
        }
        // The client's connect limit holds; this is for the headers.
        let response = tokio::time::timeout(REQUEST_TIMEOUT, send(request, &url))
            .await
            .map_err(|_elapsed| Error::Ended("no answer within ten seconds"))??;
        // The parser keeps an unfinished event whole, so its size is bounded in front of it.
        let unfinished = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&unfinished);
        let silence = STREAM_PING * 5 / 2;
        let bytes = response.bytes_stream().timeout(silence).map(move |chunk| match chunk {
            Err(_elapsed) => Err(Error::Ended("silent for too long")),
            Ok(Err(source)) => Err(Error::Request {
                url: url.clone(),
                source,
            }),
            Ok(Ok(chunk)) => {
                if counted.fetch_add(chunk.len(), Relaxed) + chunk.len() > MAX_LIST_BYTES {
                    return Err(Error::TooLong {
                        url: url.clone(),
                        limit: MAX_LIST_BYTES,
                    });
                }
                Ok(chunk)
            }
        });
        let events = Box::pin(bytes.eventsource()).filter_map(move |event| {
            unfinished.store(0, Relaxed);
            match event {
                Ok(event) => parse(&event).transpose(),
                Err(eventsource_stream::EventStreamError::Transport(error)) => Some(Err(error)),
                Err(_garbled) => Some(Err(Error::Ended("it is not an event stream"))),
            }
        });
        Ok(events)
    }

    fn url(&self, segments: &[&str]) -> Url {
        let mut url = self.base.clone();
        if let Ok(mut path) = url.path_segments_mut() {
            path.pop_if_empty().extend(segments);
        }
        url
    }

    fn signed(&self, method: Method, url: &Url, body: &[u8]) -> RequestBuilder {
        let path = url
            .query()
            .map_or_else(|| url.path().to_owned(), |query| format!("{}?{query}", url.path()));
        let headers = self
            .identity
            .sign_request(method.as_str(), &path, body, Timestamp::now());
        headers
            .into_iter()
            .fold(self.http.request(method, url.clone()), |request, (name, value)| {
                request.header(name, value)
            })
    }

    async fn post(&self, segments: &[&str], body: Vec<u8>) -> Result<Response, Error> {
        let url = self.url(segments);
        let request = self
            .signed(Method::POST, &url, &body)
            .header(header::CONTENT_TYPE, "application/json")
            .timeout(REQUEST_TIMEOUT)
            .body(body);
        send(request, &url).await
    }
}

async fn send(request: RequestBuilder, url: &Url) -> Result<Response, Error> {
    let response = request.send().await.map_err(|source| Error::Request {
        url: url.clone(),
        source,
    })?;
    let status = response.status();
    if status.is_success() {
        return Ok(response);
    }
    let body = read(response).await.unwrap_or_default();
    let reason = serde_json::from_slice::<ErrorBody>(&body).map(|body| body.error);
    let reason = reason.unwrap_or_else(|_unreadable| "no reason given".to_owned());
    Err(Error::Refused {
        url: url.clone(),
        status,
        reason: reason.chars().filter(|c| !c.is_control()).take(300).collect(),
    })
}

async fn read(mut response: Response) -> Result<Vec<u8>, Error> {
    let url = response.url().clone();
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(|source| Error::Request {
        url: url.clone(),
        source,
    })? {
        if body.len() + chunk.len() > MAX_BODY_BYTES {
            return Err(Error::TooLong {
                url,
                limit: MAX_BODY_BYTES,
            });
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}

async fn read_json<T: DeserializeOwned>(response: Response, what: &'static str) -> Result<T, Error> {
    serde_json::from_slice(&read(response).await?).map_err(|source| Error::Format { what, source })
}

/// Events of unknown names are for newer nodes.
fn parse(event: &Event) -> Result<Option<(String, PoolEvent)>, Error> {
    let parsed = match event.event.as_str() {
        event::SNAPSHOT => serde_json::from_str(&event.data).map(PoolEvent::Snapshot),
        event::ADD => serde_json::from_str(&event.data).map(PoolEvent::Added),
        event::REMOVE => serde_json::from_str(&event.data).map(PoolEvent::Removed),
        event::RELEASE => serde_json::from_str(&event.data).map(PoolEvent::Released),
        _ => return Ok(None),
    };
    let parsed = parsed.map_err(|source| Error::Format { what: "event", source })?;
    Ok(Some((event.id.clone(), parsed)))
}
