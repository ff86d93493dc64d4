//! Denied calls in the audit stream: the first of a user at once, then how many more each ten seconds. Anybody on the bus
//! can call, and what they can write must have an end.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use dvpn_core::audit::Event;

use crate::audit::Audit;

const EVERY: Duration = Duration::from_secs(10);
/// Users that are told apart at one time; all others are one.
const MAX_USERS: usize = 64;

/// Who was denied lately, and how often since that was last recorded. By user and not by connection: connections cost
/// nothing.
#[derive(Clone)]
pub(super) struct Denials {
    audit: Audit,
    lately: Arc<Mutex<BTreeMap<Option<u32>, u64>>>,
    every: Duration,
}

impl Denials {
    pub(super) fn new(audit: Audit) -> Self {
        Self {
            audit,
            lately: Arc::default(),
            every: EVERY,
        }
    }

    /// Records a denied call, or counts it.
    pub(super) fn record(&self, uid: u32, command: &str) {
        let user = {
            let mut lately = self.lately.lock().unwrap_or_else(PoisonError::into_inner);
            let user = Some(uid).filter(|_| lately.len() < MAX_USERS || lately.contains_key(&Some(uid)));
            if let Some(more) = lately.get_mut(&user) {
                *more = more.saturating_add(1);
                return;
            }
            lately.insert(user, 0);
            user
        };
        self.audit.record(&Event::Command {
            command: command.to_owned(),
            uid: Some(uid),
            allowed: false,
        });
        tokio::spawn(self.clone().count(user));
    }

    /// Until a user was quiet for once.
    async fn count(self, user: Option<u32>) {
        loop {
            tokio::time::sleep(self.every).await;
            let more = {
                let mut lately = self.lately.lock().unwrap_or_else(PoisonError::into_inner);
                let more = lately.get_mut(&user).map_or(0, std::mem::take);
                if more == 0 {
                    lately.remove(&user);
                    return;
                }
                more
            };
            self.audit.record(&Event::CommandsDenied { uid: user, count: more });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn denials(every: Duration) -> Denials {
        Denials {
            every,
            ..Denials::new(Audit::in_memory())
        }
    }

    fn events(denials: &Denials) -> Vec<serde_json::Value> {
        let lines = denials.audit.lines();
        lines.iter().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    #[tokio::test]
    async fn a_thousand_denied_calls_are_one_line_and_one_count() {
        let denials = denials(Duration::from_millis(200));
        for _ in 0..1000 {
            denials.record(1000, "start");
        }
        denials.record(1001, "stop");
        assert_eq!(events(&denials).len(), 2, "one for each user");
        let counted = tokio::time::timeout(Duration::from_secs(20), async {
            while events(&denials).len() < 3 || !denials.lately.lock().unwrap().is_empty() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
        counted.await.unwrap();
        let seen = events(&denials);
        assert_eq!((&seen[0]["event"], &seen[0]["uid"]), (&"command".into(), &1000.into()));
        assert_eq!(
            (&seen[2]["event"], &seen[2]["count"]),
            (&"commands_denied".into(), &999.into())
        );
        assert_eq!(seen.len(), 3);
        denials.record(1000, "start");
        assert_eq!(events(&denials).len(), 4, "who was quiet begins anew");
    }

    #[tokio::test]
    async fn however_many_users_call_the_memory_is_bounded() {
        let denials = denials(Duration::from_mins(10));
        for uid in 0..10_000 {
            denials.record(uid, "start");
        }
        assert_eq!(denials.lately.lock().unwrap().len(), MAX_USERS + 1);
        assert_eq!(events(&denials).len(), MAX_USERS + 1);
    }
}
