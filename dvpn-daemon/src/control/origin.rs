//! Whether a process belongs to a login over SSH.
//!
//! It or one of its ancestors is the server's process for a connection, or says so in its environment: sudo(8) clears the
//! one, a terminal multiplexer leaves the other.

use std::{fs, path::Path};

/// No chain of ancestors is longer; one that is does not count.
const MAX_ANCESTORS: usize = 32;
/// Names of the server's processes (`comm` of proc(5)), before and since OpenSSH 9.8.
const SERVERS: [&str; 2] = ["sshd", "sshd-session"];
const VARIABLE: &[u8] = b"SSH_CONNECTION=";

/// False also when the process is gone, or not ours to look at.
pub(super) fn is_over_ssh(pid: u32) -> bool {
    let mut pid = pid;
    for _ in 0..MAX_ANCESTORS {
        if pid <= 1 {
            return false;
        }
        let directory = Path::new("/proc").join(pid.to_string());
        let environment = fs::read(directory.join("environ")).unwrap_or_default();
        if environment
            .split(|byte| *byte == 0)
            .any(|variable| variable.starts_with(VARIABLE))
        {
            return true;
        }
        let stat = fs::read_to_string(directory.join("stat")).ok();
        let Some((name, parent)) = stat.as_deref().and_then(parse) else {
            return false;
        };
        if SERVERS.contains(&name.as_str()) {
            return true;
        }
        pid = parent;
    }
    false
}

/// Name and parent out of `/proc/PID/stat` (proc(5)). The name may hold anything, parentheses too.
fn parse(stat: &str) -> Option<(String, u32)> {
    let (_, rest) = stat.split_once('(')?;
    let (name, rest) = rest.rsplit_once(')')?;
    let parent = rest.split_ascii_whitespace().nth(1)?.parse().ok()?;
    Some((name.to_owned(), parent))
}

#[cfg(test)]
mod tests {
    use std::{
        io::{BufRead as _, BufReader},
        process::{Command, Stdio},
    };

    use super::*;

    #[test]
    fn a_name_may_hold_parentheses() {
        assert_eq!(parse("42 (a) b) c) S 7 1 1"), Some(("a) b) c".to_owned(), 7)));
        assert_eq!(parse("42 (sshd-session) S 1 1"), Some(("sshd-session".to_owned(), 1)));
        for bad in ["", "42", "42 (x", "42 (x) S", "42 (x) S y"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn the_environment_of_an_ancestor_counts() {
        // A shell with the variable, which starts a program without it.
        let mut shell = Command::new("sh")
            .args(["-c", "env -u SSH_CONNECTION sleep 10 & echo $!; wait"])
            .env("SSH_CONNECTION", "203.0.113.9 50000 192.0.2.1 22")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(shell.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        assert!(is_over_ssh(line.trim().parse().unwrap()));
        // The shell ends with the program.
        assert!(Command::new("kill").arg(line.trim()).status().unwrap().success());
        shell.wait().unwrap();
        assert!(!is_over_ssh(1));
    }
}
