//! Requests that nodes sign, as [`dvpn_common::node`] says: fresh, of the claimed node, and used once.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Mutex, PoisonError},
    time::Duration,
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

/// Nonces seen, for as long as their requests could still be fresh. All nodes share `most` evenly, and each has `least`
/// whatever the others do. A node that sends more than its share forgets its oldest second, and requests signed in it or
/// before are fresh no more: who floods shortens its own time, and nobody else's.
pub struct ReplayCache {
    least: usize,
    most: usize,
    seen: Mutex<HashMap<ProviderId, Seen>>,
}

#[derive(Default)]
struct Seen {
    /// With the second that their requests were signed in, by the node's clock.
    nonces: BTreeSet<(i64, u128)>,
    /// What was signed in this second or before is not told apart any more.
    forgotten: Option<i64>,
}

impl Seen {
    fn forget_before(&mut self, oldest: i64) {
        while self.nonces.first().is_some_and(|(second, _)| *second < oldest) {
            self.nonces.pop_first();
        }
    }

    /// Forgets whole seconds, oldest first, until there are fewer than `most`.
    fn make_room(&mut self, most: usize) {
        while self.nonces.len() >= most
            && let Some((second, _)) = self.nonces.first().copied()
        {
            self.forgotten = Some(second);
            self.forget_before(second.saturating_add(1));
        }
    }
}

impl ReplayCache {
    /// Remembers `most` nonces, and at least `least` of each node.
    pub fn new(least: usize, most: usize) -> Self {
        Self {
            least,
            most,
            seen: Mutex::default(),
        }
    }

    /// Takes the nonce of a verified request in, or refuses it.
    pub fn admit(&self, claim: &Claim, now: i64) -> Result<(), Refusal> {
        self.admit_nonce(&claim.node, claim.time, claim.nonce, now)
    }

    fn admit_nonce(&self, node: &ProviderId, signed_at: i64, nonce: u128, now: i64) -> Result<(), Refusal> {
        let mut all = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let newcomers = usize::from(!all.contains_key(node));
        let share = self.share(all.len() + newcomers);
        let seen = all.entry(node.clone()).or_default();
        seen.forget_before(oldest(now));
        if seen.nonces.contains(&(signed_at, nonce)) {
            return Err(Refusal::unauthorized(
                "this request was received before: sign every request with a new nonce",
            ));
        }
        seen.make_room(share);
        if seen.forgotten.is_some_and(|second| signed_at <= second) {
            return Err(Refusal::too_many(Duration::ZERO));
        }
        seen.nonces.insert((signed_at, nonce));
        Ok(())
    }

    fn share(&self, nodes: usize) -> usize {
        (self.most / nodes.max(1)).max(self.least)
    }

    /// Drops what no request can repeat any more, and what is above the share of its node.
    pub fn sweep(&self, now: i64) {
        let mut all = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let share = self.share(all.len());
        all.retain(|_, seen| {
            seen.forget_before(oldest(now));
            // One more is room enough: at its share a node forgets nothing yet.
            seen.make_room(share + 1);
            seen.forgotten.take_if(|second| *second < oldest(now));
            !(seen.nonces.is_empty() && seen.forgotten.is_none())
        });
    }
}

/// The second that a request must be signed in to be fresh now.
fn oldest(now: i64) -> i64 {
    now.saturating_sub(i64::try_from(MAX_CLOCK_SKEW.as_secs()).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str) -> ProviderId {
        name.parse().unwrap()
    }

    fn status(result: Result<(), Refusal>) -> u16 {
        use axum::response::IntoResponse as _;
        result.map_or_else(|refusal| refusal.into_response().status().as_u16(), |()| 200)
    }

    #[test]
    fn a_nonce_is_good_once_a_node_until_no_request_can_carry_it() {
        let cache = ReplayCache::new(10, 100);
        let admit = |name: &str, signed_at, now| status(cache.admit_nonce(&node(name), signed_at, 1, now));
        assert_eq!(admit("a", 1000, 1000), 200);
        assert_eq!(admit("a", 1000, 1000), 401);
        assert_eq!(admit("a", 1000, 1120), 401);
        assert_eq!(admit("b", 1000, 1000), 200);
        assert_eq!(admit("a", 1120, 1000), 200, "of the future's edge, and another second");
        cache.sweep(1121);
        assert_eq!(admit("a", 1120, 1240), 401);
        cache.sweep(1241);
        assert!(cache.seen.lock().unwrap().is_empty());
    }

    #[test]
    fn a_node_that_floods_shortens_its_own_time_and_no_replay_comes_through() {
        let cache = ReplayCache::new(10, 20);
        let admit = |name: &str, signed_at, nonce, now| status(cache.admit_nonce(&node(name), signed_at, nonce, now));
        assert_eq!(admit("b", 1000, 0, 1000), 200);
        let mut taken = Vec::new();
        for nonce in 0..100 {
            let at = 1000 + i64::try_from(nonce).unwrap() / 5;
            if admit("a", at, nonce, at) == 200 {
                taken.push((at, nonce));
            }
        }
        assert!(taken.len() >= 90, "a steady node is not slowed: {}", taken.len());
        for (at, nonce) in taken {
            assert_ne!(admit("a", at, nonce, 1020), 200, "replay of {nonce}");
        }
        assert_eq!(admit("b", 1000, 0, 1020), 401, "the other remembers as before");
        // All in one second: no older one is left to forget.
        let answers: Vec<u16> = (200..240).map(|nonce| admit("a", 1021, nonce, 1021)).collect();
        assert!(answers.contains(&429) && answers.iter().filter(|status| **status == 200).count() <= 10);
        assert_eq!(admit("b", 1021, 9, 1021), 200);
        assert_eq!(admit("a", 1022, 999, 1022), 200, "the next second is a new one");
    }

    #[test]
    fn many_nodes_share_what_there_is_and_none_crowds_another_out() {
        let cache = ReplayCache::new(4, 100);
        for name in 0..50 {
            for nonce in 0..60 {
                drop(cache.admit_nonce(
                    &node(&format!("n{name}")),
                    1000 + nonce,
                    nonce.unsigned_abs().into(),
                    1000,
                ));
            }
        }
        assert_eq!(status(cache.admit_nonce(&node("quiet"), 1000, 1, 1000)), 200);
        cache.sweep(1000);
        let all = cache.seen.lock().unwrap();
        let kept: usize = all.values().map(|seen| seen.nonces.len()).sum();
        assert!(kept <= 51 * 4, "{kept}");
    }
}
