//! Measures how fast paying clients are approved: a pool and a provider as processes of their own in one network
//! namespace, so that loopback is all that lies between them, and clients with open TLS connections.
//!
//! An approval is answered once the provider has the peer and said so, and the pool has put that on its disk: the time
//! from asking to the answer holds the time to the acknowledgement. Prints a table and then `figure NAME VALUE` lines
//! for `scripts/bench/approvals.sh`.
//!
//! `BENCH_STEADY` (1,000) clients come at 100 a second, whether or not the ones before them were answered; then
//! `BENCH_CROWD` (2,500) as fast as they are served, 128 at a time.

use std::{
    fmt::Write as _,
    io::Write as IoWrite,
    path::Path,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use dvpn_common::{
    contract::{ApproveRequest, ChallengeResponse},
    keys::PrivateKey,
    limits::{REQUIRED_INTERVAL, REQUIRED_PRICE_USD, REQUIRED_WALLET},
};
use dvpn_core::{keys::public_key, possession};
use dvpn_tests::{
    certs::Authority,
    namespace::Namespace,
    network::{Network, NetworkConfig, POOL},
    node::{self, Daemon},
    sweep,
    world::unique_id,
};
use futures::StreamExt as _;
use serde_json::{Value, json};

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
    let environment = node::provider_environment(&machine, &ca).with("NODE_MAX_PEERS", "4096");
    let provider = Daemon::spawn(&network, &machine, environment)?;
    node::wait_until_listed(&network, &ca, 1, PATIENCE)
        .with_context(|| format!("the pool says:\n{}", pool.log_tail()))?;
    let load = Load {
        base: format!("https://{POOL}:{}", node::POOL_PORT),
        provider: machine.name.clone(),
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
            provider.process.log_tail()
        )
    })
}

/// The clients.
struct Load {
    base: String,
    provider: String,
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
        let crowd_lost = failed(&outcomes);
        let served = outcomes.len() - crowd_lost;
        let rate = f64::from(u32::try_from(served)?) / took.as_secs_f64();
        lost += crowd_lost;
        writeln!(
            text,
            "{:<34} {rate:>8.0} {crowd_lost:>6} {crowd_p50:>8.1} {crowd_p99:>8.1} {crowd_most:>8.1}",
            format!("{crowd}, {AT_ONCE} at a time")
        )?;
        if let Some(Err(why)) = outcomes.iter().find(|outcome| outcome.is_err()) {
            writeln!(text, "one that was lost: {why}")?;
        }
        writeln!(
            text,
            "one dvpn-pool over TLS on loopback, one dvpn-daemon as the provider, userspace WireGuard"
        )?;
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
