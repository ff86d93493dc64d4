//! A TOML file.
#![no_main]

use dvpn_core::config::{Errors, Source, parse};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    match Source::toml("fuzz", text) {
        Ok(source) => {
            if let Err(errors) = parse(&[source]) {
                assert!(!errors.to_string().is_empty());
            }
        }
        Err(errors) => assert!(!Errors(errors).to_string().is_empty()),
    }
});
