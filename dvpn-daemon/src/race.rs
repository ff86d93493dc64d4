//! One connection out of several addresses: each gets a head start before the next is tried beside it (RFC 8305, section
//! 5).

use std::{io, net::SocketAddr, time::Duration};

use futures::{StreamExt as _, stream::FuturesUnordered};
use tokio::{
    net::TcpStream,
    time::{Instant, sleep_until},
};

/// The head start.
const STAGGER: Duration = Duration::from_millis(250);

/// The first that connects, or the error of the last that did not. The caller limits the time.
pub(crate) async fn race<F>(addresses: Vec<SocketAddr>, connect: impl Fn(SocketAddr) -> F) -> io::Result<TcpStream>
where
    F: Future<Output = io::Result<TcpStream>>,
{
    let mut waiting = addresses.into_iter();
    let mut trying = FuturesUnordered::new();
    let mut last = io::Error::from(io::ErrorKind::HostUnreachable);
    let mut next_start = Instant::now();
    loop {
        tokio::select! {
            biased;
            Some(result) = trying.next(), if !trying.is_empty() => match result {
                Ok(stream) => return Ok(stream),
                Err(error) => {
                    last = error;
                    next_start = Instant::now();
                }
            },
            () = sleep_until(next_start), if waiting.len() > 0 => {
                if let Some(address) = waiting.next() {
                    trying.push(connect(address));
                    next_start = Instant::now() + STAGGER;
                }
            }
            else => return Err(last),
        }
    }
}
