use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
};

use tempfile::TempDir;

use super::{record::Global, *};

const BEFORE: &str = "search lan\nnameserver 192.0.2.53\noptions edns0\n";
const SERVERS: [&str; 2] = ["10.96.0.1", "fd00:96::1"];

/// A machine's /etc and a state directory.
struct Machine {
    folder: TempDir,
    dns: Dns,
}

impl Machine {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("etc")).unwrap();
        fs::create_dir(folder.path().join("state")).unwrap();
        let dns = Self::daemon(&folder);
        Self { folder, dns }
    }

    fn daemon(folder: &TempDir) -> Dns {
        Dns::at(&folder.path().join("etc/resolv.conf"), &folder.path().join("state"))
    }

    /// The daemon was killed and another one runs.
    fn restart(&mut self) {
        self.dns = Self::daemon(&self.folder);
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("etc/resolv.conf")
    }

    fn state(&self, name: &str) -> PathBuf {
        self.folder.path().join("state").join(name)
    }

    fn record(&self) -> Record {
        self.dns.inner.store.load().unwrap().unwrap_or_else(Record::new)
    }

    /// Sets the file alone: no service of the machine that runs the tests is asked.
    fn set(&self, servers: &[&str]) -> Result<(), Error> {
        let mut record = self.record();
        record.servers = servers.iter().map(|server| server.parse().unwrap()).collect();
        let (_, before) = self.dns.before(&record)?;
        self.dns.set_file(&mut record, &before, Way::File)
    }

    fn undo(&self) -> Vec<Result<String, Error>> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(self.dns.undo())
    }

    /// Undoes without an error; what was said.
    fn undone(&self) -> String {
        let said: Vec<String> = self.undo().into_iter().map(Result::unwrap).collect();
        assert!(!self.state("dns.json").exists(), "nothing is left to undo");
        said.join("\n")
    }

    fn text(&self) -> String {
        fs::read_to_string(self.path()).unwrap()
    }

    fn servers(&self) -> Vec<String> {
        let servers = parse(&self.text()).servers;
        servers.iter().map(|server| server.address.to_string()).collect()
    }

    fn files(&self) -> Vec<String> {
        let names = ["etc", "state"]
            .iter()
            .flat_map(|name| fs::read_dir(self.folder.path().join(name)).unwrap())
            .map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<String> = names.collect();
        names.sort();
        names
    }
}

#[test]
fn a_plain_file_comes_back_with_its_mode() {
    let machine = Machine::new();
    fs::write(machine.path(), BEFORE).unwrap();
    fs::set_permissions(machine.path(), fs::Permissions::from_mode(0o640)).unwrap();
    machine.set(&SERVERS).unwrap();
    assert_eq!(machine.servers(), SERVERS);
    assert!(machine.text().contains("options edns0") && !machine.text().contains("search"));
    assert_eq!(
        fs::metadata(machine.path()).unwrap().permissions().mode() & 0o777,
        0o644
    );
    machine.undone();
    assert_eq!(machine.text(), BEFORE);
    assert_eq!(
        fs::metadata(machine.path()).unwrap().permissions().mode() & 0o777,
        0o640
    );
    assert_eq!(machine.files(), ["resolv.conf"]);
    assert!(machine.undo().is_empty(), "there is nothing to undo twice");
}

#[test]
fn a_link_comes_back_and_its_target_is_never_written() {
    let machine = Machine::new();
    let target = machine.state("target");
    fs::write(&target, BEFORE).unwrap();
    symlink("../state/target", machine.path()).unwrap();
    machine.set(&SERVERS).unwrap();
    assert_eq!(machine.servers(), SERVERS);
    assert!(
        machine.text().contains("options edns0"),
        "as in the file that the link led to"
    );
    assert_eq!(fs::read_to_string(&target).unwrap(), BEFORE);
    machine.undone();
    assert_eq!(fs::read_link(machine.path()).unwrap(), Path::new("../state/target"));
}

#[test]
fn a_link_to_nothing_and_no_file_at_all_come_back() {
    let machine = Machine::new();
    symlink("/nonexistent/resolv.conf", machine.path()).unwrap();
    machine.set(&SERVERS).unwrap();
    machine.undone();
    assert_eq!(
        fs::read_link(machine.path()).unwrap(),
        Path::new("/nonexistent/resolv.conf")
    );
    fs::remove_file(machine.path()).unwrap();
    machine.set(&SERVERS).unwrap();
    assert_eq!(machine.servers(), SERVERS);
    machine.undone();
    assert!(machine.path().symlink_metadata().is_err());
}

#[test]
fn bytes_that_are_no_text_come_back() {
    let machine = Machine::new();
    let bytes = b"nameserver 192.0.2.53\n# \xe9\0\n\n";
    fs::write(machine.path(), bytes).unwrap();
    machine.set(&SERVERS).unwrap();
    machine.undone();
    assert_eq!(fs::read(machine.path()).unwrap(), bytes);
}

#[test]
fn setting_again_changes_nothing_and_other_servers_keep_what_was_there_before() {
    let mut machine = Machine::new();
    fs::write(machine.path(), BEFORE).unwrap();
    machine.set(&SERVERS).unwrap();
    let written = |machine: &Machine| {
        let times =
            [machine.path(), machine.state("dns.json")].map(|path| fs::metadata(path).unwrap().modified().unwrap());
        times.to_vec()
    };
    let first = written(&machine);
    machine.restart();
    machine.set(&SERVERS).unwrap();
    assert_eq!(written(&machine), first);
    machine.set(&["10.97.0.1"]).unwrap();
    assert_eq!(machine.servers(), ["10.97.0.1"]);
    assert_eq!(machine.record().file.unwrap().ours.len(), 1);
    machine.undone();
    assert_eq!(machine.text(), BEFORE);
}

#[test]
fn what_somebody_else_writes_meanwhile_is_what_comes_back() {
    let machine = Machine::new();
    fs::write(machine.path(), BEFORE).unwrap();
    machine.set(&SERVERS).unwrap();
    fs::write(machine.path(), "nameserver 198.51.100.53\n").unwrap();
    machine.set(&SERVERS).unwrap();
    assert_eq!(machine.servers(), SERVERS);
    machine.undone();
    assert_eq!(machine.text(), "nameserver 198.51.100.53\n");
}

#[test]
fn what_somebody_else_wrote_while_we_were_dead_stays() {
    let mut machine = Machine::new();
    fs::write(machine.path(), BEFORE).unwrap();
    machine.set(&SERVERS).unwrap();
    fs::remove_file(machine.path()).unwrap();
    symlink("/run/other", machine.path()).unwrap();
    machine.restart();
    assert!(machine.undone().contains("stays as it is"));
    assert_eq!(fs::read_link(machine.path()).unwrap(), Path::new("/run/other"));
}

#[test]
fn an_edit_of_our_file_is_kept_aside_and_the_tunnels_servers_do_not_outlive_it() {
    let machine = Machine::new();
    fs::write(machine.path(), BEFORE).unwrap();
    machine.set(&SERVERS).unwrap();
    let edited = machine.text() + "options rotate\n";
    fs::write(machine.path(), &edited).unwrap();
    machine.set(&SERVERS).unwrap();
    assert_eq!(
        fs::read_to_string(machine.state("resolv.conf.edited-1")).unwrap(),
        edited
    );
    let edited = machine.text() + "search example\n";
    fs::write(machine.path(), &edited).unwrap();
    assert!(machine.undone().contains("resolv.conf.edited-2"));
    assert_eq!(
        fs::read_to_string(machine.state("resolv.conf.edited-2")).unwrap(),
        edited
    );
    assert_eq!(machine.text(), BEFORE);
}

/// A kill leaves the record and the file as they were between two steps. From each of these states both a further set
/// and an undo come to the right end.
#[test]
fn killed_between_any_two_steps_nothing_is_lost() {
    let text = |servers: &[&str]| {
        let servers: Vec<IpAddr> = servers.iter().map(|server| server.parse().unwrap()).collect();
        render(&servers, BEFORE, Way::File)
    };
    let (old, new) = (text(&SERVERS), text(&["10.97.0.1"]));
    let interrupted = format!("{old}{}", "\n".repeat(20));
    // The texts that the record knows as ours, what is in the file, and what an undo has to leave.
    let table: &[(&[&str], &str)] = &[
        (&[&old], BEFORE),       // first set: recorded, not yet written
        (&[&old], &interrupted), // written in place, not yet cut
        (&[&old], &old),         // written
        (&[&old, &new], &old),   // other servers: recorded, not yet written
        (&[&old, &new], &new),   // written, the old text not yet forgotten
        (&[&new], &new),         // done
    ];
    for (ours, there) in table {
        for set_first in [false, true] {
            let machine = Machine::new();
            fs::write(machine.path(), BEFORE).unwrap();
            let mut record = Record::new();
            record.file = Some(Replaced {
                before: Some(file::look(&machine.path()).unwrap()),
                ours: ours.iter().map(|text| (*text).to_owned()).collect(),
            });
            machine.dns.inner.store.save(&record).unwrap();
            fs::write(machine.path(), there).unwrap();
            fs::write(machine.folder.path().join("etc/.resolv.conf.dvpn.new"), "half").unwrap();
            if set_first {
                machine.set(&["10.98.0.1"]).unwrap();
                assert_eq!(machine.servers(), ["10.98.0.1"]);
            }
            machine.undone();
            assert_eq!(machine.text(), BEFORE, "{ours:?} {there}");
        }
    }
    // An undo in place: the longer text of ours is not yet cut off.
    let machine = Machine::new();
    fs::write(machine.path(), BEFORE).unwrap();
    machine.set(&SERVERS).unwrap();
    fs::write(machine.path(), format!("{BEFORE}\n\n\n")).unwrap();
    machine.undone();
    assert_eq!(machine.text(), BEFORE);
}

#[test]
fn without_its_record_our_file_is_never_taken_for_the_networks() {
    let mut machine = Machine::new();
    fs::write(machine.path(), BEFORE).unwrap();
    machine.set(&SERVERS).unwrap();
    fs::remove_file(machine.state("dns.json")).unwrap();
    machine.restart();
    assert!(matches!(machine.undo()[..], [Err(Error::Lost { .. })]));
    machine.set(&["10.97.0.1"]).unwrap();
    assert_eq!(machine.servers(), ["10.97.0.1"]);
    assert!(matches!(machine.undo()[..], [Err(Error::Lost { .. })]));
    // The owner did what the error says.
    fs::write(machine.path(), BEFORE).unwrap();
    machine.undone();
    assert_eq!(machine.text(), BEFORE);
}

#[test]
fn what_cannot_be_put_back_is_not_replaced() {
    let machine = Machine::new();
    fs::create_dir(machine.path()).unwrap();
    assert!(matches!(machine.set(&SERVERS), Err(Error::NotAFile { .. })));
    fs::remove_dir(machine.path()).unwrap();
    fs::write(machine.path(), "#".repeat((1 << 20) + 1)).unwrap();
    assert!(matches!(machine.set(&SERVERS), Err(Error::NotAFile { .. })));
    fs::write(machine.path(), BEFORE).unwrap();
    fs::remove_dir(machine.state("")).unwrap();
    assert!(
        matches!(machine.set(&SERVERS), Err(Error::Write { .. })),
        "without a record nothing is changed"
    );
    assert_eq!(machine.text(), BEFORE);
}

#[test]
fn a_record_that_does_not_read_changes_nothing() {
    let machine = Machine::new();
    fs::write(machine.path(), BEFORE).unwrap();
    machine.set(&SERVERS).unwrap();
    let ours = machine.text();
    for damaged in [
        "",
        "{",
        "{\"version\":2,\"interface\":\"dvpn0\",\"index\":1,\"servers\":[]}",
    ] {
        fs::write(machine.state("dns.json"), damaged).unwrap();
        assert!(matches!(machine.undo()[..], [Err(Error::Damaged { .. })]));
        assert_eq!(machine.text(), ours);
        assert_eq!(fs::read_to_string(machine.state("dns.json")).unwrap(), damaged);
    }
}

#[test]
fn the_record_reads_back_and_can_be_read_by_a_person() {
    let machine = Machine::new();
    let mut record = Record::new();
    record.interface = "dvpn0".to_owned();
    record.index = 7;
    record.servers = vec!["10.96.0.1".parse().unwrap()];
    record.resolved = true;
    record.network_manager = Some(Managed {
        before: Global(vec![0, 1, 0xff]),
        ours: vec![record.servers.clone()],
    });
    record.file = Some(Replaced {
        before: Some(Found::Link("../run/resolvconf/resolv.conf".into())),
        ours: vec!["text".to_owned()],
    });
    machine.dns.inner.store.save(&record).unwrap();
    assert_eq!(machine.record(), record);
    let path = machine.state("dns.json");
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(
        fs::read_to_string(&path)
            .unwrap()
            .contains("../run/resolvconf/resolv.conf")
    );
}
