//! What people read about the settings, made from the table.

use std::fmt::Write as _;

use super::table::{Owner, SETTINGS, Setting};

/// The settings part of `--help`.
pub fn help_table() -> String {
    let mut out = String::new();
    for setting in SETTINGS {
        let default = if setting.default.is_empty() {
            String::new()
        } else {
            format!(" [{}]", setting.default)
        };
        let secret = if setting.secret {
            " (secret: NAME_FILE or a systemd credential)"
        } else {
            ""
        };
        push(
            &mut out,
            format_args!(
                "  {}={}{default}\n      {}{secret}\n",
                setting.name,
                setting.kind.placeholder(),
                setting.doc
            ),
        );
    }
    out
}

/// The table of the README.
pub fn markdown_table() -> String {
    let mut out = "| setting | value | default | meaning |\n|---|---|---|---|\n".to_owned();
    for setting in SETTINGS {
        let default = if setting.default.is_empty() {
            String::new()
        } else {
            format!("`{}`", setting.default)
        };
        let mark = match setting.owner {
            Owner::Contract => "",
            Owner::Addition => " +",
        };
        let secret = if setting.secret { " *Secret.*" } else { "" };
        let value = setting.kind.placeholder().replace('|', "\\|");
        let doc = setting.doc.replace('|', "\\|");
        push(
            &mut out,
            format_args!("| `{}`{mark} | {value} | {default} | {doc}{secret} |\n", setting.name),
        );
    }
    out
}

/// `.env.example`: every setting, those without a default left empty.
pub fn env_example() -> String {
    let mut out = "# Settings of DVPN. Empty means not set. Copy to .env and fill in.\n".to_owned();
    for setting in SETTINGS {
        push(
            &mut out,
            format_args!("\n# {}\n{}={}\n", setting.doc, setting.name, setting.default),
        );
    }
    out
}

/// `dvpn.toml` with every default shown and commented out.
pub fn toml_example() -> String {
    let mut out = "# /etc/dvpn/dvpn.toml. The environment and the command line win over this file.\n\
                   # A secret is not written here: name_file holds the path of a file of mode 0600.\n"
        .to_owned();
    for setting in SETTINGS {
        push(
            &mut out,
            format_args!("\n# {}\n# {}\n", setting.doc, toml_line(setting)),
        );
    }
    out
}

fn toml_line(setting: &Setting) -> String {
    match setting.file_name() {
        Some(name) => format!("{} = \"/etc/dvpn/{}\"", name.to_ascii_lowercase(), setting.option()),
        None => format!("{} = \"{}\"", setting.toml_key(), setting.default),
    }
}

fn push(out: &mut String, line: std::fmt::Arguments<'_>) {
    // Writing to a String cannot fail.
    if out.write_fmt(line).is_err() {
        out.push('\n');
    }
}
