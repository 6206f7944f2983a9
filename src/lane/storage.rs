//! What a lane asks of its ledger: to write what is settled, and for parked deliveries that are due.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;
use tracing::warn;

use super::control::Taken;
use super::{CLOCK_MARGIN, FETCH, Lane, MAX_WINDOW, STORAGE_PAUSE, UNWRITTEN};
use crate::journal::Position;
use crate::ledger::{self, Change, Due, LedgerError, Millis, Progress, Wanted};
use crate::sink::MAX_ASKED;

/// What the ledger is doing for the lane: one thing at a time.
pub(super) type Storing = BoxFuture<'static, Stored>;

/// What the ledger has done.
pub(super) enum Stored {
    /// With the dead letters that were exhumed.
    Settled {
        cursor: Position,
        changes: Vec<Change>,
        taken: Vec<Taken>,
        result: Result<HashSet<i64>, LedgerError>,
    },
    Fetched(Result<Due, LedgerError>),
}

impl Lane {
    /// Starts to write what is settled when it is time to; or else, while the lane is running, to look for deliveries that
    /// are due.
    pub(super) fn begin_storing(&mut self, now: Instant, running: bool, storing: &mut Option<Storing>) {
        if self.window.cursor() == self.released {
            self.released_at = now;
        }
        if storing.is_some() {
            return;
        }
        if self.settle_due || self.changes.are_many() {
            *storing = Some(self.settle());
        } else if running && !self.kept.paused && self.look_at().is_some_and(|at| at <= now) {
            *storing = Some(self.fetch(false));
        }
    }

    /// When to look for parked deliveries that are due, if there is room for them.
    pub(super) fn look_at(&self) -> Option<Instant> {
        let has_room = self.breaker.is_closed() && self.ready.len() < self.config.concurrency;
        self.parking.look_at().filter(|_| has_room)
    }

    /// Whether there is something to be written.
    pub(super) fn has_to_settle(&self) -> bool {
        self.unwritten || self.window.cursor() != self.released || self.account.has_to_renew()
    }

    /// Whether that should be written now; if not, then soon.
    pub(super) fn is_time_to_settle(&self) -> bool {
        let is_mere_progress = self.changes.is_empty() && self.taken.is_empty();
        !is_mere_progress || self.account.has_to_renew() || self.account.takes_progress(Instant::now())
    }

    /// Whether much has been delivered since progress could be written the last time, and that is long ago.
    pub(super) fn is_unwritten_for_long(&self) -> bool {
        let unwritten = self.window.cursor().since(self.released);
        unwritten > MAX_WINDOW as u64 && self.released_at.elapsed() > UNWRITTEN
    }

    /// Writes how far the lane has come, with everything that it passes.
    pub(super) fn settle(&mut self) -> Storing {
        self.settle_due = false;
        self.unwritten = false;
        let account = self.account.clone();
        let progress = Progress { cursor: self.window.cursor(), ahead: self.window.ahead() };
        let (changes, taken) = (self.changes.take(), std::mem::take(&mut self.taken));
        Box::pin(async move {
            let cursor = progress.cursor;
            let result = account.settle(progress, changes.clone()).await;
            if result.is_err() {
                tokio::time::sleep(STORAGE_PAUSE).await;
            }
            Stored::Settled { cursor, changes, taken, result }
        })
    }

    /// Looks for parked deliveries that are due; `probe`: for one, whether it is due or not.
    pub(super) fn fetch(&self, probe: bool) -> Storing {
        let (account, now) = (self.account.clone(), ledger::now());
        let horizon = |longest: Duration| {
            now.saturating_add(Millis::try_from((longest + CLOCK_MARGIN).as_millis()).unwrap_or(Millis::MAX))
        };
        let longest = self.config.retry.waits.longest();
        let (which, except) = self.parking.wanted(probe);
        let wanted = Wanted {
            now,
            horizon: horizon(longest),
            asked_horizon: horizon(longest.max(MAX_ASKED)),
            limit: if probe { 1 } else { FETCH },
            which,
            except,
        };
        Box::pin(async move {
            let due = account.due(wanted).await;
            if due.is_err() {
                tokio::time::sleep(STORAGE_PAUSE).await;
            }
            Stored::Fetched(due)
        })
    }

    /// Takes what the ledger has done.
    pub(super) fn stored(&mut self, stored: Stored) {
        let now = Instant::now();
        match stored {
            Stored::Settled { cursor, changes, taken, result: Ok(exhumed) } => {
                (self.released, self.released_at) = (cursor, now);
                self.source.release(cursor);
                self.parking.written(&changes, now);
                self.answer_taken(taken, exhumed);
            }
            Stored::Settled { changes, mut taken, result: Err(error), .. } => {
                self.changes.put_back(changes);
                taken.append(&mut self.taken);
                self.taken = taken;
                self.unwritten = true;
                warn!(sink = %self.name, %error, "what is settled can't be written; after a crash deliveries would be repeated");
            }
            Stored::Fetched(Ok(Due { rows, next })) => {
                self.parking.looked(next, ledger::now(), now);
                let found = !rows.is_empty();
                let others_left = !found && self.breaker.is_probing() && self.parking.probe_anew();
                if !found && !others_left && next.is_none() && self.changes.is_empty() {
                    self.parking.found_none();
                }
                rows.into_iter().for_each(|row| self.admit_parked(row));
                if !self.breaker.is_closed() {
                    self.fetched_probe(found, others_left, now);
                }
            }
            Stored::Fetched(Err(error)) => {
                warn!(sink = %self.name, %error, "parked deliveries can't be read; trying again");
                self.breaker.no_probe(now);
            }
        }
    }

    /// Looks at once for what to probe with, if something was found, or others may be left.
    fn fetched_probe(&mut self, found: bool, others_left: bool, now: Instant) {
        match found || others_left {
            true => self.breaker.probe_anew(now),
            false => self.breaker.no_probe(now),
        }
    }
}
