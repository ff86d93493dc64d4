//! A pool on a free port, its certificates, and a paying customer.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    process::Command,
    sync::{LazyLock, Mutex},
    time::Duration,
};

use aws_lc_rs::{agreement, hmac};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use dvpn_common::{
    contract::{
        ApproveRequest, ApproveResponse, ChallengeResponse, CheckoutResponse, CheckoutStatus, PossessionProof,
        ProviderEntry, ProviderList,
    },
    keys::{PrivateKey, PublicKey, VerifyingKey},
    limits::{REQUIRED_INTERVAL, REQUIRED_PRICE_USD, REQUIRED_WALLET},
    possession,
};
use dvpn_pool::{Config, Limits, Server, Timing, serve, signing::sha256, store::Store};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::oneshot;

/// No test waits longer than this for anything.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// Makes certificates in `directory` and returns what the script said.
pub fn make_certificates(directory: &Path, names: &[&str]) -> String {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/gen_dev_certs.sh");
    let output = Command::new(script)
        .args(names)
        .env("CERTS_DIRECTORY", directory)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// An HTTPS client that trusts only this authority.
pub fn client(authority: &Path) -> reqwest::Client {
    // Another test of this process may have installed it already.
    drop(rustls::crypto::aws_lc_rs::default_provider().install_default());
    let authority = reqwest::Certificate::from_pem(&std::fs::read(authority).unwrap()).unwrap();
    reqwest::Client::builder()
        .tls_certs_only([authority])
        .https_only(true)
        .no_proxy()
        .timeout(DEADLINE)
        .build()
        .unwrap()
}

/// How to reach a running pool.
#[derive(Clone)]
pub struct Access {
    pub base: String,
    pub client: reqwest::Client,
}

impl Access {
    pub async fn get(&self, path: &str) -> reqwest::Response {
        self.client.get(format!("{}{path}", self.base)).send().await.unwrap()
    }

    pub async fn post(&self, path: &str, body: &Value) -> reqwest::Response {
        self.client
            .post(format!("{}{path}", self.base))
            .json(body)
            .send()
            .await
            .unwrap()
    }

    /// The list and its version.
    pub async fn list(&self) -> (Vec<ProviderEntry>, u64) {
        match self.get("/providers").await.json().await.unwrap() {
            ProviderList::Object {
                providers,
                version: Some(version),
                expires_at: Some(_),
                ..
            } => (providers, version),
            ProviderList::Object { .. } | ProviderList::Bare(_) => panic!("our list is an object with its version"),
        }
    }

    pub async fn listed_ids(&self) -> Vec<String> {
        self.list().await.0.into_iter().map(|entry| entry.id).collect()
    }

    /// Waits until exactly these nodes are listed.
    pub async fn wait_for_list(&self, ids: &[&str]) {
        eventually(|| async { self.listed_ids().await == ids }).await;
    }

    pub fn checkout_wish(user: &str) -> Value {
        json!({
            "user_id": user,
            "required_wallet": REQUIRED_WALLET,
            "required_price_usd": REQUIRED_PRICE_USD,
            "required_interval": REQUIRED_INTERVAL,
        })
    }

    pub async fn start_checkout(&self, user: &str) -> CheckoutResponse {
        let response = self.post("/payment/checkout/start", &Self::checkout_wish(user)).await;
        assert_eq!(response.status(), 200);
        response.json().await.unwrap()
    }

    pub async fn checkout_status(&self, checkout: &CheckoutResponse) -> CheckoutStatus {
        let response = self
            .client
            .get(format!("{}/payment/checkout/{}", self.base, checkout.session_id))
            .bearer_auth(checkout.secret.as_deref().unwrap())
            .send()
            .await
            .unwrap();
        assert_eq!(response.status(), 200);
        response.json().await.unwrap()
    }

    /// A paid token.
    pub async fn pay(&self, user: &str) -> String {
        let checkout = self.start_checkout(user).await;
        let paid = self
            .post(&format!("/payment/dev/pay/{}", checkout.session_id), &json!({}))
            .await;
        assert_eq!(paid.status(), 200);
        self.checkout_status(&checkout).await.token.unwrap()
    }

    pub async fn challenge(&self) -> ChallengeResponse {
        let response = self.get("/providers/approve/challenge").await;
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["cache-control"], "no-store");
        response.json().await.unwrap()
    }

    /// A request as an honest client makes it.
    pub async fn approve_request(&self, provider: &str, token: &str, key: PublicKey) -> ApproveRequest {
        let challenge = self.challenge().await.public_key;
        ApproveRequest {
            provider_id: provider.into(),
            token: token.into(),
            approved: true,
            client_public_key: Some(key),
            proof: Some(proof(provider, token, key, challenge)),
            renews: None,
        }
    }

    pub async fn send_approve(&self, request: &ApproveRequest) -> reqwest::Response {
        self.post("/providers/approve", &serde_json::to_value(request).unwrap())
            .await
    }

    pub async fn approve(&self, provider: &str, token: &str, key: PublicKey) -> reqwest::Response {
        self.send_approve(&self.approve_request(provider, token, key).await)
            .await
    }

    /// An approval that must succeed.
    pub async fn approved(&self, provider: &str, token: &str, key: PublicKey) -> ApproveResponse {
        granted(self.approve(provider, token, key).await).await
    }

    /// `key` shall follow `old`.
    pub async fn renew(&self, provider: &str, token: &str, key: PublicKey, old: PublicKey) -> reqwest::Response {
        let mut request = self.approve_request(provider, token, key).await;
        request.renews = Some(old);
        self.send_approve(&request).await
    }

    pub async fn release(&self, provider: &str, token: &str, key: PublicKey) -> reqwest::Response {
        let body = json!({ "provider_id": provider, "token": token, "client_public_key": key.to_string() });
        self.post("/providers/release", &body).await
    }

    pub async fn verify(&self, token: &str) -> String {
        let body = json!({
            "token": token,
            "provider_id": "provider-a",
            "required_wallet": REQUIRED_WALLET,
            "required_price_usd": REQUIRED_PRICE_USD,
            "required_interval": REQUIRED_INTERVAL,
        });
        let response = self.post("/payment", &body).await;
        assert_eq!(response.status(), 200);
        response.text().await.unwrap()
    }
}

/// An answer that must be an approval.
pub async fn granted(response: reqwest::Response) -> ApproveResponse {
    let status = response.status();
    assert_eq!(status, 200, "{}", response.text().await.unwrap());
    response.json().await.unwrap()
}

/// What an error answer says.
pub async fn refusal(response: reqwest::Response) -> (u16, String) {
    let status = response.status().as_u16();
    let text = response.text().await.unwrap();
    let body: dvpn_common::contract::ErrorBody =
        serde_json::from_str(&text).unwrap_or_else(|_| panic!("{status} without an error body: {text:?}"));
    (status, body.error)
}

/// A pool that runs in this process.
pub struct TestPool {
    pub access: Access,
    pub config: Config,
    pub key: VerifyingKey,
    running: Option<(Server, oneshot::Sender<()>)>,
    _directory: TempDir,
}

impl TestPool {
    /// An open, private development pool; `change` changes what this test is about.
    pub async fn start(change: impl FnOnce(&mut Config)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        make_certificates(directory.path(), &[]);
        let mut config = Config {
            listen: "127.0.0.1:0".parse().unwrap(),
            tls_cert: directory.path().join("server.crt"),
            tls_key: directory.path().join("server.key"),
            database: directory.path().join("pool.db"),
            development: true,
            open_registration: true,
            private_endpoints: true,
            payment_url: None,
            orchestrator: None,
            max_connections: 4096,
            limits: Limits::default(),
            timing: Timing::default(),
        };
        change(&mut config);
        let (stop, stopped) = oneshot::channel();
        let server = serve(config.clone(), async { drop(stopped.await) }).await.unwrap();
        let access = Access {
            base: format!("https://{}", server.address()),
            client: client(&directory.path().join("dev-ca.crt")),
        };
        Self {
            access,
            config,
            key: server.pool_key(),
            running: Some((server, stop)),
            _directory: directory,
        }
    }

    /// The same pool again, at another port.
    pub async fn restart(&mut self) {
        self.stop().await;
        self.start_again().await;
    }

    /// Starts what was stopped.
    pub async fn start_again(&mut self) {
        let (stop, stopped) = oneshot::channel();
        let server = serve(self.config.clone(), async { drop(stopped.await) }).await.unwrap();
        self.access.base = format!("https://{}", server.address());
        self.running = Some((server, stop));
    }

    pub async fn stop(&mut self) {
        let (server, stop) = self.running.take().unwrap();
        stop.send(()).unwrap();
        tokio::time::timeout(DEADLINE, server.finished())
            .await
            .unwrap()
            .unwrap();
    }

    pub fn database(&self) -> PathBuf {
        self.config.database.clone()
    }

    /// A second connection to the pool's database.
    pub async fn store(&self) -> Store {
        Store::open(&self.config.database).await.unwrap()
    }
}

/// Waits until `check` holds, or fails at the deadline.
pub async fn eventually<F: Future<Output = bool>>(mut check: impl FnMut() -> F) {
    tokio::time::timeout(DEADLINE, async {
        while !check().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await
    .expect("it did not become true in time");
}

/// The private halves of the keys of this process's tests.
static PRIVATE: LazyLock<Mutex<HashMap<PublicKey, PrivateKey>>> = LazyLock::new(Mutex::default);

/// The public half of a private key, which is remembered for proofs.
pub fn public_key(private: PrivateKey) -> PublicKey {
    let pair = agreement::PrivateKey::from_private_key(&agreement::X25519, private.expose()).unwrap();
    let public = pair.compute_public_key().unwrap();
    let public = PublicKey::from_bytes(public.as_ref().try_into().unwrap()).unwrap();
    PRIVATE.lock().unwrap().insert(public, private);
    public
}

/// A distinct client key.
pub fn client_key(number: u32) -> PublicKey {
    let mut bytes = [0xc1; 32];
    bytes[1..5].copy_from_slice(&number.to_be_bytes());
    public_key(PrivateKey::from_bytes(bytes))
}

/// The proof that `key`'s holder makes.
pub fn proof(provider: &str, token: &str, key: PublicKey, challenge: PublicKey) -> PossessionProof {
    let private = PRIVATE.lock().unwrap()[&key].clone();
    let pair = agreement::PrivateKey::from_private_key(&agreement::X25519, private.expose()).unwrap();
    let bytes = possession::bytes(provider, &key, &challenge, &sha256(token.as_bytes()));
    let public = agreement::UnparsedPublicKey::new(&agreement::X25519, challenge.as_bytes());
    let mac = agreement::agree(&pair, public, (), |shared| {
        Ok(hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, shared), &bytes))
    });
    PossessionProof {
        challenge,
        mac: STANDARD.encode(mac.unwrap()),
    }
}
