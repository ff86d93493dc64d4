//! Keys that are used no more, told to the pool: again and again where it does not answer, until it does or until the
//! approval's end.
//!
//! What is owed is kept in memory alone. A daemon that dies forgets it, and that costs no more than the rest of the three
//! minutes after which a provider takes a connection without handshakes for over by itself, and gives its grant back; the
//! token's own keys make room for its next approval in any case.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use dvpn_common::{contract::ReleaseRequest, keys::PublicKey};
use dvpn_core::{config::Secret, session::Release};
use jiff::Timestamp;
use tokio::sync::{RwLock, RwLockReadGuard};

use super::requests::Shared;

/// How long one try may take altogether.
const TRY_TIMEOUT: Duration = Duration::from_secs(2);
/// Before the second try; twice as long before each further one.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_mins(1);
/// More keys whose token is remembered than this were never released: the oldest way to forget is to forget all.
const MAX_ADMITTED: usize = 64;
/// Releases that wait for an answer. A session makes one or two, and none without a pool that answered before.
const MAX_OWED: usize = 16;

/// By what a key is released, and for how long that means anything.
#[derive(Clone)]
struct Admitted {
    /// The token it was approved for.
    token: Secret,
    /// When its approval ends.
    until: Timestamp,
}

/// A release that the pool has not answered.
struct Owed {
    number: u64,
    release: Release,
    admitted: Admitted,
}

/// Keys that are in use, and those that are to be released.
#[derive(Default)]
pub(super) struct Releases {
    admitted: Mutex<HashMap<PublicKey, Admitted>>,
    /// Oldest first.
    owed: Mutex<VecDeque<Owed>>,
    next: AtomicU64,
    /// The pool answered 404: it has none.
    nothing: AtomicBool,
    /// Tries under way hold it for reading.
    under_way: RwLock<()>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Releases {
    /// A key was approved for this token, until then.
    pub(super) fn admit(&self, key: PublicKey, token: Secret, until: Timestamp) {
        let mut admitted = lock(&self.admitted);
        if admitted.len() >= MAX_ADMITTED {
            admitted.clear();
        }
        admitted.insert(key, Admitted { token, until });
    }

    /// A key is to be released: the number to give it back by; nothing if it was never admitted, or no pool wants to know.
    pub(super) fn owe(&self, release: Release) -> Option<u64> {
        let admitted = lock(&self.admitted).remove(&release.client_key)?;
        if self.nothing.load(Ordering::Relaxed) {
            return None;
        }
        let mut owed = lock(&self.owed);
        if owed.len() >= MAX_OWED {
            owed.pop_front();
        }
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        owed.push_back(Owed {
            number,
            release,
            admitted,
        });
        Some(number)
    }

    /// A key that is to be approved again must not be released after that.
    pub(super) async fn take_back(&self, key: &PublicKey) {
        lock(&self.owed).retain(|owed| owed.release.client_key != *key);
        drop(self.under_way.write().await);
    }

    /// Everything that is owed.
    pub(super) fn numbers(&self) -> Vec<u64> {
        lock(&self.owed).iter().map(|owed| owed.number).collect()
    }

    /// What the pool is told now; nothing once nobody has to tell it any more. It is not taken back meanwhile.
    async fn begin(&self, number: u64, now: Timestamp) -> Option<(ReleaseRequest, RwLockReadGuard<'_, ()>)> {
        let under_way = self.under_way.read().await;
        let mut owed = lock(&self.owed);
        // A pool forgets an approval with its end.
        owed.retain(|owed| owed.admitted.until > now);
        let owed = owed.iter().find(|owed| owed.number == number)?;
        let request = ReleaseRequest {
            provider_id: owed.release.provider.to_string(),
            token: owed.admitted.token.expose().to_owned(),
            client_public_key: owed.release.client_key,
        };
        Some((request, under_way))
    }

    fn settle(&self, number: u64) {
        lock(&self.owed).retain(|owed| owed.number != number);
    }
}

/// What one try came to.
enum Tried {
    /// There is nothing left to do.
    Done,
    /// The pool did not answer, or wants to be asked later.
    Unanswered(String),
}

impl Shared {
    /// Tells the pool once what is owed under this number.
    pub(super) async fn try_release(&self, number: u64) -> bool {
        matches!(self.tell_release(number).await, Tried::Done)
    }

    /// Tells the pool what is owed under this number, until it has answered.
    pub(super) async fn release(&self, number: u64) {
        let mut pause = FIRST_PAUSE;
        while let Tried::Unanswered(why) = self.tell_release(number).await {
            if pause == FIRST_PAUSE {
                tracing::info!("{why}: it is told again until it answers");
            } else {
                tracing::debug!("{why}");
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    async fn tell_release(&self, number: u64) -> Tried {
        let releases = &self.known.releases;
        let Some(pool) = &self.pool else { return Tried::Done };
        let Some((request, _under_way)) = releases.begin(number, Timestamp::now()).await else {
            return Tried::Done;
        };
        let provider = &request.provider_id;
        match pool.release(&request, TRY_TIMEOUT).await {
            Ok(200..=299) => {}
            Ok(404 | 405) => {
                tracing::info!("this pool takes no releases: it finds out by itself when a connection has ended");
                releases.nothing.store(true, Ordering::Relaxed);
            }
            Ok(status @ (408 | 425 | 429 | 500..)) => {
                return Tried::Unanswered(format!("the pool answers HTTP {status} to the release at {provider}"));
            }
            Ok(status) => tracing::info!(
                "the pool answers HTTP {status} to the release at {provider}: it will find out by itself"
            ),
            Err(error) => {
                return Tried::Unanswered(format!("releasing the connection to {provider}: {error}"));
            }
        }
        releases.settle(number);
        Tried::Done
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: u8) -> PublicKey {
        PublicKey::from_bytes([n; 32]).unwrap()
    }

    fn release(n: u8) -> Release {
        Release {
            provider: "provider-a".parse().unwrap(),
            client_key: key(n),
        }
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + second).unwrap()
    }

    fn admitted(keys: std::ops::Range<u8>) -> Releases {
        let releases = Releases::default();
        for n in keys {
            releases.admit(key(n), Secret::new("token"), at(10));
        }
        releases
    }

    #[tokio::test]
    async fn what_is_owed_is_told_until_it_is_settled_or_the_approval_ends() {
        let releases = admitted(1..3);
        assert_eq!(releases.owe(release(9)), None, "nobody admitted it");
        let (first, second) = (releases.owe(release(1)).unwrap(), releases.owe(release(2)).unwrap());
        assert_eq!(releases.owe(release(1)), None, "it is owed already");
        for _ in 0..3 {
            let (request, _) = releases.begin(first, at(0)).await.unwrap();
            assert_eq!((request.client_public_key, request.token.as_str()), (key(1), "token"));
        }
        releases.settle(first);
        assert!(releases.begin(first, at(0)).await.is_none());
        assert_eq!(releases.numbers(), [second]);
        assert!(releases.begin(second, at(9)).await.is_some());
        assert!(releases.begin(second, at(10)).await.is_none(), "the approval ended");
        assert!(releases.numbers().is_empty());
    }

    #[tokio::test]
    async fn no_more_is_owed_than_fits_and_the_oldest_goes_first() {
        let most = u8::try_from(MAX_OWED).unwrap();
        let releases = admitted(1..most + 3);
        for n in 1..most + 3 {
            releases.owe(release(n)).unwrap();
        }
        let numbers = releases.numbers();
        assert_eq!(numbers.len(), MAX_OWED);
        assert_eq!(
            (numbers.first(), numbers.last()),
            (Some(&2), Some(&(u64::from(most) + 1)))
        );
        assert!(releases.begin(1, at(0)).await.is_none());
    }

    #[tokio::test]
    async fn a_key_that_is_approved_again_is_released_neither_later_nor_meanwhile() {
        let releases = admitted(1..3);
        let (again, other) = (releases.owe(release(1)).unwrap(), releases.owe(release(2)).unwrap());
        let told = releases.begin(again, at(0)).await.unwrap();
        let same = key(1);
        let mut waiting = std::pin::pin!(releases.take_back(&same));
        assert!(
            futures::poll!(waiting.as_mut()).is_pending(),
            "a try is under way, and the approval must come after it"
        );
        drop(told);
        waiting.await;
        assert!(releases.begin(again, at(0)).await.is_none());
        assert_eq!(releases.numbers(), [other]);
        // The next release of the same key is another one.
        releases.admit(key(1), Secret::new("token"), at(10));
        let next = releases.owe(release(1)).unwrap();
        assert!(next > other);
        assert!(releases.begin(again, at(0)).await.is_none());
    }

    #[tokio::test]
    async fn a_pool_without_releases_is_owed_none() {
        let releases = admitted(1..2);
        releases.nothing.store(true, Ordering::Relaxed);
        assert_eq!(releases.owe(release(1)), None);
    }
}
