//! Walks the records of one segment file: shared by the reader and by recovery. It never changes the file.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bytes::Bytes;

use super::record::{self, HEADER, Header};
use super::segment::HEADER_BLOCK;

/// How much is read from the file at once, in bytes; a longer record is read whole.
const WINDOW: u64 = 128 << 10;

/// What stands at the scanner's place in the file.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Item {
    /// A record with entries.
    Record { header: Header, payload: Bytes },
    /// A repair's note that entries are missing here.
    Gap { header: Header },
    /// Bytes that are no record, with a record after them that begins at the range's end.
    Damaged { bytes: Range<u64> },
    /// No record follows. `torn` is where bytes end that look like the beginning of one.
    End { torn: Option<u64> },
}

/// A place in a segment file.
pub(super) struct Scanner {
    file: Arc<File>,
    identity: u64,
    offset: u64,
    next_seq: u64,
    window: Bytes,
    window_at: u64,
}

impl Scanner {
    /// Begins at a segment's first record.
    pub(super) fn new(file: Arc<File>, identity: u64, first: u64) -> Self {
        Self { file, identity, offset: HEADER_BLOCK, next_seq: first, window: Bytes::new(), window_at: 0 }
    }

    /// Where the next item begins, in bytes from the file's start.
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    /// The lowest sequence number that the next record may have.
    pub(super) fn next_seq(&self) -> u64 {
        self.next_seq
    }

    /// The next item before `limit`, an offset in the file at which a record may end but none begins.
    pub(super) fn next(&mut self, limit: u64) -> io::Result<Item> {
        match self.record_at(self.offset, limit)? {
            Some((header, payload)) => {
                self.offset += header.record_len();
                self.next_seq = header.next_seq();
                Ok(match header.count {
                    0 => Item::Gap { header },
                    _ => Item::Record { header, payload },
                })
            }
            None => match self.find_record(limit)? {
                Some(found) => {
                    let bytes = self.offset..found;
                    self.offset = found;
                    Ok(Item::Damaged { bytes })
                }
                None => Ok(Item::End { torn: self.torn_end(limit)? }),
            },
        }
    }

    /// Gives up what is left before `limit`, where the writer's next record will begin.
    pub(super) fn skip_to(&mut self, limit: u64, next_seq: u64) {
        self.offset = limit;
        self.next_seq = next_seq;
    }

    /// Header and payload of the record at `offset`, if there is a whole and valid one that can follow the last.
    fn record_at(&mut self, offset: u64, limit: u64) -> io::Result<Option<(Header, Bytes)>> {
        let range = self.read(offset, HEADER as u64, limit)?;
        let Some(header) = self.window.get(range).and_then(Header::read) else { return Ok(None) };
        if !self.is_plausible(header, offset, limit) {
            return Ok(None);
        }
        let range = self.read(offset, header.record_len(), limit)?;
        let is_valid = self.window.get(range.clone()).is_some_and(|record| record::is_valid(record, self.identity));
        Ok(is_valid.then(|| (header, self.window.slice(range.start + HEADER..range.end))))
    }

    /// What can be told without reading the payload: length and sequence number are possible here.
    fn is_plausible(&self, header: Header, offset: u64, limit: u64) -> bool {
        let left = limit.saturating_sub(offset);
        !header.is_terminator()
            && header.record_len() <= left
            && header.seq >= self.next_seq
            && header.seq - self.next_seq <= limit
            && u64::from(header.count) <= left / record::ENTRY_OVERHEAD as u64
    }

    /// Searches for the next valid record behind the scanner's place.
    fn find_record(&mut self, limit: u64) -> io::Result<Option<u64>> {
        let mut offset = self.offset + 1;
        while offset + HEADER as u64 <= limit {
            let window = self.bytes(offset, WINDOW, limit)?;
            let Some(start) = window.iter().position(|byte| *byte != 0) else {
                offset += window.len().max(HEADER) as u64 - (HEADER as u64 - 1);
                continue;
            };
            // A header may begin with zeros, but not with more than its first fields have.
            offset += (start as u64).saturating_sub(HEADER as u64 - 1);
            let candidates = window.slice(start.saturating_sub(HEADER - 1)..);
            for candidate in candidates.windows(HEADER) {
                let plausible = Header::read(candidate).is_some_and(|header| self.is_plausible(header, offset, limit));
                if plausible && self.record_at(offset, limit)?.is_some() {
                    return Ok(Some(offset));
                }
                offset += 1;
            }
            if candidates.len() < HEADER {
                offset += 1;
            }
        }
        Ok(None)
    }

    /// Where the bytes end that are neither a terminator nor a record, or `None` if records end cleanly.
    fn torn_end(&mut self, limit: u64) -> io::Result<Option<u64>> {
        let rest = self.bytes(self.offset, HEADER as u64, limit)?;
        let Some(last) = rest.iter().rposition(|byte| *byte != 0) else { return Ok(None) };
        let claimed = Header::read(&rest).map(|header| self.offset + header.record_len()).filter(|end| *end <= limit);
        Ok(Some(claimed.unwrap_or(self.offset + last as u64 + 1)))
    }

    /// `len` bytes at `offset`, fewer where `limit` or the file's end comes before.
    fn bytes(&mut self, offset: u64, len: u64, limit: u64) -> io::Result<Bytes> {
        let range = self.read(offset, len, limit)?;
        Ok(self.window.slice(range))
    }

    /// Reads the file there, if that is not in the window; where in the window the bytes are.
    fn read(&mut self, offset: u64, len: u64, limit: u64) -> io::Result<Range<usize>> {
        let len = len.min(limit.saturating_sub(offset));
        let window_end = self.window_at + self.window.len() as u64;
        if offset < self.window_at || offset + len > window_end {
            let wanted = len.max(WINDOW).min(limit.saturating_sub(offset));
            // The same memory, unless someone still has a part of it, or a long record has made it large.
            let kept = std::mem::take(&mut self.window).try_into_mut().ok();
            let mut window = kept.filter(|kept| kept.capacity() as u64 <= 2 * WINDOW).unwrap_or_default();
            window.resize(usize::try_from(wanted).unwrap_or(usize::MAX), 0);
            let read = read_at(&self.file, &mut window, offset)?;
            window.truncate(read);
            self.window = window.into();
            self.window_at = offset;
        }
        let start = usize::try_from(offset - self.window_at).unwrap_or(usize::MAX);
        let end = start + usize::try_from(len).unwrap_or(usize::MAX);
        Ok(start..end.min(self.window.len()))
    }
}

/// Reads until the buffer is full or the file ends.
fn read_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut read = 0;
    while let Some(rest) = buffer.get_mut(read..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, offset + read as u64) {
            Ok(0) => break,
            Ok(len) => read += len,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            // Whoever has to look at the disk wants to know where.
            Err(e) => return Err(io::Error::new(e.kind(), format!("at offset {}: {e}", offset + read as u64))),
        }
    }
    Ok(read)
}
