//! The two tasks that speak with the pool while the node's loop decides: events in, acknowledgements out.

use std::time::Duration;

use dvpn_common::{contract::Ack, limits::APPROVE_ACK_TIMEOUT};
use futures::StreamExt as _;
use tokio::sync::mpsc;

use super::{
    pool::{Pool, PoolEvent},
    registration::with_sources,
};

const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// How often an acknowledgement is sent before the stream's next snapshot has to carry it.
const ACK_ATTEMPTS: u32 = 3;

/// What arrives from the stream's task.
pub(super) enum Arrival {
    Connected,
    Lost(String),
    Event(PoolEvent),
}

/// Reads the event stream, and opens it again whenever it ends.
pub(super) async fn follow(pool: Pool, arrivals: mpsc::Sender<Arrival>) {
    let mut pause = FIRST_PAUSE;
    let mut last_id: Option<String> = None;
    loop {
        let problem = match pool.events(last_id.as_deref()).await {
            Err(error) => with_sources(&error),
            Ok(mut events) => {
                if arrivals.send(Arrival::Connected).await.is_err() {
                    return;
                }
                loop {
                    match events.next().await {
                        Some(Ok((id, event))) => {
                            pause = FIRST_PAUSE;
                            last_id = Some(id).filter(|id| !id.is_empty()).or(last_id);
                            if arrivals.send(Arrival::Event(event)).await.is_err() {
                                return;
                            }
                        }
                        Some(Err(error)) => break with_sources(&error),
                        None => break "the pool closed the event stream".to_owned(),
                    }
                }
            }
        };
        tracing::info!("the pool's event stream: {problem}");
        if arrivals.send(Arrival::Lost(problem)).await.is_err() {
            return;
        }
        tokio::time::sleep(pause.mul_f64(rand::random_range(0.8..1.2))).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Sends acknowledgements in order. The pool waits two seconds for one; a lost one is repaired by the next snapshot.
pub(super) async fn acknowledge(pool: Pool, mut acks: mpsc::Receiver<Ack>) {
    while let Some(ack) = acks.recv().await {
        for attempt in 1..=ACK_ATTEMPTS {
            match tokio::time::timeout(APPROVE_ACK_TIMEOUT, pool.acknowledge(&ack)).await {
                Ok(Ok(())) => break,
                Ok(Err(error)) => tracing::info!(
                    "acknowledging {}, attempt {attempt}: {}",
                    ack.sequence,
                    with_sources(&error)
                ),
                Err(_elapsed) => tracing::info!("acknowledging {}, attempt {attempt}: no answer in time", ack.sequence),
            }
        }
    }
}
