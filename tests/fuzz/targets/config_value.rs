//! One setting, chosen by the first byte, with any text: refused or understood, and a secret never shown.
#![no_main]

use dvpn_core::config::{SETTINGS, Secret, Source, parse};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((first, rest)) = data.split_first() else { return };
    let (Some(setting), Ok(text)) = (SETTINGS.get(usize::from(*first) % SETTINGS.len()), std::str::from_utf8(rest)) else {
        return;
    };
    let mut source = Source::new("fuzz");
    source.insert(setting.name, Secret::new(text));
    if let Err(errors) = parse(&[source]) {
        let shown = errors.to_string();
        assert!(shown.contains(setting.name) || setting.name.starts_with("SOCKS5") || setting.name.starts_with("NODE"));
        assert!(!setting.secret || text.trim().len() < 12 || !shown.contains(text.trim()));
    }
});
