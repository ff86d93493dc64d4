//! A datagram at the latency echo: a stranger's never opens.
#![no_main]

use dvpn_common::echo::EchoKey;
use dvpn_fuzz::key;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let echo = EchoKey::new(&key(1));
    if let Some(nonce) = echo.open_request(data) {
        assert_eq!(data, echo.request(nonce));
        assert!(echo.open_reply(&echo.reply(nonce)) == Some(nonce) && echo.reply(nonce).len() < data.len());
    }
    if let Some(nonce) = echo.open_reply(data) {
        assert_eq!(data, echo.reply(nonce));
    }
    assert!(EchoKey::new(&key(2)).open_request(data).is_none());
});
