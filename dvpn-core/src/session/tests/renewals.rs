//! The approval of a standing tunnel is kept fresh.

use super::{
    edges::{connected, seconds},
    *,
};

/// Connected, and the approval's half-life is over: a renewal is verified.
fn renewing() -> Rig {
    let mut rig = connected();
    for _ in 0..1_799 {
        rig.second(100, 100);
    }
    assert!(!rig.did(|a| matches!(a, Action::Verify(..))));
    rig.wait(seconds(2));
    rig.last = rig.watch.expire(&mut rig.session, rig.now).unwrap();
    rig.note();
    assert!(rig.did(|a| matches!(a, Action::Verify(..))), "{:?}", rig.last);
    assert_eq!(
        rig.feed(Input::Verified(rig.asked, paid(rig.now, HOUR * 9))),
        StateName::Connected
    );
    rig
}

pub(super) fn tunnel_key(rig: &Rig) -> dvpn_common::keys::PublicKey {
    let (State::Connected(tunnel) | State::Degraded(tunnel)) = &rig.session.state else {
        panic!("no tunnel in {:?}", rig.session.state)
    };
    *tunnel.approval.client_key()
}

pub(super) fn released(rig: &Rig) -> Vec<dvpn_common::keys::PublicKey> {
    let keys = rig.last.iter().filter_map(|action| {
        let Action::Release(release) = action else { return None };
        Some(release.client_key)
    });
    keys.collect()
}

/// Seconds with traffic until something is asked of the pool; how many.
#[track_caller]
fn until_asked(rig: &mut Rig) -> u64 {
    for second in 1..=3_600 {
        rig.second(100, 100);
        if rig.session.poll_timeout().unwrap().0 <= rig.now.instant {
            rig.last = rig.watch.expire(&mut rig.session, rig.now).unwrap();
            rig.note();
        }
        if rig.did(|a| matches!(a, Action::Approve(..) | Action::Verify(..))) {
            return second;
        }
    }
    panic!("nothing is asked in an hour");
}

#[test]
fn an_approval_is_renewed_at_half_of_its_life_while_the_tunnel_stands() {
    let mut rig = renewing();
    let (attempts, provider, tunnel, old) = (
        rig.session.status().attempts,
        rig.asked_provider(),
        rig.tunnel(),
        tunnel_key(&rig),
    );
    assert!(rig.did(|a| matches!(a, Action::Approve(_, _, _, Some(renews)) if *renews == old)));
    let fresh = approval(&provider, rig.now, HOUR);
    assert_eq!(
        rig.feed(Input::Approved(rig.asked, Ok(fresh.clone()))),
        StateName::Connected
    );
    assert!(rig.did(|a| matches!(a, Action::RenewTunnel(_, approval) if *approval == fresh)));
    let before = rig.traffic;
    rig.second(100, 100);
    assert_eq!(rig.feed(Input::TunnelRenewed(rig.asked, Ok(()))), StateName::Connected);
    assert_eq!(released(&rig), [old]);
    assert!(rig.did(|a| matches!(a, Action::Audit(Event::TunnelRenewed { .. }))));
    assert_eq!((rig.tunnel(), tunnel_key(&rig)), (tunnel, *fresh.client_key()));
    rig.second(100, 100);
    let status = rig.session.status();
    assert_eq!((status.attempts, status.switches), (attempts, 0));
    assert_eq!(status.traffic.rx_bytes, before.rx_bytes + 200, "totals go on");
    // And once more, at half of the fresh one's life.
    for _ in 0..1_797 {
        rig.second(100, 100);
    }
    rig.wait(seconds(3));
    rig.last = rig.watch.expire(&mut rig.session, rig.now).unwrap();
    assert!(rig.did(|a| matches!(a, Action::Verify(..))));
}

#[test]
fn a_renewal_at_other_addresses_connects_anew_to_the_same_provider() {
    let mut rig = renewing();
    let (attempts, provider, old) = (rig.session.status().attempts, rig.asked_provider(), tunnel_key(&rig));
    let tunnel = rig.tunnel();
    let fresh = approval_at("10.96.0.3", &provider, rig.now, HOUR);
    assert_eq!(
        rig.feed(Input::Approved(rig.asked, Ok(fresh))),
        StateName::Disconnecting
    );
    assert_eq!(released(&rig), []);
    assert_eq!(rig.feed(Input::TornDown(tunnel)), StateName::Connecting);
    assert_eq!(released(&rig), [old]);
    assert_eq!(rig.feed(Input::HandshakeSeen(rig.asked)), StateName::Connected);
    let status = rig.session.status();
    assert_eq!((status.attempts, status.switches), (attempts, 0));
    assert_eq!(rig.asked_provider(), provider);
}

#[test]
fn a_hand_over_that_fails_is_tried_again_within_seconds_and_then_connects_anew() {
    let mut rig = renewing();
    let (provider, tunnel, old) = (rig.asked_provider(), rig.tunnel(), tunnel_key(&rig));
    let fresh = approval(&provider, rig.now, HOUR);
    rig.feed(Input::Approved(rig.asked, Ok(fresh.clone())));
    for pause in [2, 4] {
        let failed = Input::TunnelRenewed(rig.asked, Err(failure(Retry::Backoff)));
        assert_eq!(rig.feed(failed), StateName::Connected);
        assert_eq!(tunnel_key(&rig), old);
        assert_eq!(released(&rig), []);
        for second in 1..=pause {
            assert!(!rig.did(|a| matches!(a, Action::RenewTunnel(..))), "{second}");
            rig.second(100, 100);
            if rig.session.poll_timeout().unwrap().0 <= rig.now.instant {
                rig.last = rig.watch.expire(&mut rig.session, rig.now).unwrap();
                rig.note();
            }
        }
        assert!(rig.did(|a| matches!(a, Action::RenewTunnel(_, a) if *a == fresh)));
    }
    let failed = Input::TunnelRenewed(rig.asked, Err(failure(Retry::Backoff)));
    assert_eq!(rig.feed(failed), StateName::Disconnecting);
    assert_eq!(rig.feed(Input::TornDown(tunnel)), StateName::Connecting);
    assert_eq!(released(&rig), [old], "the fresh key is the one to go on with");
    assert!(rig.did(|a| matches!(a, Action::ConfigureTunnel(_, a) if *a == fresh)));
}

#[test]
fn a_hand_over_without_an_end_takes_the_tunnel_down() {
    let mut rig = renewing();
    let tunnel = rig.tunnel();
    let old = tunnel_key(&rig);
    let fresh = approval(&rig.asked_provider(), rig.now, HOUR);
    rig.feed(Input::Approved(rig.asked, Ok(fresh.clone())));
    for _ in 0..10 {
        rig.second(100, 100);
    }
    assert_eq!(rig.expire(), StateName::Disconnecting);
    assert_eq!(rig.feed(Input::TornDown(tunnel)), StateName::Discovering);
    assert_eq!(released(&rig), [old, *fresh.client_key()]);
}

#[test]
fn a_renewal_whose_answer_is_lost_is_asked_for_again_within_seconds_and_goes_over() {
    let mut rig = renewing();
    let (attempts, old) = (rig.session.status().attempts, tunnel_key(&rig));
    let first = rig.asked;
    for longest in [1, 2, 4, 8] {
        let lost = Input::Approved(rig.asked, Err(failure(Retry::Backoff)));
        assert_eq!(rig.feed(lost), StateName::Connected);
        assert!(!rig.did(|a| matches!(a, Action::Approve(..))), "not at once");
        let pause = until_asked(&mut rig);
        assert!(pause <= longest && pause * 2 >= longest, "{pause} s of {longest}");
        assert!(
            rig.did(|a| matches!(a, Action::Approve(_, _, _, Some(renews)) if *renews == old)),
            "{:?}",
            rig.last
        );
        assert_eq!(released(&rig), []);
    }
    assert!(rig.asked > first, "each question has a number of its own");
    let late = Input::Approved(first, Ok(approval(&rig.asked_provider(), rig.now, HOUR)));
    rig.feed(late);
    assert_eq!(rig.last, [], "an answer to an earlier one is late");
    let fresh = approval(&rig.asked_provider(), rig.now, HOUR);
    rig.feed(Input::Approved(rig.asked, Ok(fresh.clone())));
    assert!(rig.did(|a| matches!(a, Action::RenewTunnel(_, approval) if *approval == fresh)));
    assert_eq!(rig.feed(Input::TunnelRenewed(rig.asked, Ok(()))), StateName::Connected);
    let status = rig.session.status();
    assert_eq!((status.attempts, status.switches, status.problem), (attempts, 0, None));
    assert_eq!((released(&rig), tunnel_key(&rig)), (vec![old], *fresh.client_key()));
}

#[test]
fn a_renewal_is_asked_for_five_times_and_then_at_half_of_what_is_left() {
    let mut rig = renewing();
    for _ in 0..4 {
        rig.feed(Input::Approved(rig.asked, Err(failure(Retry::Now))));
        assert!(until_asked(&mut rig) <= 8);
        assert!(rig.did(|a| matches!(a, Action::Approve(..))));
    }
    rig.feed(Input::Approved(rig.asked, Err(failure(Retry::Now))));
    let pause = until_asked(&mut rig);
    assert!((850..=900).contains(&pause), "{pause} s of the half hour that is left");
    assert!(rig.did(|a| matches!(a, Action::Verify(..))), "{:?}", rig.last);
    // What no asking again can change waits as long at once.
    let mut rig = renewing();
    rig.feed(Input::Approved(rig.asked, Err(failure(Retry::Never))));
    let pause = until_asked(&mut rig);
    assert!((850..=900).contains(&pause), "{pause} s");
}

#[test]
fn a_renewal_without_any_answer_is_given_up_and_asked_for_again() {
    let mut rig = renewing();
    let first = rig.asked;
    for _ in 0..30 {
        rig.second(100, 100);
    }
    rig.expire();
    assert!(rig.did(|a| *a == Action::Cancel(first)), "{:?}", rig.last);
    assert_eq!(until_asked(&mut rig), 1);
    assert!(
        rig.did(|a| matches!(a, Action::Approve(n, ..) if *n > first)),
        "{:?}",
        rig.last
    );
}

#[test]
fn a_renewal_that_cannot_be_had_keeps_the_tunnel_until_the_approval_ends() {
    let mut rig = connected();
    let end = rig.now.wall.checked_add(HOUR).unwrap();
    while rig.session.state() == StateName::Connected {
        assert!(rig.now.wall < end);
        rig.second(100, 100);
        if rig.session.poll_timeout().unwrap().0 <= rig.now.instant {
            rig.expire();
            let asked = rig
                .last
                .iter()
                .find_map(|a| if let Action::Verify(n, _) = a { Some(*n) } else { None });
            if let Some(asked) = asked {
                rig.feed(Input::Verified(
                    asked,
                    Verification::CannotTell(failure(Retry::Backoff)),
                ));
            }
        }
    }
    assert!(rig.now.wall >= end);
    assert_eq!(rig.session.state(), StateName::Disconnecting);
}

#[test]
fn another_token_between_two_questions_is_verified_at_once() {
    let mut rig = renewing();
    rig.feed(Input::Approved(rig.asked, Err(failure(Retry::Backoff))));
    rig.feed(Input::TokenChanged);
    assert!(rig.did(|a| matches!(a, Action::Verify(..))), "{:?}", rig.last);
    assert!(!rig.did(|a| matches!(a, Action::Cancel(_))), "nobody was being asked");
}
