//! What is to be written with a lane's progress. What is settled has left the window, and still takes memory here.

use crate::ledger::Change;

/// With more changes than this nothing more is read.
const MAX_CHANGES: usize = 2_000;

/// Changes that are not written yet, in order.
pub(super) struct Unwritten {
    changes: Vec<Change>,
    bytes: usize,
    max_bytes: usize,
}

impl Unwritten {
    /// None; they should not take more than so many bytes.
    pub(super) fn new(max_bytes: usize) -> Self {
        Self { changes: Vec::new(), bytes: 0, max_bytes }
    }

    pub(super) fn push(&mut self, change: Change) {
        self.bytes += change.size();
        self.changes.push(change);
    }

    /// All of them, to be written.
    pub(super) fn take(&mut self) -> Vec<Change> {
        self.bytes = 0;
        std::mem::take(&mut self.changes)
    }

    /// They could not be written.
    pub(super) fn put_back(&mut self, mut changes: Vec<Change>) {
        self.bytes += changes.iter().map(Change::size).sum::<usize>();
        changes.append(&mut self.changes);
        self.changes = changes;
    }

    pub(super) fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }

    /// Whether there are enough to be written at once.
    pub(super) fn are_many(&self) -> bool {
        self.changes.len() > MAX_CHANGES / 2 || self.bytes > self.max_bytes / 2
    }

    /// Whether there had better not be more before some are written.
    pub(super) fn are_too_many(&self) -> bool {
        self.changes.len() >= MAX_CHANGES || self.bytes >= self.max_bytes
    }
}

impl Extend<Change> for Unwritten {
    fn extend<I: IntoIterator<Item = Change>>(&mut self, changes: I) {
        changes.into_iter().for_each(|change| self.push(change));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::Position;
    use crate::lane::delivery::unreadable;

    #[test]
    fn there_are_limits_of_count_and_of_bytes() {
        let mut unwritten = Unwritten::new(1 << 20);
        let small = |_| Change::Unpark { id: 1 };
        unwritten.extend((0..MAX_CHANGES / 2).map(small));
        assert_eq!((unwritten.are_many(), unwritten.are_too_many()), (false, false));
        unwritten.extend((0..MAX_CHANGES / 2 - 1).map(small));
        assert_eq!((unwritten.are_many(), unwritten.are_too_many()), (true, false));
        unwritten.push(small(0));
        assert!(unwritten.are_too_many());
        assert_eq!(unwritten.take().len(), MAX_CHANGES);
        assert!(unwritten.is_empty());

        let large = || Change::Bury(Box::new(unreadable(Position::ZERO, vec![0; 400 << 10].into(), String::new())));
        unwritten.push(large());
        assert!(!unwritten.are_many());
        unwritten.push(large());
        assert_eq!((unwritten.are_many(), unwritten.are_too_many()), (true, false));
        unwritten.push(large());
        assert!(unwritten.are_too_many());
        // What comes meanwhile stays behind those that could not be written.
        let taken = unwritten.take();
        assert!(!unwritten.are_many());
        unwritten.push(small(0));
        unwritten.put_back(taken);
        assert!(unwritten.are_too_many());
        assert!(matches!(unwritten.take().last(), Some(Change::Unpark { .. })));
    }
}
