//! What a node's owner allows, while the node runs: its hours, and the volume of a month.

use std::time::{Duration, Instant, SystemTime};

use dvpn_core::{line::Known, node::Rules};
use dvpn_daemon::provider::Event;
use dvpn_tests::hours;

use crate::{
    node::{Bed, Running, SOON, eventually, key},
    pool::{approval, entry},
};

const NETWORK: &[&str] = &["10.96.0.1/20"];
/// In place of five minutes.
const GRACE: Duration = Duration::from_secs(2);

fn wait_for_admission(running: &Running, wanted: &str, patience: Duration) {
    let deadline = Instant::now() + patience;
    while !running.status.borrow().admission.starts_with(wanted) {
        assert!(Instant::now() < deadline, "{wanted}: {:?}", running.status.borrow());
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn wait_until_told(bed: &Bed, draining: bool) {
    let pool = bed.pool.clone();
    bed.told(async move { pool.registration(|request| request.draining == draining).await });
}

#[test]
fn a_running_node_outside_its_hours_has_no_peers_and_has_them_again_when_they_begin() {
    let mut bed = Bed::new(NETWORK);
    let hours = hours::soon_over(Duration::from_secs(15));
    bed.rules = Rules {
        schedule: hours.schedule.parse().unwrap(),
        grace: GRACE,
        ..Rules::default()
    };
    let running = bed.start();
    wait_until_told(&bed, false);
    let peer = entry(&approval(key(100), key(1), "10.96.0.2/32", 1));
    assert_eq!(bed.add(peer.clone()), None);
    // A stream that is silent for a while is opened anew, with what the pool has by then.
    bed.pool.set_peers(vec![peer]);
    let client = bed.client(1, "wg0");
    assert!(bed.shakes(&client, SOON));
    eventually("it carries", || bed.pings("wg0", "10.96.0.2"));

    wait_for_admission(
        &running,
        "closed: outside its hours",
        hours::until(hours.closes) + GRACE + SOON,
    );
    assert!(SystemTime::now() >= hours.closes + GRACE, "not before its time");
    wait_until_told(&bed, true);
    // The status is shown before the tunnel is told.
    eventually("nobody is a peer", || !bed.shakes(&client, Duration::from_secs(1)));
    assert!(!bed.pings("wg0", "10.96.0.2"));
    let refused = bed.add(entry(&approval(key(100), key(2), "10.96.0.3/32", 2)));
    let reason = "this node takes no new clients: outside its hours (NODE_SCHEDULE)";
    assert_eq!(refused.as_deref(), Some(reason));

    wait_for_admission(&running, "open", hours::until(hours.opens) + SOON);
    assert!(SystemTime::now() >= hours.opens, "not before its time");
    wait_until_told(&bed, false);
    eventually(
        "whose approval lasts is a peer again, without a word from the pool",
        || bed.shakes(&client, Duration::from_secs(1)),
    );
    eventually("it carries again", || bed.pings("wg0", "10.96.0.2"));
    assert_eq!(bed.add(entry(&approval(key(100), key(2), "10.96.0.3/32", 2))), None);
    let admissions: Vec<String> = bed
        .events()
        .into_iter()
        .filter_map(|event| {
            if let Event::AdmissionChanged { admission } = event {
                Some(admission)
            } else {
                None
            }
        })
        .collect();
    let closed = admissions
        .iter()
        .filter(|admission| admission.starts_with("closed"))
        .count();
    assert!(closed == 1 && admissions.last().unwrap() == "open", "{admissions:?}");
    running.stop();
}

#[test]
fn a_running_node_whose_month_is_used_up_ends_its_clients_after_a_while_and_a_higher_cap_opens_it() {
    let mut bed = Bed::new(NETWORK);
    bed.rules = Rules {
        monthly_cap_bytes: 10_000,
        grace: GRACE,
        ..Rules::default()
    };
    let running = bed.start();
    let peer = entry(&approval(key(100), key(1), "10.96.0.2/32", 1));
    assert_eq!(bed.add(peer.clone()), None);
    let client = bed.client(1, "wg0");
    assert!(bed.shakes(&client, SOON));
    eventually("it carries", || bed.pings("wg0", "10.96.0.2"));
    wait_until_told(&bed, false);
    bed.clients.sh("ping -c8 -i0.01 -s 1000 10.96.0.1").unwrap();
    wait_for_admission(&running, "closed: the month's volume", SOON);
    wait_until_told(&bed, true);
    eventually("nobody is a peer", || !bed.shakes(&client, Duration::from_secs(1)));
    assert!(!bed.pings("wg0", "10.96.0.2"));
    let usage = bed.kept.usage.lock().unwrap().expect("kept when it was reached");
    assert!(usage.bytes >= 10_000, "{usage:?}");
    running.stop();

    bed.rules.monthly_cap_bytes = 1_000_000;
    bed.pool.set_peers(vec![peer]);
    let running = bed.start();
    wait_until_told(&bed, false);
    assert!(running.status.borrow().month_bytes >= usage.bytes, "the month goes on");
    eventually("it is a peer again", || bed.shakes(&client, Duration::from_secs(1)));
    eventually("it carries again", || bed.pings("wg0", "10.96.0.2"));
    running.stop();
}

#[test]
fn a_running_node_whose_line_is_unmeasured_takes_nobody_and_keeps_who_is_there() {
    let bed = Bed::new(NETWORK);
    let known = bed.line.send_replace(Known::Nothing);
    let running = bed.start();
    wait_for_admission(&running, "draining: its line is unmeasured", SOON);
    wait_until_told(&bed, true);
    let first = || entry(&approval(key(100), key(1), "10.96.0.2/32", 1));
    let reason = "this node takes no new clients: its line is unmeasured (BANDWIDTH_TOTAL_MBPS, BANDWIDTH_TEST_URL)";
    assert_eq!(bed.add(first()).as_deref(), Some(reason));

    // It was measured.
    bed.line.send_replace(known);
    wait_for_admission(&running, "open", SOON);
    wait_until_told(&bed, false);
    assert_eq!(bed.add(first()), None);
    let client = bed.client(1, "wg0");
    assert!(bed.shakes(&client, SOON));
    eventually("it carries", || bed.pings("wg0", "10.96.0.2"));

    // The machine is on another network now.
    bed.line.send_replace(Known::Nothing);
    wait_for_admission(&running, "draining: its line is unmeasured", SOON);
    let refused = bed.add(entry(&approval(key(100), key(2), "10.96.0.3/32", 2)));
    assert_eq!(refused.as_deref(), Some(reason));
    assert!(bed.pings("wg0", "10.96.0.2"), "who is there stays");
    running.stop();
}
