//! Writes the seeds: one good input of each kind, from which the fuzzer begins. `cargo run --bin seeds` in this folder.

use std::{fs, io, path::Path};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use dvpn_common::echo::EchoKey;
use dvpn_core::{config, seal};
use dvpn_fuzz::{approval, key, material, paid_body};

fn main() -> io::Result<()> {
    let write = |target: &str, name: &str, bytes: &[u8]| {
        fs::write(Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds").join(target).join(name), bytes)
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
    write("verify_answer", "nan.json", paid_body().replace("9.99", "NaN").as_bytes())?;
    write("approve_answer", "plain.json", br#"{"approved":true,"address":"10.96.0.2/32","gateways":["10.96.0.1"]}"#)?;
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
    write("config_file", "dvpn.toml", b"mesh_sample_size = 5\nproviders_only = [\"a\", \"region:de\"]\nlockdown = true\n")?;
    write("config_file", "secret.toml", b"payment_token_file = \"/etc/dvpn/token\"\nbandwidth_total_mbps = 2.5\n")?;
    let examples = config::SETTINGS.iter().map(|setting| setting.default).filter(|default| !default.is_empty());
    for (number, default) in examples.enumerate() {
        write("config_value", &format!("{number}"), format!("{}{default}", char::from(number as u8)).as_bytes())?;
    }
    let sealed = seal::seal(&material(), "token", b"secret token", [2; 16], [3; 12]).map_err(io::Error::other)?;
    write("sealed_file", "good", &sealed)?;
    write("echo_packet", "request", &EchoKey::new(&key(1)).request(*b"12345678"))?;
    write("echo_packet", "reply", &EchoKey::new(&key(1)).reply(*b"12345678"))
}
