//! Latency of candidates: an authenticated UDP echo where the provider offers one, ICMP echo (labelled so) where not.
//!
//! All candidates are measured at once, each by a short train of requests. The figure is the median of the best three
//! round trips of the train: on a path that delays packets by chance the best come closest to the path itself, and the
//! middle one of three is neither a lucky nor an unlucky packet. Lost packets are made up for by a second train. Arrivals
//! are stamped by the kernel, so that a busy processor is not measured along.

mod icmp;
mod socket;
mod train;

use std::{
    net::SocketAddr,
    time::{Duration, SystemTime},
};

use dvpn_common::{echo::EchoKey, status::ProbeMethod};
use dvpn_core::{directory::Provider, session::Measurement};
use futures::{StreamExt, stream::FuturesUnordered};
use rand::Rng;
use socket::{Kind, Received, Socket};
use tokio::time::{Instant, sleep_until};
use tracing::{debug, warn};
use train::{RETRAIN_AFTER, SPACING, TRAIN, Train, patience};

/// How to measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Mark of the probes' packets, so that a blocking firewall can let them pass; set where the kernel permits it.
    pub fwmark: u32,
    /// When to give up.
    pub deadline: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            fwmark: crate::tunnel::FWMARK,
            deadline: Duration::from_secs(1),
        }
    }
}

/// One candidate under measurement.
struct Candidate {
    provider: Provider,
    to: SocketAddr,
    /// The key of its echo; none is ICMP.
    echo: Option<EchoKey>,
    train: Train,
}

impl Candidate {
    fn new(provider: Provider) -> Self {
        let echo = provider.probe.map(|_| EchoKey::new(&provider.public_key));
        let to = provider.probe.unwrap_or(SocketAddr::new(provider.endpoint.ip(), 0));
        Self {
            provider,
            to,
            echo,
            train: Train::default(),
        }
    }

    /// Whether this socket carries its requests.
    fn uses(&self, socket: &Socket) -> bool {
        let kind = if socket.kind == Kind::Echo {
            ProbeMethod::Echo
        } else {
            ProbeMethod::Icmp
        };
        kind == self.method() && socket.v6 == self.to.is_ipv6()
    }

    /// Whether a packet comes from where its requests go; ICMP has no port.
    fn is_from(&self, packet: &Received) -> bool {
        packet.from.ip() == self.to.ip() && (packet.kind != Kind::Echo || packet.from.port() == self.to.port())
    }

    /// The nonce of a reply by this candidate.
    fn open(&self, packet: &Received) -> Option<[u8; 8]> {
        match (packet.kind, &self.echo) {
            (Kind::Echo, Some(key)) => key.open_reply(packet.bytes()),
            (Kind::Icmp { raw }, None) => {
                let v6 = self.to.is_ipv6();
                icmp::open_reply(v6, raw && !v6, packet.bytes())
            }
            (Kind::Echo, None) | (Kind::Icmp { .. }, Some(_)) => None,
        }
    }

    fn method(&self) -> ProbeMethod {
        if self.echo.is_some() {
            ProbeMethod::Echo
        } else {
            ProbeMethod::Icmp
        }
    }
}

/// Measures all candidates at once; one [`Measurement`] each, in their order. Ends when everybody has answered enough, at
/// the latest at the deadline. Never fails: what can not be measured has no latency.
pub async fn measure(candidates: Vec<Provider>, options: Options) -> Vec<Measurement> {
    let mut candidates: Vec<Candidate> = candidates.into_iter().map(Candidate::new).collect();
    let mut sockets = Sockets::open(&candidates, options.fwmark);
    let start = Instant::now();
    let deadline = start + options.deadline;
    let mut next_round = start;
    let mut rounds_left = TRAIN;
    let mut retrained = false;
    loop {
        let now = Instant::now();
        // Who is silent long after somebody answered is not the nearest: a dead candidate costs this, not the deadline.
        let nearest = candidates
            .iter()
            .filter_map(|candidate| candidate.train.settled_latency(now.into_std()))
            .min();
        let deadline = nearest.map_or(deadline, |nearest| deadline.min(start + patience(nearest)));
        if now >= deadline
            || candidates
                .iter()
                .all(|candidate| candidate.train.is_settled(now.into_std()))
        {
            break;
        }
        if now >= next_round && rounds_left > 0 {
            for candidate in &mut candidates {
                if !retrained || candidate.train.needs_more() {
                    sockets.ask(candidate);
                }
            }
            rounds_left -= 1;
            next_round = now + SPACING;
        }
        if rounds_left == 0 && !retrained && now >= start + RETRAIN_AFTER {
            retrained = true;
            rounds_left = TRAIN;
            next_round = now;
            continue;
        }
        // The next round, the second train, or a train that settles by time: whichever is first.
        let wake = match (rounds_left, retrained) {
            (1.., _) => next_round,
            (0, false) => start + RETRAIN_AFTER,
            (0, true) => deadline,
        };
        let settles = candidates
            .iter()
            .filter_map(|candidate| candidate.train.settles_at())
            .max()
            .map(Instant::from_std);
        let wake = settles
            .filter(|at| *at > now)
            .map_or(wake, |at| at.min(wake))
            .min(deadline);
        tokio::select! {
            received = sockets.receive() => {
                for packet in received {
                    for candidate in candidates.iter_mut().filter(|candidate| candidate.is_from(&packet)) {
                        if let Some(nonce) = candidate.open(&packet) {
                            candidate.train.answered(nonce, packet.at);
                        }
                    }
                }
            }
            () = sleep_until(wake) => {}
        }
    }
    candidates
        .into_iter()
        .map(|candidate| Measurement {
            method: candidate.method(),
            latency: candidate.train.latency(),
            provider: candidate.provider.id,
        })
        .collect()
}

/// The sockets that the candidates need, at most one of each kind and family.
struct Sockets {
    open: Vec<Socket>,
    sequence: u16,
}

impl Sockets {
    fn open(candidates: &[Candidate], fwmark: u32) -> Self {
        let mut open: Vec<Socket> = Vec::new();
        for candidate in candidates {
            if open.iter().any(|socket| candidate.uses(socket)) {
                continue;
            }
            let icmp = candidate.method() == ProbeMethod::Icmp;
            match Socket::open(icmp, candidate.to.is_ipv6(), fwmark) {
                Ok(socket) => open.push(socket),
                Err(error) => warn!(%error, icmp, v6 = candidate.to.is_ipv6(), "no socket to measure latency with"),
            }
        }
        Self { open, sequence: 0 }
    }

    /// Sends one request. A candidate that can not be sent to does not answer.
    fn ask(&mut self, candidate: &mut Candidate) {
        let Some(socket) = self.open.iter().find(|socket| candidate.uses(socket)) else {
            return;
        };
        // Random, so that nobody who did not see the request can answer it.
        let mut nonce = [0; 8];
        rand::rng().fill_bytes(&mut nonce);
        self.sequence = self.sequence.wrapping_add(1);
        let (wall, now) = (SystemTime::now(), std::time::Instant::now());
        let sent = match &candidate.echo {
            Some(key) => socket.send(&key.request(nonce), candidate.to),
            None => socket.send(&icmp::request(socket.v6, self.sequence, nonce), candidate.to),
        };
        match sent {
            Ok(()) => candidate.train.asked(nonce, wall, now),
            Err(error) => debug!(%error, provider = %candidate.provider.id, "probe not sent"),
        }
    }

    /// Packets, as soon as any socket has some; waits for ever if no socket has.
    async fn receive(&self) -> Vec<Received> {
        let mut waiting: FuturesUnordered<_> = self.open.iter().map(Socket::receive).collect();
        while let Some(received) = waiting.next().await {
            match received {
                Ok(packets) => return packets,
                Err(error) => debug!(%error, "receiving probe replies"),
            }
        }
        futures::future::pending().await
    }
}

#[cfg(test)]
mod tests;
