//! Hours of the day that are soon over, and soon begin again, for a program that has nothing but the real clock.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A `NODE_SCHEDULE` that closes at the next whole minute after a margin, for a minute.
#[derive(Debug, Clone)]
pub struct Hours {
    /// The setting.
    pub schedule: String,
    /// When it closes.
    pub closes: SystemTime,
    /// When it opens again.
    pub opens: SystemTime,
}

/// Hours that are open now and close not before `margin` is over.
pub fn soon_over(margin: Duration) -> Hours {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let closes = (now + margin).as_secs().div_ceil(60);
    let clock = |minute: u64| format!("{:02}:{:02}", minute / 60 % 24, minute % 60);
    let at = |minute: u64| UNIX_EPOCH + Duration::from_mins(minute);
    Hours {
        schedule: format!(
            "{}-{},{}-{}",
            clock(closes - 60),
            clock(closes),
            clock(closes + 1),
            clock(closes + 60)
        ),
        closes: at(closes),
        opens: at(closes + 1),
    }
}

/// How long until then; nothing once it is over.
pub fn until(moment: SystemTime) -> Duration {
    moment.duration_since(SystemTime::now()).unwrap_or_default()
}
