//! Warnings that a fault would repeat without end.

use std::time::{Duration, Instant};

/// In this time so many warnings are let through.
const INTERVAL: Duration = Duration::from_secs(5);

/// Lets a few warnings through per interval, with a count of those that were held back.
pub struct Throttle {
    allowed: u32,
    begun: Option<Instant>,
    admitted: u32,
    suppressed: u64,
}

impl Default for Throttle {
    /// For what tells the same each time.
    fn default() -> Self {
        Self::of(1)
    }
}

impl Throttle {
    /// Lets so many through per interval.
    pub fn of(allowed: u32) -> Self {
        Self { allowed, begun: None, admitted: 0, suppressed: 0 }
    }

    /// How many were held back since the last, if this one may be written.
    pub fn admit(&mut self, now: Instant) -> Option<u64> {
        if self.begun.is_none_or(|begun| now >= begun + INTERVAL) {
            (self.begun, self.admitted) = (Some(now), 0);
        }
        if self.admitted >= self.allowed {
            self.suppressed += 1;
            return None;
        }
        self.admitted += 1;
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
        let mut throttle = Throttle::of(2);
        assert_eq!(
            [0, 1, 2, 3, 5, 6, 7].map(|at| throttle.admit(after(at))),
            [Some(0), Some(0), None, None, Some(2), Some(0), None]
        );
    }
}
