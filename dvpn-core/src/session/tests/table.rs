//! Every state × every input: the next state.

use super::*;

/// Columns, in order. `+` is the good answer, `-` a failure; `deadline` is the state's own.
const INPUTS: [&str; 30] = [
    "start",
    "start-other",
    "stop",
    "listed+",
    "listed-",
    "probed+",
    "probed-",
    "paid",
    "unpaid",
    "cannot-tell",
    "approved+",
    "approved-now",
    "approved-backoff",
    "approved-never",
    "provisioned+",
    "provisioned-",
    "configured+",
    "configured-",
    "handshake",
    "traffic",
    "lost",
    "torn-down",
    "token",
    "config",
    "config-missing",
    "network",
    "firewall",
    "deadline",
    "renewed+",
    "renewed-",
];

/// `.` stays; the other abbreviations are spelled out in [`state_of`].
const TABLE: &str = include_str!("table.txt");

fn state_of(cell: &str) -> StateName {
    match cell {
        "Dc" => StateName::Disconnected,
        "Di" => StateName::Discovering,
        "Pr" => StateName::Probing,
        "Au" => StateName::Authorizing,
        "Pv" => StateName::Provisioning,
        "Cg" => StateName::Connecting,
        "Cd" => StateName::Connected,
        "De" => StateName::Degraded,
        "Dg" => StateName::Disconnecting,
        "Ba" => StateName::Backoff,
        "Bl" => StateName::Blocked,
        other => panic!("{other} is no state"),
    }
}

/// The input of a column, with the number that the rig's state waits for.
fn input(name: &str, rig: &Rig) -> Option<Input> {
    let asked = rig.asked;
    let target = rig.session.state.provider().cloned().unwrap_or_else(|| provider(1));
    let approved = || Ok(approval(&target, rig.now, HOUR));
    Some(match name {
        "start" => Input::Start(Choice::default()),
        "start-other" => Input::Start(Choice {
            only_ids: vec!["elsewhere".parse().unwrap()],
            ..Choice::default()
        }),
        "stop" => Input::Stop,
        "listed+" => Input::Listed(asked, Ok(directory(2))),
        "listed-" => Input::Listed(asked, Err(failure(Retry::Backoff))),
        "probed+" => Input::Probed(
            asked,
            if let State::Probing(_) = rig.session.state {
                rig.all_alive()
            } else {
                vec![]
            },
        ),
        "probed-" => Input::Probed(asked, vec![]),
        "paid" => Input::Verified(asked, paid(rig.now, HOUR)),
        "unpaid" => Input::Verified(asked, Verification::NotPaid(failure(Retry::Never))),
        "cannot-tell" => Input::Verified(asked, Verification::CannotTell(failure(Retry::Backoff))),
        "approved+" => Input::Approved(asked, approved()),
        "approved-now" => Input::Approved(asked, Err(failure(Retry::Now))),
        "approved-backoff" => Input::Approved(asked, Err(failure(Retry::Backoff))),
        "approved-never" => Input::Approved(asked, Err(failure(Retry::Never))),
        "provisioned+" => Input::Provisioned(asked, approved()),
        "provisioned-" => Input::Provisioned(asked, Err(failure(Retry::Never))),
        "configured+" => Input::TunnelConfigured(asked, Ok(())),
        "configured-" => Input::TunnelConfigured(asked, Err(failure(Retry::Now))),
        "handshake" => Input::HandshakeSeen(asked),
        "traffic" => Input::TrafficSampled(
            asked,
            Traffic {
                tx_bytes: rig.traffic.tx_bytes,
                rx_bytes: 10_000,
            },
        ),
        "renewed+" => Input::TunnelRenewed(asked, Ok(())),
        "renewed-" => Input::TunnelRenewed(asked, Err(failure(Retry::Never))),
        "lost" => Input::TunnelLost(asked, failure(Retry::Now)),
        "torn-down" => Input::TornDown(asked),
        "token" => Input::TokenChanged,
        "config" => Input::ConfigChanged(Box::new(rig.config.clone())),
        "config-missing" => Input::ConfigChanged(Box::new(SessionConfig {
            not_configured: Some(failure(Retry::Never)),
            ..rig.config.clone()
        })),
        "network" => Input::NetworkChanged,
        "firewall" => Input::FirewallFailed(failure(Retry::Backoff)),
        "deadline" => return None,
        other => panic!("{other}"),
    })
}

fn rows() -> impl Iterator<Item = (&'static str, Vec<&'static str>)> {
    TABLE
        .lines()
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .map(|line| {
            let mut cells = line.split_whitespace();
            (cells.next().unwrap(), cells.collect())
        })
}

fn cell_of(state: StateName) -> &'static str {
    CELLS.into_iter().find(|cell| state_of(cell) == state).unwrap()
}

const CELLS: [&str; 11] = ["Dc", "Di", "Pr", "Au", "Pv", "Cg", "Cd", "De", "Dg", "Ba", "Bl"];

#[test]
fn every_input_in_every_state_leads_where_the_table_says() {
    let mut wrong = Vec::new();
    for (row, wanted) in rows() {
        assert_eq!(wanted.len(), INPUTS.len(), "{row}");
        let mut seen = Vec::new();
        for column in INPUTS {
            let mut rig = rig_in(row);
            let before = rig.session.state();
            let next = match input(column, &rig) {
                Some(input) => rig.feed(input),
                None if rig.session.poll_timeout().is_none() => before,
                None => rig.expire(),
            };
            seen.push(if next == before { "." } else { cell_of(next) });
        }
        if seen != wanted {
            wrong.push(format!("{row:24} {}", seen.join("  ")));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_table_has_a_row_for_every_state() {
    for state in StateName::ALL {
        assert!(rows().any(|(row, _)| rig_in(row).session.state() == state), "{state:?}");
    }
}

#[test]
fn answers_with_another_number_change_nothing_in_any_state() {
    for (row, _) in rows() {
        for column in INPUTS {
            let numbered = column.ends_with(['+', '-'])
                || [
                    "paid",
                    "unpaid",
                    "cannot-tell",
                    "approved-now",
                    "approved-backoff",
                    "approved-never",
                    "handshake",
                    "traffic",
                    "lost",
                    "torn-down",
                ]
                .contains(&column);
            if !numbered {
                continue;
            }
            for other in [0, 1_000_000] {
                let mut rig = rig_in(row);
                let before = rig.session.status();
                rig.asked = Attempt(other);
                let late = input(column, &rig).unwrap();
                rig.feed(late);
                assert_eq!(rig.session.status(), before, "{row} × {column}");
                assert_eq!(rig.last, [], "{row} × {column}");
            }
        }
    }
}
