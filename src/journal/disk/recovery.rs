//! Opening a journal: a look that changes nothing, then the repairs that it calls for.
//!
//! | what is found | what it means | what is done |
//! | --- | --- | --- |
//! | records, then a terminator | a clean end | nothing |
//! | last segment: bytes that are no record, none after them | a write that a crash cut short; nothing in it was acknowledged | kept in `quarantine/`, cut off |
//! | bytes that are no record, records after them | damage; entries are lost | kept in `quarantine/`, marked as a gap |
//! | a segment ends before the next one begins | damage, or a file is missing | what is there is kept in `quarantine/`, marked as a gap |
//! | the first segment begins behind what is still needed | a file is missing | those who need it begin at the first |
//! | one of two copies of a header | damage; nothing is lost | kept in `quarantine/`, written again |
//! | a `.seg` file without a header | damage; the whole segment is lost | moved to `quarantine/`, marked as a gap |
//! | a name that is not ours | somebody else's file | left alone |
//! | a directory with a name of ours | somebody's mistake | refused; nothing is changed |
//! | a file made ready to be a segment | it holds nothing | used if it has the right length, else removed |
//! | a newer format version | a newer engage-relay wrote it | refused; nothing is changed |
//!
//! A hole in the last commit before a power cut looks like damage and is reported so, although nothing in that commit
//! was acknowledged: better one false alarm than a silent loss.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use super::record::{self, TERMINATOR};
use super::scan::{Item, Scanner};
use super::segment::{self, Found, HEADER_BLOCK, Header, SPARE};
use super::space::Spare;
use super::{OpenError, Position};

/// What a disk reads or does not read as a whole, in bytes.
const BLOCK: usize = 4096;

/// What a look at a journal directory gives: what is there, and what is wrong with it.
#[derive(Debug)]
pub struct Inspection {
    dir: PathBuf,
    pub(super) segments: Vec<Segment>,
    findings: Vec<Finding>,
    spares: Vec<PathBuf>,
    events: u64,
    /// Sequence numbers below it were given out.
    floor: u64,
}

/// What is known of the entries by those who read them.
#[derive(Clone, Copy, Debug, Default)]
pub struct Known {
    /// The lowest that is still needed; none where nobody has begun to read.
    pub needed: Option<Position>,
    /// Above all that anyone has seen: none below it is given out again, even if files were lost.
    pub floor: Position,
}

/// A segment file on disk.
#[derive(Debug)]
pub(super) struct Segment {
    pub(super) path: PathBuf,
    pub(super) header: Header,
    /// Where its records end, in bytes; the file's length where that was not looked for.
    pub(super) end: u64,
    pub(super) size: u64,
    /// The sequence number after its last.
    pub(super) next_seq: u64,
    /// Whether a repair has noted that entries are missing behind it.
    ends_in_gap: bool,
    pub(super) modified: SystemTime,
}

/// Something that is not as a clean stop leaves it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What it is.
    pub kind: Kind,
    /// The file it was found in.
    pub file: PathBuf,
    /// Where in the file, in bytes.
    pub offset: u64,
    /// How many bytes.
    pub bytes: u64,
    /// The entries that are lost: from the first position up to, not including, the second.
    pub lost: Option<(Position, Position)>,
    /// After a repair: where in the quarantine those bytes are, if anything was there.
    pub kept: Option<PathBuf>,
}

/// The kinds of findings, as metrics and `fsck` name them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// A write that was cut short at the journal's end. Nothing in it was acknowledged.
    TornTail,
    /// Bytes within a segment that are no record.
    Damaged,
    /// A segment ends before the next begins, or the first begins behind what is needed.
    Missing,
    /// One of two copies of a segment's header.
    Header,
    /// A segment without a header.
    Segment,
    /// A file whose name is none of ours.
    Foreign,
}

impl Kind {
    /// All that there are.
    pub const ALL: [Self; 6] =
        [Self::TornTail, Self::Damaged, Self::Missing, Self::Header, Self::Segment, Self::Foreign];

    /// The kind's name in metrics and reports.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::TornTail => "torn_tail",
            Self::Damaged => "damaged",
            Self::Missing => "missing",
            Self::Header => "header",
            Self::Segment => "segment",
            Self::Foreign => "foreign",
        }
    }
}

impl Inspection {
    /// Looks at the journal in `dir`, which `known` says more of. Segments that hold nothing from `from` on are not read
    /// through.
    ///
    /// # Errors
    ///
    /// [`OpenError`] when a file can't be read or has a newer format.
    pub fn new(dir: &Path, from: Position, known: Known) -> Result<Self, OpenError> {
        let mut found = Self {
            dir: dir.to_owned(),
            segments: Vec::new(),
            findings: Vec::new(),
            spares: Vec::new(),
            events: 0,
            floor: known.floor.0,
        };
        let names = found.names()?;
        let firsts: Vec<u64> = names.iter().map(|(first, _)| *first).collect();
        // A name says that there was something before it.
        found.floor = firsts.last().copied().unwrap_or(0).max(found.floor);
        let oldest = firsts.first().copied().unwrap_or(found.floor);
        if let Some(needed) = known.needed.filter(|needed| needed.0 < oldest) {
            found.note(Kind::Missing, dir.to_owned(), 0..0, Some((needed.0, oldest)));
        }
        for (index, (first, path)) in names.into_iter().enumerate() {
            let next_first = firsts.get(index + 1).copied();
            found.look_at(path, first, next_first, from.0)?;
        }
        found.gap_before(found.floor);
        Ok(found)
    }

    /// What is wrong, in the journal's order.
    pub fn findings(&self) -> &[Finding] {
        &self.findings
    }

    /// How many entries are there, of those that were read through.
    pub fn events(&self) -> u64 {
        self.events
    }

    /// The position of the oldest entry.
    pub fn oldest(&self) -> Position {
        Position(self.segments.first().map_or(self.floor, |segment| segment.header.first))
    }

    /// The position after the last entry.
    pub fn end(&self) -> Position {
        Position(self.segments.last().map_or(self.floor, |segment| segment.next_seq))
    }

    /// The segment files in order; notes foreign files and spares.
    fn names(&mut self) -> Result<Vec<(u64, PathBuf)>, OpenError> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let path = entry?.path();
            let (first, is_spare) =
                (segment::first_in_name(&path), path.extension().is_some_and(|ending| ending == SPARE));
            if (first.is_some() || is_spare) && path.is_dir() {
                return Err(OpenError::Directory { path });
            }
            match first {
                Some(first) => names.push((first, path)),
                None if is_spare => self.spares.push(path),
                None => self.note(Kind::Foreign, path, 0..0, None),
            }
        }
        names.sort();
        Ok(names)
    }

    fn note(&mut self, kind: Kind, file: PathBuf, bytes: std::ops::Range<u64>, lost: Option<(u64, u64)>) {
        let lost = lost.map(|(from, to)| (Position(from), Position(to)));
        self.findings.push(Finding {
            kind,
            file,
            offset: bytes.start,
            // A file may have been cut within its header: then its records would begin behind its end.
            bytes: bytes.end.saturating_sub(bytes.start),
            lost,
            kept: None,
        });
    }

    fn look_at(&mut self, path: PathBuf, first: u64, next_first: Option<u64>, from: u64) -> Result<(), OpenError> {
        let file = Arc::new(File::open(&path)?);
        let metadata = file.metadata()?;
        let size = metadata.len();
        let header = match Header::read(&file).map_err(|source| unreadable(&path, source))? {
            Found::Newer(version) => return Err(OpenError::NewerVersion { file: path, version }),
            Found::Whole(header) if header.first == first => header,
            Found::Half(header) if header.first == first => {
                self.note(Kind::Header, path.clone(), 0..HEADER_BLOCK.min(size), None);
                header
            }
            Found::Foreign | Found::Whole(_) | Found::Half(_) => {
                // Behind another segment, what is lost is a gap in that one.
                let lost = (first, next_first.unwrap_or(self.floor));
                let lost = Some(lost).filter(|(from, to)| self.segments.is_empty() && from < to);
                self.note(Kind::Segment, path, 0..size, lost);
                return Ok(());
            }
        };
        self.gap_before(first);
        let modified = metadata.modified()?;
        let mut segment = Segment { path, header, end: size, size, next_seq: first, ends_in_gap: false, modified };
        match next_first {
            Some(next) if next <= from => segment.next_seq = next,
            _ => self
                .walk(&file, &mut segment, next_first.is_none())
                .map_err(|source| unreadable(&segment.path, source))?,
        }
        self.segments.push(segment);
        Ok(())
    }

    /// Reads through a segment's records.
    fn walk(&mut self, file: &Arc<File>, segment: &mut Segment, is_last: bool) -> io::Result<()> {
        let mut scanner = Scanner::new(Arc::clone(file), segment.header.identity, segment.header.first);
        loop {
            match scanner.next(segment.size)? {
                Item::Record { header, .. } => {
                    segment.ends_in_gap = false;
                    self.events += u64::from(header.count);
                }
                Item::Gap { .. } => segment.ends_in_gap = true,
                Item::Damaged { bytes } => {
                    let before = scanner.next_seq();
                    // The record at the end of the damaged bytes says how many entries they held.
                    if let Item::Record { header, .. } | Item::Gap { header } = scanner.next(segment.size)? {
                        segment.ends_in_gap = header.count == 0;
                        self.events += u64::from(header.count);
                        self.note(Kind::Damaged, segment.path.clone(), bytes, Some((before, header.seq)));
                    }
                }
                Item::End { torn } => {
                    segment.end = scanner.offset();
                    segment.next_seq = scanner.next_seq();
                    if let (Some(torn), true) = (torn, is_last) {
                        self.note(Kind::TornTail, segment.path.clone(), segment.end..torn, None);
                    }
                    return Ok(());
                }
            }
        }
    }

    /// Notes what is missing between the last segment and the sequence number `first`.
    fn gap_before(&mut self, first: u64) {
        let Some(last) = self.segments.last_mut().filter(|last| last.next_seq < first) else { return };
        let (path, bytes, lost) = (last.path.clone(), last.end..last.size, (last.next_seq, first));
        last.next_seq = first;
        if !last.ends_in_gap {
            self.note(Kind::Missing, path, bytes, Some(lost));
        }
    }

    /// Whether anything has to be repaired before the journal can be written on.
    pub fn needs_repair(&self) -> bool {
        self.findings.iter().any(|finding| finding.kind != Kind::Foreign)
    }

    /// Whether the last segment can be written on.
    pub(super) fn is_continuable(&self) -> bool {
        self.segments.last().is_some_and(|last| !last.ends_in_gap)
    }

    /// Carries out the repairs, and syncs them. Damaged bytes are copied to `quarantine` first; findings then say where.
    ///
    /// # Errors
    ///
    /// Any error of the file system; repairs can be begun again.
    pub fn repair(&mut self, quarantine: &Path) -> io::Result<()> {
        let mend = |finding: &Finding| match finding.kind {
            Kind::TornTail => self.cut(finding, quarantine),
            Kind::Damaged => self.mark_gap(finding, finding.bytes, quarantine),
            // There is no file to mark it in. Who needs it is told.
            Kind::Missing if finding.file == self.dir => Ok(None),
            Kind::Missing => self.mark_gap(finding, 0, quarantine),
            Kind::Header => self.write_header(finding, quarantine),
            Kind::Segment => {
                fs::create_dir_all(quarantine)?;
                let aside = vacant(quarantine, &finding.file.file_name().unwrap_or_default().to_string_lossy());
                fs::rename(&finding.file, &aside)?;
                segment::sync_dir(quarantine)?;
                Ok(Some(aside))
            }
            Kind::Foreign => Ok(None),
        };
        let kept = self.findings.iter().map(mend).collect::<io::Result<Vec<_>>>()?;
        self.findings.iter_mut().zip(kept).for_each(|(finding, kept)| finding.kept = kept);
        segment::sync_dir(&self.dir)
    }

    /// A file of `size` bytes that is ready to be the next segment, if there is one; other spares are removed. What is in
    /// it does not matter: a file has its full length only after all of it was written.
    pub(super) fn take_spare(&mut self, size: u64) -> io::Result<Option<Spare>> {
        let mut ready = None;
        for path in self.spares.drain(..) {
            let file = segment::open(&path)?;
            if ready.is_none() && file.metadata()?.len() == size {
                ready = Some(Spare { file, path, size });
            } else {
                fs::remove_file(&path)?;
            }
        }
        Ok(ready)
    }

    fn write_header(&self, finding: &Finding, quarantine: &Path) -> io::Result<Option<PathBuf>> {
        let segment = self.segments.iter().find(|segment| segment.path == finding.file);
        let Some(segment) = segment else { return Ok(None) };
        let kept = keep(finding, finding.bytes, quarantine)?;
        let file = segment::open(&segment.path)?;
        segment.header.write(&file)?;
        file.sync_all()?;
        Ok(kept)
    }

    fn cut(&self, finding: &Finding, quarantine: &Path) -> io::Result<Option<PathBuf>> {
        let kept = keep(finding, finding.bytes, quarantine)?;
        let file = segment::open(&finding.file)?;
        let room = file.metadata()?.len() - finding.offset;
        let len = finding.bytes.max(TERMINATOR.len() as u64).min(room);
        file.write_all_at(&vec![0; usize::try_from(len).map_err(io::Error::other)?], finding.offset)?;
        file.sync_all()?;
        Ok(kept)
    }

    /// Writes a gap of `len` bytes over the finding's first. Where a file was cut too short for it, it grows.
    fn mark_gap(&self, finding: &Finding, len: u64, quarantine: &Path) -> io::Result<Option<PathBuf>> {
        let file = segment::open(&finding.file)?;
        let unreadable = if len == 0 { written_len(&file, finding)? } else { len };
        let kept = keep(finding, unreadable, quarantine)?;
        let (Some(segment), Some((from, _))) =
            (self.segments.iter().find(|segment| segment.path == finding.file), finding.lost)
        else {
            return Ok(kept);
        };
        let len = usize::try_from(len).map_err(io::Error::other)?;
        if (1..record::HEADER).contains(&len) {
            // No record is that short, so this can't come from damage to one; there is no room for a mark.
            return Ok(kept);
        }
        let mut gap = record::gap(from.0, len, segment.header.identity);
        if len == 0 {
            gap.extend(TERMINATOR);
        }
        file.write_all_at(&gap, finding.offset)?;
        file.sync_all()?;
        Ok(kept)
    }
}

fn unreadable(file: &Path, source: io::Error) -> OpenError {
    OpenError::Unreadable { file: file.to_owned(), source }
}

/// How many of the finding's bytes are more than untouched zeros.
fn written_len(file: &File, finding: &Finding) -> io::Result<u64> {
    let mut bytes = vec![0; usize::try_from(finding.bytes).map_err(io::Error::other)?];
    file.read_exact_at(&mut bytes, finding.offset)?;
    Ok(bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last as u64 + 1))
}

/// Copies the first `len` bytes of a finding to the quarantine, durably; to which file, if there are any.
fn keep(finding: &Finding, len: u64, quarantine: &Path) -> io::Result<Option<PathBuf>> {
    if len == 0 {
        return Ok(None);
    }
    fs::create_dir_all(quarantine)?;
    let mut bytes = vec![0; usize::try_from(len).map_err(io::Error::other)?];
    File::open(&finding.file)?.read_exact_at(&mut bytes, finding.offset)?;
    let stem = finding.file.file_stem().unwrap_or_default().to_string_lossy();
    let path = vacant(quarantine, &format!("{stem}-{}-{}.bin", finding.offset, finding.kind.as_str()));
    let mut copy = File::create_new(&path)?;
    copy.write_all(&bytes)?;
    copy.sync_all()?;
    segment::sync_dir(quarantine)?;
    Ok(Some(path))
}

/// A name in the quarantine that no file has: the same place may be damaged again, and what was kept before stays.
fn vacant(quarantine: &Path, name: &str) -> PathBuf {
    let (mut path, mut number) = (quarantine.join(name), 0);
    while path.exists() {
        number += 1;
        path = quarantine.join(format!("{name}.{number}"));
    }
    path
}

/// Writes zeros over the blocks of segments that the disk can't read, which are damage then like any other; how many
/// bytes, by file.
///
/// # Errors
///
/// They can't be written either.
pub fn blank_unreadable(dir: &Path) -> io::Result<Vec<(PathBuf, u64)>> {
    let mut blanked = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if segment::first_in_name(&path).is_none() {
            continue;
        }
        let (file, mut blank) = (segment::open(&path)?, 0);
        let size = file.metadata()?.len();
        for offset in (0..size).step_by(BLOCK) {
            let mut block = vec![0; usize::try_from(size - offset).map_or(BLOCK, |left| left.min(BLOCK))];
            if file.read_exact_at(&mut block, offset).is_err() {
                block.fill(0);
                file.write_all_at(&block, offset)?;
                blank += block.len() as u64;
            }
        }
        if blank > 0 {
            file.sync_all()?;
            blanked.push((path, blank));
        }
    }
    Ok(blanked)
}
