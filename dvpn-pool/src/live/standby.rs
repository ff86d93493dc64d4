//! Nodes on standby: alive like any other, listed never.

use std::{collections::BTreeSet, time::Instant};

use dvpn_common::ids::ProviderId;

use super::Live;
use crate::store::Node;

/// Why a standby node that is otherwise well is not listed.
pub(super) const REASON: &str = "this node is on standby: only the orchestrator hands it out";

impl Live {
    /// Makes exactly these nodes standbys.
    pub fn set_standbys(&self, standbys: &BTreeSet<ProviderId>, now: Instant) {
        let mut state = self.state();
        let changed: Vec<ProviderId> = state
            .nodes
            .values()
            .filter(|live| live.standby != standbys.contains(&live.node.id))
            .map(|live| live.node.id.clone())
            .collect();
        for id in changed {
            if let Some(live) = state.nodes.get_mut(&id) {
                live.standby = !live.standby;
                tracing::info!(node = %id, standby = live.standby, "changed by the operator");
            }
            self.review(&mut state, &id, now);
        }
    }

    /// Whether the operator keeps this node for the orchestrator.
    pub fn is_standby(&self, id: &ProviderId) -> bool {
        self.state().nodes.get(id).is_some_and(|live| live.standby)
    }

    /// The standbys that could be listed if they were none.
    pub fn ready_standbys(&self, now: Instant) -> Vec<Node> {
        self.state()
            .nodes
            .values()
            .filter(|live| live.standby && live.closed(self.open_registration, &self.timing, now).is_none())
            .map(|live| live.node.clone())
            .collect()
    }
}
