//! What others do to a shaper and its machine: nothing is open, and what can be repaired is.

use std::{
    fs,
    net::IpAddr,
    process::{Command, Stdio},
};

use dvpn_common::abi;
use dvpn_daemon::{
    ebpf::{Counters, Error as ProgramsError, Hook, Loader},
    host::{self, Mode, Shaper},
};

use crate::{
    bed::wait,
    live::{Live, TUNNEL, grant, holder, ip, mbit, peer, tc, tenths},
    shaper::{LONG, assert_about, assert_no_more, both_ways, shape_and_die},
};

fn is_programs(error: &host::Error, kind: impl Fn(&ProgramsError) -> bool) -> bool {
    matches!(error, host::Error::Programs(inner) if kind(inner))
}

#[test]
fn what_others_take_away_is_closed_until_it_is_repaired() {
    let live = Live::new();
    let mut shaper = live.shaped(Mode::Edt, &[grant(mbit(10), mbit(10))]);
    let reconcile = |shaper: &mut Shaper| live.runtime.block_on(shaper.reconcile()).unwrap();
    assert_eq!(reconcile(&mut shaper), [] as [String; 0]);

    ip(&["link", "del", &format!("{TUNNEL}up")]);
    assert!(!live.reaches_us(peer(0)), "no upload without the device");
    assert!(live.reaches(peer(0)));
    assert_eq!(
        reconcile(&mut shaper),
        ["the device dvpnp0up", "the qdisc of the upload"]
    );
    assert_about(live.upload(peer(0), LONG), mbit(10), "upload");

    tc(&["qdisc", "del", "dev", TUNNEL, "root"]);
    let unpaced = live.download(peer(0), LONG);
    assert_no_more(unpaced, tenths(mbit(10), 13), "without the qdisc");
    tc(&["qdisc", "del", "dev", "dvpnp0up", "root"]);
    let unpaced = live.upload(peer(0), LONG);
    assert_no_more(unpaced, tenths(mbit(10), 13), "without the qdisc");
    assert_eq!(
        reconcile(&mut shaper),
        ["the qdisc of the download", "the qdisc of the upload"]
    );
    both_ways(&live, &shaper, peer(0), [mbit(10), mbit(10)]);
    assert_eq!(reconcile(&mut shaper), [] as [String; 0]);
}

#[test]
fn a_class_that_no_program_chose_carries_nothing() {
    let live = Live::new();
    let shaper = live.shaped(Mode::Htb, &[grant(mbit(10), mbit(10))]);
    assert!(live.reaches(peer(0)));
    // Somebody takes the program off and leaves the qdisc.
    drop(shaper);
    let folder = live.bed.pin_dir().join(format!("v{}", abi::VERSION)).join(TUNNEL);
    for pin in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
        if pin.file_name().unwrap().to_str().unwrap().starts_with("down-") {
            fs::remove_file(pin).unwrap();
        }
    }
    // The kernel lets go of an unpinned link by a work queue.
    wait(|| !live.reaches(peer(0))).expect("nothing passes");
    assert!(!live.reaches(peer(1)));
}

#[test]
fn an_interface_that_was_made_anew_is_shaped_anew() {
    let mut live = Live::new();
    let mut shaper = live.shaped(Mode::Edt, &[grant(mbit(10), mbit(10))]);
    live.disconnect();
    let gone = live.runtime.block_on(shaper.reconcile()).unwrap_err();
    assert!(matches!(gone, host::Error::NoInterface(_)), "{gone:?}");
    live.connect();
    let other = live.runtime.block_on(shaper.reconcile()).unwrap_err();
    assert!(matches!(other, host::Error::NoInterface(_)), "{other:?}");
    drop(shaper);
    let shaper = live.open(Mode::Edt);
    assert!(
        shaper.peers().is_empty(),
        "peers of the interface before are nobody here"
    );
    Live::up();
    assert!(!live.reaches(peer(0)) && !live.reaches_us(peer(0)));
    let mut shaper = shaper;
    live.runtime
        .block_on(shaper.grant(&[peer(0)], grant(mbit(10), mbit(10))))
        .unwrap();
    assert!(live.reaches(peer(0)) && live.reaches_us(peer(0)));
}

#[test]
fn an_interface_that_is_up_is_taken_down_before_its_programs_come() {
    let live = Live::new();
    let shaper = live.open(Mode::Edt);
    let state = fs::read_to_string(format!("/sys/class/net/{TUNNEL}/flags")).unwrap_or_default();
    assert!(!live.reaches(peer(0)), "{state}");
    Live::up();
    assert!(!live.reaches(peer(0)), "nobody is granted anything");
    assert!(shaper.refused().unwrap()["unknown"].packets >= 1);
}

#[test]
fn without_a_bpf_file_system_there_is_no_shaper_and_nothing_is_left() {
    let live = Live::new();
    let plain = tempfile::tempdir().unwrap();
    let loader = Loader::new(plain.path().join("dvpn"));
    let opened = live
        .runtime
        .block_on(Shaper::open(&live.host, &loader, Live::config(Mode::Edt)));
    let error = opened.err().unwrap();
    assert!(
        is_programs(&error, |error| matches!(error, ProgramsError::NotBpffs { .. })),
        "{error:?}"
    );
    assert!(!tc(&["qdisc", "show"]).contains("htb"), "{}", tc(&["qdisc", "show"]));
    assert!(!tc(&["qdisc", "show"]).contains("dvpnp0up"));
    assert!(!live.reaches(peer(0)), "the interface is down");
}

#[test]
fn without_the_right_to_load_programs_there_is_no_shaper() {
    let live = Live::new();
    let output = Command::new("setpriv")
        .args(["--bounding-set", "-bpf,-sys_admin"])
        .arg(holder())
        .args([TUNNEL, live.bed.pin_dir().to_str().unwrap(), "shape"])
        .args([peer(0).to_string(), mbit(1).bits_per_second().to_string()])
        .stdin(Stdio::null())
        .output()
        .expect("setpriv(1): install util-linux");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && error.contains("CAP_BPF"), "{error}");
    assert!(!live.reaches(peer(0)), "the interface is down");
}

#[test]
fn programs_of_others_before_and_after_go_on() {
    let live = Live::new();
    let before = Counters::attach(TUNNEL, &live.bed.pin_dir().join("before")).unwrap();
    let mut shaper = live.shaped(Mode::Edt, &[grant(mbit(10), mbit(10))]);
    let after = Counters::attach(TUNNEL, &live.bed.pin_dir().join("after")).unwrap();
    let filter = Counters::attach_through(TUNNEL, &live.bed.pin_dir().join("filter"), Hook::Clsact).unwrap();
    assert!(live.reaches(peer(0)) && live.reaches_us(peer(0)));
    for (name, counters) in [("before", &before), ("after", &after), ("filter", &filter)] {
        let [up, down] = counters.read().unwrap();
        assert!(down.packets > 0, "{name} does not see the download");
        assert!(up.packets > 0, "{name} does not see the upload");
    }
    live.runtime.block_on(shaper.reconcile()).unwrap();
    assert!(live.reaches(peer(0)) && live.reaches_us(peer(0)));
    // A stranger's packet is dropped where it would have gone on to those behind.
    let seen = [before.read().unwrap()[1], after.read().unwrap()[1]];
    assert!(!live.reaches(peer(3)));
    assert!(before.read().unwrap()[1].packets > seen[0].packets);
    assert_eq!(after.read().unwrap()[1], seen[1]);
}

#[test]
fn closing_takes_everything_out() {
    let live = Live::new();
    let shaper = live.shaped(Mode::Edt, &[grant(mbit(10), mbit(10))]);
    live.runtime.block_on(shaper.close()).unwrap();
    let qdiscs = tc(&["qdisc", "show"]);
    assert!(!qdiscs.contains("htb") && !qdiscs.contains("dvpnp0up"), "{qdiscs}");
    let folder = live.bed.pin_dir().join(format!("v{}", abi::VERSION)).join(TUNNEL);
    assert!(!folder.exists());
    Live::up();
    wait(|| live.reaches(peer(0))).expect("nothing of ours is in the way any more");
}

#[test]
fn cleanup_finds_what_a_killed_daemon_left() {
    let live = Live::new();
    shape_and_die(&live, "shape");
    let report = live.runtime.block_on(live.host.cleanup(&live.bed.pin_dir()));
    let report: Vec<String> = report.into_iter().map(Result::unwrap).collect();
    for part in ["interface dvpnp0", "interface dvpnp0up", "eBPF pin"] {
        assert!(report.iter().any(|line| line.contains(part)), "{part}: {report:?}");
    }
    assert!(!tc(&["qdisc", "show"]).contains("dvpnp0up"));
}

#[test]
fn a_node_is_full_when_its_maps_are() {
    let live = Live::new();
    let mut shaper = live.open(Mode::Police);
    let address = |number: u32| IpAddr::from((0x0a0a_0000_u32 + number).to_be_bytes());
    live.runtime.block_on(async {
        for number in 0..abi::MAX_PEERS {
            let granted = shaper.grant(&[address(number)], grant(mbit(1), mbit(1))).await;
            granted.unwrap();
        }
        let full = shaper.grant(&[peer(0)], grant(mbit(1), mbit(1))).await.unwrap_err();
        assert!(
            is_programs(&full, |error| matches!(error, ProgramsError::Full { .. })),
            "{full:?}"
        );
    });
    Live::up();
    assert!(!live.reaches(peer(0)), "who does not fit gets nothing");
}
