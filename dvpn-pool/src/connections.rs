//! How many connections there may be at one time, all together and from one line, counted from the first byte of the
//! TLS handshake to the close; and the way to cut one whose other end does not read.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
};

use axum_server::accept::Accept;
use futures::task::AtomicWaker;
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
    by_peer: HashMap<SocketAddr, Scissors>,
}

/// Cuts one connection: its next read or write fails, also one that waits now.
#[derive(Clone, Default)]
pub struct Scissors(Arc<Cut>);

#[derive(Default)]
struct Cut {
    done: AtomicBool,
    waiting: AtomicWaker,
}

impl Scissors {
    /// Cuts.
    pub fn cut(&self) {
        self.0.done.store(true, Ordering::Release);
        self.0.waiting.wake();
    }

    fn check(&self, cx: &Context<'_>) -> io::Result<()> {
        self.0.waiting.register(cx.waker());
        if self.0.done.load(Ordering::Acquire) {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "the other end took too long"));
        }
        Ok(())
    }
}

impl Gate {
    /// At most `most` connections, and from one line `most_of_one_line`, or an eighth of them.
    pub fn new(most: usize, most_of_one_line: Option<usize>) -> Self {
        Self {
            most,
            most_of_one_line: most_of_one_line.unwrap_or(most / 8).max(1),
            open: Arc::default(),
        }
    }

    /// The way to cut the connection of `peer`, while it is open.
    pub fn scissors(&self, peer: SocketAddr) -> Option<Scissors> {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.by_peer.get(&peer).cloned()
    }

    fn enter(&self, peer: SocketAddr) -> Option<Entry> {
        let line = line(peer.ip());
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
        let scissors = Scissors::default();
        open.by_peer.insert(peer, scissors.clone());
        Some(Entry {
            open: self.open.clone(),
            line,
            peer,
            scissors,
        })
    }
}

struct Entry {
    open: Arc<Mutex<Open>>,
    line: IpAddr,
    peer: SocketAddr,
    scissors: Scissors,
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.all = open.all.saturating_sub(1);
        open.by_peer.remove(&self.peer);
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
    entry: Entry,
}

impl<S> Accept<TcpStream, S> for Gate {
    type Stream = Counted;
    type Service = S;
    type Future = std::future::Ready<io::Result<(Counted, S)>>;

    fn accept(&self, stream: TcpStream, service: S) -> Self::Future {
        let accepted = || {
            stream.set_nodelay(true)?;
            let entry = self
                .enter(stream.peer_addr()?)
                .ok_or_else(|| io::Error::new(io::ErrorKind::ConnectionRefused, "too many connections"))?;
            Ok((Counted { stream, entry }, service))
        };
        std::future::ready(accepted())
    }
}

impl AsyncRead for Counted {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.entry.scissors.check(cx)?;
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Counted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.entry.scissors.check(cx)?;
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
        self.entry.scissors.check(cx)?;
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
        let gate = Gate::new(16, None);
        let peer = |text: &str| text.parse::<SocketAddr>().unwrap();
        let (one, other) = (peer("192.0.2.1:1"), peer("192.0.2.2:1"));
        let held = [gate.enter(one).unwrap(), gate.enter(peer("192.0.2.1:2")).unwrap()];
        assert!(gate.enter(peer("192.0.2.1:3")).is_none());
        assert!(gate.enter(other).is_some());
        assert!(gate.scissors(one).is_some() && gate.scissors(other).is_none());
        drop(held);
        assert!(gate.enter(one).is_some());
        let open = gate.open.lock().unwrap();
        assert!(open.by_line.is_empty() && open.by_peer.is_empty());
    }
}
