//! A network that wants somebody to log in before it lets anything pass, and the opening by which one program logs in.
//!
//! The opening is the one widening of the kill switch's rule that every exemption is mark and address and port: while it
//! lasts, marked sockets may reach web ports anywhere, because nobody knows beforehand where a login leads. What keeps it
//! narrow: the mark, which only this daemon's own sockets carry; the daemon, which makes such sockets for one user's
//! program alone; the time, which the kernel keeps, so that it ends even if the daemon does not live to end it; and that
//! it begins only when somebody asks, who may start and stop the session.
//!
//! | event | effect |
//! |---|---|
//! | asked for while nothing is blocked, or while the pool answers | refused |
//! | asked for again by the same user | the opening that there is; its end does not move |
//! | asked for by another | refused while it lasts |
//! | the pool answers, a tunnel stands, nothing is blocked any more, the time is over | closed |
//! | the machine is on another network, or was asleep | closed: nobody asked to be let out there |

mod sign;

use std::time::{Duration, Instant};

use dvpn_common::status::{PortalSign, PortalStatus, Problem};
use jiff::Timestamp;
use serde::Serialize;

pub use sign::{PORTS, PageAnswer, Place, PoolAnswer, Seen, Verdict, admits, check_url, host_of, judge, page, places};

use crate::Now;

/// How often it is asked, while the opening lasts, whether somebody has logged in.
pub const LOOK_EVERY: Duration = Duration::from_secs(2);

/// One opening.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Opening {
    /// Whose program may use it.
    pub uid: u32,
    /// Its end, by the clock that counts.
    pub until: Instant,
    /// The same moment for people.
    pub ends_at: Timestamp,
}

/// Why there is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Nothing is in a browser's way.
    #[error("nothing is blocked: log in with any browser")]
    NotBlocking,
    /// No login is needed.
    #[error("the pool can be reached: this network asks for no login")]
    Reached,
    /// One at a time.
    #[error("user {0} is logging in: wait for the end of that")]
    Another(u32),
}

/// Why it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Ended {
    /// The pool answers.
    Reached,
    /// The time is over.
    Over,
    /// Nothing is blocked any more.
    NotBlocking,
    /// The machine is on another network, or was asleep.
    Moved,
    /// The daemon ends, or could not make it.
    Given,
}

/// What is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Due {
    /// The opening ends.
    Close(Ended),
    /// See whether somebody has logged in.
    Look,
}

/// What is known of the network, and the opening.
#[derive(Debug, Clone, Default)]
pub struct Portal {
    found: Option<PortalSign>,
    opening: Option<Opening>,
    look_at: Option<Instant>,
}

impl Portal {
    /// Whether the network has to be looked at before this user's question is answered; the standing opening if not.
    pub fn asked(&self, uid: u32, blocking: bool) -> Result<Option<Opening>, Refusal> {
        match self.opening {
            _ if !blocking => Err(Refusal::NotBlocking),
            Some(opening) if opening.uid != uid => Err(Refusal::Another(opening.uid)),
            standing => Ok(standing),
        }
    }

    /// Opens for a user, after the network was looked at. A network that answers nothing gets the benefit of the doubt:
    /// its login may be in no way that is looked for.
    pub fn open(
        &mut self,
        uid: u32,
        blocking: bool,
        verdict: &Verdict,
        length: Duration,
        now: Now,
    ) -> Result<Opening, Refusal> {
        if let Some(standing) = self.asked(uid, blocking)? {
            return Ok(standing);
        }
        if *verdict == Verdict::Reached {
            return Err(Refusal::Reached);
        }
        let opening = Opening {
            uid,
            until: now.instant.checked_add(length).unwrap_or(now.instant),
            ends_at: now.wall.checked_add(length).unwrap_or(now.wall),
        };
        self.opening = Some(opening);
        self.look_at = now.instant.checked_add(LOOK_EVERY);
        Ok(opening)
    }

    /// The network was looked at. Says whether the opening ends with that.
    pub fn looked(&mut self, verdict: &Verdict, blocking: bool, now: Now) -> Option<Ended> {
        match verdict {
            Verdict::Reached => {
                self.found = None;
                self.close().then_some(Ended::Reached)
            }
            Verdict::Portal(sign) => {
                self.found = Some(*sign).filter(|_| blocking);
                self.look_again(now);
                None
            }
            Verdict::Unknown => {
                self.found = self.found.filter(|_| self.opening.is_some());
                self.look_again(now);
                None
            }
        }
    }

    fn look_again(&mut self, now: Now) {
        self.look_at = self.opening.and_then(|_| now.instant.checked_add(LOOK_EVERY));
    }

    /// Where the session is now: whether it blocks, and whether somebody far away has answered it. Says whether the opening
    /// ends.
    pub fn follow(&mut self, blocking: bool, answered: bool) -> Option<Ended> {
        match () {
            () if !blocking => self.forget(Ended::NotBlocking),
            () if answered => self.forget(Ended::Reached),
            () => None,
        }
    }

    /// The machine is on another network, or was asleep. Says whether the opening ends.
    pub fn moved(&mut self) -> Option<Ended> {
        self.forget(Ended::Moved)
    }

    fn forget(&mut self, why: Ended) -> Option<Ended> {
        self.found = None;
        self.close().then_some(why)
    }

    /// Ends the opening; false if there is none.
    pub fn close(&mut self) -> bool {
        self.look_at = None;
        self.opening.take().is_some()
    }

    /// The standing opening.
    pub fn opening(&self) -> Option<Opening> {
        self.opening
    }

    /// When something is due.
    pub fn due_at(&self) -> Option<Instant> {
        let opening = self.opening?;
        Some(self.look_at.map_or(opening.until, |at| at.min(opening.until)))
    }

    /// What is due. A look that is due is due once, until [`Portal::looked`].
    pub fn due(&mut self, now: Now) -> Option<Due> {
        let opening = self.opening?;
        if opening.until <= now.instant {
            self.close();
            return Some(Due::Close(Ended::Over));
        }
        let due = self.look_at.is_some_and(|at| at <= now.instant);
        if due {
            self.look_at = None;
        }
        due.then_some(Due::Look)
    }

    /// For the status.
    pub fn status(&self) -> Option<PortalStatus> {
        let open_until = self.opening.map(|opening| opening.ends_at);
        (self.found.is_some() || open_until.is_some()).then_some(PortalStatus {
            sign: self.found,
            open_until,
        })
    }

    /// In words a person can act on; nothing while no login is wanted.
    pub fn problem(&self) -> Option<Problem> {
        let gave_away = match self.found? {
            PortalSign::Page => "it answers with a page of its own where the pool has none",
            PortalSign::Name => "it gives the pool's name an address of its own",
            PortalSign::Certificate => "somebody else answers in the pool's place",
        };
        let how = match self.opening {
            None => "call the D-Bus method Portal with your user id (busctl call org.dvpn.Daemon1 /org/dvpn/Daemon1 \
                 org.dvpn.Daemon1 Portal u 1000) and open the page it names in a browser that uses the proxy it names"
                .to_owned(),
            Some(opening) => format!(
                "user {} can log in by a browser that uses the proxy which Portal named, until {}",
                opening.uid, opening.ends_at
            ),
        };
        Some(Problem {
            what: format!("this network wants you to log in: {gave_away}"),
            how,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::fixtures::start;

    const LENGTH: Duration = Duration::from_mins(5);
    const ANN: u32 = 1000;
    const BEN: u32 = 1001;
    const PORTAL: Verdict = Verdict::Portal(PortalSign::Page);

    fn later(now: Now, by: Duration) -> Now {
        Now {
            instant: now.instant + by,
            wall: now.wall.checked_add(by).unwrap(),
        }
    }

    fn opened(now: Now) -> Portal {
        let mut portal = Portal::default();
        assert_eq!(portal.asked(ANN, true), Ok(None));
        assert_eq!(portal.looked(&PORTAL, true, now), None);
        portal.open(ANN, true, &PORTAL, LENGTH, now).unwrap();
        portal
    }

    #[test]
    fn it_opens_only_while_blocking_and_only_when_the_pool_does_not_answer() {
        let now = start();
        for (blocking, verdict, expected) in [
            (true, PORTAL, Ok(())),
            (true, Verdict::Unknown, Ok(())),
            (true, Verdict::Reached, Err(Refusal::Reached)),
            (false, PORTAL, Err(Refusal::NotBlocking)),
            (false, Verdict::Reached, Err(Refusal::NotBlocking)),
        ] {
            let mut portal = Portal::default();
            let opening = portal.open(ANN, blocking, &verdict, LENGTH, now);
            assert_eq!(opening.map(|_| ()), expected, "{blocking} {verdict:?}");
            assert_eq!(portal.opening().is_some(), expected.is_ok());
        }
    }

    #[test]
    fn asking_again_moves_no_end_and_nobody_else_gets_in() {
        let now = start();
        let mut portal = opened(now);
        let first = portal.opening().unwrap();
        let again = later(now, Duration::from_mins(4));
        assert_eq!(portal.asked(ANN, true), Ok(Some(first)));
        assert_eq!(portal.open(ANN, true, &PORTAL, LENGTH, again), Ok(first));
        assert_eq!(portal.asked(BEN, true), Err(Refusal::Another(ANN)));
        assert_eq!(
            portal.open(BEN, true, &PORTAL, LENGTH, again),
            Err(Refusal::Another(ANN))
        );
        assert_eq!(portal.opening(), Some(first));
    }

    #[test]
    fn it_ends_by_time_by_the_pool_by_a_tunnel_elsewhere_and_when_nothing_is_blocked() {
        let now = start();
        let end = later(now, LENGTH);

        let mut portal = opened(now);
        assert_eq!(
            portal.due(later(now, LENGTH.saturating_sub(Duration::from_millis(1)))),
            Some(Due::Look)
        );
        assert_eq!(portal.due_at(), Some(end.instant));
        assert_eq!(portal.due(end), Some(Due::Close(Ended::Over)));
        assert_eq!((portal.opening(), portal.due(end), portal.due_at()), (None, None, None));
        assert!(portal.problem().is_some(), "the network still wants a login");

        let mut portal = opened(now);
        assert_eq!(portal.looked(&Verdict::Reached, true, now), Some(Ended::Reached));
        assert_eq!(
            (portal.opening(), portal.status(), portal.problem()),
            (None, None, None)
        );
        assert_eq!(portal.looked(&Verdict::Reached, true, now), None, "once");

        let mut portal = opened(now);
        assert_eq!(portal.moved(), Some(Ended::Moved));
        assert_eq!((portal.opening(), portal.status(), portal.moved()), (None, None, None));

        for (blocking, connected, ended) in [
            (true, false, None),
            (true, true, Some(Ended::Reached)),
            (false, false, Some(Ended::NotBlocking)),
            (false, true, Some(Ended::NotBlocking)),
        ] {
            let mut portal = opened(now);
            assert_eq!(portal.follow(blocking, connected), ended);
            assert_eq!(portal.opening().is_none(), ended.is_some());
            assert_eq!(portal.follow(blocking, connected), None, "once");
        }
    }

    #[test]
    fn while_it_is_open_the_network_is_looked_at_every_two_seconds() {
        let now = start();
        let mut portal = opened(now);
        let mut at = now;
        for _ in 0..10 {
            assert_eq!(portal.due(at), None);
            at = later(at, LOOK_EVERY);
            assert_eq!(portal.due_at(), Some(at.instant));
            assert_eq!(portal.due(at), Some(Due::Look));
            assert_eq!(portal.due(at), None, "one look at a time");
            // A network that answers nothing for a moment is still the one that wanted a login.
            assert_eq!(portal.looked(&Verdict::Unknown, true, at), None);
            assert!(portal.problem().is_some());
        }
    }

    #[test]
    fn without_an_opening_a_finding_lasts_until_the_next_look() {
        let now = start();
        let mut portal = Portal::default();
        assert_eq!((portal.status(), portal.due_at()), (None, None));
        assert_eq!(portal.looked(&PORTAL, true, now), None);
        let status = portal.status().unwrap();
        assert_eq!((status.sign, status.open_until), (Some(PortalSign::Page), None));
        assert_eq!((portal.due_at(), portal.due(now)), (None, None));
        portal.looked(&Verdict::Unknown, true, now);
        assert_eq!(portal.status(), None);
        portal.looked(&PORTAL, false, now);
        assert_eq!(portal.status(), None, "nothing is blocked: any browser will do");
    }
}
