//! The three questions by which a network that wants a login is told from a dead one, asked by marked sockets. The one in
//! the clear comes last, and only where the pool does not answer.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use dvpn_core::portal::{PageAnswer, Place, PoolAnswer, Seen, Verdict, check_url, host_of, judge, page, places};
use tokio::time::timeout;
use url::{Host, Url};

use crate::{
    control_plane::ControlPlane,
    http::{Error, Plain, Pool, TlsProblem},
};

/// How long each question may take.
const PATIENCE: Duration = Duration::from_secs(4);

/// What came of it.
#[derive(Debug, Clone)]
pub struct Look {
    /// What follows.
    pub verdict: Verdict,
    /// What to open in a browser.
    pub login: Url,
    /// Where that is.
    pub places: Vec<Place>,
}

/// Looks at the network now; nothing without a way to ask in the clear. At most three times as long as one question.
pub async fn look(plane: &ControlPlane, pool: &Pool, clear: Option<&Url>, pool_private: bool) -> Option<Look> {
    let asked = check_url(clear, pool.url())?;
    let (addresses, pool_answer) = tokio::join!(addresses(plane, pool.url()), handshake(pool));
    let page = match pool_answer {
        PoolAnswer::Itself => PageAnswer::Nothing,
        PoolAnswer::Stranger | PoolAnswer::Unvouched | PoolAnswer::Nothing => question(plane, &asked).await,
    };
    let seen = Seen {
        addresses,
        pool: pool_answer,
        page,
    };
    let verdict = judge(&seen, pool_private);
    tracing::debug!(?seen, ?verdict, "looked at the network");
    let login = match &seen.page {
        PageAnswer::Login(url) => url.clone(),
        PageAnswer::Ordinary | PageAnswer::Nothing => asked,
    };
    let places = match (&verdict, host_of(&login)) {
        (Verdict::Portal(_), Some((host, port))) => places(&resolve(plane, &host).await, port),
        (Verdict::Portal(_) | Verdict::Unknown | Verdict::Reached, _) => Vec::new(),
    };
    Some(Look { verdict, login, places })
}

async fn addresses(plane: &ControlPlane, pool: &Url) -> Vec<IpAddr> {
    match pool.host() {
        Some(Host::Domain(name)) => resolve(plane, &Host::Domain(name.to_owned())).await,
        Some(Host::Ipv4(_) | Host::Ipv6(_)) | None => Vec::new(),
    }
}

async fn resolve(plane: &ControlPlane, host: &Host<String>) -> Vec<IpAddr> {
    match host {
        Host::Ipv4(address) => vec![IpAddr::V4(*address)],
        Host::Ipv6(address) => vec![IpAddr::V6(*address)],
        Host::Domain(name) => match timeout(PATIENCE, plane.ask(name)).await {
            Ok(Ok(addresses)) => addresses,
            Ok(Err(_)) | Err(_) => Vec::new(),
        },
    }
}

async fn handshake(pool: &Pool) -> PoolAnswer {
    match pool.client().fetch(pool.url(), None, PATIENCE).await {
        // The status is the pool's own affair.
        Ok(_) | Err(Error::Redirect { .. }) => PoolAnswer::Itself,
        Err(Error::Tls { problem, .. }) => match problem {
            TlsProblem::WrongName | TlsProblem::NotTls => PoolAnswer::Stranger,
            TlsProblem::Untrusted => PoolAnswer::Unvouched,
            TlsProblem::Expired | TlsProblem::Version | TlsProblem::Other => PoolAnswer::Nothing,
        },
        Err(_) => PoolAnswer::Nothing,
    }
}

async fn question(plane: &ControlPlane, asked: &Url) -> PageAnswer {
    match Plain::ask(plane, asked, PATIENCE).await {
        Ok(answer) => page(answer.status, answer.location.as_deref(), asked),
        Err(error) => {
            tracing::debug!("asking in the clear: {error}");
            PageAnswer::Nothing
        }
    }
}

/// The proxy's view of an address.
pub(super) fn admitted(places: &[Place], addresses: Vec<IpAddr>, port: u16) -> Vec<SocketAddr> {
    let ours: Vec<IpAddr> = nix::ifaddrs::getifaddrs()
        .map(|interfaces| interfaces.filter_map(|interface| ip(&interface)).collect())
        .unwrap_or_default();
    addresses
        .into_iter()
        .map(|address| SocketAddr::new(address.to_canonical(), port))
        .filter(|to| dvpn_core::portal::admits(places, *to) && !ours.contains(&to.ip()))
        .collect()
}

fn ip(interface: &nix::ifaddrs::InterfaceAddress) -> Option<IpAddr> {
    let address = interface.address.as_ref()?;
    let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
    v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
}
