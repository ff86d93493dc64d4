//! Requests that nodes sign, as [`dvpn_common::node`] says: fresh, of the claimed node, and used once.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::{Mutex, PoisonError},
};

use axum::http::HeaderMap;
use base64::{Engine as _, engine::general_purpose::STANDARD};
use dvpn_common::{
    ids::ProviderId,
    keys::VerifyingKey,
    limits::MAX_CLOCK_SKEW,
    node::{HEADER_NODE, HEADER_NONCE, HEADER_SIGNATURE, HEADER_TIME, SignedRequest},
};

use crate::{
    refusal::Refusal,
    signing::{sha256, verify},
};

/// The headers of one signed request, read and not yet believed.
#[derive(Debug, Clone)]
pub struct Claim {
    /// Who signs.
    pub node: ProviderId,
    time: i64,
    nonce_text: String,
    nonce: u128,
    signature: [u8; 64],
}

impl Claim {
    /// Reads the four headers.
    pub fn read(headers: &HeaderMap) -> Result<Self, Refusal> {
        let text = |name: &'static str| {
            headers
                .get(name)
                .and_then(|value| value.to_str().ok())
                .ok_or_else(|| Refusal::unauthorized(format!("this request must be signed: header {name} is missing")))
        };
        let unreadable = |name| move || Refusal::unauthorized(format!("header {name} does not read"));
        let nonce_text = text(HEADER_NONCE)?.to_owned();
        Ok(Self {
            node: text(HEADER_NODE)?.parse().ok().ok_or_else(unreadable(HEADER_NODE))?,
            time: text(HEADER_TIME)?.parse().ok().ok_or_else(unreadable(HEADER_TIME))?,
            nonce: crate::hex::decode(&nonce_text)
                .map(u128::from_be_bytes)
                .ok_or_else(unreadable(HEADER_NONCE))?,
            nonce_text,
            signature: STANDARD
                .decode(text(HEADER_SIGNATURE)?)
                .ok()
                .and_then(|bytes| bytes.try_into().ok())
                .ok_or_else(unreadable(HEADER_SIGNATURE))?,
        })
    }

    /// Checks time, signature and, last, that the nonce is new: only a valid signature may fill the cache.
    pub fn accept(
        &self,
        request: &SignedParts<'_>,
        identity: &VerifyingKey,
        replays: &ReplayCache,
        now: i64,
    ) -> Result<(), Refusal> {
        self.verify(request, identity, now)?;
        replays.admit(self, now)
    }

    /// Checks time and signature. The nonce is still to be admitted.
    pub fn verify(&self, request: &SignedParts<'_>, identity: &VerifyingKey, now: i64) -> Result<(), Refusal> {
        if self.time.abs_diff(now) > MAX_CLOCK_SKEW.as_secs() {
            return Err(Refusal::unauthorized(format!(
                "the request is signed for {}, here it is {now}: set the clock (NTP)",
                self.time
            )));
        }
        let signed = SignedRequest {
            method: request.method,
            path: request.path,
            body_sha256: &sha256(request.body),
            time: self.time,
            nonce: &self.nonce_text,
            node: self.node.as_str(),
        };
        if !verify(identity, &signed.bytes(), &self.signature) {
            return Err(Refusal::unauthorized(
                "the signature is not this node's over this request",
            ));
        }
        Ok(())
    }
}

/// What a signature covers of the request itself.
#[derive(Debug, Clone, Copy)]
pub struct SignedParts<'a> {
    /// `GET` or `POST`.
    pub method: &'a str,
    /// Path and query as sent.
    pub path: &'a str,
    /// The body as sent.
    pub body: &'a [u8],
}

/// Nonces seen, for as long as their requests could still be fresh. Bounded for each node, so that who floods blocks
/// itself, and for all of them together.
pub struct ReplayCache {
    per_node: usize,
    most: usize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    seen: HashMap<ProviderId, Seen>,
    all: usize,
}

#[derive(Default)]
struct Seen {
    nonces: HashSet<u128>,
    by_age: VecDeque<(i64, u128)>,
}

impl Seen {
    /// How many went.
    fn forget_before(&mut self, oldest: i64) -> usize {
        let before = self.nonces.len();
        while let Some((_, nonce)) = self.by_age.pop_front_if(|(at, _)| *at < oldest) {
            self.nonces.remove(&nonce);
        }
        before - self.nonces.len()
    }
}

impl ReplayCache {
    /// Remembers at most `per_node` nonces of each node, and `most` of all.
    pub fn new(per_node: usize, most: usize) -> Self {
        Self {
            per_node,
            most,
            state: Mutex::default(),
        }
    }

    /// Takes the nonce of a verified request in, or refuses it.
    pub fn admit(&self, claim: &Claim, now: i64) -> Result<(), Refusal> {
        self.admit_nonce(&claim.node, claim.nonce, now)
    }

    fn admit_nonce(&self, node: &ProviderId, nonce: u128, now: i64) -> Result<(), Refusal> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let State { seen: all_seen, all } = &mut *state;
        if *all >= self.most {
            return Err(Refusal::too_many(MAX_CLOCK_SKEW));
        }
        let seen = all_seen.entry(node.clone()).or_default();
        *all -= seen.forget_before(oldest(now));
        if seen.nonces.len() >= self.per_node {
            return Err(Refusal::too_many(MAX_CLOCK_SKEW));
        }
        if !seen.nonces.insert(nonce) {
            return Err(Refusal::unauthorized(
                "this request was received before: sign every request with a new nonce",
            ));
        }
        seen.by_age.push_back((now, nonce));
        *all += 1;
        Ok(())
    }

    /// Drops what no request can repeat any more.
    pub fn sweep(&self, now: i64) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let State { seen: all_seen, all } = &mut *state;
        all_seen.retain(|_, seen| {
            *all -= seen.forget_before(oldest(now));
            !seen.nonces.is_empty()
        });
    }
}

/// A request of the future's edge (+120 s) stays fresh until −120 s: its nonce is kept for both.
fn oldest(now: i64) -> i64 {
    now.saturating_sub(2 * i64::try_from(MAX_CLOCK_SKEW.as_secs()).unwrap_or(0) + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str) -> ProviderId {
        name.parse().unwrap()
    }

    #[test]
    fn a_nonce_is_good_once_a_node_until_no_request_can_carry_it() {
        let cache = ReplayCache::new(10, 100);
        assert!(cache.admit_nonce(&node("a"), 1, 1000).is_ok());
        assert!(cache.admit_nonce(&node("a"), 1, 1000).is_err());
        assert!(cache.admit_nonce(&node("a"), 1, 1240).is_err());
        assert!(cache.admit_nonce(&node("b"), 1, 1000).is_ok());
        cache.sweep(1242);
        assert!(cache.state.lock().unwrap().seen.is_empty());
    }

    #[test]
    fn a_node_that_floods_blocks_only_itself() {
        let cache = ReplayCache::new(10, 100);
        for nonce in 0..10 {
            cache.admit_nonce(&node("a"), nonce, 1000).unwrap();
        }
        assert!(cache.admit_nonce(&node("a"), 11, 1000).is_err());
        assert!(cache.admit_nonce(&node("b"), 11, 1000).is_ok());
        assert!(cache.admit_nonce(&node("a"), 11, 1242).is_ok());
    }
    #[test]
    fn all_nodes_together_are_bounded_and_forgotten_nonces_make_room() {
        let cache = ReplayCache::new(10, 15);
        for nonce in 0..10 {
            cache.admit_nonce(&node("a"), nonce, 1000).unwrap();
        }
        for nonce in 0..5 {
            cache.admit_nonce(&node("b"), nonce, 1100).unwrap();
        }
        assert!(cache.admit_nonce(&node("c"), 1, 1100).is_err());
        cache.sweep(1242);
        for nonce in 0..10 {
            cache.admit_nonce(&node("c"), nonce, 1242).unwrap();
        }
        assert!(cache.admit_nonce(&node("d"), 1, 1242).is_err());
    }
}
