//! A resolv.conf that somebody else wrote.
#![no_main]

use std::{net::IpAddr, path::Path};

use dvpn_core::dns::{Facts, Manager, Way, is_marked, parse, render, ways};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let text = String::from_utf8_lossy(data);
    let servers: [IpAddr; 2] = ["10.96.0.1".parse().expect("an address"), "fd00:96::1".parse().expect("an address")];
    let before = parse(&text);
    for way in [Way::File, Way::Openresolv] {
        let ours = render(&servers, &text, way);
        assert!(is_marked(&ours));
        // Whatever was in the file before, ours names the tunnel's servers and no others.
        let after = parse(&ours);
        assert!(after.servers.iter().map(|server| server.address).eq(servers));
        assert!(after.servers.iter().all(|server| server.zone.is_none()));
        let kept = before.options.iter().filter(|option| *option != "trust-ad");
        assert!(after.options.iter().eq(kept));
        assert_eq!(render(&servers, &ours, way), ours);
    }
    for target in [None, Some(Path::new("/run/NetworkManager/resolv.conf")), Some(Path::new("/run/resolvconf/resolv.conf"))] {
        for (resolved, mode) in [(false, "default"), (true, "none")] {
            let network_manager = Some(Manager { mode, rc_manager: "symlink" });
            let ways = ways(&Facts { target, text: &text, resolved, network_manager });
            assert!(matches!(ways[..], [_] | [Way::Resolved, _]) && (!resolved || ways[0] == Way::Resolved));
        }
    }
});
