use std::collections::BTreeSet;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use proptest::prelude::*;

use super::*;

fn sources(values: &[(&str, &str)]) -> Vec<Source> {
    let mut source = Source::new("test");
    for (name, value) in values {
        source.insert(*name, Secret::new(*value));
    }
    vec![source]
}

fn good(values: &[(&str, &str)]) -> Config {
    match parse(&sources(values)) {
        Ok(config) => config,
        Err(errors) => panic!("{errors}"),
    }
}

fn errors(values: &[(&str, &str)]) -> String {
    match parse(&sources(values)) {
        Ok(_) => panic!("{values:?} is accepted"),
        Err(errors) => errors.to_string(),
    }
}

#[test]
fn the_defaults_are_those_of_the_contract() {
    let config = good(&[]);
    assert_eq!(config.mesh_sample_size, 3);
    assert!(!config.fallback.enabled && !config.node.register && !config.tray && !config.pool_private);
    assert!(config.auto_network_config && config.upnp);
    assert_eq!(
        config.fallback.script,
        PathBuf::from("/usr/lib/dvpn/scripts/setup_fallback_node.sh")
    );
    assert_eq!(config.fallback.timeout, Duration::from_mins(2));
    assert_eq!((config.node.port, config.node.probe_port), (51820, 51821));
    assert_eq!(
        (config.bandwidth.sample, config.bandwidth.total_bits_per_second),
        (Duration::from_secs(8), None)
    );
    assert_eq!(
        (config.portal.url, config.portal.open_for),
        (None, Duration::from_mins(5))
    );
    assert_eq!(config.socks5.listen, "127.0.0.1:1080".parse().unwrap());
    assert_eq!(config.control.listen, "127.0.0.1:9808".parse().unwrap());
    assert_eq!(config.state_directory, PathBuf::from("/var/lib/dvpn"));
    assert_eq!((config.log.as_str(), config.development), ("info", false));
}

#[test]
fn values_become_what_they_mean() {
    let config = good(&[
        ("POOL_URL", "https://pool:8443/providers/"),
        ("WG_ADDRESS", "10.8.0.2/24, fd00::2"),
        ("TUNNEL_DNS", "10.8.0.1,fd00::1"),
        ("PROVIDERS_ONLY", "a, region:de,b"),
        ("PROVIDERS_EXCLUDE", "region:us"),
        ("BANDWIDTH_TOTAL_MBPS", "2.5"),
        ("NODE_PORT", "1000"),
        ("NODE_PUBLIC_ENDPOINT", "198.51.100.7"),
        ("NODE_PUBLIC_PROBE", "[2001:db8::7]:9"),
        ("ALLOW_INBOUND", "22,443"),
        ("STATE_DIRECTORY", "/a:/b"),
        ("ALLOW_LAN", "On"),
        ("SOCKS5_LISTEN", "0.0.0.0:1080"),
        ("SOCKS5_USER", "me"),
        ("SOCKS5_PASSWORD", " p"),
    ]);
    assert_eq!(config.pool_url.unwrap().as_str(), "https://pool:8443/providers");
    assert_eq!((config.tunnel.addresses.len(), config.tunnel.dns.len()), (2, 2));
    assert_eq!((config.choice.only_ids.len(), config.choice.only_regions.len()), (2, 1));
    assert_eq!(
        (config.choice.exclude_ids.len(), config.choice.exclude_regions.len()),
        (0, 1)
    );
    assert_eq!(config.bandwidth.total_bits_per_second, Some(2_500_000));
    assert_eq!(config.node.public_endpoint, Some("198.51.100.7:1000".parse().unwrap()));
    assert_eq!(config.node.public_probe, Some("[2001:db8::7]:9".parse().unwrap()));
    assert_eq!(config.tunnel.allow_inbound, Some(vec![22, 443]));
    assert_eq!(config.state_directory, PathBuf::from("/a"));
    assert!(config.tunnel.allow_lan);
    let (user, password) = config.socks5.login.unwrap();
    assert_eq!((user.as_str(), password.expose()), ("me", " p"));
}

#[test]
fn each_rule_refuses_and_names_its_setting() {
    for (values, part) in [
        (&[("POOL_URL", "http://pool/providers")][..], "https://"),
        (&[("PAYMENT_API_URL", "http://pool/payment")], "https://"),
        (&[("FALLBACK_ORCHESTRATOR_URL", "ftp://x")], "https://"),
        (&[("BANDWIDTH_TEST_URL", "x")], "URL"),
        (&[("POOL_URL", "https://pool/providers?x=1")], "?"),
        (&[("MESH_SAMPLE_SIZE", "0")], "from 1"),
        (&[("MESH_SAMPLE_SIZE", "three")], "three"),
        (&[("SOCKS5_LISTEN", "0.0.0.0:1080")], "SOCKS5_USER"),
        (
            &[("SOCKS5_LISTEN", "0.0.0.0:1080"), ("SOCKS5_USER", "x")],
            "SOCKS5_PASSWORD",
        ),
        (&[("SOCKS5_PASSWORD", "x")], "SOCKS5_USER"),
        (&[("CONTROL_LISTEN", "[::]:9808")], "CONTROL_TOKEN"),
        (&[("TUNNEL_MODE", "x")], "must be app or device"),
        (
            &[("TUNNEL_MODE", "device"), ("KILL_SWITCH", "perhaps")],
            "true or false",
        ),
        (&[("WG_ADDRESS", "10.0.0.1/33")], "10.8.0.2/32"),
        (&[("WG_ADDRESS", "10.0.0.1,10.0.0.2")], "at most one"),
        (&[("WG_ADDRESS", "224.0.0.1")], "WG_ADDRESS"),
        (&[("NODE_PORT", "0")], "port"),
        (&[("NODE_PORT", "65535")], "NODE_PROBE_PORT"),
        (&[("NODE_PROBE_PORT", "51820")], "another port"),
        (&[("NODE_PUBLIC_ENDPOINT", "pool.example:1")], "IP"),
        (&[("NODE_ID", "a b")], "letters"),
        (&[("PROVIDERS_ONLY", "region:")], "identifier"),
        (&[("BANDWIDTH_TOTAL_MBPS", "-1")], "megabits"),
        (&[("BANDWIDTH_TOTAL_MBPS", "1e3")], "megabits"),
        (&[("FALLBACK_ENABLED", "true")], "FALLBACK_ORCHESTRATOR_URL"),
        (&[("KILL_SWITCH", "true")], "blocks nothing"),
        (&[("LOCKDOWN", "true")], "blocks nothing"),
        (&[("UPNP_ENABLED", "ja")], "true or false"),
        (&[("POOL_PUBLIC_KEY", "x")], "base64"),
        (&[("TUNNEL_DNS", "one.one.one.one")], "resolvers"),
    ] {
        let text = errors(values);
        assert!(text.contains(part) && text.lines().count() == 1, "{values:?}: {text}");
    }
}

#[test]
fn device_mode_blocks_unless_told_not_to_and_app_mode_never() {
    let tunnel = |values: &[(&str, &str)]| {
        let tunnel = good(values).tunnel;
        (tunnel.mode, tunnel.kill_switch, tunnel.lockdown)
    };
    let device = ("TUNNEL_MODE", "device");
    assert_eq!(tunnel(&[]), (Mode::App, false, false));
    assert_eq!(tunnel(&[("KILL_SWITCH", "false")]), (Mode::App, false, false));
    assert_eq!(tunnel(&[device]), (Mode::Device, true, false));
    assert_eq!(
        tunnel(&[device, ("KILL_SWITCH", "false")]),
        (Mode::Device, false, false)
    );
    assert_eq!(tunnel(&[device, ("LOCKDOWN", "true")]), (Mode::Device, true, true));
}

#[test]
fn all_errors_come_at_once_and_no_secret_with_them() {
    let text = errors(&[
        ("WG_PRIVATE_KEY", "hunter2-private"),
        ("POOL_URL", "http://user:hunter2@pool/providers"),
        ("PAYMENT_API_URL", "https://user:hunter2@pool/payment"),
        ("NODE_PORT", "x"),
        ("TUNNEL_MODE", "devices"),
    ]);
    assert_eq!(text.lines().count(), 5, "{text}");
    assert!(!text.contains("hunter2"), "{text}");
}

#[test]
fn toml_takes_lower_case_names_and_refuses_everything_else_by_name() {
    let text = "mesh_sample_size = 5\nupnp_enabled = false\nproviders_only = [\"a\", \"region:de\"]\npayment_token_file = \"/x\"\nbandwidth_total_mbps = 2.5\n";
    let source = Source::toml("dvpn.toml", text).unwrap();
    let config = parse(std::slice::from_ref(&source)).unwrap_or_else(|errors| panic!("{errors}"));
    assert_eq!((config.mesh_sample_size, config.upnp), (5, false));
    assert_eq!(config.choice.only_ids.len(), 1);
    assert_eq!(config.bandwidth.total_bits_per_second, Some(2_500_000));
    let files = secret_files(&[source]);
    assert_eq!(
        (files.len(), files[0].0.name, &files[0].1),
        (1, "PAYMENT_TOKEN", &PathBuf::from("/x"))
    );

    let bad =
        "MESH_SAMPLE_SIZE = 5\nnonsense = 1\nwg_private_key = \"hunter2\"\nnode_id = { a = 1 }\n[pool]\nurl = 1\n";
    let errors = Errors(Source::toml("dvpn.toml", bad).map(|_| ()).unwrap_err());
    let text = errors.to_string();
    assert_eq!(errors.0.len(), 5, "{text}");
    for part in ["MESH_SAMPLE_SIZE", "nonsense", "wg_private_key_file", "node_id", "pool"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let broken = Source::toml("dvpn.toml", "a = 1\npayment_token = \"hunter2\n")
        .map(|_| ())
        .unwrap_err();
    assert_eq!(
        broken,
        [Error::Syntax {
            origin: "dvpn.toml".into(),
            line: 2
        }]
    );
}

#[test]
fn the_first_source_with_a_value_wins_and_unknown_variables_are_ignored() {
    let mut strong = Source::new("strong");
    strong.insert("NODE_PORT", Secret::new(" "));
    let environment = [("NODE_PORT", "7"), ("HOME", "/root"), ("PAYMENT_TOKEN_FILE", "/t")];
    let environment = Source::environment(environment.map(|(n, v)| (n.to_owned(), v.to_owned())));
    assert_eq!(environment.values.len(), 2);
    let weak = sources(&[("NODE_PORT", "8"), ("NODE_ID", "weak")]);
    let all: Vec<Source> = [strong, environment].into_iter().chain(weak).collect();
    let Ok(config) = parse(&all) else { panic!("refused") };
    assert_eq!((config.node.port, config.node.id.unwrap().as_str()), (7, "weak"));
}

#[test]
fn what_is_missing_is_no_error_but_stops_the_session_with_a_cure() {
    let missing = good(&[]).session(None).not_configured.unwrap();
    assert_eq!(missing.retry, Retry::Never);
    for part in ["POOL_URL", "PAYMENT_API_URL", "token"] {
        assert!(missing.what.contains(part), "{missing}");
    }
    let urls = [
        ("POOL_URL", "https://p/providers"),
        ("PAYMENT_API_URL", "https://p/payment"),
    ];
    let config = good(&urls);
    assert!(
        config
            .session(None)
            .not_configured
            .unwrap()
            .how
            .contains("the D-Bus method Payments")
    );
    let (real, development) = (Secret::new("dvpn_1"), Secret::new("dev_1"));
    assert_eq!(config.session(Some(&real)).not_configured, None);
    let refused = config.session(Some(&development)).not_configured.unwrap();
    assert!(refused.how.contains("DVPN_DEVELOPMENT"));
    let development_config = good(&[
        urls[0],
        urls[1],
        ("DVPN_DEVELOPMENT", "true"),
        ("PAYMENT_TOKEN", "dev_2"),
    ]);
    assert_eq!(development_config.session(None).not_configured, None);
    assert_eq!(
        development_config.token(Some(&real)).unwrap().expose(),
        "dev_2",
        "configured beats stored"
    );
    let session = good(&[("MESH_SAMPLE_SIZE", "9")]).session(None);
    assert!(!session.lockdown && !session.kill_switch && session.sample_size == 9 && !session.fallback);
}

#[test]
fn every_setting_of_the_table_is_read_and_its_wrong_value_is_noticed() {
    // A value that no kind but free text accepts: a setting that is not read would not complain.
    let free = [Kind::Text, Kind::Path];
    for setting in SETTINGS.iter().filter(|setting| !free.contains(&setting.kind)) {
        let text = errors(&[(setting.name, "\u{1}?")]);
        assert!(text.contains(setting.name), "{}: {text}", setting.name);
    }
}

#[test]
fn names_are_unique_and_every_document_has_them_all() {
    let names: BTreeSet<_> = SETTINGS.iter().map(|setting| setting.name).collect();
    assert_eq!(names.len(), SETTINGS.len());
    let (help, markdown, env, example) = (help_table(), markdown_table(), env_example(), toml_example());
    for setting in SETTINGS {
        assert!(help.contains(&format!("  {}=", setting.name)));
        assert!(markdown.contains(&format!("| `{}`", setting.name)));
        assert!(env.contains(&format!("\n{}={}\n", setting.name, setting.default)));
        assert!(example.contains(&setting.toml_key()));
    }
    assert_eq!(markdown.lines().count(), SETTINGS.len() + 2);
    assert!(
        markdown
            .lines()
            .all(|line| line.replace("\\|", "").matches('|').count() == 5),
        "{markdown}"
    );
}

#[test]
fn the_examples_read_as_the_defaults() {
    let uncommented: String =
        toml_example()
            .lines()
            .filter_map(|line| line.strip_prefix("# "))
            .fold(String::new(), |out, line| {
                // Keys only: prose has spaces before its first equals sign, if any.
                let is_key = line.split_once(" = ").is_some_and(|(key, _)| {
                    key.bytes()
                        .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
                });
                if is_key { format!("{out}{line}\n") } else { out }
            });
    assert_eq!(uncommented.lines().count(), SETTINGS.len());
    let source = Source::toml("example", &uncommented).unwrap_or_else(|errors| panic!("{}", Errors(errors)));
    assert!(parse(&[source]).is_ok());
    let variables = env_example();
    let variables = variables
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split_once('='));
    let source = Source::environment(variables.map(|(name, value)| (name.to_owned(), value.to_owned())));
    assert_eq!(source.values.len(), SETTINGS.len());
    assert!(parse(&[source]).is_ok());
}

#[test]
fn a_private_key_is_taken_as_wg_writes_it() {
    let text = format!("{}\n", STANDARD.encode([0x48; 32]));
    let key = good(&[("WG_PRIVATE_KEY", &text)]).tunnel.private_key.unwrap();
    assert_eq!(key.expose()[1], 0x48);
}

proptest! {
    #[test]
    fn no_value_makes_the_reader_panic(index in any::<prop::sample::Index>(), value in "\\PC{0,60}") {
        let setting = SETTINGS[index.index(SETTINGS.len())];
        if let Err(errors) = parse(&sources(&[(setting.name, &value)])) {
            let shown = errors.to_string();
            prop_assert!(!setting.secret || value.trim().len() < 8 || !shown.contains(value.trim()));
        }
    }

    #[test]
    fn no_file_makes_the_reader_panic(text in "[a-z_ =\"\\[\\]{}.,0-9\n]{0,200}") {
        drop(Source::toml("fuzz", &text));
    }
}

#[test]
fn what_is_asked_in_the_clear_is_plain_http_and_the_opening_is_short() {
    let config = good(&[
        ("CAPTIVE_PORTAL_URL", "http://check.example/x?y=1"),
        ("CAPTIVE_PORTAL_SECONDS", "900"),
    ]);
    assert_eq!(config.portal.url.unwrap().as_str(), "http://check.example/x?y=1");
    assert_eq!(config.portal.open_for, Duration::from_mins(15));
    for (name, value) in [
        ("CAPTIVE_PORTAL_URL", "https://check.example/"),
        ("CAPTIVE_PORTAL_URL", "check.example"),
        ("CAPTIVE_PORTAL_URL", "http://me:secret@check.example/"),
        ("CAPTIVE_PORTAL_SECONDS", "0"),
        ("CAPTIVE_PORTAL_SECONDS", "901"),
    ] {
        assert!(errors(&[(name, value)]).contains(name), "{value}");
    }
}
