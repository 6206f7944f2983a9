//! The ledger: each lane's cursor, and the deliveries that will not be tried again, in an SQLite database.
//!
//! One thread owns the connection. Whatever lanes ask for meanwhile goes into one transaction, so that a busy relay
//! still syncs only a few times a second. A lane's cursor and the dead letters that it passes move together.
//!
//! The ledger does not know what an event is or where sinks are; operators may open the file with `sqlite3`.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use rusqlite::{Connection, Transaction, params};
use tokio::sync::oneshot;

use crate::journal::Position;

/// The schema that this version writes, kept in `user_version`.
const SCHEMA_VERSION: i64 = 1;
const SCHEMA: &str = "
    CREATE TABLE cursors (
        lane TEXT PRIMARY KEY,
        position INTEGER NOT NULL,      -- the next event that is not settled
        updated_at INTEGER NOT NULL     -- Unix milliseconds
    ) WITHOUT ROWID;
    CREATE TABLE dead_letters (
        id INTEGER PRIMARY KEY,
        lane TEXT NOT NULL,
        position INTEGER NOT NULL,
        event_id TEXT NOT NULL,
        route TEXT NOT NULL,
        reason TEXT NOT NULL,           -- why it is not tried again
        error_kind TEXT NOT NULL,
        error TEXT NOT NULL,
        attempts INTEGER NOT NULL,
        died_at INTEGER NOT NULL,       -- Unix milliseconds
        record BLOB NOT NULL,           -- the event as the journal had it
        UNIQUE (lane, position)
    );
";
/// How many requests may wait for the thread.
const QUEUE: usize = 1024;

/// A handle on the ledger. Clones share it; the thread ends with the last.
#[derive(Clone)]
pub struct Ledger {
    requests: SyncSender<Request>,
}

/// A ledger that was just opened.
pub struct Opened {
    /// The handle.
    pub ledger: Ledger,
    /// The cursor of every lane that it knows.
    pub cursors: Vec<(String, Position)>,
    /// The thread that owns the file; it can be joined once all handles are dropped.
    pub thread: JoinHandle<()>,
}

/// What a lane settles besides its cursor.
#[derive(Debug, Default)]
pub struct Changes {
    /// Deliveries that will not be tried again.
    pub dead: Vec<DeadLetter>,
}

/// A delivery that will not be tried again.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "named like the columns")]
pub struct DeadLetter {
    pub position: Position,
    pub event_id: String,
    pub route: String,
    pub reason: &'static str,
    pub error_kind: String,
    pub error: String,
    pub attempts: u32,
    pub record: Bytes,
}

struct Request {
    lane: String,
    cursor: Position,
    changes: Changes,
    done: oneshot::Sender<Result<(), LedgerError>>,
}

impl Ledger {
    /// Opens the ledger, or makes it.
    ///
    /// # Errors
    ///
    /// [`LedgerError`]: the file can't be read or written, or a newer version wrote it.
    pub fn open(path: &Path) -> Result<Opened, LedgerError> {
        let mut connection = Connection::open(path)?;
        connection.pragma_update(None, "journal_mode", "wal")?;
        connection.pragma_update(None, "synchronous", "full")?;
        prepare_schema(&mut connection, path)?;
        let cursors = load_cursors(&connection)?;
        let (requests, queue) = sync_channel(QUEUE);
        let run = move || serve(&mut connection, &queue);
        let thread = std::thread::Builder::new().name("ledger".to_owned()).spawn(run).map_err(LedgerError::Thread)?;
        Ok(Opened { ledger: Self { requests }, cursors, thread })
    }

    /// Moves a lane's cursor, together with what it passes. Durable on return.
    ///
    /// # Errors
    ///
    /// [`LedgerError`]: nothing has changed; it can be tried again.
    pub async fn settle(&self, lane: &str, cursor: Position, changes: Changes) -> Result<(), LedgerError> {
        let (done, result) = oneshot::channel();
        let request = Request { lane: lane.to_owned(), cursor, changes, done };
        // Lanes settle one at a time, so that the queue is full only while the disk hangs; the lane waits elsewhere then.
        let requests = self.requests.clone();
        let sent = match requests.try_send(request) {
            Ok(()) => true,
            Err(std::sync::mpsc::TrySendError::Full(request)) => {
                tokio::task::spawn_blocking(move || requests.send(request)).await.is_ok_and(|sent| sent.is_ok())
            }
            Err(std::sync::mpsc::TrySendError::Disconnected(_)) => false,
        };
        if !sent {
            return Err(LedgerError::Ended);
        }
        result.await.unwrap_or(Err(LedgerError::Ended))
    }
}

fn prepare_schema(connection: &mut Connection, path: &Path) -> Result<(), LedgerError> {
    let transaction = connection.transaction()?;
    let version: i64 = transaction.pragma_query_value(None, "user_version", |row| row.get(0))?;
    match version {
        0 => {
            transaction.execute_batch(SCHEMA)?;
            transaction.pragma_update(None, "user_version", SCHEMA_VERSION)?;
        }
        // Writes nothing: it has to open on a full disk too.
        SCHEMA_VERSION => {}
        version => return Err(LedgerError::NewerVersion { file: path.to_owned(), version }),
    }
    Ok(transaction.commit()?)
}

fn load_cursors(connection: &Connection) -> Result<Vec<(String, Position)>, LedgerError> {
    let mut statement = connection.prepare("SELECT lane, position FROM cursors")?;
    let rows = statement.query_map([], |row| Ok((row.get(0)?, Position::from_stored(row.get(1)?))))?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// Takes what has gathered, does it in one transaction, and answers; until all handles are dropped.
fn serve(connection: &mut Connection, queue: &Receiver<Request>) {
    while let Ok(first) = queue.recv() {
        let requests: Vec<Request> = std::iter::once(first).chain(queue.try_iter().take(QUEUE)).collect();
        let result = commit(connection, &requests).map_err(|error| error.to_string());
        for request in requests {
            // A lane that has gone away does not need the answer.
            drop(request.done.send(result.clone().map_err(LedgerError::Failed)));
        }
    }
}

fn commit(connection: &mut Connection, requests: &[Request]) -> rusqlite::Result<()> {
    let transaction = connection.transaction()?;
    for request in requests {
        settle(&transaction, request)?;
    }
    transaction.commit()
}

fn settle(transaction: &Transaction<'_>, request: &Request) -> rusqlite::Result<()> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
    let now = i64::try_from(now).unwrap_or(i64::MAX);
    for dead in &request.changes.dead {
        // After a crash the same delivery may die again.
        let mut insert = transaction.prepare_cached(
            "INSERT OR REPLACE INTO dead_letters
             (lane, position, event_id, route, reason, error_kind, error, attempts, died_at, record)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)",
        )?;
        insert.execute(params![
            request.lane,
            dead.position.to_stored(),
            dead.event_id,
            dead.route,
            dead.reason,
            dead.error_kind,
            dead.error,
            dead.attempts,
            now,
            &dead.record[..],
        ])?;
    }
    let mut upsert = transaction.prepare_cached(
        "INSERT INTO cursors (lane, position, updated_at) VALUES (?1, ?2, ?3)
         ON CONFLICT (lane) DO UPDATE SET position = excluded.position, updated_at = excluded.updated_at",
    )?;
    upsert.execute(params![request.lane, request.cursor.to_stored(), now])?;
    Ok(())
}

/// Why the ledger did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// SQLite said so, at opening.
    #[error("the ledger can't be opened")]
    Open(#[from] rusqlite::Error),
    /// SQLite said so, later.
    #[error("the ledger can't be written: {0}")]
    Failed(String),
    /// A newer version of the program wrote it.
    #[error("{} has schema version {version}, which this engage-relay does not know: run the newer one", file.display())]
    NewerVersion {
        /// The file.
        file: PathBuf,
        /// Its version.
        version: i64,
    },
    /// No thread could be started.
    #[error("the ledger's thread can't be started")]
    Thread(#[source] std::io::Error),
    /// The thread has ended.
    #[error("the ledger is closed")]
    Ended,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dead(position: i64) -> DeadLetter {
        DeadLetter {
            position: Position::from_stored(position),
            event_id: format!("evt_{position}"),
            route: "all".into(),
            reason: "rejected",
            error_kind: "http_400".into(),
            error: "bad request".into(),
            attempts: 1,
            record: Bytes::from_static(b"record"),
        }
    }

    #[tokio::test]
    async fn cursors_and_dead_letters_survive_reopening() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger.sqlite");
        let Opened { ledger, cursors, thread } = Ledger::open(&path).unwrap();
        assert_eq!(cursors, []);
        let at = Position::from_stored;
        ledger.settle("crm", at(5), Changes { dead: vec![dead(3), dead(4)] }).await.unwrap();
        ledger.settle("ops", at(2), Changes::default()).await.unwrap();
        ledger.settle("crm", at(9), Changes { dead: vec![dead(4)] }).await.unwrap();
        drop(ledger);
        thread.join().unwrap();
        let connection = Connection::open(&path).unwrap();
        let dead: i64 = connection.query_row("SELECT count(*) FROM dead_letters", [], |row| row.get(0)).unwrap();
        assert_eq!(dead, 2, "the one that died twice counts once");
        let mut cursors = Ledger::open(&path).unwrap().cursors;
        cursors.sort();
        assert_eq!(cursors, [("crm".to_owned(), at(9)), ("ops".to_owned(), at(2))]);
    }

    #[test]
    fn a_newer_schema_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger.sqlite");
        drop(Ledger::open(&path).unwrap());
        Connection::open(&path).unwrap().pragma_update(None, "user_version", 2).unwrap();
        assert!(matches!(Ledger::open(&path), Err(LedgerError::NewerVersion { version: 2, .. })));
    }
}
