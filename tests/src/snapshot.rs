//! What the network side of a machine looks like, as text that can be compared: to show that nothing is left.

use std::{fmt::Write as _, path::Path};

use anyhow::{Context as _, Result};

use crate::namespace::Namespace;

const QUESTIONS: [(&str, &[&str]); 7] = [
    ("ip", &["-o", "-d", "link"]),
    ("ip", &["-o", "addr"]),
    ("ip", &["route", "show", "table", "all"]),
    ("ip", &["-6", "route", "show", "table", "all"]),
    ("ip", &["rule"]),
    ("ip", &["-6", "rule"]),
    ("nft", &["--stateless", "list", "ruleset"]),
];

/// Links, addresses, routes of all tables, rules, the whole nftables ruleset, the names pinned below `bpf`.
pub fn take(namespace: &Namespace, bpf: &Path) -> Result<String> {
    let mut out = String::new();
    for (program, arguments) in QUESTIONS {
        let text = namespace.output(program, arguments)?;
        write!(out, "# {program} {}\n{text}", arguments.join(" ")).context("writing a snapshot")?;
    }
    out.push_str("# pinned\n");
    let mut names = Vec::new();
    list(bpf, &mut names);
    names.sort();
    for name in names {
        writeln!(out, "{name}").context("writing a snapshot")?;
    }
    Ok(out)
}

fn list(directory: &Path, names: &mut Vec<String>) {
    let Ok(entries) = std::fs::read_dir(directory) else {
        return;
    };
    for entry in entries.flatten() {
        names.push(entry.path().display().to_string());
        list(&entry.path(), names);
    }
}

/// The lines of `after` that are not in `before`, and the other way round, for messages.
pub fn difference(before: &str, after: &str) -> String {
    let only = |a: &str, b: &str, mark: char| -> String {
        a.lines()
            .filter(|line| !b.lines().any(|other| other == *line))
            .fold(String::new(), |mut out, line| {
                out.push(mark);
                out.push_str(line);
                out.push('\n');
                out
            })
    };
    only(before, after, '-') + &only(after, before, '+')
}
