//! The task that listens to the pool while the node's loop decides.

use std::time::Duration;

use futures::StreamExt as _;
use tokio::sync::mpsc;

use super::{
    pool::{Pool, PoolEvent},
    registration::with_sources,
};

const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

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
