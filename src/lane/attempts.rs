//! What a lane begins: attempts while its breaker is closed, and probes while it is open.

use std::time::Instant;

use super::delivery::Delivery;
use super::storage::Storing;
use super::{Ended, FRESH_PROBES, Lane, MANY_PARKED, SHORTEST_WAIT};
use crate::sink::Attempt;

impl Lane {
    /// Starts what may go: anything while the breaker is closed, else one probe when it is due.
    pub(super) fn begin_attempts(&mut self, now: Instant, storing: &mut Option<Storing>) {
        self.limited_until = None;
        if self.kept.paused {
            return;
        }
        if !self.account.is_held() {
            // Another may have the lane by now: writing shows whether.
            self.settle_due |= storing.is_none() && !self.ready.is_empty();
            return;
        }
        if !self.breaker.is_closed() {
            return self.begin_probe(now, storing);
        }
        while self.under_way.len() < self.config.concurrency
            && let Some(delivery) = self.ready.pop_front()
        {
            if self.is_too_old(&delivery) {
                self.expire(&delivery);
            } else if self.may_attempt(now) {
                self.attempt(delivery);
            } else {
                return self.ready.push_front(delivery);
            }
        }
    }

    /// Takes a turn of the rate.
    fn may_attempt(&mut self, now: Instant) -> bool {
        self.limited_until = match &self.limit {
            // A wait of nothing would be over before anybody could wake for it.
            Some(limit) => limit.take().err().map(|wait| now + wait.max(SHORTEST_WAIT)),
            None => None,
        };
        self.limited_until.is_none()
    }

    /// Tries one delivery, if it is time to: preferably one that has not failed yet, because those that have may be the
    /// only ones that the sink refuses.
    fn begin_probe(&mut self, now: Instant, storing: &mut Option<Storing>) {
        if self.breaker.probe_at().is_none_or(|at| now < at) {
            return;
        }
        self.expire_ready();
        let fresh = match self.may_probe_with_fresh() {
            true => self.ready.iter().position(Delivery::is_fresh),
            false => None,
        };
        // One that is not due was fetched for this, and is to be tried as nothing else.
        let fetched = self.ready.iter().position(|delivery| delivery.due_at.is_some());
        let candidate = fetched.or(fresh).or_else(|| self.ready.iter().position(Delivery::is_parked));
        if let Some(candidate) = candidate {
            if self.may_attempt(now)
                && self.breaker.begin_probe(now)
                && let Some(delivery) = self.ready.remove(candidate)
            {
                self.probes = self.probes.wrapping_add(1);
                self.attempt(delivery);
            }
        } else if self.parking.total() > 0 && storing.is_none() && !self.settle_due && self.breaker.begin_probe(now) {
            *storing = Some(self.fetch(true));
        }
    }

    /// Whether the next probe may be made with a delivery that has not failed yet.
    pub(super) fn may_probe_with_fresh(&self) -> bool {
        let are_many_parked = self.failing_parked.min(self.parking.total()) >= MANY_PARKED;
        !are_many_parked || self.probes.is_multiple_of(FRESH_PROBES)
    }

    fn attempt(&mut self, mut delivery: Delivery) {
        if self.breaker.is_closed() {
            delivery.due_at = None;
        }
        let (sink, is_probe) = (self.sink.clone(), self.breaker.is_probing());
        self.under_way.push(Box::pin(async move {
            let begun = Instant::now();
            let attempt = Attempt { number: delivery.failures + 1, route: delivery.route.name(), traceparent: None };
            let result = sink.deliver(&delivery.event, &attempt).await;
            Ended { delivery, is_probe, result, took: begun.elapsed() }
        }));
    }
}
