//! The ledger: each lane's progress, its parked deliveries, the dead letters, and the rules that lanes follow, in an SQLite
//! database.
//!
//! One thread owns the connection. Whatever lanes ask for meanwhile goes into one transaction, so that a busy relay
//! still syncs only a few times a second. A lane's progress and the deliveries that it parks or buries move together.
//!
//! Relays that share a journal keep their ledger there too ([`shared`]): what a transaction of SQLite has changed is then
//! written to the journal's brokers before it is committed, and the database is only a copy that can be thrown away.
//!
//! `schema` has the tables, `changes` what lanes write, `parked` what they read, `letters` what operators see; `check`
//! looks for damage; `account` is a lane's own way in. The ledger does not know what an event is or where sinks are;
//! operators may open the file with `sqlite3`.

mod account;
mod changes;
pub mod check;
mod letters;
mod parked;
mod schema;
pub mod shared;

use std::collections::{HashMap, HashSet};
use std::fs::{OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use rusqlite::{Connection, ErrorCode, Transaction};
use tokio::sync::oneshot;

pub use account::Account;
pub use changes::{Change, DeadLetter, Parked, Progress, Reason};
pub use letters::{Filter, Letter, Letters};
pub use parked::{Due, ParkedRow, Wanted, Which};

use crate::journal::Position;

/// Unix time in milliseconds.
pub type Millis = i64;

/// How many requests may wait for the thread.
const QUEUE: usize = 1024;
/// How long a transaction waits for somebody else who has the file locked, an operator with `sqlite3` for example.
const BUSY: Duration = Duration::from_secs(5);

/// A handle on the ledger. Clones share it.
#[derive(Clone)]
pub struct Ledger {
    requests: SyncSender<Message>,
}

/// Rules to be kept: opaque here.
pub struct RulesKept {
    /// What was kept under a lower number goes.
    pub first: i64,
    /// The number of what is kept.
    pub number: i64,
    /// What is kept.
    pub stage: String,
}

/// What the thread is told.
enum Message {
    Request(Box<dyn Request>),
    Close,
}

/// A ledger that was just opened.
pub struct Opened {
    /// The handle.
    pub ledger: Ledger,
    /// How far every lane that it knows has come.
    pub progress: HashMap<String, Progress>,
    /// Above every position that it knows.
    pub floor: Position,
    /// The thread that owns the file; it ends after [`Ledger::close`], or with the last handle.
    pub thread: JoinHandle<()>,
}

/// A transaction, and what it has written that others have to know before it is committed.
struct Books<'t> {
    transaction: Transaction<'t>,
    /// Nothing is noted where nobody has to know.
    written: Option<Vec<Written>>,
}

/// What was written.
#[derive(Clone, Debug)]
enum Written {
    /// How far a lane has come.
    Progress { lane: String, progress: Progress },
    /// What is parked at a position now.
    Parked { lane: String, position: Position, parked: Option<Box<Parked>> },
    /// A delivery that died.
    Dead { lane: String, letter: Box<DeadLetter>, died_at: Millis },
    /// A lane that was opened, and what tells this from other times.
    Opened { lane: String, mark: String },
}

/// Makes durable elsewhere what a transaction has written, before it is committed here.
trait Commit: Send {
    /// Waits until it is time for another transaction.
    fn pace(&mut self);

    /// Notes by what right it is written, before anything is.
    fn begin(&mut self);

    fn commit(&mut self, written: &[Written]) -> Result<(), String>;
}

/// Something that is done within a transaction, and answered when that is committed.
trait Request: Send {
    fn run(&mut self, books: &mut Books<'_>) -> rusqlite::Result<()>;
    fn done(self: Box<Self>, result: Result<(), LedgerError>);
}

struct Task<T, W> {
    work: W,
    value: Option<T>,
    answer: oneshot::Sender<Result<T, LedgerError>>,
}

impl<T: Send, W: FnMut(&mut Books<'_>) -> rusqlite::Result<T> + Send> Request for Task<T, W> {
    fn run(&mut self, books: &mut Books<'_>) -> rusqlite::Result<()> {
        self.value = Some((self.work)(books)?);
        Ok(())
    }

    fn done(self: Box<Self>, result: Result<(), LedgerError>) {
        let Self { value, answer, .. } = *self;
        // Whoever asked and has gone away does not need the answer.
        drop(answer.send(result.and_then(|()| value.ok_or(LedgerError::Ended))));
    }
}

impl Ledger {
    /// Opens the ledger, or makes it.
    ///
    /// # Errors
    ///
    /// [`LedgerError`]: the file can't be read or written, or a newer version wrote it.
    pub fn open(path: &Path) -> Result<Opened, LedgerError> {
        make_private(path).map_err(LedgerError::Create)?;
        let mut connection = Connection::open(path)?;
        connection.busy_timeout(BUSY)?;
        connection.pragma_update(None, "journal_mode", "wal")?;
        connection.pragma_update(None, "synchronous", "full")?;
        schema::prepare(&mut connection, path)?;
        parked::heal(&connection, now())?;
        let progress = load_progress(&connection)?;
        let floor = floor(&connection, &progress)?;
        let (ledger, thread) = Self::start(connection, None)?;
        Ok(Opened { ledger, progress, floor, thread })
    }

    /// A lane's own way in.
    pub fn account(&self, lane: &str) -> Account {
        Account::of_one(self.clone(), lane)
    }

    fn start(
        mut connection: Connection,
        mut commit: Option<Box<dyn Commit>>,
    ) -> Result<(Self, JoinHandle<()>), LedgerError> {
        let (requests, queue) = sync_channel(QUEUE);
        let run = move || serve(&mut connection, &mut commit, &queue);
        let thread = std::thread::Builder::new().name("ledger".to_owned()).spawn(run).map_err(LedgerError::Thread)?;
        Ok((Self { requests }, thread))
    }

    /// Writes a lane's progress, together with what it passes, or changes alone; which dead letters were exhumed: others
    /// were gone by then. Durable on return.
    ///
    /// # Errors
    ///
    /// [`LedgerError`]: nothing has changed; it can be tried again.
    pub async fn settle(
        &self,
        lane: &str,
        progress: Option<Progress>,
        changes: Vec<Change>,
    ) -> Result<HashSet<i64>, LedgerError> {
        let lane = lane.to_owned();
        self.run(move |books| changes::settle(books, &lane, progress.as_ref(), &changes, now())).await
    }

    /// Writes where lanes begin, and the rules that they follow from there on: all of it, or nothing.
    ///
    /// # Errors
    ///
    /// [`LedgerError`]: nothing has changed.
    pub async fn begin(&self, lanes: HashMap<String, Progress>, rules: Option<RulesKept>) -> Result<(), LedgerError> {
        let begin = move |books: &mut Books<'_>| {
            for (lane, at) in &lanes {
                changes::settle(books, lane, Some(at), &[], now())?;
            }
            rules.as_ref().map_or(Ok(()), |rules| changes::keep_rules(&books.transaction, rules))
        };
        self.run(begin).await
    }

    /// The rules that were kept, each with its number, in order.
    ///
    /// # Errors
    ///
    /// [`LedgerError`].
    pub async fn rules(&self) -> Result<Vec<(i64, String)>, LedgerError> {
        self.run(|books| changes::rules(&books.transaction)).await
    }

    /// The lanes that have something parked.
    ///
    /// # Errors
    ///
    /// [`LedgerError`].
    pub async fn lanes_with_parked(&self) -> Result<Vec<String>, LedgerError> {
        self.run(|books| parked::lanes(&books.transaction)).await
    }

    /// [`Ledger::settle`] for a lane that may have gone elsewhere by the time that it is its turn: then nothing is written.
    async fn settle_held(
        &self,
        lane: Arc<str>,
        held: Arc<AtomicBool>,
        progress: Progress,
        changes: Vec<Change>,
    ) -> Result<HashSet<i64>, LedgerError> {
        let settle = move |books: &mut Books<'_>| match held.load(Ordering::Acquire) {
            true => changes::settle(books, &lane, Some(&progress), &changes, now()),
            false => Ok(HashSet::new()),
        };
        self.run(settle).await
    }

    /// How far a lane has come, if it is known.
    ///
    /// # Errors
    ///
    /// [`LedgerError`].
    pub async fn progress(&self, lane: &str) -> Result<Option<Progress>, LedgerError> {
        let lane = lane.to_owned();
        let known = self.run(move |books| load_progress(&books.transaction)).await?;
        Ok(known.into_iter().find_map(|(name, progress)| (name == lane).then_some(progress)))
    }

    /// A lane's parked deliveries that are due.
    ///
    /// # Errors
    ///
    /// [`LedgerError`]; it can be tried again.
    pub async fn due(&self, lane: &str, wanted: Wanted) -> Result<Due, LedgerError> {
        let lane = lane.to_owned();
        self.run(move |books| parked::due(&books.transaction, &lane, &wanted)).await
    }

    /// How many parked deliveries a lane has of each key.
    ///
    /// # Errors
    ///
    /// [`LedgerError`].
    pub async fn parked_keys(&self, lane: &str) -> Result<Vec<(Option<String>, usize)>, LedgerError> {
        let lane = lane.to_owned();
        self.run(move |books| parked::keys(&books.transaction, &lane)).await
    }

    /// Sees to it that a lane's parked deliveries are ordered by this: what was parked by another order gets the key that
    /// `key` finds in its record. Costs nothing where the order is the same.
    ///
    /// # Errors
    ///
    /// [`LedgerError`]: nothing has changed.
    pub async fn order_parked(
        &self,
        lane: &str,
        order_by: &'static str,
        key: impl Fn(&Bytes) -> Option<String> + Send + 'static,
    ) -> Result<(), LedgerError> {
        let lane = lane.to_owned();
        self.run(move |books| changes::order_parked(&books.transaction, &lane, order_by, &key)).await
    }

    /// Makes dead letters of the parked deliveries of a lane that is no more, and forgets its progress; how many there
    /// were.
    ///
    /// # Errors
    ///
    /// [`LedgerError`]: nothing has changed.
    pub async fn close_lane(&self, lane: &str) -> Result<usize, LedgerError> {
        let lane = lane.to_owned();
        self.run(move |books| changes::close_lane(&books.transaction, &lane, now())).await
    }

    /// Discards dead letters; how many there were.
    ///
    /// # Errors
    ///
    /// [`LedgerError`]: nothing has changed.
    pub async fn discard(&self, ids: Vec<i64>) -> Result<usize, LedgerError> {
        self.run(move |books| {
            let mut delete = books.transaction.prepare_cached("DELETE FROM dead_letters WHERE id = ?1")?;
            ids.iter().map(|id| delete.execute([id])).sum()
        })
        .await
    }

    /// Ends the thread when what is queued is done. Requests after that fail. Blocks while the queue is full.
    pub fn close(&self) {
        // If the thread has ended already, there is nothing to end.
        drop(self.requests.send(Message::Close));
    }

    async fn run<T: Send + 'static>(
        &self,
        work: impl FnMut(&mut Books<'_>) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, LedgerError> {
        let (answer, result) = oneshot::channel();
        let task = Message::Request(Box::new(Task { work, value: None, answer }));
        // Lanes ask for one thing at a time, so that the queue is full only while the disk hangs; the lane waits
        // elsewhere then.
        let requests = self.requests.clone();
        let sent = match requests.try_send(task) {
            Ok(()) => true,
            Err(TrySendError::Full(task)) => {
                tokio::task::spawn_blocking(move || requests.send(task)).await.is_ok_and(|sent| sent.is_ok())
            }
            Err(TrySendError::Disconnected(_)) => false,
        };
        if !sent {
            return Err(LedgerError::Ended);
        }
        result.await.unwrap_or(Err(LedgerError::Ended))
    }
}

/// The time as the ledger writes it.
pub fn now() -> Millis {
    millis(SystemTime::now())
}

/// A time as the ledger writes it.
pub fn millis(time: SystemTime) -> Millis {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
    Millis::try_from(since).unwrap_or(Millis::MAX)
}

fn load_progress(connection: &Connection) -> rusqlite::Result<HashMap<String, Progress>> {
    let mut statement = connection.prepare("SELECT lane, position, ahead FROM cursors")?;
    let rows = statement.query_map([], |row| {
        let (cursor, ahead): (_, Vec<u8>) = (Position::from_stored(row.get(1)?), row.get(2)?);
        Ok((row.get(0)?, Progress::decode(cursor, &ahead)))
    })?;
    rows.collect()
}

/// Above every position that the ledger knows. An event that got one of them a second time would be taken for one that was
/// settled ahead of a cursor, or its dead letter would replace another. A parked event may be one that its lane has not read.
fn floor(connection: &Connection, progress: &HashMap<String, Progress>) -> rusqlite::Result<Position> {
    let kept = "SELECT max(position) FROM (SELECT max(position) AS position FROM parked
                                           UNION ALL SELECT max(position) FROM dead_letters)";
    let kept: Option<i64> = connection.query_row(kept, [], |row| row.get(0))?;
    let ahead = progress.values().filter_map(|progress| progress.ahead.last()).map(|last| last.to_stored());
    let after = ahead.chain(kept).map(|last| Position::from_stored(last.saturating_add(1)));
    let cursors = progress.values().map(|progress| progress.cursor);
    Ok(after.chain(cursors).max().unwrap_or(Position::ZERO))
}

/// Takes what has gathered, does it in one transaction, and answers; until it is told to end.
fn serve(connection: &mut Connection, commit: &mut Option<Box<dyn Commit>>, queue: &Receiver<Message>) {
    let mut open = true;
    while open && let Ok(first) = queue.recv() {
        let mut requests = Vec::new();
        if let Some(commit) = commit {
            commit.pace();
        }
        for message in std::iter::once(first).chain(queue.try_iter().take(QUEUE)) {
            match message {
                Message::Request(request) => requests.push(request),
                Message::Close => open = false,
            }
        }
        let result = transact(connection, commit, &mut requests);
        for request in requests {
            request.done(result.clone().map_err(LedgerError::Failed));
        }
    }
}

fn transact(
    connection: &mut Connection,
    commit: &mut Option<Box<dyn Commit>>,
    requests: &mut [Box<dyn Request>],
) -> Result<(), String> {
    if requests.is_empty() {
        return Ok(());
    }
    let failed = |error: rusqlite::Error| {
        if let Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) = error.sqlite_error_code() {
            tracing::error!(%error, "the ledger is damaged: stop the relay and run `engage-relay fsck --repair`");
        }
        error.to_string()
    };
    if let Some(commit) = commit {
        commit.begin();
    }
    let transaction = connection.transaction().map_err(failed)?;
    let mut books = Books { transaction, written: commit.is_some().then(Vec::new) };
    requests.iter_mut().try_for_each(|request| request.run(&mut books)).map_err(failed)?;
    if let (Some(commit), Some(written)) = (commit, books.written)
        && !written.is_empty()
    {
        commit.commit(&written)?;
    }
    books.transaction.commit().map_err(failed)
}

/// Makes the file, if there is none, so that only its owner reads it: it holds what people were sent. What SQLite puts
/// beside it is as the file is.
fn make_private(path: &Path) -> io::Result<()> {
    let file = OpenOptions::new().append(true).create(true).mode(0o600).open(path)?;
    if file.metadata()?.mode() & 0o077 != 0 {
        // It may be somebody else's, who lets others in on purpose.
        drop(file.set_permissions(Permissions::from_mode(0o600)));
    }
    Ok(())
}

/// Why the ledger did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// The file can't be made, or not written.
    #[error("the ledger can't be opened")]
    Create(#[source] io::Error),
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
    /// It can't be read where it is, and not be copied either.
    #[error("the ledger can't be copied to a temporary folder (TMPDIR)")]
    Copy(#[source] io::Error),
    /// A file could not be moved to where it belongs.
    #[error("files of the ledger can't be moved")]
    Move(#[source] io::Error),
    /// No thread could be started.
    #[error("the ledger's thread can't be started")]
    Thread(#[source] io::Error),
    /// The thread has ended.
    #[error("the ledger is closed")]
    Ended,
}

#[cfg(test)]
mod tests;
