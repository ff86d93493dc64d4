//! Prometheus metrics. Totals never run backwards: they count what the daemon saw, over every tunnel of its life.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use dvpn_common::status::{LineSource, LineStatus, StateName, Status};
use dvpn_core::session::Traffic;
use prometheus::{Encoder as _, GaugeVec, IntCounter, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder};

use crate::provider::ProviderStatus;

/// Every metric of the daemon; clones share them.
#[derive(Clone)]
pub struct Metrics(Arc<Inner>);

struct Inner {
    registry: Registry,
    state: IntGaugeVec,
    attempts: IntGauge,
    switches: IntGauge,
    latency: GaugeVec,
    received: IntCounter,
    sent: IntCounter,
    interface_packets: IntGaugeVec,
    interface_bytes: IntGaugeVec,
    provider: IntGaugeVec,
    provider_refused: IntGaugeVec,
    client_packets: IntGaugeVec,
    client_bytes: IntGaugeVec,
    client_dropped: IntGaugeVec,
    client_marked: IntGaugeVec,
    client_delay: GaugeVec,
    grant: IntGaugeVec,
    grant_refused: IntGaugeVec,
    proxy: IntGaugeVec,
    line: IntGaugeVec,
    line_source: IntGaugeVec,
}

impl Metrics {
    /// Registers every metric.
    #[expect(clippy::too_many_lines, reason = "a table: the name and the help of each metric")]
    pub fn new() -> prometheus::Result<Self> {
        let registry = Registry::new();
        let gauge = |name: &str, help: &str| IntGauge::new(name, help).and_then(|m| register(&registry, m));
        let gauges = |name: &str, help: &str, labels: &[&str]| {
            IntGaugeVec::new(Opts::new(name, help), labels).and_then(|m| register(&registry, m))
        };
        let counter = |name: &str, help: &str| IntCounter::new(name, help).and_then(|m| register(&registry, m));
        let build = gauges("dvpn_build_info", "1, labelled with the version", &["version"])?;
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        let inner = Inner {
            state: gauges("dvpn_session_state", "1 for the state the session is in", &["state"])?,
            attempts: gauge(
                "dvpn_session_attempts_total",
                "Attempts to connect since the daemon started",
            )?,
            switches: gauge(
                "dvpn_session_switches_total",
                "Changes of provider that nobody asked for",
            )?,
            latency: register(
                &registry,
                GaugeVec::new(
                    Opts::new("dvpn_probe_latency_seconds", "Median round trip in the last attempt"),
                    &["provider", "method"],
                )?,
            )?,
            received: counter("dvpn_tunnel_received_bytes_total", "Bytes received from providers")?,
            sent: counter("dvpn_tunnel_sent_bytes_total", "Bytes sent to providers")?,
            interface_packets: gauges(
                "dvpn_interface_packets_total",
                "Packets counted by the eBPF programs",
                &["interface", "direction"],
            )?,
            interface_bytes: gauges(
                "dvpn_interface_bytes_total",
                "Layer-3 bytes counted by the eBPF programs",
                &["interface", "direction"],
            )?,
            provider: gauges(
                "dvpn_provider",
                "This node as a provider: peers, active, open, listed, month_bytes, echoes_total",
                &["what"],
            )?,
            provider_refused: gauges(
                "dvpn_provider_refused_packets_total",
                "Packets of clients, or to them, that were refused, since the provider side came up",
                &["reason"],
            )?,
            client_packets: gauges(
                "dvpn_provider_client_packets_total",
                "Layer-3 packets carried for a client; clients are numbers, made anew at every start",
                &["client", "direction"],
            )?,
            client_bytes: gauges(
                "dvpn_provider_client_bytes_total",
                "Layer-3 bytes carried for a client",
                &["client", "direction"],
            )?,
            client_dropped: gauges(
                "dvpn_provider_client_dropped_packets_total",
                "Packets of a client that its grant did not let pass",
                &["client", "direction"],
            )?,
            client_marked: gauges(
                "dvpn_provider_client_marked_packets_total",
                "Packets of a client that were marked as having met congestion",
                &["client", "direction"],
            )?,
            client_delay: register(
                &registry,
                GaugeVec::new(
                    Opts::new(
                        "dvpn_provider_client_delay_seconds_total",
                        "How long a client's packets were held back, all together",
                    ),
                    &["client", "direction"],
                )?,
            )?,
            grant: gauges(
                "dvpn_provider_grant_bits_per_second",
                "What each client is granted, and what all have together, in each direction",
                &["whose"],
            )?,
            grant_refused: gauges(
                "dvpn_provider_grant_refused_packets_total",
                "Packets that the programs that enforce grants dropped",
                &["reason"],
            )?,
            proxy: gauges(
                "dvpn_socks5",
                "What the proxy counts; all but active only grow",
                &["what"],
            )?,
            line: gauges(
                "dvpn_line_bits_per_second",
                "What this machine's line carries, layer 3; absent where it is not known",
                &["direction"],
            )?,
            line_source: gauges(
                "dvpn_line_source",
                "1 for where these rates come from: set, measured, unmeasured",
                &["source"],
            )?,
            registry,
        };
        Ok(Self(Arc::new(inner)))
    }

    /// Takes over what the status says.
    pub fn observe(&self, status: &Status) {
        for state in StateName::ALL {
            self.0
                .state
                .with_label_values(&[state.as_str()])
                .set(i64::from(state == status.state));
        }
        self.0.attempts.set(i64::try_from(status.attempts).unwrap_or(i64::MAX));
        self.0.switches.set(i64::try_from(status.switches).unwrap_or(i64::MAX));
        self.0.latency.reset();
        for candidate in &status.candidates {
            if let (Some(latency_ms), Some(method)) = (candidate.latency_ms, candidate.method) {
                let labels = [candidate.id.as_str(), method.as_str()];
                self.0.latency.with_label_values(&labels).set(latency_ms / 1e3);
            }
        }
    }

    /// Adds what the tunnel carried since the last sample.
    pub fn count_traffic(&self, before: Traffic, now: Traffic) {
        self.0.received.inc_by(now.rx_bytes.saturating_sub(before.rx_bytes));
        self.0.sent.inc_by(now.tx_bytes.saturating_sub(before.tx_bytes));
    }

    /// Shows what the eBPF programs counted on `interface`.
    pub fn show_interface(&self, interface: &str, direction: &str, counter: dvpn_common::abi::Counter) {
        let show = |gauge: &IntGaugeVec, value: u64| {
            gauge
                .with_label_values(&[interface, direction])
                .set(i64::try_from(value).unwrap_or(i64::MAX));
        };
        show(&self.0.interface_packets, counter.packets);
        show(&self.0.interface_bytes, counter.bytes);
    }

    /// Shows the provider side and each of its clients; who is gone is not shown any more.
    pub fn show_provider(&self, status: &ProviderStatus) {
        let number = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        let count = |value: usize| i64::try_from(value).unwrap_or(i64::MAX);
        for (what, value) in [
            ("peers", count(status.peers.len())),
            ("active", count(status.active)),
            ("open", i64::from(status.admission == "open")),
            ("listed", i64::from(status.listed)),
            ("month_bytes", number(status.month_bytes)),
            ("echoes_total", number(status.echoes)),
        ] {
            self.0.provider.with_label_values(&[what]).set(value);
        }
        for (reason, counter) in &status.refused {
            self.0
                .provider_refused
                .with_label_values(&[reason])
                .set(number(counter.packets));
        }
        self.show_grants(status);
        self.0.client_packets.reset();
        self.0.client_bytes.reset();
        self.0.client_dropped.reset();
        self.0.client_marked.reset();
        self.0.client_delay.reset();
        for peer in &status.peers {
            let client = peer.peer.to_string();
            // Down is towards the client, which receives it.
            for (direction, shaped) in ["received", "sent"].into_iter().zip(peer.shaped) {
                let labels = [client.as_str(), direction];
                self.0
                    .client_dropped
                    .with_label_values(&labels)
                    .set(number(shaped.dropped_packets));
                self.0
                    .client_marked
                    .with_label_values(&labels)
                    .set(number(shaped.marks));
                self.0
                    .client_delay
                    .with_label_values(&labels)
                    .set(Duration::from_nanos(shaped.delay_ns).as_secs_f64());
            }
            for (direction, counter) in [("sent", peer.carried.sent), ("received", peer.carried.received)] {
                let labels = [client.as_str(), direction];
                self.0
                    .client_packets
                    .with_label_values(&labels)
                    .set(number(counter.packets));
                self.0
                    .client_bytes
                    .with_label_values(&labels)
                    .set(number(counter.bytes));
            }
        }
    }

    /// Shows what is known of the line.
    pub fn show_line(&self, line: &LineStatus) {
        self.0.line.reset();
        for (direction, bits) in [("down", line.down_bits_per_second), ("up", line.up_bits_per_second)] {
            if let Some(bits) = bits {
                let bits = i64::try_from(bits).unwrap_or(i64::MAX);
                self.0.line.with_label_values(&[direction]).set(bits);
            }
        }
        for source in LineSource::ALL {
            let gauge = self.0.line_source.with_label_values(&[source.as_str()]);
            gauge.set(i64::from(source == line.source));
        }
    }

    fn show_grants(&self, status: &ProviderStatus) {
        let number = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        self.0.grant.reset();
        let Some(enforcement) = &status.enforcement else { return };
        for (whose, rate) in [("client", enforcement.share), ("all", enforcement.together)] {
            if let Some(rate) = rate {
                self.0
                    .grant
                    .with_label_values(&[whose])
                    .set(number(rate.bits_per_second()));
            }
        }
        for (reason, counter) in &enforcement.dropped {
            self.0
                .grant_refused
                .with_label_values(&[reason])
                .set(number(counter.packets));
        }
    }

    /// Shows what the proxy counted.
    pub fn show_proxy(&self, proxy: &crate::socks5::Metrics) {
        for (what, counter) in [
            ("active", &proxy.active),
            ("accepted_total", &proxy.accepted_total),
            ("overflow_total", &proxy.overflow_total),
            ("handshake_failed_total", &proxy.handshake_failed_total),
            ("no_tunnel_total", &proxy.no_tunnel_total),
            ("refused_total", &proxy.refused_total),
            ("unreachable_total", &proxy.unreachable_total),
            ("reset_total", &proxy.reset_total),
            ("datagrams_total", &proxy.datagrams_total),
        ] {
            let value = i64::try_from(counter.load(Ordering::Relaxed)).unwrap_or(i64::MAX);
            self.0.proxy.with_label_values(&[what]).set(value);
        }
    }

    /// The text exposition format, version 0.0.4.
    pub fn encode(&self) -> prometheus::Result<String> {
        let mut out = Vec::new();
        TextEncoder::new().encode(&self.0.registry.gather(), &mut out)?;
        String::from_utf8(out).map_err(|error| prometheus::Error::Msg(error.to_string()))
    }
}

fn register<M: prometheus::core::Collector + Clone + 'static>(registry: &Registry, metric: M) -> prometheus::Result<M> {
    registry.register(Box::new(metric.clone()))?;
    Ok(metric)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn totals_never_run_backwards_when_a_new_tunnel_begins() {
        let metrics = Metrics::new().unwrap();
        let at = |rx_bytes| Traffic { tx_bytes: 0, rx_bytes };
        metrics.count_traffic(at(0), at(100));
        metrics.count_traffic(at(100), at(0)); // a new tunnel counts from zero
        metrics.count_traffic(at(0), at(5));
        assert!(
            metrics
                .encode()
                .unwrap()
                .contains("dvpn_tunnel_received_bytes_total 105")
        );
    }
}
