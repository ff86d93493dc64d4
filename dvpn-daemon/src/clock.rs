//! Jumps of the clocks: this machine slept, or somebody set its time.
//!
//! A timer on the wall clock that is cancelled when that clock is set (`TFD_TIMER_CANCEL_ON_SET`, `timerfd_create(2)`) tells
//! both at once, and costs no wake-up before: the kernel cancels it on resume too.

use std::time::Duration;

use nix::{
    errno::Errno,
    sys::{
        time::TimeSpec,
        timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags},
    },
    time::clock_gettime,
};
use tokio::sync::mpsc;

/// Clocks read one after the other differ by the time between; what is shorter is no sleep.
const LEAST_SLEEP: Duration = Duration::from_millis(500);

/// What happened to the clocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Jump {
    /// The machine was suspended for this long.
    Slept(Duration),
    /// The wall clock was set.
    Set,
}

/// Reports jumps from now on, by a thread of its own that sleeps between them.
pub fn jumps() -> nix::Result<mpsc::Receiver<Jump>> {
    let timer = TimerFd::new(ClockId::CLOCK_REALTIME, TimerFlags::TFD_CLOEXEC)?;
    let (sender, receiver) = mpsc::channel(4);
    let mut before = suspended()?;
    std::thread::Builder::new()
        .name("clock".into())
        .spawn(move || {
            while !sender.is_closed() {
                match wait(&timer) {
                    Err(Errno::ECANCELED) => {}
                    Ok(()) => continue,
                    Err(error) => {
                        tracing::warn!("jumps of the clock are not seen any more: {error}");
                        return;
                    }
                }
                let now = suspended().unwrap_or(before);
                let jump = judge(before, now);
                before = now;
                if sender.blocking_send(jump).is_err() {
                    return;
                }
            }
        })
        .map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EAGAIN)))?;
    Ok(receiver)
}

/// Until the clock jumps, or a day has passed.
fn wait(timer: &TimerFd) -> nix::Result<()> {
    let now = clock_gettime(nix::time::ClockId::CLOCK_REALTIME)?;
    let tomorrow = TimeSpec::new(now.tv_sec().saturating_add(86_400), 0);
    let flags = TimerSetTimeFlags::TFD_TIMER_ABSTIME | TimerSetTimeFlags::TFD_TIMER_CANCEL_ON_SET;
    timer.set(Expiration::OneShot(tomorrow), flags)?;
    timer.wait()
}

/// How long this machine has been suspended since it started: the one clock goes on meanwhile, the other does not
/// (`clock_gettime(2)`).
fn suspended() -> nix::Result<Duration> {
    let awake = Duration::from(clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)?);
    let all = Duration::from(clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME)?);
    Ok(all.saturating_sub(awake))
}

fn judge(before: Duration, now: Duration) -> Jump {
    match now.saturating_sub(before) {
        slept if slept >= LEAST_SLEEP => Jump::Slept(slept),
        _ => Jump::Set,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sleep_is_what_one_clock_counted_and_the_other_did_not() {
        let minute = Duration::from_mins(1);
        assert_eq!(judge(minute, minute * 2), Jump::Slept(minute));
        assert_eq!(judge(minute, minute + Duration::from_millis(1)), Jump::Set);
        assert_eq!(judge(minute, Duration::ZERO), Jump::Set);
    }

    #[test]
    fn this_machine_has_the_clocks_and_the_timer() {
        assert!(suspended().is_ok());
        assert!(jumps().is_ok());
    }
}
