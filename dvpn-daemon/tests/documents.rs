//! What the documents say of the settings is what the code reads. `DVPN_UPDATE_DOCUMENTS=1 cargo test -p dvpn-daemon
//! --test documents` writes them anew.

use std::{fs, path::PathBuf};

use dvpn_core::config;

const BEGIN: &str = "<!-- settings: begin -->\n";
const END: &str = "<!-- settings: end -->";

fn at_top(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..").join(name)
}

/// The file as it should be is what it is, or is written.
fn holds(name: &str, wanted: &str) {
    let path = at_top(name);
    if std::env::var_os("DVPN_UPDATE_DOCUMENTS").is_some() {
        let written = fs::write(&path, wanted);
        assert!(written.is_ok(), "writing {name}: {written:?}");
    }
    let found = fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(found, wanted, "{name} differs from the code: see the head of this test");
}

#[test]
fn the_readme_has_the_table_of_settings() {
    let readme = fs::read_to_string(at_top("README.md")).unwrap();
    let (head, rest) = readme.split_once(BEGIN).unwrap();
    let (_, tail) = rest.split_once(END).unwrap();
    holds(
        "README.md",
        &format!("{head}{BEGIN}\n{}\n{END}{tail}", config::markdown_table().trim()),
    );
}

#[test]
fn the_example_environment_lists_every_setting() {
    holds(".env.example", &config::env_example());
}
