//! The echo and the DNS forwarder on real sockets.

use std::{
    net::{SocketAddr, UdpSocket},
    time::{Duration, Instant},
};

use dvpn_common::{echo::EchoKey, keys::PublicKey};
use dvpn_daemon::provider::{EchoResponder, Forwarder};

use crate::namespace::Namespace;

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap()
}

fn asker(address: &str) -> UdpSocket {
    let socket = UdpSocket::bind(address).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    socket
}

fn answer(socket: &UdpSocket, to: SocketAddr, request: &[u8]) -> Option<Vec<u8>> {
    let mut buffer = [0; 4096];
    socket.send_to(request, to).unwrap();
    let (length, _) = socket.recv_from(&mut buffer).ok()?;
    Some(buffer[..length].to_vec())
}

#[test]
fn the_echo_answers_who_knows_the_key_and_nobody_else_and_not_without_end() {
    let _here = Namespace::enter_new();
    let runtime = runtime();
    let key = PublicKey::from_bytes([5; 32]).unwrap();
    let (port, stats) = runtime.block_on(async {
        let echo = EchoResponder::bind(0, &key).unwrap();
        let (port, stats) = (echo.local_addr().unwrap().port(), echo.stats());
        tokio::spawn(echo.run());
        (port, stats)
    });
    let to = SocketAddr::from(([127, 0, 0, 1], port));
    let good = EchoKey::new(&key);
    let client = asker("127.0.0.1:0");

    let reply = answer(&client, to, &good.request([1; 8])).expect("a valid request is answered");
    assert_eq!(good.open_reply(&reply), Some([1; 8]));
    assert!(reply.len() <= 64);
    let v6 = answer(
        &asker("[::1]:0"),
        format!("[::1]:{port}").parse().unwrap(),
        &good.request([2; 8]),
    );
    assert!(v6.is_some(), "both families");

    let stranger = EchoKey::new(&PublicKey::from_bytes([6; 32]).unwrap()).request([1; 8]);
    let mut longer = good.request([1; 8]).to_vec();
    longer.push(0);
    for bad in [&stranger[..], &longer, &good.reply([1; 8]), b"", &[0; 64]] {
        assert_eq!(answer(&client, to, bad), None, "{} bytes", bad.len());
    }
    assert_eq!(stats.ignored(), 5);

    let flood = asker("127.0.0.9:0");
    let mut answered = 0;
    let started = Instant::now();
    for _ in 0..200 {
        flood.send_to(&good.request([3; 8]), to).unwrap();
    }
    let mut buffer = [0; 64];
    while flood.recv(&mut buffer).is_ok() {
        answered += 1;
    }
    let allowed = 30 + started.elapsed().as_secs() * 10 + 10;
    assert!(
        answered >= 30 && answered <= allowed,
        "{answered} of 200 answered, at most {allowed} expected"
    );
    assert!(stats.limited() >= 100);
    assert!(
        answer(&asker("127.0.0.10:0"), to, &good.request([4; 8])).is_some(),
        "others are not affected"
    );
}

/// `example.` type A.
const QUESTION: &[u8] = b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x07example\x00\x00\x01\x00\x01";

#[test]
fn dns_at_the_gateway_relays_for_clients_only_and_takes_no_forged_answer() {
    let here = Namespace::enter_new();
    here.sh("ip addr add 10.96.0.1/20 dev lo; ip addr add 10.96.0.2/20 dev lo");
    let runtime = runtime();
    let resolver = UdpSocket::bind("127.0.0.1:0").unwrap();
    let upstream = resolver.local_addr().unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok((length, from)) = resolver.recv_from(&mut buffer) {
            let mut reply = buffer[..length].to_vec();
            assert_ne!(
                reply[..2],
                QUESTION[..2],
                "questions leave under an id of the node's own"
            );
            reply[2] |= 0x80;
            let mut forged = reply.clone();
            forged[0] ^= 0xff;
            resolver.send_to(&forged, from).unwrap();
            reply.extend_from_slice(b"true");
            resolver.send_to(&reply, from).unwrap();
        }
    });
    runtime.block_on(async {
        let forwarder = Forwarder::bind(vec!["10.96.0.1/20".parse().unwrap()], vec![upstream])
            .await
            .unwrap();
        tokio::spawn(forwarder.run());
    });
    let gateway: SocketAddr = "10.96.0.1:53".parse().unwrap();
    let reply = answer(&asker("10.96.0.2:0"), gateway, QUESTION).expect("a client is answered");
    assert_eq!(reply[..2], QUESTION[..2]);
    assert!(
        reply.ends_with(b"true"),
        "the forged answer came first and was not taken"
    );
    assert_eq!(answer(&asker("127.0.0.1:0"), gateway, QUESTION), None, "not a client");
    assert_eq!(
        answer(&asker("10.96.0.2:0"), gateway, &QUESTION[..20]),
        None,
        "not a question"
    );
}
