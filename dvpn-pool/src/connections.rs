//! How many connections there may be at one time, all together and from one line, counted from the first byte of the
//! TLS handshake to the close.

use std::{
    collections::HashMap,
    io,
    net::IpAddr,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
};

use axum_server::accept::Accept;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

use crate::limiter::line;

/// Refuses connections above the limits by closing them.
#[derive(Clone)]
pub struct Gate {
    most: usize,
    most_of_one_line: usize,
    open: Arc<Mutex<Open>>,
}

#[derive(Default)]
struct Open {
    all: usize,
    by_line: HashMap<IpAddr, usize>,
}

impl Gate {
    /// At most `most` connections, and an eighth of them from one line.
    pub fn new(most: usize) -> Self {
        Self {
            most,
            most_of_one_line: (most / 8).max(1),
            open: Arc::default(),
        }
    }

    fn enter(&self, source: IpAddr) -> Option<Entry> {
        let line = line(source);
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if open.all >= self.most
            || open
                .by_line
                .get(&line)
                .is_some_and(|count| *count >= self.most_of_one_line)
        {
            return None;
        }
        open.all += 1;
        *open.by_line.entry(line).or_default() += 1;
        Some(Entry {
            open: self.open.clone(),
            line,
        })
    }
}

struct Entry {
    open: Arc<Mutex<Open>>,
    line: IpAddr,
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.all = open.all.saturating_sub(1);
        if let Some(count) = open.by_line.get_mut(&self.line) {
            *count -= 1;
            if *count == 0 {
                open.by_line.remove(&self.line);
            }
        }
    }
}

/// A connection that is counted while it lives.
pub struct Counted {
    stream: TcpStream,
    _entry: Entry,
}

impl<S> Accept<TcpStream, S> for Gate {
    type Stream = Counted;
    type Service = S;
    type Future = std::future::Ready<io::Result<(Counted, S)>>;

    fn accept(&self, stream: TcpStream, service: S) -> Self::Future {
        let accepted = || {
            stream.set_nodelay(true)?;
            let entry = self
                .enter(stream.peer_addr()?.ip())
                .ok_or_else(|| io::Error::new(io::ErrorKind::ConnectionRefused, "too many connections"))?;
            Ok((Counted { stream, _entry: entry }, service))
        };
        std::future::ready(accepted())
    }
}

impl AsyncRead for Counted {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Counted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bytes)
    }
    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_gets_its_share_and_places_come_back() {
        let gate = Gate::new(16);
        let (one, other): (IpAddr, IpAddr) = ("192.0.2.1".parse().unwrap(), "192.0.2.2".parse().unwrap());
        let held: Vec<_> = (0..2).map(|_| gate.enter(one).unwrap()).collect();
        assert!(gate.enter(one).is_none());
        assert!(gate.enter(other).is_some());
        drop(held);
        assert!(gate.enter(one).is_some());
        assert!(gate.open.lock().unwrap().by_line.is_empty());
    }
}
