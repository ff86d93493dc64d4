//! What a SOCKS5 client says up to its request. The first byte chooses whether it needs a password.
#![no_main]
#![allow(dead_code, reason = "the files are the daemon's")]

#[path = "../../../dvpn-daemon/src/socks5/auth.rs"]
mod auth;
#[path = "../../../dvpn-daemon/src/socks5/negotiation.rs"]
mod negotiation;

use auth::Credentials;
use fast_socks5::Socks5Command;
use futures::FutureExt;
use libfuzzer_sys::fuzz_target;

const LOGIN: &[u8] = b"\x01\x04user\x08password";

/// What the client has to send, and how it was answered, when the request is `rest` and what came after it.
fn expected<'a>(sent: &'a [u8], password: bool) -> Option<(&'a [u8], Vec<u8>)> {
    let ([5, count], rest) = sent.split_first_chunk()? else {
        return None;
    };
    let (methods, rest) = rest.split_at_checked(usize::from(*count))?;
    if !methods.contains(&if password { 2 } else { 0 }) {
        return None;
    }
    if password {
        return Some((rest.strip_prefix(LOGIN)?, vec![5, 2, 1, 0]));
    }
    Some((rest, vec![5, 0]))
}

fuzz_target!(|data: &[u8]| {
    let Some((first, sent)) = data.split_first() else {
        return;
    };
    let credentials = (first & 1 != 0).then(|| Credentials::new("user", "password"));
    let mut answers = Vec::new();
    let stream = tokio::io::join(sent, &mut answers);
    // Memory is always ready.
    let read = negotiation::read(stream, credentials.as_ref())
        .now_or_never()
        .expect("it waits for nothing");
    let Ok((client, command, destination)) = read else {
        // Nobody is told more than which method, that it was wrong, and why not.
        assert!(answers.len() <= 2 + 2 + 10);
        return;
    };
    let (request, answered) = expected(sent, credentials.is_some()).expect("only who may is read");
    let [5, code, _reserved, rest @ ..] = request else {
        panic!("no request of version 5")
    };
    assert_eq!(
        *code,
        match command {
            Socks5Command::TCPConnect => 1,
            Socks5Command::TCPBind => 2,
            Socks5Command::UDPAssociate => 3,
        }
    );
    let after = rest
        .strip_prefix(&destination.to_be_bytes().expect("it was read")[..])
        .expect("where it wants to go");
    let bound = "192.0.2.1:9".parse().expect("an address");
    let stream = client
        .reply_success(bound)
        .now_or_never()
        .expect("it waits for nothing")
        .expect("memory");
    assert_eq!(
        *stream.reader(),
        after,
        "what comes after the request is the destination's"
    );
    let reply = [5, 0, 0, 1, 192, 0, 2, 1, 0, 9];
    assert_eq!(**stream.writer(), [&answered[..], &reply].concat());
});
