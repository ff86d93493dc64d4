use base64::{Engine as _, engine::general_purpose::STANDARD};
use proptest::prelude::*;

use super::*;

fn now() -> Timestamp {
    Timestamp::from_second(1_800_000_000).unwrap()
}

fn key(number: u32) -> PublicKey {
    let mut bytes = [1; 32];
    bytes[..4].copy_from_slice(&number.to_be_bytes());
    PublicKey::from_bytes(bytes).unwrap()
}

fn entry(number: u32) -> serde_json::Value {
    let [_, _, high, low] = number.to_be_bytes();
    serde_json::json!({
        "id": format!("provider-{number}"), "endpoint": format!("9.9.{high}.{low}:51820"), "public_key": key(number).to_string(),
        "allowed_ips": ["0.0.0.0/0", "::/0"], "probe": format!("9.9.{high}.{low}:51821"), "region": "eu-west",
    })
}

fn changed(field: &str, value: serde_json::Value) -> String {
    let mut bad = entry(2);
    bad[field] = value;
    serde_json::json!({ "providers": [entry(1), bad] }).to_string()
}

fn read(body: &str) -> Result<Directory, Error> {
    parse(body.as_bytes(), &Policy::default(), &PoolRecord::default(), now())
}

#[test]
fn an_object_and_a_bare_array_are_the_same_list() {
    let object = serde_json::json!({ "providers": [entry(1), entry(2)], "version": 7, "signature": "x", "more": {} });
    let bare = serde_json::json!([entry(1), entry(2)]);
    let from_object = read(&object.to_string()).unwrap();
    assert_eq!(from_object.version, Some(7));
    assert_eq!(from_object.providers, read(&format!("\n {bare}")).unwrap().providers);
    let first = &from_object.providers[0];
    assert_eq!(first.id.as_str(), "provider-1");
    assert_eq!(first.probe, Some("9.9.0.1:51821".parse().unwrap()));
    assert_eq!(read("[]").unwrap(), Directory::default());
}

#[test]
fn the_contract_needs_only_three_fields() {
    let list = serde_json::json!([{ "id": "a", "endpoint": "[2606:4700::1]:1", "public_key": key(1).to_string() }]);
    let provider = &read(&list.to_string()).unwrap().providers[0];
    assert_eq!(
        provider.allowed_ips,
        ["0.0.0.0/0".parse().unwrap(), "::/0".parse().unwrap()]
    );
    assert_eq!((&provider.probe, &provider.region), (&None, &None));
}

#[test]
fn a_bad_field_refuses_the_list_and_is_named_with_its_entry() {
    use serde_json::json;
    for (field, value, reason) in [
        ("id", json!(""), "identifier"),
        ("id", json!("a b"), "identifier"),
        ("id", json!("provider-1"), "twice"),
        ("public_key", json!(STANDARD.encode([0; 32])), "zero"),
        ("public_key", json!("AAAA"), "base64"),
        ("public_key", json!(key(1).to_string()), "two providers"),
        ("endpoint", json!("9.9.9.9:0"), "port 0"),
        ("endpoint", json!("9.9.9.9"), "IP:port"),
        ("endpoint", json!("provider.example:51820"), "names are not looked up"),
        ("endpoint", json!("10.0.0.1:51820"), "not a public"),
        ("endpoint", json!("127.0.0.1:51820"), "not a public"),
        ("endpoint", json!("[::ffff:192.168.0.1]:51820"), "not a public"),
        ("endpoint", json!("224.0.0.1:51820"), "one host"),
        ("endpoint", json!("[fe80::1%2]:51820"), "zone"),
        ("probe", json!("9.9.9.8:51821"), "not at the endpoint"),
        ("probe", json!("9.9.0.2:0"), "port 0"),
        ("probe", json!("x"), "IP:port"),
        ("allowed_ips", json!(["0.0.0.0/33"]), "no prefix"),
        ("allowed_ips", json!(["default"]), "no prefix"),
        ("allowed_ips", json!([]), "1 to"),
        ("allowed_ips", json!(vec!["10.0.0.0/8"; MAX_ALLOWED_IPS + 1]), "1 to"),
        ("region", json!("a/b"), "identifier"),
    ] {
        match read(&changed(field, value.clone())) {
            Err(Error::Entry {
                index: 1,
                field: named,
                reason: why,
                ..
            }) => {
                assert_eq!(named, field, "{value}: {why}");
                assert!(why.contains(reason), "{value}: {why}");
            }
            other => panic!("{field} {value}: {other:?}"),
        }
    }
    for (field, value) in [
        ("id", json!(1)),
        ("endpoint", json!(null)),
        ("allowed_ips", json!("0.0.0.0/0")),
    ] {
        match read(&changed(field, value)) {
            Err(Error::Unreadable { reason }) => assert!(reason.contains("provider 1"), "{reason}"),
            other => panic!("{field}: {other:?}"),
        }
    }
}

#[test]
fn excerpts_in_errors_are_short_and_printable() {
    for list in [
        changed("endpoint", serde_json::json!(format!("\x1b[2J{}", "x".repeat(100_000)))),
        changed("id", serde_json::json!("\u{202e}".repeat(10_000))),
        changed("allowed_ips", serde_json::json!("y".repeat(100_000))),
    ] {
        let text = Failure::from(read(&list).unwrap_err()).to_string();
        assert!(text.len() < 600 && !text.contains(['\x1b', '\u{202e}']), "{text}");
    }
}

#[test]
fn duplicate_json_keys_and_broken_lists_are_refused() {
    let one = entry(1).to_string();
    let twice = one.replacen('{', "{\"id\":\"other\",", 1);
    for body in [
        String::new(),
        "null".into(),
        "\"x\"".into(),
        "{}".into(),
        "{\"providers\":null}".into(),
        "{\"providers\":{}}".into(),
        "<html></html>".into(),
        format!("[{twice}]"),
        format!("{{\"providers\":[{one}],\"providers\":[]}}"),
        format!("[{one}] x"),
        format!("[{one}"),
        format!("{{\"providers\":[{one}],\"version\":-1}}"),
        format!("{{\"providers\":[{one}],\"expires_at\":\"soon\"}}"),
        "[".repeat(100_000),
    ] {
        let result = read(&body);
        assert!(
            matches!(result, Err(Error::Unreadable { .. })),
            "{}: {result:?}",
            excerpt(&body)
        );
    }
}

#[test]
fn too_many_bytes_and_too_many_providers_are_refused() {
    let large = [b"[".as_slice(), &vec![b' '; MAX_LIST_BYTES]].concat();
    assert!(matches!(
        parse(&large, &Policy::default(), &PoolRecord::default(), now()),
        Err(Error::TooLarge { .. })
    ));
    let small = |count: u32| {
        let entries: Vec<_> = (0..count)
            .map(|n| {
                format!(
                    "{{\"id\":\"{n}\",\"endpoint\":\"9.9.9.9:1\",\"public_key\":\"{}\"}}",
                    key(n)
                )
            })
            .collect();
        format!("[{}]", entries.join(","))
    };
    assert_eq!(read(&small(10_000)).unwrap().providers.len(), MAX_PROVIDERS);
    assert_eq!(read(&small(10_001)), Err(Error::TooMany));
}

#[test]
fn an_expired_list_is_refused() {
    let list = |end: &str| serde_json::json!({ "providers": [entry(1)], "expires_at": end }).to_string();
    assert!(matches!(
        read(&list("2020-01-01T00:00:00Z")),
        Err(Error::Expired { .. })
    ));
    assert!(matches!(read(&list(&now().to_string())), Err(Error::Expired { .. })));
    assert!(read(&list("2100-01-01T00:00:00Z")).is_ok());
}

#[test]
fn our_own_key_refuses_the_list_and_our_own_node_is_left_out() {
    let list = serde_json::json!([entry(1), entry(2)]).to_string();
    let policy = |own_node| Policy {
        own_keys: &[],
        own_node,
        private_endpoints: false,
    };
    let own_keys = [key(2)];
    let refused = parse(
        list.as_bytes(),
        &Policy {
            own_keys: &own_keys,
            ..Policy::default()
        },
        &PoolRecord::default(),
        now(),
    );
    assert!(matches!(
        refused,
        Err(Error::Entry {
            index: 1,
            field: "public_key",
            ..
        })
    ));
    let ours = key(2);
    let (own, other) = ("provider-2".parse().unwrap(), "provider-9".parse().unwrap());
    let left = parse(
        list.as_bytes(),
        &policy(Some((&own, &ours))),
        &PoolRecord::default(),
        now(),
    )
    .unwrap();
    assert_eq!(left.providers.len(), 1);
    // Our provider key under another id is somebody playing us.
    assert!(
        parse(
            list.as_bytes(),
            &policy(Some((&other, &ours))),
            &PoolRecord::default(),
            now()
        )
        .is_err()
    );
}

#[test]
fn a_private_pool_may_list_private_addresses_but_no_impossible_ones() {
    let policy = Policy {
        private_endpoints: true,
        ..Policy::default()
    };
    let list = |endpoint: &str| {
        serde_json::json!([{ "id": "a", "endpoint": endpoint, "public_key": key(1).to_string() }]).to_string()
    };
    for good in ["10.0.0.1:1", "127.0.0.1:1", "[fd00::1]:1", "9.9.9.9:1"] {
        assert!(
            parse(list(good).as_bytes(), &policy, &PoolRecord::default(), now()).is_ok(),
            "{good}"
        );
    }
    for bad in [
        "0.0.0.0:1",
        "224.0.0.1:1",
        "255.255.255.255:1",
        "[::]:1",
        "[ff02::1]:1",
        "10.0.0.1:0",
    ] {
        assert!(
            parse(list(bad).as_bytes(), &policy, &PoolRecord::default(), now()).is_err(),
            "{bad}"
        );
    }
}

#[test]
fn host_bits_of_prefixes_are_cut() {
    let list = changed(
        "allowed_ips",
        serde_json::json!(["10.1.2.3/8", "192.0.2.1", "fd00::1/64"]),
    );
    let wanted: Vec<IpNetwork> = ["10.0.0.0/8", "192.0.2.1/32", "fd00::/64"]
        .iter()
        .map(|p| p.parse().unwrap())
        .collect();
    assert_eq!(read(&list).unwrap().providers[1].allowed_ips, wanted);
}

proptest! {
    #[test]
    fn nothing_makes_the_parser_panic(body in proptest::collection::vec(any::<u8>(), 0..400)) {
        if let Ok(directory) = parse(&body, &Policy::default(), &PoolRecord::default(), now()) {
            prop_assert!(directory.providers.iter().all(|p| p.endpoint.port() > 0));
        }
    }

    #[test]
    fn one_changed_byte_never_yields_an_unchecked_provider(at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let mut body = serde_json::json!([entry(1), entry(2)]).to_string().into_bytes();
        let at = at.index(body.len());
        body[at] = byte;
        if let Ok(directory) = parse(&body, &Policy::default(), &PoolRecord::default(), now()) {
            for provider in directory.providers {
                prop_assert!(is_global_unicast(provider.endpoint.ip()) && provider.endpoint.port() > 0);
                prop_assert!(provider.probe.is_none_or(|probe| probe.ip() == provider.endpoint.ip()));
            }
        }
    }
}
