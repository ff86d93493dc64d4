//! The line as people read of it.

use dvpn_common::{
    rate::Rate,
    status::{LineSource, LineStatus, Problem},
};
use jiff::Timestamp;

use super::{Decision, Hindrance, Known};
use crate::grant::{PerDirection, Total};

/// What the words need to know.
#[derive(Debug, Clone)]
pub struct Facts<'a> {
    /// The line.
    pub known: Known,
    /// Whether it is measured now.
    pub decision: &'a Decision,
    /// While it is being measured: percent of it, and what was seen last.
    pub progress: Option<u8>,
    /// This install serves others.
    pub is_provider: bool,
    /// `NODE_LIMIT_MBPS`.
    pub limit: Option<Rate>,
}

/// The part of the status that is about the line.
pub fn status(facts: &Facts<'_>) -> LineStatus {
    let rates = facts.known.rates();
    let (source, at) = match facts.known {
        Known::Set(_) => (LineSource::Set, None),
        Known::Measured(measured) => (LineSource::Measured, Some(measured.at)),
        Known::Nothing => (LineSource::Unmeasured, None),
    };
    let bits = |rate: Option<Rate>| rate.map(Rate::bits_per_second);
    LineStatus {
        source,
        down_bits_per_second: bits(rates.down),
        up_bits_per_second: bits(rates.up),
        measured_at: at,
        next_at: next_at(facts.decision),
        measuring_percent: facts.progress,
        problem: problem(facts, rates),
        summary: summary(facts, rates),
    }
}

fn next_at(decision: &Decision) -> Option<Timestamp> {
    match decision {
        Decision::Keep { until } => Some(*until),
        Decision::Not { until, .. } => *until,
        Decision::Measure { .. } => None,
    }
}

/// What is missing, and what its owner can do. Nothing while both directions are known.
fn problem(facts: &Facts<'_>, rates: PerDirection<Option<Rate>>) -> Option<Problem> {
    let what = match rates {
        PerDirection {
            down: Some(_),
            up: Some(_),
        } => return None,
        PerDirection { down: Some(_), .. } => {
            return Some(Problem {
                what: "the line's upload is unmeasured: the server at BANDWIDTH_TEST_URL takes none".to_owned(),
                how: "give it a server that takes POST, such as the pool's /speed, or set BANDWIDTH_TOTAL_MBPS"
                    .to_owned(),
            });
        }
        PerDirection { .. } => "the line is unmeasured",
    };
    let (why, how) = match facts.decision {
        Decision::Not { hindrance, .. } => why(hindrance),
        Decision::Measure { .. } | Decision::Keep { .. } => ("it is being measured".to_owned(), "wait".to_owned()),
    };
    Some(Problem {
        what: format!("{what}: {why}"),
        how,
    })
}

fn why(hindrance: &Hindrance) -> (String, String) {
    let set = "or set BANDWIDTH_TOTAL_MBPS";
    let (why, how) = match hindrance {
        Hindrance::NotYet => ("the daemon has only just started", "wait".to_owned()),
        Hindrance::NoServer => (
            "BANDWIDTH_TEST_URL is not set",
            format!("set it to a speed server, such as the pool's /speed, {set}"),
        ),
        Hindrance::NoNetwork => ("this machine has no way out", "connect it to a network".to_owned()),
        Hindrance::Blocked => ("everything is blocked", format!("start or stop the session, {set}")),
        Hindrance::Metered => (
            "this network costs by the byte, NetworkManager says",
            format!("mark the connection as not metered, {set}"),
        ),
        Hindrance::Connecting => ("a session is being made", "wait".to_owned()),
        Hindrance::Busy => ("the line is in use", "wait".to_owned()),
        Hindrance::Spent => (
            "today's bytes for measuring it are spent",
            format!("wait until tomorrow, {set}"),
        ),
        Hindrance::Failed(failure) => return (failure.what.clone(), format!("{}; {set}", failure.how)),
    };
    (why.to_owned(), how)
}

fn summary(facts: &Facts<'_>, rates: PerDirection<Option<Rate>>) -> String {
    let consequence = if facts.is_provider {
        "clients are refused"
    } else {
        "your traffic is not shaped"
    };
    if let Some(percent) = facts.progress
        && facts.known == Known::Nothing
    {
        return format!("measuring your line, {percent} %: until then {consequence}");
    }
    match (facts.is_provider, facts.known.own(), facts.known.forwarded()) {
        (true, Some(own), Some(total)) => of_clients(own, total, facts.limit),
        (false, Some(total), _) => {
            let grant = total.grant();
            format!(
                "half of {}: your grant, {} of your own line; the provider gives at most half of its line, which it does not \
                 tell",
                both(total),
                both(grant)
            )
        }
        _ => match rates.down {
            Some(down) => format!("your line brings {down}, its upload is unmeasured: {consequence}"),
            None => format!("unmeasured: {consequence}"),
        },
    }
}

fn of_clients(own: Total, total: Total, limit: Option<Rate>) -> String {
    let budget = crate::grant::Budget::new(total.down, limit);
    let slower = if own.down == own.up {
        String::new()
    } else {
        // What is forwarded comes in and goes out.
        format!(", the slower direction of your line ({})", both(own))
    };
    let lent = match limit {
        Some(limit) if limit < total.down => format!("; all together at most {limit}"),
        Some(_) | None => String::new(),
    };
    let grant = if budget.grant() == total.down.half() {
        format!(
            "half of {}{slower}: each client's grant, {}",
            total.down,
            budget.grant()
        )
    } else {
        format!("NODE_LIMIT_MBPS: each client's grant, {}", budget.grant())
    };
    format!("{grant} each way{lent}")
}

fn both(total: Total) -> String {
    if total.down == total.up {
        format!("{}", total.down)
    } else {
        format!("{} down and {} up", total.down, total.up)
    }
}
