//! A private D-Bus system bus with the policy file that the package ships, and calls on it by busctl.

use std::{
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use dvpn_common::dbus::{NAME, PATH};

use crate::{
    namespace::Namespace,
    process::{Process, Surroundings, wait_for},
};

/// A running dbus-daemon; ended when dropped.
pub struct Bus {
    address: BusAddress,
    _daemon: Process,
}

/// Where a bus listens, and calls to the daemon on it.
#[derive(Debug, Clone)]
pub struct BusAddress(String);

const SOCKET: &str = "bus.socket";

/// The policy file that the package ships.
const SHIPPED_POLICY: &str = include_str!("../../systemd/org.dvpn.Daemon1.conf");

impl Bus {
    /// Starts a bus of the type `system` whose files are in `directory`.
    pub fn spawn(namespace: &Namespace, directory: &Path) -> Result<Self> {
        let socket = directory.join(SOCKET);
        // A socket that a killed run left would make dbus-daemon refuse.
        match std::fs::remove_file(&socket) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("removing {}", socket.display()));
            }
            Ok(()) | Err(_) => {}
        }
        let BusAddress(address) = BusAddress::in_directory(directory);
        // Beside the socket: the programs may have been brought to a machine without the source tree.
        let policy = directory.join("org.dvpn.Daemon1.conf");
        std::fs::write(&policy, SHIPPED_POLICY).with_context(|| format!("writing {}", policy.display()))?;
        let config = directory.join("bus.conf");
        let text = format!(
            "<!DOCTYPE busconfig PUBLIC \"-//freedesktop//DTD D-BUS Bus Configuration 1.0//EN\"\n \
             \"http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd\">\n\
             <busconfig>\n  <type>system</type>\n  <listen>{address}</listen>\n  <auth>EXTERNAL</auth>\n  \
             <policy context=\"default\">\n    <allow user=\"*\"/>\n    <deny own=\"*\"/>\n    \
             <deny send_type=\"method_call\"/>\n    <allow send_type=\"signal\"/>\n    \
             <allow send_requested_reply=\"true\" send_type=\"method_return\"/>\n    \
             <allow send_requested_reply=\"true\" send_type=\"error\"/>\n    \
             <allow receive_type=\"method_call\"/>\n    <allow receive_type=\"method_return\"/>\n    \
             <allow receive_type=\"error\"/>\n    <allow receive_type=\"signal\"/>\n    \
             <allow send_destination=\"org.freedesktop.DBus\"/>\n  </policy>\n  \
             <include>{}</include>\n</busconfig>\n",
            policy.display()
        );
        std::fs::write(&config, text).with_context(|| format!("writing {}", config.display()))?;
        let mut command = Command::new("dbus-daemon");
        command
            .arg("--nofork")
            .arg("--nopidfile")
            .arg(format!("--config-file={}", config.display()));
        let log = directory.join("bus.log");
        let surroundings = Surroundings {
            namespace,
            log: &log,
            resolv_conf: None,
        };
        let mut daemon = Process::spawn("dbus-daemon", command, &surroundings).context("install dbus-daemon")?;
        wait_for("the D-Bus socket", Duration::from_secs(5), || {
            daemon.check_running()?;
            Ok(std::os::unix::net::UnixStream::connect(&socket).ok())
        })?;
        Ok(Self {
            address: BusAddress(address),
            _daemon: daemon,
        })
    }

    /// Where it listens.
    pub fn address(&self) -> &BusAddress {
        &self.address
    }
}

impl BusAddress {
    /// The bus of a machine whose files are in `directory`, whoever runs it.
    pub fn in_directory(directory: &Path) -> Self {
        Self(format!("unix:path={}", directory.join(SOCKET).display()))
    }

    /// For `DBUS_SYSTEM_BUS_ADDRESS` and `busctl --address=`.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Calls a method of the daemon; the answer as busctl prints it in JSON.
    pub fn call(&self, method: &str, signature_and_arguments: &[&str]) -> Result<serde_json::Value> {
        let text = self.busctl(
            None,
            &[&["call", NAME, PATH, NAME, method], signature_and_arguments].concat(),
        )?;
        Self::reply(&text)
    }

    /// The same by somebody who is logged in over SSH.
    pub fn call_over_ssh(&self, method: &str) -> Result<()> {
        let mut command = Command::new("busctl");
        command.env("SSH_CONNECTION", "203.0.113.9 50000 203.0.113.20 22");
        self.run(command, &["call", NAME, PATH, NAME, method]).map(drop)
    }

    /// The same by another user.
    pub fn call_as(&self, uid: u32, method: &str, signature_and_arguments: &[&str]) -> Result<serde_json::Value> {
        let arguments = [&["call", NAME, PATH, NAME, method], signature_and_arguments].concat();
        Self::reply(&self.busctl(Some(uid), &arguments)?)
    }

    fn reply(text: &str) -> Result<serde_json::Value> {
        if text.trim().is_empty() {
            return Ok(serde_json::Value::Null);
        }
        serde_json::from_str(text).with_context(|| format!("busctl answered {text:?}"))
    }

    /// A property of the daemon; its value as busctl prints it in JSON.
    pub fn property(&self, name: &str) -> Result<serde_json::Value> {
        self.property_by(None, name)
    }

    /// The same by another user.
    pub fn property_as(&self, uid: u32, name: &str) -> Result<serde_json::Value> {
        self.property_by(Some(uid), name)
    }

    fn property_by(&self, uid: Option<u32>, name: &str) -> Result<serde_json::Value> {
        let text = self.busctl(uid, &["get-property", NAME, PATH, NAME, name])?;
        let mut value: serde_json::Value = serde_json::from_str(&text).context("reading busctl's answer")?;
        Ok(value.get_mut("data").map(serde_json::Value::take).unwrap_or_default())
    }

    fn busctl(&self, uid: Option<u32>, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new("busctl");
        if let Some(uid) = uid {
            command.uid(uid).gid(uid);
        }
        self.run(command, arguments)
    }

    fn run(&self, mut command: Command, arguments: &[&str]) -> Result<String> {
        let output = command
            .arg(format!("--address={}", self.0))
            .args(["--json=short", "--timeout=20"])
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .context("running busctl: install systemd")?;
        let error = String::from_utf8_lossy(&output.stderr);
        if !output.status.success() {
            bail!("busctl {}: {}", arguments.join(" "), error.trim());
        }
        ensure!(
            error.trim().is_empty(),
            "busctl {} complained: {}",
            arguments.join(" "),
            error.trim()
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}
