//! Against real responders on loopback that delay, jitter and lose.

use std::net::Ipv4Addr;

use dvpn_common::keys::PublicKey;
use rand::RngExt;
use tokio::{net::UdpSocket, task::JoinHandle, time::sleep};

use super::*;

/// How a responder behaves.
#[derive(Clone, Copy)]
struct Line {
    delay_ms: f64,
    jitter_ms: f64,
    loss: f64,
    /// Answers this many times too many.
    copies: usize,
}

fn provider(id: &str, key: u8, probe: Option<SocketAddr>) -> Provider {
    Provider {
        id: id.parse().unwrap(),
        endpoint: (Ipv4Addr::LOCALHOST, 9).into(),
        public_key: PublicKey::from_bytes([key; 32]).unwrap(),
        allowed_ips: vec!["0.0.0.0/0".parse().unwrap()],
        probe,
        region: None,
    }
}

async fn responder(key: u8, line: Line) -> (SocketAddr, JoinHandle<()>) {
    let socket = std::sync::Arc::new(UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap());
    let address = socket.local_addr().unwrap();
    let key = EchoKey::new(&PublicKey::from_bytes([key; 32]).unwrap());
    let task = tokio::spawn(async move {
        let mut buffer = [0; 128];
        loop {
            let (length, from) = socket.recv_from(&mut buffer).await.unwrap();
            let Some(nonce) = key.open_request(&buffer[..length]) else {
                continue;
            };
            let (lost, shift) = {
                let mut random = rand::rng();
                (
                    random.random_bool(line.loss),
                    random.random_range(-1.0..=1.0) * line.jitter_ms,
                )
            };
            if lost {
                continue;
            }
            let (socket, reply) = (std::sync::Arc::clone(&socket), key.reply(nonce));
            tokio::spawn(async move {
                sleep(Duration::from_secs_f64((line.delay_ms + shift).max(0.0) / 1000.0)).await;
                for _ in 0..line.copies {
                    socket.send_to(&reply, from).await.unwrap();
                }
            });
        }
    });
    (address, task)
}

fn line(delay_ms: f64) -> Line {
    Line {
        delay_ms,
        jitter_ms: 1.0,
        loss: 0.02,
        copies: 1,
    }
}

#[tokio::test]
async fn the_nearest_of_three_lossy_candidates_wins() {
    let lines = [(1, 18.0), (2, 8.0), (3, 28.0)];
    let mut candidates = Vec::new();
    for (key, delay) in lines {
        candidates.push(provider(
            &format!("p{key}"),
            key,
            Some(responder(key, line(delay)).await.0),
        ));
    }
    let mut won = 0;
    for _ in 0..10 {
        let started = Instant::now();
        let measured = measure(candidates.clone(), Options::default()).await;
        assert!(started.elapsed() < Duration::from_millis(1_100));
        assert_eq!(
            measured.iter().map(|m| m.provider.as_str()).collect::<Vec<_>>(),
            ["p1", "p2", "p3"]
        );
        let best = measured
            .iter()
            .filter(|m| m.latency.is_some())
            .min_by_key(|m| m.latency)
            .unwrap();
        won += usize::from(best.provider.as_str() == "p2");
        assert!(best.latency.unwrap() >= Duration::from_millis(7));
    }
    assert!(won >= 9, "{won} of 10");
}

#[tokio::test]
async fn everybody_answering_ends_the_measurement_early() {
    let quick = Line {
        delay_ms: 2.0,
        jitter_ms: 0.0,
        loss: 0.0,
        copies: 1,
    };
    let candidates = vec![provider("a", 1, Some(responder(1, quick).await.0))];
    let started = Instant::now();
    let measured = measure(
        candidates,
        Options {
            deadline: Duration::from_secs(30),
            ..Options::default()
        },
    )
    .await;
    assert!(measured[0].latency.is_some());
    assert!(started.elapsed() < Duration::from_secs(10));
}

#[tokio::test]
async fn a_silent_candidate_has_no_latency_and_is_waited_for_a_while_only() {
    let silent = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let quick = Line {
        delay_ms: 2.0,
        jitter_ms: 0.0,
        loss: 0.0,
        copies: 1,
    };
    let candidates = vec![
        provider("silent", 1, Some(silent.local_addr().unwrap())),
        provider("a", 2, Some(responder(2, quick).await.0)),
    ];
    let started = Instant::now();
    let measured = measure(candidates, Options::default()).await;
    assert!(started.elapsed() >= Duration::from_millis(400));
    assert!(
        started.elapsed() < Duration::from_secs(1),
        "the deadline is for when nobody answers"
    );
    assert_eq!(measured[0].latency, None);
    assert!(measured[1].latency.is_some());
}

#[tokio::test]
async fn a_train_lost_to_the_last_request_is_repeated() {
    let heavy = Line {
        delay_ms: 1.0,
        jitter_ms: 0.0,
        loss: 0.6,
        copies: 1,
    };
    let candidates = vec![provider("a", 1, Some(responder(1, heavy).await.0))];
    let mut answered = 0;
    for _ in 0..20 {
        answered += usize::from(
            measure(candidates.clone(), Options::default()).await[0]
                .latency
                .is_some(),
        );
    }
    // 0.6^10 of ten requests go unanswered all: one measurement in 165.
    assert!(answered >= 18, "{answered} of 20");
}

#[tokio::test]
async fn duplicates_and_replies_by_others_do_not_count() {
    let twice = Line {
        delay_ms: 5.0,
        jitter_ms: 0.0,
        loss: 0.0,
        copies: 3,
    };
    let (honest, _) = responder(1, twice).await;
    // Knows only its own key, so what it sends does not open as the reply it should be.
    let (wrong_key, _) = responder(3, twice).await;
    let measured = measure(
        vec![
            provider("honest", 1, Some(honest)),
            provider("impostor", 2, Some(wrong_key)),
        ],
        Options {
            deadline: Duration::from_millis(500),
            ..Options::default()
        },
    )
    .await;
    assert!(measured[0].latency.unwrap() >= Duration::from_millis(5));
    assert_eq!(measured[1].latency, None);
}

#[tokio::test]
async fn a_candidate_without_an_echo_is_measured_by_icmp_and_labelled() {
    let measured = measure(vec![provider("a", 1, None)], Options::default()).await;
    assert_eq!(measured[0].method, ProbeMethod::Icmp);
    assert!(measured[0].latency.expect("ICMP needs CAP_NET_RAW or ping_group_range") < Duration::from_millis(500));
    let v6 = Provider {
        endpoint: "[::1]:9".parse().unwrap(),
        ..provider("b", 2, None)
    };
    let measured = measure(vec![v6], Options::default()).await;
    assert!(measured[0].latency.is_some());
}
