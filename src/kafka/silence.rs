//! Partitions that nothing gets through to, or from, any more. Pure: the caller brings the time.
//!
//! librdkafka may lose a partition's leader for good when it was told that there is none
//! (<https://github.com/confluentinc/librdkafka/issues/5430>): all that is sent there times out, and nothing is read from there,
//! also when the broker is back. Another client finds it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a partition may be silent before another client is tried.
const PATIENCE: Duration = Duration::from_secs(30);

/// Since when each partition is silent that is. Those of several topics count as one.
#[derive(Default)]
pub struct Silence {
    /// Whether there is one: cheap to read for every record.
    is_broken: AtomicBool,
    since: Mutex<HashMap<i32, Instant>>,
}

impl Silence {
    /// A partition took or gave a record, or there is none to give.
    pub fn heard(&self, partition: i32) {
        if self.is_broken.load(Ordering::Relaxed) {
            let mut since = self.since();
            since.remove(&partition);
            self.is_broken.store(!since.is_empty(), Ordering::Relaxed);
        }
    }

    /// A partition took no record in time, or gave none although it has some. Says whether to try another client; if so, and
    /// if it stays silent, then again after as long.
    pub fn missed(&self, partition: i32, now: Instant) -> bool {
        let mut since = self.since();
        let first = *since.entry(partition).or_insert(now);
        let is_over = now.duration_since(first) >= PATIENCE;
        if is_over {
            since.remove(&partition);
        }
        self.is_broken.store(!since.is_empty(), Ordering::Relaxed);
        is_over
    }

    /// There is another client, of which nothing is known.
    pub fn clear(&self) {
        self.since().clear();
        self.is_broken.store(false, Ordering::Relaxed);
    }

    fn since(&self) -> MutexGuard<'_, HashMap<i32, Instant>> {
        self.since.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partition_is_silent_until_it_is_heard() {
        let (silence, start, second) = (Silence::default(), Instant::now(), Duration::from_secs(1));
        silence.heard(1);
        assert!(!silence.missed(1, start) && !silence.missed(2, start + 10 * second));
        silence.heard(2);
        assert!(!silence.missed(1, start + 29 * second) && !silence.missed(2, start + 39 * second));
        assert!(silence.missed(1, start + 30 * second));
        assert!(!silence.missed(1, start + 31 * second), "it begins anew");
        assert!(silence.missed(2, start + 69 * second), "but not for others");
        silence.heard(1);
        assert!(!silence.missed(1, start + 70 * second));
        silence.clear();
        assert!(!silence.missed(1, start + 100 * second));
    }
}
