use std::{fs, os::unix::fs::PermissionsExt as _};

use tempfile::TempDir;

use super::*;

fn arguments(list: &[&str]) -> Result<Arguments, clap::Error> {
    Arguments::parse(
        std::iter::once("dvpn-daemon")
            .chain(list.iter().copied())
            .map(OsString::from),
    )
}

fn variables(list: &[(&str, &str)]) -> Vec<(OsString, OsString)> {
    list.iter()
        .map(|(name, value)| (OsString::from(name), OsString::from(value)))
        .collect()
}

/// A configuration file and an argument that names it, so that no test reads /etc.
fn with_file(text: &str) -> (TempDir, String) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("dvpn.toml");
    fs::write(&path, text).unwrap();
    let option = format!("--config={}", path.display());
    (directory, option)
}

fn private(directory: &TempDir, name: &str, text: &str, mode: u32) -> String {
    let path = directory.path().join(name);
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    path.display().to_string()
}

fn failure(result: Result<Config, Error>) -> String {
    match result {
        Ok(_) => panic!("accepted"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn command_line_beats_environment_beats_parts_beat_file_beats_defaults() {
    let (directory, file) =
        with_file("node_port = 1\nmesh_sample_size = 1\nnode_id = \"file\"\nnode_region = \"file\"\n");
    fs::create_dir(directory.path().join("conf.d")).unwrap();
    fs::write(
        directory.path().join("conf.d/10.toml"),
        "mesh_sample_size = 2\nnode_id = \"ten\"\nnode_port = 2",
    )
    .unwrap();
    fs::write(
        directory.path().join("conf.d/20.toml"),
        "mesh_sample_size = 4\nnode_port = 3",
    )
    .unwrap();
    fs::write(directory.path().join("conf.d/ignored.bak"), "no = toml = here").unwrap();
    let environment = variables(&[
        ("MESH_SAMPLE_SIZE", "5"),
        ("NODE_PORT", "4"),
        ("PATH", "/bin"),
        ("NODE_REGION", ""),
    ]);
    let config = arguments(&[&file, "--mesh-sample-size", "6"])
        .unwrap()
        .load(environment)
        .unwrap();
    assert_eq!(config.mesh_sample_size, 6);
    assert_eq!((config.node.port, config.node.probe_port), (4, 5));
    assert_eq!(config.node.id.unwrap().as_str(), "ten");
    assert_eq!(
        config.node.region.unwrap().as_str(),
        "file",
        "an empty variable is no value"
    );
    assert!(config.upnp, "the default");
}

#[test]
fn a_secret_comes_from_the_credential_then_the_file_then_the_variable() {
    let (directory, file) = with_file("");
    let credentials = directory.path().join("credentials");
    fs::create_dir(&credentials).unwrap();
    let named = private(&directory, "token", "from-file\n", 0o600);
    let arguments = arguments(&[&file]).unwrap();
    let token = |list: &[(&str, &str)]| {
        arguments
            .load(variables(list))
            .unwrap()
            .payment_token
            .unwrap()
            .expose()
            .to_owned()
    };
    let credentials_text = credentials.display().to_string();
    assert_eq!(token(&[("PAYMENT_TOKEN", "plain")]), "plain");
    assert_eq!(
        token(&[("PAYMENT_TOKEN", "plain"), ("PAYMENT_TOKEN_FILE", &named)]),
        "from-file"
    );
    let all = [
        ("PAYMENT_TOKEN", "plain"),
        ("PAYMENT_TOKEN_FILE", &*named),
        ("CREDENTIALS_DIRECTORY", &*credentials_text),
    ];
    assert_eq!(token(&all), "from-file", "no such credential");
    fs::write(credentials.join("PAYMENT_TOKEN"), "from-credential").unwrap();
    fs::set_permissions(credentials.join("PAYMENT_TOKEN"), fs::Permissions::from_mode(0o440)).unwrap();
    assert_eq!(token(&all), "from-credential");

    fs::write(
        directory.path().join("dvpn.toml"),
        format!("payment_token_file = \"{named}\""),
    )
    .unwrap();
    assert_eq!(token(&[]), "from-file", "named in the configuration file");
}

#[test]
fn an_exposed_or_missing_secret_file_is_refused_by_name() {
    let (directory, file) = with_file("");
    let arguments = arguments(&[&file]).unwrap();
    let exposed = private(&directory, "exposed", "hunter2", 0o644);
    let text = failure(arguments.load(variables(&[
        ("PAYMENT_TOKEN_FILE", &exposed),
        ("CONTROL_TOKEN_FILE", "/nowhere/x"),
    ])));
    assert!(
        text.contains("exposed") && text.contains("644") && text.contains("/nowhere/x"),
        "{text}"
    );
    assert!(!text.contains("hunter2"));
    let binary = directory.path().join("binary");
    fs::write(&binary, [0xff; 10]).unwrap();
    fs::set_permissions(&binary, fs::Permissions::from_mode(0o600)).unwrap();
    assert!(
        failure(arguments.load(variables(&[("CONTROL_TOKEN_FILE", &binary.display().to_string())]))).contains("64 KiB")
    );
}

#[test]
fn every_error_of_every_source_is_reported_at_once_without_secrets() {
    let (_directory, file) = with_file("nonsense = 1\npayment_token = \"hunter2\"\n");
    let environment = variables(&[
        ("NODE_PORT", "0"),
        ("WG_PRIVATE_KEY", "hunter3"),
        ("POOL_URL", "http://pool/providers"),
    ]);
    let text = failure(arguments(&[&file, "--lockdown=maybe"]).unwrap().load(environment));
    for part in [
        "nonsense",
        "payment_token",
        "NODE_PORT",
        "WG_PRIVATE_KEY",
        "POOL_URL",
        "https://",
        "LOCKDOWN",
        "maybe",
    ] {
        assert!(text.contains(part), "{part} in\n{text}");
    }
    assert!(!text.contains("hunter"), "{text}");
}

#[test]
fn a_named_configuration_file_must_exist() {
    assert!(
        failure(
            arguments(&["--config=/nowhere/dvpn.toml"])
                .unwrap()
                .load(variables(&[]))
        )
        .contains("/nowhere/dvpn.toml")
    );
}

#[test]
fn a_secret_on_the_command_line_is_refused_and_not_shown() {
    for list in [
        &["--payment-token=hunter2"][..],
        &["--payment-token", "hunter2"],
        &["--wg-private-key", "hunter2"],
    ] {
        let error = arguments(list).map(|_| ()).unwrap_err();
        let text = error.to_string();
        assert!(
            error.use_stderr() && text.contains("_FILE") && !text.contains("hunter2"),
            "{text}"
        );
    }
}

#[test]
fn tasks_exclude_each_other_and_are_read() {
    assert_eq!(arguments(&[]).unwrap().task, Task::Run);
    assert_eq!(arguments(&["--check-config"]).unwrap().task, Task::CheckConfig);
    assert_eq!(arguments(&["--cleanup"]).unwrap().task, Task::Cleanup);
    assert_eq!(
        arguments(&["--simulate"]).unwrap().task,
        Task::Simulate { seeds: DEFAULT_SEEDS }
    );
    assert_eq!(arguments(&["--simulate=7"]).unwrap().task, Task::Simulate { seeds: 7 });
    assert!(arguments(&["--cleanup", "--check-config"]).is_err());
    assert!(!arguments(&["--help"]).map(|_| ()).unwrap_err().use_stderr());
    assert!(!arguments(&["--version"]).map(|_| ()).unwrap_err().use_stderr());
}

#[test]
fn help_names_every_setting_that_is_no_secret() {
    command().debug_assert();
    let help = command().render_long_help().to_string();
    for setting in SETTINGS {
        assert_eq!(
            help.contains(&format!("--{}", setting.option())),
            !setting.secret,
            "{}",
            setting.name
        );
    }
}

#[test]
fn a_fallback_is_checked_before_it_is_needed() {
    let (directory, file) = with_file("");
    let check = |list: &[(&str, &str)]| arguments(&[&file]).unwrap().load(variables(list));
    let missing = failure(check(&[
        ("FALLBACK_ENABLED", "true"),
        ("FALLBACK_SCRIPT_PATH", "/nonexistent/script"),
    ]));
    assert!(missing.contains("FALLBACK_ORCHESTRATOR_URL"), "{missing}");
    let script = private(&directory, "script.sh", "#!/bin/sh\n", 0o777);
    let on = [
        ("FALLBACK_ENABLED", "true"),
        ("FALLBACK_SCRIPT_PATH", script.as_str()),
        ("FALLBACK_ORCHESTRATOR_URL", "https://orchestrator.example"),
    ];
    let writable = failure(check(&on));
    assert!(
        writable.contains("0777") && writable.contains("chmod go-w"),
        "{writable}"
    );
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    assert!(check(&on).is_ok());
    fs::remove_file(&script).unwrap();
    let gone = failure(check(&on));
    assert!(
        gone.contains("FALLBACK_SCRIPT_PATH") && gone.contains("does not open"),
        "{gone}"
    );
    let off = [("FALLBACK_SCRIPT_PATH", script.as_str())];
    assert!(check(&off).is_ok(), "nothing is looked at while the fallback is off");
}
