//! Whatever is fed, in whatever order: the watch's invariants hold (see [`crate::sim::watch`]).

use proptest::prelude::*;

use super::*;
use crate::sim::watch::Broken;

/// One thing done to a session. `number` picks among the numbers that were ever asked with.
#[derive(Debug, Clone)]
enum Op {
    Start {
        other: bool,
    },
    Stop,
    Listed {
        number: u8,
        providers: Option<u8>,
    },
    Probed {
        number: u8,
        alive: bool,
    },
    Verified {
        number: u8,
        answer: u8,
        seconds: u64,
    },
    Approved {
        number: u8,
        provider: u8,
        answer: u8,
        seconds: u64,
    },
    Provisioned {
        number: u8,
        good: bool,
        seconds: u64,
    },
    Configured {
        number: u8,
        good: bool,
    },
    Handshake {
        number: u8,
    },
    Traffic {
        number: u8,
        tx: u64,
        rx: u64,
    },
    Renewed {
        number: u8,
        good: bool,
    },
    Lost {
        number: u8,
    },
    TornDown {
        number: u8,
    },
    Token,
    Config {
        kill_switch: bool,
        lockdown: bool,
        fallback: bool,
        missing: bool,
    },
    Network,
    Firewall,
    Wait {
        milliseconds: u64,
    },
    Deadline,
}

fn any_op() -> impl Strategy<Value = Op> {
    // Mostly the newest number, so that sessions get somewhere; sometimes an old or a future one.
    let number = || prop_oneof![8 => Just(0_u8), 1 => 1..6_u8, 1 => Just(u8::MAX)];
    let seconds = || prop_oneof![1..30_u64, 30..100_000_u64];
    prop_oneof![
        3 => any::<bool>().prop_map(|other| Op::Start { other }),
        1 => Just(Op::Stop),
        3 => (number(), proptest::option::weighted(0.8, 0..5_u8))
            .prop_map(|(number, providers)| Op::Listed { number, providers }),
        3 => (number(), proptest::bool::weighted(0.8)).prop_map(|(number, alive)| Op::Probed { number, alive }),
        4 => (number(), 0..6_u8, seconds())
            .prop_map(|(number, answer, seconds)| Op::Verified { number, answer, seconds }),
        3 => (number(), 0..5_u8, 0..6_u8, seconds())
            .prop_map(|(number, provider, answer, seconds)| Op::Approved { number, provider, answer, seconds }),
        2 => (number(), any::<bool>(), seconds())
            .prop_map(|(number, good, seconds)| Op::Provisioned { number, good, seconds }),
        2 => (number(), proptest::bool::weighted(0.8)).prop_map(|(number, good)| Op::Configured { number, good }),
        3 => number().prop_map(|number| Op::Handshake { number }),
        4 => (number(), 0..2_000_u64, 0..2_000_u64).prop_map(|(number, tx, rx)| Op::Traffic { number, tx, rx }),
        2 => (number(), any::<bool>()).prop_map(|(number, good)| Op::Renewed { number, good }),
        1 => number().prop_map(|number| Op::Lost { number }),
        3 => number().prop_map(|number| Op::TornDown { number }),
        1 => Just(Op::Token),
        1 => any::<(bool, bool, bool, bool)>().prop_map(|(kill_switch, lockdown, fallback, missing)| Op::Config {
            kill_switch, lockdown, fallback, missing: missing && lockdown,
        }),
        1 => Just(Op::Network),
        1 => Just(Op::Firewall),
        2 => (0..40_000_u64).prop_map(|milliseconds| Op::Wait { milliseconds }),
        3 => Just(Op::Deadline),
    ]
}

impl Rig {
    fn number(&self, number: u8) -> Attempt {
        if number == u8::MAX {
            Attempt(self.asked.0 + 1)
        } else {
            Attempt(self.asked.0.saturating_sub(number.into()))
        }
    }

    fn apply(&mut self, op: &Op) -> Result<(), Broken> {
        let (now, failed) = (self.now, || failure(Retry::Backoff));
        let later = |seconds| Duration::from_secs(seconds);
        let input = match op {
            Op::Start { other: false } => Input::Start(Choice::default()),
            Op::Start { other: true } => Input::Start(Choice {
                only_regions: vec!["odd".parse().unwrap()],
                ..Choice::default()
            }),
            Op::Stop => Input::Stop,
            Op::Listed { number, providers } => {
                Input::Listed(self.number(*number), providers.map(directory).ok_or_else(failed))
            }
            Op::Probed { number, alive } => {
                let all = if let State::Probing(_) = self.session.state {
                    self.all_alive()
                } else {
                    vec![]
                };
                Input::Probed(self.number(*number), if *alive { all } else { vec![] })
            }
            Op::Verified {
                number,
                answer,
                seconds,
            } => Input::Verified(
                self.number(*number),
                match answer {
                    0 => Verification::NotPaid(failed()),
                    1 => Verification::CannotTell(failed()),
                    _ => paid(now, later(*seconds)),
                },
            ),
            Op::Approved {
                number,
                provider: n,
                answer,
                seconds,
            } => {
                let asked = self.session.state.provider().cloned().unwrap_or_else(|| provider(1));
                // Sometimes for somebody else than asked.
                let target = if *n == 0 { provider(7) } else { asked };
                let retry = match answer {
                    0 => Some(Retry::Now),
                    1 => Some(Retry::Backoff),
                    2 => Some(Retry::Never),
                    _ => None,
                };
                let address = if *answer == 5 { "10.96.0.3" } else { "10.96.0.2" };
                let given = retry.map_or_else(
                    || Ok(approval_at(address, &target, now, later(*seconds))),
                    |r| Err(failure(r)),
                );
                Input::Approved(self.number(*number), given)
            }
            Op::Provisioned { number, good, seconds } => Input::Provisioned(
                self.number(*number),
                if *good {
                    Ok(approval(&provider(9), now, later(*seconds)))
                } else {
                    Err(failed())
                },
            ),
            Op::Configured { number, good } => {
                Input::TunnelConfigured(self.number(*number), if *good { Ok(()) } else { Err(failed()) })
            }
            Op::Handshake { number } => Input::HandshakeSeen(self.number(*number)),
            Op::Traffic { number, tx, rx } => {
                self.traffic.tx_bytes += tx;
                self.traffic.rx_bytes += rx;
                Input::TrafficSampled(self.number(*number), self.traffic)
            }
            Op::Renewed { number, good } => {
                Input::TunnelRenewed(self.number(*number), if *good { Ok(()) } else { Err(failed()) })
            }
            Op::Lost { number } => Input::TunnelLost(self.number(*number), failed()),
            Op::TornDown { number } => Input::TornDown(self.number(*number)),
            Op::Token => Input::TokenChanged,
            Op::Config {
                kill_switch,
                lockdown,
                fallback,
                missing,
            } => Input::ConfigChanged(Box::new(SessionConfig {
                kill_switch: *kill_switch,
                lockdown: *lockdown,
                fallback: *fallback,
                not_configured: missing.then(|| failure(Retry::Never)),
                ..config()
            })),
            Op::Network => Input::NetworkChanged,
            Op::Firewall => Input::FirewallFailed(failed()),
            Op::Wait { milliseconds } => return self.sleep(Duration::from_millis(*milliseconds)),
            Op::Deadline => return self.session.poll_timeout().map_or(Ok(()), |(at, _)| self.deadline(at)),
        };
        self.last = self.watch.feed(&mut self.session, input, self.now)?;
        self.note();
        Ok(())
    }

    /// A driver never sleeps beyond a deadline.
    fn sleep(&mut self, time: Duration) -> Result<(), Broken> {
        let end = after(self.now, time);
        for _ in 0..100_000 {
            match self.session.poll_timeout() {
                Some((at, _)) if at <= end.instant => self.deadline(at)?,
                Some(_) | None => break,
            }
        }
        self.now = end;
        Ok(())
    }

    fn deadline(&mut self, at: Instant) -> Result<(), Broken> {
        self.wait(at.saturating_duration_since(self.now.instant));
        self.last = self.watch.expire(&mut self.session, self.now)?;
        self.note();
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_order_of_inputs_keeps_the_invariants(
        flags in any::<(bool, bool, bool, bool)>(),
        ops in proptest::collection::vec(any_op(), 0..120),
    ) {
        let (kill_switch, lockdown, fallback, wish) = flags;
        let config = SessionConfig { kill_switch, lockdown, fallback, ..config() };
        let mut rig = Rig::restored(config, Restored { wish, ..Restored::default() });
        for op in &ops {
            if let Err(broken) = rig.apply(op) {
                return Err(TestCaseError::fail(format!("{op:?}: {broken}")));
            }
        }
    }
}
