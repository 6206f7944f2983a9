//! The segment file: a header block, then records.
//!
//! `<first sequence number, 20 digits>.seg`. The header block is [`HEADER_BLOCK`] bytes and holds two copies of the same
//! header, so that damage to one loses nothing:
//!
//! ```text
//! offset  size  field
//!      0     8  magic "ENGRELAY"
//!      8     4  format version
//!     12     8  identity: random, seeds the checksums of this segment's records
//!     20     8  first sequence number
//!     28     4  CRC-32C of the 28 bytes before
//! ```
//!
//! A segment has its full length from the beginning and is written over, not appended to: `fdatasync` then has no
//! metadata to commit. What stands after the last record, and after the zeros that end its block, is therefore zeros or, in a
//! recycled file, old records, which the identity keeps from being taken for new ones.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::record::TERMINATOR;

/// Ending of the name of a file that is made ready to become a segment.
pub(super) const SPARE: &str = "spare";
/// Offset of the first record, in bytes.
pub(super) const HEADER_BLOCK: u64 = 4096;
/// Offsets of the two copies of the header.
const COPIES: [u64; 2] = [0, HEADER_BLOCK / 2];
const HEADER_LEN: usize = 32;
const MAGIC: [u8; 8] = *b"ENGRELAY";
/// The format that this version writes, and the newest that it reads.
const VERSION: u32 = 1;
/// How much is zeroed between two syncs while a new file is made ready, so that commits are not held up for long.
const ZERO_CHUNK: usize = 2 << 20;

/// What a segment's header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) identity: u64,
    pub(super) first: u64,
}

/// What was found where a header should be.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// Both copies are good.
    Whole(Header),
    /// One copy is good.
    Half(Header),
    /// A version that this program does not know.
    Newer(u32),
    /// Neither copy is a header.
    Foreign,
}

impl Header {
    /// A header with an identity of its own.
    pub(super) fn new(first: u64) -> io::Result<Self> {
        let mut identity = [0; 8];
        getrandom::fill(&mut identity).map_err(io::Error::other)?;
        Ok(Self { identity: u64::from_le_bytes(identity), first })
    }

    fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = Vec::with_capacity(HEADER_LEN);
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(self.identity.to_le_bytes());
        bytes.extend(self.first.to_le_bytes());
        bytes.extend(crc32c::crc32c(&bytes).to_le_bytes());
        bytes.first_chunk().copied().unwrap_or_default()
    }

    /// Writes both copies. Does not sync.
    pub(super) fn write(&self, file: &File) -> io::Result<()> {
        COPIES.iter().try_for_each(|at| file.write_all_at(&self.encode(), *at))
    }

    /// Reads the header block of a file of any length.
    pub(super) fn read(file: &File) -> io::Result<Found> {
        let mut copies = [const { None }; COPIES.len()];
        for (copy, at) in copies.iter_mut().zip(COPIES) {
            let mut bytes = [0; HEADER_LEN];
            *copy = match file.read_exact_at(&mut bytes, at) {
                Ok(()) => Self::decode(&bytes),
                Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => None,
                Err(e) => return Err(e),
            };
        }
        Ok(match copies {
            [Some(Err(version)), _] | [_, Some(Err(version))] => Found::Newer(version),
            [Some(Ok(one)), Some(Ok(other))] if one == other => Found::Whole(one),
            [Some(Ok(one)), _] | [None, Some(Ok(one))] => Found::Half(one),
            [None, None] => Found::Foreign,
        })
    }

    /// `Err` with the version where it is another than ours.
    fn decode(bytes: &[u8; HEADER_LEN]) -> Option<Result<Self, u32>> {
        let (content, crc) = bytes.split_last_chunk()?;
        if crc32c::crc32c(content) != u32::from_le_bytes(*crc) {
            return None;
        }
        let (magic, rest) = content.split_first_chunk()?;
        let (version, rest) = rest.split_first_chunk()?;
        let (identity, rest) = rest.split_first_chunk()?;
        let (first, _) = rest.split_first_chunk()?;
        if *magic != MAGIC {
            return None;
        }
        let version = u32::from_le_bytes(*version);
        let header = Self { identity: u64::from_le_bytes(*identity), first: u64::from_le_bytes(*first) };
        Some(if version == VERSION { Ok(header) } else { Err(version) })
    }
}

/// The file name of the segment that begins with sequence number `first`.
pub(super) fn path(dir: &Path, first: u64) -> PathBuf {
    dir.join(format!("{first:020}.seg"))
}

/// The first sequence number that a segment's file name gives; `None` for any other name.
pub(super) fn first_in_name(path: &Path) -> Option<u64> {
    let stem = path.file_name()?.to_str()?.strip_suffix(".seg")?;
    (stem.len() == 20 && stem.bytes().all(|b| b.is_ascii_digit())).then(|| stem.parse().ok())?
}

/// Opens a segment for reading and writing over.
pub(super) fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(path)
}

/// Makes a new file of `size` zero bytes, on disk. On failure nothing is left behind.
pub(super) fn create_zeroed(path: &Path, size: u64) -> io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).mode(0o600).open(path)?;
    zero(&file, size).inspect_err(|_| {
        // The error that made this necessary is the one to report.
        drop(std::fs::remove_file(path));
    })?;
    Ok(file)
}

fn zero(file: &File, size: u64) -> io::Result<()> {
    let zeros = vec![0; ZERO_CHUNK];
    let mut at = 0;
    while at < size {
        let len = (size - at).min(ZERO_CHUNK as u64);
        file.write_all_at(zeros.get(..usize::try_from(len).unwrap_or(0)).unwrap_or_default(), at)?;
        file.sync_data()?;
        at += len;
    }
    file.sync_all()
}

/// Turns a prepared file into the segment that begins with `header.first`: the header, the mark that no record
/// follows, and the name, each on disk before the next.
pub(super) fn begin(file: &File, header: Header, from: &Path, to: &Path, folder: &File) -> io::Result<()> {
    header.write(file)?;
    file.write_all_at(&TERMINATOR, HEADER_BLOCK)?;
    file.sync_data()?;
    std::fs::rename(from, to)?;
    folder.sync_all()
}

/// Makes creations, renames and removals in a directory durable.
pub(super) fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "offsets in a test are small")]
mod tests {
    use super::*;

    #[test]
    fn names() {
        let check = |name: &str, expected| assert_eq!(first_in_name(Path::new(name)), expected, "{name}");
        check("00000000000000000042.seg", Some(42));
        check("18446744073709551615.seg", Some(u64::MAX));
        check("99999999999999999999.seg", None);
        check("42.seg", None);
        check("+0000000000000000042.seg", None);
        check("00000000000000000042.tmp", None);
        assert_eq!(path(Path::new("d"), 42), Path::new("d/00000000000000000042.seg"));
    }

    #[test]
    fn a_header_survives_damage_to_either_copy() {
        let file = tempfile::tempfile().unwrap();
        let header = Header::new(7).unwrap();
        let mut block = vec![0; 4096];
        let check = |block: &[u8], expected: Found| {
            file.set_len(0).unwrap();
            file.write_all_at(block, 0).unwrap();
            assert_eq!(Header::read(&file).unwrap(), expected);
        };
        check(&block, Found::Foreign);
        check(&[], Found::Foreign);
        for at in COPIES {
            block.splice(at as usize..at as usize + HEADER_LEN, header.encode());
        }
        check(&block, Found::Whole(header));
        check(&block[..HEADER_LEN], Found::Half(header));
        check(&block[..HEADER_LEN - 1], Found::Foreign);
        for byte in 0..HEADER_LEN {
            for copy in [0, 2048] {
                let mut damaged = block.clone();
                damaged[copy + byte] ^= 0x10;
                check(&damaged, Found::Half(header));
                damaged[2048 - copy + byte] ^= 0x10;
                check(&damaged, Found::Foreign);
            }
        }
    }

    #[test]
    fn a_newer_version_is_told_from_damage() {
        let mut bytes = Header::new(7).unwrap().encode();
        bytes[8] = 2;
        let crc = crc32c::crc32c(&bytes[..28]).to_le_bytes();
        bytes[28..].copy_from_slice(&crc);
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&bytes, 0).unwrap();
        assert_eq!(Header::read(&file).unwrap(), Found::Newer(2));
    }
}
