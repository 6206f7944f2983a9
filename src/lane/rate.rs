//! The rate limit of a lane.

use std::num::NonZeroU32;
use std::time::Duration;

use governor::clock::{Clock as _, DefaultClock};
use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};

use super::config::Rate;

/// How much of a time without attempts may be made up for at once.
const BURST: Duration = Duration::from_millis(100);

/// Lets attempts through at a rate.
pub(super) struct Limit {
    limiter: DefaultDirectRateLimiter,
    clock: DefaultClock,
}

impl Limit {
    pub(super) fn new(rate: Rate) -> Self {
        // A rate's interval is never zero; the quota would be none then.
        let interval = rate.interval.max(Duration::from_nanos(1));
        let burst = u32::try_from(BURST.as_nanos() / interval.as_nanos()).unwrap_or(u32::MAX);
        let burst = NonZeroU32::new(burst).unwrap_or(NonZeroU32::MIN);
        let quota = Quota::with_period(interval).unwrap_or(Quota::per_second(burst)).allow_burst(burst);
        let clock = DefaultClock::default();
        Self { limiter: RateLimiter::direct_with_clock(quota, clock.clone()), clock }
    }

    /// Takes a turn.
    ///
    /// # Errors
    ///
    /// How long it is until the next.
    pub(super) fn take(&self) -> Result<(), Duration> {
        self.limiter.check().map_err(|not_until| not_until.wait_time_from(self.clock.now()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_are_spread_and_little_is_made_up_for() {
        let at_once = |text: &str| {
            let limit = Limit::new(text.parse().unwrap());
            let mut turns = 0;
            let wait = loop {
                match limit.take() {
                    Ok(()) => turns += 1,
                    Err(wait) => break wait,
                }
            };
            (turns, wait)
        };
        let (turns, wait) = at_once("60/m");
        assert_eq!(turns, 1);
        assert!(wait <= Duration::from_secs(1) && wait > Duration::from_millis(900), "{wait:?}");
        let (turns, wait) = at_once("200/s");
        assert!((20..25).contains(&turns), "{turns}");
        assert!(wait <= Duration::from_millis(5), "{wait:?}");
    }
}
