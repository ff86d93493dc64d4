//! What may pass in which state: a pure function of the session's state and the configuration.
//!
//! | event | effect |
//! |---|---|
//! | Stop | tunnel down, then open; stays blocked under lockdown |
//! | exit, restart, crash, expiry of the subscription, any failure | blocking stays blocking |
//!
//! The table follows from [`policy`]: only [`Phase::Idle`] opens, and a session that is wanted while the kill switch is
//! on is never idle. Blocked means: nothing leaves but loopback, the control plane (pool, payment, orchestrator, by the
//! daemon's own marked sockets) and what [`Exemptions`] names; each exemption is mark and address and port. One opening is wider, for a moment and by request alone:
//! [`crate::portal`].

use std::net::{IpAddr, SocketAddr};

use serde::Serialize;

use crate::directory::Provider;

/// The firewall as it should be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Policy {
    /// Nothing of ours in the way.
    Open,
    /// Nothing passes outside the tunnel but the control plane and these.
    Blocked(Exemptions),
}

/// What may pass while blocked, besides loopback and the control plane.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Exemptions {
    /// Our WireGuard socket to this endpoint, and everything on the tunnel interface.
    pub tunnel: Option<SocketAddr>,
    /// Our probes to these, while Probing.
    pub probes: Vec<ProbeTarget>,
    /// The fallback script runs, while Provisioning. Its one way out is a socket of the daemon's, so that the firewall
    /// opens nothing for it.
    pub fallback_script: bool,
}

/// Where a latency probe goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ProbeTarget {
    /// The UDP echo at this address.
    Echo(SocketAddr),
    /// ICMP echo to this address.
    Icmp(IpAddr),
}

impl ProbeTarget {
    /// How a provider is measured: by its echo, or by the next best.
    pub fn of(provider: &Provider) -> Self {
        match provider.probe {
            Some(address) => Self::Echo(address),
            None => Self::Icmp(provider.endpoint.ip()),
        }
    }
}

/// What the firewall must know of a state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase<'a> {
    /// No session is wanted, or none that blocks.
    Idle,
    /// A session is wanted; nothing but the control plane is in use.
    Waiting,
    /// These are being measured.
    Probing(&'a [Provider]),
    /// The fallback script runs.
    Provisioning,
    /// A tunnel to this endpoint is being used.
    Tunnel(SocketAddr),
}

/// The policy for a phase under a configuration.
pub fn policy(phase: Phase<'_>, kill_switch: bool, lockdown: bool) -> Policy {
    let blocked = match phase {
        Phase::Idle => lockdown,
        Phase::Waiting | Phase::Probing(_) | Phase::Provisioning | Phase::Tunnel(_) => kill_switch || lockdown,
    };
    if blocked {
        Policy::Blocked(exemptions(phase))
    } else {
        Policy::Open
    }
}

fn exemptions(phase: Phase<'_>) -> Exemptions {
    match phase {
        Phase::Idle | Phase::Waiting => Exemptions::default(),
        Phase::Probing(candidates) => Exemptions {
            probes: candidates.iter().map(ProbeTarget::of).collect(),
            ..Exemptions::default()
        },
        Phase::Provisioning => Exemptions {
            fallback_script: true,
            ..Exemptions::default()
        },
        Phase::Tunnel(endpoint) => Exemptions {
            tunnel: Some(endpoint),
            ..Exemptions::default()
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::fixtures::provider;

    fn phases(candidates: &[Provider]) -> Vec<Phase<'_>> {
        let endpoint = "192.0.2.7:51820".parse().unwrap();
        vec![
            Phase::Waiting,
            Phase::Probing(candidates),
            Phase::Provisioning,
            Phase::Tunnel(endpoint),
        ]
    }

    #[test]
    fn only_idle_opens_when_the_kill_switch_is_on_and_nothing_opens_a_lockdown() {
        let candidates = [provider(1), provider(2)];
        assert_eq!(policy(Phase::Idle, true, false), Policy::Open);
        assert_eq!(policy(Phase::Idle, false, true), Policy::Blocked(Exemptions::default()));
        for phase in phases(&candidates) {
            assert_eq!(policy(phase, false, false), Policy::Open, "{phase:?}");
            assert_ne!(policy(phase, true, false), Policy::Open, "{phase:?}");
            assert_ne!(policy(phase, false, true), Policy::Open, "{phase:?}");
        }
    }

    #[test]
    fn each_exemption_belongs_to_one_phase() {
        let mut icmp = provider(2);
        icmp.probe = None;
        let candidates = [provider(1), icmp.clone()];
        let of = |phase| match policy(phase, true, false) {
            Policy::Blocked(exemptions) => exemptions,
            Policy::Open => panic!("open in {phase:?}"),
        };
        assert_eq!(of(Phase::Waiting), Exemptions::default());
        let probing = of(Phase::Probing(&candidates));
        assert_eq!(
            probing.probes,
            [
                ProbeTarget::Echo(candidates[0].probe.unwrap()),
                ProbeTarget::Icmp(icmp.endpoint.ip())
            ]
        );
        assert_eq!((probing.tunnel, probing.fallback_script), (None, false));
        assert!(of(Phase::Provisioning).fallback_script);
        let endpoint = icmp.endpoint;
        assert_eq!(
            of(Phase::Tunnel(endpoint)),
            Exemptions {
                tunnel: Some(endpoint),
                ..Exemptions::default()
            }
        );
    }
}
