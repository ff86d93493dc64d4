//! The payment server: is this token paid, and how to pay.

use bytes::Bytes;
use dvpn_common::{
    contract::{CHECKOUT_PATH, CHECKOUT_START_PATH, CheckoutRequest, VerifyRequest},
    ids::CheckoutId,
    limits::MAX_BODY_BYTES,
};
use reqwest::Response;
use url::Url;

use super::{Client, EXCHANGE_TIMEOUT, Error, below, read_limited};

/// A client of one payment server. Clones share connections.
#[derive(Debug, Clone)]
pub struct Payment {
    client: Client,
    url: Url,
}

impl Payment {
    /// Of the server at `PAYMENT_API_URL`; a URL that is not https is refused by the first request.
    pub fn new(client: Client, url: Url) -> Self {
        Self { client, url }
    }

    /// Asks whether the token is paid: status and raw body, for `dvpn_core::payment` to judge.
    pub async fn verify(&self, request: &VerifyRequest) -> Result<(u16, Bytes), Error> {
        answer(self.client.post(&self.url, request, EXCHANGE_TIMEOUT).await?).await
    }

    /// Begins a checkout: status and raw `CheckoutResponse`.
    pub async fn checkout_start(&self, request: &CheckoutRequest) -> Result<(u16, Bytes), Error> {
        let segments: Vec<&str> = CHECKOUT_START_PATH.split('/').collect();
        let url = below(&self.url, &segments)?;
        answer(self.client.post(&url, request, EXCHANGE_TIMEOUT).await?).await
    }

    /// Asks how far a checkout is: status and raw `CheckoutStatus`. Only the holder of the checkout's `secret` is given
    /// the token.
    pub async fn checkout_status(&self, id: &CheckoutId, secret: Option<&str>) -> Result<(u16, Bytes), Error> {
        let id = id.to_string();
        let url = below(&self.url, &[CHECKOUT_PATH, &id])?;
        answer(self.client.fetch(&url, secret, EXCHANGE_TIMEOUT).await?).await
    }
}

async fn answer(response: Response) -> Result<(u16, Bytes), Error> {
    let status = response.status().as_u16();
    Ok((status, read_limited(response, MAX_BODY_BYTES).await?))
}
