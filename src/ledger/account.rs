//! A lane's own way into the ledger.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use super::shared::Lease;
use super::{Change, Due, Ledger, LedgerError, Progress, Wanted};

/// What a lane can do in the ledger. Clones are the same lane's.
#[derive(Clone)]
pub struct Account {
    ledger: Ledger,
    lane: Arc<str>,
    /// Where others may take the lane over: until when it is certainly ours, and whether it still is.
    lease: Option<Lease>,
    held: Arc<AtomicBool>,
    /// In which interval something was written last, where each has its price.
    written_in: Arc<AtomicU64>,
}

impl Account {
    /// Of a lane that nobody else has.
    pub(super) fn of_one(ledger: Ledger, lane: &str) -> Self {
        let held = Arc::new(AtomicBool::new(true));
        Self { ledger, lane: lane.into(), lease: None, held, written_in: Arc::new(AtomicU64::new(u64::MAX)) }
    }

    /// Of a lane that others may take over.
    pub(super) fn of_many(ledger: Ledger, lane: &str, lease: Lease) -> Self {
        Self { lease: Some(lease), ..Self::of_one(ledger, lane) }
    }

    /// Writes the lane's progress, together with what it passes; which dead letters were exhumed: others were gone by then.
    /// Durable on return.
    ///
    /// # Errors
    ///
    /// [`LedgerError`]: it can be tried again.
    pub async fn settle(&self, progress: Progress, changes: Vec<Change>) -> Result<HashSet<i64>, LedgerError> {
        let (lane, held) = (Arc::clone(&self.lane), Arc::clone(&self.held));
        if let Some(lease) = &self.lease {
            self.written_in.store(lease.interval(Instant::now()), Ordering::Relaxed);
        }
        self.ledger.settle_held(lane, held, progress, changes).await
    }

    /// Parked deliveries that are due.
    ///
    /// # Errors
    ///
    /// [`LedgerError`]; it can be tried again.
    pub async fn due(&self, wanted: Wanted) -> Result<Due, LedgerError> {
        self.ledger.due(&self.lane, wanted).await
    }

    /// Nothing that the lane has written and is not durable by now ever will be.
    pub fn close(&self) {
        self.held.store(false, Ordering::Release);
    }

    pub(super) fn is_closed(&self) -> bool {
        !self.held.load(Ordering::Acquire)
    }

    /// Whether the lane is certainly still this process's. If not, nothing may be begun before something was written.
    pub fn is_held(&self) -> bool {
        self.lease.as_ref().is_none_or(|lease| lease.is_held() && !self.is_closed())
    }

    /// Whether it is time to write progress that passes nothing but what was delivered. Until then more of it may gather.
    pub fn takes_progress(&self, now: Instant) -> bool {
        self.lease.as_ref().is_none_or(|lease| lease.interval(now) != self.written_in.load(Ordering::Relaxed))
    }

    /// Whether something has to be written soon, or the lane would no longer be held.
    pub fn has_to_renew(&self) -> bool {
        self.lease.as_ref().is_some_and(Lease::has_to_renew)
    }
}
