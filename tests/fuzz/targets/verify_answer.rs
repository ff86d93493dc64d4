//! A verify answer: paid only if the four rules can be seen in the text, and an excerpt never carries controls.
#![no_main]

use dvpn_common::limits::{REQUIRED_INTERVAL, REQUIRED_WALLET};
use dvpn_core::payment::{Verification, judge};
use dvpn_fuzz::now;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    match judge(200, data, now()) {
        Verification::Paid(subscription) => {
            assert!(subscription.is_valid(now()) && subscription.verified_at() == now());
            let text = String::from_utf8_lossy(data);
            assert!(text.contains("true"));
            // Escapes may hide letters, nothing else may.
            assert!(text.contains('\\') || (text.contains(REQUIRED_WALLET) && text.contains(REQUIRED_INTERVAL)));
        }
        Verification::NotPaid(failure) | Verification::CannotTell(failure) => {
            assert!(!failure.to_string().contains(|c: char| c.is_control()));
            assert!(failure.to_string().chars().count() < 600);
        }
    }
    for status in [302, 403, 404, 500, 503] {
        assert!(matches!(judge(status, data, now()), Verification::CannotTell(_)));
    }
});
