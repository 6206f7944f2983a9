//! The book of a lane's parked deliveries: which keys have some, which are in memory, and when to look for due ones. Pure.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use super::order::Key;
use crate::ledger::{Change, Millis};

/// The ledger is looked into at least this often while something is parked, so that a clock that was set matters no longer.
const LOOK_INTERVAL: Duration = Duration::from_secs(60);

/// What is parked, counting what is on its way to the ledger.
pub(super) struct Parking {
    keys: HashMap<Key, usize>,
    total: usize,
    /// Rows that are in memory. They stay until what became of them is written.
    loaded: HashSet<i64>,
    /// Rows that were probed with before they were due: others have their turn first.
    probed: HashSet<i64>,
    look_at: Instant,
}

impl Parking {
    pub(super) fn new(now: Instant) -> Self {
        Self { keys: HashMap::new(), total: 0, loaded: HashSet::new(), probed: HashSet::new(), look_at: now }
    }

    /// So many more are parked.
    pub(super) fn add(&mut self, key: Option<Key>, count: usize) {
        self.total += count;
        if let Some(key) = key {
            *self.keys.entry(key).or_default() += count;
        }
    }

    /// One is settled.
    pub(super) fn remove(&mut self, key: Option<Key>) {
        self.total = self.total.saturating_sub(1);
        let Some(key) = key else { return };
        if let Some(count) = self.keys.get_mut(&key) {
            *count -= 1;
            if *count == 0 {
                self.keys.remove(&key);
            }
        }
    }

    /// Whether deliveries with this key have to wait behind a parked one.
    pub(super) fn holds(&self, key: Option<Key>) -> bool {
        key.is_some_and(|key| self.keys.contains_key(&key))
    }

    /// How many there are.
    pub(super) fn total(&self) -> usize {
        self.total
    }

    /// Rows that need not be fetched; or not to probe with.
    pub(super) fn except(&self, probe: bool) -> HashSet<i64> {
        if probe { &self.loaded | &self.probed } else { self.loaded.clone() }
    }

    /// The row was probed with before it was due.
    pub(super) fn probed(&mut self, id: i64) {
        self.probed.insert(id);
    }

    /// Whether some had their turn, which all have again from now on.
    pub(super) fn probe_anew(&mut self) -> bool {
        !std::mem::take(&mut self.probed).is_empty()
    }

    /// Notes a fetched row; whether it was not in memory yet.
    pub(super) fn load(&mut self, id: i64) -> bool {
        self.loaded.insert(id)
    }

    /// The row is not in memory any more, and nothing has become of it.
    pub(super) fn unload(&mut self, id: i64) {
        self.loaded.remove(&id);
    }

    /// These changes are written; others may be due now.
    pub(super) fn written(&mut self, changes: &[Change], now: Instant) {
        for change in changes {
            match change {
                Change::Postpone { id, .. } | Change::Unpark { id } => {
                    self.loaded.remove(id);
                }
                Change::Park(_) | Change::Exhume { .. } | Change::Hasten { .. } => {}
                Change::Bury(_) => continue,
            }
            self.look_at = now;
        }
    }

    /// The ledger was looked into and has none at all, nor is any on its way there: whatever was counted besides was
    /// taken away by someone else.
    pub(super) fn found_none(&mut self) {
        if self.loaded.is_empty() {
            self.keys.clear();
            self.total = 0;
        }
    }

    /// The ledger was looked into; `next` says when another is due.
    pub(super) fn looked(&mut self, next: Option<Millis>, wall: Millis, now: Instant) {
        let wait = next.map(|next| Duration::from_millis(u64::try_from(next.saturating_sub(wall)).unwrap_or(0)));
        self.look_at = now + wait.unwrap_or(LOOK_INTERVAL).min(LOOK_INTERVAL);
    }

    /// When to look for due ones, if there can be any that are not in memory.
    pub(super) fn look_at(&self) -> Option<Instant> {
        (self.total > 0).then_some(self.look_at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_held_until_its_last_is_settled() {
        let mut parking = Parking::new(Instant::now());
        assert!(!parking.holds(Some(1)) && parking.look_at().is_none());
        parking.add(Some(1), 2);
        parking.add(None, 1);
        assert!(parking.holds(Some(1)) && !parking.holds(Some(2)) && !parking.holds(None));
        parking.remove(Some(1));
        parking.remove(None);
        assert_eq!((parking.holds(Some(1)), parking.total()), (true, 1));
        parking.remove(Some(1));
        assert_eq!((parking.holds(Some(1)), parking.total()), (false, 0));
    }

    #[test]
    fn a_row_stays_in_memory_until_its_end_is_written() {
        let now = Instant::now();
        let mut parking = Parking::new(now);
        parking.add(Some(1), 2);
        assert!(parking.load(7) && !parking.load(7) && parking.load(8));
        parking.looked(None, 1000, now);
        assert_eq!(parking.look_at(), Some(now + LOOK_INTERVAL));
        let later = now + Duration::from_secs(1);
        parking.written(&[Change::Unpark { id: 7 }], later);
        assert_eq!(
            (parking.except(false).len(), parking.look_at()),
            (1, Some(later)),
            "another of its key may be due now"
        );
        parking.found_none();
        assert_eq!(parking.total(), 2, "one is in memory");
        parking.unload(8);
        assert!(parking.load(8));
        parking.unload(8);
        parking.found_none();
        assert!(parking.total() == 0 && !parking.holds(Some(1)));
    }

    #[test]
    fn looks_when_the_next_is_due_and_not_much_later_than_a_clock_may_jump() {
        let now = Instant::now();
        let mut parking = Parking::new(now);
        parking.add(None, 1);
        let mut after = |next, wall| {
            parking.looked(Some(next), wall, now);
            parking.look_at().unwrap() - now
        };
        assert_eq!(after(3500, 1000), Duration::from_millis(2500));
        assert_eq!(after(500, 1000), Duration::ZERO);
        assert_eq!(after(Millis::MAX, 1000), LOOK_INTERVAL);
    }
}
