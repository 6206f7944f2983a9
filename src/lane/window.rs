//! The window: what has been read and is not settled yet. It says where the cursor may stand.

use std::collections::VecDeque;

use crate::journal::Position;
use crate::ledger::Millis;

/// Names a delivery in the window.
pub(super) type Ticket = u64;

/// Deliveries in the order they were read, from the oldest that is not settled.
pub(super) struct Window {
    entries: VecDeque<Entry>,
    first: Ticket,
    read_to: Position,
    bytes: usize,
    unsettled: usize,
    /// What a former process has settled after its cursor, as far as it is not read yet.
    settled_before: VecDeque<Position>,
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
        Self { entries: VecDeque::new(), first: 0, read_to: at, bytes: 0, unsettled: 0, settled_before: ahead.into() }
    }

    /// Whether a former process has settled the delivery that was read from there. Positions come in order.
    pub(super) fn was_settled(&mut self, position: Position) -> bool {
        while self.settled_before.front().is_some_and(|settled| *settled < position) {
            self.settled_before.pop_front();
        }
        let was_settled = self.settled_before.front() == Some(&position);
        if was_settled {
            self.settled_before.pop_front();
            let ticket = self.push(position, 0, 0);
            self.settle(ticket);
        }
        was_settled
    }

    /// Adds a delivery that takes so many bytes, of an event received at `since`.
    pub(super) fn push(&mut self, position: Position, bytes: usize, since: Millis) -> Ticket {
        let ticket = self.first + self.entries.len() as u64;
        self.entries.push_back(Entry { position, bytes, since, settled: false });
        self.bytes += bytes;
        self.unsettled += 1;
        ticket
    }

    /// Everything before `position` has been read.
    pub(super) fn read_to(&mut self, position: Position) {
        self.read_to = position;
    }

    /// The delivery is settled: delivered, parked, or a dead letter.
    pub(super) fn settle(&mut self, ticket: Ticket) {
        let index = ticket.checked_sub(self.first).and_then(|index| usize::try_from(index).ok());
        if let Some(entry) = index.and_then(|index| self.entries.get_mut(index)) {
            self.unsettled -= usize::from(!entry.settled);
            entry.settled = true;
            self.bytes -= std::mem::take(&mut entry.bytes);
        }
        while self.entries.front().is_some_and(|entry| entry.settled) {
            self.entries.pop_front();
            self.first += 1;
        }
    }

    /// The lowest position that is not settled.
    pub(super) fn cursor(&self) -> Position {
        self.entries.front().map_or(self.read_to, |entry| entry.position)
    }

    /// Positions after the cursor that are settled, in order.
    pub(super) fn ahead(&self) -> Vec<Position> {
        let settled = self.entries.iter().filter(|entry| entry.settled).map(|entry| entry.position);
        let cursor = self.cursor();
        let before = self.settled_before.iter().copied().filter(|position| *position > cursor);
        settled.chain(before).collect()
    }

    /// When the oldest event was received that is not settled.
    pub(super) fn oldest(&self) -> Option<Millis> {
        self.entries.front().map(|entry| entry.since)
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
        let tickets: Vec<_> = [12, 13, 20].into_iter().map(|position| window.push(at(position), 5, position)).collect();
        window.read_to(at(25));
        let mut check = |ticket: usize, cursor, ahead: &[i64], bytes, oldest| {
            window.settle(tickets[ticket]);
            let ahead: Vec<_> = ahead.iter().copied().map(at).collect();
            assert_eq!((window.cursor(), window.ahead(), window.bytes()), (at(cursor), ahead, bytes));
            assert_eq!((window.oldest(), window.unsettled()), (oldest, bytes / 5));
        };
        check(1, 12, &[13], 10, Some(12));
        check(1, 12, &[13], 10, Some(12));
        check(0, 20, &[], 5, Some(20));
        check(0, 20, &[], 5, Some(20));
        check(2, 25, &[], 0, None);
        assert_eq!(window.len(), 0);
    }

    #[test]
    fn what_was_settled_before_stays_settled() {
        let mut window = Window::resume(at(10), vec![at(12), at(13), at(15), at(20)]);
        assert!(!window.was_settled(at(10)));
        let first = window.push(at(10), 5, 0);
        assert!(window.was_settled(at(12)));
        assert_eq!(window.ahead(), [12, 13, 15, 20].map(at), "also what is not read yet");
        // The rules have changed meanwhile: 13 is not this sink's any more, 14 is.
        assert!(!window.was_settled(at(14)));
        let second = window.push(at(14), 5, 0);
        assert!(window.was_settled(at(15)));
        window.settle(first);
        assert_eq!((window.cursor(), window.ahead()), (at(14), vec![at(15), at(20)]));
        window.settle(second);
        window.read_to(at(16));
        assert_eq!((window.cursor(), window.ahead()), (at(16), vec![at(20)]));
        window.read_to(at(30));
        assert_eq!((window.cursor(), window.ahead()), (at(30), vec![]));
    }
}
