//! The server beyond the providers. It tells whoever asks from where the question came, which is the only honest proof
//! of the way that the traffic took.
//!
//! HTTP on port 80: `/` the peer's address as text, `/bytes/N` N zero bytes. UDP 7 echoes. UDP 53 answers for
//! [`crate::network::WEB_NAME`] and denies every other name.

use std::net::{Ipv4Addr, SocketAddr};

use anyhow::{Context as _, Result};
use axum::{
    Router,
    body::Body,
    extract::{ConnectInfo, Path},
    http::header::CONTENT_LENGTH,
    response::{IntoResponse, Response},
    routing::get,
};
use bytes::Bytes;
use futures::StreamExt as _;
use tokio::net::{TcpListener, UdpSocket};

const CHUNK: &[u8] = &[0; 64 * 1024];
/// Most bytes that one answer carries.
const MAX_BYTES: u64 = 64 << 30;

/// Serves until an error; `address` and `name` are what the name server answers.
pub async fn serve(address: Ipv4Addr, name: String) -> Result<()> {
    let http = TcpListener::bind((address, 80))
        .await
        .with_context(|| format!("listening at {address}:80"))?;
    let echo = UdpSocket::bind((address, 7))
        .await
        .with_context(|| format!("binding UDP {address}:7"))?;
    let dns = UdpSocket::bind((address, 53))
        .await
        .with_context(|| format!("binding UDP {address}:53"))?;
    let routes = Router::new()
        .route("/", get(peer_address))
        .route("/bytes/{count}", get(zero_bytes));
    let service = routes.into_make_service_with_connect_info::<SocketAddr>();
    tokio::try_join!(
        async { axum::serve(http, service).await.context("serving HTTP") },
        answer(echo, |datagram| Some(datagram.to_vec())),
        answer(dns, |query| name_answer(query, &name, address)),
    )?;
    Ok(())
}

async fn peer_address(ConnectInfo(peer): ConnectInfo<SocketAddr>) -> String {
    format!("{}\n", peer.ip())
}

async fn zero_bytes(Path(count): Path<u64>) -> Response {
    let count = count.min(MAX_BYTES);
    let chunk = u64::try_from(CHUNK.len()).unwrap_or(1);
    let whole = futures::stream::iter(0..count / chunk).map(|_| Bytes::from_static(CHUNK));
    let rest = usize::try_from(count % chunk).unwrap_or_default();
    let last = futures::stream::iter([Bytes::from_static(CHUNK.get(..rest).unwrap_or_default())]);
    let body = Body::from_stream(whole.chain(last).map(Ok::<_, std::convert::Infallible>));
    ([(CONTENT_LENGTH, count)], body).into_response()
}

async fn answer(socket: UdpSocket, reply: impl Fn(&[u8]) -> Option<Vec<u8>>) -> Result<()> {
    let mut buffer = vec![0_u8; 65_536];
    loop {
        // An ICMP error about an earlier answer shows up here and is no reason to stop.
        let Ok((length, from)) = socket.recv_from(&mut buffer).await else {
            continue;
        };
        if let Some(answer) = reply(buffer.get(..length).unwrap_or_default()) {
            drop(socket.send_to(&answer, from).await);
        }
    }
}

const TYPE_A: [u8; 2] = [0, 1];
const CLASS_IN: [u8; 2] = [0, 1];
const NO_SUCH_NAME: u8 = 3;

/// The answer to a DNS query (RFC 1035, section 4) with one question; nothing for anything else.
fn name_answer(query: &[u8], name: &str, address: Ipv4Addr) -> Option<Vec<u8>> {
    let (header, body) = query.split_at_checked(12)?;
    let [id1, id2, flags, _, q1, q2, ..] = header.first_chunk::<12>().copied()?;
    let is_query = flags & 0xf8 == 0;
    if !is_query || [q1, q2] != [0, 1] {
        return None;
    }
    let (asked, rest) = read_name(body)?;
    let (kind, class) = (rest.get(..2)?, rest.get(2..4)?);
    let question = body.get(..body.len() - rest.len() + 4)?;
    let known = asked.eq_ignore_ascii_case(name);
    let answers = u8::from(known && kind == TYPE_A && class == CLASS_IN);
    // Response, authoritative, recursion desired as asked and "available": the asker is a forwarder.
    let mut out = vec![
        id1,
        id2,
        0x84 | (flags & 1),
        0x80 | if known { 0 } else { NO_SUCH_NAME },
    ];
    out.extend_from_slice(&[0, 1, 0, answers, 0, 0, 0, 0]);
    out.extend_from_slice(question);
    if answers == 1 {
        // The name as a pointer to the question, TTL 60 s, four bytes of address.
        out.extend_from_slice(&[0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
        out.extend_from_slice(&address.octets());
    }
    Some(out)
}

/// A name without compression, dotted, and what follows it.
fn read_name(mut bytes: &[u8]) -> Option<(String, &[u8])> {
    let mut labels = Vec::new();
    loop {
        let (&length, rest) = bytes.split_first()?;
        match length {
            0 => return Some((labels.join("."), rest)),
            1..=63 => {
                let (label, rest) = rest.split_at_checked(usize::from(length))?;
                labels.push(String::from_utf8_lossy(label).into_owned());
                bytes = rest;
            }
            _ => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn query(name: &str, kind: u8) -> Vec<u8> {
        let mut out = vec![0xab, 0xcd, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        for label in name.split('.') {
            out.push(u8::try_from(label.len()).unwrap());
            out.extend_from_slice(label.as_bytes());
        }
        out.extend_from_slice(&[0, 0, kind, 0, 1]);
        out
    }

    #[test]
    fn the_name_server_answers_for_its_name_only() {
        let address = Ipv4Addr::new(198, 51, 100, 80);
        let known = name_answer(&query("Web.dvpn.test", 1), "web.dvpn.test", address).unwrap();
        assert_eq!(known[..4], [0xab, 0xcd, 0x85, 0x80]);
        assert_eq!(known[known.len() - 4..], address.octets());
        let other_type = name_answer(&query("web.dvpn.test", 28), "web.dvpn.test", address).unwrap();
        assert_eq!((other_type[3], other_type[7]), (0x80, 0));
        let unknown = name_answer(&query("example.org", 1), "web.dvpn.test", address).unwrap();
        assert_eq!(unknown[3], 0x83);
    }

    #[test]
    fn truncated_queries_and_answers_get_nothing() {
        let whole = query("web.dvpn.test", 1);
        for length in 0..whole.len() {
            assert_eq!(
                name_answer(&whole[..length], "web.dvpn.test", Ipv4Addr::LOCALHOST),
                None,
                "{length}"
            );
        }
        let mut answer = whole;
        answer[2] |= 0x80;
        assert_eq!(name_answer(&answer, "web.dvpn.test", Ipv4Addr::LOCALHOST), None);
    }
}
