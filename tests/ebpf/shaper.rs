//! Grants as they are enforced on this kernel: on a tunnel, with classes and without.

use std::{
    collections::BTreeSet,
    io::{BufRead as _, BufReader},
    net::IpAddr,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use dvpn_common::{
    abi::{self, Counter},
    grant::Meter,
    rate::Rate,
};
use dvpn_daemon::{
    ebpf::{Hook, Loader},
    host::{self, Grant, Mode, Shaper, ShaperConfig},
};

use crate::{
    bed::{self, Bed, INTERFACE, wait},
    live::{Carried, Live, MTU, TUNNEL, grant, holder, ip, mbit, peer, tc},
};

pub(crate) const LONG: Duration = Duration::from_secs(2);

/// A correctness tolerance, not a claim: no more than the grant and what a queue holds, and most of it.
pub(crate) fn assert_about(carried: Carried, rate: Rate, what: &str) {
    assert_no_more(carried, rate, what);
    assert!(
        carried.time + Duration::from_millis(200) > LONG,
        "{what} stopped: {carried:?}"
    );
    assert!(
        carried.of(rate) > 0.8,
        "{what}: {carried:?} is {:.3} of {rate}",
        carried.of(rate)
    );
}

pub(crate) fn assert_no_more(carried: Carried, rate: Rate, what: &str) {
    let slack = Duration::from_millis(50);
    let possible = Carried {
        time: carried.time + slack,
        ..carried
    };
    assert!(
        possible.of(rate) <= 1.0,
        "{what}: {carried:?} is {:.3} of {rate}",
        carried.of(rate)
    );
}

pub(crate) fn both_ways(live: &Live, shaper: &Shaper, address: IpAddr, [down, up]: [Rate; 2]) {
    let carried = live.download(address, LONG);
    assert_about(carried, down, "download");
    let carried = live.upload(address, LONG);
    assert_about(carried, up, "upload");
    let [down, up] = *shaper.counters().unwrap().values().next().unwrap();
    assert!(down.bytes > 50_000 && up.bytes > 50_000, "{down:?} {up:?}");
}

#[test]
fn a_tunnel_with_super_packets_carries_its_grants_both_ways() {
    let live = Live::new();
    let rates = [mbit(20), mbit(8)];
    let shaper = live.shaped(Mode::Edt, &[grant(rates[0], rates[1])]);
    if shaper.modes().down == Mode::Htb {
        assert!(
            shaper
                .modes()
                .to_string()
                .starts_with("htb (this kernel has no qdisc fq"),
            "{}",
            shaper.modes()
        );
    }
    both_ways(&live, &shaper, peer(0), rates);
}

#[test]
fn a_tunnel_without_super_packets_carries_its_grants_both_ways_on_clsact_and_ipv6() {
    let live = Live::with_offload(false);
    let config = ShaperConfig {
        hook: Some(Hook::Clsact),
        ..Live::config(Mode::Htb)
    };
    let mut shaper = live.open_with(config).unwrap();
    assert_eq!(
        (shaper.hook(), shaper.modes().down, shaper.modes().up),
        (Hook::Clsact, Mode::Htb, Mode::Htb)
    );
    let (six, rates) = ("fd00:9::2".parse().unwrap(), [mbit(10), mbit(20)]);
    live.runtime
        .block_on(shaper.grant(&[peer(0), six], grant(rates[0], rates[1])))
        .unwrap();
    Live::up();
    live.add_ipv6();
    both_ways(&live, &shaper, six, rates);
    assert!(
        live.reaches(peer(0)) && live.reaches_us(peer(0)),
        "the same peer by IPv4"
    );
}

#[test]
fn a_policed_tunnel_never_carries_more() {
    let live = Live::new();
    let shaper = live.shaped(Mode::Police, &[grant(mbit(20), mbit(20))]);
    assert_eq!((shaper.modes().down, shaper.modes().up), (Mode::Police, Mode::Police));
    for (what, carried) in [
        ("download", live.download(peer(0), LONG)),
        ("upload", live.upload(peer(0), LONG)),
    ] {
        assert_no_more(carried, mbit(20), what);
        assert!(carried.bytes > 20_000, "{what}: {carried:?}");
    }
}

#[test]
fn each_peer_has_its_own_grant_at_the_same_time_and_a_stranger_has_none() {
    let live = Live::new();
    let shaper = live.shaped(Mode::Edt, &[grant(mbit(5), mbit(5)), grant(mbit(10), mbit(10))]);
    thread::scope(|scope| {
        let downloads = [0, 1].map(|number| {
            let live = &live;
            scope.spawn(move || live.download(peer(number), LONG))
        });
        assert!(!live.reaches(peer(2)) && !live.reaches_us(peer(2)));
        for (download, rate) in downloads.into_iter().zip([mbit(5), mbit(10)]) {
            assert_about(download.join().unwrap(), rate, "download");
        }
    });
    assert!(
        shaper.refused().unwrap()["unknown"].packets >= 2,
        "{:?}",
        shaper.refused()
    );
}

#[test]
fn a_flood_of_small_packets_gets_no_more_than_the_grant() {
    let live = Live::new();
    let rate = mbit(2);
    let _shaper = live.shaped(Mode::Edt, &[grant(rate, rate)]);
    let (bytes, time) = live.flood(peer(0), 100, LONG);
    // 28 bytes of headers each; two horizons may be booked ahead.
    let booked = Duration::from_nanos(2 * Meter::paced(rate).horizon_ns);
    let (carried, possible) = (bytes * 128 / 100, time + booked + Duration::from_millis(50));
    let most = rate.bytes_per_second() * u64::try_from(possible.as_millis()).unwrap() / 1000;
    assert!(carried <= most && carried > most / 4, "{carried} of {most}");
}

#[test]
fn a_grant_that_changes_under_load_is_followed() {
    let live = Live::new();
    let mut shaper = live.shaped(Mode::Edt, &[grant(mbit(4), mbit(4))]);
    let number = *shaper.counters().unwrap().keys().next().unwrap();
    thread::scope(|scope| {
        let download = scope.spawn(|| live.download(peer(0), Duration::from_secs(3)));
        // Up and down all the time, and up in the end.
        let begin = Instant::now();
        let mut last = [0; 2];
        while begin.elapsed() < Duration::from_secs(3) {
            let rate = if begin.elapsed() > Duration::from_secs(1) {
                20
            } else {
                6
            };
            live.runtime
                .block_on(shaper.resize(&[(number, mbit(rate), mbit(rate))]))
                .unwrap();
            let now = shaper.counters().unwrap()[&number].map(|traffic| traffic.bytes);
            assert!(now[0] >= last[0] && now[1] >= last[1], "totals run backwards");
            last = now;
            thread::sleep(Duration::from_millis(30));
        }
        let carried = download.join().unwrap();
        // A second of 6 and two of 20 Mbit/s.
        assert_about(
            carried,
            Rate::from_bits_per_second(mbit(46).bits_per_second() / 3),
            "download",
        );
    });
}

#[test]
fn together_peers_get_no_more_than_the_node_allows_and_each_its_share() {
    let live = Live::new();
    let mut shaper = live.shaped(Mode::Edt, &[grant(mbit(10), mbit(10)), grant(mbit(10), mbit(10))]);
    live.runtime
        .block_on(shaper.set_node(Some(mbit(10)), Some(mbit(10))))
        .unwrap();
    let carried = thread::scope(|scope| {
        let live = &live;
        [0, 1]
            .map(|number| scope.spawn(move || live.download(peer(number), LONG)))
            .map(|download| download.join().unwrap())
    });
    let together = Carried {
        bytes: carried[0].bytes + carried[1].bytes,
        time: carried[0].time.max(carried[1].time),
    };
    assert_about(together, mbit(10), "together");
    for each in carried {
        assert!(each.of(mbit(10)) > 0.35, "{carried:?}");
    }
}

#[test]
fn who_is_revoked_gets_nothing_and_who_comes_after_begins_at_zero() {
    let live = Live::new();
    let mut shaper = live.shaped(Mode::Edt, &[grant(mbit(10), mbit(10))]);
    assert!(live.reaches(peer(0)) && live.reaches_us(peer(0)));
    let number = *shaper.counters().unwrap().keys().next().unwrap();
    live.runtime.block_on(shaper.revoke(number)).unwrap();
    assert!(!live.reaches(peer(0)) && !live.reaches_us(peer(0)));
    let next = live
        .runtime
        .block_on(shaper.grant(&[peer(1)], grant(mbit(10), mbit(10))))
        .unwrap();
    assert_eq!(next, number, "the number is used again");
    assert_eq!(shaper.counters().unwrap()[&next].map(|traffic| traffic.bytes), [0, 0]);
    // An address that moves is its new peer's, and who has none left is gone.
    let both = live
        .runtime
        .block_on(shaper.grant(&[peer(1), peer(2)], grant(mbit(10), mbit(10))))
        .unwrap();
    assert_eq!(shaper.peers().into_keys().collect::<Vec<_>>(), [both]);
    assert!(live.reaches(peer(1)) && live.reaches(peer(2)));
}

#[test]
fn a_lease_ends_by_itself() {
    let live = Live::new();
    let until = Instant::now() + Duration::from_secs(2);
    let short = Grant {
        until,
        ..grant(mbit(10), mbit(10))
    };
    let shaper = live.shaped(Mode::Edt, &[short]);
    if Instant::now() + Duration::from_secs(1) < until {
        assert!(live.reaches(peer(0)));
    }
    thread::sleep(until.saturating_duration_since(Instant::now()));
    assert!(!live.reaches(peer(0)) && !live.reaches_us(peer(0)));
    assert!(shaper.refused().unwrap()["lease"].packets >= 2);
}

/// Another process grants the first peer 10 Mbit/s, and is killed.
pub(crate) fn shape_and_die(live: &Live, hook: &str) {
    let mut holder: Child = Command::new(holder())
        .args([TUNNEL, live.bed.pin_dir().to_str().unwrap(), hook, &peer(0).to_string()])
        .arg(mbit(10).bits_per_second().to_string())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut word = String::new();
    BufReader::new(holder.stdout.as_mut().unwrap())
        .read_line(&mut word)
        .unwrap();
    assert_eq!(word, "shaped\n");
    holder.kill().unwrap();
    holder.wait().unwrap();
}

fn outlives_its_daemon(hook: Hook, name: &str) {
    let live = Live::new();
    shape_and_die(&live, name);
    Live::up();
    assert_about(live.download(peer(0), LONG), mbit(10), "without a daemon");
    assert!(!live.reaches(peer(1)) && !live.reaches_us(peer(1)), "a stranger");

    let config = ShaperConfig {
        hook: Some(hook),
        ..Live::config(Mode::Edt)
    };
    // While it carries: the programs are swapped, the interface stays up, and nobody else gets in between.
    let mut shaper = thread::scope(|scope| {
        let download = scope.spawn(|| live.download(peer(0), LONG));
        thread::sleep(Duration::from_millis(300));
        let shaper = live.open_with(config).unwrap();
        assert_about(download.join().unwrap(), mbit(10), "while taken over");
        shaper
    });
    assert_ne!(shaper.modes().down, Mode::Police, "what is there is kept");
    let (number, addresses) = shaper.peers().into_iter().next().unwrap();
    assert_eq!(addresses, BTreeSet::from([peer(0)]));
    let [down, _] = shaper.counters().unwrap()[&number];
    assert!(
        down.bytes > mbit(10).bytes_per_second() * 3,
        "{down:?} goes on from before"
    );
    let again = live
        .runtime
        .block_on(shaper.grant(&[peer(0)], grant(mbit(10), mbit(10))))
        .unwrap();
    assert_eq!(again, number);
    assert!(shaper.counters().unwrap()[&number][0].bytes >= down.bytes);
    live.runtime.block_on(shaper.retain(&BTreeSet::new())).unwrap();
    assert!(!live.reaches(peer(0)));
}

#[test]
fn grants_outlive_a_killed_daemon_and_are_taken_over_on_tcx() {
    outlives_its_daemon(Hook::Tcx, "shape-tcx");
}

#[test]
fn grants_outlive_a_killed_daemon_and_are_taken_over_on_clsact() {
    outlives_its_daemon(Hook::Clsact, "shape-clsact");
}

#[test]
fn thousands_are_granted_at_once() {
    let live = Live::new();
    let mut shaper = live.open(Mode::Edt);
    let address = |number: u32| IpAddr::from((0x0a0a_0000_u32 + number).to_be_bytes());
    let all: Vec<_> = (0..abi::MAX_PEERS)
        .map(|number| (vec![address(number)], grant(mbit(1), mbit(1))))
        .collect();
    let begin = Instant::now();
    let numbers = live.runtime.block_on(shaper.grant_all(&all)).unwrap();
    println!(
        "{} granted in {:?} by {}",
        numbers.len(),
        begin.elapsed(),
        shaper.modes()
    );
    assert_eq!(BTreeSet::from_iter(numbers).len(), all.len(), "each its own number");
    while !shaper.is_settled() {
        live.runtime.block_on(shaper.settle()).unwrap();
    }
    println!("settled after {:?}", begin.elapsed());
    if shaper.modes().down == Mode::Htb {
        let classes = tc(&["class", "show", "dev", TUNNEL]);
        let of_peers = classes
            .lines()
            .filter(|line| line.starts_with("class htb d01:"))
            .count();
        assert_eq!(
            of_peers,
            all.len() + 2,
            "each its class, one for all and the closed one"
        );
    }
    let begin = Instant::now();
    let rates: Vec<_> = shaper
        .peers()
        .into_keys()
        .map(|number| (number, mbit(2), mbit(2)))
        .collect();
    live.runtime.block_on(shaper.resize(&rates)).unwrap();
    println!("resized in {:?}", begin.elapsed());
}

#[test]
fn the_longest_buffer_of_a_local_sender_fits_its_grant() {
    let live = Live::new();
    let mut shaper = live.shaped(Mode::Edt, &[grant(mbit(20), mbit(1))]);
    let shown = || {
        let output = Command::new("ip")
            .args(["-d", "link", "show", TUNNEL])
            .output()
            .unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    // 5 ms at 20 Mbit/s are 12500 bytes.
    assert!(shown().contains("gso_max_size 8192"), "{}", shown());
    let number = *shaper.counters().unwrap().keys().next().unwrap();
    live.runtime
        .block_on(shaper.resize(&[(number, mbit(1000), mbit(1))]))
        .unwrap();
    assert!(shown().contains("gso_max_size 65536"), "{}", shown());
    assert_eq!(u32::from(MTU), 1420);
}

#[test]
fn super_packets_and_truncated_headers_of_a_tunnel_are_counted_as_what_they_are() {
    for best in [Mode::Edt, Mode::Police] {
        let bed = Bed::new();
        let tun = bed::tun();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let host = runtime.block_on(async { host::Host::open() }).unwrap();
        let config = ShaperConfig {
            best,
            ..ShaperConfig::new(INTERFACE, MTU)
        };
        let opened = runtime.block_on(Shaper::open(&host, &Loader::new(bed.pin_dir()), config));
        let mut shaper = opened.unwrap();
        let granted = runtime.block_on(shaper.grant(&[peer(0)], grant(mbit(100), mbit(100))));
        let number = granted.unwrap();
        ip(&["link", "set", INTERFACE, "up"]);

        let seen = |direction: u32| {
            let traffic = shaper.counters().unwrap()[&number][direction as usize];
            (traffic.packets, traffic.bytes)
        };
        let counted = |direction, expected: Counter| {
            let expected = (expected.packets, expected.bytes);
            assert!(expected.1 > 63_000);
            wait(|| seen(direction) == expected)
                .unwrap_or_else(|()| panic!("{:?}, expected {expected:?}", seen(direction)));
        };
        counted(abi::DOWN, bed::send_super_packet(45, 1392));
        // The answers to this one go down again.
        counted(abi::UP, bed::inject_super_packet(&tun, 46, 1380));

        bed::inject_raw(&tun, &[&[0x45][..], &[0; 18]].concat());
        bed::inject_raw(&tun, &[&[0x60][..], &[0; 38]].concat());
        let malformed = || shaper.refused().unwrap()["malformed"];
        wait(|| malformed().packets == 2).unwrap_or_else(|()| panic!("{:?}", malformed()));
        assert_eq!(malformed().bytes, 19 + 39);
        // The bed goes before its interface does.
        drop((shaper, tun));
    }
}
