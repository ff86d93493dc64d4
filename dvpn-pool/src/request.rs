//! One request as every handler takes it: whole, bounded, with its sender's address.

use std::net::{IpAddr, SocketAddr};

use axum::{
    body::Bytes,
    extract::{ConnectInfo, FromRequest, Request},
    http::{HeaderMap, Method, StatusCode, header},
};
use dvpn_common::limits::MAX_BODY_BYTES;
use serde::de::DeserializeOwned;

use crate::{refusal::Refusal, signed::SignedParts};

/// Method, path, headers, sender and the whole body.
pub struct Incoming {
    method: Method,
    path: String,
    /// All headers.
    pub headers: HeaderMap,
    /// Where it came from, IPv4 in its own form.
    pub source: IpAddr,
    body: Bytes,
}

impl<S: Send + Sync> FromRequest<S> for Incoming {
    type Rejection = Refusal;

    async fn from_request(request: Request, state: &S) -> Result<Self, Refusal> {
        let source = request
            .extensions()
            .get::<ConnectInfo<SocketAddr>>()
            .map(|ConnectInfo(from)| from.ip());
        let Some(source) = source else {
            return Err(Refusal::new(
                StatusCode::INTERNAL_SERVER_ERROR,
                "the request has no source address",
            ));
        };
        let method = request.method().clone();
        let path = request
            .uri()
            .path_and_query()
            .map_or("/", |path| path.as_str())
            .to_owned();
        let headers = request.headers().clone();
        let body = Bytes::from_request(request, state).await.map_err(|rejection| {
            if rejection.status() == StatusCode::PAYLOAD_TOO_LARGE {
                Refusal::new(
                    StatusCode::PAYLOAD_TOO_LARGE,
                    format!("a body has at most {MAX_BODY_BYTES} bytes here"),
                )
            } else {
                Refusal::bad_request("the body ended early")
            }
        })?;
        Ok(Self {
            method,
            path,
            headers,
            source: source.to_canonical(),
            body,
        })
    }
}

impl Incoming {
    /// The body as `T`.
    pub fn json<T: DeserializeOwned>(&self) -> Result<T, Refusal> {
        serde_json::from_slice(&self.body)
            .map_err(|error| Refusal::bad_request(format!("the body is not what this path takes: {error}")))
    }

    /// What a node's signature covers.
    pub fn signed_parts(&self) -> SignedParts<'_> {
        SignedParts {
            method: self.method.as_str(),
            path: &self.path,
            body: &self.body,
        }
    }

    /// The token of `Authorization: Bearer …`.
    pub fn bearer(&self) -> Option<&str> {
        self.headers
            .get(header::AUTHORIZATION)?
            .to_str()
            .ok()?
            .strip_prefix("Bearer ")
    }
}
