//! Damage to the ledger of a stopped relay: finding it, and saving what can still be read.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use rusqlite::types::Value;
use rusqlite::{Connection, OpenFlags, Row, Statement, params_from_iter};
use tempfile::TempDir;
use url::Url;

use super::{LedgerError, schema};
use crate::journal::Position;

/// Rows behind damage are reached from the other end.
const BOTH_WAYS: [&str; 2] = ["ORDER BY id", "ORDER BY id DESC"];
/// How many problems SQLite is asked for.
const MAX_PROBLEMS: usize = 20;
const READ_ONLY: OpenFlags = OpenFlags::SQLITE_OPEN_READ_ONLY.union(OpenFlags::SQLITE_OPEN_NO_MUTEX);
/// What a copy is called.
const COPY: &str = "ledger.sqlite";

/// What a ledger holds, and what is wrong with it.
#[derive(Debug, Default)]
pub struct Report {
    /// Damage, each a sentence.
    pub problems: Vec<String>,
    /// Events that can't be read, each a sentence.
    pub unreadable: Vec<String>,
    /// How far each lane has come.
    pub cursors: Vec<(String, Position)>,
    /// Above every position that it knows.
    pub floor: Position,
    /// How many deliveries are parked.
    pub parked: u64,
    /// How many dead letters there are.
    pub dead_letters: u64,
}

/// What was saved of a damaged ledger.
#[derive(Debug, Default)]
pub struct Salvaged {
    /// Whether the cursors were; without them every sink begins again at the oldest event that is kept.
    pub cursors: bool,
    /// Parked deliveries.
    pub parked: Saved,
    /// Dead letters.
    pub dead_letters: Saved,
    /// Where the damaged file is now.
    pub aside: PathBuf,
}

/// How many rows of a table were saved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Saved {
    /// So many.
    pub rows: u64,
    /// Of so many, where that is known.
    pub of: Option<u64>,
}

impl Saved {
    /// Whether nothing is lost.
    pub fn is_all(self) -> bool {
        self.of == Some(self.rows)
    }
}

/// Looks at a ledger, and changes nothing: it may lie where nothing can be written. `is_event` says whether a stored event
/// can be read.
///
/// # Errors
///
/// [`LedgerError`]: a newer version wrote it; or it takes a copy to be read, which can't be made. Damage is no error.
pub fn check(path: &Path, is_event: impl Fn(Bytes) -> bool) -> Result<Report, LedgerError> {
    let mut report = Report::default();
    let looked = open(path).and_then(|(connection, _copy)| Ok(look(&connection, is_event, &mut report)?));
    match looked {
        Ok(()) => {}
        Err(LedgerError::Open(error)) => report.problems.push(error.to_string()),
        Err(error) => return Err(error),
    }
    Ok(report)
}

fn look(connection: &Connection, is_event: impl Fn(Bytes) -> bool, report: &mut Report) -> rusqlite::Result<()> {
    let progress = super::load_progress(connection)?;
    report.cursors = progress.iter().map(|(lane, progress)| (lane.clone(), progress.cursor)).collect();
    report.cursors.sort();
    let mut statement = connection.prepare(&format!("PRAGMA integrity_check({MAX_PROBLEMS})"))?;
    let mut answers = statement.query([])?;
    while let Some(answer) = answers.next()? {
        let answer: String = answer.get(0)?;
        if answer != "ok" {
            report.problems.push(answer);
        }
    }
    report.floor = super::floor(connection, &progress)?;
    report.parked = count(connection, "parked")?;
    report.dead_letters = count(connection, "dead_letters")?;
    let sentence = |(table, id)| format!("row {id} of {table} holds no event that can be read");
    report.unreadable = unreadable(connection, is_event)?.into_iter().map(sentence).collect();
    Ok(())
}

/// SQLite counts by an index where there is one, so that this is known even where the rows themselves can't be read.
fn count(connection: &Connection, table: &str) -> rusqlite::Result<u64> {
    let count = |row: &Row<'_>| row.get(0).map(i64::unsigned_abs);
    connection.query_row(&format!("SELECT count(*) FROM {table}"), [], count)
}

/// Rows whose events can't be read: the table and the number. Some are dead letters for that.
fn unreadable(connection: &Connection, is_event: impl Fn(Bytes) -> bool) -> rusqlite::Result<Vec<(&'static str, i64)>> {
    let mut found = Vec::new();
    for (table, condition) in [("parked", "true"), ("dead_letters", "reason <> 'unreadable'")] {
        let sql = format!("SELECT id, record FROM {table} WHERE {condition} ORDER BY id");
        let mut statement = connection.prepare(&sql)?;
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            if !is_event(row.get::<_, Vec<u8>>(1)?.into()) {
                found.push((table, row.get(0)?));
            }
        }
    }
    Ok(found)
}

/// Makes a new ledger of what can be read of a damaged one, which is moved to `quarantine`. Where parked deliveries are lost,
/// the cursors that have passed them are not kept.
///
/// # Errors
///
/// [`LedgerError`]: files can't be written or moved; the damaged ledger is where it was, or in quarantine.
pub fn salvage(path: &Path, quarantine: &Path) -> Result<Salvaged, LedgerError> {
    let fresh = path.with_extension("salvaged");
    if fresh.exists() {
        fs::remove_file(&fresh).map_err(LedgerError::Move)?;
    }
    let mut salvaged = Salvaged::default();
    super::make_private(&fresh).map_err(LedgerError::Create)?;
    let mut new = Connection::open(&fresh)?;
    schema::prepare(&mut new, &fresh)?;
    if let Ok(old) = read_only(path) {
        let transaction = new.transaction()?;
        let cursors = copy(&old, &transaction, "cursors", &[""])?;
        salvaged.parked = copy(&old, &transaction, "parked", &BOTH_WAYS)?;
        salvaged.dead_letters = copy(&old, &transaction, "dead_letters", &BOTH_WAYS)?;
        let rules = copy(&old, &transaction, "rules", &[""])?;
        // With only some of them, lanes would be taken for new ones, and begin at the end.
        salvaged.cursors = cursors.is_all() && cursors.rows > 0 && salvaged.parked.is_all();
        if !salvaged.cursors {
            transaction.execute("DELETE FROM cursors", [])?;
        }
        // Without all of them, sinks read on by those of the file.
        if !rules.is_all() || !salvaged.cursors {
            transaction.execute("DELETE FROM rules", [])?;
        }
        transaction.commit()?;
    }
    new.close().map_err(|(_, error)| error)?;
    fs::create_dir_all(quarantine).map_err(LedgerError::Move)?;
    let mut names = (super::now()..).map(|time| quarantine.join(format!("ledger.sqlite.{time}")));
    salvaged.aside = names.find(|name| !name.exists()).unwrap_or_default();
    for ending in ["", "-wal", "-shm"] {
        let beside = with_ending(path, ending);
        if beside.exists() {
            fs::rename(beside, with_ending(&salvaged.aside, ending)).map_err(LedgerError::Move)?;
        }
    }
    fs::rename(&fresh, path).map_err(LedgerError::Move)?;
    let dir = path.parent().unwrap_or(Path::new("."));
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(LedgerError::Move)?;
    Ok(salvaged)
}

/// Makes dead letters of events that can't be read, as a lane would; how many there were.
///
/// # Errors
///
/// [`LedgerError`]: nothing has changed.
pub fn bury_unreadable(path: &Path, is_event: impl Fn(Bytes) -> bool) -> Result<usize, LedgerError> {
    let mut connection = writable(path)?;
    let transaction = connection.transaction()?;
    let rows = unreadable(&transaction, is_event)?;
    for (table, id) in &rows {
        if *table == "parked" {
            transaction.execute(
                "INSERT OR REPLACE INTO dead_letters
                 (lane, position, event_id, status, key, route, reason, error_kind, error, attempts, first_failed_at, died_at, record)
                 SELECT lane, position, event_id, status, key, route, 'unreadable', 'decode', 'the stored event can''t be read',
                        attempts, first_failed_at, ?2, record
                 FROM parked WHERE id = ?1",
                [*id, super::now()],
            )?;
            // Whatever waits behind it is given a time when the ledger is opened.
            transaction.execute("DELETE FROM parked WHERE id = ?1", [id])?;
        } else {
            transaction.execute("UPDATE dead_letters SET reason = 'unreadable' WHERE id = ?1", [id])?;
        }
    }
    transaction.commit()?;
    Ok(rows.len())
}

/// Moves cursors that are behind the oldest event to it: what they have not read is gone. Which, and from where.
///
/// # Errors
///
/// [`LedgerError`]: nothing has changed.
pub fn raise_cursors(path: &Path, oldest: Position) -> Result<Vec<(String, Position)>, LedgerError> {
    let connection = writable(path)?;
    let mut behind = connection.prepare("SELECT lane, position FROM cursors WHERE position < ?1 ORDER BY lane")?;
    let cursor = |row: &Row<'_>| Ok((row.get(0)?, Position::from_stored(row.get(1)?)));
    let raised = behind.query_map([oldest.to_stored()], cursor)?.collect::<Result<_, _>>()?;
    connection.execute("UPDATE cursors SET position = ?1, ahead = x'' WHERE position < ?1", [oldest.to_stored()])?;
    Ok(raised)
}

fn writable(path: &Path) -> Result<Connection, LedgerError> {
    let mut connection = Connection::open(path)?;
    schema::prepare(&mut connection, path)?;
    Ok(connection)
}

/// SQLite may make files beside it even so.
fn read_only(path: &Path) -> rusqlite::Result<Connection> {
    Connection::open_with_flags(path, READ_ONLY)
}

/// Nothing is made beside it, and what is there is not read.
fn unchanging(path: &Path) -> rusqlite::Result<Connection> {
    let wrong = || rusqlite::Error::InvalidPath(path.to_owned());
    let mut url = std::path::absolute(path).ok().and_then(|path| Url::from_file_path(path).ok()).ok_or_else(wrong)?;
    url.set_query(Some("immutable=1"));
    Connection::open_with_flags(url.as_str(), READ_ONLY | OpenFlags::SQLITE_OPEN_URI)
}

/// The ledger with today's tables. What was written last may be in a file beside it, which SQLite reads only where it can
/// write, and the tables may be an older version's: both take a copy, which is gone with its folder.
fn open(path: &Path) -> Result<(Connection, Option<TempDir>), LedgerError> {
    let has_content = |ending: &&str| fs::metadata(with_ending(path, ending)).is_ok_and(|file| file.len() > 0);
    let unfinished: Vec<_> = ["-wal", "-journal"].into_iter().filter(has_content).collect();
    if unfinished.is_empty() {
        let connection = unchanging(path)?;
        if schema::steps_left(&connection, path)?.is_empty() {
            return Ok((connection, None));
        }
    }
    let dir = copy_files(path, &unfinished).map_err(LedgerError::Copy)?;
    let mut connection = Connection::open(dir.path().join(COPY))?;
    schema::prepare(&mut connection, path)?;
    Ok((connection, Some(dir)))
}

fn copy_files(path: &Path, unfinished: &[&str]) -> io::Result<TempDir> {
    // Only its owner may look into it: there are phone numbers in events.
    let dir = tempfile::Builder::new().permissions(fs::Permissions::from_mode(0o700)).tempdir()?;
    for ending in [""].iter().chain(unfinished) {
        let mut copy = File::create_new(with_ending(&dir.path().join(COPY), ending))?;
        io::copy(&mut File::open(with_ending(path, ending))?, &mut copy)?;
    }
    Ok(dir)
}

fn with_ending(path: &Path, ending: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(ending);
    name.into()
}

/// Copies the rows that can be read, in each order until one gets to the end.
fn copy(old: &Connection, new: &Connection, table: &str, orders: &[&str]) -> rusqlite::Result<Saved> {
    let columns = columns(old, table).unwrap_or_default();
    if columns.is_empty() {
        return Ok(Saved::default());
    }
    let (names, places) = (columns.join(", "), vec!["?"; columns.len()].join(", "));
    let mut insert = new.prepare(&format!("INSERT OR IGNORE INTO {table} ({names}) VALUES ({places})"))?;
    let (mut rows, mut complete) = (0, false);
    for order in orders {
        // What can't even be asked for has no rows.
        if !complete && let Ok(mut read) = old.prepare(&format!("SELECT {names} FROM {table} {order}")) {
            complete = copy_rows(&mut read, &mut insert, &mut rows)?;
        }
    }
    let counted = count(old, table).ok().filter(|counted| *counted > rows);
    Ok(Saved { rows, of: counted.or(complete.then_some(rows)) })
}

/// Those that the table has there: an older version's has fewer.
fn columns(connection: &Connection, table: &str) -> rusqlite::Result<Vec<String>> {
    let mut names = connection.prepare(&format!("SELECT name FROM pragma_table_info('{table}')"))?;
    names.query_map([], |row| row.get(0))?.collect()
}

/// Copies until there are no more rows, or the next can't be read; whether all were.
fn copy_rows(read: &mut Statement<'_>, insert: &mut Statement<'_>, copied: &mut u64) -> rusqlite::Result<bool> {
    let (columns, mut complete) = (read.column_count(), true);
    let mut rows = read.query([])?;
    loop {
        let row = match rows.next() {
            Ok(Some(row)) => row,
            Ok(None) => return Ok(complete),
            Err(_) => return Ok(false),
        };
        match (0..columns).map(|column| row.get(column)).collect::<Result<Vec<Value>, _>>() {
            Ok(values) => *copied += insert.execute(params_from_iter(values))? as u64,
            Err(_) => complete = false,
        }
    }
}
