//! One HTTPS request from inside a namespace: for what no program of ours does, such as standing for the coins.

use std::path::Path;

use anyhow::{Context as _, Result, anyhow};
use serde_json::Value;

use crate::namespace::Namespace;

/// Makes aws-lc-rs the one provider of cryptography of this process; calling it twice is fine.
pub fn install_crypto() {
    // An error means that it is installed already.
    drop(rustls::crypto::aws_lc_rs::default_provider().install_default());
}

/// Sends a POST with a JSON body, or a GET without one; trusts `ca` alone. The status and the body as text.
pub fn request(namespace: &Namespace, ca: &Path, url: &str, body: Option<&Value>) -> Result<(u16, String)> {
    install_crypto();
    let pem = std::fs::read(ca).with_context(|| format!("reading {}", ca.display()))?;
    namespace.run(|| {
        let certificate = reqwest::Certificate::from_pem(&pem).with_context(|| format!("reading {}", ca.display()))?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("a runtime")?;
        runtime.block_on(async {
            let client = reqwest::Client::builder()
                .tls_certs_only([certificate])
                .no_proxy()
                .timeout(std::time::Duration::from_secs(10))
                .build()
                .context("making an HTTPS client")?;
            let request = match body {
                Some(body) => client.post(url).json(body),
                None => client.get(url),
            };
            let response = request.send().await.with_context(|| format!("asking {url}"))?;
            let status = response.status().as_u16();
            let text = response
                .text()
                .await
                .with_context(|| format!("reading the answer of {url}"))?;
            Ok((status, text))
        })
    })?
}

/// Stands for the arrival of the coins of a checkout, at a pool in its development form.
pub fn development_pay(namespace: &Namespace, ca: &Path, payment_url: &str, checkout: &str) -> Result<()> {
    let url = format!("{payment_url}/dev/pay/{checkout}");
    match request(namespace, ca, &url, Some(&Value::Object(serde_json::Map::new())))? {
        (200..=299, _) => Ok(()),
        (status, text) => Err(anyhow!("{url} answered {status}: {text}")),
    }
}
