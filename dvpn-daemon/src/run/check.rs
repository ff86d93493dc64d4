//! `--check-config`: what can be told about a configuration without running it.

use std::process::ExitCode;

use dvpn_core::config::Config;

use super::{chain, complain, print};
use crate::{http, logs, settings::EXIT_CONFIG};

/// Names what would fail when it is used, then what is missing or surprising.
pub fn check_config(config: &Config) -> ExitCode {
    let wrong = wrong(config);
    if !wrong.is_empty() {
        complain(&wrong.join("\n"));
        return ExitCode::from(EXIT_CONFIG);
    }
    let notes = config.remarks().into_iter().map(|remark| format!("note: {remark}\n"));
    print(&format!("the configuration is good\n{}", notes.collect::<String>()))
}

fn wrong(config: &Config) -> Vec<String> {
    let mut wrong: Vec<String> = logs::filter(&config.log).err().into_iter().collect();
    let of_fallback = config.fallback.ca_cert.iter().filter(|_| config.fallback.enabled);
    for file in config.ssl_cert_file.iter().chain(of_fallback) {
        let options = http::Options {
            ca_file: Some(file.clone()),
            ..http::Options::default()
        };
        wrong.extend(http::client(&options).err().map(|error| chain(&error)));
    }
    wrong
}

#[cfg(test)]
mod tests {
    use dvpn_core::config::{Secret, Source, parse};

    #[test]
    fn what_would_fail_in_use_is_named_before() {
        for (name, value, words) in [
            ("DVPN_LOG", "info", None),
            ("DVPN_LOG", "dvpn_daemon=loud", Some("DVPN_LOG")),
            ("SSL_CERT_FILE", "/nowhere/ca.crt", Some("/nowhere/ca.crt")),
            // Read at all only where it is used.
            ("FALLBACK_CA_CERT", "/nowhere/ca.crt", None),
        ] {
            let mut source = Source::new("test");
            source.insert(name, Secret::new(value));
            let wrong = super::wrong(&parse(&[source]).unwrap());
            match words {
                None => assert!(wrong.is_empty(), "{wrong:?}"),
                Some(words) => assert!(wrong.len() == 1 && wrong[0].contains(words), "{wrong:?}"),
            }
        }
    }
}
