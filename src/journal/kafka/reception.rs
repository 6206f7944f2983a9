//! Whether brokers take events, as those that were sent last have shown.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Where a broker has gone, others take its partitions within this time; and what goes to others succeeds meanwhile.
const PATIENCE: Duration = Duration::from_secs(10);
/// Without events nobody knows: after this time others have to show it anew.
const MEMORY: Duration = Duration::from_secs(30);

/// What sending has come to. Clones share it.
#[derive(Clone, Default)]
pub struct Reception(Arc<State>);

#[derive(Default)]
struct State {
    /// Whether there is a failure: cheap to read for every append.
    is_failing: AtomicBool,
    failure: Mutex<Option<Failure>>,
}

/// Nothing was taken since the first, until the last.
struct Failure {
    first: Instant,
    last: Instant,
    reason: String,
}

impl Reception {
    /// Something was taken.
    pub(super) fn taken(&self) {
        if self.0.is_failing.load(Ordering::Relaxed) {
            self.set(&mut self.failure(), None);
        }
    }

    /// An event was not taken in time.
    pub(super) fn missed(&self, reason: String) {
        let mut failure = self.failure();
        let last = Instant::now();
        let first = failure.as_ref().map_or(last, |failure| failure.first);
        self.set(&mut failure, Some(Failure { first, last, reason }));
    }

    /// Why nothing is taken at present, if so.
    pub fn problem(&self) -> Option<String> {
        let failure = self.failure();
        let failure = failure.as_ref()?;
        let is_lasting = failure.first.elapsed() >= PATIENCE && failure.last.elapsed() < MEMORY;
        is_lasting.then(|| failure.reason.clone())
    }

    fn failure(&self) -> MutexGuard<'_, Option<Failure>> {
        self.0.failure.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, failure: &mut Option<Failure>, to: Option<Failure>) {
        self.0.is_failing.store(to.is_some(), Ordering::Relaxed);
        *failure = to;
    }
}
