//! What a pool and a driver know of a renewal whose answer may be lost: the pool acts on a question once, and takes the
//! renewed key off half a minute later; the driver asks for the same key until it has an answer.

use std::time::Duration;

use dvpn_common::{ids::ProviderId, keys::PublicKey};
use rand::RngExt as _;

use super::World;
use crate::session::{Attempt, Input};

/// How long a pool keeps a key that was renewed.
const GRACE: Duration = Duration::from_secs(29);

/// A key that follows another one.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Wish {
    provider: ProviderId,
    old: PublicKey,
    fresh: PublicKey,
}

/// What the pool did.
#[derive(Debug)]
struct Done {
    wish: Wish,
    /// The last octet of the addresses it gave.
    host: u8,
    /// When the old key goes.
    until: Duration,
    /// Whether it was asked once more.
    repeated: bool,
}

/// Both sides of it.
#[derive(Debug, Default)]
pub(super) struct Renewing {
    /// The driver's: whose answer is missing, and the number it was last asked with.
    open: Option<(Wish, Option<Attempt>)>,
    /// The pool's last.
    done: Option<Done>,
}

impl Renewing {
    /// Nobody waits for this answer any more.
    pub(super) fn cancel(&mut self, cancelled: Attempt) {
        if let Some((_, attempt)) = &mut self.open {
            attempt.take_if(|attempt| *attempt == cancelled);
        }
    }

    /// The driver dies.
    pub(super) fn forget(&mut self) {
        self.open = None;
    }

    /// A key is released: one that was renewed goes at once.
    pub(super) fn release(&mut self, key: &PublicKey) {
        self.done.take_if(|done| done.wish.old == *key);
    }

    /// Whether the approval of this key came with another answer than the first one.
    pub(super) fn was_regained(&self, key: &PublicKey) -> bool {
        self.done
            .as_ref()
            .is_some_and(|done| done.repeated && done.wish.fresh == *key)
    }
}

impl World {
    /// The key that the driver asks for: a new one, unless the answer to the same question is missing.
    pub(super) fn key_for(
        &mut self,
        attempt: Attempt,
        provider: &ProviderId,
        renews: Option<PublicKey>,
    ) -> Option<PublicKey> {
        let Some(old) = renews else {
            self.renewing.open = None;
            return self.key();
        };
        let same = self.renewing.open.take();
        let same = same.filter(|(wish, _)| wish.old == old && wish.provider == *provider);
        let wish = match same {
            Some((wish, _)) => wish,
            None => Wish {
                provider: provider.clone(),
                old,
                fresh: self.key()?,
            },
        };
        let fresh = wish.fresh;
        self.renewing.open = Some((wish, Some(attempt)));
        Some(fresh)
    }

    /// The pool admits the key that it is asked for last: the last octet of its addresses, or nothing where the pool
    /// refuses, because another key follows the old one already.
    pub(super) fn admit(&mut self, renews: bool) -> Option<u8> {
        let time = self.time;
        let wish = match &self.renewing.open {
            Some((wish, _)) if renews => wish.clone(),
            Some(_) | None => {
                // A new connection: the keys of the old one go.
                self.renewing.done = None;
                return Some(2);
            }
        };
        if let Some(done) = self.renewing.done.as_mut().filter(|done| done.wish.old == wish.old) {
            done.repeated = true;
            return (done.wish == wish).then_some(done.host);
        }
        // A pool that does not keep the addresses over a renewal is one as well.
        let host = if self.rng.random_bool(0.2) { 3 } else { 2 };
        self.renewing.done = Some(Done {
            wish,
            host,
            until: time + GRACE,
            repeated: false,
        });
        Some(host)
    }

    /// What the driver learns of an answer that it waits for.
    pub(super) fn heard(&mut self, input: &Input) {
        if let Input::Approved(heard, Ok(approval)) = input {
            let answers = |wish: &Wish| wish.provider == approval.provider().id;
            self.renewing
                .open
                .take_if(|(wish, attempt)| *attempt == Some(*heard) && answers(wish));
        }
    }

    /// Whether the provider knows the key that the tunnel uses.
    pub(super) fn is_admitted(&self) -> bool {
        match (&self.device, &self.renewing.done) {
            (Some(device), Some(done)) => device.key != done.wish.old || self.time < done.until,
            (Some(_), None) => true,
            (None, _) => false,
        }
    }
}
