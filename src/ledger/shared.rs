//! The ledger of relays that share a journal on Kafka.
//!
//! A sink's progress is its group's offsets, with what is settled ahead of them as their metadata; what it has parked is in
//! the partitions of `<prefix>.parked` that go with those of the journal, and its dead letters are in
//! `<prefix>.dead-letters`. All of what is settled together moves in one transaction, which the group's coordinator refuses
//! from a replica that has left the group meanwhile. It does not look at who has which partition: that what a lane wanted to
//! write before it went elsewhere is not written later, is seen to here. Writing something again changes nothing: everything has a key.
//! Dead letters that no lane has seen, those of `unrouted`, are written when their events are accepted.
//!
//! `records` is how it looks in Kafka, `commit` and `transactor` write it, `load` reads what another replica has left, `letters` what has died.

mod commit;
mod letters;
mod load;
mod records;
mod transactor;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::Bytes;
use rdkafka::error::KafkaError;
use rusqlite::Connection;

use super::{Account, DeadLetter, Ledger, LedgerError, Progress, Written, changes, schema};
use crate::journal::Position;
use crate::journal::kafka::{Config, Member};
use crate::kafka::{Place, Record};
use commit::Committer;

pub use letters::Letters;

/// How often lanes write mere progress, all of a sink's at about the same time: each transaction costs the brokers a dozen
/// writes.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);

/// One sink's ledger, on this replica.
pub struct Shared {
    config: Config,
    sink: Arc<str>,
    member: Member,
    ledger: Ledger,
    thread: JoinHandle<()>,
    lease: Lease,
}

/// What a lane goes on with.
pub struct Loaded {
    /// How far it has come.
    pub progress: Progress,
    /// How many parked deliveries there are of each key.
    pub parked: Vec<(Option<String>, usize)>,
}

/// What is written for a dead letter that no lane has seen: its event is at this place in the journal.
pub fn dead_letter(topic: &str, sink: &str, place: Place, letter: DeadLetter) -> Record {
    let letter = DeadLetter { position: Position::from_stored(place.offset), ..letter };
    records::of_dead(topic, sink, place.partition, &letter, super::now())
}

/// How long a sink's partitions are certainly this replica's: from the last transaction that was accepted, as long as a
/// member of a group may be silent. Clones share it.
#[derive(Clone)]
pub struct Lease {
    epoch: Instant,
    /// When the last accepted transaction began, in milliseconds since the epoch, and one more; 0: none yet.
    renewed: Arc<AtomicU64>,
    term: Duration,
}

impl Shared {
    /// Nothing is loaded yet.
    ///
    /// # Errors
    ///
    /// [`LedgerError`]: SQLite or the thread can't be started.
    pub fn open(config: &Config, sink: &str, member: Member) -> Result<Self, LedgerError> {
        // A temporary database: it goes to disk where memory does not suffice, and is gone with the process.
        let mut connection = Connection::open("")?;
        schema::prepare(&mut connection, "".as_ref())?;
        // A session ends so long after the last heartbeat, which may have been before the last transaction.
        let session = config.session_timeout();
        let lease = Lease::new(session - config.heartbeat().min(session / 2));
        let committer = Committer::new(config.clone(), sink, member.clone(), lease.clone());
        let (ledger, thread) = Ledger::start(connection, Some(Box::new(committer)))?;
        Ok(Self { config: config.clone(), sink: sink.into(), member, ledger, thread, lease })
    }

    /// The way into the ledger for a partition's lane, for as long as it is not closed.
    pub fn account(&self, partition: i32) -> Account {
        Account::of_many(self.ledger.clone(), &partition.to_string(), self.lease.clone())
    }

    /// Takes over a partition's lane: waits for what whoever had it before has written, and reads it. What is parked gets
    /// the key that `key` finds in its record: it may have been ordered by something else.
    ///
    /// # Errors
    ///
    /// [`LedgerError`]: Kafka does not answer, or another replica has the partition by now.
    pub async fn take_over(
        &self,
        partition: i32,
        account: &Account,
        key: impl Fn(&Bytes) -> Option<String> + Send + 'static,
    ) -> Result<Loaded, LedgerError> {
        let (member, config, sink) = (self.member.clone(), self.config.clone(), Arc::clone(&self.sink));
        let progress = blocking(move || load::progress(&member, partition)).await?;
        let lane = partition.to_string();
        let mark = format!("{:016x}", rand::random::<u64>());
        self.open_lane(&lane, account, progress.clone(), mark.clone()).await?;
        let parked = blocking(move || {
            let mut parked = load::parked(&config, &sink, partition, &mark)?;
            parked.iter_mut().for_each(|parked| parked.key = key(&parked.record));
            Ok(parked)
        });
        let parked = parked.await?;
        let (adopted, heir) = (lane.clone(), account.clone());
        // Once it has gone elsewhere it may have come back, and another lane may be at it.
        let adopt = move |books: &mut super::Books<'_>| match heir.is_closed() {
            true => Ok(()),
            false => changes::adopt(&books.transaction, &adopted, &parked),
        };
        self.ledger.run(adopt).await?;
        let parked = self.ledger.parked_keys(&lane).await?;
        Ok(Loaded { progress, parked })
    }

    /// Makes dead letters of some of what a partition's lane has parked, because its sink is no longer in the rules; how many
    /// there were.
    ///
    /// # Errors
    ///
    /// [`LedgerError`]: nothing has changed.
    pub async fn bury_parked(&self, partition: i32) -> Result<usize, LedgerError> {
        let lane = partition.to_string();
        self.ledger.run(move |books| changes::bury_parked(books, &lane, super::now())).await
    }

    /// Whether the thread has ended, so that nothing is written any more.
    pub fn has_ended(&self) -> bool {
        self.thread.is_finished()
    }

    /// Ends the thread when what is queued is done. Blocks.
    pub fn close(self) {
        self.ledger.close();
        // Its panic has been reported by the thread itself.
        drop(self.thread.join());
    }

    /// Notes where a lane begins, which shows that the partition is ours.
    async fn open_lane(
        &self,
        lane: &str,
        account: &Account,
        progress: Progress,
        mark: String,
    ) -> Result<(), LedgerError> {
        let (lane, account) = (lane.to_owned(), account.clone());
        let open = move |books: &mut super::Books<'_>| {
            if account.is_closed() {
                return Ok(false);
            }
            changes::settle(books, &lane, Some(&progress), &[], super::now())?;
            if let Some(written) = &mut books.written {
                written.push(Written::Opened { lane: lane.clone(), mark: mark.clone() });
            }
            Ok(true)
        };
        match self.ledger.run(open).await? {
            true => Ok(()),
            false => Err(LedgerError::Failed("the partition has gone elsewhere".to_owned())),
        }
    }
}

impl Lease {
    fn new(term: Duration) -> Self {
        Self { epoch: Instant::now(), renewed: Arc::default(), term }
    }

    /// Nothing is certain any more.
    fn end(&self) {
        self.renewed.store(0, Ordering::Relaxed);
    }

    /// A transaction that began then was accepted.
    fn renew(&self, begun: Instant) {
        let millis = begun.saturating_duration_since(self.epoch).as_millis();
        self.renewed.fetch_max(u64::try_from(millis).unwrap_or(0) + 1, Ordering::Relaxed);
    }

    pub(super) fn is_held(&self) -> bool {
        self.age().is_some_and(|age| age < self.term)
    }

    pub(super) fn has_to_renew(&self) -> bool {
        self.age().is_none_or(|age| age > self.term / 2)
    }

    /// Counts the times at which mere progress is written.
    pub(super) fn interval(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.epoch).as_secs() / PROGRESS_INTERVAL.as_secs()
    }

    fn age(&self) -> Option<Duration> {
        let renewed = self.renewed.load(Ordering::Relaxed).checked_sub(1)?;
        Some(self.epoch.elapsed().saturating_sub(Duration::from_millis(renewed)))
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, KafkaError> + Send + 'static,
) -> Result<T, LedgerError> {
    let done = tokio::task::spawn_blocking(work).await.map_err(|error| LedgerError::Failed(error.to_string()))?;
    done.map_err(|error| LedgerError::Failed(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_ends_unless_it_is_renewed() {
        let lease = Lease::new(Duration::from_millis(200));
        assert!(!lease.is_held() && lease.has_to_renew(), "nothing was accepted yet");
        lease.renew(Instant::now());
        assert!(lease.is_held() && !lease.has_to_renew());
        std::thread::sleep(Duration::from_millis(120));
        assert!(lease.has_to_renew());
        std::thread::sleep(Duration::from_millis(100));
        assert!(!lease.is_held());
    }

    #[tokio::test]
    async fn mere_progress_waits_for_the_next_interval() {
        let mut connection = Connection::open("").unwrap();
        schema::prepare(&mut connection, "".as_ref()).unwrap();
        let (ledger, _thread) = Ledger::start(connection, None).unwrap();
        let lease = Lease::new(Duration::from_secs(10));
        let account = Account::of_many(ledger.clone(), "0", lease.clone());
        assert!(account.takes_progress(Instant::now()), "nothing was written yet");
        let progress = Progress { cursor: Position::ZERO, ahead: Vec::new() };
        let before = Instant::now();
        account.settle(progress.clone(), Vec::new()).await.unwrap();
        let after = Instant::now();
        // It may be the next by now.
        assert!(!account.takes_progress(after) || lease.interval(after) > lease.interval(before));
        assert!(account.takes_progress(after + PROGRESS_INTERVAL));
        let alone = Account::of_one(ledger.clone(), "0");
        alone.settle(progress, Vec::new()).await.unwrap();
        assert!(alone.takes_progress(Instant::now()), "it costs little");
        ledger.close();
    }
}
