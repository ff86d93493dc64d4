//! One setting, chosen by the first byte, with any text: refused or understood, and a secret never shown.
#![no_main]

use dvpn_core::config::{SETTINGS, Secret, Source, parse};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((first, rest)) = data.split_first() else { return };
    let (Some(setting), Ok(text)) = (SETTINGS.get(usize::from(*first) % SETTINGS.len()), std::str::from_utf8(rest)) else {
        return;
    };
    let errors_of = |text: &str| {
        let mut source = Source::new("fuzz");
        source.insert(setting.name, Secret::new(text));
        parse(&[source]).err().map(|errors| errors.to_string())
    };
    if let Some(shown) = errors_of(text) {
        assert!(shown.contains(setting.name) || setting.name.starts_with("SOCKS5") || setting.name.starts_with("NODE"));
        if setting.secret && text.trim().len() >= 12 {
            // A guess that happens to be a piece of our own words is shown for any other value as well.
            let ours = errors_of("x").is_some_and(|words| words.contains(text.trim()));
            assert!(ours || !shown.contains(text.trim()));
        }
    }
});
