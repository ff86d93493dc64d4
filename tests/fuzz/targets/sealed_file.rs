//! A sealed record: only the one that was sealed opens.
#![no_main]

use std::sync::LazyLock;

use dvpn_core::seal::{Key, salt_of};
use dvpn_fuzz::material;
use libfuzzer_sys::fuzz_target;

static KEY: LazyLock<Key> = LazyLock::new(|| Key::derive(&material(), [2; 16]).expect("a key"));

fuzz_target!(|data: &[u8]| {
    match KEY.open("token", data) {
        // The fuzzer does not hold the key: what opens is the seed, untouched.
        Ok(plaintext) => assert_eq!(plaintext.as_slice(), b"secret token"),
        Err(_) => drop(salt_of(data)),
    }
});
