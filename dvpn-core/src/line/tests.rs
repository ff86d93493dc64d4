//! Tables: when the line is measured, what is remembered, what is told.

use dvpn_common::status::LineSource;
use proptest::prelude::*;

use super::*;
use crate::Retry;

fn at(text: &str) -> Timestamp {
    format!("2026-11-{text}Z").parse().unwrap()
}

fn home() -> NetworkId {
    NetworkId::of([&b"eth0"[..], b"192.168.1.1"])
}

fn rate(megabits: u64) -> Rate {
    Rate::from_bits_per_second(megabits * 1_000_000)
}

fn result(text: &str) -> Measured {
    Measured {
        down: rate(94),
        up: Some(rate(20)),
        at: at(text),
    }
}

fn failure() -> Failure {
    Failure {
        what: "no answer".to_owned(),
        how: "try later".to_owned(),
        retry: Retry::Backoff,
    }
}

fn facts() -> Facts {
    Facts {
        has_server: true,
        network: Some(home()),
        metered: false,
        state: StateName::Disconnected,
        lockdown: false,
        has_clients: false,
    }
}

/// A decision in a few words.
fn told(decision: &Decision) -> String {
    match decision {
        Decision::Measure { payload } => format!("measure {}", payload / 1_000_000),
        Decision::Keep { until } => format!("keep until {}", &until.to_string()[8..16]),
        Decision::Not { hindrance, until } => {
            let name = format!("{hindrance:?}");
            let name = name.split('(').next().unwrap().to_owned();
            until.map_or(name.clone(), |until| {
                format!("{name} until {}", &until.to_string()[8..16])
            })
        }
    }
}

/// Known since | state | metered | lockdown | clients | network | spent at | MB | now | decision.
const TABLE: &str = "
               | disconnected | no  | no  | no  | home |          |   0 | 22T12:00:00 | measure 160
               | connected    | no  | no  | no  | home |          |   0 | 22T12:00:00 | measure 160
               | connected    | no  | yes | no  | home |          |   0 | 22T12:00:00 | measure 160
               | disconnected | no  | no  | yes | home |          |   0 | 22T12:00:00 | measure 160
               | blocked      | no  | no  | no  | home |          |   0 | 22T12:00:00 | Blocked
               | disconnected | no  | yes | no  | home |          |   0 | 22T12:00:00 | Blocked
               | disconnected | yes | no  | no  | home |          |   0 | 22T12:00:00 | Metered
               | probing      | no  | no  | no  | home |          |   0 | 22T12:00:00 | Connecting
               | degraded     | no  | no  | no  | home |          |   0 | 22T12:00:00 | Connecting
               | backoff      | no  | no  | no  | home |          |   0 | 22T12:00:00 | Connecting
               | disconnected | no  | no  | no  | none |          |   0 | 22T12:00:00 | NoNetwork
               | disconnected | no  | no  | no  | home | 22T10:00:00 | 60  | 22T12:00:00 | measure 100
               | disconnected | no  | no  | no  | home | 22T10:00:00 | 121 | 22T12:00:00 | Spent until 23T10:00
               | disconnected | no  | no  | no  | home | 22T10:00:00 | 121 | 23T10:00:00 | measure 160
               | disconnected | no  | no  | no  | home | 24T10:00:00 | 121 | 23T10:00:00 | measure 160
  22T10:00:00  | disconnected | no  | no  | no  | home |          |   0 | 22T12:00:00 | keep until 23T10:00
  22T10:00:00  | blocked      | yes | no  | yes | home |          |   0 | 22T12:00:00 | keep until 23T10:00
  22T10:00:00  | disconnected | no  | no  | no  | away |          |   0 | 22T12:00:00 | measure 160
  22T10:00:00  | disconnected | no  | no  | no  | home |          |   0 | 23T09:59:59 | keep until 23T10:00
  22T10:00:00  | disconnected | no  | no  | no  | home |          |   0 | 23T10:00:00 | measure 160
  22T10:00:00  | connected    | no  | no  | no  | home |          |   0 | 23T10:00:00 | Busy
  22T10:00:00  | disconnected | no  | no  | yes | home |          |   0 | 23T10:00:00 | Busy
  22T10:00:00  | disconnected | yes | no  | no  | home |          |   0 | 23T10:00:00 | Metered
  23T10:00:00  | disconnected | no  | no  | no  | home |          |   0 | 22T10:00:00 | measure 160";

#[test]
fn the_line_is_measured_once_a_day_and_network_and_not_when_it_would_harm() {
    let mut rows = 0;
    for line in TABLE.lines().filter(|line| !line.is_empty()) {
        let columns: Vec<&str> = line.split('|').map(str::trim).collect();
        let [
            known,
            state,
            metered,
            lockdown,
            clients,
            network,
            spent_at,
            spent,
            now,
            wanted,
        ] = columns[..]
        else {
            panic!("ten columns: {line}")
        };
        let mut book = Book::default();
        if !spent_at.is_empty() {
            book.spend(home(), spent.parse::<u64>().unwrap() * 1_000_000, at(spent_at));
        }
        if !known.is_empty() {
            book.note(home(), result(known));
        }
        let facts = Facts {
            network: match network {
                "home" => Some(home()),
                "away" => Some(NetworkId::of([&b"eth0"[..], b"192.168.2.1"])),
                _ => None,
            },
            state: StateName::ALL.into_iter().find(|name| name.as_str() == state).unwrap(),
            metered: metered == "yes",
            lockdown: lockdown == "yes",
            has_clients: clients == "yes",
            ..facts()
        };
        let decision = decide(&book, &Failures::default(), &facts, at(now));
        assert_eq!(told(&decision), wanted, "{line}");
        rows += 1;
    }
    assert_eq!(rows, 24);
    let facts = Facts {
        has_server: false,
        ..facts()
    };
    let decision = decide(&Book::default(), &Failures::default(), &facts, at("22T12:00:00"));
    assert_eq!(told(&decision), "NoServer");
}

#[test]
fn a_failure_waits_longer_each_time() {
    let mut failures = Failures::default();
    let mut waited = Vec::new();
    for _ in 0..9 {
        failures.note(failure(), at("22T12:00:00"));
        let Decision::Not { until: Some(until), .. } = decide(&Book::default(), &failures, &facts(), at("22T12:00:00"))
        else {
            panic!("not at once")
        };
        waited.push(until.duration_since(at("22T12:00:00")).as_secs() / 60);
        assert_eq!(
            told(&decide(&Book::default(), &failures, &facts(), until)),
            "measure 160"
        );
    }
    assert_eq!(waited, [1, 2, 4, 8, 16, 32, 60, 60, 60]);
}

#[test]
fn a_book_outlives_a_restart_and_believes_nothing_else() {
    let mut book = Book::default();
    book.spend(home(), 5, at("22T10:00:00"));
    book.note(home(), result("22T10:01:00"));
    let away = NetworkId::of([&b"wlan0"[..]]);
    book.note(
        away,
        Measured {
            up: None,
            ..result("22T11:00:00")
        },
    );
    book.spend(NetworkId::of([]), 9, at("22T12:00:00"));
    let text = book.encode();
    assert_eq!(Book::decode(text.as_bytes()), Ok(book.clone()));
    assert_eq!(Book::decode(b""), Ok(Book::default()));
    let line = text.lines().find(|line| line.contains("up_bits")).unwrap().to_owned();
    let mut cases = vec![
        line.replace("94000000", "0"),
        line.replace("94000000", "-5"),
        line.replace("94000000", "1000000000001"),
        line.replace("\"down_bits_per_second\":94000000,", ""),
        line.replace("\"measured_at\":\"2026-11-22T10:01:00Z\",", ""),
        line.replace("2026-11-22T10:01:00Z", "yesterday"),
        line.replace("{\"network\":\"", "{\"network\":\"z"),
        line.replace('{', "{\"more\":1,"),
        format!("{line}\n{line}"),
        "x".to_owned(),
        " ".repeat(16 * 1024 + 1),
    ];
    let many = (0..33_u8).map(|number| line.replace(&line[12..44], &format!("{number:032x}")));
    cases.push(many.collect::<Vec<_>>().join("\n"));
    for case in cases {
        assert!(case == "x" || case != line, "the case is a change");
        assert!(Book::decode(case.as_bytes()).is_err(), "{case}");
    }
    assert!(Book::decode(&[0xff]).is_err());
}

#[test]
fn the_network_of_longest_ago_is_forgotten_first() {
    let mut book = Book::default();
    let network = |number: u8| NetworkId::of([&[number][..]]);
    for number in 0..40 {
        book.note(network(number), result(&format!("22T10:{number:02}:00")));
    }
    let kept = (0..40).filter(|number| book.measured(&network(*number), at("22T12:00:00")).is_some());
    assert_eq!(kept.collect::<Vec<_>>(), (8..40).collect::<Vec<_>>());
    assert!(book.encode().len() < 16 * 1024);
    assert_eq!(book.latest(at("22T12:00:00")), Some(result("22T10:39:00")));
    assert_eq!(
        book.latest(at("22T10:20:30")),
        Some(result("22T10:20:00")),
        "what is from the future is none"
    );
    assert_eq!(Book::default().latest(at("22T12:00:00")), None);
    assert!(Book::decode(book.encode().as_bytes()).is_ok());
}

#[test]
fn a_provider_shares_the_slower_direction() {
    let known = Known::Measured(result("22T10:00:00"));
    let own = known.own().unwrap();
    assert_eq!((own.down, own.up), (rate(94), rate(20)));
    assert_eq!(known.forwarded(), Some(Total::symmetric(rate(20))));
    let half = Known::Measured(Measured {
        up: None,
        ..result("22T10:00:00")
    });
    assert_eq!((half.own(), half.forwarded()), (None, None));
    assert_eq!(Known::Set(rate(5)).own(), Some(Total::symmetric(rate(5))));
}

fn words_of(known: Known, decision: &Decision, is_provider: bool, limit: Option<Rate>, progress: Option<u8>) -> String {
    let status = words::status(&words::Facts {
        known,
        decision,
        progress,
        is_provider,
        limit,
    });
    assert_eq!(status.source == LineSource::Unmeasured, known == Known::Nothing);
    status.summary
}

#[test]
fn one_sentence_says_whose_half_it_is() {
    let keep = Decision::Keep {
        until: at("23T10:00:00"),
    };
    let no = Decision::Not {
        hindrance: Hindrance::NoServer,
        until: None,
    };
    let even = Known::Set(rate(94));
    let uneven = Known::Measured(result("22T10:00:00"));
    let half = Known::Measured(Measured {
        up: None,
        ..result("22T10:00:00")
    });
    for (said, wanted) in [
        (
            words_of(even, &keep, false, None, None),
            "half of 94 Mbit/s: your grant, 47 Mbit/s of your own line; the provider gives at most half of its line, which it \
             does not tell",
        ),
        (
            words_of(uneven, &keep, false, None, None),
            "half of 94 Mbit/s down and 20 Mbit/s up: your grant, 47 Mbit/s down and 10 Mbit/s up of your own line; the \
             provider gives at most half of its line, which it does not tell",
        ),
        (
            words_of(even, &keep, true, None, None),
            "half of 94 Mbit/s: each client's grant, 47 Mbit/s each way",
        ),
        (
            words_of(uneven, &keep, true, Some(rate(15)), None),
            "half of 20 Mbit/s, the slower direction of your line (94 Mbit/s down and 20 Mbit/s up): each client's grant, 10 \
             Mbit/s each way; all together at most 15 Mbit/s",
        ),
        (
            words_of(even, &keep, true, Some(rate(5)), None),
            "NODE_LIMIT_MBPS: each client's grant, 5 Mbit/s each way; all together at most 5 Mbit/s",
        ),
        (
            words_of(Known::Nothing, &no, true, None, None),
            "unmeasured: clients are refused",
        ),
        (
            words_of(Known::Nothing, &no, false, None, None),
            "unmeasured: your traffic is not shaped",
        ),
        (
            words_of(half, &keep, true, None, None),
            "your line brings 94 Mbit/s, its upload is unmeasured: clients are refused",
        ),
        (
            words_of(Known::Nothing, &Decision::Measure { payload: 1 }, true, None, Some(40)),
            "measuring your line, 40 %: until then clients are refused",
        ),
    ] {
        assert_eq!(said, wanted);
    }
}

#[test]
fn every_hindrance_says_what_to_do() {
    for hindrance in [
        Hindrance::NotYet,
        Hindrance::NoServer,
        Hindrance::NoNetwork,
        Hindrance::Blocked,
        Hindrance::Metered,
        Hindrance::Connecting,
        Hindrance::Busy,
        Hindrance::Spent,
        Hindrance::Failed(failure()),
    ] {
        let decision = Decision::Not {
            hindrance,
            until: Some(at("23T10:00:00")),
        };
        let status = words::status(&words::Facts {
            known: Known::Nothing,
            decision: &decision,
            progress: None,
            is_provider: true,
            limit: None,
        });
        let problem = status.problem.unwrap();
        assert!(
            problem.what.starts_with("the line is unmeasured: ") && !problem.how.is_empty(),
            "{problem:?}"
        );
        assert_eq!(status.next_at, Some(at("23T10:00:00")));
    }
}

proptest! {
    #[test]
    fn a_record_is_read_whole_or_not_at_all(bytes in proptest::collection::vec(any::<u8>(), 0..200), at_byte in 0..200_usize, with in any::<u8>()) {
        drop(Book::decode(&bytes));
        let mut book = Book::default();
        book.note(home(), result("22T10:00:00"));
        let mut record = book.encode().into_bytes();
        let length = record.len();
        record[at_byte % length] = with;
        // What reads reads again as the same.
        if let Ok(read) = Book::decode(&record) {
            prop_assert_eq!(Book::decode(read.encode().as_bytes()), Ok(read));
        }
        prop_assert!(Book::decode(&record[..at_byte % (length - 1)]).is_err() || at_byte % (length - 1) == 0);
    }
}
