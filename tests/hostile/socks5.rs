//! The proxy with real sockets: its clients misbehave, its tunnel comes and goes, and nothing leaves elsewhere.

use std::{
    net::{IpAddr, SocketAddr},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use dvpn_daemon::socks5::{Credentials, Metrics, TunnelPath, serve};
use rand::{Rng, RngExt, SeedableRng, rngs::StdRng};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UdpSocket},
    sync::watch,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use crate::network::{Capture, GATEWAY, NEAR, Network, SERVER};

const LIMIT: Duration = Duration::from_secs(20);

struct Proxy {
    address: SocketAddr,
    tunnel: watch::Sender<Option<Arc<TunnelPath>>>,
    metrics: Arc<Metrics>,
}

fn path() -> Arc<TunnelPath> {
    let dns = SocketAddr::new(GATEWAY.into(), 53);
    Arc::new(TunnelPath::new("dvpn0", &[NEAR.into()], &[GATEWAY.into()], &[dns]).unwrap())
}

impl Proxy {
    async fn start(tunnel: Option<Arc<TunnelPath>>, credentials: Option<Credentials>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (sender, receiver) = watch::channel(tunnel);
        let metrics = Arc::new(Metrics::default());
        tokio::spawn(serve(
            listener,
            credentials,
            receiver,
            Arc::clone(&metrics),
            CancellationToken::new(),
        ));
        Self {
            address,
            tunnel: sender,
            metrics,
        }
    }

    /// Sends a request after a greeting without authentication; returns the stream, the reply's code and its address.
    async fn ask(&self, command: u8, destination: &[u8]) -> (TcpStream, u8, SocketAddr) {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        stream.write_all(&[5, 1, 0]).await.unwrap();
        let mut method = [0; 2];
        stream.read_exact(&mut method).await.unwrap();
        assert_eq!(method, [5, 0]);
        stream
            .write_all(&[&[5, command, 0], destination].concat())
            .await
            .unwrap();
        let mut reply = [0; 10];
        timeout(LIMIT, stream.read_exact(&mut reply))
            .await
            .expect("a reply in time")
            .unwrap();
        assert_eq!((reply[0], reply[3]), (5, 1));
        let ip: [u8; 4] = reply[4..8].try_into().unwrap();
        (
            stream,
            reply[1],
            SocketAddr::new(IpAddr::from(ip), u16::from_be_bytes([reply[8], reply[9]])),
        )
    }

    async fn connect(&self, destination: &[u8]) -> (TcpStream, u8) {
        let (stream, code, _) = self.ask(1, destination).await;
        (stream, code)
    }
}

fn v4(address: [u8; 4], port: u16) -> Vec<u8> {
    [&[1][..], &address, &port.to_be_bytes()].concat()
}

fn name(name: &str, port: u16) -> Vec<u8> {
    [
        &[3, u8::try_from(name.len()).unwrap()],
        name.as_bytes(),
        &port.to_be_bytes(),
    ]
    .concat()
}

async fn line(stream: &mut TcpStream) -> String {
    let mut text = Vec::new();
    while !text.ends_with(b"\n") {
        text.push(timeout(LIMIT, stream.read_u8()).await.unwrap().unwrap());
    }
    String::from_utf8(text).unwrap()
}

#[test]
fn connections_leave_by_the_tunnel_with_names_resolved_in_it_and_half_close_works() {
    let network = Network::new("connect");
    network.start_far();
    network.near(async {
        let capture = Capture::open("uplink");
        capture.prove().await;
        let proxy = Proxy::start(Some(path()), None).await;
        for destination in [v4(SERVER.octets(), 7), name("web.test", 7), name("203.0.113.80", 7)] {
            let (mut stream, code) = proxy.connect(&destination).await;
            assert_eq!(code, 0);
            assert_eq!(line(&mut stream).await, format!("{NEAR}\n"));
            stream.write_all(b"hello").await.unwrap();
            stream.shutdown().await.unwrap();
            let mut rest = String::new();
            timeout(LIMIT, stream.read_to_string(&mut rest)).await.unwrap().unwrap();
            assert_eq!(rest, "helloend", "what comes after our half is closed arrives");
        }
        assert_eq!(capture.count(), 0);
    });
}

#[test]
fn destinations_inside_are_refused_after_resolution_too_and_bind_always() {
    let network = Network::new("refuse");
    network.start_far();
    network.near(async {
        let proxy = Proxy::start(Some(path()), None).await;
        let captures = [Capture::open("uplink"), Capture::open("dvpn0")];
        captures[0].prove().await;
        let mapped = [
            &[4][..],
            &"::ffff:10.96.0.1".parse::<std::net::Ipv6Addr>().unwrap().octets(),
            &[0, 7],
        ]
        .concat();
        let refused = [
            v4([127, 0, 0, 1], proxy.address.port()),
            v4(GATEWAY.octets(), 7),
            v4(NEAR.octets(), 7),
            v4([169, 254, 169, 254], 7),
            v4([192, 168, 1, 1], 7),
            v4([224, 0, 0, 1], 7),
            v4(SERVER.octets(), 0),
            name("127.0.0.1", 7),
            name("localhost", 7),
            name("::1", 7),
        ];
        for destination in refused.iter().chain([&mapped]) {
            assert_ne!(proxy.connect(destination).await.1, 0, "{destination:?}");
        }
        assert_eq!(captures.each_ref().map(Capture::count), [0, 0], "refusals send nothing");
        for inside in ["inside.test", "metadata.test"] {
            assert_eq!(proxy.connect(&name(inside, 7)).await.1, 2, "{inside}");
        }
        assert_eq!(proxy.connect(&name("missing.test", 7)).await.1, 4);
        assert_eq!(
            proxy.connect(&v4(SERVER.octets(), 8)).await.1,
            5,
            "refused by the server"
        );
        assert_eq!(proxy.ask(2, &v4(SERVER.octets(), 7)).await.1, 7, "BIND");
        assert_eq!(captures[0].count(), 0);
    });
}

#[test]
fn without_a_tunnel_everything_is_unreachable_and_no_packet_leaves() {
    let network = Network::new("none");
    network.start_far();
    network.near(async {
        let captures = [Capture::open("uplink"), Capture::open("dvpn0")];
        captures[0].prove().await;
        let proxy = Proxy::start(None, None).await;
        for destination in [v4(SERVER.octets(), 7), name("web.test", 7)] {
            for command in [1, 3] {
                assert_eq!(proxy.ask(command, &destination).await.1, 3);
            }
        }
        // A tunnel whose interface is gone.
        proxy
            .tunnel
            .send(Some(Arc::new(
                TunnelPath::new("gone0", &[NEAR.into()], &[], &[SocketAddr::new(GATEWAY.into(), 53)]).unwrap(),
            )))
            .unwrap();
        for destination in [v4(SERVER.octets(), 7), name("web.test", 7)] {
            assert_ne!(proxy.connect(&destination).await.1, 0);
        }
        assert_eq!(captures.each_ref().map(Capture::count), [0, 0]);
    });
}

#[test]
fn a_lost_or_replaced_tunnel_resets_what_is_open_at_once() {
    let network = Network::new("lost");
    network.start_far();
    network.near(async {
        let proxy = Proxy::start(Some(path()), None).await;
        for next in [Some(path()), None] {
            let (mut stream, code) = proxy.connect(&v4(SERVER.octets(), 7)).await;
            assert_eq!(code, 0);
            line(&mut stream).await;
            let (mut association, code, _) = proxy.ask(3, &v4([0; 4], 0)).await;
            assert_eq!(code, 0);
            proxy.tunnel.send(next).unwrap();
            for stream in [&mut stream, &mut association] {
                let ended = timeout(Duration::from_secs(2), stream.read_u8())
                    .await
                    .expect("closed at once");
                assert_eq!(ended.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
            }
        }
        assert_eq!(proxy.metrics.reset_total.load(Ordering::Relaxed), 4);
    });
}

#[test]
fn datagrams_are_relayed_for_the_one_client_only() {
    let network = Network::new("udp");
    network.start_far();
    network.near(async {
        let capture = Capture::open("uplink");
        capture.prove().await;
        let proxy = Proxy::start(Some(path()), None).await;
        let (association, code, relay) = proxy.ask(3, &v4([0; 4], 0)).await;
        assert_eq!((code, relay.ip()), (0, proxy.address.ip()));
        let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let mut buffer = vec![0; 65_535];
        for destination in [v4(SERVER.octets(), 7), name("web.test", 7)] {
            let source = format!("{NEAR} ");
            for size in [0, 1, 1_200] {
                let payload = vec![b'x'; size];
                client
                    .send_to(&[&[0, 0, 0], &destination[..], &payload].concat(), relay)
                    .await
                    .unwrap();
                let (length, from) = timeout(LIMIT, client.recv_from(&mut buffer)).await.unwrap().unwrap();
                assert_eq!(from, relay);
                let expected = [&[0, 0, 0][..], &v4(SERVER.octets(), 7), source.as_bytes(), &payload];
                assert_eq!(buffer[..length], expected.concat());
            }
        }
        // None of these is answered: a fragment, an inside destination by address and by name, garbage, a stranger.
        let stranger = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let good = [&[0, 0, 0], &v4(SERVER.octets(), 7)[..], b"?"].concat();
        stranger.send_to(&good, relay).await.unwrap();
        for bad in [
            [&[0, 0, 1], &v4(SERVER.octets(), 7)[..], b"?"].concat(),
            [&[0, 0, 0], &v4(GATEWAY.octets(), 53)[..], b"?"].concat(),
            [&[0, 0, 0], &name("inside.test", 53)[..], b"?"].concat(),
            vec![],
            vec![0, 0, 0, 9, 9],
        ] {
            client.send_to(&bad, relay).await.unwrap();
        }
        client.send_to(&[&good[..], b"last"].concat(), relay).await.unwrap();
        let (length, _) = timeout(LIMIT, client.recv_from(&mut buffer)).await.unwrap().unwrap();
        assert!(buffer[..length].ends_with(b"?last"));
        assert!(stranger.try_recv_from(&mut buffer).is_err());
        assert_eq!(capture.count(), 0);
        // With the TCP connection the relay goes.
        drop(association);
        timeout(LIMIT, async {
            while proxy.metrics.active.load(Ordering::Relaxed) > 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await
        .unwrap();
        UdpSocket::bind(relay).await.expect("the relay's port is free again");
    });
}

#[test]
fn a_password_is_required_where_one_is_set() {
    let network = Network::new("auth");
    network.start_far();
    network.near(async {
        let proxy = Proxy::start(Some(path()), Some(Credentials::new("user", "password"))).await;
        let greet = async |methods: &[u8]| {
            let mut stream = TcpStream::connect(proxy.address).await.unwrap();
            stream
                .write_all(&[&[5, u8::try_from(methods.len()).unwrap()], methods].concat())
                .await
                .unwrap();
            let mut method = [0; 2];
            stream.read_exact(&mut method).await.unwrap();
            (stream, method[1])
        };
        assert_eq!(greet(&[0]).await.1, 0xff, "no authentication is not on offer");
        for (user, password, accepted) in [
            ("user", "password", true),
            ("user", "passwort", false),
            ("", "", false),
            ("password", "user", false),
        ] {
            let (mut stream, method) = greet(&[0, 2]).await;
            assert_eq!(method, 2);
            let field = |text: &str| [&[u8::try_from(text.len()).unwrap()], text.as_bytes()].concat();
            stream
                .write_all(&[&[1][..], &field(user), &field(password)].concat())
                .await
                .unwrap();
            let mut answer = [0; 2];
            stream.read_exact(&mut answer).await.unwrap();
            assert_eq!(answer, [1, u8::from(!accepted)]);
            if accepted {
                stream
                    .write_all(&[&[5, 1, 0], &v4(SERVER.octets(), 7)[..]].concat())
                    .await
                    .unwrap();
                let mut reply = [0; 10];
                stream.read_exact(&mut reply).await.unwrap();
                assert_eq!(reply[1], 0);
            } else {
                assert!(stream.read_u8().await.is_err(), "closed");
            }
        }
    });
}

#[test]
fn garbage_handshakes_end_and_the_proxy_goes_on() {
    let network = Network::new("garbage");
    network.start_far();
    network.near(async {
        let proxy = Proxy::start(Some(path()), None).await;
        let mut random = StdRng::seed_from_u64(1);
        for round in 0..500 {
            let mut bytes = vec![0; random.random_range(0..300)];
            random.fill_bytes(&mut bytes);
            // Half of them begin as they should.
            if round % 2 == 0 {
                bytes.splice(0..0, [5, 1, 0, 5]);
            }
            let mut stream = TcpStream::connect(proxy.address).await.unwrap();
            stream.write_all(&bytes).await.ok();
            stream.shutdown().await.ok();
            let mut answer = Vec::new();
            timeout(LIMIT, stream.read_to_end(&mut answer))
                .await
                .expect("ended")
                .ok();
        }
        let (mut stream, code) = proxy.connect(&v4(SERVER.octets(), 7)).await;
        assert_eq!(code, 0);
        assert_eq!(line(&mut stream).await, format!("{NEAR}\n"));
    });
}
