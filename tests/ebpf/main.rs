//! The counting programs in this kernel: loaded, attached, pinned, read, left alone and adopted.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "this whole crate is a test"
)]

mod bed;
mod faults;
mod live;
mod rows;
mod shaper;

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use bed::{Bed, INTERFACE, attach, inject, inject_frame, inject_super_packet, pins, send, send_super_packet, wait_for};
use dvpn_common::abi::Counter;
use dvpn_daemon::ebpf::{Counters, Error, Hook, detach_all};

const NOTHING: Counter = Counter { packets: 0, bytes: 0 };

fn counter(packets: u64, bytes: u64) -> Counter {
    Counter { packets, bytes }
}

/// Another process attaches the programs and is killed.
fn attach_and_die(pin_dir: &Path, hook: &str) {
    let mut loader: Child = Command::new(live::holder())
        .arg(INTERFACE)
        .arg(pin_dir)
        .arg(hook)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(loader.stdout.as_mut().unwrap())
        .read_line(&mut line)
        .unwrap();
    assert_eq!(line, "attached\n");
    loader.kill().unwrap();
    loader.wait().unwrap();
}

fn counts_both_directions(hook: Hook) {
    let bed = Bed::new();
    let tun = bed::tun();
    let counters = Counters::attach_through(INTERFACE, &bed.pin_dir(), hook).unwrap();
    assert_eq!(counters.read().unwrap(), [NOTHING, NOTHING]);
    let incoming = inject(&tun, 100) + inject(&tun, 1200);
    let outgoing = send(300);
    wait_for(&counters, [counter(2, incoming), counter(1, outgoing)]);
}

#[test]
fn packets_and_bytes_of_both_directions_are_counted_on_tcx() {
    counts_both_directions(Hook::Tcx);
}

#[test]
fn packets_and_bytes_of_both_directions_are_counted_on_clsact() {
    counts_both_directions(Hook::Clsact);
}

#[test]
fn a_kernel_with_tcx_is_used_through_tcx() {
    let bed = Bed::new();
    let _tun = bed::tun();
    let counters = attach(&bed).unwrap();
    assert_eq!(counters.hook(), Hook::Tcx);
    let [map, egress, ingress] = &pins(&bed.pin_dir())[..] else {
        panic!("three pins")
    };
    assert_eq!(map, "COUNTERS");
    assert!(
        egress.starts_with("egress-") && ingress.starts_with("ingress-"),
        "{egress} {ingress}"
    );
}

#[test]
fn a_super_packet_counts_its_segments_and_their_headers() {
    let bed = Bed::new();
    let tun = bed::tun();
    let counters = attach(&bed).unwrap();
    let incoming = inject_super_packet(&tun, 6, 1000);
    let outgoing = send_super_packet(5, 900);
    assert_eq!(incoming, counter(6, 6 * 1040));
    wait_for(&counters, [incoming, outgoing]);
}

#[test]
fn ethernet_headers_are_not_counted() {
    let bed = Bed::new();
    let tap = bed::tap();
    let counters = attach(&bed).unwrap();
    let incoming = inject_frame(&tap, 100);
    bed::wait(|| counters.read().unwrap()[0] == counter(1, incoming))
        .unwrap_or_else(|()| panic!("counted {:?}, expected {incoming} bytes", counters.read().unwrap()[0]));
}

fn survives_its_loader(hook: Hook, name: &str) {
    let bed = Bed::new();
    let tun = bed::tun();
    attach_and_die(&bed.pin_dir(), name);
    let first = inject(&tun, 100);
    let counters = Counters::attach_through(INTERFACE, &bed.pin_dir(), hook).unwrap();
    wait_for(&counters, [counter(1, first), NOTHING]);
    // Once more, and not twice: the program was replaced and not added to.
    let second = inject(&tun, 200);
    wait_for(&counters, [counter(2, first + second), NOTHING]);
}

#[test]
fn counting_survives_the_death_of_the_loader_and_is_adopted_on_tcx() {
    survives_its_loader(Hook::Tcx, "tcx");
}

#[test]
fn counting_survives_the_death_of_the_loader_and_is_adopted_on_clsact() {
    survives_its_loader(Hook::Clsact, "clsact");
}

#[test]
fn a_change_of_hook_counts_no_packet_twice() {
    let bed = Bed::new();
    let tun = bed::tun();
    attach_and_die(&bed.pin_dir(), "clsact");
    let counters = Counters::attach_through(INTERFACE, &bed.pin_dir(), Hook::Tcx).unwrap();
    let first = inject(&tun, 100);
    wait_for(&counters, [counter(1, first), NOTHING]);
    drop(counters);
    let counters = Counters::attach_through(INTERFACE, &bed.pin_dir(), Hook::Clsact).unwrap();
    assert_eq!(pins(&bed.pin_dir()), ["COUNTERS"]);
    // The kernel lets go of an unpinned link by a work queue: until then both count.
    let before = counters.read().unwrap()[0].packets;
    let mut last = before;
    bed::wait(|| {
        inject(&tun, 100);
        let seen = counters.read().unwrap()[0].packets;
        let step = seen - last;
        last = seen;
        step == 1
    })
    .expect("one program counts");
}

#[test]
fn totals_go_on_when_the_interface_is_made_anew() {
    let bed = Bed::new();
    let tun = bed::tun();
    let counters = attach(&bed).unwrap();
    let first = inject(&tun, 100);
    wait_for(&counters, [counter(1, first), NOTHING]);
    drop((counters, tun));

    let tun = bed::tun();
    let counters = attach(&bed).unwrap();
    assert_eq!(pins(&bed.pin_dir()).len(), 3, "the pins of the old interface are gone");
    let second = inject(&tun, 200);
    wait_for(&counters, [counter(2, first + second), NOTHING]);
}

#[test]
fn programs_of_others_on_the_interface_still_run() {
    let bed = Bed::new();
    let tun = bed::tun();
    let ours = attach(&bed).unwrap();
    let others = Counters::attach(INTERFACE, &bed.pin_dir().join("others")).unwrap();
    let filter = Counters::attach_through(INTERFACE, &bed.pin_dir().join("filter"), Hook::Clsact).unwrap();
    let incoming = inject(&tun, 100);
    for counters in [&ours, &others, &filter] {
        wait_for(counters, [counter(1, incoming), NOTHING]);
    }
}

fn detaches(hook: Hook, name: &str) {
    let bed = Bed::new();
    let tun = bed::tun();
    attach_and_die(&bed.pin_dir(), name);
    let counters = Counters::attach_through(INTERFACE, &bed.pin_dir(), hook).unwrap();
    detach_all(&bed.pin_dir()).unwrap();
    assert!(!bed.pin_dir().exists());
    // The map lives as long as this test holds it, so it shows whether a program still writes to it.
    let mut last = counters.read().unwrap();
    bed::wait(|| {
        inject(&tun, 100);
        std::mem::replace(&mut last, counters.read().unwrap()) == last
    })
    .expect("nothing counts any more");
    detach_all(&bed.pin_dir()).expect("nothing to detach is no failure");
}

#[test]
fn detach_all_leaves_neither_pin_nor_program_on_tcx() {
    detaches(Hook::Tcx, "tcx");
}

#[test]
fn detach_all_leaves_neither_pin_nor_program_on_clsact() {
    detaches(Hook::Clsact, "clsact");
}

#[test]
fn a_folder_that_is_not_on_a_bpffs_is_refused() {
    let _bed = Bed::new();
    let _tun = bed::tun();
    let plain = tempfile::tempdir().unwrap();
    let error = Counters::attach(INTERFACE, &plain.path().join("dvpn")).err().unwrap();
    assert!(
        matches!(&error, Error::NotBpffs { path } if path == plain.path()),
        "{error:?}"
    );
    assert!(!plain.path().join("dvpn").exists());
}

#[test]
fn an_interface_that_is_not_there_is_an_error_and_pins_nothing() {
    let bed = Bed::new();
    let error = Counters::attach("dvpn7", &bed.pin_dir()).err().unwrap();
    assert!(
        matches!(&error, Error::Interface { interface, .. } if interface == "dvpn7"),
        "{error:?}"
    );
    assert!(!bed.pin_dir().exists());
}

#[test]
fn a_name_that_leaves_the_pin_folder_is_refused() {
    let bed = Bed::new();
    for name in ["", "../lo", "eth0.5", "a-name-that-is-too-long"] {
        let error = Counters::attach(name, &bed.pin_dir()).err().unwrap();
        assert!(matches!(error, Error::InterfaceName { .. }), "{name}: {error:?}");
    }
}

#[test]
fn a_pinned_map_of_another_layout_is_refused() {
    let bed = Bed::new();
    let _tun = bed::tun();
    drop(attach(&bed).unwrap());
    let folder = bed
        .pin_dir()
        .join(format!("v{}", dvpn_common::abi::VERSION))
        .join(INTERFACE);
    let link = std::fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| path.file_name().unwrap().to_str().unwrap().starts_with("ingress-"));
    std::fs::remove_file(folder.join("COUNTERS")).unwrap();
    // A link where the map should be is as foreign as any other object.
    std::fs::rename(link.unwrap(), folder.join("COUNTERS")).unwrap();
    let error = attach(&bed).err().unwrap();
    assert!(matches!(error, Error::ForeignMap { .. }), "{error:?}");
}
