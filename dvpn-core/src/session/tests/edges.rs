//! Edges that need more than one step to be seen.

use std::collections::BTreeSet;

use super::{
    renewals::{released, tunnel_key},
    *,
};
use crate::{firewall::Exemptions, session::fixtures::subscription};

pub(super) fn seconds(n: u64) -> Duration {
    Duration::from_secs(n)
}

pub(super) fn connected() -> Rig {
    let mut rig = Rig::new(config());
    rig.lead_to(StateName::Connected);
    rig
}

#[test]
fn a_silent_provider_is_probed_then_shaken_then_rebound_then_left_after_ten_seconds() {
    let mut rig = connected();
    rig.second(50_000, 50_000);
    let dead = rig.asked_provider();
    let mut seen = Vec::new();
    for second in 1..=10 {
        let state = rig.second(500, 0);
        let did = |wanted: fn(&Action) -> bool| rig.did(wanted);
        let probe = did(|a| matches!(a, Action::ProbeTunnel(_)));
        let handshake = did(|a| matches!(a, Action::ForceHandshake(_)));
        let rebind = did(|a| matches!(a, Action::RebindTunnel(_)));
        seen.push((second, state, probe, handshake, rebind));
    }
    let (c, d, g) = (StateName::Connected, StateName::Degraded, StateName::Disconnecting);
    assert_eq!(
        seen,
        [
            (1, c, false, false, false),
            (2, c, true, false, false),
            (3, c, true, false, false),
            (4, c, true, false, false),
            (5, d, true, true, false),
            (6, d, true, false, false),
            (7, d, true, false, false),
            (8, d, true, true, true),
            (9, d, true, false, false),
            (10, g, false, false, false),
        ]
    );
    rig.feed(Input::TornDown(rig.asked));
    rig.lead_to(StateName::Connected);
    assert_ne!(rig.asked_provider().id, dead.id, "the dead one comes last");
    assert_eq!(rig.session.status().switches, 1);
}

#[test]
fn outages_of_three_seconds_and_lost_seconds_never_degrade() {
    let mut rig = connected();
    for round in 0..200 {
        for _ in 0..round % 4 {
            assert_eq!(rig.second(400, 0), StateName::Connected);
        }
        assert_eq!(rig.second(400, 400), StateName::Connected);
    }
    assert_eq!(rig.session.status().switches, 0);
}

#[test]
fn an_idle_tunnel_is_probed_every_twenty_seconds_and_left_when_nobody_answers() {
    let mut rig = connected();
    let mut probes = 0;
    for _ in 0..100 {
        rig.second(0, 0);
        if rig.did(|a| matches!(a, Action::ProbeTunnel(_))) {
            probes += 1;
            rig.traffic.rx_bytes += 96;
        }
    }
    assert_eq!((probes, rig.session.state()), (4, StateName::Connected));
    let mut waited = 0;
    while rig.session.state() != StateName::Disconnecting {
        rig.second(0, 0);
        waited += 1;
    }
    assert!((10..=31).contains(&waited), "{waited}");
}

#[test]
fn an_answered_handshake_alone_is_no_proof_that_traffic_flows() {
    let mut rig = connected();
    rig.second(50_000, 50_000);
    for second in 1..=9 {
        // Each forced handshake is answered, and nothing else.
        rig.second(300, if matches!(second, 6 | 9) { 92 } else { 0 });
    }
    assert_eq!(rig.session.state(), StateName::Degraded);
    assert_eq!(rig.second(300, 0), StateName::Disconnecting);
}

#[test]
fn any_answer_to_the_users_traffic_ends_the_ladder() {
    let mut rig = connected();
    rig.lead_to(StateName::Degraded);
    assert_eq!(rig.second(300, 5_000), StateName::Connected);
}

#[test]
fn missing_samples_degrade_but_one_late_wake_up_does_not_lose_the_tunnel() {
    let mut rig = connected();
    rig.second(1_000, 1_000);
    rig.wait(seconds(60));
    rig.last = rig.watch.expire(&mut rig.session, rig.now).unwrap_or_default();
    assert_ne!(rig.session.state(), StateName::Disconnecting);
    assert_eq!(rig.second(1_000, 1_000), StateName::Connected);
    for _ in 0..12 {
        if rig.session.state() == StateName::Disconnecting {
            return;
        }
        rig.expire();
    }
    panic!("a tunnel without samples is {:?}", rig.session.state());
}

#[test]
fn every_end_of_a_tunnel_releases_its_key_once_the_tunnel_is_gone() {
    let mut rig = connected();
    let (tunnel, key) = (rig.tunnel(), tunnel_key(&rig));
    assert_eq!(rig.session.held().len(), 1);
    rig.feed(Input::Stop);
    assert_eq!(released(&rig), []);
    assert_eq!(rig.session.held().len(), 1, "an end that does not wait finds it here");
    rig.feed(Input::TornDown(tunnel));
    assert_eq!((released(&rig), rig.session.held()), (vec![key], vec![]));
}

#[test]
fn a_token_that_is_missing_or_sealed_away_says_nothing_about_the_payment() {
    let held = Restored {
        subscription: Some(subscription(start(), HOUR)),
        ..Restored::default()
    };
    let mut rig = Rig::restored(config(), held);
    rig.lead_to(StateName::Authorizing);
    let cannot = || Verification::CannotTell(failure(Retry::Never));
    assert_eq!(rig.feed(Input::Verified(rig.asked, cannot())), StateName::Blocked);
    assert!(!rig.did(|a| matches!(a, Action::StoreSubscription(_) | Action::Approve(..))));
    let status = rig.session.status();
    assert_eq!(status.payment, PaymentStatus::Paid);
    assert!(status.paid_until.is_some(), "the last yes holds to its end");
    // And a standing tunnel stays.
    let mut rig = connected();
    rig.feed(Input::TokenChanged);
    assert_eq!(rig.feed(Input::Verified(rig.asked, cannot())), StateName::Connected);
}

#[test]
fn a_payment_that_ends_takes_the_tunnel_down_and_stays_blocked() {
    let mut rig = connected();
    rig.feed(Input::TokenChanged);
    let asked = rig
        .last
        .iter()
        .find_map(|a| if let Action::Verify(n, _) = a { Some(*n) } else { None })
        .unwrap();
    let tunnel = rig.tunnel();
    rig.feed(Input::Verified(asked, Verification::NotPaid(failure(Retry::Never))));
    assert_eq!(rig.session.state(), StateName::Disconnecting);
    assert_eq!(rig.feed(Input::TornDown(tunnel)), StateName::Blocked);
    assert_eq!(rig.policy(), &Policy::Blocked(Exemptions::default()));
    assert_eq!(rig.session.status().payment, PaymentStatus::Unpaid);
    assert_eq!(rig.feed(Input::TokenChanged), StateName::Discovering);
}

#[test]
fn an_outage_of_the_payment_server_is_not_unpaid() {
    let held = Restored {
        subscription: Some(subscription(start(), HOUR)),
        ..Restored::default()
    };
    let mut rig = Rig::restored(config(), held);
    rig.lead_to(StateName::Authorizing);
    rig.feed(Input::Verified(
        rig.asked,
        Verification::CannotTell(failure(Retry::Backoff)),
    ));
    assert!(rig.did(|a| matches!(a, Action::Approve(..))));
    assert!(rig.session.status().problem.is_some());

    let mut rig = Rig::new(config());
    rig.lead_to(StateName::Authorizing);
    rig.feed(Input::Verified(
        rig.asked,
        Verification::CannotTell(failure(Retry::Backoff)),
    ));
    assert_eq!(rig.session.state(), StateName::Backoff);
}

#[test]
fn a_hostile_list_keeps_the_old_one_for_a_day() {
    let mut rig = connected();
    rig.feed(Input::TunnelLost(rig.asked, failure(Retry::Now)));
    rig.feed(Input::TornDown(rig.asked));
    rig.feed(Input::Listed(rig.asked, Err(failure(Retry::Backoff))));
    assert_eq!(rig.session.state(), StateName::Probing);
    assert!(rig.session.status().problem.is_some());

    rig.feed(Input::Probed(rig.asked, vec![]));
    assert_eq!(rig.session.state(), StateName::Backoff);
    rig.wait(Duration::from_hours(25));
    rig.expire();
    rig.feed(Input::Listed(rig.asked, Err(failure(Retry::Backoff))));
    assert_eq!(rig.session.state(), StateName::Backoff);
}

#[test]
fn a_dead_sample_is_followed_by_the_next_of_the_same_attempt() {
    let mut rig = Rig::new(config());
    rig.start();
    rig.feed(Input::Listed(rig.asked, Ok(directory(8))));
    let mut asked = BTreeSet::new();
    let mut sizes = Vec::new();
    while let State::Probing(probing) = &rig.session.state {
        sizes.push(probing.asked.len());
        asked.extend(probing.asked.iter().map(|provider| provider.id.clone()));
        rig.feed(Input::Probed(rig.asked, vec![]));
    }
    assert_eq!(sizes, [3, 3, 2]);
    assert_eq!(asked.len(), 8);
    assert_eq!(
        (rig.session.state(), rig.session.status().attempts),
        (StateName::Backoff, 1)
    );
}

#[test]
fn a_refused_approval_takes_the_next_candidate_and_the_last_refusal_ends_the_attempt() {
    let mut rig = Rig::new(config());
    rig.lead_to(StateName::Authorizing);
    let first = rig.asked_provider();
    for _ in 0..2 {
        rig.feed(Input::Verified(rig.asked, paid(rig.now, HOUR)));
        rig.feed(Input::Approved(rig.asked, Err(failure(Retry::Now))));
    }
    assert_eq!(
        (rig.session.state(), rig.session.status().attempts),
        (StateName::Backoff, 1)
    );
    assert!(
        rig.session
            .status()
            .candidates
            .iter()
            .any(|candidate| candidate.id == first.id)
    );
}

#[test]
fn an_approval_for_somebody_else_makes_no_tunnel() {
    let mut rig = Rig::new(config());
    rig.lead_to(StateName::Authorizing);
    rig.feed(Input::Verified(rig.asked, paid(rig.now, HOUR)));
    rig.feed(Input::Approved(rig.asked, Ok(approval(&provider(8), rig.now, HOUR))));
    assert!(!rig.did(|a| matches!(a, Action::ConfigureTunnel(..))));
    assert_eq!(rig.session.state(), StateName::Authorizing);
}

#[test]
fn the_fallback_is_asked_only_after_the_pool_failed_and_never_for_a_pinned_choice() {
    let mut fallback = config();
    fallback.fallback = true;
    let mut rig = Rig::new(fallback.clone());
    rig.lead_to(StateName::Probing);
    rig.feed(Input::Probed(rig.asked, vec![]));
    assert_eq!(rig.session.state(), StateName::Provisioning);
    rig.lead_to(StateName::Connected);
    assert_eq!(rig.asked_provider(), provider(9));

    let mut rig = Rig::new(fallback);
    rig.feed(Input::Start(Choice {
        only_ids: vec!["provider-1".parse().unwrap()],
        ..Choice::default()
    }));
    rig.feed(Input::Listed(rig.asked, Err(failure(Retry::Backoff))));
    assert_eq!(rig.session.state(), StateName::Backoff);
}

#[test]
fn pauses_grow_from_one_second_to_a_minute_and_a_good_connection_wipes_them_out() {
    let mut rig = Rig::new(config());
    rig.start();
    let mut pauses = Vec::new();
    for _ in 0..12 {
        rig.feed(Input::Listed(rig.asked, Err(failure(Retry::Backoff))));
        let before = rig.now.instant;
        rig.expire();
        pauses.push((rig.now.instant - before).as_secs_f64());
    }
    for (n, pause) in pauses.iter().enumerate() {
        let longest = f64::from(2_u32.pow(u32::try_from(n).unwrap() + 1)).min(60.0);
        assert!((longest / 2.0..=longest).contains(pause), "pause {n} of {pause} s");
    }
    assert!(pauses.windows(2).any(|two| two[0].to_bits() != two[1].to_bits()));

    rig.lead_to(StateName::Connected);
    for _ in 0..31 {
        rig.second(100, 100);
    }
    assert_eq!(rig.session.failures, 0);
}

#[test]
fn a_device_that_dies_at_once_is_not_made_again_without_a_pause() {
    let mut rig = connected();
    let mut seen = Vec::new();
    for _ in 0..3 {
        rig.feed(Input::TunnelLost(rig.asked, failure(Retry::Now)));
        seen.push(rig.feed(Input::TornDown(rig.asked)));
        if rig.session.state() == StateName::Backoff {
            rig.expire();
        }
        rig.lead_to(StateName::Connected);
    }
    assert_eq!(seen, [StateName::Discovering, StateName::Backoff, StateName::Backoff]);
}

#[test]
fn stop_opens_only_after_the_tunnel_is_down_and_never_under_lockdown() {
    for lockdown in [false, true] {
        let mut rig = Rig::new(SessionConfig { lockdown, ..config() });
        rig.lead_to(StateName::Connected);
        assert_eq!(rig.feed(Input::Stop), StateName::Disconnecting);
        assert_eq!(rig.policy(), &Policy::Blocked(Exemptions::default()));
        assert_eq!(rig.feed(Input::TornDown(rig.asked)), StateName::Disconnected);
        assert_eq!(*rig.policy() == Policy::Open, !lockdown);
    }
}

#[test]
fn a_stored_wish_begins_by_itself_and_without_one_the_firewall_stays_as_it_was_found() {
    let rig = Rig::restored(
        config(),
        Restored {
            wish: true,
            ..Restored::default()
        },
    );
    assert_eq!(rig.session.state(), StateName::Discovering);
    assert!(matches!(rig.policy(), Policy::Blocked(_)));

    let mut rig = Rig::new(config());
    rig.feed(Input::NetworkChanged);
    rig.feed(Input::ConfigChanged(Box::new(config())));
    assert_eq!(rig.session.firewall(), None);
    rig.feed(Input::Stop);
    assert_eq!(rig.policy(), &Policy::Open);
}

#[test]
fn a_firewall_that_cannot_block_ends_the_session_and_is_told_again_when_somebody_acts() {
    let mut rig = connected();
    rig.feed(Input::FirewallFailed(failure(Retry::Backoff)));
    rig.feed(Input::TornDown(rig.asked));
    assert_eq!(
        (rig.session.state(), rig.session.status().leaking),
        (StateName::Blocked, true)
    );
    rig.feed(Input::FirewallFailed(failure(Retry::Backoff)));
    assert_eq!(
        rig.last.iter().filter(|a| matches!(a, Action::SetFirewall(_))).count(),
        0,
        "no storm"
    );
    rig.start();
    assert!(rig.did(|a| matches!(a, Action::SetFirewall(Policy::Blocked(_)))));
    assert_eq!(rig.session.state(), StateName::Discovering);
}

#[test]
fn a_wall_clock_set_forward_ends_the_approval_and_set_back_does_not_spin() {
    let mut rig = connected();
    rig.now.wall = rig.now.wall.checked_sub(HOUR * 5).unwrap();
    rig.second(100, 100);
    let (at, _) = rig.session.poll_timeout().unwrap();
    assert!(at > rig.now.instant);
    rig.now.wall = rig.now.wall.checked_add(HOUR * 20).unwrap();
    rig.second(100, 100);
    assert_eq!(rig.expire(), StateName::Disconnecting);
}

#[test]
fn another_choice_switches_only_when_the_present_provider_is_not_in_it() {
    let mut rig = connected();
    let here = rig.asked_provider().id;
    let same = Choice {
        only_ids: vec![here.clone()],
        ..Choice::default()
    };
    assert_eq!(rig.feed(Input::Start(same)), StateName::Connected);
    let other = Choice {
        exclude_ids: vec![here],
        ..Choice::default()
    };
    assert_eq!(rig.feed(Input::Start(other)), StateName::Disconnecting);
    rig.feed(Input::TornDown(rig.asked));
    rig.lead_to(StateName::Connected);
    assert_eq!(rig.session.status().switches, 0, "a change that was asked for");
}

#[test]
fn the_stand_in_id_reads_as_an_id() {
    assert!(FALLBACK_ID.parse::<dvpn_common::ids::ProviderId>().is_ok());
}
