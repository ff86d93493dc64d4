//! The one task that stores what the payment server said: in the order in which it was said, so that a removal is never
//! undone by a sealing that began before it.

use dvpn_core::{config::Secret, payment::Subscription};
use tokio::sync::mpsc;

use crate::state::State;

/// What is to be on the disk.
pub(super) enum Order {
    /// This, for the token it was verified with.
    Keep(Subscription, Secret),
    /// Nothing.
    Forget,
}

/// Starts the task. Sealing takes a while: it happens beside the session, and only the last word of a burst is written.
pub(super) fn spawn(state: State) -> mpsc::UnboundedSender<Order> {
    let (orders, mut queue) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Some(mut order) = queue.recv().await {
            while let Ok(later) = queue.try_recv() {
                order = later;
            }
            let stored = match order {
                Order::Keep(subscription, token) => state.store_subscription(&subscription, &token).await,
                Order::Forget => state.clear_subscription(),
            };
            if let Err(error) = stored {
                tracing::warn!("storing the verified subscription: {error}");
            }
        }
    });
    orders
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use dvpn_core::payment::{Verification, judge};
    use jiff::Timestamp;

    use super::*;

    fn paid() -> Subscription {
        let body =
            br#"{"active":true,"wallet":"1MUss4jmaRJ2sMtS9gyZqeRw8WrhWTsrxn","interval":"monthly","amount_usd":9.99}"#;
        match judge(200, body, Timestamp::now()) {
            Verification::Paid(subscription) => subscription,
            Verification::NotPaid(failure) | Verification::CannotTell(failure) => panic!("{failure}"),
        }
    }

    async fn eventually(state: &State, token: &Secret, stored: bool) {
        let seen = tokio::time::timeout(Duration::from_secs(30), async {
            while state.subscription(token).await.unwrap().is_some() != stored {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
        seen.await.expect("what is stored is the last word");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn the_last_word_is_what_is_stored_and_it_is_bound_to_its_token() {
        let directory = std::env::temp_dir().join(format!("dvpn-subscriptions-{}", std::process::id()));
        let state = State::open(&directory, None).unwrap();
        let orders = spawn(state.clone());
        let (token, other) = (Secret::new("one"), Secret::new("two"));
        let subscription = paid();
        for _ in 0..20 {
            orders.send(Order::Keep(subscription, token.clone())).ok();
            orders.send(Order::Forget).ok();
        }
        orders.send(Order::Keep(subscription, token.clone())).ok();
        eventually(&state, &token, true).await;
        eventually(&state, &other, false).await;
        orders.send(Order::Keep(subscription, token.clone())).ok();
        orders.send(Order::Forget).ok();
        eventually(&state, &token, false).await;
        std::fs::remove_dir_all(directory).unwrap();
    }
}
