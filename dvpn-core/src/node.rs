//! Whether a provider takes clients now: its owner's hand, the month's volume and the hours of the day.

use std::{fmt, str::FromStr, time::Duration};

use jiff::{Timestamp, civil::Date, tz::TimeZone};

/// How long clients are usually kept after the node closed for a reason that ends them.
const GRACE: Duration = Duration::from_mins(5);
const DAY_MINUTES: u16 = 24 * 60;

/// Why no new clients are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    /// What clients are granted is not known, or nothing here enforces it.
    Unenforced,
    /// The owner said so.
    Drained,
    /// `NODE_MONTHLY_CAP_GB` is used up.
    MonthlyCap,
    /// Outside `NODE_SCHEDULE`.
    Schedule,
    /// Nobody knows what the line carries, so there is nothing to grant.
    Unmeasured,
}

impl Reason {
    /// For people.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unenforced => "its clients' grants cannot be enforced, see its log",
            Self::Drained => "drained by its owner",
            Self::MonthlyCap => "the month's volume (NODE_MONTHLY_CAP_GB) is used up",
            Self::Schedule => "outside its hours (NODE_SCHEDULE)",
            Self::Unmeasured => "its line is unmeasured (BANDWIDTH_TOTAL_MBPS, BANDWIDTH_TEST_URL)",
        }
    }
}

/// What a node does with clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// Takes them.
    Open,
    /// Takes no new ones; those there stay, and may renew.
    Draining(Reason),
    /// Takes none and has none.
    Closed(Reason),
}

impl Admission {
    /// Why it is not open.
    pub fn reason(self) -> Option<Reason> {
        match self {
            Self::Open => None,
            Self::Draining(reason) | Self::Closed(reason) => Some(reason),
        }
    }
}

impl fmt::Display for Admission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Open => f.write_str("open"),
            Self::Draining(reason) => write!(f, "draining: {}", reason.as_str()),
            Self::Closed(reason) => write!(f, "closed: {}", reason.as_str()),
        }
    }
}

/// What the owner allows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rules {
    /// Bytes a calendar month (UTC), both directions together; 0 for no end.
    pub monthly_cap_bytes: u64,
    /// When clients are served.
    pub schedule: Schedule,
    /// How long clients are kept after the node closed for a reason that ends them; five minutes as a rule.
    pub grace: Duration,
}

impl Default for Rules {
    /// No end, always, and the usual grace.
    fn default() -> Self {
        Self {
            monthly_cap_bytes: 0,
            schedule: Schedule::default(),
            grace: GRACE,
        }
    }
}

/// How things are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Standing {
    /// What clients are granted is not known, or nothing here enforces it.
    pub unenforced: bool,
    /// The owner drained the node.
    pub drained: bool,
    /// The line's rate is not known.
    pub unmeasured: bool,
    /// Bytes carried for clients this month.
    pub month_bytes: u64,
    /// When the cap was first seen reached; nothing while it is not, or when nobody saw it.
    pub cap_reached: Option<Timestamp>,
}

/// What the node does at `now`. What closes counts before what only drains.
pub fn admission(rules: &Rules, standing: &Standing, now: Timestamp) -> Admission {
    let grace_over = |since: Option<Timestamp>| {
        since.is_none_or(|since| Duration::try_from(now.duration_since(since)).is_ok_and(|age| age >= rules.grace))
    };
    let capped = rules.monthly_cap_bytes > 0 && standing.month_bytes >= rules.monthly_cap_bytes;
    let closed_for = rules.schedule.closed_for(now);
    if standing.unenforced {
        Admission::Closed(Reason::Unenforced)
    } else if capped && grace_over(standing.cap_reached) {
        Admission::Closed(Reason::MonthlyCap)
    } else if closed_for.is_some_and(|age| age >= rules.grace) {
        Admission::Closed(Reason::Schedule)
    } else if capped {
        Admission::Draining(Reason::MonthlyCap)
    } else if closed_for.is_some() {
        Admission::Draining(Reason::Schedule)
    } else if standing.unmeasured {
        Admission::Draining(Reason::Unmeasured)
    } else if standing.drained {
        Admission::Draining(Reason::Drained)
    } else {
        Admission::Open
    }
}

/// The calendar month (UTC) that volume is counted for: `2026-11`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Month(Date);

impl Month {
    /// The month of a moment.
    pub fn of(now: Timestamp) -> Self {
        Self(now.to_zoned(TimeZone::UTC).date().first_of_month())
    }
}

impl fmt::Display for Month {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04}-{:02}", self.0.year(), self.0.month())
    }
}

impl FromStr for Month {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        format!("{text}-01")
            .parse()
            .map(Self)
            .map_err(|_not_a_date| format!("{text:?} is no month like 2026-11"))
    }
}

/// Volume of one month.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Which month.
    pub month: Month,
    /// Bytes so far.
    pub bytes: u64,
}

impl Usage {
    /// Adds bytes carried until `now`; a new month begins at nothing. A clock that went back begins no month.
    #[must_use]
    pub fn plus(self, bytes: u64, now: Timestamp) -> Self {
        let month = Month::of(now);
        if month > self.month {
            Self { month, bytes }
        } else {
            Self {
                month: self.month,
                bytes: self.bytes.saturating_add(bytes),
            }
        }
    }
}

/// Hours of the day in UTC: `22:00-06:00`, several separated by commas; empty is always.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Schedule(Vec<Window>);

/// From a minute of the day to another, which may be tomorrow's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Window {
    from: u16,
    to: u16,
}

impl Window {
    fn contains(self, minute: u16) -> bool {
        if self.from < self.to {
            (self.from..self.to).contains(&minute)
        } else {
            minute >= self.from || minute < self.to
        }
    }
}

impl Schedule {
    /// How long it has been closed; nothing while it is open.
    pub fn closed_for(&self, now: Timestamp) -> Option<Duration> {
        let time = now.to_zoned(TimeZone::UTC).time();
        let minute = u16::from(time.hour().unsigned_abs()) * 60 + u16::from(time.minute().unsigned_abs());
        if self.0.is_empty() || self.0.iter().any(|window| window.contains(minute)) {
            return None;
        }
        let since_end = |window: &Window| (minute + DAY_MINUTES - window.to % DAY_MINUTES) % DAY_MINUTES;
        let minutes = self.0.iter().map(since_end).min()?;
        Some(Duration::from_secs(
            u64::from(minutes) * 60 + u64::from(time.second().unsigned_abs()),
        ))
    }
}

impl FromStr for Schedule {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || "must be hours of the day in UTC like 22:00-06:00, separated by commas".to_owned();
        let minute = |text: &str| {
            let (hours, minutes) = text.trim().split_once(':')?;
            let number = |part: &str| (part.len() == 2).then(|| part.parse::<u16>().ok()).flatten();
            let (hours, minutes) = (number(hours)?, number(minutes)?);
            (minutes < 60 && hours * 60 + minutes <= DAY_MINUTES).then_some(hours * 60 + minutes)
        };
        let window = |text: &str| {
            let (from, to) = text.split_once('-')?;
            let (from, to) = (minute(from)?, minute(to)?);
            // From and to the same would be all day or never: whoever means all day leaves the setting empty.
            (from != to && from < DAY_MINUTES).then_some(Window { from, to })
        };
        let windows = text.split(',').map(str::trim).filter(|part| !part.is_empty());
        windows.map(window).collect::<Option<_>>().map(Self).ok_or_else(wrong)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    /// Schedule | cap | drained (line: or unmeasured) | used | cap seen reached | now | admission. The day is 2026-11-22, or the next from +.
    const TABLE: &str = "
                             |  0 | no  | 99 |          | 12:00:00  | open
                             |  0 | yes |  0 |          | 12:00:00  | draining: drained by its owner
                             |  0 | line |  0 |         | 12:00:00  | draining: its line is unmeasured (BANDWIDTH_TOTAL_MBPS, BANDWIDTH_TEST_URL)
                             |  0 | both |  0 |         | 12:00:00  | draining: its line is unmeasured (BANDWIDTH_TOTAL_MBPS, BANDWIDTH_TEST_URL)
        22:00-06:00          |  0 | line |  0 |         | +06:05:00 | closed: outside its hours (NODE_SCHEDULE)
                             | 10 | no  |  9 |          | 12:00:00  | open
                             | 10 | no  | 10 | 12:00:00 | 12:00:00  | draining: the month's volume (NODE_MONTHLY_CAP_GB) is used up
                             | 10 | no  | 10 | 12:00:00 | 12:04:59  | draining: the month's volume (NODE_MONTHLY_CAP_GB) is used up
                             | 10 | no  | 10 | 12:00:00 | 12:05:00  | closed: the month's volume (NODE_MONTHLY_CAP_GB) is used up
                             | 10 | no  | 11 |          | 12:00:00  | closed: the month's volume (NODE_MONTHLY_CAP_GB) is used up
        22:00-06:00          |  0 | no  |  0 |          | 21:59:59  | closed: outside its hours (NODE_SCHEDULE)
        22:00-06:00          |  0 | no  |  0 |          | 22:00:00  | open
        22:00-06:00          |  0 | no  |  0 |          | +05:59:59 | open
        22:00-06:00          |  0 | no  |  0 |          | +06:00:00 | draining: outside its hours (NODE_SCHEDULE)
        22:00-06:00          |  0 | no  |  0 |          | +06:04:59 | draining: outside its hours (NODE_SCHEDULE)
        22:00-06:00          |  0 | no  |  0 |          | +06:05:00 | closed: outside its hours (NODE_SCHEDULE)
        22:00-06:00          |  0 | yes |  0 |          | +06:05:00 | closed: outside its hours (NODE_SCHEDULE)
        22:00-06:00          | 10 | yes | 10 | 12:00:00 | 12:01:00  | closed: outside its hours (NODE_SCHEDULE)
        22:00-06:00          |  0 | yes |  0 |          | 23:00:00  | draining: drained by its owner
        01:00-02:00, 23:30-24:00 | 0 | no | 0 |         | +00:02:00 | draining: outside its hours (NODE_SCHEDULE)
        01:00-02:00, 23:30-24:00 | 0 | no | 0 |         | +00:59:00 | closed: outside its hours (NODE_SCHEDULE)
        01:00-02:00, 23:30-24:00 | 0 | no | 0 |         | +01:59:00 | open";

    #[test]
    fn what_the_owner_allows_decides_who_is_taken() {
        let time = |text: &str| match text.strip_prefix('+') {
            Some(tomorrow) => at(&format!("2026-11-23T{tomorrow}Z")),
            None => at(&format!("2026-11-22T{text}Z")),
        };
        let mut rows = 0;
        for line in TABLE.lines().filter(|line| !line.is_empty()) {
            let columns: Vec<&str> = line.split('|').map(str::trim).collect();
            let [schedule, cap, drained, used, seen, now, wanted] = columns[..] else {
                panic!("seven columns: {line}")
            };
            let rules = Rules {
                monthly_cap_bytes: cap.parse().unwrap(),
                schedule: schedule.parse().unwrap(),
                ..Rules::default()
            };
            let standing = Standing {
                unenforced: false,
                drained: matches!(drained, "yes" | "both"),
                unmeasured: matches!(drained, "line" | "both"),
                month_bytes: used.parse().unwrap(),
                cap_reached: (!seen.is_empty()).then(|| time(seen)),
            };
            assert_eq!(admission(&rules, &standing, time(now)).to_string(), wanted, "{line}");
            rows += 1;
        }
        assert_eq!(rows, 22);
    }

    #[test]
    fn a_schedule_that_does_not_read_is_refused() {
        for bad in [
            "22-06",
            "22:00",
            "22:00-22:00",
            "24:00-06:00",
            "22:60-23:00",
            "22:00-24:01",
            "9:00-10:00",
            "x",
            "-",
        ] {
            assert!(bad.parse::<Schedule>().is_err(), "{bad}");
        }
        assert_eq!("".parse::<Schedule>(), Ok(Schedule::default()));
        assert_eq!(" , ".parse::<Schedule>(), Ok(Schedule::default()));
    }

    #[test]
    fn volume_is_counted_for_the_calendar_month_in_utc() {
        let usage = Usage {
            month: "2026-11".parse().unwrap(),
            bytes: 5,
        };
        assert_eq!(usage.plus(2, at("2026-11-30T23:59:59Z")).bytes, 7);
        assert_eq!(usage.plus(2, at("2026-10-30T23:59:59Z")), Usage { bytes: 7, ..usage });
        let next = usage.plus(2, at("2026-12-01T00:00:00Z"));
        assert_eq!((next.month.to_string().as_str(), next.bytes), ("2026-12", 2));
        assert!("2026-13".parse::<Month>().is_err() && "x".parse::<Month>().is_err());
    }

    #[test]
    fn without_grants_to_enforce_a_node_is_closed_whatever_else_holds() {
        let standing = Standing {
            unenforced: true,
            drained: true,
            ..Standing::default()
        };
        assert_eq!(
            admission(&Rules::default(), &standing, Timestamp::UNIX_EPOCH),
            Admission::Closed(Reason::Unenforced)
        );
    }
}
