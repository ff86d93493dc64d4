//! The session as others see it.

use dvpn_common::status::{ModeName, PaymentStatus, StateName, Status};
use dvpn_core::{
    config::{Config, Mode},
    firewall::Policy,
    portal::Portal,
    session::Session,
};
use jiff::Timestamp;

/// Before the stored state is opened.
pub(super) fn starting(config: &Config) -> Status {
    Status {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        state: StateName::Disconnected,
        since: Timestamp::now(),
        autostart: false,
        mode: match config.tunnel.mode {
            Mode::App => ModeName::App,
            Mode::Device => ModeName::Device,
        },
        blocking: false,
        portal: None,
        provider: None,
        candidates: Vec::new(),
        payment: PaymentStatus::Unknown,
        paid_until: None,
        problem: None,
        socks5: Some(config.socks5.listen),
        attempts: 0,
        switches: 0,
        backend: None,
        rx_bytes: 0,
        tx_bytes: 0,
        static_key: config.tunnel.private_key.is_some(),
        confirm_by: None,
        node: None,
        line: None,
    }
}

/// The status now.
pub(super) fn of(session: &Session, config: &Config, autostart: bool) -> Status {
    let seen = session.status();
    Status {
        state: seen.state,
        since: seen.since,
        autostart,
        blocking: matches!(session.firewall(), Some(Policy::Blocked(_))) && !seen.leaking,
        provider: seen.provider,
        candidates: seen.candidates,
        payment: seen.payment,
        paid_until: seen.paid_until,
        problem: seen.problem,
        attempts: seen.attempts,
        switches: seen.switches,
        rx_bytes: seen.traffic.rx_bytes,
        tx_bytes: seen.traffic.tx_bytes,
        ..starting(config)
    }
}

/// A network that wants a login is the reason of whatever else is wrong.
pub(super) fn show_login(status: &mut Status, portal: &Portal) {
    status.portal = portal.status();
    status.problem = portal.problem().or(status.problem.take());
}

/// Whether applications may send: a degraded tunnel is being repaired, and what waits in it need not be cut off.
pub(super) fn carries_traffic(state: StateName) -> bool {
    matches!(state, StateName::Connected | StateName::Degraded)
}

/// Whether a Stop is still being carried out.
pub(super) fn is_going_down(state: StateName) -> bool {
    state == StateName::Disconnecting
}

/// Whether no session goes on: nothing of ours is left on the machine then.
pub(super) fn is_at_rest(state: StateName) -> bool {
    matches!(state, StateName::Disconnected | StateName::Blocked)
}

/// One line for each change a person would want to read.
pub(super) fn log(before: &Status, now: &Status) {
    if before.state != now.state {
        let provider = now
            .provider
            .as_ref()
            .map(|provider| format!(" (provider {})", provider.id));
        tracing::info!("{}{}", now.state.as_str(), provider.unwrap_or_default());
    }
    if before.problem != now.problem
        && let Some(problem) = &now.problem
    {
        tracing::warn!("{}: {}", problem.what, problem.how);
    }
}
