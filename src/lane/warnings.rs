//! Warnings that a fault would repeat without end.

use std::time::{Duration, Instant};

/// One warning is let through in this time.
const WARN_INTERVAL: Duration = Duration::from_secs(5);

/// Lets one warning through per interval, with a count of those that were held back.
#[derive(Default)]
pub(super) struct Throttle {
    last: Option<Instant>,
    suppressed: u64,
}

impl Throttle {
    /// How many were held back since the last, if this one may be written.
    pub(super) fn admit(&mut self, now: Instant) -> Option<u64> {
        if self.last.is_some_and(|last| now < last + WARN_INTERVAL) {
            self.suppressed += 1;
            return None;
        }
        self.last = Some(now);
        Some(std::mem::take(&mut self.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lets_one_through_and_counts_the_others() {
        let (start, mut throttle) = (Instant::now(), Throttle::default());
        let after = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(
            [0, 1, 4, 5, 6, 11].map(|at| throttle.admit(after(at))),
            [Some(0), None, None, Some(2), None, Some(1)]
        );
    }
}
