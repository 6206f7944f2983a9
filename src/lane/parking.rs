//! The book of a lane's parked deliveries: which keys have some, which are in memory, and when to look for due ones. Pure.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use super::order::Key;
use crate::ledger::{Change, Millis, Which};

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
    /// There are no others: those have their turn that the sink has asked to wait with.
    probe_asked: bool,
    look_at: Instant,
}

impl Parking {
    pub(super) fn new(now: Instant) -> Self {
        let (loaded, probed) = (HashSet::new(), HashSet::new());
        Self { keys: HashMap::new(), total: 0, loaded, probed, probe_asked: false, look_at: now }
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

    /// Which rows to fetch, and which not; to probe with, or because they are due.
    pub(super) fn wanted(&self, probe: bool) -> (Which, HashSet<i64>) {
        match (probe, self.probe_asked) {
            (false, _) => (Which::Due, self.loaded.clone()),
            (true, false) => (Which::Unasked, &self.loaded | &self.probed),
            (true, true) => (Which::Any, &self.loaded | &self.probed),
        }
    }

    /// The row was probed with before it was due.
    pub(super) fn probed(&mut self, id: i64) {
        self.probed.insert(id);
    }

    /// Those that had their turn have it again; where there are none, nor any in memory, it is that of those that the sink
    /// has asked to wait with. Whether to look for them.
    pub(super) fn probe_anew(&mut self) -> bool {
        let had_turn = !std::mem::take(&mut self.probed).is_empty();
        self.probe_asked = !had_turn && !self.probe_asked && self.loaded.is_empty();
        had_turn || self.probe_asked
    }

    /// No more probes are needed.
    pub(super) fn end_probes(&mut self) {
        self.probed.clear();
        self.probe_asked = false;
    }

    /// Notes a fetched row; whether it was not in memory yet.
    pub(super) fn load(&mut self, id: i64) -> bool {
        self.probe_asked = false;
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
            (parking.wanted(false).1.len(), parking.look_at()),
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
    fn others_are_probed_with_before_those_that_were_asked_to_wait() {
        let mut parking = Parking::new(Instant::now());
        let wanted = |parking: &Parking| (parking.wanted(true).0, parking.wanted(true).1.len());
        assert_eq!(wanted(&parking), (Which::Unasked, 0));
        parking.probed(7);
        assert_eq!(wanted(&parking), (Which::Unasked, 1));
        assert!(parking.probe_anew(), "7 has its turn again");
        assert_eq!(wanted(&parking), (Which::Unasked, 0));
        assert!(parking.probe_anew(), "there was not even that");
        assert_eq!((wanted(&parking), parking.wanted(false).0), ((Which::Any, 0), Which::Due));
        assert!(parking.load(8));
        assert_eq!(wanted(&parking), (Which::Unasked, 1));
        assert!(!parking.probe_anew(), "8 may be another one when it is written");
        parking.unload(8);
        assert!(parking.probe_anew() && !parking.probe_anew(), "there is none at all");
        assert_eq!(wanted(&parking), (Which::Unasked, 0));
        assert!(parking.probe_anew());
        parking.end_probes();
        assert_eq!(wanted(&parking), (Which::Unasked, 0));
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
