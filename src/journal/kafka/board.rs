//! What replicas tell each other: names and values in the topic `<prefix>.control`, of which each replica has a copy.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use rdkafka::error::KafkaError;
use rdkafka::message::{BorrowedMessage, Message as _};
use tokio::sync::watch;

use super::{Config, OpenError, Reception};
use crate::kafka::{Follower, Producer, Record, SendError};

/// How many notes are taken together.
const BATCH: usize = 100;
/// How long the brokers may take to answer.
const TIMEOUT: Duration = Duration::from_secs(10);

/// A copy of what was told, and the way to tell more. Clones share it.
#[derive(Clone)]
pub struct Board(Arc<Shared>);

struct Shared {
    notes: Arc<Mutex<Notes>>,
    changed: watch::Receiver<u64>,
    producer: Producer,
    reception: Reception,
    topic: String,
    stopped: Arc<AtomicBool>,
}

#[derive(Default)]
struct Notes {
    values: BTreeMap<String, Note>,
    /// When the last of them was told, in milliseconds, by the broker's clock.
    latest: i64,
}

/// What was told.
#[derive(Clone, Debug)]
pub struct Note {
    /// The value.
    pub value: Vec<u8>,
    /// How long before the latest note of all this was told.
    pub age: Duration,
    at: i64,
}

impl Board {
    /// Reads what was told so far. Where brokers take what is told, `reception` hears of it.
    ///
    /// # Errors
    ///
    /// [`OpenError`]: the brokers don't answer.
    pub async fn open(config: &Config, reception: Reception) -> Result<Self, OpenError> {
        let topic = config.control();
        let client = config.consumer(&config.group("control.reader"));
        let mut follower = Follower::new(client, topic.clone(), 1)?;
        let producer = config.producer();
        let (notes, stopped) = (Arc::<Mutex<Notes>>::default(), Arc::new(AtomicBool::new(false)));
        let (change, changed) = watch::channel(0);
        let (noting, stop) = (Arc::clone(&notes), Arc::clone(&stopped));
        let follow = move || {
            while !stop.load(Ordering::Relaxed) {
                follower.follow(BATCH, |message| {
                    lock(&noting).take(message);
                    change.send_modify(|changes| *changes += 1);
                });
            }
        };
        let thread = std::thread::Builder::new().name("control".to_owned()).spawn(follow);
        thread.map_err(|error| KafkaError::ClientCreation(error.to_string()))?;
        let board = Self(Arc::new(Shared { notes, changed, producer, reception, topic, stopped }));
        board.catch_up(config).await?;
        Ok(board)
    }

    /// Tells a value, or that there is none any more; durable on return.
    ///
    /// # Errors
    ///
    /// The brokers don't confirm it.
    pub async fn tell(&self, name: &str, value: Option<&[u8]>) -> Result<(), SendError> {
        let record = Record {
            topic: self.0.topic.clone(),
            partition: Some(0),
            key: Some(name.to_owned()),
            headers: Vec::new(),
            body: value.map(Bytes::copy_from_slice),
        };
        self.0.producer.send(&record).await?;
        self.0.reception.taken();
        Ok(())
    }

    /// The value of that name.
    pub fn has(&self, name: &str) -> bool {
        lock(&self.0.notes).values.contains_key(name)
    }

    /// All values whose names begin so, by the rest of their names.
    pub fn under(&self, prefix: &str) -> Vec<(String, Note)> {
        let notes = lock(&self.0.notes);
        let under = notes.values.range(prefix.to_owned()..).take_while(|(name, _)| name.starts_with(prefix));
        let rest = |name: &String| name.strip_prefix(prefix).unwrap_or_default().to_owned();
        under.map(|(name, note)| (rest(name), note.clone().aged(notes.latest))).collect()
    }

    /// Says whenever something was told.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.0.changed.clone()
    }

    /// Waits until all that was told before is noted: it is, when what is told now is.
    async fn catch_up(&self, config: &Config) -> Result<(), OpenError> {
        let name = format!("joined/{:016x}", rand::random::<u64>());
        let unreachable = |reason: String| OpenError::Unreachable { brokers: config.brokers.join(", "), reason };
        self.tell(&name, Some(b"")).await.map_err(|error| unreachable(error.to_string()))?;
        let mut changed = self.watch();
        let noted = changed.wait_for(|_| self.has(&name));
        if tokio::time::timeout(TIMEOUT * 3, noted).await.is_err() {
            return Err(unreachable(KafkaError::NoMessageReceived.to_string()));
        }
        self.tell(&name, None).await.map_err(|error| unreachable(error.to_string()))
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::Relaxed);
    }
}

impl Notes {
    fn take(&mut self, message: &BorrowedMessage<'_>) {
        let Some(name) = message.key().and_then(|key| std::str::from_utf8(key).ok()) else { return };
        let at = message.timestamp().to_millis().unwrap_or(0);
        self.latest = self.latest.max(at);
        match message.payload() {
            Some(value) => {
                let note = Note { value: value.to_vec(), age: Duration::ZERO, at };
                self.values.insert(name.to_owned(), note);
            }
            None => drop(self.values.remove(name)),
        }
    }
}

impl Note {
    fn aged(self, latest: i64) -> Self {
        Self { age: Duration::from_millis(u64::try_from(latest.saturating_sub(self.at)).unwrap_or(0)), ..self }
    }
}

fn lock(notes: &Mutex<Notes>) -> MutexGuard<'_, Notes> {
    notes.lock().unwrap_or_else(PoisonError::into_inner)
}
