//! Debian's resolvconf and openresolv: the same command, and quite different in what they do.

use std::{fs, path::Path, time::Instant};

use super::machine::{Machine, RESOLV_CONF};

fn read() -> String {
    fs::read_to_string(RESOLV_CONF).unwrap()
}

fn add(machine: &Machine, interface: &str, text: &str) {
    machine.here.sh(&format!(
        "printf '{text}' | PATH=/sbin:/usr/sbin:/bin:/usr/bin resolvconf -a {interface}"
    ));
}

fn update(machine: &Machine) {
    machine.here.sh("PATH=/sbin:/usr/sbin:/bin:/usr/bin resolvconf -u");
}

#[test]
fn debians_resolvconf_goes_on_beside_ours_and_has_the_last_word_afterwards() {
    const LINK: &str = "../run/resolvconf/resolv.conf";
    let machine = Machine::new(Some("resolvconf"));
    machine.here.sh(&format!(
        "PATH=/sbin:/usr/sbin:/bin:/usr/bin; mkdir -p /run/resolvconf/interface; resolvconf --enable-updates; \
         ln -s {LINK} /etc/resolv.conf"
    ));
    add(&machine, "eth0.inet", "nameserver 192.0.2.53\\nsearch example\\n");
    machine.assert_network();
    let before = read();
    let holder = machine.hold();
    assert_eq!(holder.ways(), "resolvconf");
    machine.assert_tunnel();
    assert_eq!(machine.network_servers(), "192.0.2.53:53");

    update(&machine);
    machine.assert_tunnel();
    add(&machine, "eth1.inet", "nameserver 192.0.2.54\\n");
    machine.assert_tunnel();
    assert_eq!(machine.network_servers(), "192.0.2.53:53 192.0.2.54:53");
    holder.process.kill();
    // Also with nobody to guard it.
    add(&machine, "eth1.inet", "nameserver 192.0.2.55\\n");
    machine.assert_tunnel();

    machine.cleanup();
    assert_eq!(fs::read_link(RESOLV_CONF).unwrap(), Path::new(LINK));
    assert!(read().contains("192.0.2.55"), "what came meanwhile: {}", read());
    machine.assert_network();
    machine
        .here
        .sh("PATH=/sbin:/usr/sbin:/bin:/usr/bin resolvconf -d eth1.inet");
    assert_eq!(read(), before);
}

#[test]
fn openresolv_is_guarded_and_goes_on_afterwards() {
    let machine = Machine::new(Some("openresolv"));
    // What the owner had before openresolv, which keeps it.
    fs::write(RESOLV_CONF, "# the owner's\nnameserver 192.0.2.53\n").unwrap();
    add(&machine, "eth0", "nameserver 192.0.2.53\\nsearch example\\n");
    machine.assert_network();
    let before = read();
    let kept = fs::read_to_string("/etc/resolv.conf.bak").unwrap();
    assert!(kept.contains("the owner's"));
    let holder = machine.hold();
    assert_eq!(holder.ways(), "openresolv");
    machine.assert_tunnel();
    assert_eq!(machine.network_servers(), "192.0.2.53:53");

    update(&machine);
    machine.assert_tunnel_again(Instant::now());
    machine.assert_tunnel();
    add(&machine, "wlan0", "nameserver 192.0.2.54\\n");
    machine.assert_tunnel_again(Instant::now());
    machine.assert_tunnel();
    assert_eq!(machine.network_servers(), "192.0.2.53:53 192.0.2.54:53");
    assert_eq!(
        fs::read_to_string("/etc/resolv.conf.bak").unwrap(),
        kept,
        "ours is never what it keeps"
    );

    holder.process.kill();
    machine.cleanup();
    let after = read();
    assert!(after.contains("192.0.2.54"), "what came meanwhile: {after}");
    update(&machine);
    assert_eq!(read(), after, "it finds its own file");
    machine
        .here
        .sh("PATH=/sbin:/usr/sbin:/bin:/usr/bin resolvconf -d wlan0");
    assert_eq!(read(), before);
    machine.assert_network();
}
