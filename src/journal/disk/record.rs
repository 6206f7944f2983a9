//! The record: what one append writes, and how it is told from anything else that a file may hold.
//!
//! ```text
//! offset  size  field
//!      0     4  length of the payload, in bytes
//!      4     4  CRC-32C of all that follows, seeded with the segment's identity and the length
//!      8     8  sequence number of the first entry
//!     16     4  number of entries; 0 marks a gap that a repair left
//!     20     …  payload: per entry its length (4 bytes) and its bytes
//! ```
//!
//! All numbers are little-endian. Twenty zero bytes end a segment's records.

use bytes::{Buf as _, Bytes};

/// Bytes of a record before its payload.
pub(super) const HEADER: usize = 20;
/// What stands after the last record of a segment.
pub(super) const TERMINATOR: [u8; HEADER] = [0; HEADER];
/// Bytes that each entry takes besides its own.
pub(super) const ENTRY_OVERHEAD: usize = 4;

/// The fixed part of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) len: u32,
    pub(super) crc: u32,
    pub(super) seq: u64,
    pub(super) count: u32,
}

impl Header {
    /// Reads a header; `None` when there are fewer than [`HEADER`] bytes.
    pub(super) fn read(bytes: &[u8]) -> Option<Self> {
        let (len, rest) = bytes.split_first_chunk()?;
        let (crc, rest) = rest.split_first_chunk()?;
        let (seq, rest) = rest.split_first_chunk()?;
        let (count, _) = rest.split_first_chunk()?;
        Some(Self {
            len: u32::from_le_bytes(*len),
            crc: u32::from_le_bytes(*crc),
            seq: u64::from_le_bytes(*seq),
            count: u32::from_le_bytes(*count),
        })
    }

    /// Length of the whole record, in bytes.
    pub(super) fn record_len(&self) -> u64 {
        HEADER as u64 + u64::from(self.len)
    }

    /// The sequence number that follows the record's last entry.
    pub(super) fn next_seq(&self) -> u64 {
        self.seq.saturating_add(self.count.into())
    }

    pub(super) fn is_terminator(&self) -> bool {
        *self == Self { len: 0, crc: 0, seq: 0, count: 0 }
    }
}

/// Whether `record`, a header and as many bytes as it asks for, belongs to the segment and is whole.
pub(super) fn is_valid(record: &[u8], identity: u64) -> bool {
    Header::read(record).is_some_and(|header| {
        header.record_len() == record.len() as u64
            && !header.is_terminator()
            && header.crc == checksum(record, identity)
    })
}

/// Gives a record its sequence number and checksum. `record` is a header and its payload.
pub(super) fn stamp(record: &mut [u8], seq: u64, identity: u64) {
    if let Some(place) = record.get_mut(8..16) {
        place.copy_from_slice(&seq.to_le_bytes());
    }
    let crc = checksum(record, identity);
    if let Some(place) = record.get_mut(4..8) {
        place.copy_from_slice(&crc.to_le_bytes());
    }
}

/// A record that says: the entries from `seq` on, up to the next record's, are lost. It takes `len` bytes, of which
/// [`HEADER`] are the least.
pub(super) fn gap(seq: u64, len: usize, identity: u64) -> Vec<u8> {
    let mut record = vec![0; len.max(HEADER)];
    let payload = u32::try_from(record.len() - HEADER).unwrap_or(u32::MAX);
    record.splice(..4, payload.to_le_bytes());
    stamp(&mut record, seq, identity);
    record
}

fn checksum(record: &[u8], identity: u64) -> u32 {
    let [i0, i1, i2, i3, i4, i5, i6, i7] = identity.to_le_bytes();
    let [l0, l1, l2, l3] = record.first_chunk().copied().unwrap_or_default();
    let seed = crc32c::crc32c(&[i0, i1, i2, i3, i4, i5, i6, i7, l0, l1, l2, l3]);
    crc32c::crc32c_append(seed, record.get(8..).unwrap_or_default())
}

/// Writes one record's entries to the end of a buffer. The header is finished by [`Builder::finish`], and later
/// [`stamp`]ed by the writer, which alone knows the sequence number.
pub(super) struct Builder<'b> {
    out: &'b mut Vec<u8>,
    start: usize,
    count: u32,
}

impl<'b> Builder<'b> {
    pub(super) fn new(out: &'b mut Vec<u8>) -> Self {
        let start = out.len();
        out.extend(TERMINATOR);
        Self { out, start, count: 0 }
    }

    /// Adds an entry: whatever `write` appends.
    pub(super) fn entry(&mut self, write: impl FnOnce(&mut Vec<u8>)) {
        let start = self.out.len();
        self.out.extend([0; ENTRY_OVERHEAD]);
        write(self.out);
        let len = u32::try_from(self.out.len() - start - ENTRY_OVERHEAD).unwrap_or(u32::MAX);
        self.patch(start, len);
        self.count += 1;
    }

    /// Ends the record if it has entries and is not longer than `max` bytes; else takes it back and returns its length.
    pub(super) fn finish(mut self, max: u64) -> Result<(), u64> {
        let len = (self.out.len() - self.start) as u64;
        if self.count == 0 || len > max.min(u32::MAX.into()) {
            self.out.truncate(self.start);
            return Err(len);
        }
        self.patch(self.start, u32::try_from(len - HEADER as u64).unwrap_or(u32::MAX));
        self.patch(self.start + 16, self.count);
        Ok(())
    }

    fn patch(&mut self, at: usize, value: u32) {
        if let Some(place) = self.out.get_mut(at..at + 4) {
            place.copy_from_slice(&value.to_le_bytes());
        }
    }
}

/// The entries of a payload, in order.
pub(super) fn entries(mut payload: Bytes) -> impl Iterator<Item = Bytes> {
    std::iter::from_fn(move || {
        let len = u32::from_le_bytes(*payload.first_chunk()?) as usize;
        (payload.len() >= ENTRY_OVERHEAD + len).then(|| {
            payload.advance(ENTRY_OVERHEAD);
            payload.split_to(len)
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(entries: &[&[u8]], seq: u64, identity: u64) -> Vec<u8> {
        let mut out = Vec::new();
        let mut builder = Builder::new(&mut out);
        for entry in entries {
            builder.entry(|out| out.extend_from_slice(entry));
        }
        builder.finish(u64::MAX).unwrap();
        stamp(&mut out, seq, identity);
        out
    }

    #[test]
    fn entries_come_back_in_order() {
        let record = record(&[b"one", b"", b"three"], 7, 42);
        let header = Header::read(&record).unwrap();
        assert_eq!((header.seq, header.count, header.next_seq()), (7, 3, 10));
        assert_eq!(header.record_len(), record.len() as u64);
        let payload = Bytes::from(record).slice(HEADER..);
        let all: Vec<_> = entries(payload).collect();
        assert_eq!(all, [&b"one"[..], b"", b"three"]);
    }

    #[test]
    fn any_flipped_bit_is_seen() {
        let good = record(&[b"payload"], 7, 42);
        assert!(is_valid(&good, 42));
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(!is_valid(&bad, 42), "bit {bit}");
        }
    }

    #[test]
    fn a_record_of_another_segment_is_not_valid() {
        assert!(!is_valid(&record(&[b"payload"], 7, 42), 43));
    }

    #[test]
    fn zeros_are_not_a_record() {
        assert!(!is_valid(&TERMINATOR, 0));
        assert!(Header::read(&TERMINATOR).unwrap().is_terminator());
    }

    #[test]
    fn a_gap_is_a_record_without_entries() {
        for len in [0, HEADER, HEADER + 1, 500] {
            let gap = gap(9, len, 42);
            assert_eq!(gap.len(), len.max(HEADER));
            assert!(is_valid(&gap, 42));
            assert_eq!(Header::read(&gap).unwrap().count, 0);
        }
    }

    #[test]
    fn a_record_at_the_limit_is_kept_and_one_byte_more_is_taken_back() {
        for (max, kept) in [(HEADER + ENTRY_OVERHEAD + 5, true), (HEADER + ENTRY_OVERHEAD + 4, false)] {
            let mut out = b"before".to_vec();
            let mut builder = Builder::new(&mut out);
            builder.entry(|out| out.extend(b"12345"));
            assert_eq!(builder.finish(max as u64).is_ok(), kept);
            assert_eq!(out.len() > 6, kept);
        }
    }
}
