//! A delivery that is not settled, and what becomes of it in the ledger.

use std::time::Duration;

use super::config::OrderBy;
use super::course::Route;
use super::order::Key;
use crate::event::{Event, Field};
use crate::journal::Position;
use crate::ledger::{Change, DeadLetter, Millis, Parked, Reason};
use crate::sink::DeliveryError;

/// One event on its way to one sink.
pub(super) struct Delivery {
    pub(super) event: Event,
    pub(super) route: Route,
    pub(super) position: Position,
    pub(super) place: Place,
    pub(super) key: Option<Key>,
    /// How many attempts have failed.
    pub(super) failures: u32,
    pub(super) first_failed_at: Option<Millis>,
    /// What its age counts from.
    pub(super) since: Millis,
    /// When its next attempt is due, if it is in memory before that, to probe with. Such an attempt does not count.
    pub(super) due_at: Option<Millis>,
    /// What its last attempt failed with, if it is parked: a short name, and words for people.
    pub(super) last_error: Option<Box<(String, String)>>,
}

/// Where a delivery is kept until it is settled.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// In the journal: the cursor has not passed it.
    Window,
    /// In the ledger: this row.
    Parked(i64),
}

impl Delivery {
    pub(super) fn is_parked(&self) -> bool {
        matches!(self.place, Place::Parked(_))
    }

    /// Whether it has not been parked yet.
    pub(super) fn is_fresh(&self) -> bool {
        !self.is_parked()
    }

    /// Counts a failed attempt.
    pub(super) fn failed(&mut self, now: Millis) {
        self.failures = self.failures.saturating_add(u32::from(self.due_at.is_none()));
        self.first_failed_at.get_or_insert(now);
    }

    /// How old it is. A clock that was set back makes nothing older.
    pub(super) fn age(&self, now: Millis) -> Duration {
        Duration::from_millis(u64::try_from(now.saturating_sub(self.since)).unwrap_or(0))
    }

    /// To be tried again after a failed attempt.
    pub(super) fn postponed(
        &self,
        order_by: OrderBy,
        due_at: Millis,
        asked_until: Option<Millis>,
        error: &DeliveryError,
    ) -> Change {
        match self.place {
            Place::Window => self.parked(order_by, (due_at, asked_until), &error.kind, &error.text),
            Place::Parked(id) => Change::Postpone {
                id,
                attempts: self.failures,
                first_failed_at: self.first_failed_at.unwrap_or(due_at),
                due_at,
                asked_until,
                error_kind: error.kind.to_string(),
                error: error.text.clone(),
            },
        }
    }

    /// To be tried when those of its key that are parked already have gone.
    pub(super) fn behind(&self, order_by: OrderBy, now: Millis) -> Change {
        self.parked(order_by, (now, None), "behind", "waits for an earlier event with its key")
    }

    fn parked(
        &self,
        order_by: OrderBy,
        (due_at, asked_until): (Millis, Option<Millis>),
        error_kind: &str,
        error: &str,
    ) -> Change {
        Change::Park(Box::new(Parked {
            key: order_by.value(&self.event).map(str::to_owned),
            position: self.position,
            event_id: self.event.id().to_string(),
            status: self.event.field(Field::Status).map(str::to_owned),
            route: self.route.name().to_owned(),
            attempts: self.failures,
            since: self.since,
            first_failed_at: self.first_failed_at,
            due_at,
            asked_until,
            error_kind: error_kind.to_owned(),
            error: error.to_owned(),
            record: self.event.record(),
        }))
    }

    /// Not to be tried again. The parked row, if there is one, has to be removed besides.
    pub(super) fn buried(&self, order_by: OrderBy, reason: Reason, error_kind: &str, error: &str) -> Change {
        Change::Bury(Box::new(DeadLetter {
            position: self.position,
            event_id: self.event.id().to_string(),
            status: self.event.field(Field::Status).map(str::to_owned),
            key: order_by.value(&self.event).map(str::to_owned),
            route: self.route.name().to_owned(),
            reason,
            error_kind: error_kind.to_owned(),
            error: error.to_owned(),
            attempts: self.failures,
            first_failed_at: self.first_failed_at,
            record: self.event.record(),
        }))
    }
}

/// An event that is to be sent again, whatever became of it.
pub(super) fn replayed(order_by: OrderBy, position: Position, event: &Event, now: Millis) -> Change {
    Change::Park(Box::new(Parked {
        key: order_by.value(event).map(str::to_owned),
        position,
        event_id: event.id().to_string(),
        status: event.field(Field::Status).map(str::to_owned),
        route: "-".to_owned(),
        attempts: 0,
        since: now,
        first_failed_at: None,
        due_at: now,
        asked_until: None,
        error_kind: "replay".to_owned(),
        error: "is sent again because an operator asked for it".to_owned(),
        record: event.record(),
    }))
}

/// An event that no route matches, as a dead letter.
pub fn unrouted(position: Position, event: &Event) -> DeadLetter {
    DeadLetter {
        position,
        event_id: event.id().to_string(),
        status: event.field(Field::Status).map(str::to_owned),
        key: None,
        route: "-".to_owned(),
        reason: Reason::Unrouted,
        error_kind: "unrouted".to_owned(),
        error: "no route matched the event".to_owned(),
        attempts: 0,
        first_failed_at: None,
        record: event.record(),
    }
}

/// An entry that this version can't read, as a dead letter.
pub fn unreadable(position: Position, record: bytes::Bytes, error: String) -> DeadLetter {
    DeadLetter {
        position,
        event_id: "-".to_owned(),
        status: None,
        key: None,
        route: "-".to_owned(),
        reason: Reason::Unreadable,
        error_kind: "decode".to_owned(),
        error,
        attempts: 0,
        first_failed_at: None,
        record,
    }
}
