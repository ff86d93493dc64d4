//! HTTPS clients of the pool and the payment server.
//!
//! Every request goes the same way: HTTPS only, TLS 1.2 or newer on aws-lc, no redirect, no proxy from the environment,
//! HTTP/1.1 on a kept connection (the list, the payment check and the approval of one host share it), a time limit over
//! the whole exchange, and a size limit on the *decoded* body that is enforced while it streams.

mod error;
mod payment;
mod plain;
mod pool;
mod speed;
mod tls;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bytes::{Bytes, BytesMut};
pub use error::{Error, Target, TlsProblem};
pub use payment::Payment;
pub use plain::Plain;
pub(crate) use pool::challenge;
pub use pool::{Answer, Pool};
use reqwest::{
    RequestBuilder, Response,
    header::{ACCEPT, CONTENT_TYPE, HeaderMap, HeaderValue},
    redirect,
};
pub use speed::{SPEED_CONNECTIONS, Speed};
use tokio::sync::OnceCell;
use url::Url;
use zeroize::Zeroizing;

use crate::control_plane::{ControlPlane, Relay};

/// Longest time for the TCP and TLS handshakes together.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest time for a provider list, from the request to its last byte.
pub const LIST_TIMEOUT: Duration = Duration::from_secs(15);
/// Longest time for any other exchange.
pub const EXCHANGE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long an unused connection is kept; shorter than servers usually keep theirs.
const IDLE_TIMEOUT: Duration = Duration::from_secs(20);
/// Most response headers accepted.
const MAX_HEADERS: usize = 64;
/// All that a server learns of this program.
const USER_AGENT: &str = concat!("dvpn/", env!("CARGO_PKG_VERSION"));

/// What a client trusts, and how it connects.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// PEM file whose certificates replace the system's roots. Without it the system's are used, where `SSL_CERT_FILE`
    /// and `SSL_CERT_DIR` are honoured as OpenSSL does.
    pub ca_file: Option<PathBuf>,
    /// Makes its connections in device mode; otherwise it makes its own.
    pub control_plane: Option<ControlPlane>,
}

/// Builds a client. It reads the roots (some milliseconds of blocking I/O): see [`Client`] for one that does so late.
pub fn client(options: &Options) -> Result<reqwest::Client, Error> {
    build(options, None)
}

fn build(options: &Options, through: Option<&Path>) -> Result<reqwest::Client, Error> {
    let mut headers = HeaderMap::new();
    headers.insert(ACCEPT, HeaderValue::from_static("application/json"));
    let builder = builder(options, through)?.default_headers(headers).gzip(true);
    builder.build().map_err(|source| Error::Build { source })
}

/// What every client here has in common.
fn builder(options: &Options, through: Option<&Path>) -> Result<reqwest::ClientBuilder, Error> {
    let mut builder = reqwest::Client::builder();
    if let Some(socket) = through {
        builder = builder.unix_socket(socket);
    }
    Ok(builder
        .tls_backend_preconfigured(tls::config(options)?)
        .https_only(true)
        .http1_only()
        .http1_max_headers(MAX_HEADERS)
        .redirect(redirect::Policy::none())
        .no_proxy()
        .referer(false)
        .user_agent(USER_AGENT)
        .connect_timeout(CONNECT_TIMEOUT)
        .timeout(LIST_TIMEOUT)
        .tcp_nodelay(true)
        .pool_max_idle_per_host(2)
        .pool_idle_timeout(IDLE_TIMEOUT))
}

/// A client that is built at its first request, off the start path. Clones share it and its connections.
#[derive(Debug, Clone)]
pub struct Client(Arc<Parts>);

#[derive(Debug)]
struct Parts {
    options: Options,
    direct: OnceCell<reqwest::Client>,
    /// One for each relay, by its path.
    relayed: tokio::sync::Mutex<BTreeMap<PathBuf, reqwest::Client>>,
}

/// Who sends a request, and who knows why it found no way.
struct Sender {
    client: reqwest::Client,
    relay: Option<Relay>,
}

impl Client {
    /// Remembers the options and does nothing else.
    pub fn new(options: Options) -> Self {
        Self(Arc::new(Parts {
            options,
            direct: OnceCell::new(),
            relayed: tokio::sync::Mutex::default(),
        }))
    }

    /// What makes its connections, in device mode.
    pub fn control_plane(&self) -> Option<&ControlPlane> {
        self.0.options.control_plane.as_ref()
    }

    /// The client underneath for this host, for streams and uploads that the methods here do not cover; builds it if need
    /// be. Errors of its requests are mapped by [`Error::from_request`]; its callers set their own time limits.
    pub async fn inner(&self, url: &Url) -> Result<reqwest::Client, Error> {
        self.sender(url).await.map(|sender| sender.client)
    }

    async fn sender(&self, url: &Url) -> Result<Sender, Error> {
        let Parts {
            options,
            direct,
            relayed,
        } = &*self.0;
        let Some(relay) = self.relay(url).await? else {
            let client = direct.get_or_try_init(|| build_elsewhere(options, None)).await?.clone();
            return Ok(Sender { client, relay: None });
        };
        let mut relayed = relayed.lock().await;
        let client = if let Some(client) = relayed.get(relay.path()) {
            client.clone()
        } else {
            let client = build_elsewhere(options, Some(relay.path().to_owned())).await?;
            relayed.insert(relay.path().to_owned(), client.clone());
            client
        };
        Ok(Sender {
            client,
            relay: Some(relay),
        })
    }

    /// The way to this host in device mode; otherwise connections find their own.
    async fn relay(&self, url: &Url) -> Result<Option<Relay>, Error> {
        let Some(plane) = &self.0.options.control_plane else {
            return Ok(None);
        };
        let relay = plane.relay(url).await;
        relay.map(Some).map_err(|source| Error::NoWay {
            target: Target::of(url),
            source: Box::new(source),
        })
    }

    /// GET; the caller decides what statuses mean, except that 3xx is refused.
    pub async fn fetch(&self, url: &Url, bearer: Option<&str>, within: Duration) -> Result<Response, Error> {
        check(url)?;
        let sender = self.sender(url).await?;
        let mut request = sender.client.get(url.clone()).timeout(within);
        if let Some(secret) = bearer {
            request = request.bearer_auth(secret);
        }
        sender.send(request, url).await
    }

    /// POST of a JSON document; the caller decides what statuses mean, except that 3xx is refused. The body is wiped from
    /// memory once it is sent, because most of ours carry the token.
    pub async fn post<T: serde::Serialize + Sync>(
        &self,
        url: &Url,
        body: &T,
        within: Duration,
    ) -> Result<Response, Error> {
        check(url)?;
        let body = serde_json::to_vec(body).map_err(|source| Error::Encode {
            target: Target::of(url),
            source,
        })?;
        let body = Bytes::from_owner(Zeroizing::new(body));
        let sender = self.sender(url).await?;
        let request = sender.client.post(url.clone()).header(CONTENT_TYPE, "application/json");
        sender.send(request.body(body).timeout(within), url).await
    }
}

/// Only HTTPS: a token must never leave in clear.
fn check(url: &Url) -> Result<(), Error> {
    if url.scheme() == "https" && url.has_host() {
        Ok(())
    } else {
        Err(Error::NotHttps {
            target: Target::of(url),
        })
    }
}

/// Reading the roots blocks: not on the runtime's own threads.
async fn build_elsewhere(options: &Options, through: Option<PathBuf>) -> Result<reqwest::Client, Error> {
    let options = options.clone();
    tokio::task::spawn_blocking(move || build(&options, through.as_deref()))
        .await
        .map_err(|source| Error::Interrupted { source })?
}

impl Sender {
    async fn send(&self, request: RequestBuilder, url: &Url) -> Result<Response, Error> {
        let response = request.send().await.map_err(|source| {
            // The HTTP client saw a connection of this process close; the relay knows why.
            match self.relay.as_ref().and_then(Relay::take_failure) {
                Some(source) => Error::NoWay {
                    target: Target::of(url),
                    source: Box::new(source),
                },
                None => Error::from_request(url, source),
            }
        })?;
        if response.status().is_redirection() {
            return Err(Error::redirect(url, &response));
        }
        Ok(response)
    }
}

/// Reads a body of at most `limit` decoded bytes; a longer one is given up at the byte that exceeds the limit, so what a
/// compressed bomb costs is bounded too.
pub async fn read_limited(mut response: Response, limit: usize) -> Result<Bytes, Error> {
    let url = response.url().clone();
    let too_large = || Error::TooLarge {
        target: Target::of(&url),
        limit,
    };
    // After gzip decoding the length is unknown and this is None.
    let announced = response.content_length().unwrap_or(0);
    if announced > limit as u64 {
        return Err(too_large());
    }
    let mut body = BytesMut::with_capacity(usize::try_from(announced).unwrap_or(0));
    while let Some(chunk) = response
        .chunk()
        .await
        .map_err(|source| Error::from_request(&url, source))?
    {
        if chunk.len() > limit.saturating_sub(body.len()) {
            return Err(too_large());
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body.freeze())
}

/// `base` with further path segments: the paths of the contracts are literal.
fn below(base: &Url, segments: &[&str]) -> Result<Url, Error> {
    let mut url = base.clone();
    url.path_segments_mut()
        .map_err(|()| Error::NotHttps {
            target: Target::of(base),
        })?
        .pop_if_empty()
        .extend(segments);
    Ok(url)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_appended_literally() {
        let base: Url = "https://pool:8443/providers".parse().unwrap();
        assert_eq!(
            below(&base, &["approve"]).unwrap().as_str(),
            "https://pool:8443/providers/approve"
        );
        let base: Url = "https://pool:8443/payment/".parse().unwrap();
        assert_eq!(
            below(&base, &["checkout", "a/b?c"]).unwrap().as_str(),
            "https://pool:8443/payment/checkout/a%2Fb%3Fc"
        );
    }

    #[tokio::test]
    async fn plain_http_is_refused_before_anything_is_sent() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let url: Url = format!("http://{}/providers", listener.local_addr().unwrap())
            .parse()
            .unwrap();
        let error = Client::new(Options::default())
            .fetch(&url, None, EXCHANGE_TIMEOUT)
            .await
            .unwrap_err();
        assert!(matches!(error, Error::NotHttps { .. }), "{error}");
        assert_eq!(listener.accept().unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    }
}
