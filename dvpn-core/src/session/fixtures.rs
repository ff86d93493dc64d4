//! What several tests need: providers, subscriptions and approvals made from numbers, through the real constructors.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use dvpn_common::keys::PublicKey;
use jiff::Timestamp;

use super::{Choice, SessionConfig};
use crate::{
    Failure, Now, Retry,
    approval::{Approval, PoolRequest, ProvisionRequest},
    directory::{Directory, Policy, Provider},
    payment::{self, Subscription, Verification},
};

/// Provider number `n`: `provider-n` at 192.0.2.n:51820, region `even` or `odd`, echo one port above.
pub(crate) fn provider(n: u8) -> Provider {
    let address = IpAddr::V4(Ipv4Addr::new(192, 0, 2, n));
    Provider {
        id: format!("provider-{n}").parse().unwrap(),
        endpoint: SocketAddr::new(address, 51820),
        public_key: PublicKey::from_bytes([n.max(1); 32]).unwrap(),
        allowed_ips: vec!["0.0.0.0/0".parse().unwrap()],
        probe: Some(SocketAddr::new(address, 51821)),
        region: Some(if n.is_multiple_of(2) { "even" } else { "odd" }.parse().unwrap()),
    }
}

/// Providers 1 to `n`.
pub(crate) fn directory(n: u8) -> Directory {
    Directory {
        providers: (1..=n).map(provider).collect(),
        version: None,
        expires_at: None,
        signer: None,
    }
}

/// A start of all clocks.
pub(crate) fn start() -> Now {
    #[expect(
        clippy::disallowed_methods,
        reason = "an Instant has no other source; only differences count"
    )]
    let instant = Instant::now();
    Now {
        instant,
        wall: Timestamp::from_second(1_800_000_000).unwrap(),
    }
}

pub(crate) fn after(now: Now, time: Duration) -> Now {
    Now {
        instant: now.instant + time,
        wall: now.wall.checked_add(time).unwrap(),
    }
}

/// A real yes, good for `time`.
pub(crate) fn paid(now: Now, time: Duration) -> Verification {
    let until = now.wall.checked_add(time).unwrap().as_second();
    let body = format!(
        r#"{{"active":true,"wallet":"1MUss4jmaRJ2sMtS9gyZqeRw8WrhWTsrxn","interval":"monthly","amount_usd":9.99,"expires_at":{until}}}"#
    );
    let verification = payment::judge(200, body.as_bytes(), now.wall);
    assert!(matches!(verification, Verification::Paid(_)), "{verification:?}");
    verification
}

pub(crate) fn subscription(now: Now, time: Duration) -> Subscription {
    match paid(now, time) {
        Verification::Paid(subscription) => subscription,
        Verification::NotPaid(failure) | Verification::CannotTell(failure) => panic!("{failure}"),
    }
}

/// A real approval at a provider, good for `time`, for a key of its own; always at the same tunnel address.
pub(crate) fn approval(provider: &Provider, now: Now, time: Duration) -> Box<Approval> {
    approval_at("10.96.0.2", provider, now, time)
}

pub(crate) fn approval_at(address: &str, provider: &Provider, now: Now, time: Duration) -> Box<Approval> {
    static KEYS: AtomicU64 = AtomicU64::new(0);
    let mut key = [200; 32];
    key[..8].copy_from_slice(&KEYS.fetch_add(1, Ordering::Relaxed).to_be_bytes());
    let until = now.wall.checked_add(time).unwrap();
    let body = format!(r#"{{"address":"{address}/32","gateways":["10.96.0.1"],"expires_at":"{until}"}}"#);
    let asked = PoolRequest {
        subscription: &subscription(now, Duration::from_hours(1000)),
        provider,
        client_key: &PublicKey::from_bytes(key).unwrap(),
        static_addresses: &[],
        pool_key: None,
        last_serial: None,
        now: now.wall,
    };
    Box::new(Approval::from_pool(&asked, 200, body.as_bytes()).unwrap())
}

/// A real approval at a provider that the orchestrator made, leased for `time`.
pub(crate) fn leased(provider: &Provider, now: Now, time: Duration) -> Box<Approval> {
    let until = now.wall.checked_add(time).unwrap();
    let body = format!(
        r#"{{"id":"{}","endpoint":"{}","public_key":"{}","address":"10.96.0.2/32","lease_id":"lease","lease_expires_at":"{until}"}}"#,
        provider.id, provider.endpoint, provider.public_key
    );
    let asked = ProvisionRequest {
        subscription: &subscription(now, Duration::from_hours(1000)),
        client_key: &PublicKey::from_bytes([200; 32]).unwrap(),
        policy: &Policy {
            private_endpoints: true,
            ..Policy::default()
        },
        static_addresses: &[],
        now: now.wall,
    };
    Box::new(Approval::from_provision(&asked, body.as_bytes()).unwrap())
}

pub(crate) fn failure(retry: Retry) -> Failure {
    Failure {
        what: "it failed".into(),
        how: "mend it".into(),
        retry,
    }
}

pub(crate) fn config() -> SessionConfig {
    SessionConfig {
        not_configured: None,
        kill_switch: true,
        lockdown: false,
        sample_size: 3,
        choice: Choice::default(),
        fallback: false,
        fallback_timeout: Duration::from_mins(2),
    }
}
