//! A small HTTP/1.1 client over a stream that is already open: through a proxy, or in another namespace.

use std::io::{BufRead as _, BufReader, Read, Write as _};
use std::net::TcpStream;

use anyhow::{Context as _, Result, bail};

/// An answer whose body is still to be read.
pub struct Response {
    /// The status code.
    pub status: u16,
    /// Bytes of the body, when the server said how many.
    pub length: Option<u64>,
    body: BufReader<TcpStream>,
}

impl Read for Response {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.body.read(buffer)
    }
}

/// Sends a GET and reads the head of the answer. The server is asked to close the connection after it.
pub fn get(mut stream: TcpStream, host: &str, path: &str) -> Result<Response> {
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    )
    .context("sending a request")?;
    let mut body = BufReader::with_capacity(64 * 1024, stream);
    let mut line = String::new();
    body.read_line(&mut line).context("reading the status line")?;
    let status = line.split(' ').nth(1).and_then(|code| code.parse().ok());
    let Some(status) = status else {
        bail!("no HTTP status in {line:?}")
    };
    let mut length = None;
    loop {
        line.clear();
        body.read_line(&mut line).context("reading the answer's head")?;
        let header = line.trim_end();
        if header.is_empty() {
            break;
        }
        if let Some((name, value)) = header.split_once(':')
            && name.eq_ignore_ascii_case("content-length")
        {
            length = value.trim().parse().ok();
        }
    }
    Ok(Response { status, length, body })
}

/// Sends a GET and reads the whole answer, at most 1 MiB.
pub fn get_text(stream: TcpStream, host: &str, path: &str) -> Result<(u16, String)> {
    let response = get(stream, host, path)?;
    let status = response.status;
    let limit = response.length.unwrap_or(1 << 20).min(1 << 20);
    let mut text = String::new();
    response
        .take(limit)
        .read_to_string(&mut text)
        .context("reading the answer")?;
    Ok((status, text))
}
