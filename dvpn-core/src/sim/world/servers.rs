//! The pool, the payment server and the orchestrator: what they answer, and when.

use std::time::Duration;

use dvpn_common::{keys::PublicKey, status::ProbeMethod};
use rand::RngExt as _;

use super::{Server, World, failure, peer};
use crate::{
    Failure, Retry,
    approval::{Approval, PoolRequest, ProvisionRequest},
    directory::{Directory, Policy as DirectoryPolicy, Provider},
    payment::{self, Subscription},
    session::{Attempt, Input, Measurement},
};

/// A yes in a payment server's words.
const PAID: &str =
    r#""active":true,"wallet":"1MUss4jmaRJ2sMtS9gyZqeRw8WrhWTsrxn","interval":"monthly","amount_usd":9.99"#;

impl World {
    /// When a server's answer comes, if it does.
    pub(super) fn delay(&mut self, server: Server) -> Option<Duration> {
        let milliseconds = match server {
            Server::Up | Server::Hostile => 5..80,
            Server::Slow => 2_000..40_000,
            Server::Down => 1..10_000,
            Server::Lost => return None,
        };
        Some(Duration::from_millis(self.rng.random_range(milliseconds)))
    }

    pub(super) fn list(&mut self, attempt: Attempt) {
        let Some(delay) = self.delay(self.pool) else { return };
        let answer = match self.pool {
            Server::Up | Server::Slow => Ok(Directory {
                providers: self.peers.iter().map(|peer| peer.provider.clone()).collect(),
                version: None,
                expires_at: None,
                signer: None,
            }),
            Server::Hostile => Err(failure("the list holds a key twice", Retry::Backoff)),
            Server::Down | Server::Lost => Err(failure("the pool is unreachable", Retry::Backoff)),
        };
        self.tell(delay, Input::Listed(attempt, answer));
    }

    pub(super) fn measure(&mut self, attempt: Attempt, providers: &[Provider]) {
        let measurements: Vec<_> = providers
            .iter()
            .map(|provider| {
                let answered = (0..3).filter(|_| self.passes(&provider.id)).count() >= 2;
                let latency = self
                    .peers
                    .iter()
                    .find(|peer| peer.provider.id == provider.id)
                    .map(|peer| peer.latency);
                Measurement {
                    provider: provider.id.clone(),
                    latency: latency.filter(|_| answered),
                    method: if provider.probe.is_some() {
                        ProbeMethod::Echo
                    } else {
                        ProbeMethod::Icmp
                    },
                }
            })
            .collect();
        let delay = Duration::from_millis(self.rng.random_range(30..1_000));
        self.tell(delay, Input::Probed(attempt, measurements));
    }

    pub(super) fn verify(&mut self, attempt: Attempt) {
        let Some(delay) = self.delay(self.payment) else { return };
        let now = self.now().wall;
        let until = now.checked_add(self.subscription_life).unwrap_or(now).as_second();
        let verification = match self.payment {
            Server::Up | Server::Slow => {
                payment::judge(200, format!(r#"{{{PAID},"expires_at":{until}}}"#).as_bytes(), now)
            }
            Server::Hostile => payment::judge(200, br#"{"active":false}"#, now),
            Server::Down | Server::Lost => payment::judge(502, b"bad gateway", now),
        };
        self.tell(delay, Input::Verified(attempt, verification));
    }

    pub(super) fn approve(
        &mut self,
        attempt: Attempt,
        provider: &Provider,
        subscription: &Subscription,
        renews: Option<PublicKey>,
    ) {
        let Some(client_key) = self.key_for(attempt, &provider.id, renews) else {
            return;
        };
        // What becomes of the question on its way to the pool and back.
        let luck = if self.healed { 0 } else { self.rng.random_range(0..20) };
        let (acts, answers) = match self.pool {
            Server::Up | Server::Slow | Server::Hostile => (luck < 19, luck < 18),
            Server::Down | Server::Lost => (luck >= 10, false),
        };
        let host = if acts { self.admit(renews.is_some()) } else { None };
        let Some(delay) = self.delay(self.pool) else { return };
        let now = self.now().wall;
        let until = now.checked_add(self.approval_life).unwrap_or(now);
        // A hostile pool answers for another provider than was asked.
        let other = self
            .peers
            .iter()
            .map(|peer| &peer.provider)
            .find(|other| other.id != provider.id);
        let answered = match self.pool {
            Server::Hostile => other.unwrap_or(provider),
            Server::Up | Server::Slow | Server::Down | Server::Lost => provider,
        };
        let asked = PoolRequest {
            subscription,
            provider: answered,
            client_key: &client_key,
            static_addresses: &[],
            pool_key: None,
            last_serial: None,
            now,
        };
        let (status, body) = match (acts, answers, host) {
            (true, true, Some(host)) => (
                200,
                format!(r#"{{"address":"10.96.0.{host}/32","gateways":["10.96.0.1"],"expires_at":"{until}"}}"#),
            ),
            (true, true, None) => (409, String::new()),
            (true, false, _) => (502, String::new()),
            (false, ..) => (503, String::new()),
        };
        let answer = Approval::from_pool(&asked, status, body.as_bytes())
            .map(Box::new)
            .map_err(Failure::from);
        self.tell(delay, Input::Approved(attempt, answer));
    }

    pub(super) fn provision(&mut self, attempt: Attempt, subscription: &Subscription) {
        let Some(delay) = self.delay(self.orchestrator) else {
            return;
        };
        let now = self.now().wall;
        let Some(client_key) = self.key() else { return };
        let mut made = peer(100, &mut self.rng);
        made.provider.id = match "made".parse() {
            Ok(id) => id,
            Err(_never) => return,
        };
        let policy = DirectoryPolicy {
            own_keys: &[],
            own_node: None,
            private_endpoints: true,
        };
        let asked = ProvisionRequest {
            subscription,
            client_key: &client_key,
            policy: &policy,
            static_addresses: &[],
            now,
        };
        let body = match self.orchestrator {
            Server::Up | Server::Slow => format!(
                r#"{{"id":"made","endpoint":"{}","public_key":"{}","address":"10.97.0.2/32"}}"#,
                made.provider.endpoint, made.provider.public_key
            ),
            Server::Hostile => r#"{"id":"made","endpoint":"nowhere","public_key":"","address":"::/0"}"#.to_owned(),
            Server::Down | Server::Lost => String::new(),
        };
        let answer = Approval::from_provision(&asked, body.as_bytes())
            .map(Box::new)
            .map_err(Failure::from);
        if answer.is_ok() {
            self.counts.provisions += 1;
            self.peers.retain(|peer| peer.provider.id != made.provider.id);
            self.peers.push(made);
        }
        self.tell(delay, Input::Provisioned(attempt, answer));
    }

    pub(super) fn key(&mut self) -> Option<PublicKey> {
        PublicKey::from_bytes(self.rng.random()).ok()
    }
}
