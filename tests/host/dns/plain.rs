//! A resolv.conf that no service manages.

use std::{
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink},
    path::Path,
    time::{Duration, Instant},
};

use nix::mount::{MsFlags, mount};

use super::machine::{Machine, RESOLV_CONF};

const BEFORE: &str = "# by hand\nnameserver 192.0.2.53\nsearch example\noptions edns0\n";

fn read() -> String {
    fs::read_to_string(RESOLV_CONF).unwrap()
}

/// As a container's engine does it.
fn mount_as_resolv_conf(outside: &Path) {
    fs::write(RESOLV_CONF, "").unwrap();
    mount(Some(outside), RESOLV_CONF, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
}

#[test]
fn a_plain_resolv_conf_is_replaced_guarded_and_put_back_after_a_kill() {
    let machine = Machine::new(None);
    fs::write(RESOLV_CONF, BEFORE).unwrap();
    fs::set_permissions(RESOLV_CONF, fs::Permissions::from_mode(0o664)).unwrap();
    machine.assert_network();
    let holder = machine.hold();
    assert_eq!(holder.ways(), "resolv.conf");
    machine.assert_tunnel();
    assert_eq!(machine.network_servers(), "192.0.2.53:53");

    // As a DHCP client does it.
    machine
        .here
        .sh("echo nameserver 192.0.2.53 > /etc/resolv.conf.new; mv /etc/resolv.conf.new /etc/resolv.conf");
    machine.assert_tunnel_again(Instant::now());
    machine.assert_tunnel();
    // And as an editor does that writes what is there.
    fs::write(RESOLV_CONF, BEFORE).unwrap();
    machine.assert_tunnel_again(Instant::now());
    fs::remove_file(RESOLV_CONF).unwrap();
    machine.assert_tunnel_again(Instant::now());
    fs::write(RESOLV_CONF, BEFORE).unwrap();
    machine.assert_tunnel_again(Instant::now());

    holder.process.kill();
    machine.assert_tunnel();
    let said = machine.cleanup();
    assert!(
        said.contains("removed the tunnel's name servers from /etc/resolv.conf"),
        "{said}"
    );
    assert_eq!(read(), BEFORE);
    machine.assert_network();
    assert!(
        !machine.cleanup().contains("resolv.conf"),
        "a second cleanup finds nothing"
    );
}

#[test]
fn what_somebody_wrote_after_the_kill_stays() {
    let machine = Machine::new(None);
    fs::write(RESOLV_CONF, BEFORE).unwrap();
    let holder = machine.hold();
    assert_eq!(holder.ways(), "resolv.conf");
    holder.process.kill();
    fs::write(RESOLV_CONF, "nameserver 192.0.2.53\n# newer\n").unwrap();
    assert!(machine.cleanup().contains("stays as it is"));
    assert_eq!(read(), "nameserver 192.0.2.53\n# newer\n");
}

#[test]
fn a_daemon_that_was_killed_is_followed_by_one_that_still_knows_what_was_there() {
    let machine = Machine::new(None);
    fs::write(RESOLV_CONF, BEFORE).unwrap();
    for _ in 0..3 {
        let holder = machine.hold();
        assert_eq!(holder.ways(), "resolv.conf");
        machine.assert_tunnel();
        holder.process.kill();
    }
    machine.cleanup();
    assert_eq!(read(), BEFORE);
}

/// Kills at moments from before it has begun to after it is done, each time on what the last one left.
fn assert_back_after_kills(machine: &Machine) {
    for after_ms in 0..40 {
        let holder = machine.hold();
        std::thread::sleep(Duration::from_millis(after_ms));
        holder.process.kill();
        // Every other time the next one goes on from there.
        if after_ms % 2 == 1 {
            machine.cleanup();
            assert_eq!(read(), BEFORE, "killed after {after_ms} ms");
        }
    }
    // What it is put back from.
    let holder = machine.hold();
    assert_eq!(holder.ways(), "resolv.conf");
    holder.process.kill();
    assert_ne!(read(), BEFORE);
    machine.cleanup();
    assert_eq!(read(), BEFORE);
}

#[test]
fn killed_at_any_moment_it_leaves_what_can_be_put_back() {
    let machine = Machine::new(None);
    fs::write(RESOLV_CONF, BEFORE).unwrap();
    assert_back_after_kills(&machine);
    fs::remove_file(RESOLV_CONF).unwrap();
    fs::write(machine.path("outside"), BEFORE).unwrap();
    symlink(machine.path("outside"), RESOLV_CONF).unwrap();
    assert_back_after_kills(&machine);
    assert_eq!(fs::read_link(RESOLV_CONF).unwrap(), machine.path("outside"));
}

#[test]
fn killed_at_any_moment_a_mounted_one_can_be_put_back_too() {
    let machine = Machine::new(None);
    let outside = machine.path("outside");
    fs::write(&outside, BEFORE).unwrap();
    mount_as_resolv_conf(&outside);
    assert_back_after_kills(&machine);
}

#[test]
fn a_mounted_resolv_conf_is_written_in_place() {
    let machine = Machine::new(None);
    let outside = machine.path("outside");
    fs::write(&outside, BEFORE).unwrap();
    fs::set_permissions(&outside, fs::Permissions::from_mode(0o664)).unwrap();
    mount_as_resolv_conf(&outside);
    let inode = fs::metadata(RESOLV_CONF).unwrap().ino();
    machine.assert_network();
    let holder = machine.hold();
    assert_eq!(holder.ways(), "resolv.conf");
    machine.assert_tunnel();
    assert_eq!(fs::metadata(RESOLV_CONF).unwrap().ino(), inode);
    // By its other name, as the one who mounted it does.
    fs::write(&outside, BEFORE).unwrap();
    machine.assert_tunnel_again(Instant::now());
    holder.process.kill();
    machine.cleanup();
    assert_eq!(fs::read_to_string(&outside).unwrap(), BEFORE);
    assert_eq!(fs::metadata(&outside).unwrap().permissions().mode() & 0o777, 0o664);
    machine.assert_network();
}

#[test]
fn an_immutable_resolv_conf_is_an_error_that_says_what_to_do() {
    let machine = Machine::new(None);
    // Attributes are the disk's; nothing here is looked up.
    let disk = machine.path("etc");
    fs::create_dir(&disk).unwrap();
    fs::write(disk.join("resolv.conf"), BEFORE).unwrap();
    mount(Some(&disk), "/etc", None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
    machine.here.sh("chattr +i /etc/resolv.conf");
    let holder = machine.hold();
    let said = holder.ways();
    machine.here.sh("chattr -i /etc/resolv.conf");
    assert!(
        said.starts_with("error") && said.contains("chattr -i /etc/resolv.conf"),
        "{said}"
    );
    holder.process.kill();
    assert_eq!(read(), BEFORE);
    machine.cleanup();
    assert_eq!(fs::read_dir("/etc").unwrap().count(), 1, "nothing is left beside it");
}
