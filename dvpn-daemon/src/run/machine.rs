//! What happens to the machine, gathered for the driver.

use std::pin::pin;

use dvpn_core::config::Mode;
use futures::{Stream, StreamExt as _};
use tokio::sync::mpsc;

use super::chain;
use crate::{
    clock::{self, Jump},
    driver::MachineEvent,
    host::{Host, dns::Dns},
};

/// What happens to the machine's network, as the driver has to hear of it.
pub(super) async fn watch_machine(host: &Host, dns: &Dns, mode: Mode) -> mpsc::Receiver<MachineEvent> {
    let (sender, receiver) = mpsc::channel(4);
    match host.way_out_changes().await {
        Ok(changes) => forward(changes, MachineEvent::OtherWayOut, sender.clone()),
        Err(error) => tracing::warn!("changes of the network are not seen: {}", chain(&error)),
    }
    watch_clock(sender.clone());
    if mode == Mode::Device {
        match host.network_changes().await {
            Ok(changes) => forward(changes, MachineEvent::Changed, sender.clone()),
            Err(error) => tracing::warn!("changes of the network are not seen: {}", chain(&error)),
        }
        match dns.changes() {
            Ok(changes) => forward(changes, MachineEvent::NamesDisturbed, sender.clone()),
            Err(error) => tracing::warn!("what others do to name resolution is not seen: {}", chain(&error)),
        }
        match host.losses() {
            Ok(losses) => forward(losses, MachineEvent::Loss, sender),
            Err(error) => tracing::warn!("what others do to the firewall is not seen: {}", chain(&error)),
        }
    }
    receiver
}

fn watch_clock(sender: mpsc::Sender<MachineEvent>) {
    match clock::jumps() {
        Ok(mut jumps) => {
            tokio::spawn(async move {
                while let Some(jump) = jumps.recv().await {
                    let event = match jump {
                        Jump::Slept(slept) => {
                            tracing::info!("this machine slept for {} s", slept.as_secs());
                            MachineEvent::Resumed
                        }
                        Jump::Set => MachineEvent::ClockSet,
                    };
                    if sender.send(event).await.is_err() {
                        return;
                    }
                }
            });
        }
        Err(error) => tracing::warn!("the end of a suspension is not seen: {error}"),
    }
}

fn forward(stream: impl Stream<Item = ()> + Send + 'static, event: MachineEvent, sender: mpsc::Sender<MachineEvent>) {
    tokio::spawn(async move {
        let mut stream = pin!(stream);
        while stream.next().await.is_some() {
            if sender.send(event).await.is_err() {
                return;
            }
        }
    });
}
