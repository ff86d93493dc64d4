//! A provider that the orchestrator made stands as long as its lease.

use super::*;

const LEASE: Duration = Duration::from_mins(10);

/// Connected through a leased provider.
fn leased_rig() -> Rig {
    let mut rig = rig_in("provisioning");
    assert!(rig.session.lease().is_none());
    let asked = rig.asked;
    rig.feed(Input::Provisioned(asked, Ok(leased(&provider(9), rig.now, LEASE))));
    assert!(rig.session.lease().is_some(), "a lease is held from the answer on");
    rig.lead_to(StateName::Connected);
    assert_eq!(rig.session.lease().map(|(attempt, _)| attempt), Some(rig.tunnel()));
    rig
}

/// Traffic flows for so long; the state after every second must be Connected.
#[track_caller]
fn flows(rig: &mut Rig, time: Duration) {
    for _ in 0..time.as_secs() {
        assert_eq!(rig.second(100, 100), StateName::Connected);
        if rig.session.poll_timeout().unwrap().0 <= rig.now.instant {
            rig.expire();
        }
    }
}

#[test]
fn an_extended_lease_keeps_the_tunnel_and_nobody_asks_the_pool_about_it() {
    let mut rig = leased_rig();
    let tunnel = rig.tunnel();
    for _ in 0..4 {
        flows(&mut rig, LEASE / 2);
        let until = rig.now.wall.checked_add(LEASE).unwrap();
        assert_eq!(rig.feed(Input::LeaseExtended(tunnel, until)), StateName::Connected);
    }
    assert_eq!(rig.tunnel(), tunnel, "the tunnel is the same all the time");
    assert_eq!(rig.session.status().attempts, 1);
}

#[test]
fn at_the_end_of_a_lease_the_pool_is_asked_again() {
    let mut rig = leased_rig();
    flows(&mut rig, LEASE.saturating_sub(Duration::from_secs(1)));
    rig.second(100, 100);
    assert_eq!(rig.expire(), StateName::Disconnecting);
    assert!(rig.session.lease().is_none(), "it is to be returned now");
    rig.feed(Input::TornDown(rig.asked));
    assert_eq!(rig.session.state(), StateName::Discovering);
}

#[test]
fn an_extension_for_another_try_or_beyond_the_payment_does_not_count() {
    let mut rig = leased_rig();
    let tunnel = rig.tunnel();
    let far = Timestamp::MAX;
    rig.feed(Input::LeaseExtended(Attempt(tunnel.0 + 1), far));
    let end = |rig: &Rig| {
        let (State::Connected(tunnel) | State::Degraded(tunnel)) = &rig.session.state else {
            panic!("{:?}", rig.session.state)
        };
        tunnel.approval.expires_at()
    };
    assert!(end(&rig) < rig.now.wall.checked_add(LEASE).unwrap() + jiff::SignedDuration::from_secs(1));
    rig.feed(Input::LeaseExtended(tunnel, far));
    assert!(end(&rig) <= rig.now.wall.checked_add(HOUR).unwrap(), "an hour is paid");
}

#[test]
fn stop_returns_the_lease_at_once() {
    let mut rig = leased_rig();
    assert_eq!(rig.feed(Input::Stop), StateName::Disconnecting);
    assert!(rig.session.lease().is_none());
}

#[test]
fn the_payment_behind_a_leased_provider_is_verified_again_and_a_yes_asks_no_pool() {
    let mut rig = leased_rig();
    let tunnel = rig.tunnel();
    // Half of the paid hour is over after 30 minutes.
    let mut asked = false;
    for _ in 0..7 {
        for _ in 0..(LEASE / 2).as_secs() {
            rig.second(100, 100);
            if rig.session.poll_timeout().unwrap().0 <= rig.now.instant {
                rig.expire();
                asked |= rig.did(|action| matches!(action, Action::Verify(..)));
            }
            if asked {
                break;
            }
        }
        if asked {
            break;
        }
        let until = rig.now.wall.checked_add(LEASE).unwrap();
        rig.feed(Input::LeaseExtended(tunnel, until));
    }
    assert!(asked, "the payment was never verified again");
    rig.feed(Input::Verified(rig.asked, paid(rig.now, HOUR * 3)));
    assert!(!rig.did(|action| matches!(action, Action::Approve(..))));
    assert_eq!(rig.session.state(), StateName::Connected);
}
