//! A lane's own way into the ledger.

use std::sync::Arc;

use super::shared::Lease;
use super::{Change, Due, Ledger, LedgerError, Progress, Wanted};

/// What a lane can do in the ledger. Clones are the same lane's.
#[derive(Clone)]
pub struct Account {
    ledger: Ledger,
    lane: Arc<str>,
    /// Where others may take the lane over.
    lease: Option<Lease>,
}

impl Account {
    pub(super) fn new(ledger: Ledger, lane: &str, lease: Option<Lease>) -> Self {
        Self { ledger, lane: lane.into(), lease }
    }

    /// Writes the lane's progress, together with what it passes. Durable on return.
    ///
    /// # Errors
    ///
    /// [`LedgerError`]: it can be tried again.
    pub async fn settle(&self, progress: Progress, changes: Vec<Change>) -> Result<(), LedgerError> {
        self.ledger.settle(&self.lane, Some(progress), changes).await
    }

    /// Parked deliveries that are due.
    ///
    /// # Errors
    ///
    /// [`LedgerError`]; it can be tried again.
    pub async fn due(&self, wanted: Wanted) -> Result<Due, LedgerError> {
        self.ledger.due(&self.lane, wanted).await
    }

    /// Whether the lane is certainly still this process's. If not, nothing may be begun before something was written.
    pub fn is_held(&self) -> bool {
        self.lease.as_ref().is_none_or(Lease::is_held)
    }

    /// Whether something has to be written soon, or the lane would no longer be held.
    pub fn has_to_renew(&self) -> bool {
        self.lease.as_ref().is_some_and(Lease::has_to_renew)
    }
}
