//! Order by key: of the deliveries with one key, one is under way at a time, and the others wait in line.

use std::collections::HashMap;
use std::collections::VecDeque;
use std::hash::{BuildHasher as _, RandomState};

/// What a delivery is ordered by: a hash of the key's value. Two keys with one hash are ordered needlessly, no more.
pub(super) type Key = u64;

/// The keys that are under way, each with the deliveries that wait for it.
pub(super) struct Order<T> {
    busy: HashMap<Key, Line<T>>,
    hasher: RandomState,
    is_fresh: fn(&T) -> bool,
}

struct Line<T> {
    /// Whether the one that is under way is fresh.
    begins_fresh: bool,
    waiting: VecDeque<T>,
}

impl<T> Order<T> {
    /// `is_fresh` says whether a delivery has not been parked yet.
    pub(super) fn new(is_fresh: fn(&T) -> bool) -> Self {
        Self { busy: HashMap::new(), hasher: RandomState::new(), is_fresh }
    }

    /// The key of a value.
    pub(super) fn key(&self, value: &str) -> Key {
        self.hasher.hash_one(value)
    }

    /// Takes a delivery, and gives it back if it may go now. Without a key it always may.
    pub(super) fn admit(&mut self, key: Option<Key>, delivery: T) -> Option<T> {
        let Some(key) = key else { return Some(delivery) };
        if let Some(line) = self.busy.get_mut(&key) {
            line.waiting.push_back(delivery);
            return None;
        }
        self.busy.insert(key, Line { begins_fresh: (self.is_fresh)(&delivery), waiting: VecDeque::new() });
        Some(delivery)
    }

    /// Whether a fresh delivery of the key is under way or waits.
    pub(super) fn has_fresh(&self, key: Option<Key>) -> bool {
        let line = key.and_then(|key| self.busy.get(&key));
        line.is_some_and(|line| line.begins_fresh || line.waiting.iter().any(self.is_fresh))
    }

    /// The key's delivery is settled: the next that may go.
    pub(super) fn settle(&mut self, key: Option<Key>) -> Option<T> {
        let key = key?;
        let line = self.busy.get_mut(&key)?;
        let next = line.waiting.pop_front();
        match &next {
            Some(next) => line.begins_fresh = (self.is_fresh)(next),
            None => drop(self.busy.remove(&key)),
        }
        next
    }

    /// What waits and is fresh.
    pub(super) fn fresh(&self) -> impl Iterator<Item = &T> {
        self.busy.values().flat_map(|line| &line.waiting).filter(|delivery| (self.is_fresh)(delivery))
    }

    /// What waits and is fresh goes elsewhere.
    pub(super) fn take_fresh(&mut self) -> Vec<T> {
        let mut taken = Vec::new();
        for line in self.busy.values_mut() {
            let (fresh, others): (Vec<_>, Vec<_>) = line.waiting.drain(..).partition(self.is_fresh);
            taken.extend(fresh);
            line.waiting = others.into();
        }
        taken
    }

    /// The key's delivery goes elsewhere: so does what waits for it.
    pub(super) fn take(&mut self, key: Option<Key>) -> VecDeque<T> {
        key.and_then(|key| self.busy.remove(&key)).map(|line| line.waiting).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Whatever the order in which deliveries settle, each key's go one at a time and in order, and all go.
        #[test]
        fn each_key_goes_in_order(keys in prop::collection::vec(prop::option::of(0_u64..5), 0..60), picks in prop::collection::vec(any::<prop::sample::Index>(), 0..200)) {
            let mut order = Order::new(|(_, number): &(Option<Key>, usize)| number.is_multiple_of(2));
            let total = keys.len();
            let mut under_way: Vec<(Option<Key>, usize)> =
                keys.iter().enumerate().filter_map(|(number, key)| order.admit(*key, (*key, number))).collect();
            let mut last = HashMap::new();
            let mut settled = 0;
            let mut picks = picks.into_iter();
            while !under_way.is_empty() {
                for key in 0..5 {
                    let is_left = |number| last.get(&key).is_none_or(|last| *last < number);
                    let mut all = keys.iter().enumerate().filter(|(number, of)| **of == Some(key) && is_left(*number));
                    prop_assert_eq!(order.has_fresh(Some(key)), all.any(|(number, _)| number.is_multiple_of(2)));
                }
                let pick = picks.next().map_or(0, |pick| pick.index(under_way.len()));
                let (key, number) = under_way.swap_remove(pick);
                prop_assert!(key.is_none() || !under_way.iter().any(|(other, _)| *other == key), "two of one key");
                if let Some(key) = key {
                    prop_assert!(last.insert(key, number).is_none_or(|before| before < number), "out of order");
                }
                settled += 1;
                under_way.extend(order.settle(key));
            }
            prop_assert_eq!(settled, total);
            prop_assert!(order.busy.is_empty());
        }
    }
}
