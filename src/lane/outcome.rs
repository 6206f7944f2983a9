//! What an attempt's end means for its delivery, for those of its key, and for the sink; and which deliveries have no other.

use std::time::{Duration, Instant};

use tracing::{error, info, warn};

use super::breaker::Change as Breaking;
use super::delivery::{Delivery, Place};
use super::retry::Next;
use super::{Ended, Lane};
use crate::ledger::{self, Change, DeadLetter, Millis, Reason};
use crate::sink::{DeliveryError, Verdict};

impl Lane {
    /// Takes an attempt's end.
    pub(super) fn finish(&mut self, Ended { mut delivery, is_probe, result, took }: Ended) {
        let now = Instant::now();
        self.kept.meters.attempt_took(took);
        let change = match result {
            Ok(()) => {
                self.kept.counts.delivered(now);
                self.kept.meters.attempt_delivered.inc();
                self.kept.meters.delivered.inc();
                self.settle_delivery(&delivery);
                self.breaker.succeeded()
            }
            Err(error) => {
                let time = ledger::now();
                delivery.failed(time);
                self.kept.counts.failed(time, &delivery, &error);
                match error.verdict {
                    Verdict::Retry { after } => {
                        self.kept.meters.attempt_retry.inc();
                        self.warn_failed(now, &delivery, &error);
                        self.retry(delivery, time, &error, after);
                        match error.is_of_event {
                            true => self.breaker.succeeded(),
                            false => self.breaker.failed(now, after.unwrap_or_default(), is_probe),
                        }
                    }
                    Verdict::Gone => {
                        self.kept.meters.attempt_gone.inc();
                        error!(sink = %self.name, error = %error.text, "the sink wants no more events; it is only probed until it does");
                        self.retry(delivery, time, &error, None);
                        self.breaker.gone(now, is_probe)
                    }
                    Verdict::Reject => {
                        self.kept.meters.attempt_reject.inc();
                        self.bury(&delivery, Reason::Rejected, &error.kind, &error.text);
                        self.breaker.succeeded()
                    }
                }
            }
        };
        match change {
            Breaking::Opened => {
                warn!(sink = %self.name, "sink is failing; it is only probed until it is back");
            }
            Breaking::Closed => {
                info!(sink = %self.name, "sink is back");
                self.parking.end_probes();
                // What failed meanwhile need not wait any longer, unless the sink wants that.
                if let Some(since) = self.failing_since {
                    self.changes.push(Change::Hasten { since, due_at: ledger::now() });
                    self.unwritten = true;
                }
            }
            Breaking::None => {}
        }
        if self.breaker.is_untroubled() {
            (self.failing_since, self.failing_parked) = (None, 0);
        }
    }

    fn warn_failed(&mut self, now: Instant, delivery: &Delivery, error: &DeliveryError) {
        if let Some(suppressed) = self.warnings.admit(now) {
            warn!(sink = %self.name, event_id = %delivery.event.id(), attempt = delivery.failures, kind = %error.kind, error = %error.text, suppressed, "attempt failed");
        }
    }

    /// Parks a delivery until its next attempt, and those of its key with it; or buries it if there is none.
    fn retry(&mut self, delivery: Delivery, now: Millis, error: &DeliveryError, asked: Option<Duration>) {
        let after = |wait: Duration| now.saturating_add(Millis::try_from(wait.as_millis()).unwrap_or(Millis::MAX));
        let due_at = match (delivery.due_at, delivery.place) {
            (Some(due_at), Place::Parked(id)) => {
                self.parking.probed(id);
                let granted = asked.map(|asked| self.config.retry.granted(asked, delivery.age(now)));
                due_at.max(after(granted.unwrap_or_default()))
            }
            _ => match self.config.retry.next(delivery.failures, delivery.age(now), rand::random(), asked) {
                Next::After(wait) => after(wait),
                Next::Exhausted => return self.bury(&delivery, Reason::Exhausted, &error.kind, &error.text),
                Next::Expired => return self.bury(&delivery, Reason::Expired, &error.kind, &error.text),
            },
        };
        // A former lane may have parked it.
        let since = delivery.first_failed_at.unwrap_or(now);
        self.failing_since = Some(self.failing_since.map_or(since, |before| before.min(since)));
        let asked_until = asked.map(|asked| after(asked).min(due_at));
        self.changes.push(delivery.postponed(self.config.order_by, due_at, asked_until, error));
        self.unwritten = true;
        self.leave_window(&delivery);
        for follower in self.order.take(delivery.key) {
            match follower.place {
                Place::Window => self.put_behind(&follower),
                Place::Parked(id) => self.parking.unload(id),
            }
        }
    }

    /// Parks a delivery that has to wait for others with its key.
    pub(super) fn put_behind(&mut self, delivery: &Delivery) {
        self.changes.push(delivery.behind(self.config.order_by, ledger::now()));
        self.unwritten = true;
        self.leave_window(delivery);
    }

    /// Counts a delivery that was in the window as parked.
    fn leave_window(&mut self, delivery: &Delivery) {
        if delivery.place == Place::Window {
            self.parking.add(delivery.key, 1);
            self.kept.meters.parked.inc();
            self.failing_parked += usize::from(self.failing_since.is_some());
            self.pass(delivery);
        }
    }

    /// It is in the journal no longer, as far as the lane is concerned.
    fn pass(&mut self, delivery: &Delivery) {
        self.kept.meters.routed_by(delivery.route.name());
        self.window.settle(delivery.position);
    }

    /// Whether a delivery that has failed has become too old to be tried again, while it waited for its turn or the relay
    /// was away.
    pub(super) fn is_too_old(&self, delivery: &Delivery) -> bool {
        delivery.failures > 0 && self.config.retry.is_too_old(delivery.age(ledger::now()))
    }

    /// Gives up all that are ready and too old; whether there were any.
    pub(super) fn expire_ready(&mut self) -> bool {
        let mut found = false;
        // One that is given up lets others of its key be ready.
        while let Some(index) = self.ready.iter().position(|delivery| self.is_too_old(delivery))
            && let Some(delivery) = self.ready.remove(index)
        {
            self.expire(&delivery);
            found = true;
        }
        found
    }

    /// Gives up a parked delivery that is too old to be tried again.
    pub(super) fn expire(&mut self, delivery: &Delivery) {
        let (kind, error) = delivery.last_error.as_deref().cloned().unwrap_or_default();
        self.bury(delivery, Reason::Expired, &kind, &error);
    }

    /// Makes a dead letter of a delivery, with what its last attempt failed with.
    fn bury(&mut self, delivery: &Delivery, reason: Reason, kind: &str, error: &str) {
        if let Some(suppressed) = self.burials.admit(Instant::now()) {
            let (event_id, reason) = (delivery.event.id(), reason.as_str());
            error!(sink = %self.name, %event_id, reason, attempts = delivery.failures, kind, error, suppressed, "a delivery is a dead letter now");
        }
        self.changes.push(delivery.buried(self.config.order_by, reason, kind, error));
        self.kept.counts.dead += 1;
        self.kept.meters.dead.inc();
        self.settle_delivery(delivery);
    }

    /// Makes a dead letter of an event that this version can't read.
    pub(super) fn bury_unreadable(&mut self, letter: DeadLetter) {
        self.changes.push(Change::Bury(Box::new(letter)));
        self.kept.counts.dead += 1;
        self.kept.meters.dead.inc();
        self.unwritten = true;
    }

    /// It is delivered or dead: the next of its key may go.
    fn settle_delivery(&mut self, delivery: &Delivery) {
        match delivery.place {
            Place::Window => self.pass(delivery),
            Place::Parked(id) => {
                self.changes.push(Change::Unpark { id });
                self.parking.remove(delivery.key);
            }
        }
        self.unwritten = true;
        self.ready.extend(self.order.settle(delivery.key));
    }
}
