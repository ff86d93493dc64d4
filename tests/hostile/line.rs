//! Speed servers that do not what they should: none makes a line look like something, lasts, or fills memory.

use std::{
    net::SocketAddr,
    sync::{Arc, atomic::AtomicU64, atomic::Ordering},
    time::{Duration, Instant},
};

use dvpn_common::rate::Rate;
use dvpn_core::Failure;
use dvpn_daemon::{
    http::{self, Client, Options},
    line::{Error, Limits, measure},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::watch,
};

use crate::{
    certificates::Certificates,
    https::{Stream, answering, gzip, head, peak_kib, serve},
};

const TIME: Duration = Duration::from_secs(1);
const PAYLOAD: u64 = 20_000_000;
const MEGABYTE: usize = 1_000_000;

/// What was measured, and how much that moved.
async fn measured(address: SocketAddr, certificates: &Certificates) -> (Result<(u64, Option<u64>), Error>, u64) {
    let client = Client::new(Options {
        ca_file: Some(certificates.path("ca.pem")),
        ..Options::default()
    });
    let url = format!("https://{address}/speed").parse().unwrap();
    let limits = Limits {
        time: TIME,
        payload: PAYLOAD,
    };
    let moved = Arc::new(AtomicU64::new(0));
    let result = measure(&client, &url, limits, &moved, &watch::Sender::new(0)).await;
    let bits = result.map(|(down, up)| (down.bits_per_second(), up.map(Rate::bits_per_second)));
    (bits, moved.load(Ordering::Relaxed))
}

/// A server that answers GET with `get` and POST, once it has the body, with `post`.
async fn speaking(get: Vec<u8>, post: Vec<u8>) -> (SocketAddr, Certificates) {
    serving(move |stream, wish| {
        let (get, post) = (get.clone(), post.clone());
        async move {
            let mut stream = stream;
            match wish.body {
                None => stream.write_all(&get).await?,
                Some(length) => {
                    swallow(&mut stream, length).await?;
                    stream.write_all(&post).await?;
                }
            }
            stream.shutdown().await
        }
    })
    .await
}

/// What a client asked for.
#[derive(Clone)]
struct Wish {
    line: String,
    body: Option<u64>,
}

async fn serving<F, A>(answer: A) -> (SocketAddr, Certificates)
where
    A: Fn(Stream, Wish) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = std::io::Result<()>> + Send,
{
    let certificates = Certificates::new();
    let address = serve(certificates.leaf("ca", "IP:127.0.0.1", None), move |mut stream| {
        let answer = answer.clone();
        async move {
            let wish = wish(&mut stream).await?;
            answer(stream, wish).await
        }
    })
    .await;
    (address, certificates)
}

async fn wish(stream: &mut Stream) -> std::io::Result<Wish> {
    let mut text = Vec::new();
    while !text.ends_with(b"\r\n\r\n") {
        text.push(stream.read_u8().await?);
    }
    let text = String::from_utf8_lossy(&text).to_lowercase();
    let body = text
        .lines()
        .find_map(|line| line.strip_prefix("content-length: ")?.parse().ok());
    let line = text.lines().next().unwrap_or_default().to_owned();
    Ok(Wish { line, body })
}

async fn swallow(stream: &mut Stream, mut length: u64) -> std::io::Result<()> {
    let mut buffer = vec![0; 64 * 1024];
    while length > 0 {
        let read = stream.read(&mut buffer).await?;
        if read == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        length -= read as u64;
    }
    Ok(())
}

/// A whole answer of this many bytes.
fn file(bytes: usize) -> Vec<u8> {
    let mut answer = head("200 OK", &format!("connection: close\r\ncontent-length: {bytes}\r\n"));
    answer.resize(answer.len() + bytes, b'x');
    answer
}

fn no() -> Vec<u8> {
    head("405 Method Not Allowed", "connection: close\r\ncontent-length: 0\r\n")
}

/// The upload is not known, and why the download is not either.
async fn failure(get: Vec<u8>) -> Failure {
    let (address, certificates) = speaking(get, no()).await;
    let started = Instant::now();
    let (result, moved) = measured(address, &certificates).await;
    assert!(
        started.elapsed() < Duration::from_secs(20) && moved < 2 * PAYLOAD,
        "{moved} bytes"
    );
    Failure::from(result.expect_err("it is not measured"))
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_that_measure_nothing_are_refused_with_what_to_do() {
    let bomb = gzip(std::io::Read::take(std::io::repeat(b' '), 50_000_000));
    let mut zipped = head(
        "200 OK",
        &format!("content-encoding: gzip\r\ncontent-length: {}\r\n", bomb.len()),
    );
    zipped.extend(bomb);
    let cases = [
        (
            "a redirect",
            head(
                "302 Found",
                "location: https://evil.test/?a=secret\r\ncontent-length: 0\r\n",
            ),
            "redirects",
        ),
        ("no such file", head("404 Not Found", "content-length: 0\r\n"), "404"),
        (
            "a server that is down",
            head("503 Service Unavailable", "content-length: 0\r\n"),
            "503",
        ),
        ("compressed bytes", zipped, "compressed"),
        ("a short file", file(1000), "1000 bytes"),
        ("an empty file", file(0), "0 bytes"),
        ("less than announced", file(MEGABYTE)[..2000].to_vec(), "damaged"),
        ("no HTTP", b"220 mail.example ESMTP\r\n".to_vec(), "damaged"),
    ];
    for (what, answer, wanted) in cases {
        let failure = failure(answer).await;
        assert!(
            failure.what.contains(wanted) && !failure.how.is_empty(),
            "{what}: {failure:?}"
        );
        assert!(!failure.what.contains("secret"), "{what}: {failure:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn endless_headers_a_drip_and_silence_end_in_their_time() {
    let mut endless = b"HTTP/1.1 200 OK\r\n".to_vec();
    for _ in 0..100_000 {
        endless.extend(b"x-filler: xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx\r\n");
    }
    let before = peak_kib();
    assert!(failure(endless).await.what.contains("damaged"));
    assert!(peak_kib() - before < 64 * 1024, "{} KiB more", peak_kib() - before);

    let (address, certificates) = serving(|mut stream, _| async move {
        stream
            .write_all(&head("200 OK", "content-length: 100000000\r\n"))
            .await?;
        loop {
            stream.write_all(b" ").await?;
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    })
    .await;
    let started = Instant::now();
    let (result, _) = measured(address, &certificates).await;
    assert!(matches!(result, Err(Error::TooLittle { .. })), "{result:?}");
    assert!(
        started.elapsed() < TIME + Duration::from_secs(5),
        "{:?}",
        started.elapsed()
    );

    let (address, certificates) = serving(|stream, _| async move {
        let _held = stream;
        std::future::pending().await
    })
    .await;
    let started = Instant::now();
    let (result, _) = measured(address, &certificates).await;
    let what = Failure::from(result.unwrap_err()).what;
    assert!(what.contains("did not answer"), "{what}");
    assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_without_end_is_cut_at_what_a_measurement_may_cost() {
    let (address, certificates) = serving(|mut stream, wish| async move {
        if wish.body.is_some() {
            return stream.write_all(&no()).await;
        }
        stream.write_all(&head("200 OK", "connection: close\r\n")).await?;
        loop {
            stream.write_all(&[b'x'; 16 * 1024]).await?;
        }
    })
    .await;
    let (result, moved) = measured(address, &certificates).await;
    let (down, up) = result.unwrap();
    assert!(down > 1_000_000 && up.is_none(), "{down} {up:?}");
    assert!(moved < PAYLOAD + 5_000_000, "{moved}");
}

#[tokio::test(flavor = "multi_thread")]
async fn any_file_server_tells_the_download_and_nothing_of_the_upload() {
    // One that wants no query, and one that does not care.
    for strict in [true, false] {
        let (address, certificates) = serving(move |mut stream, wish| async move {
            let asked = wish.line.contains("bytes=");
            let answer = match wish.body {
                Some(_) => no(),
                None if strict && asked => head("403 Forbidden", "connection: close\r\ncontent-length: 0\r\n"),
                None => file(3 * MEGABYTE),
            };
            stream.write_all(&answer).await?;
            stream.shutdown().await
        })
        .await;
        let (result, moved) = measured(address, &certificates).await;
        let (down, up) = result.unwrap();
        assert!(down > 1_000_000 && up.is_none(), "{down} {up:?}");
        assert!(moved >= 3_000_000, "{moved}");
    }
}

/// Downloads in order, and uploads answered with `post` after `needed` of the body.
async fn upload(needed: fn(u64) -> u64, post: fn(u64) -> String) -> (Option<u64>, u64) {
    let (address, certificates) = serving(move |mut stream, wish| async move {
        let Some(length) = wish.body else {
            stream.write_all(&file(3 * MEGABYTE)).await?;
            return stream.shutdown().await;
        };
        swallow(&mut stream, needed(length)).await?;
        let body = post(length);
        let answer = head(
            "200 OK",
            &format!("connection: close\r\ncontent-length: {}\r\n", body.len()),
        );
        stream.write_all(&[answer, body.into_bytes()].concat()).await?;
        if needed(length) < length {
            // The rest lies in buffers, until a piece is larger than they are.
            std::future::pending::<()>().await;
        }
        stream.shutdown().await
    })
    .await;
    let (result, moved) = measured(address, &certificates).await;
    (result.unwrap().1, moved)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_counts_when_the_server_has_it() {
    let (honest, _) = upload(
        |length| length,
        |length| format!("{{\"bytes\":{length},\"seconds\":0.1}}"),
    )
    .await;
    assert!(honest.is_some_and(|bits| bits > 1_000_000), "{honest:?}");
    let (silent, _) = upload(|length| length, |_| String::new()).await;
    assert_eq!(silent, None, "it does not say what it got");
    let (liar, _) = upload(
        |length| length,
        |length| format!("{{\"bytes\":{},\"seconds\":0.1}}", length * 2),
    )
    .await;
    assert_eq!(liar, None, "it miscounts");
    let (early, _) = upload(|_| 0, |_| String::new()).await;
    assert_eq!(early, None, "it answers what it does not have");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endless_answer_to_an_upload_is_not_read() {
    let (address, certificates) = serving(|mut stream, wish| async move {
        let Some(length) = wish.body else {
            stream.write_all(&file(3 * MEGABYTE)).await?;
            return stream.shutdown().await;
        };
        swallow(&mut stream, length).await?;
        stream.write_all(&head("200 OK", "connection: close\r\n")).await?;
        loop {
            stream.write_all(&[b'x'; 16 * 1024]).await?;
        }
    })
    .await;
    let (result, _) = measured(address, &certificates).await;
    assert_eq!(result.unwrap().1, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_certificate_measures_nothing() {
    let (address, _) = answering(file(MEGABYTE)).await;
    let (result, moved) = measured(address, &Certificates::new()).await;
    assert!(
        matches!(result, Err(Error::Http(http::Error::Tls { .. }))),
        "{result:?}"
    );
    assert_eq!(moved, 0);
}
