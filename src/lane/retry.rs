//! When a failed delivery is tried again. Pure: the caller brings time and chance.

use std::time::Duration;

/// When to try again, and when not to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Retry {
    /// The waits between attempts.
    pub waits: Waits,
    /// After so many failed attempts there is no other; at least 1.
    pub max_attempts: Option<u32>,
    /// A delivery that is older than this is not tried again.
    pub max_age: Option<Duration>,
}

/// The waits between attempts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Waits {
    /// Exponential, with chance in it.
    Backoff {
        /// The first wait is at most this long; each further one at most twice the one before.
        initial: Duration,
        /// No wait is longer.
        max: Duration,
    },
    /// These, one after the other; then the last again and again. Not empty.
    Schedule(Vec<Duration>),
}

/// What is to become of a delivery whose attempt has failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Another attempt after this time.
    After(Duration),
    /// None: there were as many as there may be.
    Exhausted,
    /// None: it would be too old.
    Expired,
}

/// The last attempt begins so long before the delivery is too old: it may have to wait for its turn.
const LAST_CALL: Duration = Duration::from_secs(1);

impl Retry {
    /// What follows attempt number `attempt` (from 1), which failed when the delivery was `age` old. `chance` (0 to 1) is
    /// the share of the exponential step to wait ("full jitter"); `asked` what the other side has asked for.
    pub(super) fn next(&self, attempt: u32, age: Duration, chance: f64, asked: Option<Duration>) -> Next {
        if self.max_attempts.is_some_and(|max| attempt >= max) {
            return Next::Exhausted;
        }
        let wait = self.waits.wait(attempt, chance, asked.map(|asked| self.granted(asked, age)));
        if self.is_too_old(age.saturating_add(wait)) { Next::Expired } else { Next::After(wait) }
    }

    /// How long a delivery of this age is left alone that the other side has asked to leave alone: who asks for more than there
    /// is gets what there is.
    pub(super) fn granted(&self, asked: Duration, age: Duration) -> Duration {
        let left = self.max_age.map_or(Duration::MAX, |max| max.saturating_sub(age).saturating_sub(LAST_CALL));
        asked.min(left)
    }

    /// Whether a delivery that has failed is not to be tried again at this age.
    pub(super) fn is_too_old(&self, age: Duration) -> bool {
        self.max_age.is_some_and(|max| age > max)
    }
}

impl Waits {
    /// The longest wait, unless the other side asks for a longer one.
    pub(super) fn longest(&self) -> Duration {
        match self {
            Self::Backoff { max, .. } => *max,
            Self::Schedule(waits) => waits.iter().copied().max().unwrap_or_default(),
        }
    }

    fn wait(&self, attempt: u32, chance: f64, asked: Option<Duration>) -> Duration {
        let failed_before = attempt.saturating_sub(1);
        let wait = match self {
            Self::Backoff { initial, max } => {
                let step = initial.saturating_mul(2_u32.saturating_pow(failed_before)).min(*max);
                step.mul_f64(chance.clamp(0.0, 1.0))
            }
            Self::Schedule(waits) => {
                let index = usize::try_from(failed_before).unwrap_or(usize::MAX);
                waits.get(index).or(waits.last()).copied().unwrap_or_default()
            }
        };
        wait.max(asked.unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn waits_double_up_to_the_longest() {
        let waits = Waits::Backoff { initial: seconds(1), max: seconds(20) };
        let check = |attempt, chance, asked: Option<u64>, expected| {
            let wait = waits.wait(attempt, chance, asked.map(seconds));
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
        check(1, 1.0, Some(3600), 3600.0);
    }

    #[test]
    fn a_schedule_is_kept() {
        let waits = Waits::Schedule(vec![seconds(5), seconds(60)]);
        let wait = |attempt, asked: Option<u64>| waits.wait(attempt, 0.0, asked.map(seconds));
        assert_eq!([wait(1, None), wait(2, None), wait(9, None)], [5, 60, 60].map(seconds));
        assert_eq!([wait(1, Some(3)), wait(1, Some(999))], [5, 999].map(seconds));
    }

    #[test]
    fn attempts_end() {
        let waits = Waits::Schedule(vec![seconds(10)]);
        let retry = Retry { waits, max_attempts: Some(3), max_age: Some(seconds(100)) };
        let next = |attempt, age| retry.next(attempt, seconds(age), 0.0, None);
        assert_eq!(next(2, 90), Next::After(seconds(10)));
        assert_eq!(next(2, 91), Next::Expired);
        assert_eq!(next(3, 0), Next::Exhausted);
        assert_eq!(retry.next(1, seconds(40), 0.0, Some(seconds(3600))), Next::After(seconds(59)));
        assert!(!retry.is_too_old(seconds(100)) && retry.is_too_old(seconds(101)));
        let endless = Retry { max_attempts: None, max_age: None, ..retry.clone() };
        assert_eq!(endless.next(u32::MAX, Duration::MAX, 0.0, None), Next::After(seconds(10)));
        assert!(!endless.is_too_old(Duration::MAX));
    }
}
