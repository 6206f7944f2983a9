//! For whom an event is in a journal that relays share. That is settled when it is accepted, by the rules in force here.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use bytes::Bytes;
use tracing::{error, warn};

use crate::event::{Event, Field};
use crate::journal::Position;
use crate::journal::kafka::{Address, Addressing, Aside, Config, KeyBy};
use crate::lane::{Metrics, unreadable_letter, unrouted_letter};
use crate::ledger::{DeadLetter, shared};
use crate::routing::{Scratch, Table, UNROUTED};
use crate::telemetry::Throttle;

/// What is said about an event where it is parked or dead: its status, and what it is ordered by.
const SAID: [Field; 4] = [Field::Status, Field::MessageId, Field::RecipientId, Field::SenderId];
/// For so many bytes of them there is always room, and a byte takes so many at most, in JSON.
const FIELD_BYTES: usize = 1024;
const ESCAPED: usize = 6;

/// Addresses events as rules say. What no route matches is a dead letter from the start, and nobody has to read the journal
/// for it.
pub(super) struct ByRules {
    table: Arc<Table>,
    key: Field,
    dead_letters: Arc<str>,
    metrics: Metrics,
    warnings: Arc<Mutex<Throttle>>,
}

impl ByRules {
    pub(super) fn new(table: &Arc<Table>, config: &Config, metrics: &Metrics) -> Self {
        let key = match config.key {
            KeyBy::MessageId => Field::MessageId,
            KeyBy::RecipientId => Field::RecipientId,
            KeyBy::SenderId => Field::SenderId,
        };
        let (table, dead_letters) = (Arc::clone(table), config.dead_letters().into());
        Self { table, key, dead_letters, metrics: metrics.clone(), warnings: Arc::default() }
    }

    /// A message's events stay together in any case.
    fn key_of(&self, event: &Event) -> Option<String> {
        let given = |field| event.field(field).filter(|value| !value.is_empty());
        given(self.key).or_else(|| given(Field::MessageId)).map(str::to_owned)
    }

    fn unrouted(&self, event: &Event) -> Option<Aside> {
        if !self.table.keeps_unrouted() {
            self.metrics.unrouted().inc();
            return None;
        }
        let (unrouted, warnings) = (self.metrics.unrouted().clone(), Arc::clone(&self.warnings));
        let dead = self.dead(unrouted_letter(Position::ZERO, event));
        Some(Box::new(move |place| {
            unrouted.inc();
            let admitted = warnings.lock().unwrap_or_else(PoisonError::into_inner).admit(Instant::now());
            if let Some(suppressed) = admitted {
                warn!(suppressed, "no route matches; the event is a dead letter of the sink unrouted");
            }
            dead(place)
        }))
    }

    fn dead(&self, letter: DeadLetter) -> Aside {
        let topic = Arc::clone(&self.dead_letters);
        Box::new(move |place| shared::dead_letter(&topic, UNROUTED, place, letter))
    }
}

impl Addressing for ByRules {
    fn key(&self, entry: &Bytes) -> Option<String> {
        self.key_of(&Event::decode(entry.clone()).ok()?)
    }

    fn address(&self, entry: &Bytes) -> Address {
        let event = match Event::decode(entry.clone()) {
            Ok(event) => event,
            Err(error) => {
                error!(%error, "an event can't be read that came just now; it is a dead letter");
                let letter = unreadable_letter(Position::ZERO, entry.clone(), error.to_string());
                return Address { key: None, groups: Vec::new(), about: 0, aside: Some(self.dead(letter)) };
            }
        };
        let mut scratch = Scratch::default();
        let found = self.table.matches(&event, &mut scratch).iter();
        let groups: Vec<_> = found
            .filter_map(|found| {
                let sink = self.table.sinks().get(found.sink.0)?;
                Some((sink.clone(), self.table.route_name(found.route).to_owned()))
            })
            .collect();
        let aside = if groups.is_empty() { self.unrouted(&event) } else { None };
        Address { key: self.key_of(&event), groups, about: about(&event), aside }
    }
}

/// How much room the event's fields take where it is parked or dead, beyond what there is.
fn about(event: &Event) -> usize {
    let fields = SAID.iter().filter_map(|field| event.field(*field)).map(str::len).sum::<usize>();
    fields.saturating_sub(FIELD_BYTES).saturating_mul(ESCAPED)
}
