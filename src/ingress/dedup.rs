//! Events that are sent again soon: answered like the first time, and not stored again.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use prometheus::IntCounter;

use crate::event::{Event, EventId};
use crate::journal::{ReadError, Reader};

/// The most ids that are remembered; some 100 MB. With more events in the window the oldest are forgotten early.
const MAX_IDS: usize = 1_000_000;
/// How much of the journal is read at once, in bytes.
const READ: u64 = 1 << 20;

/// The ids of the events that were stored not long ago.
pub(super) struct Dedup {
    window: Duration,
    max_ids: usize,
    ids: Mutex<Ids>,
    resent: IntCounter,
}

#[derive(Default)]
struct Ids {
    seen: HashMap<EventId, Seen>,
    /// When each that is stored was seen, oldest first.
    order: VecDeque<(Instant, EventId)>,
}

#[derive(Clone, Copy)]
struct Seen {
    at: Instant,
    /// Whether it is durable; else it is on its way to the journal.
    stored: bool,
}

/// What is to be done with a request's events.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Claim {
    /// Store those that are `true`, and say what came of it.
    Store(Vec<bool>),
    /// One of them is just being stored for another request.
    Wait,
}

impl Dedup {
    pub(super) fn new(window: Duration, resent: IntCounter) -> Self {
        Self { window, max_ids: MAX_IDS, ids: Mutex::default(), resent }
    }

    /// Remembers the events that the journal has of the window. Blocks.
    pub(super) fn recall(&self, mut reader: Reader) -> Result<(), ReadError> {
        let (now, end) = (Instant::now(), reader.end());
        while reader.position() < end {
            reader.read(READ, |_, entry| {
                if let Ok(event) = Event::decode(entry.record)
                    // A clock that was set back makes it as young as can be.
                    && let age = SystemTime::now().duration_since(event.received_at()).unwrap_or_default()
                    && age < self.window
                    && let Some(at) = now.checked_sub(age)
                {
                    let mut ids = self.lock();
                    ids.seen.insert(event.id(), Seen { at, stored: true });
                    ids.order.push_back((at, event.id()));
                    ids.forget(now, self.window, self.max_ids);
                }
                true
            })?;
        }
        Ok(())
    }

    /// Claims those that are new.
    pub(super) fn claim(&self, wanted: &[EventId], now: Instant) -> Claim {
        let mut ids = self.lock();
        ids.forget(now, self.window, self.max_ids);
        let is_pending = |id| ids.seen.get(id).is_some_and(|seen| !seen.stored);
        if wanted.iter().any(is_pending) {
            return Claim::Wait;
        }
        let claimed: Vec<_> = wanted
            .iter()
            .map(|id| {
                let is_new = !ids.seen.contains_key(id);
                if is_new {
                    ids.seen.insert(*id, Seen { at: now, stored: false });
                }
                is_new
            })
            .collect();
        let resent = claimed.iter().filter(|is_new| !**is_new).count();
        self.resent.inc_by(resent as u64);
        Claim::Store(claimed)
    }

    /// What was claimed is durable, or was not stored.
    pub(super) fn settle(&self, claimed: &[EventId], stored: bool) {
        let Ids { seen, order } = &mut *self.lock();
        for id in claimed {
            if !stored {
                seen.remove(id);
            } else if let Some(seen) = seen.get_mut(id) {
                seen.stored = true;
                order.push_back((seen.at, *id));
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Ids> {
        self.ids.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ids {
    fn forget(&mut self, now: Instant, window: Duration, max_ids: usize) {
        while let Some((at, id)) = self.order.front().copied()
            && (self.order.len() > max_ids || now.saturating_duration_since(at) >= window)
        {
            self.order.pop_front();
            // It may have been forgotten and seen again meanwhile.
            if self.seen.get(&id).is_some_and(|seen| seen.at == at) {
                self.seen.remove(&id);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event;

    fn id(number: u32) -> EventId {
        event::sample(format!("{{\"n\":{number}}}").as_bytes(), "t").unwrap()[0].id()
    }

    #[test]
    fn an_event_is_stored_once_in_the_window() {
        let (start, second) = (Instant::now(), Duration::from_secs(1));
        let dedup = Dedup::new(10 * second, IntCounter::new("resent", "Resent.").unwrap());
        let claim = |numbers: &[u32], at| dedup.claim(&numbers.iter().copied().map(id).collect::<Vec<_>>(), at);
        let store = |expected: &[bool]| Claim::Store(expected.to_vec());
        assert_eq!(claim(&[1, 2, 1], start), store(&[true, true, false]));
        assert_eq!(claim(&[3, 2], start), Claim::Wait, "nothing of it is claimed");
        dedup.settle(&[id(1), id(2)], true);
        assert_eq!(claim(&[3, 2], start + second), store(&[true, false]));
        dedup.settle(&[id(3)], false);
        assert_eq!(claim(&[3], start + 2 * second), store(&[true]), "it was not stored");
        dedup.settle(&[id(3)], true);
        assert_eq!(claim(&[1, 2, 3], start + 9 * second), store(&[false; 3]));
        assert_eq!(claim(&[1], start + 10 * second), store(&[true]), "the window is over");
        dedup.settle(&[id(1)], true);
        assert_eq!(claim(&[3], start + 11 * second), store(&[false]), "it counts from when it was stored");
        assert_eq!(dedup.resent.get(), 6);
    }

    #[test]
    fn the_oldest_are_forgotten_at_the_bound() {
        let dedup =
            Dedup { max_ids: 3, ..Dedup::new(Duration::from_secs(10), IntCounter::new("resent", "Resent.").unwrap()) };
        let now = Instant::now();
        let claim = |number| dedup.claim(&[id(number)], now) == Claim::Store(vec![true]);
        for number in 0..4 {
            assert!(claim(number));
            dedup.settle(&[id(number)], true);
        }
        assert!(!claim(3) && !claim(1), "three are remembered");
        assert!(claim(0), "the fourth is not");
        assert!(dedup.lock().seen.len() <= 4);
        dedup.settle(&[id(0)], true);
        for _ in 0..10 {
            assert!(claim(9));
            dedup.settle(&[id(9)], false);
        }
        assert!(!claim(3), "what was not stored takes nobody's place");
    }
}
