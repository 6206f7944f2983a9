//! Damage to the ledger of a stopped relay: finding it, and saving what can still be read.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use rusqlite::types::Value;
use rusqlite::{Connection, OpenFlags, params_from_iter};
use tempfile::TempDir;
use url::Url;

use super::{LedgerError, schema};
use crate::journal::Position;

/// Tables, and whether their rows have a number that says in which order they were written.
const TABLES: [(&str, bool); 3] = [("cursors", false), ("parked", true), ("dead_letters", true)];
/// How many problems SQLite is asked for.
const MAX_PROBLEMS: usize = 20;
const READ_ONLY: OpenFlags = OpenFlags::SQLITE_OPEN_READ_ONLY.union(OpenFlags::SQLITE_OPEN_NO_MUTEX);
/// What a copy is called.
const COPY: &str = "ledger.sqlite";

/// What a ledger holds, and what is wrong with it.
#[derive(Debug, Default)]
pub struct Report {
    /// Each a sentence.
    pub problems: Vec<String>,
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
    /// How many parked deliveries.
    pub parked: u64,
    /// How many dead letters.
    pub dead_letters: u64,
    /// Where the damaged file is now.
    pub aside: PathBuf,
}

/// Looks at a ledger, and changes nothing: it may lie where nothing can be written. `is_event` says whether a stored event
/// can be read.
///
/// # Errors
///
/// What SQLite has not finished takes a copy of the ledger to be read, in the folder for temporary files; it can't be made.
pub fn check(path: &Path, is_event: impl Fn(Bytes) -> bool) -> io::Result<Report> {
    let mut report = Report::default();
    let copy = copy_unfinished(path)?;
    let opened = match &copy {
        Some(copy) => read_only(&copy.path().join(COPY)),
        None => unchanging(path),
    };
    if let Err(error) = opened.and_then(|connection| look(&connection, is_event, &mut report)) {
        report.problems.push(error.to_string());
    }
    Ok(report)
}

fn look(connection: &Connection, is_event: impl Fn(Bytes) -> bool, report: &mut Report) -> rusqlite::Result<()> {
    let version: i64 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
    if version != schema::VERSION {
        report.problems.push(format!("schema version {version}, where this engage-relay has {}", schema::VERSION));
        return Ok(());
    }
    let mut statement = connection.prepare(&format!("PRAGMA integrity_check({MAX_PROBLEMS})"))?;
    let answers = statement.query_map([], |row| row.get(0))?.collect::<Result<Vec<String>, _>>()?;
    report.problems.extend(answers.into_iter().filter(|answer| answer != "ok"));
    let progress = super::load_progress(connection)?;
    report.floor = super::floor(connection, &progress)?;
    report.cursors = progress.into_iter().map(|(lane, progress)| (lane, progress.cursor)).collect();
    report.cursors.sort();
    for (table, count) in [("parked", &mut report.parked), ("dead_letters", &mut report.dead_letters)] {
        let mut statement = connection.prepare(&format!("SELECT id, record FROM {table} ORDER BY id"))?;
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            *count += 1;
            let (id, record): (i64, Vec<u8>) = (row.get(0)?, row.get(1)?);
            // Some are dead letters because they can't be read.
            let unreadable = "SELECT 1 FROM dead_letters WHERE id = ?1 AND reason = 'unreadable'";
            let is_known = table == "dead_letters" && connection.prepare_cached(unreadable)?.exists([id])?;
            if !is_known && !is_event(record.into()) {
                report.problems.push(format!("row {id} of {table} holds no event that can be read"));
            }
        }
    }
    Ok(())
}

/// Makes a new ledger of what can be read of a damaged one, which is moved to `quarantine`.
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
        for (table, has_id) in TABLES {
            let (count, complete) = copy(&old, &transaction, table, has_id)?;
            match table {
                // With only some of them, lanes would be taken for new ones, and begin at the end.
                "cursors" if complete => salvaged.cursors = count > 0,
                "cursors" => drop(transaction.execute("DELETE FROM cursors", [])?),
                "parked" => salvaged.parked = count,
                _ => salvaged.dead_letters = count,
            }
        }
        transaction.commit()?;
    }
    new.close().map_err(|(_, error)| error)?;
    fs::create_dir_all(quarantine).map_err(LedgerError::Move)?;
    salvaged.aside = quarantine.join(format!("ledger.sqlite.{}", super::now()));
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

/// Moves cursors that are behind the oldest event to it: what they have not read is gone.
///
/// # Errors
///
/// [`LedgerError`].
pub fn raise_cursors(path: &Path, oldest: Position) -> Result<(), LedgerError> {
    let connection = Connection::open(path)?;
    connection.execute("UPDATE cursors SET position = ?1, ahead = x'' WHERE position < ?1", [oldest.to_stored()])?;
    Ok(())
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

/// A copy of a ledger that was not closed: what was written last is in a file beside it, and SQLite reads that only where it
/// can write.
fn copy_unfinished(path: &Path) -> io::Result<Option<TempDir>> {
    let has_content = |ending: &&str| fs::metadata(with_ending(path, ending)).is_ok_and(|file| file.len() > 0);
    let unfinished: Vec<_> = ["-wal", "-journal"].into_iter().filter(has_content).collect();
    if unfinished.is_empty() {
        return Ok(None);
    }
    // Only its owner may look into it: there are phone numbers in events.
    let dir = tempfile::Builder::new().permissions(fs::Permissions::from_mode(0o700)).tempdir()?;
    for ending in [""].into_iter().chain(unfinished) {
        fs::copy(with_ending(path, ending), with_ending(&dir.path().join(COPY), ending))?;
    }
    Ok(Some(dir))
}

fn with_ending(path: &Path, ending: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(ending);
    name.into()
}

/// Copies the rows that can be read, from the front and, behind damage, from the back; how many, and whether all were.
fn copy(old: &Connection, new: &Connection, table: &str, has_id: bool) -> rusqlite::Result<(u64, bool)> {
    let mut columns = new.prepare(&format!("SELECT name FROM pragma_table_info('{table}')"))?;
    let columns: Vec<String> = columns.query_map([], |row| row.get(0))?.collect::<Result<_, _>>()?;
    let (names, places) = (columns.join(", "), vec!["?"; columns.len()].join(", "));
    let mut insert = new.prepare(&format!("INSERT OR IGNORE INTO {table} ({names}) VALUES ({places})"))?;
    let (mut count, mut complete) = (0, false);
    let orders: &[&str] = if has_id { &["ORDER BY id", "ORDER BY id DESC"] } else { &[""] };
    for order in orders {
        let mut read = || -> rusqlite::Result<Vec<Vec<Value>>> {
            let mut found = Vec::new();
            let mut statement = old.prepare(&format!("SELECT {names} FROM {table} {order}"))?;
            let mut rows = statement.query([])?;
            loop {
                match rows.next() {
                    Ok(Some(row)) => {
                        found.push((0..columns.len()).map(|column| row.get(column)).collect::<Result<_, _>>()?)
                    }
                    Ok(None) => {
                        complete = true;
                        return Ok(found);
                    }
                    Err(_) => return Ok(found),
                }
            }
        };
        // What can't even be asked for has no rows.
        for row in read().unwrap_or_default() {
            count += insert.execute(params_from_iter(row))? as u64;
        }
        if complete {
            break;
        }
    }
    Ok((count, complete))
}
