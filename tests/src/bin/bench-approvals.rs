//! Measures how fast paying clients are approved: a pool process, a node and clients with open TLS connections in one
//! network namespace, so that loopback is all that lies between them.
//!
//! An approval is answered once the node has said that it has the peer, and the pool has put that on its disk: the time
//! from asking to the answer holds the time to the acknowledgement. Prints a table and then `figure NAME VALUE` lines
//! for `scripts/bench/approvals.sh`.
//!
//! `BENCH_STEADY` (1,000) clients come at 100 a second, whether or not the ones before them were answered; then
//! `BENCH_CROWD` (2,500) as fast as they are served, 128 at a time. The node is one that reads its stream and
//! acknowledges, so that the pool is what is measured; `BENCH_NODE=daemon` has a provider process with its tunnel instead.

use std::{
    fmt::Write as _,
    io::Write as IoWrite,
    path::Path,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use dvpn_common::{
    contract::{ApproveRequest, ChallengeResponse, RegisterResponse},
    keys::PrivateKey,
    limits::{REQUIRED_INTERVAL, REQUIRED_PRICE_USD, REQUIRED_WALLET},
};
use dvpn_core::{keys::public_key, possession};
use dvpn_daemon::{
    provider::{EchoResponder, Identity},
    tunnel::{DEFAULT_MTU_BYTES, PeerConfig, TunnelConfig, userspace::UserspaceTunnel},
};
use dvpn_tests::{
    certs::Authority,
    namespace::Namespace,
    network::{Network, NetworkConfig, POOL},
    node::{self, Daemon},
    sweep,
    world::unique_id,
};
use futures::StreamExt as _;
use jiff::Timestamp;
use reqwest::Method;
use serde_json::{Value, json};
use tokio_util::task::AbortOnDropHandle;

/// Requests at one time while the crowd comes.
const AT_ONCE: usize = 128;
/// Between two clients of the steady ones.
const STEP: Duration = Duration::from_millis(10);
const PATIENCE: Duration = Duration::from_secs(30);

fn main() -> ExitCode {
    match measure().and_then(|text| {
        std::io::stdout()
            .write_all(text.as_bytes())
            .context("writing the figures")
    }) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            drop(IoWrite::write_fmt(
                &mut std::io::stderr(),
                format_args!("bench-approvals: {error:#}\n"),
            ));
            ExitCode::FAILURE
        }
    }
}

fn count(name: &str, usual: usize) -> Result<usize> {
    match std::env::var(name) {
        Ok(text) => text.parse().with_context(|| format!("{name} is no number")),
        Err(_) => Ok(usual),
    }
}

fn measure() -> Result<String> {
    let (steady, crowd) = (count("BENCH_STEADY", 1000)?, count("BENCH_CROWD", 2500)?);
    ensure!(steady + crowd <= 4096, "one provider has room for 4096 clients");
    let _alone = sweep::exclusive()?;
    let mut network = Network::build(&NetworkConfig::with_round_trips(&unique_id(), &[1]))?;
    let authority = Authority::create(&network.directory.join("certs"))?;
    let identity = authority.issue("pool", &[POOL.into()], &["pool.dvpn.test"])?;
    let ca = authority.certificate();
    // A standing connection of every client, and as many checkouts as there are clients, from one address.
    let pool = node::spawn_pool_with(
        &network,
        &identity,
        &[
            "--max-connections",
            "8192",
            "--limit-connections",
            "8192",
            "--limit-checkouts",
            "1000000",
        ],
    )?;
    let mut machine = network.providers.pop().context("a provider's machine")?;
    machine.namespace = Namespace::open(network.pool.namespace.name())?;
    machine.address = POOL;
    let provider = if std::env::var("BENCH_NODE").is_ok_and(|node| node == "daemon") {
        let environment = node::provider_environment(&machine, &ca).with("NODE_MAX_PEERS", "4096");
        let provider = Daemon::spawn(&network, &machine, environment)?;
        node::wait_until_listed(&network, &ca, 1, PATIENCE)
            .with_context(|| format!("the pool says:\n{}", pool.log_tail()))?;
        Some(provider)
    } else {
        None
    };
    let load = Load {
        base: format!("https://{POOL}:{}", node::POOL_PORT),
        provider: machine.name.clone(),
        bare: provider.is_none(),
    };
    let answered = network.pool.namespace.run(|| -> Result<String> {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("starting the clients")?
            .block_on(load.run(&ca, steady, crowd))
    })?;
    answered.with_context(|| {
        format!(
            "the pool's log ends:\n{}\nthe provider's:\n{}",
            pool.log_tail(),
            provider.map_or_else(String::new, |provider| provider.process.log_tail())
        )
    })
}

/// The clients.
struct Load {
    base: String,
    provider: String,
    /// Whether the node is ours, and no process.
    bare: bool,
}

/// What became of one approval: how long it took, or why it was none.
type Outcome = Result<Duration, String>;

impl Load {
    async fn run(&self, ca: &Path, steady: usize, crowd: usize) -> Result<String> {
        dvpn_tests::https::install_crypto();
        let authority = std::fs::read(ca).with_context(|| format!("reading {}", ca.display()))?;
        let client = reqwest::Client::builder()
            .tls_certs_only([reqwest::Certificate::from_pem(&authority).context("reading the authority")?])
            .https_only(true)
            .no_proxy()
            .timeout(PATIENCE)
            .build()
            .context("making an HTTPS client")?;
        let node = if self.bare {
            Some(BareNode::serve(client.clone(), &self.base, &self.provider).await?)
        } else {
            None
        };
        let tokens: Vec<Result<String>> = futures::stream::iter(0..steady + crowd)
            .map(|number| self.pay(&client, number))
            .buffered(AT_ONCE)
            .collect()
            .await;
        let tokens = tokens.into_iter().collect::<Result<Vec<_>>>()?;
        let (first, rest) = tokens.split_at(steady);

        let requests = self.requests(&client, first).await?;
        let outcomes = self.steadily(&client, requests).await;
        let [p50, p99, most] = percentiles(&outcomes)?;
        let mut lost = failed(&outcomes);
        let mut text = format!(
            "{:<34} {:>8} {:>6} {:>8} {:>8} {:>8}\n",
            "clients", "a second", "lost", "p50 ms", "p99 ms", "most ms"
        );
        writeln!(
            text,
            "{:<34} {:>8.0} {lost:>6} {p50:>8.1} {p99:>8.1} {most:>8.1}",
            format!("{steady} steadily"),
            1.0 / STEP.as_secs_f64()
        )?;

        let requests = self.requests(&client, rest).await?;
        let start = Instant::now();
        let outcomes: Vec<Outcome> = futures::stream::iter(requests)
            .map(|request| self.approve(&client, request, Instant::now()))
            .buffer_unordered(AT_ONCE)
            .collect()
            .await;
        let took = start.elapsed();
        let [crowd_p50, crowd_p99, crowd_most] = percentiles(&outcomes)?;
        let refused = failed(&outcomes);
        let served = outcomes.len() - refused;
        let rate = f64::from(u32::try_from(served)?) / took.as_secs_f64();
        lost += refused;
        writeln!(
            text,
            "{:<34} {rate:>8.0} {refused:>6} {crowd_p50:>8.1} {crowd_p99:>8.1} {crowd_most:>8.1}",
            format!("{crowd}, {AT_ONCE} at a time")
        )?;
        if let Some(Err(why)) = outcomes.iter().find(|outcome| outcome.is_err()) {
            writeln!(text, "one that was lost: {why}")?;
        }
        let named = match &node {
            Some(node) => {
                let heard = node.heard();
                lost += (steady + crowd).abs_diff(heard);
                format!("a node that reads and acknowledges and carries nothing; it heard of {heard} clients")
            }
            None => "a dvpn-daemon as the node, with userspace WireGuard".to_owned(),
        };
        writeln!(text, "one dvpn-pool over TLS on loopback; {named}")?;
        writeln!(text, "figure approvals-per-second {rate:.0}")?;
        writeln!(text, "figure lost {lost}")?;
        writeln!(text, "figure steady-p50-ms {p50:.1}\nfigure steady-p99-ms {p99:.1}")?;
        Ok(text)
    }

    async fn post(&self, client: &reqwest::Client, path: &str, body: &Value) -> Result<Value> {
        let response = client.post(format!("{}{path}", self.base)).json(body).send().await?;
        let status = response.status();
        let text = response.text().await?;
        ensure!(status.is_success(), "{path} answers {status}: {text}");
        serde_json::from_str(&text).with_context(|| format!("reading the answer of {path}"))
    }

    /// A paid token.
    async fn pay(&self, client: &reqwest::Client, number: usize) -> Result<String> {
        let wish = json!({
            "user_id": format!("{number:032x}"),
            "required_wallet": REQUIRED_WALLET,
            "required_price_usd": REQUIRED_PRICE_USD,
            "required_interval": REQUIRED_INTERVAL,
        });
        let checkout = self.post(client, "/payment/checkout/start", &wish).await?;
        let text = |name: &str| checkout.get(name).and_then(Value::as_str).map(str::to_owned);
        let (Some(id), Some(secret)) = (text("session_id"), text("secret")) else {
            bail!("a checkout without id or secret")
        };
        self.post(client, &format!("/payment/dev/pay/{id}"), &json!({})).await?;
        let url = format!("{}/payment/checkout/{id}", self.base);
        let status: Value = client.get(url).bearer_auth(secret).send().await?.json().await?;
        let token = status.get("token").and_then(Value::as_str);
        token.map(str::to_owned).context("a paid checkout gives its token")
    }

    /// What clients of these tokens ask, each with a key of its own.
    async fn requests(&self, client: &reqwest::Client, tokens: &[String]) -> Result<Vec<ApproveRequest>> {
        let url = format!("{}/providers/approve/challenge", self.base);
        let challenge: ChallengeResponse = client.get(url).send().await?.json().await?;
        tokens
            .iter()
            .map(|token| {
                let key = PrivateKey::from_bytes(rand::random());
                let proof = possession::prove(&key, &challenge.public_key, &self.provider, token)?;
                Ok(ApproveRequest {
                    provider_id: self.provider.clone(),
                    token: token.clone(),
                    approved: true,
                    client_public_key: Some(public_key(&key)?),
                    proof: Some(proof),
                    renews: None,
                })
            })
            .collect()
    }

    async fn approve(&self, client: &reqwest::Client, request: ApproveRequest, due: Instant) -> Outcome {
        let url = format!("{}/providers/approve", self.base);
        let response = client.post(url).json(&request).send().await;
        let response = response.map_err(|error| format!("{error:?}"))?;
        let status = response.status();
        let body = response.text().await.map_err(|error| format!("{error:?}"))?;
        let took = due.elapsed();
        if status.is_success() && body.contains("\"signature\"") {
            Ok(took)
        } else {
            Err(format!("{status}: {body}"))
        }
    }

    /// One every [`STEP`], measured from when it was due: one that waits for others before it has waited.
    async fn steadily(&self, client: &reqwest::Client, requests: Vec<ApproveRequest>) -> Vec<Outcome> {
        let start = Instant::now() + STEP;
        let asked = requests.into_iter().zip(0_u32..).map(|(request, number)| async move {
            let due = start + STEP * number;
            tokio::time::sleep_until(due.into()).await;
            self.approve(client, request, due).await
        });
        futures::future::join_all(asked).await
    }
}

/// A node that is listed, reads its stream and acknowledges. Echo and WireGuard answer, and carry nothing.
struct BareNode {
    heard: Arc<AtomicUsize>,
    _tasks: [AbortOnDropHandle<()>; 3],
}

impl BareNode {
    /// Registers and waits until it is listed.
    async fn serve(client: reqwest::Client, base: &str, id: &str) -> Result<Self> {
        let private_key = PrivateKey::from_bytes(rand::random());
        let key = public_key(&private_key)?;
        let seed: [u8; 32] = rand::random();
        let signed = Signed {
            client,
            base: base.to_owned(),
            identity: Identity::from_seed(id.parse()?, &seed.into())?,
        };
        let registration = json!({
            "node_id": id,
            "endpoint": format!("{POOL}:{}", node::NODE_PORT),
            "probe": format!("{POOL}:{}", node::NODE_PORT + 1),
            "public_key": key,
            "identity": signed.identity.key(),
        });
        let register = "/providers/register";
        let answer: RegisterResponse = signed.send(Method::POST, register, &registration).await?.json().await?;
        let prober = PeerConfig {
            public_key: answer.prober_key.context("the pool has a prober")?,
            endpoint: None,
            allowed_ips: Vec::new(),
            keepalive: None,
        };
        let tunnel = UserspaceTunnel::create(TunnelConfig {
            interface: "dvpnbare0".to_owned(),
            private_key,
            listen_port: node::NODE_PORT,
            fwmark: 0,
            mtu_bytes: DEFAULT_MTU_BYTES,
            peers: vec![prober],
            offload: true,
        })
        .await?;
        let echo = EchoResponder::bind(node::NODE_PORT + 1, &key)?;
        let heard = Arc::new(AtomicUsize::new(0));
        let signed = Arc::new(signed);
        let events = signed
            .send(Method::GET, &format!("/providers/nodes/{id}/events"), &Value::Null)
            .await?;
        let following = follow(
            Arc::clone(&signed),
            events,
            format!("/providers/nodes/{id}/ack"),
            Arc::clone(&heard),
        );
        let (listing, mut listed) = tokio::sync::watch::channel(false);
        let beating = async move {
            // Lives as long as the heartbeats.
            let _tunnel = tunnel;
            loop {
                if let Ok(answer) = signed.send(Method::POST, register, &registration).await
                    && let Ok(answer) = answer.json::<RegisterResponse>().await
                {
                    listing.send_replace(answer.listed);
                }
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
        };
        let tasks = [
            AbortOnDropHandle::new(tokio::spawn(echo.run())),
            AbortOnDropHandle::new(tokio::spawn(following)),
            AbortOnDropHandle::new(tokio::spawn(beating)),
        ];
        tokio::time::timeout(PATIENCE, listed.wait_for(|listed| *listed))
            .await
            .context("the pool does not list the node")??;
        Ok(Self { heard, _tasks: tasks })
    }

    /// How many clients it was told of.
    fn heard(&self) -> usize {
        self.heard.load(Ordering::Relaxed)
    }
}

/// Requests that the node signs.
struct Signed {
    client: reqwest::Client,
    base: String,
    identity: Identity,
}

impl Signed {
    async fn send(&self, method: Method, path: &str, body: &Value) -> Result<reqwest::Response> {
        let body = if body.is_null() {
            Vec::new()
        } else {
            serde_json::to_vec(body)?
        };
        let headers = self
            .identity
            .sign_request(method.as_str(), path, &body, Timestamp::now());
        let request = self.client.request(method, format!("{}{path}", self.base)).body(body);
        let request = headers
            .into_iter()
            .fold(request, |request, (name, value)| request.header(name, value))
            .timeout(Duration::from_mins(10));
        Ok(request.send().await?.error_for_status()?)
    }
}

/// Reads events until the stream ends; what is there is acknowledged together, by the last sequence number.
async fn follow(signed: Arc<Signed>, events: reqwest::Response, ack: String, heard: Arc<AtomicUsize>) {
    let mut chunks = events.bytes_stream().ready_chunks(1024);
    let mut text = String::new();
    while let Some(ready) = chunks.next().await {
        for chunk in ready.into_iter().flatten() {
            text.push_str(&String::from_utf8_lossy(&chunk));
        }
        let Some((whole, rest)) = text.rsplit_once("\n\n") else {
            continue;
        };
        let added = whole.lines().filter(|line| line.trim_end() == "event: add").count();
        heard.fetch_add(added, Ordering::Relaxed);
        let last = whole
            .lines()
            .rev()
            .find_map(|line| line.strip_prefix("id: ")?.trim().parse::<u64>().ok());
        text = rest.to_owned();
        if let Some(sequence) = last
            && let Err(error) = signed.send(Method::POST, &ack, &json!({ "sequence": sequence })).await
        {
            tracing::error!("acknowledging {sequence}: {error:#}");
        }
    }
}

fn failed(outcomes: &[Outcome]) -> usize {
    outcomes.iter().filter(|outcome| outcome.is_err()).count()
}

/// p50, p99 and the longest, in milliseconds.
fn percentiles(outcomes: &[Outcome]) -> Result<[f64; 3]> {
    let mut times: Vec<Duration> = outcomes
        .iter()
        .filter_map(|outcome| outcome.as_ref().ok().copied())
        .collect();
    times.sort_unstable();
    let at = |hundredths: usize| times.get(times.len() * hundredths / 100).or(times.last());
    match (at(50), at(99), times.last()) {
        (Some(p50), Some(p99), Some(most)) => Ok([p50, p99, most].map(|time| time.as_secs_f64() * 1e3)),
        _ => bail!("no approval was given: {:?}", outcomes.first()),
    }
}
