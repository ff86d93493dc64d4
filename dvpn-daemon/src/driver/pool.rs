//! What is asked of the pool: its list and approvals; and what is remembered of it.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use dvpn_common::{
    contract::ApproveRequest,
    ids::ProviderId,
    keys::{PrivateKey, PublicKey, VerifyingKey},
};
use dvpn_core::{
    Failure, Retry,
    approval::{Approval, PoolRequest},
    audit::Event,
    config::Secret,
    directory::{self, Directory, Provider, trust::PoolRecord},
    keys::public_key,
    payment::Subscription,
    possession,
};
use jiff::{SignedDuration, Timestamp};

use super::{
    releases::Releases,
    requests::{Shared, random_key, redacted, to_failure},
};
use crate::{
    audit::Audit,
    http::{Answer, EXCHANGE_TIMEOUT, Pool},
    state::State,
};

/// How long the first question of a renewal waits for its answer. A pool has two seconds for its provider, and asking once
/// more changes nothing, while the half minute runs for which it keeps the renewed key.
const RENEWAL_TIMEOUT: Duration = Duration::from_secs(5);
/// A challenge that ends sooner is not used any more.
const CHALLENGE_MARGIN: SignedDuration = SignedDuration::from_secs(5);
/// A pool without challenges is asked again after this long: it may have been renewed.
const ABSENT_FOR: Duration = Duration::from_hours(1);
/// No pool keeps us waiting for longer with one answer.
const LONGEST_WAIT: Duration = Duration::from_mins(5);

/// What is known of the pool, in memory.
#[derive(Default)]
pub(super) struct Known {
    /// The stored record, once it was read. Held while a list or an approval is judged by it.
    record: tokio::sync::Mutex<Remembered>,
    /// Held while it is fetched, so that two askers fetch once.
    challenge: tokio::sync::Mutex<Challenge>,
    /// The key of a renewal whose answer is missing.
    unanswered: Mutex<Option<Unanswered>>,
    /// It wants no approval asked for before then.
    ask_after: Mutex<Option<Instant>>,
    /// Keys in use, and those to be released.
    pub(super) releases: Releases,
}

/// A key that follows another one, asked for and not answered for: the pool may have admitted it, and then it is the only
/// one that follows.
struct Unanswered {
    provider: ProviderId,
    renews: PublicKey,
    token: Secret,
    key: PrivateKey,
}

#[derive(Clone, Copy, Default)]
enum Challenge {
    #[default]
    Unknown,
    Known(PublicKey, Timestamp),
    Absent(Instant),
}

impl Challenge {
    /// Whether it still says what the pool would say.
    fn holds(self) -> bool {
        match self {
            Self::Unknown => false,
            Self::Known(_, end) => end.duration_since(Timestamp::now()) > CHALLENGE_MARGIN,
            Self::Absent(since) => since.elapsed() < ABSENT_FOR,
        }
    }

    fn key(self) -> Option<PublicKey> {
        match self {
            Self::Known(key, _) => Some(key),
            Self::Unknown | Self::Absent(_) => None,
        }
    }
}

impl Known {
    /// How long the pool still wants to be left alone.
    fn wait(&self) -> Option<Duration> {
        let after = *self.ask_after.lock().unwrap_or_else(PoisonError::into_inner);
        after
            .map(|at| at.saturating_duration_since(Instant::now()))
            .filter(|left| !left.is_zero())
    }

    /// The key to ask for, and whether it was asked for before. A first connection has always a new one: where it stood
    /// before says nothing to the next provider, nor later to the same one.
    fn key_for(
        &self,
        provider: &ProviderId,
        token: &Secret,
        renews: Option<PublicKey>,
    ) -> Result<(PrivateKey, bool), Failure> {
        let mut unanswered = self.unanswered.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(renews) = renews else {
            *unanswered = None;
            return Ok((random_key()?, false));
        };
        let same = unanswered.as_ref().filter(|asked| {
            asked.provider == *provider && asked.renews == renews && asked.token.expose() == token.expose()
        });
        if let Some(asked) = same {
            return Ok((asked.key.clone(), true));
        }
        let key = random_key()?;
        *unanswered = Some(Unanswered {
            provider: provider.clone(),
            renews,
            token: token.clone(),
            key: key.clone(),
        });
        Ok((key, false))
    }

    /// The pool answered for the key that was asked for last.
    fn answered(&self) {
        *self.unanswered.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn told_to_wait(&self, answer: &Answer) {
        if let (429, Some(wait)) = (answer.status, answer.retry_after) {
            let after = Instant::now() + wait.min(LONGEST_WAIT);
            *self.ask_after.lock().unwrap_or_else(PoisonError::into_inner) = Some(after);
        }
    }
}

/// The record, and whether the disk has it.
#[derive(Default)]
struct Remembered {
    record: Option<PoolRecord>,
    /// The last write failed, or was not waited for: the next list or approval brings another.
    owed: bool,
}

impl Remembered {
    /// Writes what is new, or what is still owed.
    async fn keep(&mut self, state: &State, changed: bool) {
        let Some(record) = self.record.as_ref().filter(|_| changed || self.owed) else {
            return;
        };
        // Whoever stops waiting now leaves it owed.
        self.owed = true;
        match state.store_pool_record(record).await {
            Ok(()) => self.owed = false,
            Err(error) => tracing::error!(
                "remembering the pool's key and version: {error}: it is tried again; until then a restart begins with \
                 what was stored before"
            ),
        }
    }
}

fn announce(audit: &Audit, before: Option<VerifyingKey>, key: VerifyingKey) {
    match before {
        None => tracing::info!("the pool's key is {key}: from now on nothing is believed that it did not sign"),
        Some(before) => tracing::warn!("the pool's key changed from {before} to {key}, and the old one vouches for it"),
    }
    audit.record(&Event::PoolKeyPinned {
        key: key.to_string(),
        before: before.map(|key| key.to_string()),
    });
}

impl Shared {
    pub(super) fn pool(&self) -> Result<&Pool, Failure> {
        self.pool.as_ref().ok_or_else(|| Failure {
            what: "no pool is configured".to_owned(),
            how: "set POOL_URL".to_owned(),
            retry: Retry::Never,
        })
    }

    /// The record of this pool, read from the state directory at first use. One that does not read refuses everything:
    /// it may have held a key.
    async fn record<'a>(&self, slot: &'a mut Remembered) -> Result<&'a mut PoolRecord, Failure> {
        let url = self.pool()?.url().to_string();
        let record = if let Some(record) = slot.record.take() {
            record
        } else {
            let stored = self.state.pool_record().await;
            let stored = stored.map_err(|error| {
                let how = "restore the file, or remove it: then the pool's key is pinned anew";
                to_failure("reading what is known of the pool", &error, how, Retry::Backoff)
            })?;
            stored.unwrap_or_default().applied_to(&url, self.pool_key)
        };
        Ok(slot.record.insert(record))
    }

    pub(super) async fn list(&self) -> Result<Directory, Failure> {
        let body = self.pool()?.list().await?;
        let mut slot = self.known.record.lock().await;
        let record = self.record(&mut slot).await?;
        let known = record.clone();
        let own_keys: Vec<_> = self
            .static_key
            .as_ref()
            .and_then(|key| public_key(key).ok())
            .into_iter()
            .collect();
        let own_node = self.own_node.clone();
        let private_endpoints = self.private_endpoints;
        // 10,000 entries take some milliseconds of arithmetic: not on a thread that moves packets.
        let parsed = tokio::task::spawn_blocking(move || {
            let own_node = own_node.as_ref().map(|(id, key)| (id, key));
            let policy = directory::Policy {
                own_keys: &own_keys,
                own_node,
                private_endpoints,
            };
            directory::parse(&body, &policy, &known, Timestamp::now())
        })
        .await;
        let directory = match parsed {
            Ok(parsed) => parsed?,
            Err(error) => {
                let failed = to_failure("reading the provider list", &error, "trying again", Retry::Backoff);
                return Err(failed);
            }
        };
        if let (Some(signer), Some(version)) = (directory.signer, directory.version) {
            let before = record.key;
            let changed = record.saw_list(signer, version);
            if before != Some(signer) {
                announce(&self.audit, before, signer);
            }
            slot.keep(&self.state, changed).await;
        }
        Ok(directory)
    }

    /// The pool's challenge, asked for unless a good one is held; nothing from a pool that has none. `fresh` asks anew.
    pub(super) async fn challenge(&self, fresh: bool) -> Result<Option<PublicKey>, Failure> {
        let mut held = self.known.challenge.lock().await;
        if fresh || !held.holds() {
            let answer = self.pool()?.challenge().await?;
            *held = answer.map_or_else(
                || Challenge::Absent(Instant::now()),
                |known| Challenge::Known(known.public_key, known.expires_at),
            );
        }
        Ok(held.key())
    }

    pub(super) async fn approve(
        &self,
        provider: &Provider,
        subscription: &Subscription,
        renews: Option<PublicKey>,
    ) -> Result<Approval, Failure> {
        // Asking sooner would be refused like the last time, and here it costs nobody anything.
        if let Some(wait) = self.known.wait() {
            return Err(Failure {
                what: format!(
                    "the pool wants no approval asked for in the next {} s",
                    wait.as_secs() + 1
                ),
                how: "it is asked again then".to_owned(),
                retry: Retry::Backoff,
            });
        }
        let token = self.usable_token().await?;
        let (key, asked_before) = match &self.static_key {
            Some(key) => (key.clone(), true),
            None => self.known.key_for(&provider.id, &token, renews)?,
        };
        let client_key = public_key(&key).map_err(|error| {
            let how = "set another one";
            to_failure("deriving the public key of WG_PRIVATE_KEY", &error, how, Retry::Never)
        })?;
        if self.static_key.is_some() {
            self.known.releases.take_back(&client_key).await;
        }
        let asking = Asking {
            provider,
            token: &token,
            key: &key,
            client_key,
            renews: renews.filter(|old| *old != client_key),
            within: if renews.is_some() && !asked_before {
                RENEWAL_TIMEOUT
            } else {
                EXCHANGE_TIMEOUT
            },
        };
        let mut answer = self.ask(&asking, false).await?;
        // A pool that was restarted, or is another one behind the same name, has forgotten the challenge that is held: it
        // is asked for a new one, once.
        if matches!(answer.status, 400 | 401 | 403 | 409 | 422) && self.challenge(false).await?.is_some() {
            answer = self.ask(&asking, true).await?;
        }
        self.known.told_to_wait(&answer);
        if is_refusal(answer.status) {
            self.known.answered();
        }
        let mut slot = self.known.record.lock().await;
        let record = self.record(&mut slot).await?;
        let asked = PoolRequest {
            subscription,
            provider,
            client_key: &client_key,
            static_addresses: &self.static_addresses,
            pool_key: record.key.as_ref(),
            last_serial: record.approval_serial,
            now: Timestamp::now(),
        };
        let approval = Approval::from_pool(&asked, answer.status, &answer.body)
            .map_err(|error| redacted(Failure::from(error), &token))?;
        let before = record.key;
        let mut now_known = before;
        if let (Some(signer), Some(serial)) = (approval.signer(), approval.serial()) {
            let changed = record.saw_approval(*signer, serial);
            now_known = record.key;
            slot.keep(&self.state, changed).await;
        }
        if let Some(signer) = now_known.filter(|key| before != Some(*key)) {
            announce(&self.audit, before, signer);
        }
        drop(slot);
        self.known.releases.admit(client_key, token, approval.expires_at());
        self.keys.keep(client_key, key);
        self.known.answered();
        Ok(approval)
    }

    async fn ask(&self, asking: &Asking<'_>, fresh: bool) -> Result<Answer, Failure> {
        let provider_id = asking.provider.id.to_string();
        let proof = match self.challenge(fresh).await? {
            None => None,
            Some(challenge) => Some(possession::prove(
                asking.key,
                &challenge,
                &provider_id,
                asking.token.expose(),
            )?),
        };
        let request = ApproveRequest {
            provider_id,
            token: asking.token.expose().to_owned(),
            approved: true,
            client_public_key: Some(asking.client_key),
            proof,
            renews: asking.renews,
        };
        Ok(self.pool()?.approve(&request, asking.within).await?)
    }
}

/// Whether a pool that says so did nothing, and would say it again of the same key. What stands between may say "later",
/// or that it failed, when the pool has acted.
fn is_refusal(status: u16) -> bool {
    matches!(status, 400..=499) && !matches!(status, 408 | 425 | 429)
}

/// One approval as it is asked for.
struct Asking<'a> {
    provider: &'a Provider,
    token: &'a Secret,
    key: &'a PrivateKey,
    client_key: PublicKey,
    renews: Option<PublicKey>,
    within: Duration,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_record_that_could_not_be_written_is_written_with_the_next_list_though_that_says_nothing_new() {
        let directory = tempfile::tempdir().unwrap();
        let state = State::open(directory.path(), None).unwrap();
        // In the file's place stands what no file can replace.
        let in_the_way = directory.path().join("pool/full");
        std::fs::create_dir_all(&in_the_way).unwrap();
        let (signer, mut slot) = (VerifyingKey::from_bytes([7; 32]).unwrap(), Remembered::default());
        let mut seen = slot.record.insert(PoolRecord::default()).saw_list(signer, 5);
        for _ in 0..2 {
            slot.keep(&state, seen).await;
            assert!(slot.owed, "the write failed");
            seen = slot.record.as_mut().unwrap().saw_list(signer, 5);
            assert!(!seen, "the same list");
        }
        std::fs::remove_dir_all(directory.path().join("pool")).unwrap();
        slot.keep(&state, seen).await;
        assert!(!slot.owed);
        assert_eq!(state.pool_record().await.unwrap().unwrap().key, Some(signer));
        std::fs::remove_file(directory.path().join("pool")).unwrap();
        slot.keep(&state, false).await;
        assert!(
            state.pool_record().await.unwrap().is_none(),
            "what is kept is not written again"
        );
    }

    #[test]
    fn a_renewal_asks_for_the_same_key_until_it_is_answered_and_nothing_else_does() {
        let known = Known::default();
        let (here, there): (ProviderId, ProviderId) = ("here".parse().unwrap(), "there".parse().unwrap());
        let (token, other) = (Secret::new("token"), Secret::new("other"));
        let old = |n| Some(PublicKey::from_bytes([n; 32]).unwrap());
        let ask = |provider: &ProviderId, token: &Secret, renews| {
            let (key, before) = known.key_for(provider, token, renews).unwrap();
            (public_key(&key).unwrap(), before)
        };
        let (first, before) = ask(&here, &token, old(1));
        assert!(!before);
        assert_eq!(ask(&here, &token, old(1)), (first, true), "its answer is missing");
        for (provider, with, renews, what) in [
            (&there, &token, old(1), "another provider"),
            (&here, &other, old(1), "another token: one key, one token"),
            (&here, &token, old(2), "the next renewal"),
            (&here, &token, None, "a new connection"),
            (&here, &token, None, "and its second try"),
        ] {
            let (first, _) = ask(&here, &token, old(1));
            let (next, before) = ask(provider, with, renews);
            assert!(next != first && !before, "{what}");
        }
        let (first, _) = ask(&here, &token, old(1));
        known.answered();
        assert_ne!(ask(&here, &token, old(1)).0, first, "it is answered");
    }

    #[test]
    fn what_a_pool_refuses_is_answered_and_what_may_come_from_others_is_not() {
        for refused in [400, 401, 403, 404, 409, 422] {
            assert!(is_refusal(refused), "{refused}");
        }
        for open in [200, 204, 301, 408, 425, 429, 500, 502, 503, 504] {
            assert!(!is_refusal(open), "{open}");
        }
    }

    fn answer(status: u16, seconds: Option<u64>) -> Answer {
        Answer {
            status,
            retry_after: seconds.map(Duration::from_secs),
            body: bytes::Bytes::new(),
        }
    }

    #[test]
    fn a_pool_that_says_later_is_left_alone_for_as_long_and_not_for_ever() {
        let known = Known::default();
        for told in [
            answer(200, Some(60)),
            answer(503, Some(60)),
            answer(429, None),
            answer(429, Some(0)),
        ] {
            known.told_to_wait(&told);
            assert_eq!(known.wait(), None, "{told:?}");
        }
        known.told_to_wait(&answer(429, Some(60)));
        let wait = known.wait().expect("a wait");
        assert!(
            wait <= Duration::from_mins(1) && wait > Duration::from_secs(30),
            "{wait:?}"
        );
        known.told_to_wait(&answer(200, None));
        assert!(
            known.wait().is_some(),
            "an answer that was under way takes nothing back"
        );
        known.told_to_wait(&answer(429, Some(u64::MAX)));
        assert!(known.wait().expect("a wait") <= LONGEST_WAIT);
    }
}
