//! The journal against a model, against damage at every byte, and at each of its limits.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bytesize::ByteSize;
use proptest::prelude::*;

use super::recovery::{Finding, Inspection, Kind, Known};
use super::segment::HEADER_BLOCK;
use super::*;

const SEGMENT: u64 = 64 << 10;

fn config() -> Config {
    Config {
        segment: ByteSize::b(SEGMENT),
        max_disk: ByteSize::mib(64),
        min_free_disk: ByteSize::b(0),
        ..Config::default()
    }
}

/// A journal in a directory of its own.
struct Fixture {
    dir: tempfile::TempDir,
    config: Config,
}

impl Fixture {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap(), config: config() }
    }

    fn journal_dir(&self) -> PathBuf {
        self.dir.path().join("journal")
    }

    fn quarantine(&self) -> PathBuf {
        self.dir.path().join("quarantine")
    }

    fn open(&self) -> (Journal, Vec<Finding>) {
        self.open_knowing(Known::default())
    }

    fn open_knowing(&self, known: Known) -> (Journal, Vec<Finding>) {
        let opened = Journal::open(&self.journal_dir(), &self.quarantine(), &self.config, known, Metrics::unseen());
        let (mut journal, findings) = opened.unwrap();
        journal.start().unwrap();
        (journal, findings)
    }

    fn segments(&self) -> Vec<PathBuf> {
        let mut files: Vec<_> = fs::read_dir(self.journal_dir()).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.retain(|path| segment::first_in_name(path).is_some());
        files.sort();
        files
    }

    /// Opens, appends each group, closes.
    fn write(&self, groups: &[Vec<Vec<u8>>]) {
        let (journal, _) = self.open();
        let appender = journal.view().appender();
        for group in groups {
            append(&appender, group).unwrap();
        }
        journal.close();
    }

    /// Opens, reads everything, closes.
    fn read(&self) -> (BTreeMap<Position, Vec<u8>>, Vec<Finding>) {
        let (journal, findings) = self.open();
        let read = read_all(&mut journal.view().reader(Start::Earliest));
        journal.close();
        (read, findings)
    }
}

fn append(appender: &Appender, group: &[Vec<u8>]) -> Result<(), AppendError> {
    let append = appender.append(|entries| group.iter().for_each(|entry| entries.entry(|out| out.extend(entry))))?;
    appender.submit();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        tokio::select! {
            result = append => result,
            () = appender.clone().courier() => unreachable!("a courier does not end"),
        }
    })
}

fn read_all(reader: &mut Reader) -> BTreeMap<Position, Vec<u8>> {
    let mut all = BTreeMap::new();
    while reader.position() < reader.end() {
        let read = reader.read(u64::MAX, |position, entry| {
            assert!(all.insert(position, entry.to_vec()).is_none(), "read twice: {position:?}");
            true
        });
        read.unwrap();
    }
    all
}

fn entries(numbers: std::ops::Range<usize>) -> Vec<Vec<Vec<u8>>> {
    numbers.map(|number| vec![format!("entry {number}").into_bytes()]).collect()
}

fn kinds(findings: &[Finding]) -> Vec<Kind> {
    findings.iter().map(|finding| finding.kind).collect()
}

#[test]
fn what_was_appended_is_read_in_order_after_reopening() {
    let fixture = Fixture::new();
    fixture.write(&entries(0..10));
    fixture.write(&entries(10..20));
    let (read, findings) = fixture.read();
    assert_eq!(findings, []);
    let expected: Vec<_> = entries(0..20).concat();
    assert_eq!(read.values().cloned().collect::<Vec<_>>(), expected);
    assert_eq!(read.keys().map(|position| position.0).collect::<Vec<_>>(), (0..20).collect::<Vec<_>>());
}

#[test]
fn segments_roll_and_every_start_is_found() {
    let fixture = Fixture::new();
    let groups: Vec<_> = (0..40_usize).map(|n| vec![vec![n as u8; 10_000]]).collect();
    fixture.write(&groups);
    assert!(fixture.segments().len() >= 6, "{:?}", fixture.segments());
    let (journal, _) = fixture.open();
    for start in 0..40 {
        let read = read_all(&mut journal.view().reader(Start::At(Position(start))));
        assert_eq!(read.len() as u64, 40 - start);
        assert!(read.iter().all(|(position, entry)| entry[0] as u64 == position.0));
    }
    assert_eq!(journal.view().reader(Start::End).position(), Position(40));
    journal.close();
}

#[test]
fn a_record_that_fills_a_segment_is_kept_and_one_byte_more_is_refused() {
    let fixture = Fixture::new();
    let (journal, _) = fixture.open();
    let appender = journal.view().appender();
    let most = (SEGMENT - HEADER_BLOCK) as usize - record::HEADER - record::ENTRY_OVERHEAD;
    append(&appender, &[b"small".to_vec()]).unwrap();
    append(&appender, &[vec![1; most]]).unwrap();
    let refused = append(&appender, &[vec![1; most + 1]]);
    assert_eq!(refused, Err(AppendError::TooLarge { bytes: SEGMENT - HEADER_BLOCK + 1, max: SEGMENT - HEADER_BLOCK }));
    append(&appender, &[b"after".to_vec()]).unwrap();
    let read = read_all(&mut journal.view().reader(Start::Earliest));
    assert_eq!(read.values().map(Vec::len).collect::<Vec<_>>(), [5, most, 5]);
    journal.close();
    assert_eq!(fixture.read().0, read);
}

#[test]
fn positions_are_not_given_twice_even_if_files_are_lost() {
    let fixture = Fixture::new();
    fixture.write(&entries(0..10));
    fixture.segments().iter().for_each(|path| fs::remove_file(path).unwrap());
    let (journal, _) = fixture.open_knowing(Known { needed: None, floor: Position(10) });
    append(&journal.view().appender(), &[b"next".to_vec()]).unwrap();
    assert_eq!(journal.view().end(), Position(11));
    journal.close();
    let (read, findings) = fixture.read();
    assert_eq!((read.keys().copied().collect::<Vec<_>>(), findings), (vec![Position(10)], vec![]));
}

#[test]
fn a_floor_above_the_end_is_a_gap_that_is_reported_once() {
    let fixture = Fixture::new();
    fixture.write(&entries(0..3));
    let (journal, findings) = fixture.open_knowing(Known { needed: None, floor: Position(8) });
    assert_eq!(kinds(&findings), [Kind::Missing]);
    assert_eq!(findings[0].lost, Some((Position(3), Position(8))));
    assert_eq!(read_all(&mut journal.view().reader(Start::Earliest)).len(), 3, "readers get to the end");
    append(&journal.view().appender(), &[b"next".to_vec()]).unwrap();
    journal.close();
    let (read, findings) = fixture.read();
    assert_eq!(read.keys().map(|position| position.0).collect::<Vec<_>>(), [0, 1, 2, 8]);
    assert_eq!(findings, []);
}

/// Copies a journal, applies `damage` to one of its files, and returns what opening makes of it, twice.
fn damaged(original: &Fixture, damage: impl FnOnce(&Fixture)) -> (BTreeMap<Position, Vec<u8>>, Vec<Finding>) {
    let copy = Fixture::new();
    fs::create_dir_all(copy.journal_dir()).unwrap();
    for path in original.segments() {
        fs::copy(&path, copy.journal_dir().join(path.file_name().unwrap())).unwrap();
    }
    damage(&copy);
    let (read, findings) = copy.read();
    let (again, found_again) = copy.read();
    assert_eq!(read, again, "a repaired journal reads the same");
    assert_eq!(found_again, [], "repairs are complete");
    // It can be written on, and what is written stays.
    copy.write(&[vec![b"new".to_vec()]]);
    let (after, _) = copy.read();
    assert_eq!(after.len(), read.len() + 1);
    assert_eq!(after.last_key_value().unwrap().1, b"new");
    (read, findings)
}

/// The bytes of the only segment's header copies and records, with the end of each record.
fn layout(fixture: &Fixture) -> (Vec<u64>, u64) {
    let path = &fixture.segments()[0];
    let bytes = fs::read(path).unwrap();
    let mut ends = Vec::new();
    let mut at = HEADER_BLOCK;
    loop {
        let header = record::Header::read(&bytes[at as usize..]).unwrap();
        if header.is_terminator() {
            return (ends, at);
        }
        at += header.record_len();
        ends.push(at);
    }
}

#[test]
fn a_flip_of_any_byte_loses_at_most_its_own_record() {
    let original = Fixture::new();
    original.write(&[
        vec![b"a".to_vec()],
        vec![b"b1".to_vec(), b"b2".to_vec()],
        vec![b"c".to_vec()],
        vec![b"d".to_vec()],
    ]);
    let (ends, end) = layout(&original);
    let (all, _) = original.read();
    let positions_of = [0..1, 1..3, 3..4, 4..5];
    let in_headers = [0..32, 2048..2080].into_iter().flatten();
    for at in in_headers.chain(HEADER_BLOCK..end + 20) {
        let (read, findings) = damaged(&original, |copy| {
            let file = OpenOptions::new().read(true).write(true).open(&copy.segments()[0]).unwrap();
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 0x41], at).unwrap();
        });
        let hit = if at < HEADER_BLOCK { None } else { ends.iter().position(|end| at < *end) };
        let mut expected = all.clone();
        if let Some(hit) = hit {
            positions_of[hit].clone().for_each(|position| drop(expected.remove(&Position(position))));
        }
        assert_eq!(read, expected, "byte {at}");
        let kind = match hit {
            None if at < HEADER_BLOCK => Kind::Header,
            Some(record) if record < ends.len() - 1 => Kind::Damaged,
            Some(_) | None => Kind::TornTail,
        };
        assert_eq!(kinds(&findings), [kind], "byte {at}");
    }
}

#[test]
fn a_cut_at_any_byte_keeps_all_records_before_it() {
    let original = Fixture::new();
    original.write(&[vec![b"a".to_vec()], vec![b"b1".to_vec(), b"b2".to_vec()], vec![b"c".to_vec()]]);
    let (ends, end) = layout(&original);
    let (all, _) = original.read();
    let counts = [1, 3, 4];
    for at in (HEADER_BLOCK - 3000..HEADER_BLOCK).step_by(500).chain(HEADER_BLOCK..end + 21) {
        let (read, findings) = damaged(&original, |copy| {
            OpenOptions::new().write(true).open(&copy.segments()[0]).unwrap().set_len(at).unwrap();
        });
        let whole = ends.iter().filter(|end| **end <= at).count();
        let kept = if whole == 0 { 0 } else { counts[whole - 1] };
        assert_eq!(read, all.clone().into_iter().take(kept).collect(), "cut at {at}");
        let torn = at > HEADER_BLOCK && at < end && !ends.contains(&at);
        let expected: &[Kind] = match at {
            ..2080 => &[Kind::Header],
            _ if torn => &[Kind::TornTail],
            _ => &[],
        };
        assert_eq!(kinds(&findings), expected, "cut at {at}");
    }
}

/// Nothing of it is left, but its name and its header.
#[test]
fn a_segment_that_was_cut_within_its_header_is_a_gap() {
    let original = Fixture::new();
    original.write(&(0..10_u8).map(|n| vec![vec![n; 10_000]]).collect::<Vec<_>>());
    let (all, _) = original.read();
    for len in [0, 31, 32, 2048, 4095] {
        let (read, findings) = damaged(&original, |copy| {
            OpenOptions::new().write(true).open(&copy.segments()[0]).unwrap().set_len(len).unwrap();
        });
        assert_eq!(read, all.clone().into_iter().skip(6).collect(), "cut at {len}");
        let lost: Vec<_> = findings.iter().filter_map(|finding| finding.lost).collect();
        assert_eq!(lost, [(Position(0), Position(6))], "cut at {len}: {findings:?}");
    }
}

#[test]
fn torn_and_damaged_bytes_are_kept_in_quarantine() {
    let fixture = Fixture::new();
    fixture.write(&entries(0..3));
    let (ends, _) = layout(&fixture);
    let path = fixture.segments().remove(0);
    OpenOptions::new().write(true).open(&path).unwrap().write_all_at(b"XXXX", ends[0] + 20).unwrap();
    let before = fs::read(&path).unwrap();
    let (_, findings) = fixture.read();
    let kept = fs::read(fixture.quarantine().join(format!("00000000000000000000-{}-damaged.bin", ends[0]))).unwrap();
    assert_eq!(kept, before[ends[0] as usize..ends[1] as usize]);
    assert_eq!(findings[0].lost, Some((Position(1), Position(2))));
    assert_eq!(fs::read(findings[0].kept.as_ref().unwrap()).unwrap(), kept);

    // The same place again: what was kept stays.
    OpenOptions::new().write(true).open(&path).unwrap().write_all_at(b"YYYY", ends[0] + 4).unwrap();
    let (_, findings) = fixture.read();
    let again = findings[0].kept.as_ref().unwrap();
    assert_eq!(again.file_name().unwrap().to_str().unwrap(), format!("00000000000000000000-{}-damaged.bin.1", ends[0]));
    assert_eq!(
        fs::read(fixture.quarantine().join(format!("00000000000000000000-{}-damaged.bin", ends[0]))).unwrap(),
        kept
    );

    // A header too, though nothing is lost with it.
    OpenOptions::new().write(true).open(&path).unwrap().write_all_at(b"XXXX", 8).unwrap();
    let before = fs::read(&path).unwrap();
    let (_, findings) = fixture.read();
    let kept = fs::read(fixture.quarantine().join("00000000000000000000-0-header.bin")).unwrap();
    assert_eq!((kinds(&findings), &*kept), (vec![Kind::Header], &before[..HEADER_BLOCK as usize]));
}

#[test]
fn a_missing_segment_and_a_destroyed_one_are_gaps() {
    let original = Fixture::new();
    let groups: Vec<_> = (0..20_usize).map(|n| vec![vec![n as u8; 10_000]]).collect();
    original.write(&groups);
    let segments = original.segments();
    assert_eq!(segments.len(), 4);
    let firsts: Vec<_> = segments.iter().map(|path| segment::first_in_name(path).unwrap()).collect();
    let without = |from: u64, to: u64| (0..20).filter(|n| !(from..to).contains(n)).map(Position).collect::<Vec<_>>();
    let (read, findings) = damaged(&original, |copy| fs::remove_file(&copy.segments()[1]).unwrap());
    assert_eq!((kinds(&findings), &findings[0].kept), (vec![Kind::Missing], &None));
    assert_eq!(read.into_keys().collect::<Vec<_>>(), without(firsts[1], firsts[2]));
    let (read, findings) = damaged(&original, |copy| fs::write(&copy.segments()[1], b"not a segment").unwrap());
    assert_eq!(kinds(&findings), [Kind::Segment, Kind::Missing]);
    assert_eq!(read.into_keys().collect::<Vec<_>>(), without(firsts[1], firsts[2]));
    let (read, findings) = damaged(&original, |copy| fs::remove_file(&copy.segments()[0]).unwrap());
    assert_eq!((findings, read.into_keys().collect::<Vec<_>>()), (vec![], without(0, firsts[1])));
}

/// Files that were given up are gone, too: only what somebody needs is missing.
#[test]
fn what_is_missing_at_the_beginning_is_a_finding_if_somebody_needs_it() {
    let original = Fixture::new();
    original.write(&(0..20_usize).map(|n| vec![vec![n as u8; 10_000]]).collect::<Vec<_>>());
    let firsts: Vec<_> = original.segments().iter().filter_map(|path| segment::first_in_name(path)).collect();
    let (second, third) = (firsts[1], firsts[2]);
    let remove = |path: &PathBuf| fs::remove_file(path).unwrap();
    let destroy = |path: &PathBuf| fs::write(path, b"not a segment").unwrap();
    let check =
        |damage: &dyn Fn(&[PathBuf]), needed: Option<u64>, floor: u64, expected: &[(Kind, Option<(u64, u64)>)]| {
            let copy = Fixture::new();
            fs::create_dir_all(copy.journal_dir()).unwrap();
            for path in original.segments() {
                fs::copy(&path, copy.journal_dir().join(path.file_name().unwrap())).unwrap();
            }
            damage(&copy.segments());
            let known = Known { needed: needed.map(Position), floor: Position(floor) };
            let (journal, findings) = copy.open_knowing(known);
            let lost = |finding: &Finding| (finding.kind, finding.lost.map(|(from, to)| (from.0, to.0)));
            assert_eq!(findings.iter().map(lost).collect::<Vec<_>>(), expected, "{known:?}");
            append(&journal.view().appender(), &[b"next".to_vec()]).unwrap();
            let all = read_all(&mut journal.view().reader(Start::Earliest));
            assert!(all.into_keys().last() >= Some(Position(floor)), "no position is given twice");
            journal.close();
        };
    let first = |files: &[PathBuf]| remove(&files[0]);
    check(&first, None, 0, &[]);
    check(&first, Some(second), 20, &[]);
    check(&first, Some(2), 20, &[(Kind::Missing, Some((2, second)))]);
    let all = |files: &[PathBuf]| files.iter().for_each(remove);
    check(&all, Some(2), 20, &[(Kind::Missing, Some((2, 20)))]);
    check(&all, Some(20), 20, &[]);
    // The name of a destroyed one still says where it began.
    let destroyed = (Kind::Segment, Some((0, second)));
    check(&|files| destroy(&files[0]), Some(2), 20, &[destroyed]);
    check(
        &|files| files[..2].iter().for_each(destroy),
        Some(2),
        20,
        &[destroyed, (Kind::Segment, Some((second, third)))],
    );
    let rest = |files: &[PathBuf]| {
        files[1..].iter().for_each(remove);
        destroy(&files[0]);
    };
    check(&rest, Some(2), 20, &[(Kind::Segment, Some((0, 20)))]);
    check(&rest, Some(0), 0, &[(Kind::Segment, None)]);
    let only_second = |files: &[PathBuf]| {
        [0, 2, 3].iter().for_each(|index| remove(&files[*index]));
        destroy(&files[1]);
    };
    let missing = (Kind::Missing, Some((2, second)));
    check(&only_second, Some(2), 20, &[missing, (Kind::Segment, Some((second, 20)))]);
    check(&only_second, Some(2), 3, &[missing, (Kind::Segment, None)]);
    // In the middle it is one gap, in the segment before.
    let destroyed = (Kind::Segment, None);
    let gap = (Kind::Missing, Some((second, firsts[3])));
    check(&|files| files[1..3].iter().for_each(destroy), Some(2), 20, &[destroyed, destroyed, gap]);
}

#[test]
fn damage_at_the_end_of_a_sealed_segment_is_not_a_torn_tail() {
    let original = Fixture::new();
    let groups: Vec<_> = (0..10_usize).map(|n| vec![vec![n as u8; 10_000]]).collect();
    original.write(&groups);
    let last = segment::first_in_name(&original.segments()[1]).unwrap() - 1;
    let (read, findings) = damaged(&original, |copy| {
        let file = OpenOptions::new().write(true).open(&copy.segments()[0]).unwrap();
        file.write_all_at(b"damage", HEADER_BLOCK + last * 10_024 + 500).unwrap();
    });
    assert_eq!(kinds(&findings), [Kind::Missing]);
    assert_eq!(findings[0].lost, Some((Position(last), Position(last + 1))));
    assert_eq!(read.len(), 9);
}

#[test]
fn foreign_files_are_left_alone_and_newer_formats_refused() {
    let fixture = Fixture::new();
    fixture.write(&entries(0..3));
    let foreign = fixture.journal_dir().join("notes.txt");
    fs::write(&foreign, "mine").unwrap();
    let (read, findings) = fixture.read();
    assert_eq!((read.len(), kinds(&findings)), (3, vec![Kind::Foreign]));
    assert_eq!(fs::read_to_string(&foreign).unwrap(), "mine");

    let open = || {
        Journal::open(
            &fixture.journal_dir(),
            &fixture.quarantine(),
            &fixture.config,
            Known::default(),
            Metrics::unseen(),
        )
        .map(drop)
    };
    for name in ["00000000000000000003.seg", "1.spare"] {
        let folder = fixture.journal_dir().join(name);
        fs::create_dir(&folder).unwrap();
        assert!(matches!(open(), Err(OpenError::Directory { path }) if path == folder));
        fs::remove_dir(&folder).unwrap();
    }

    let path = fixture.segments().remove(0);
    let mut bytes = fs::read(&path).unwrap();
    bytes[8] = 2;
    let crc = crc32c::crc32c(&bytes[..28]).to_le_bytes();
    bytes[28..32].copy_from_slice(&crc);
    // Damage that would be repaired, were the version known.
    bytes[4200] ^= 1;
    fs::write(&path, &bytes).unwrap();
    assert!(matches!(open(), Err(OpenError::NewerVersion { version: 2, .. })));
    assert_eq!(fs::read(&path).unwrap(), bytes, "nothing is changed");
}

#[test]
fn reading_passes_over_damage_that_comes_while_running() {
    let fixture = Fixture::new();
    let (journal, _) = fixture.open();
    let appender = journal.view().appender();
    for group in entries(0..5) {
        append(&appender, &group).unwrap();
    }
    let (ends, _) = layout(&fixture);
    let path = fixture.segments().remove(0);
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(b"XX", ends[1] + 25).unwrap();
    file.write_all_at(b"XX", ends[3] + 25).unwrap();
    let before = fs::read(&path).unwrap();
    let mut reader = journal.view().reader(Start::Earliest);
    assert_eq!(read_all(&mut reader).into_keys().map(|p| p.0).collect::<Vec<_>>(), [0, 1, 3]);
    append(&appender, &[b"after".to_vec()]).unwrap();
    assert_eq!(read_all(&mut reader).into_keys().map(|p| p.0).collect::<Vec<_>>(), [5]);
    let after = fs::read(&path).unwrap();
    assert_eq!(before[..ends[4] as usize], after[..ends[4] as usize], "reading does not repair");
    journal.close();
}

#[test]
fn a_full_journal_refuses_until_readers_let_go() {
    let mut fixture = Fixture::new();
    fixture.config.max_disk = ByteSize::b(4 * SEGMENT);
    let (journal, _) = fixture.open();
    let appender = journal.view().appender();
    let mut reader = journal.view().reader(Start::Earliest);
    let entry = vec![vec![7; 10_000]];
    let mut accepted = 0;
    let refused = loop {
        match append(&appender, &entry) {
            Ok(()) => accepted += 1,
            Err(error) => break error,
        }
    };
    assert!(matches!(refused, AppendError::Full(_)), "{refused:?}");
    assert_eq!(accepted, 4 * 6, "every segment is used up");
    assert!(matches!(journal.view().health(), Health::Full(_)));
    assert!(journal.view().disk_bytes() <= 4 * SEGMENT);
    let view = journal.view();
    assert_eq!((view.needed_bytes(), view.limit_bytes().unwrap()), (4 * SEGMENT, 4 * SEGMENT));
    assert_eq!(read_all(&mut reader).len(), accepted);
    assert!(append(&appender, &entry).is_err(), "reading alone frees nothing");
    reader.release(reader.position());
    assert_eq!(view.needed_bytes(), SEGMENT);
    let deadline = Instant::now() + Duration::from_secs(20);
    while append(&appender, &entry).is_err() {
        assert!(Instant::now() < deadline, "still full");
        std::thread::sleep(Duration::from_millis(20));
    }
    for _ in 0..100 {
        if append(&appender, &entry).is_ok() {
            read_all(&mut reader);
            reader.release(reader.position());
        }
    }
    assert!(journal.view().disk_bytes() <= 4 * SEGMENT);
    journal.close();
}

/// While the disk takes nothing, what waits for it stays within bounds.
#[test]
fn too_much_that_waits_is_refused() {
    let (fixture, entry) = (Fixture::new(), vec![7; 50_000]);
    let (journal, _) = fixture.open();
    let appender = journal.view().appender();
    let one = || appender.append(|entries| entries.entry(|out| out.extend(&entry)));
    let stalled = journal.shared.segments();
    let mut waiting: Vec<_> = std::iter::from_fn(|| one().ok()).take(10_000).collect();
    let bytes = waiting.len() * entry.len();
    assert!((33_000_000..34_000_000).contains(&bytes), "{bytes} bytes wait");
    assert!(matches!(one(), Err(AppendError::Busy)));
    drop(stalled);
    appender.submit();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        tokio::select! {
            stored = futures_util::future::try_join_all(waiting.drain(..)) => drop(stored.unwrap()),
            () = appender.clone().courier() => unreachable!("a courier does not end"),
        }
    });
    append(&appender, &[b"there is room again".to_vec()]).unwrap();
    journal.close();
}

/// Long after the last segment was begun, and although none can follow it.
#[test]
fn the_last_segment_is_used_up_before_the_journal_is_full() {
    let mut fixture = Fixture::new();
    fixture.config.max_disk = ByteSize::b(2 * SEGMENT);
    let (journal, _) = fixture.open();
    let (appender, _reader) = (journal.view().appender(), journal.view().reader(Start::Earliest));
    for _ in 0..7 {
        append(&appender, &[vec![7; 10_000]]).unwrap();
    }
    // The space keeper looks every second.
    let health = || journal.view().health();
    let deadline = Instant::now() + Duration::from_millis(2500);
    while Instant::now() < deadline {
        assert_eq!(health(), Health::Serving);
        std::thread::sleep(Duration::from_millis(20));
    }
    for _ in 0..5 {
        append(&appender, &[vec![7; 10_000]]).unwrap();
    }
    assert_eq!(health(), Health::Serving, "nothing was refused yet");
    assert!(matches!(append(&appender, &[vec![7; 10_000]]), Err(AppendError::Full(_))));
    assert!(matches!(health(), Health::Full(_)), "who has to know of a refusal knows");
    journal.close();
}

/// Or else the disk would have to read what is left of a block, in a file that has been used before.
#[test]
fn whole_blocks_are_written() {
    const BLOCK: usize = 4096;
    let check = |entry: usize, blocks: usize| {
        let fixture = Fixture::new();
        fs::create_dir(fixture.journal_dir()).unwrap();
        fs::write(fixture.journal_dir().join("1.spare"), vec![0xAA; SEGMENT as usize]).unwrap();
        fixture.write(&[vec![vec![0xBB; entry]]]);
        let file = fs::read(&fixture.segments()[0]).unwrap();
        let records = &file[HEADER_BLOCK as usize..];
        let end = record::HEADER + record::ENTRY_OVERHEAD + entry;
        assert!(records[end..blocks * BLOCK].iter().all(|byte| *byte == 0), "{entry}");
        assert!(records[blocks * BLOCK..].iter().all(|byte| *byte == 0xAA), "{entry}");
        assert_eq!(fixture.read().0.len(), 1);
    };
    let fills = BLOCK - 2 * record::HEADER - record::ENTRY_OVERHEAD;
    check(1, 1);
    check(fills, 1);
    check(fills + 1, 2);
    // Up to the segment's end.
    let rest = SEGMENT as usize - HEADER_BLOCK as usize - record::HEADER - record::ENTRY_OVERHEAD;
    check(rest - 1, SEGMENT as usize / BLOCK - 1);
    check(rest, SEGMENT as usize / BLOCK - 1);
}

#[test]
fn retention_gives_up_what_all_readers_have_passed() {
    let mut fixture = Fixture::new();
    fixture.config.retention = Duration::ZERO;
    let (journal, _) = fixture.open();
    let appender = journal.view().appender();
    let (mut fast, slow) = (journal.view().reader(Start::Earliest), journal.view().reader(Start::Earliest));
    for n in 0..40_u8 {
        append(&appender, &[vec![n; 10_000]]).unwrap();
    }
    read_all(&mut fast);
    fast.release(fast.position());
    assert_eq!(journal.view().reader(Start::Earliest).position(), Position(0), "the slow reader keeps everything");
    let hold = slow.hold();
    drop(slow);
    std::thread::sleep(2 * space::INTERVAL);
    assert_eq!(journal.view().reader(Start::Earliest).position(), Position(0), "and so does what is left of it");
    drop(hold);
    let deadline = Instant::now() + Duration::from_secs(20);
    while journal.view().reader(Start::Earliest).position() == Position(0) {
        assert!(Instant::now() < deadline, "nothing was given up");
        std::thread::sleep(Duration::from_millis(20));
    }
    journal.close();
}

#[test]
fn a_lower_limit_gives_up_what_is_too_much() {
    let mut fixture = Fixture::new();
    let entries: Vec<_> = (0..40_u8).map(|n| vec![vec![n; 10_000]]).collect();
    fixture.write(&entries);
    fixture.config.max_disk = ByteSize::b(3 * SEGMENT);
    let (journal, _) = fixture.open();
    let needed = journal.view().reader(Start::At(Position(39)));
    let deadline = Instant::now() + Duration::from_secs(20);
    while journal.view().disk_bytes() > 3 * SEGMENT {
        assert!(Instant::now() < deadline, "{} bytes", journal.view().disk_bytes());
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(journal.view().reader(Start::Earliest).position() < needed.position());
    journal.close();
}

#[test]
fn too_little_free_disk_refuses() {
    let mut fixture = Fixture::new();
    fixture.config.min_free_disk = ByteSize::pib(1);
    let (journal, _) = fixture.open();
    let appender = journal.view().appender();
    assert!(matches!(append(&appender, &[b"x".to_vec()]), Err(AppendError::Full(_))));
    journal.close();
    assert_eq!(read_all_closed(&fixture), 0);
}

fn read_all_closed(fixture: &Fixture) -> usize {
    let inspection = Inspection::new(&fixture.journal_dir(), Position::ZERO, Known::default()).unwrap();
    inspection.segments.len()
}

/// A crash of the machine: of the bytes written after the last sync, each sector is there or not.
fn drop_sectors(path: &Path, before: &[u8], kept: &[bool]) {
    let mut mixed = fs::read(path).unwrap();
    for (index, sector) in mixed.chunks_mut(512).enumerate() {
        if !kept[index % kept.len()] {
            sector.copy_from_slice(&before[index * 512..index * 512 + sector.len()]);
        }
    }
    fs::write(path, mixed).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Appends, crashes and reopenings against a model: what was synced is all there, what was not is there whole or not
    /// at all, and nothing else is.
    #[test]
    fn crashes_lose_nothing_that_was_acknowledged(
        rounds in prop::collection::vec(
            (
                prop::collection::vec(prop::collection::vec(prop::collection::vec(any::<u8>(), 0..900), 1..4), 1..12),
                prop::collection::vec(prop::collection::vec(prop::collection::vec(any::<u8>(), 0..900), 1..4), 0..4),
                prop::collection::vec(any::<bool>(), 1..16),
            ),
            1..5,
        )
    ) {
        let fixture = Fixture::new();
        let mut synced: Vec<Vec<Vec<u8>>> = Vec::new();
        for (acknowledged, unsynced, kept) in rounds {
            fixture.write(&acknowledged);
            synced.extend(acknowledged);
            let path = fixture.segments().pop().unwrap();
            let before = fs::read(&path).unwrap();
            fixture.write(&unsynced);
            if fixture.segments().last() == Some(&path) {
                drop_sectors(&path, &before, &kept);
                let (read, _) = fixture.read();
                let read: Vec<Vec<u8>> = read.into_values().collect();
                let expected: Vec<Vec<u8>> = synced.concat();
                prop_assert_eq!(&read[..expected.len()], &expected[..]);
                // What is left are whole groups of the unsynced ones, in order.
                let mut rest = &read[expected.len()..];
                for group in unsynced {
                    if let Some(after) = rest.strip_prefix(&group[..]) {
                        rest = after;
                        synced.push(group);
                    }
                }
                prop_assert!(rest.is_empty(), "{} entries from nowhere", rest.len());
            } else {
                synced.extend(unsynced);
            }
        }
    }
}
