//! The local network that a newcomer brings up, by the command that `one-click.sh` ends in.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use dvpn_tests::{
    certs::Authority,
    namespace::names,
    network::{POOL, PREFIX, ROOT},
    process::{program, runs, wait_for},
    sweep,
    world::unique_id,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// A network of its own beside whatever the owner of this machine runs; taken down when dropped.
struct Lab {
    id: String,
    files: PathBuf,
}

impl Lab {
    fn new() -> Result<Self> {
        let id = unique_id();
        let files = std::env::temp_dir().join(format!("dvpn-lab-{id}"));
        let authority = Authority::create(&files)?;
        authority.issue("server", &[POOL.into()], &[])?;
        fs::write(files.join("env"), "MESH_SAMPLE_SIZE=3\n").context("writing the settings")?;
        Ok(Self { id, files })
    }

    fn run(&self, arguments: &[&str]) -> Result<Output> {
        let mut command = Command::new(program("dvpn-lab")?);
        command.env("DVPN_LAB_ID", &self.id).args(arguments);
        command.output().context("running dvpn-lab")
    }

    /// The output of a command that must succeed.
    fn said(&self, arguments: &[&str]) -> Result<String> {
        let output = self.run(arguments)?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(
            output.status.success(),
            "dvpn-lab {arguments:?}: {} {text}",
            output.status
        );
        Ok(text)
    }

    /// Brings it up; gives what was said.
    fn up(&self, more: &[&str]) -> Result<String> {
        let path = |name: &str| self.files.join(name).display().to_string();
        let (ca, certificate, key, env) = (path("ca.crt"), path("server.crt"), path("server.key"), path("env"));
        let mut arguments = vec![
            "up",
            "--ca",
            &ca,
            "--certificate",
            &certificate,
            "--key",
            &key,
            "--env",
            &env,
        ];
        arguments.extend(more);
        let said = self.said(&arguments)?;
        ensure!(said.contains("exit address: 203.0.113.3"), "no exit address: {said}");
        Ok(said)
    }

    fn kill(&self, machine: &str) -> Result<()> {
        let path = Path::new(ROOT).join(&self.id).join(machine).join("pid");
        let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        let pid: i32 = text.trim().parse().context("reading a process id")?;
        kill(Pid::from_raw(pid), Signal::SIGKILL).with_context(|| format!("killing {machine}"))?;
        wait_for("the end of a process", Duration::from_secs(5), || {
            Ok((!runs(pid.unsigned_abs())).then_some(()))
        })
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        drop(self.run(&["down"]));
        drop(fs::remove_dir_all(&self.files));
    }
}

#[test]
fn a_network_of_which_anything_was_killed_or_reconfigured_comes_up_whole() -> Result<()> {
    let _alone = sweep::exclusive()?;
    let lab = Lab::new()?;
    lab.up(&[])?;
    let said = lab.up(&[])?;
    ensure!(said.contains("the network stands already"), "{said}");
    for machine in ["client", "pool", "provider-b"] {
        lab.kill(machine)?;
        let said = lab.up(&[]).with_context(|| format!("after the end of {machine}"))?;
        ensure!(said.contains(&format!("{machine} does not run")), "{said}");
    }
    fs::write(lab.files.join("env"), "MESH_SAMPLE_SIZE=2\n").context("writing the settings")?;
    let said = lab.up(&[])?;
    ensure!(said.contains("its client has other settings"), "{said}");
    let state = "get-property org.dvpn.Daemon1 /org/dvpn/Daemon1 org.dvpn.Daemon1 State";
    let state: Vec<&str> = ["exec", "client", "busctl"]
        .into_iter()
        .chain(state.split(' '))
        .collect();
    let state = lab.said(&state)?;
    ensure!(state.contains("connected"), "{state}");

    // In device mode a program that knows nothing of a proxy leaves through the provider too.
    let fetch = [
        "exec",
        "client",
        "curl",
        "-sS",
        "--max-time",
        "5",
        "http://web.dvpn.test/",
    ];
    ensure!(
        !lab.run(&fetch)?.status.success(),
        "a program without the proxy reached the web server in app mode"
    );
    lab.up(&["--device"])?;
    let exit = lab.said(&fetch)?;
    ensure!(exit.starts_with("203.0.113.3"), "{exit}");

    lab.said(&["down"])?;
    let left = names(&format!("{PREFIX}{}-", lab.id));
    ensure!(left.is_empty(), "{left:?} are left");
    ensure!(!Path::new(ROOT).join(&lab.id).exists(), "files are left");
    Ok(())
}
