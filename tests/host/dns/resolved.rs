//! systemd-resolved.

use std::{fs, os::unix::fs::symlink, path::Path, time::Instant};

use super::machine::{INTERFACE, Machine, RESOLV_CONF, Running};

const STUB: &str = "../run/systemd/resolve/stub-resolv.conf";

fn start(machine: &Machine) -> Running {
    machine.service("/lib/systemd/systemd-resolved", &[], "org.freedesktop.resolve1")
}

/// A machine whose network's name server systemd-resolved knows, and whose programs ask it.
fn machine() -> (Machine, [Running; 2]) {
    let machine = Machine::new(Some("system"));
    fs::write(
        "/etc/systemd/resolved.conf",
        "[Resolve]\nFallbackDNS=\nLLMNR=no\nMulticastDNS=no\nDNSSEC=no\nCache=no-negative\n",
    )
    .unwrap();
    symlink(STUB, RESOLV_CONF).unwrap();
    let bus = machine.bus();
    let resolved = start(&machine);
    machine.until("eth0 in systemd-resolved", || {
        machine.run(&["resolvectl", "dns"]).contains("eth0")
    });
    machine.run(&["resolvectl", "dns", "eth0", "192.0.2.53"]);
    (machine, [bus, resolved])
}

/// Everything that it knows of every link.
fn knows(machine: &Machine) -> String {
    let parts = ["dns", "domain", "default-route"];
    parts.map(|part| machine.run(&["resolvectl", part])).join("")
}

#[test]
fn systemd_resolved_asks_the_tunnel_also_after_it_was_restarted_and_not_after_a_kill_of_ours() {
    let (machine, [_bus, resolved]) = machine();
    machine.assert_network();
    let before = knows(&machine);
    let holder = machine.hold();
    assert_eq!(holder.ways(), "systemd-resolved");
    machine.assert_tunnel();
    assert_eq!(machine.network_servers(), "192.0.2.53:53");

    // Somebody takes it away.
    machine.run(&["resolvectl", "revert", INTERFACE]);
    machine.assert_tunnel_again(Instant::now());
    machine.assert_tunnel();

    // A restart that forgets all.
    resolved.kill();
    fs::remove_dir_all("/run/systemd/resolve/netif").unwrap();
    let _resolved = start(&machine);
    machine.assert_tunnel_again(Instant::now());
    machine.run(&["resolvectl", "dns", "eth0", "192.0.2.53"]);
    machine.assert_tunnel();

    holder.process.kill();
    machine.assert_tunnel();
    let said = machine.cleanup();
    assert!(said.contains("from systemd-resolved"), "{said}");
    assert_eq!(knows(&machine), before);
    assert_eq!(fs::read_link(RESOLV_CONF).unwrap(), Path::new(STUB));
    machine.assert_network();
}

#[test]
fn while_systemd_resolved_is_down_a_file_takes_its_place() {
    let (machine, [_bus, resolved]) = machine();
    resolved.kill();
    let holder = machine.hold();
    assert_eq!(holder.ways(), "resolv.conf");
    machine.assert_tunnel();
    let _resolved = start(&machine);
    machine.until("its return", || {
        holder.latest().is_some_and(|ways| ways == "systemd-resolved")
    });
    machine.assert_tunnel();
    assert_eq!(fs::read_link(RESOLV_CONF).unwrap(), Path::new(STUB));
    holder.process.kill();
    machine.cleanup();
    machine.assert_network();
}

#[test]
fn beside_systemd_resolved_a_resolv_conf_that_passes_it_by_is_replaced_too() {
    const LINK: &str = "/run/systemd/resolve/resolv.conf";
    let (machine, _services) = machine();
    fs::remove_file(RESOLV_CONF).unwrap();
    symlink(LINK, RESOLV_CONF).unwrap();
    machine.assert_network();
    let before = knows(&machine);
    // The tunnel's link may be gone when all is undone, as that of a program that was killed.
    for link_goes in [false, true] {
        let holder = machine.hold();
        assert_eq!(holder.ways(), "systemd-resolved resolv.conf");
        machine.assert_tunnel();
        // Over the bus too, as nss-resolve asks.
        let network = machine.network.asked();
        let name = format!("bus-{link_goes}.example");
        assert!(machine.run(&["resolvectl", "query", &name]).contains("203.0.113.1"));
        assert_eq!(machine.network.asked(), network);
        assert_eq!(machine.network_servers(), "192.0.2.53:53");
        holder.process.kill();
        if link_goes {
            machine.here.sh(&format!("ip link del {INTERFACE}"));
        }
        machine.cleanup();
        assert_eq!(fs::read_link(RESOLV_CONF).unwrap(), Path::new(LINK));
        machine.assert_network();
        let after = knows(&machine);
        let others = |text: &str| -> Vec<String> {
            text.lines()
                .filter(|line| !link_goes || !line.contains(INTERFACE))
                .map(str::to_owned)
                .collect()
        };
        assert_eq!(others(&after), others(&before), "it forgot what it read in our file");
    }
}
