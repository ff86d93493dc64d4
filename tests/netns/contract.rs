//! The plain contract: a pool that knows nothing of our additions (a bare list, approval by `200 {}`), and a provider
//! that is any WireGuard peer configured by hand.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context as _, Result, ensure};
use dvpn_common::{
    keys::{PrivateKey, PublicKey},
    status::ProbeMethod,
};
use dvpn_core::keys::public_key;
use dvpn_daemon::tunnel::{PeerConfig, Tunnel, TunnelConfig, userspace::UserspaceTunnel};
use dvpn_tests::{
    certs::Authority,
    network::{Machine, Network, NetworkConfig, POOL, WEB},
    node::{self, Daemon, NODE_PORT, POOL_PORT},
    sweep,
    world::{CONNECT_PATIENCE, unique_id},
};
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::counterpart::Counterpart;

const CLIENT_ADDRESS: &str = "10.77.0.2/32";
const TOKEN: &str = "a-token-of-the-other-pool";

/// A WireGuard peer with forwarding and masquerading, as wg-quick and three commands would make it.
struct PlainPeer {
    tunnel: Option<Box<dyn Tunnel>>,
    runtime: Runtime,
}

impl PlainPeer {
    fn start(machine: &Machine, key: &PrivateKey, client: PublicKey) -> Result<Self> {
        let config = TunnelConfig {
            interface: "wg0".into(),
            private_key: key.clone(),
            listen_port: NODE_PORT,
            fwmark: 0,
            mtu_bytes: 1420,
            offload: true,
            peers: vec![PeerConfig {
                public_key: client,
                endpoint: None,
                allowed_ips: vec![CLIENT_ADDRESS.parse()?],
                keepalive: None,
            }],
        };
        // The runtime's threads are made inside the namespace and so stay in it.
        let (runtime, tunnel) = machine.namespace.run(|| -> Result<_> {
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()?;
            let tunnel = runtime.block_on(UserspaceTunnel::create(config))?;
            Ok((runtime, tunnel))
        })??;
        machine.namespace.ip("addr add 10.77.0.1/24 dev wg0\nlink set wg0 up")?;
        machine.namespace.sysctl("ipv4/ip_forward", "1")?;
        machine.namespace.output("nft", &["add", "table", "ip", "plain"])?;
        let chain = "{ type nat hook postrouting priority srcnat; }";
        machine
            .namespace
            .output("nft", &["add", "chain", "ip", "plain", "post", chain])?;
        machine.namespace.output(
            "nft",
            &["add", "rule", "ip", "plain", "post", "oifname", "eth0", "masquerade"],
        )?;
        Ok(Self {
            tunnel: Some(tunnel),
            runtime,
        })
    }
}

impl Drop for PlainPeer {
    fn drop(&mut self) {
        if let Some(tunnel) = self.tunnel.take() {
            self.runtime.block_on(tunnel.close());
        }
    }
}

fn json_body(bytes: &[u8]) -> Result<Value> {
    serde_json::from_slice(bytes).context("a request of the client is not JSON")
}

#[test]
fn a_pool_and_a_provider_that_speak_only_the_plain_contract_carry_traffic() -> Result<()> {
    let _alone = sweep::exclusive()?;
    let network = Network::build(&NetworkConfig::with_round_trips(&unique_id(), &[6]))?;
    let authority = Authority::create(&network.directory.join("certs"))?;
    let identity = authority.issue("pool", &[POOL.into()], &[])?;
    let _web = node::spawn_web(&network)?;
    let machine = network.providers.first().context("a provider")?;
    let (provider_key, client_key) = (
        PrivateKey::from_bytes(rand::random()),
        PrivateKey::from_bytes(rand::random()),
    );
    let provider = PlainPeer::start(machine, &provider_key, public_key(&client_key)?)?;

    let pool = Counterpart::serve(&network.pool.namespace, SocketAddr::from((POOL, POOL_PORT)), &identity)?;
    let list = json!([{
        "id": "plain-provider",
        "endpoint": format!("{}:{NODE_PORT}", machine.address),
        "public_key": public_key(&provider_key)?.to_string(),
    }]);
    pool.answer("GET", "/providers", 200, list.to_string());
    pool.answer("POST", "/providers/approve", 200, "{}");
    let paid = json!({
        "active": true, "wallet": "1MUss4jmaRJ2sMtS9gyZqeRw8WrhWTsrxn", "interval": "monthly", "amount_usd": 9.99,
    });
    pool.answer("POST", "/payment", 200, paid.to_string());

    let private = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, client_key.expose());
    let environment = node::client_environment(&authority.certificate())
        .with("PAYMENT_TOKEN", TOKEN)
        .with("WG_PRIVATE_KEY", private)
        .with("WG_ADDRESS", CLIENT_ADDRESS)
        .with("TUNNEL_DNS", WEB.to_string());
    let client = Daemon::spawn(&network, &network.client, environment)?;
    let status = client
        .client
        .connect(CONNECT_PATIENCE)
        .with_context(|| format!("the client's log ends:\n{}", client.process.log_tail()))?;
    ensure!(
        status.static_key,
        "the configured key is in use, and the status must say so"
    );
    let methods: Vec<_> = status.candidates.iter().map(|candidate| candidate.method).collect();
    ensure!(
        methods == [Some(ProbeMethod::Icmp)],
        "a provider without an echo is measured by ICMP: {methods:?}"
    );
    let exit = client.client.exit_address(Duration::from_secs(5))?;
    ensure!(
        exit == machine.address,
        "the web server saw {exit} instead of the plain provider"
    );

    // What the pool was sent is the contract, letter for letter.
    let verify = pool.asked("POST", "/payment");
    let wanted = json!({
        "token": TOKEN, "provider_id": "plain-provider",
        "required_wallet": "1MUss4jmaRJ2sMtS9gyZqeRw8WrhWTsrxn", "required_price_usd": 9.99,
        "required_interval": "monthly",
    });
    let first = json_body(verify.first().context("the payment server was not asked")?)?;
    ensure!(first == wanted, "verify: {first}");
    let approve = json_body(
        pool.asked("POST", "/providers/approve")
            .first()
            .context("the pool was not asked")?,
    )?;
    for (field, value) in [
        ("provider_id", json!("plain-provider")),
        ("token", json!(TOKEN)),
        ("approved", json!(true)),
    ] {
        ensure!(approve.get(field) == Some(&value), "approve: {field} in {approve}");
    }
    drop((client, provider));
    Ok(())
}
