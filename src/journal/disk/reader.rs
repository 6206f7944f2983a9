//! Reading on from a position, with memory that does not depend on the backlog.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::watch;

use super::scan::{Item, Scanner};
use super::{Position, Segment, Shared, Start, record};

/// Reads entries in order, and keeps those that it has not released.
pub struct Reader {
    shared: Arc<Shared>,
    durable: watch::Receiver<Position>,
    hold: Arc<Hold>,
    next: Position,
    open: Option<OpenSegment>,
}

/// Keeps all entries from a position on from being given up, for as long as it is there.
pub struct Hold {
    shared: Arc<Shared>,
    number: u64,
}

struct OpenSegment {
    first: u64,
    path: Arc<Path>,
    scanner: Scanner,
}

/// A segment as it is known at one time.
struct Part {
    segment: Segment,
    /// The first sequence number of the one after it.
    next_first: Option<u64>,
}

impl Reader {
    pub(super) fn new(shared: Arc<Shared>, start: Start) -> Self {
        let durable = shared.durable.subscribe();
        let mut segments = shared.segments();
        let end = *durable.borrow();
        let oldest = segments.list.front().map_or(end, |segment| Position(segment.first));
        let next = match start {
            Start::At(position) => position.clamp(oldest, end.max(oldest)),
            Start::Earliest => oldest,
            Start::WrittenSince(time) => {
                let written = segments.list.iter().find(|segment| segment.sealed.is_none_or(|sealed| sealed >= time));
                written.map_or(end, |segment| Position(segment.first))
            }
            Start::End => end,
        };
        let number = segments.next_hold;
        segments.next_hold += 1;
        segments.holds.insert(number, next);
        drop(segments);
        let hold = Arc::new(Hold { shared: Arc::clone(&shared), number });
        Self { shared, durable, hold, next, open: None }
    }

    /// What keeps the entries that are not released, also when the reader is gone.
    pub fn hold(&self) -> Arc<Hold> {
        Arc::clone(&self.hold)
    }

    /// The position that is read next.
    pub fn position(&self) -> Position {
        self.next
    }

    /// Reads on from an earlier position, of what is not released.
    pub fn go_back(&mut self, position: Position) {
        (self.next, self.open) = (position, None);
    }

    /// The position after the last durable entry.
    pub fn end(&self) -> Position {
        *self.durable.borrow()
    }

    /// [`Reader::end`], for whoever has to know it without the reader.
    pub fn watch_end(&self) -> watch::Receiver<Position> {
        self.durable.clone()
    }

    /// Says that entries before `position` are not needed any more, not even after a restart.
    pub fn release(&self, position: Position) {
        if let Some(hold) = self.shared.segments().holds.get_mut(&self.hold.number) {
            *hold = position.max(*hold);
        }
    }

    /// Waits until there is something to read.
    pub async fn readable(&mut self) {
        let next = self.next;
        // The sender lives as long as `shared`, so this does not fail.
        drop(self.durable.wait_for(|end| *end > next).await);
    }

    /// Reads entries, and hands each with its position to `visit`, until there are no more or `visit` says stop
    /// (`false`; that entry counts as read), or about `max_bytes` were read. Blocks on the disk.
    ///
    /// Entries that damage has made unreadable are passed over and logged as lost.
    ///
    /// # Errors
    ///
    /// [`ReadError`]; nothing is passed over, so that reading can be tried again.
    pub fn read(&mut self, max_bytes: u64, mut visit: impl FnMut(Position, Bytes) -> bool) -> Result<(), ReadError> {
        let mut left = max_bytes;
        loop {
            // In this order: whatever is durable by then, the segments have.
            let end = self.end();
            if left == 0 || self.next >= end {
                return Ok(());
            }
            let Some(part) = self.part()? else { return Ok(()) };
            if !self.read_part(&part, end, &mut left, &mut visit)? {
                return Ok(());
            }
        }
    }

    /// Reads on in a segment, up to `end`; whether there may be more after it.
    fn read_part(
        &mut self,
        Part { segment, next_first }: &Part,
        end: Position,
        left: &mut u64,
        visit: &mut impl FnMut(Position, Bytes) -> bool,
    ) -> Result<bool, ReadError> {
        while *left > 0 && self.next < end {
            let Some(open) = &mut self.open else { return Ok(true) };
            let item = open.scanner.next(segment.end).map_err(|source| read_error(&open.path, source))?;
            match item {
                Item::Record { header, payload } => {
                    *left = left.saturating_sub(header.record_len());
                    self.passed_to(header.seq, &segment.path);
                    for (entry, seq) in record::entries(payload).zip(header.seq..) {
                        if seq >= self.next.0 {
                            self.next = Position(seq + 1);
                            if !visit(Position(seq), entry) {
                                // The rest of the record is read again.
                                self.open = None;
                                return Ok(false);
                            }
                        }
                    }
                }
                Item::Gap { .. } => {}
                Item::Damaged { bytes } => {
                    tracing::error!(file = %open.path.display(), offset = bytes.start, bytes = bytes.end - bytes.start, "journal is damaged; passing over it");
                }
                Item::End { .. } => match *next_first {
                    Some(first) => {
                        self.passed_to(first, &segment.path);
                        self.open = None;
                    }
                    // Everything up to here is durable, so that what is not readable is lost; and so is what a gap at the
                    // end stands for.
                    None if open.scanner.offset() < segment.end || self.next.0 < segment.next_seq => {
                        open.scanner.skip_to(segment.end, segment.next_seq);
                        self.passed_to(segment.next_seq, &segment.path);
                    }
                    None => return Ok(false),
                },
            }
        }
        Ok(true)
    }

    /// Moves to `seq`, and says so if entries were missing before it.
    fn passed_to(&mut self, seq: u64, path: &Path) {
        let to = Position(seq);
        if to > self.next {
            let (from, lost) = (self.next.0, to.since(self.next));
            tracing::error!(file = %path.display(), from, lost, "entries are lost from the journal");
            self.next = to;
        }
    }

    /// The segment that `next` is in, opened.
    fn part(&mut self) -> Result<Option<Part>, ReadError> {
        let part = {
            let segments = self.shared.segments();
            let wanted = self.open.as_ref().map_or(self.next.0, |open| open.first);
            let index = segments.list.partition_point(|segment| segment.first <= wanted).saturating_sub(1);
            let Some(segment) = segments.list.get(index) else { return Ok(None) };
            Part { segment: segment.clone(), next_first: segments.list.get(index + 1).map(|next| next.first) }
        };
        let segment = &part.segment;
        if self.open.as_ref().is_none_or(|open| open.first != segment.first) {
            let file = File::open(&segment.path).map_err(|source| read_error(&segment.path, source))?;
            let scanner = Scanner::new(Arc::new(file), segment.identity, segment.first);
            self.open = Some(OpenSegment { first: segment.first, path: Arc::clone(&segment.path), scanner });
        }
        Ok(Some(part))
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.shared.segments().holds.remove(&self.number);
    }
}

fn read_error(path: &Path, source: io::Error) -> ReadError {
    ReadError { path: path.to_owned(), source }
}

/// A segment could not be read.
#[derive(Debug, thiserror::Error)]
#[error("{} can't be read", path.display())]
pub struct ReadError {
    path: PathBuf,
    source: io::Error,
}
