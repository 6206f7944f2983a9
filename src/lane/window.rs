//! The window: what has been read and is not settled yet. It says where the cursor may stand.

use std::collections::{HashSet, VecDeque};

use crate::journal::Position;
use crate::ledger::Millis;

/// Deliveries in the order they were read, from the oldest that is not settled.
pub(super) struct Window {
    entries: VecDeque<Entry>,
    read_to: Position,
    bytes: usize,
    unsettled: usize,
    /// What comes after that and was read before, here or by a former lane: it is settled already, or still under way.
    taken: VecDeque<Entry>,
}

struct Entry {
    position: Position,
    bytes: usize,
    since: Millis,
    settled: bool,
}

impl Window {
    /// An empty window at a position; what is `ahead` of it is settled.
    pub(super) fn resume(at: Position, ahead: Vec<Position>) -> Self {
        let settled = |position| Entry { position, bytes: 0, since: 0, settled: true };
        let taken = ahead.into_iter().map(settled).collect();
        Self { entries: VecDeque::new(), read_to: at, bytes: 0, unsettled: 0, taken }
    }

    /// Whether the delivery that was read from there was taken when it was read before. Positions come in order.
    pub(super) fn was_taken(&mut self, position: Position) -> bool {
        self.read_to(position);
        let was_taken = self.taken.pop_front_if(|taken| taken.position == position);
        let found = was_taken.is_some();
        self.entries.extend(was_taken);
        self.pass_settled();
        found
    }

    /// Adds a delivery that takes so many bytes, of an event received at `since`.
    pub(super) fn push(&mut self, position: Position, bytes: usize, since: Millis) {
        self.entries.push_back(Entry { position, bytes, since, settled: false });
        self.bytes += bytes;
        self.unsettled += 1;
    }

    /// Everything before `position` has been read.
    pub(super) fn read_to(&mut self, position: Position) {
        self.read_to = position;
        let before = self.taken.partition_point(|taken| taken.position < position);
        self.entries.extend(self.taken.drain(..before));
        self.pass_settled();
    }

    /// The delivery is settled: delivered, parked, or a dead letter.
    pub(super) fn settle(&mut self, position: Position) {
        let within = |entries: &VecDeque<Entry>| entries.binary_search_by_key(&position, |entry| entry.position).ok();
        let entry = match within(&self.entries) {
            Some(index) => self.entries.get_mut(index),
            None => within(&self.taken).and_then(|index| self.taken.get_mut(index)),
        };
        if let Some(entry) = entry {
            self.unsettled -= usize::from(!entry.settled);
            entry.settled = true;
            self.bytes -= std::mem::take(&mut entry.bytes);
        }
        self.pass_settled();
    }

    fn pass_settled(&mut self) {
        while self.entries.pop_front_if(|entry| entry.settled).is_some() {}
    }

    /// Everything from `position` on will be read again, and these deliveries are not under way any more.
    pub(super) fn go_back(&mut self, position: Position, dropped: &HashSet<Position>) {
        let mut taken = self.entries.split_off(self.entries.partition_point(|entry| entry.position < position));
        taken.retain(|entry| {
            let stays = !dropped.contains(&entry.position);
            if !stays {
                self.unsettled -= 1;
                self.bytes -= entry.bytes;
            }
            stays
        });
        taken.append(&mut self.taken);
        self.taken = taken;
        self.read_to = position;
    }

    /// The lowest position that is not settled.
    pub(super) fn cursor(&self) -> Position {
        self.entries.front().map_or(self.read_to, |entry| entry.position)
    }

    /// Positions from the cursor on that are settled, in order. Where all is to be read again, the cursor's own may be.
    pub(super) fn ahead(&self) -> Vec<Position> {
        let settled = self.entries.iter().chain(&self.taken).filter(|entry| entry.settled);
        settled.map(|entry| entry.position).collect()
    }

    /// When the oldest event was received that is not settled.
    pub(super) fn oldest(&self) -> Option<Millis> {
        let unsettled = |entry: &&Entry| !entry.settled;
        self.entries.front().or_else(|| self.taken.iter().find(unsettled)).map(|entry| entry.since)
    }

    /// How many deliveries are between the cursor and what was read last.
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// How many of them are not settled.
    pub(super) fn unsettled(&self) -> usize {
        self.unsettled
    }

    /// How many bytes the deliveries take that are not settled.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(position: i64) -> Position {
        Position::from_stored(position)
    }

    #[test]
    fn the_cursor_is_the_lowest_that_is_not_settled() {
        let mut window = Window::resume(at(10), vec![]);
        assert_eq!(window.cursor(), at(10));
        for position in [12, 13, 20] {
            window.push(at(position), 5, position);
        }
        window.read_to(at(25));
        let mut check = |settled, cursor, ahead: &[i64], bytes, oldest| {
            window.settle(at(settled));
            let ahead: Vec<_> = ahead.iter().copied().map(at).collect();
            assert_eq!((window.cursor(), window.ahead(), window.bytes()), (at(cursor), ahead, bytes));
            assert_eq!((window.oldest(), window.unsettled()), (oldest, bytes / 5));
        };
        check(13, 12, &[13], 10, Some(12));
        check(13, 12, &[13], 10, Some(12));
        check(12, 20, &[], 5, Some(20));
        check(12, 20, &[], 5, Some(20));
        check(20, 25, &[], 0, None);
        assert_eq!(window.len(), 0);
    }

    #[test]
    fn what_was_settled_before_stays_settled() {
        let mut window = Window::resume(at(10), vec![at(12), at(13), at(15), at(20)]);
        assert!(!window.was_taken(at(10)));
        window.push(at(10), 5, 0);
        assert!(window.was_taken(at(12)));
        assert_eq!(window.ahead(), [12, 13, 15, 20].map(at), "also what is not read yet");
        // The rules have changed meanwhile: 13 is not this sink's any more, 14 is.
        assert!(!window.was_taken(at(14)));
        window.push(at(14), 5, 0);
        assert!(window.was_taken(at(15)));
        window.settle(at(10));
        assert_eq!((window.cursor(), window.ahead()), (at(14), vec![at(15), at(20)]));
        window.settle(at(14));
        window.read_to(at(16));
        assert_eq!((window.cursor(), window.ahead()), (at(16), vec![at(20)]));
        window.read_to(at(30));
        assert_eq!((window.cursor(), window.ahead()), (at(30), vec![]));
    }

    #[test]
    fn what_is_under_way_stays_so_when_it_is_read_again() {
        let mut window = Window::resume(at(10), vec![at(30)]);
        for position in [10, 11, 12, 13, 14] {
            window.push(at(position), 5, position);
        }
        window.read_to(at(20));
        window.settle(at(12));
        let check = |window: &Window, cursor, ahead: &[i64], unsettled| {
            let ahead: Vec<_> = ahead.iter().copied().map(at).collect();
            assert_eq!((window.cursor(), window.ahead()), (at(cursor), ahead));
            assert_eq!((window.unsettled(), window.bytes()), (unsettled, 5 * unsettled));
        };
        check(&window, 10, &[12, 30], 4);
        // 11 and 14 were not begun with.
        window.go_back(at(10), &HashSet::from([at(11), at(14)]));
        check(&window, 10, &[12, 30], 2);
        window.settle(at(13));
        check(&window, 10, &[12, 13, 30], 1);
        assert!(window.was_taken(at(10)) && !window.was_taken(at(11)));
        window.push(at(11), 5, 11);
        // Again, before all of it was read.
        window.go_back(at(10), &HashSet::from([at(11)]));
        window.settle(at(10));
        check(&window, 10, &[10, 12, 13, 30], 0);
        // 10 is not this sink's any more; 15 is.
        assert!(!window.was_taken(at(11)));
        window.push(at(11), 5, 11);
        assert!(window.was_taken(at(12)) && window.was_taken(at(13)) && !window.was_taken(at(15)));
        window.push(at(15), 5, 15);
        window.read_to(at(20));
        check(&window, 11, &[12, 13, 30], 2);
        window.settle(at(11));
        check(&window, 15, &[30], 1);
    }

    #[test]
    fn what_comes_before_the_place_that_it_goes_back_to_stays() {
        let mut window = Window::resume(at(10), vec![]);
        for position in [10, 11, 12, 13] {
            window.push(at(position), 5, position);
        }
        window.read_to(at(20));
        window.settle(at(11));
        window.go_back(at(12), &HashSet::from([at(12)]));
        assert_eq!((window.cursor(), window.ahead(), window.unsettled()), (at(10), vec![at(11)], 2));
        window.settle(at(10));
        assert_eq!((window.cursor(), window.oldest()), (at(12), Some(13)), "it will be read again");
        assert!(!window.was_taken(at(12)) && window.was_taken(at(13)));
    }

    #[test]
    fn the_cursor_does_not_pass_what_is_under_way_by_former_rules() {
        let mut window = Window::resume(at(10), vec![]);
        for position in [10, 11] {
            window.push(at(position), 5, position);
        }
        window.read_to(at(20));
        window.go_back(at(10), &HashSet::from([at(11)]));
        window.read_to(at(20));
        assert_eq!((window.cursor(), window.oldest()), (at(10), Some(10)));
        window.settle(at(10));
        assert_eq!(window.cursor(), at(20));
    }
}
