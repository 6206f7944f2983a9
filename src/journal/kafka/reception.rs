//! Whether brokers take what is written, as what was written last has shown.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Where some partitions are taken and others not, something succeeds within this time.
const PATIENCE: Duration = Duration::from_secs(1);

/// What writing has come to. Clones share it.
#[derive(Clone, Default)]
pub struct Reception(Arc<State>);

#[derive(Default)]
struct State {
    /// Whether `since` is something: cheap to read for every append.
    is_failing: AtomicBool,
    /// Since when nothing was taken, and why.
    since: Mutex<Option<(Instant, String)>>,
}

impl Reception {
    /// Something was taken.
    pub(super) fn taken(&self) {
        if self.0.is_failing.load(Ordering::Relaxed) {
            *self.since() = None;
            self.0.is_failing.store(false, Ordering::Relaxed);
        }
    }

    /// Something was not taken in time.
    pub(super) fn missed(&self, reason: String) {
        self.since().get_or_insert((Instant::now(), reason));
        self.0.is_failing.store(true, Ordering::Relaxed);
    }

    /// Why nothing is taken at present, if so.
    pub fn problem(&self) -> Option<String> {
        let since = self.since();
        let (_, reason) = since.as_ref().filter(|(since, _)| since.elapsed() >= PATIENCE)?;
        Some(reason.clone())
    }

    fn since(&self) -> MutexGuard<'_, Option<(Instant, String)>> {
        self.0.since.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
