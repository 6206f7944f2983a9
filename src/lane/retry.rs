//! When a failed delivery is tried again. Pure: the caller brings time and chance.

use std::time::Duration;

/// The longest wait while failed deliveries are kept in memory, where they hold up the cursor.
const LONGEST: Duration = Duration::from_secs(30);

/// Exponential backoff.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backoff {
    /// The first wait is at most this long; each further one at most twice the one before.
    pub initial: Duration,
    /// No wait is longer.
    pub max: Duration,
}

impl Backoff {
    /// How long to wait after attempt number `attempt` (from 1) has failed: a share `chance` (0 to 1) of the exponential
    /// step ("full jitter"), but at least as long as the other side has asked for, as far as `max` allows.
    pub(super) fn wait(&self, attempt: u32, chance: f64, asked: Option<Duration>) -> Duration {
        let max = self.max.min(LONGEST);
        let step = self.initial.saturating_mul(2_u32.saturating_pow(attempt.saturating_sub(1))).min(max);
        step.mul_f64(chance.clamp(0.0, 1.0)).max(asked.unwrap_or_default().min(max))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits() {
        let backoff = Backoff { initial: Duration::from_secs(1), max: Duration::from_secs(20) };
        let check = |attempt, chance, asked: Option<u64>, expected| {
            let wait = backoff.wait(attempt, chance, asked.map(Duration::from_secs));
            assert_eq!(wait, Duration::from_secs_f64(expected), "attempt {attempt}");
        };
        check(1, 1.0, None, 1.0);
        check(1, 0.5, None, 0.5);
        check(1, 0.0, None, 0.0);
        check(2, 1.0, None, 2.0);
        check(5, 1.0, None, 16.0);
        check(6, 1.0, None, 20.0);
        check(6, 0.25, None, 5.0);
        check(u32::MAX, 1.0, None, 20.0);
        check(1, 1.0, Some(7), 7.0);
        check(4, 1.0, Some(7), 8.0);
        check(1, 1.0, Some(3600), 20.0);
    }
}
