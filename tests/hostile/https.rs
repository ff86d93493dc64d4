//! Servers that do what a pool must not. Each must end in a clear error, in its time, in bounded memory.

use std::{
    future::Future,
    io::{BufRead, BufReader, Write},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use dvpn_common::{
    contract::{ApproveRequest, VerifyRequest},
    limits::MAX_LIST_BYTES,
};
use dvpn_core::{Failure, Retry};
use dvpn_daemon::http::{
    CONNECT_TIMEOUT, Client, EXCHANGE_TIMEOUT, Error, LIST_TIMEOUT, Options, Payment, Pool, TlsProblem,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use crate::certificates::Certificates;

pub(crate) type Stream = TlsStream<TcpStream>;

/// Starts a TLS server; `answer` has each connection to itself after the handshake.
pub(crate) async fn serve<F, A>((certificate, key): (PathBuf, PathBuf), answer: A) -> SocketAddr
where
    A: Fn(Stream) -> F + Clone + Send + 'static,
    F: Future<Output = std::io::Result<()>> + Send,
{
    let certificates: Vec<_> = CertificateDer::pem_file_iter(certificate)
        .unwrap()
        .map(Result::unwrap)
        .collect();
    let key = PrivateKeyDer::from_pem_file(key).unwrap();
    let config = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(certificates, key)
        .unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (acceptor, answer) = (acceptor.clone(), answer.clone());
            tokio::spawn(async move {
                // Clients that refuse us are what half of these tests are about.
                if let Ok(stream) = acceptor.accept(stream).await {
                    answer(stream).await.ok();
                }
            });
        }
    });
    address
}

/// Reads one request: its head, and the body if it announces one.
async fn request(stream: &mut Stream) -> std::io::Result<String> {
    let mut text = Vec::new();
    loop {
        text.push(stream.read_u8().await?);
        if text.ends_with(b"\r\n\r\n") {
            break;
        }
    }
    let head = String::from_utf8_lossy(&text).to_lowercase();
    let length = head
        .lines()
        .find_map(|line| line.strip_prefix("content-length: ")?.parse().ok())
        .unwrap_or(0);
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await?;
    text.extend(body);
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// A server with a good certificate that answers every request with these bytes and closes.
pub(crate) async fn answering(bytes: Vec<u8>) -> (SocketAddr, Certificates) {
    let certificates = Certificates::new();
    let bytes = Arc::new(bytes);
    let address = serve(certificates.leaf("ca", "IP:127.0.0.1", None), move |mut stream| {
        let bytes = Arc::clone(&bytes);
        async move {
            request(&mut stream).await?;
            stream.write_all(&bytes).await?;
            stream.shutdown().await
        }
    })
    .await;
    (address, certificates)
}

fn pool(address: SocketAddr, ca: &Path) -> Pool {
    let url = format!("https://{address}/providers?token=secret").parse().unwrap();
    Pool::new(
        Client::new(Options {
            ca_file: Some(ca.to_owned()),
            ..Options::default()
        }),
        url,
    )
}

/// The error of a list, which names the server and nothing secret.
async fn list_error(address: SocketAddr, certificates: &Certificates) -> Error {
    let error = pool(address, &certificates.path("ca.pem"))
        .list()
        .await
        .expect_err("the list is refused");
    let text = error.to_string();
    assert!(text.contains(&format!("https://{address}/providers")), "{text}");
    let source = std::error::Error::source(&error)
        .map(ToString::to_string)
        .unwrap_or_default();
    assert!(
        !text.contains("secret") && !source.contains("secret"),
        "{text}; {source}"
    );
    error
}

pub(crate) fn head(status: &str, headers: &str) -> Vec<u8> {
    format!("HTTP/1.1 {status}\r\ncontent-type: application/json\r\n{headers}\r\n").into_bytes()
}

/// Peak resident memory of this process, in KiB. (Each test is a process of its own under nextest.)
pub(crate) fn peak_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

pub(crate) fn gzip(mut bytes: impl std::io::Read) -> Vec<u8> {
    let mut child = Command::new("gzip")
        .arg("-9c")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("gzip");
    let mut stdin = child.stdin.take().unwrap();
    let reader = std::thread::spawn(move || child.wait_with_output().unwrap().stdout);
    std::io::copy(&mut bytes, &mut stdin).unwrap();
    stdin.flush().unwrap();
    drop(stdin);
    reader.join().unwrap()
}

#[tokio::test]
async fn a_list_at_the_limit_is_read_and_one_byte_more_is_not() {
    let mut bytes = head("200 OK", "connection: close\r\n");
    bytes.extend(vec![b' '; MAX_LIST_BYTES]);
    let (address, certificates) = answering(bytes.clone()).await;
    assert_eq!(
        pool(address, &certificates.path("ca.pem")).list().await.unwrap().len(),
        MAX_LIST_BYTES
    );
    bytes.push(b' ');
    let (address, certificates) = answering(bytes).await;
    let error = list_error(address, &certificates).await;
    assert!(
        matches!(
            error,
            Error::TooLarge {
                limit: MAX_LIST_BYTES,
                ..
            }
        ),
        "{error}"
    );
}

#[tokio::test]
async fn five_megabytes_announced_are_refused_before_they_are_read() {
    let mut bytes = head("200 OK", "content-length: 5000000\r\n");
    bytes.extend(vec![b'x'; 100]);
    let (address, certificates) = answering(bytes).await;
    let error = list_error(address, &certificates).await;
    assert!(matches!(error, Error::TooLarge { .. }), "{error}");
}

#[tokio::test]
async fn a_gzip_bomb_is_given_up_at_the_limit_in_bounded_memory() {
    let bomb = gzip(std::io::Read::take(std::io::repeat(b' '), 500_000_000));
    assert!(bomb.len() < 1_000_000, "{}", bomb.len());
    let mut bytes = head(
        "200 OK",
        &format!("content-encoding: gzip\r\ncontent-length: {}\r\n", bomb.len()),
    );
    bytes.extend(bomb);
    let (address, certificates) = answering(bytes).await;
    let before = peak_kib();
    let error = list_error(address, &certificates).await;
    assert!(
        matches!(
            error,
            Error::TooLarge {
                limit: MAX_LIST_BYTES,
                ..
            }
        ),
        "{error}"
    );
    assert!(peak_kib() - before < 32 * 1024, "{} KiB more", peak_kib() - before);
}

#[tokio::test]
async fn an_honest_gzip_list_is_decoded() {
    let body = gzip(&b"{\"providers\":[]}"[..]);
    let mut bytes = head(
        "200 OK",
        &format!("content-encoding: gzip\r\ncontent-length: {}\r\n", body.len()),
    );
    bytes.extend(body);
    let (address, certificates) = answering(bytes).await;
    let list = pool(address, &certificates.path("ca.pem")).list().await.unwrap();
    assert_eq!(&list[..], b"{\"providers\":[]}");
}

#[tokio::test]
async fn a_redirect_is_not_followed_and_only_its_host_is_named() {
    let bytes = head(
        "302 Found",
        "location: https://evil.test/collect?token=secret\r\ncontent-length: 0\r\n",
    );
    let (address, certificates) = answering(bytes).await;
    let error = list_error(address, &certificates).await;
    let Error::Redirect { to, .. } = &error else {
        panic!("{error}")
    };
    assert_eq!(to, "https://evil.test");
}

#[tokio::test]
async fn a_truncated_body_is_no_list() {
    let mut bytes = head("200 OK", "content-length: 1000\r\n");
    bytes.extend(b"{\"providers\":[");
    let (address, certificates) = answering(bytes).await;
    let error = list_error(address, &certificates).await;
    assert!(matches!(error, Error::Broken { .. }), "{error}");
}

#[tokio::test]
async fn a_refusal_is_told_in_the_servers_words_without_control_characters() {
    let body = "{\"error\":\"closed \\u001b[2J for today\"}";
    let mut bytes = head(
        "503 Service Unavailable",
        &format!("content-length: {}\r\n", body.len()),
    );
    bytes.extend(body.as_bytes());
    let (address, certificates) = answering(bytes).await;
    let error = list_error(address, &certificates).await;
    assert!(
        error.to_string().contains("503") && error.to_string().contains("closed [2J for today"),
        "{error}"
    );
    assert_eq!(error.retry(), Retry::Backoff);
}

#[tokio::test]
async fn endless_headers_are_given_up() {
    let certificates = Certificates::new();
    let address = serve(certificates.leaf("ca", "IP:127.0.0.1", None), |mut stream| async move {
        request(&mut stream).await?;
        stream.write_all(b"HTTP/1.1 200 OK\r\n").await?;
        loop {
            stream
                .write_all(b"x-filler: xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx\r\n")
                .await?;
        }
    })
    .await;
    let before = peak_kib();
    let error = list_error(address, &certificates).await;
    assert!(matches!(error, Error::Broken { .. }), "{error}");
    assert!(peak_kib() - before < 32 * 1024, "{} KiB more", peak_kib() - before);
}

#[tokio::test]
async fn a_slow_drip_ends_at_the_total_limit() {
    let certificates = Certificates::new();
    let address = serve(certificates.leaf("ca", "IP:127.0.0.1", None), |mut stream| async move {
        request(&mut stream).await?;
        stream.write_all(&head("200 OK", "content-length: 100000\r\n")).await?;
        loop {
            stream.write_all(b" ").await?;
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    })
    .await;
    let started = Instant::now();
    let error = list_error(address, &certificates).await;
    assert!(
        matches!(
            error,
            Error::Timeout {
                what: "finish its answer",
                ..
            }
        ),
        "{error}"
    );
    assert!(started.elapsed() >= LIST_TIMEOUT && started.elapsed() < LIST_TIMEOUT + Duration::from_secs(3));
}

#[tokio::test]
async fn a_server_that_never_answers_ends_at_the_total_limit() {
    let certificates = Certificates::new();
    let address = serve(certificates.leaf("ca", "IP:127.0.0.1", None), |mut stream| async move {
        request(&mut stream).await?;
        std::future::pending().await
    })
    .await;
    let started = Instant::now();
    let error = list_error(address, &certificates).await;
    assert!(matches!(error, Error::Timeout { what: "answer", .. }), "{error}");
    assert!(started.elapsed() < LIST_TIMEOUT + Duration::from_secs(3));
}

#[tokio::test]
async fn a_server_that_never_shakes_hands_ends_at_the_connect_limit() {
    let certificates = Certificates::new();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let started = Instant::now();
    let error = list_error(listener.local_addr().unwrap(), &certificates).await;
    assert!(
        matches!(
            error,
            Error::Timeout {
                what: "accept a connection",
                ..
            }
        ),
        "{error}"
    );
    assert!(started.elapsed() < CONNECT_TIMEOUT + Duration::from_secs(3));
}

#[tokio::test]
async fn nobody_listening_is_no_connection() {
    let certificates = Certificates::new();
    let address = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let error = list_error(address, &certificates).await;
    assert!(matches!(error, Error::Connect { .. }), "{error}");
}

#[tokio::test]
async fn certificates_that_prove_nothing_are_refused_each_by_its_reason() {
    let ok = |mut stream: Stream| async move {
        request(&mut stream).await?;
        stream.write_all(&head("200 OK", "content-length: 2\r\n")).await?;
        stream.write_all(b"[]").await
    };
    let certificates = Certificates::new();
    let address = serve(certificates.leaf("ca", "IP:127.0.0.1", None), ok).await;
    pool(address, &certificates.path("ca.pem"))
        .list()
        .await
        .expect("the good certificate is accepted");
    let expired = Some(("20200101000000Z", "20200201000000Z"));
    let future = Some(("20900101000000Z", "20900201000000Z"));
    let cases = [
        ("stranger", "IP:127.0.0.1", None, TlsProblem::Untrusted),
        ("ca", "DNS:pool.test,IP:127.0.0.2", None, TlsProblem::WrongName),
        ("ca", "IP:127.0.0.1", expired, TlsProblem::Expired),
        ("ca", "IP:127.0.0.1", future, TlsProblem::Expired),
    ];
    for (authority, names, dates, expected) in cases {
        let address = serve(certificates.leaf(authority, names, dates), ok).await;
        let error = list_error(address, &certificates).await;
        let Error::Tls { problem, .. } = &error else {
            panic!("{expected:?}: {error}")
        };
        assert_eq!(*problem, expected, "{error}");
    }
}

#[tokio::test]
async fn plain_http_behind_an_https_address_is_named() {
    let certificates = Certificates::new();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut hello = [0; 512];
            assert!(stream.read(&mut hello).await.unwrap() > 0);
            stream
                .write_all(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")
                .await
                .unwrap();
        }
    });
    let error = list_error(address, &certificates).await;
    assert!(
        matches!(
            error,
            Error::Tls {
                problem: TlsProblem::NotTls,
                ..
            }
        ),
        "{error}"
    );
}

#[tokio::test]
async fn tls_1_1_is_refused() {
    let certificates = Certificates::new();
    let (certificate, key) = certificates.leaf("ca", "IP:127.0.0.1", None);
    let mut server = Command::new("openssl")
        .args([
            "s_server",
            "-accept",
            "127.0.0.1:0",
            "-tls1_1",
            "-cipher",
            "ALL:@SECLEVEL=0",
            "-www",
        ])
        .arg("-cert")
        .arg(certificate)
        .arg("-key")
        .arg(key)
        .current_dir(certificates.folder())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("openssl");
    let stdout = BufReader::new(server.stdout.take().unwrap());
    let address: SocketAddr = stdout
        .lines()
        .find_map(|line| line.ok()?.strip_prefix("ACCEPT ")?.trim().parse().ok())
        .expect("openssl says where it listens");
    // The server is one that works for a client of its time; otherwise the refusal would prove nothing.
    let old = Command::new("openssl")
        .args([
            "s_client",
            "-connect",
            &address.to_string(),
            "-tls1_1",
            "-cipher",
            "ALL:@SECLEVEL=0",
        ])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let error = list_error(address, &certificates).await;
    server.kill().unwrap();
    server.wait().unwrap();
    assert!(
        String::from_utf8_lossy(&old.stdout).contains("Protocol  : TLSv1.1"),
        "{old:?}"
    );
    assert!(
        matches!(
            error,
            Error::Tls {
                problem: TlsProblem::Version,
                ..
            }
        ),
        "{error}"
    );
}

#[tokio::test]
async fn ca_files_that_are_none_are_refused_with_their_name_and_without_retry() {
    let certificates = Certificates::new();
    for (file, content) in [
        ("missing.pem", None),
        ("empty.pem", Some("")),
        ("garbage.pem", Some("-----BEGIN")),
    ] {
        let path = certificates.path(file);
        if let Some(content) = content {
            std::fs::write(&path, content).unwrap();
        }
        let error = pool("127.0.0.1:1".parse().unwrap(), &path).list().await.unwrap_err();
        assert!(error.to_string().contains(file), "{error}");
        assert_eq!(Failure::from(error).retry, Retry::Never);
    }
}

#[tokio::test]
async fn verify_approve_and_list_share_one_connection_and_say_only_what_they_must() {
    let certificates = Certificates::new();
    let connections = Arc::new(AtomicUsize::new(0));
    let (seen, heard) = tokio::sync::mpsc::unbounded_channel();
    let mut heard: tokio::sync::mpsc::UnboundedReceiver<String> = heard;
    let counted = Arc::clone(&connections);
    let address = serve(certificates.leaf("ca", "IP:127.0.0.1", None), move |mut stream| {
        counted.fetch_add(1, Ordering::SeqCst);
        let seen = seen.clone();
        async move {
            loop {
                seen.send(request(&mut stream).await?).ok();
                let headers = "content-length: 2\r\nretry-after: 7\r\n";
                stream.write_all(&head("200 OK", headers)).await?;
                stream.write_all(b"{}").await?;
            }
        }
    })
    .await;
    let client = Client::new(Options {
        ca_file: Some(certificates.path("ca.pem")),
        ..Options::default()
    });
    let pool = Pool::new(client.clone(), format!("https://{address}/providers").parse().unwrap());
    let payment = Payment::new(client, format!("https://{address}/payment").parse().unwrap());
    pool.list().await.unwrap();
    let verify = VerifyRequest {
        token: "t".to_owned(),
        provider_id: "p".to_owned(),
        required_wallet: "w".to_owned(),
        required_price_usd: 9.99,
        required_interval: "monthly".to_owned(),
    };
    assert_eq!(payment.verify(&verify).await.unwrap().0, 200);
    let approve = ApproveRequest {
        provider_id: "p".to_owned(),
        token: "t".to_owned(),
        approved: true,
        client_public_key: None,
        proof: None,
        renews: None,
    };
    let answer = pool.approve(&approve, EXCHANGE_TIMEOUT).await.unwrap();
    assert_eq!((answer.status, answer.retry_after), (200, Some(Duration::from_secs(7))));
    payment
        .checkout_status(&"c1".parse().unwrap(), Some("s"))
        .await
        .unwrap();
    let expected = [
        "GET /providers HTTP/1.1",
        "POST /payment HTTP/1.1",
        "POST /providers/approve HTTP/1.1",
        "GET /payment/checkout/c1 HTTP/1.1",
    ];
    let allowed = [
        "accept",
        "accept-encoding",
        "authorization",
        "content-length",
        "content-type",
        "host",
        "user-agent",
    ];
    for line in expected {
        let request = heard.recv().await.unwrap();
        assert_eq!(request.lines().next(), Some(line));
        for header in request.split("\r\n\r\n").next().unwrap().lines().skip(1) {
            let (name, value) = header.split_once(": ").unwrap();
            assert!(allowed.contains(&name.to_lowercase().as_str()), "{header}");
            assert!(
                !name.eq_ignore_ascii_case("user-agent") || value.starts_with("dvpn/"),
                "{header}"
            );
        }
    }
    assert_eq!(connections.load(Ordering::SeqCst), 1);
}
