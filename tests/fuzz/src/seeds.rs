//! Writes the seeds: one good input of each kind, from which the fuzzer begins. `cargo run --bin seeds` in this folder.

use std::{fs, io, net::Ipv6Addr, path::Path};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use dvpn_common::echo::EchoKey;
use dvpn_core::{config, seal};
use dvpn_fuzz::{approval, key, material, paid_body, pool_key};

fn main() -> io::Result<()> {
    let write = |target: &str, name: &str, bytes: &[u8]| {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds").join(target);
        fs::create_dir_all(&folder)?;
        fs::write(folder.join(name), bytes)
    };
    let entry = format!(
        r#"{{"id":"provider-a","endpoint":"9.9.9.9:51820","public_key":"{}","allowed_ips":["0.0.0.0/0","::/0"],"probe":"9.9.9.9:51821","region":"eu-west"}}"#,
        key(1)
    );
    let list = format!(r#"{{"providers":[{entry}],"version":7,"expires_at":"2100-01-01T00:00:00Z","signature":"x"}}"#);
    write("provider_list", "object.json", list.as_bytes())?;
    write("provider_list", "array.json", format!("[{entry}]").as_bytes())?;
    write("verify_answer", "paid.json", paid_body().as_bytes())?;
    let with_end = paid_body().replacen('{', r#"{"expires_at":"2100-01-01T00:00:00Z","#, 1);
    write("verify_answer", "paid-until.json", with_end.as_bytes())?;
    write(
        "verify_answer",
        "nan.json",
        paid_body().replace("9.99", "NaN").as_bytes(),
    )?;
    write(
        "approve_answer",
        "plain.json",
        br#"{"approved":true,"address":"10.96.0.2/32","gateways":["10.96.0.1"]}"#,
    )?;
    let signed = format!(
        r#"{{"approved":true,"provider_id":"provider-a","addresses":["10.96.0.2/32","fd00::2/128"],"expires_at":"2027-01-15T09:00:00Z","approval":"{}","signature":"{}"}}"#,
        STANDARD.encode(approval().encode()),
        STANDARD.encode([7; 64])
    );
    write("approve_answer", "signed.json", signed.as_bytes())?;
    write("approval_bytes", "good", &approval().encode())?;
    let provision = format!(
        r#"{{"id":"fallback-1","endpoint":"9.9.9.9:51820","public_key":"{}","allowed_ips":["0.0.0.0/0"],"address":"10.96.0.2/32"}}"#,
        key(3)
    );
    write("provision_answer", "good.json", provision.as_bytes())?;
    write(
        "config_file",
        "dvpn.toml",
        b"mesh_sample_size = 5\nproviders_only = [\"a\", \"region:de\"]\nlockdown = true\n",
    )?;
    write(
        "config_file",
        "secret.toml",
        b"payment_token_file = \"/etc/dvpn/token\"\nbandwidth_total_mbps = 2.5\n",
    )?;
    let examples = config::SETTINGS
        .iter()
        .map(|setting| setting.default)
        .filter(|default| !default.is_empty());
    for (number, default) in examples.enumerate() {
        write(
            "config_value",
            &format!("{number}"),
            format!("{}{default}", char::from(number as u8)).as_bytes(),
        )?;
    }
    let sealed = seal::seal(&material(), "token", b"secret token", [2; 16], [3; 12]).map_err(io::Error::other)?;
    write("sealed_file", "good", &sealed)?;
    write("echo_packet", "request", &EchoKey::new(&key(1)).request(*b"12345678"))?;
    write("echo_packet", "reply", &EchoKey::new(&key(1)).reply(*b"12345678"))?;
    bodies(&write)?;
    event_stream(&write)?;
    packets(&write)?;
    socks5(&write)
}

type Write<'a> = &'a dyn Fn(&str, &str, &[u8]) -> io::Result<()>;

fn bodies(write: Write<'_>) -> io::Result<()> {
    let (client, other) = (key(2), key(3));
    let signature = STANDARD.encode([7; 64]);
    let pool = pool_key();
    let rotation = format!(r#"{{"from":"{}","to":"{pool}","signature":"{signature}"}}"#, key(8));
    let entry = format!(
        r#"{{"id":"provider-a","endpoint":"9.9.9.9:51820","public_key":"{}","allowed_ips":["0.0.0.0/0","::/0"],"probe":"9.9.9.9:51821","region":"eu-west"}}"#,
        key(1)
    );
    let plain = format!(r#"{{"id":"provider-b","endpoint":"9.9.9.8:51820","public_key":"{other}"}}"#);
    let list = format!(
        r#"{{"providers":[{entry},{plain}],"version":7,"expires_at":"2100-01-01T00:00:00Z","signature":"{signature}","pool_key":"{pool}","rotations":[{rotation}]}}"#
    );
    write("signed_directory", "list.json", list.as_bytes())?;
    write(
        "signed_directory",
        "empty.json",
        br#"{"providers":[],"version":0,"expires_at":"2100-01-01T00:00:00Z"}"#,
    )?;
    let terms = r#""required_wallet":"1MUss4jmaRJ2sMtS9gyZqeRw8WrhWTsrxn","required_price_usd":9.99,"required_interval":"monthly""#;
    let peer = peer_entry();
    let user = "00112233445566778899aabbccddeeff";
    for (name, body) in [
        ("list", list),
        ("bare", format!("[{plain}]")),
        ("verify", format!(r#"{{"token":"t","provider_id":"a",{terms}}}"#)),
        ("checkout", format!(r#"{{"user_id":"{user}",{terms}}}"#)),
        (
            "checkout-answer",
            format!(r#"{{"session_id":"{user}","checkout_url":"https://a/","bitcoin_uri":"bitcoin:a?amount=0.1","amount_btc":"0.1","amount_sats":10000000,"expires_at":"2100-01-01T00:00:00Z","secret":"s"}}"#),
        ),
        (
            "checkout-status",
            r#"{"status":"confirmed","confirmations":2,"required_confirmations":2,"token":"t"}"#.to_owned(),
        ),
        (
            "approve",
            format!(r#"{{"provider_id":"a","token":"t","approved":true,"client_public_key":"{client}","proof":{{"challenge":"{other}","mac":"{}"}},"renews":"{other}"}}"#, STANDARD.encode([1; 32])),
        ),
        ("challenge", format!(r#"{{"public_key":"{other}","expires_at":"2100-01-01T00:00:00Z"}}"#)),
        (
            "approve-answer",
            r#"{"approved":true,"provider_id":"a","addresses":["10.96.0.2/32"],"address":"10.96.0.2/32","gateways":["10.96.0.1"],"expires_at":"2100-01-01T00:00:00Z","approval":"AA==","signature":"AA==","error":""}"#.to_owned(),
        ),
        ("release", format!(r#"{{"provider_id":"a","token":"t","client_public_key":"{client}"}}"#)),
        (
            "register",
            format!(r#"{{"node_id":"a","endpoint":"9.9.9.9:51820","public_key":"{client}","probe":"9.9.9.9:51821","region":"eu-west","identity":"{pool}","leaving":true,"draining":true,"max_peers":250}}"#),
        ),
        (
            "register-answer",
            format!(r#"{{"listed":false,"reason":"closed","observed_address":"9.9.9.9","heartbeat_seconds":60,"pool_key":"{pool}","rotations":[{rotation}],"prober_key":"{other}","reachability":"no_handshake"}}"#),
        ),
        ("refusal", r#"{"error":"no"}"#.to_owned()),
        ("ack", format!(r#"{{"sequence":7,"refused":[{{"public_key":"{client}","reason":"full"}}]}}"#)),
        (
            "provision",
            format!(r#"{{"user_id":"{user}","token":"t","public_key":"{client}","timeout_seconds":120}}"#),
        ),
        (
            "provision-answer",
            format!(r#"{{"id":"fallback-1","endpoint":"9.9.9.9:51820","public_key":"{other}","allowed_ips":["0.0.0.0/0"],"address":"10.96.0.2/32","addresses":["10.96.0.2/32"],"gateways":["10.96.0.1"],"lease_id":"l","lease_expires_at":"2100-01-01T00:00:00Z"}}"#),
        ),
        ("snapshot", format!(r#"{{"sequence":7,"networks":["10.96.0.1/20","fd00::1/64"],"peers":[{peer}]}}"#)),
        ("added", format!(r#"{{"sequence":8,"peer":{peer}}}"#)),
        ("removed", format!(r#"{{"sequence":9,"public_key":"{client}"}}"#)),
    ] {
        write("http_body", &format!("{name}.json"), body.as_bytes())?;
    }
    Ok(())
}

fn peer_entry() -> String {
    format!(
        r#"{{"public_key":"{}","addresses":["10.96.0.2/32","fd00::2/128"],"expires_at":"2027-01-15T09:00:00Z","approval":"{}","signature":"{}","renews":"{}","released":true}}"#,
        key(2),
        STANDARD.encode(approval().encode()),
        STANDARD.encode([7; 64]),
        key(3)
    )
}

fn event_stream(write: Write<'_>) -> io::Result<()> {
    let (client, peer) = (key(2), peer_entry());
    let snapshot = format!(
        "id: 7\nevent: snapshot\ndata: {{\"sequence\":7,\ndata: \"networks\":[\"10.96.0.1/20\"],\"peers\":[{peer}]}}\n\n"
    );
    let changes = format!(
        "id: 8\nevent: add\ndata: {{\"sequence\":8,\"peer\":{peer}}}\n\n: ping\n\nid: 9\nevent: remove\ndata: {{\"sequence\":9,\"public_key\":\"{client}\"}}\n\nid: 10\nevent: release\ndata: {{\"sequence\":10,\"public_key\":\"{client}\"}}\n\nretry: 9\nevent: news\ndata\n\n"
    );
    write("event_stream", "snapshot", format!("\x07{snapshot}").as_bytes())?;
    write("event_stream", "changes", format!("\x40{changes}").as_bytes())?;
    write(
        "event_stream",
        "crlf",
        format!("\x01{}", changes.replace('\n', "\r\n")).as_bytes(),
    )?;
    write(
        "event_stream",
        "mark",
        format!("\x02\u{feff}{}", changes.replace('\n', "\r")).as_bytes(),
    )
}

fn packets(write: Write<'_>) -> io::Result<()> {
    let question = b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x07example\x03com\x00\x00\x41\x00\x01";
    let mut answer = question.to_vec();
    answer[..4].copy_from_slice(&[0x5a, 0xa5, 0x81, 0x80]);
    answer[7] = 1;
    answer.extend(b"\xc0\x0c\x00\x41\x00\x01\x00\x00\x00\x3c\x00\x03\x00\x01\x00");
    write(
        "dns_message",
        "https",
        &[&[0, question.len() as u8], &question[..], &answer].concat(),
    )?;

    // TCP over IPv4 and UDP over IPv6, three segments each; then one packet with its checksum to finish.
    let v4 = [0x45, 0, 0, 0, 0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
    let tcp = [3, 232, 1, 187, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x18, 1, 0, 0, 0, 0, 0];
    let v6 = [&[0x60, 0, 0, 0, 0, 0, 17, 64][..], &[0xfd; 16], &[0xfe; 16]].concat();
    let udp = [3, 232, 1, 187, 0, 0, 0, 0];
    let payload: Vec<u8> = (0..100).collect();
    let header = |kind: u8, segment: u8, start: u8, offset: u8| [1, kind, 0, 0, segment, 0, start, 0, offset, 0];
    write(
        "tun_frame",
        "tcp4",
        &[&header(1, 40, 20, 16)[..], &v4, &tcp, &payload].concat(),
    )?;
    write(
        "tun_frame",
        "udp6",
        &[&header(5, 40, 40, 6)[..], &v6, &udp, &payload].concat(),
    )?;
    write(
        "tun_frame",
        "tcp6",
        &[&header(4 | 0x80, 40, 40, 16)[..], &v6, &tcp, &payload].concat(),
    )?;
    write(
        "tun_frame",
        "plain",
        &[&header(0, 0, 40, 6)[..], &v6, &udp, &payload].concat(),
    )?;

    write("tun_batch", "tcp", &[1, 0, 2, 99, 9, 50, 0])?;
    write("tun_batch", "udp", &[1, 0, 1, 99, 9, 50, 0])?;
    let three = [1, 2, 2, 99, 9, 50, 0, 3, 49, 9, 20, 250, 0, 24, 9, 25, 9];
    let damaged: Vec<u8> = (0..40)
        .flat_map(|pick| [pick, 0xf1, pick, 1, 0xe2, 2, 0xd0, 1, 0xc1])
        .collect();
    write(
        "tun_batch",
        "three",
        &[&three[..], &(0..80).collect::<Vec<u8>>()].concat(),
    )?;
    write("tun_batch", "damaged", &[&three[..], &damaged].concat())
}

fn socks5(write: Write<'_>) -> io::Result<()> {
    let open = b"\x00\x05\x02\x00\x01";
    let login = b"\x01\x05\x02\x00\x02\x01\x04user\x08password";
    let name = b"\x05\x01\x00\x03\x0bexample.com\x01\xbb";
    let v4 = b"\x05\x03\x00\x01\x09\x09\x09\x09\x00\x35";
    let v6 = b"\x05\x02\x00\x04\x26\x06\x47\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x11\x11\x01\xbb";
    write("socks5_request", "name", &[&open[..], name, b"GET"].concat())?;
    write("socks5_request", "login", &[&login[..], v4].concat())?;
    write("socks5_request", "v6", &[&open[..], v6].concat())?;
    write("socks5_request", "wrong", &[&login[..14], b"passwore", v4].concat())?;
    let datagram = |address: &[u8]| [&[0, 0, 0], address, b"payload"].concat();
    write("socks5_datagram", "name", &datagram(&name[3..]))?;
    write("socks5_datagram", "v4", &datagram(&v4[3..]))?;
    write("socks5_datagram", "v6", &datagram(&v6[3..]))?;
    for (name, address) in [
        ("mapped", [0, 0, 0, 0, 0, 0xffff, 0x0808, 0x0808]),
        ("nat64", [0x64, 0xff9b, 0, 0, 0, 0, 0x0808, 0x0808]),
        ("6to4", [0x2002, 0x0808, 0x0808, 0, 0, 0, 0, 1]),
    ] {
        let octets = Ipv6Addr::from(address).octets();
        write(
            "socks5_datagram",
            name,
            &datagram(&[&[4][..], &octets, &[0, 53]].concat()),
        )?;
    }
    Ok(())
}
