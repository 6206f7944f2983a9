//! Dead letters of relays that share a journal: each has a copy of all, which is made anew at every start.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rdkafka::error::KafkaError;
use rdkafka::message::Message as _;
use rusqlite::{Connection, OptionalExtension as _, params};
use tokio::sync::watch;
use tokio::time::timeout;
use tracing::{error, warn};

use super::super::changes::bury;
use super::super::{LedgerError, Letters as Reader, schema};
use super::records::{Died, read_dead, removed};
use crate::journal::Position;
use crate::journal::kafka::{Config, number_of};
use crate::kafka::{Follower, Producer, SendError};

/// How many are noted together.
const BATCH: usize = 500;
/// After what could not be noted.
const PAUSE: Duration = Duration::from_secs(1);
/// How long a request waits for the copy to be complete.
const PATIENCE: Duration = Duration::from_secs(10);

/// A copy of all dead letters, and the way to discard them. Clones share it.
#[derive(Clone)]
pub struct Letters(Arc<Kept>);

struct Kept {
    reader: Arc<Mutex<Reader>>,
    /// Whether it has all that was there at the start. Before, it may have what was discarded long ago.
    is_complete: watch::Receiver<bool>,
    /// Of what is discarded.
    producer: Producer,
    topic: String,
    /// Whose turn it is to take some away.
    turn: tokio::sync::Mutex<()>,
    stopped: Arc<AtomicBool>,
}

/// The only request that takes dead letters away, on this replica.
pub struct Turn<'a> {
    kept: &'a Kept,
    _guard: tokio::sync::MutexGuard<'a, ()>,
}

impl Letters {
    /// Begins to read them.
    ///
    /// # Errors
    ///
    /// [`LedgerError`]: a client or the thread can't be started.
    pub fn open(config: &Config, partitions: usize) -> Result<Self, LedgerError> {
        let failed = |error: KafkaError| LedgerError::Failed(error.to_string());
        let mut connection = Connection::open("")?;
        schema::prepare(&mut connection, "".as_ref())?;
        let reader = Arc::new(Mutex::new(Reader::of(connection)));
        let topic = config.dead_letters();
        let client = config.consumer(&config.group("dead-letters.reader"));
        let mut follower = Follower::new(client, topic.clone(), partitions).map_err(failed)?;
        let producer = config.producer();
        let stopped = Arc::new(AtomicBool::new(false));
        let (stop, notes) = (Arc::clone(&stopped), Arc::clone(&reader));
        let (tell_complete, is_complete) = watch::channel(false);
        let follow = move || {
            let mut found = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                follow(&mut follower, &notes, &mut found);
                if found.is_empty() {
                    tell_complete.send_replace(follower.is_complete());
                }
            }
        };
        std::thread::Builder::new().name("dead-letters".to_owned()).spawn(follow).map_err(LedgerError::Thread)?;
        let turn = tokio::sync::Mutex::default();
        Ok(Self(Arc::new(Kept { reader, is_complete, producer, topic, turn, stopped })))
    }

    /// Waits, for a while, until the copy has all that was there at the start; whether it has.
    pub async fn complete(&self) -> bool {
        let mut is_complete = self.0.is_complete.clone();
        timeout(PATIENCE, is_complete.wait_for(|is_complete| *is_complete)).await.is_ok_and(|found| found.is_ok())
    }

    /// Reads the copy, as far as there is one. Blocks.
    pub fn read<T>(&self, read: impl FnOnce(&Reader) -> T) -> T {
        read(&lock(&self.0.reader))
    }

    /// Waits until no other request takes dead letters away, so that each is sent again, or discarded, by one of them.
    pub async fn turn(&self) -> Turn<'_> {
        Turn { kept: &self.0, _guard: self.0.turn.lock().await }
    }
}

impl Turn<'_> {
    /// Those that are still there, of these by number.
    ///
    /// # Errors
    ///
    /// [`LedgerError`].
    pub fn still_there<T>(&self, letters: Vec<(i64, T)>) -> Result<Vec<(i64, T)>, LedgerError> {
        let reader = lock(&self.kept.reader);
        let mut found = Vec::new();
        for (id, letter) in letters {
            if place(reader.connection(), id)?.is_some() {
                found.push((id, letter));
            }
        }
        Ok(found)
    }

    /// Discards dead letters, on all replicas; how many there were.
    ///
    /// # Errors
    ///
    /// [`LedgerError`]: some may be discarded.
    pub async fn discard(&self, ids: Vec<i64>) -> Result<usize, LedgerError> {
        let places: Vec<_> = {
            let reader = lock(&self.kept.reader);
            ids.iter().map(|id| place(reader.connection(), *id)).collect::<Result<Vec<_>, _>>()?
        };
        let places: Vec<_> = places.into_iter().flatten().collect();
        for some in places.chunks(BATCH) {
            let sent = some
                .iter()
                .map(|(sink, position)| self.kept.producer.begin(&removed(&self.kept.topic, sink, *position), None));
            let sent = sent.collect::<Result<Vec<_>, _>>().map_err(refused)?;
            for sent in sent {
                self.kept.producer.arrived(sent).await.map_err(refused)?;
            }
        }
        let reader = lock(&self.kept.reader);
        for (sink, position) in &places {
            remove(reader.connection(), sink, *position)?;
        }
        Ok(places.len())
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::Relaxed);
    }
}

fn refused(error: SendError) -> LedgerError {
    LedgerError::Failed(error.to_string())
}

/// Notes what has come, or first what has come before and could not be noted.
fn follow(follower: &mut Follower, reader: &Mutex<Reader>, found: &mut Vec<(i64, Option<Died>)>) {
    if found.is_empty() {
        follower.follow(BATCH, |message| {
            found.push((number_of(message.partition(), message.offset()).to_stored(), read_dead(message)));
        });
    }
    if found.is_empty() {
        return;
    }
    let noted = note(lock(reader).connection(), found);
    match noted {
        Ok(()) => found.clear(),
        Err(error) => {
            error!(%error, "dead letters can't be noted; trying again");
            std::thread::sleep(PAUSE);
        }
    }
}

fn note(connection: &Connection, found: &[(i64, Option<Died>)]) -> rusqlite::Result<()> {
    let transaction = connection.unchecked_transaction()?;
    for (id, died) in found {
        match died {
            Some(Died { sink, letter: Some((letter, died_at)), .. }) => {
                bury(connection, Some(*id), sink, letter, *died_at)?;
            }
            Some(Died { sink, position, letter: None }) => remove(connection, sink, *position)?,
            None => warn!(id, "a record among the dead letters is none"),
        }
    }
    transaction.commit()
}

/// Whose a dead letter is, and where its event stands.
fn place(connection: &Connection, id: i64) -> rusqlite::Result<Option<(String, Position)>> {
    let mut select = connection.prepare_cached("SELECT lane, position FROM dead_letters WHERE id = ?1")?;
    select.query_row([id], |row| Ok((row.get(0)?, Position::from_stored(row.get(1)?)))).optional()
}

fn remove(connection: &Connection, sink: &str, position: Position) -> rusqlite::Result<()> {
    let mut delete = connection.prepare_cached("DELETE FROM dead_letters WHERE lane = ?1 AND position = ?2")?;
    delete.execute(params![sink, position.to_stored()]).map(drop)
}

fn lock(reader: &Mutex<Reader>) -> MutexGuard<'_, Reader> {
    reader.lock().unwrap_or_else(PoisonError::into_inner)
}
