//! The window: what has been read and is not settled yet. It says where the cursor may stand.

use std::collections::VecDeque;

use crate::journal::Position;

/// Names a delivery in the window.
pub(super) type Ticket = u64;

/// Deliveries in the order they were read, from the oldest that is not settled.
pub(super) struct Window {
    entries: VecDeque<Entry>,
    first: Ticket,
    read_to: Position,
    bytes: usize,
}

struct Entry {
    position: Position,
    bytes: usize,
    settled: bool,
}

impl Window {
    /// An empty window at a position.
    pub(super) fn new(at: Position) -> Self {
        Self { entries: VecDeque::new(), first: 0, read_to: at, bytes: 0 }
    }

    /// Adds a delivery that takes so many bytes.
    pub(super) fn push(&mut self, position: Position, bytes: usize) -> Ticket {
        let ticket = self.first + self.entries.len() as u64;
        self.entries.push_back(Entry { position, bytes, settled: false });
        self.bytes += bytes;
        ticket
    }

    /// Everything before `position` has been read.
    pub(super) fn read_to(&mut self, position: Position) {
        self.read_to = position;
    }

    /// The delivery is settled: delivered, or a dead letter.
    pub(super) fn settle(&mut self, ticket: Ticket) {
        let index = ticket.checked_sub(self.first).and_then(|index| usize::try_from(index).ok());
        if let Some(entry) = index.and_then(|index| self.entries.get_mut(index)) {
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

    /// How many deliveries are between the cursor and what was read last.
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// How many bytes the deliveries take that are not settled.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cursor_is_the_lowest_that_is_not_settled() {
        let at = Position::from_stored;
        let mut window = Window::new(at(10));
        assert_eq!(window.cursor(), at(10));
        let tickets: Vec<_> = [12, 13, 20].into_iter().map(|position| window.push(at(position), 5)).collect();
        window.read_to(at(25));
        let mut check = |ticket: usize, cursor, len, bytes| {
            window.settle(tickets[ticket]);
            assert_eq!((window.cursor(), window.len(), window.bytes()), (at(cursor), len, bytes));
        };
        check(1, 12, 3, 10);
        check(1, 12, 3, 10);
        check(0, 20, 1, 5);
        check(0, 20, 1, 5);
        check(2, 25, 0, 0);
    }
}
