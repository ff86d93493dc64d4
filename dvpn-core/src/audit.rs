//! What is worth recording: one typed event per fact an auditor asks for.
//!
//! An event never holds a secret, a token, a WireGuard key or a destination. Providers are named by their ids. The provider side
//! has events of its own, beside the code that decides them there.

use std::net::SocketAddr;

use dvpn_common::{
    ids::ProviderId,
    status::{PortalSign, ProbeMethod, StateName},
};
use jiff::Timestamp;
use serde::Serialize;

use crate::{firewall::Policy, leak, portal};

/// An audit event.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The session's state changed.
    StateChanged {
        /// State left.
        from: StateName,
        /// State entered.
        to: StateName,
    },
    /// The pool's list was believed.
    ListAccepted {
        /// How many providers it offers.
        providers: usize,
        /// The pool's version of it.
        version: Option<u64>,
    },
    /// The pool's list was refused, or did not come. What was held before is kept.
    ListRefused {
        /// Why.
        reason: String,
    },
    /// A provider is tried.
    ProviderChosen {
        /// Who.
        provider: ProviderId,
        /// Its measured round trip, in milliseconds.
        latency_ms: Option<f64>,
        /// How that was measured.
        method: Option<ProbeMethod>,
    },
    /// The payment server was asked.
    PaymentVerified {
        /// For which provider.
        provider: ProviderId,
        /// What it said.
        outcome: VerificationOutcome,
    },
    /// A tunnel to this provider is allowed.
    ApprovalGranted {
        /// Who.
        provider: ProviderId,
        /// Until when.
        expires_at: Timestamp,
    },
    /// A tunnel to this provider is not allowed.
    ApprovalRefused {
        /// Who.
        provider: ProviderId,
        /// Why.
        reason: String,
    },
    /// A provider was made for us by the orchestrator.
    FallbackProvisioned {
        /// Who.
        provider: ProviderId,
        /// Until when.
        expires_at: Timestamp,
    },
    /// The orchestrator made no provider.
    FallbackFailed {
        /// Why.
        reason: String,
    },
    /// The first handshake of a tunnel completed.
    TunnelUp {
        /// With whom.
        provider: ProviderId,
        /// Its outer address and port.
        endpoint: SocketAddr,
    },
    /// A standing tunnel goes on under a fresh approval.
    TunnelRenewed {
        /// With whom.
        provider: ProviderId,
        /// Until when.
        expires_at: Timestamp,
    },
    /// The key of a pool was seen for the first time, or changed over a chain of signatures.
    PoolKeyPinned {
        /// The key, base64.
        key: String,
        /// What it was before.
        before: Option<String>,
    },
    /// A tunnel went down.
    TunnelDown {
        /// With whom.
        provider: ProviderId,
        /// Why.
        reason: String,
    },
    /// The firewall is asked to be this.
    FirewallChanged {
        /// What.
        policy: Policy,
    },
    /// The firewall could not be changed.
    FirewallFailed {
        /// Why.
        reason: String,
    },
    /// Somebody else took something of the firewall, rules or routes away; it was made again.
    FirewallRepaired {
        /// What it was.
        lost: &'static str,
    },
    /// The network wants a login.
    PortalFound {
        /// What gave it away.
        sign: PortalSign,
    },
    /// A user's program is let out beside the tunnel, to log in to the network.
    PortalOpened {
        /// Whose.
        uid: u32,
        /// Until when, at the latest.
        ends_at: Timestamp,
    },
    /// It is let out no more.
    PortalClosed {
        /// Why.
        reason: portal::Ended,
    },
    /// A leak test was made.
    LeakTested {
        /// The worst of its rows.
        verdict: leak::Verdict,
        /// The rows that leak.
        leaks: Vec<&'static str>,
    },
    /// A start over SSH was not confirmed.
    StartTakenBack,
    /// The line was measured.
    LineMeasured {
        /// From the internet, layer 3.
        down_bits_per_second: u64,
        /// To the internet, layer 3; nothing where the server takes no uploads.
        up_bits_per_second: Option<u64>,
        /// What it cost.
        payload_bytes: u64,
    },
    /// The line, or a direction of it, is not known.
    LineUnmeasured {
        /// Why.
        reason: String,
    },
    /// A checkout was begun.
    CheckoutStarted,
    /// A payment token was stored.
    TokenStored,
    /// Somebody used the control interface.
    Command {
        /// What they asked for.
        command: String,
        /// Their user id.
        uid: Option<u32>,
        /// Whether they may.
        allowed: bool,
    },
    /// More calls of somebody who may not call: the first was a [`Event::Command`].
    CommandsDenied {
        /// Their user id; nothing for many users together.
        uid: Option<u32>,
        /// How many in the last ten seconds.
        count: u64,
    },
    /// The configuration was read again.
    ConfigReloaded {
        /// False: the new one was refused and the old one holds.
        accepted: bool,
        /// Why it was refused.
        reason: Option<String>,
    },
    /// The daemon runs.
    Started {
        /// Its version.
        version: String,
    },
    /// The daemon ends.
    Stopped {
        /// Why.
        reason: String,
    },
}

/// What the payment server said.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub enum VerificationOutcome {
    /// All rules hold.
    Paid {
        /// End of access.
        valid_until: Timestamp,
    },
    /// A rule does not hold.
    NotPaid {
        /// Which, and how.
        reason: String,
    },
    /// Nothing that says yes or no.
    CannotTell {
        /// Why.
        reason: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_one_flat_json_object_named_by_its_kind() {
        let event = Event::StateChanged {
            from: StateName::Probing,
            to: StateName::Authorizing,
        };
        assert_eq!(
            serde_json::to_string(&event).unwrap(),
            r#"{"event":"state_changed","from":"probing","to":"authorizing"}"#
        );
        let event = Event::FirewallChanged { policy: Policy::Open };
        assert_eq!(
            serde_json::to_string(&event).unwrap(),
            r#"{"event":"firewall_changed","policy":"open"}"#
        );
    }
}
