//! Reading one partition on. All partitions that a sink has here are read by one client, which is made anew where a partition
//! has more and gives nothing.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use rdkafka::config::FromClientConfigAndContext;
use rdkafka::consumer::base_consumer::PartitionQueue;
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::message::{BorrowedMessage, Headers as _, Message as _};
use rdkafka::{Offset, TopicPartitionList};
use tokio::sync::{Notify, watch};
use tracing::{debug, error, warn};

use super::ends::advance;
use super::scan::is_replay;
use super::{Config, Ends};
use crate::journal::{Entry, Position};
use crate::kafka::{GivenUp, Log, Silence};

/// What is there is asked for again only when it was taken, and a moment later: under load each request then brings many
/// entries, where brokers would answer one for every few. With nothing to read, one is waiting at the broker; not for long,
/// since those partitions that were left out of it have to wait for its answer.
const PACE: [(&str, &str); 3] =
    [("queued.min.messages", "1"), ("fetch.queue.backoff.ms", "100"), ("fetch.wait.max.ms", "100")];
/// How often to look whether a partition gives nothing of what it has.
const LOOK: Duration = Duration::from_secs(1);
/// How long a broker may take to tell a new client of such a partition. The group is not served meanwhile.
const TIMEOUT: Duration = Duration::from_secs(2);

/// What reads a sink's partitions.
pub struct Readers {
    config: Config,
    sink: Arc<str>,
    ends: Ends,
    silence: Silence,
    reading: Mutex<Reading>,
}

struct Reading {
    consumer: Arc<BaseConsumer<Log>>,
    /// Where what the partitions give is taken from.
    feeds: BTreeMap<i32, Arc<Feed>>,
    given_up: GivenUp,
    look_at: Instant,
}

/// What a partition gives.
struct Feed {
    queue: Mutex<Queue>,
    supply: Arc<Supply>,
    /// What is read next.
    next: AtomicI64,
    /// Where the partition begins, as far as is known: what was before has been removed.
    begin: AtomicI64,
}

/// Whether there is something in a queue.
#[derive(Default)]
struct Supply {
    filled: Notify,
    /// Whether the queue is empty, and somebody waits.
    is_starved: AtomicBool,
}

/// Where a client puts that.
struct Queue {
    // In this order: a client may end only when its queues have.
    queue: PartitionQueue<Log>,
    _client: Arc<BaseConsumer<Log>>,
}

/// Reads those entries of a partition that are for one sink.
pub struct Reader {
    feed: Arc<Feed>,
    sink: Arc<str>,
    partition: i32,
    next: Position,
    /// What was taken from the queue and not handed out.
    ahead: Option<Read>,
    end: watch::Sender<Position>,
}

/// A record as it was found.
struct Read {
    position: Position,
    bytes: u64,
    /// Nothing if it is for others.
    entry: Option<Entry>,
}

impl Readers {
    /// Nothing is read yet.
    ///
    /// # Errors
    ///
    /// The client can't be made.
    pub fn new(config: &Config, sink: &str, ends: &Ends) -> KafkaResult<Self> {
        let (feeds, given_up) = (BTreeMap::new(), GivenUp::default());
        let reading = Reading { consumer: client(config, sink)?, feeds, given_up, look_at: Instant::now() };
        let (silence, reading) = (Silence::default(), Mutex::new(reading));
        Ok(Self { config: config.clone(), sink: sink.into(), ends: ends.clone(), silence, reading })
    }

    /// Reads a partition from a position on.
    ///
    /// # Errors
    ///
    /// librdkafka refuses it.
    pub fn reader(&self, partition: i32, from: Position) -> KafkaResult<Reader> {
        let end = self.ends.of(partition).ok_or_else(|| unknown(partition))?.clone();
        let supply = Arc::default();
        let mut reading = self.lock();
        let queue = queue(&reading.consumer, &self.config.events(), partition, &supply)?;
        assign(&reading.consumer, &self.config.events(), [(partition, from.to_stored())])?;
        let (next, begin) = (AtomicI64::new(from.to_stored()), AtomicI64::new(0));
        let feed = Arc::new(Feed { queue: Mutex::new(queue), supply, next, begin });
        reading.feeds.insert(partition, Arc::clone(&feed));
        drop(reading);
        self.silence.heard(partition);
        Ok(Reader { feed, sink: Arc::clone(&self.sink), partition, next: from, ahead: None, end })
    }

    /// Reads a partition no longer.
    pub fn stop(&self, partition: i32) {
        let mut reading = self.lock();
        if reading.feeds.remove(&partition).is_none() {
            return;
        }
        let mut list = TopicPartitionList::new();
        list.add_partition(&self.config.events(), partition);
        if let Err(error) = reading.consumer.incremental_unassign(&list) {
            error!(sink = %self.sink, partition, %error, "a partition can't be let go");
        }
    }

    /// Lets librdkafka say what it has to say, and looks after partitions that give nothing. Nothing is read by this; it may
    /// block.
    pub fn serve(&self) {
        let consumer = Arc::clone(&self.lock().consumer);
        drop(consumer.poll(Duration::ZERO));
        // It must not be this one that ends it.
        drop(consumer);
        if let Some((partition, from)) = self.silent() {
            let renewed = client(&self.config, &self.sink).and_then(|client| self.renew(client, partition, from));
            if let Err(error) = renewed {
                // Its broker may be away: then another client finds nothing either.
                debug!(sink = %self.sink, partition, %error, "a partition gives nothing");
            }
        }
    }

    /// A partition that has given nothing for a while, although it has more and somebody waits; and where that begins.
    fn silent(&self) -> Option<(i32, i64)> {
        let now = Instant::now();
        let mut reading = self.lock();
        if now < reading.look_at || reading.given_up.is_full() {
            return None;
        }
        reading.look_at = now + LOOK;
        let silent = |(partition, feed): (&i32, &Arc<Feed>)| {
            let next = feed.next.load(Ordering::Relaxed);
            let has_more = self.ends.of(*partition).is_some_and(|end| end.borrow().to_stored() > next);
            if !has_more || !feed.supply.is_starved.load(Ordering::Relaxed) {
                self.silence.heard(*partition);
                return None;
            }
            self.silence.missed(*partition, now).then_some((*partition, next))
        };
        reading.feeds.iter().find_map(silent)
    }

    /// Reads all partitions by another client, if that one finds more in the silent one.
    fn renew(&self, client: Arc<BaseConsumer<Log>>, silent: i32, from: i64) -> KafkaResult<()> {
        let bounds = client.fetch_watermarks(&self.config.events(), silent, TIMEOUT);
        let mut reading = self.lock();
        let feed = reading.feeds.get(&silent);
        if let (Ok((begin, _)), Some(feed)) = (&bounds, feed) {
            feed.begin.store(*begin, Ordering::Relaxed);
            feed.supply.filled.notify_one();
        }
        // Retention may have removed all that there was.
        let has_more = bounds.as_ref().is_ok_and(|(begin, end)| *end > from.max(*begin));
        // And it may have given something meanwhile, or be another replica's.
        if !has_more || !feed.is_some_and(|feed| feed.is_silent_at(from)) {
            reading.given_up.end(client);
            return bounds.map(drop);
        }
        if let Err(error) = move_to(&client, &self.config.events(), &reading.feeds) {
            reading.given_up.end(client);
            return Err(error);
        }
        let given_up = std::mem::replace(&mut reading.consumer, client);
        reading.given_up.end(given_up);
        drop(reading);
        self.silence.clear();
        warn!(sink = %self.sink, partition = silent, from, "a partition gives nothing of what it has; its consumer is made anew");
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Reading> {
        self.reading.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Feed {
    /// Whether nothing has come since then.
    fn is_silent_at(&self, next: i64) -> bool {
        self.supply.is_starved.load(Ordering::Relaxed) && self.next.load(Ordering::Relaxed) == next
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A client that reads nothing yet.
fn client(config: &Config, sink: &str) -> KafkaResult<Arc<BaseConsumer<Log>>> {
    // The group is never joined: what is read is said by [`assign`].
    let mut client = config.consumer(&config.group(&format!("{sink}.reader")));
    for (name, value) in PACE {
        if !config.options.contains_key(name) {
            client.set(name, value);
        }
    }
    BaseConsumer::from_config_and_context(&client, Log::of_sink(sink)).map(Arc::new)
}

/// Has another client read what is read, each partition from where it is. What the readers take meanwhile they get once
/// more, and pass over.
fn move_to(client: &Arc<BaseConsumer<Log>>, topic: &str, feeds: &BTreeMap<i32, Arc<Feed>>) -> KafkaResult<()> {
    let queue = |(partition, feed): (&i32, &Arc<Feed>)| queue(client, topic, *partition, &feed.supply);
    let queues = feeds.iter().map(queue).collect::<KafkaResult<Vec<_>>>()?;
    assign(client, topic, feeds.iter().map(|(partition, feed)| (*partition, feed.next.load(Ordering::Relaxed))))?;
    for (feed, queue) in feeds.values().zip(queues) {
        *feed.lock() = queue;
        feed.supply.filled.notify_one();
    }
    Ok(())
}

/// Where to take from what a partition gives: made before it is assigned, so that nothing gets into the common queue.
fn queue(consumer: &Arc<BaseConsumer<Log>>, topic: &str, partition: i32, supply: &Arc<Supply>) -> KafkaResult<Queue> {
    let mut queue = consumer.split_partition_queue(topic, partition).ok_or_else(|| unknown(partition))?;
    let supply = Arc::clone(supply);
    queue.set_nonempty_callback(move || {
        supply.is_starved.store(false, Ordering::Relaxed);
        supply.filled.notify_one();
    });
    Ok(Queue { queue, _client: Arc::clone(consumer) })
}

/// Has a client read partitions, each from its offset on.
fn assign(
    consumer: &BaseConsumer<Log>,
    topic: &str,
    partitions: impl IntoIterator<Item = (i32, i64)>,
) -> KafkaResult<()> {
    let mut list = TopicPartitionList::new();
    for (partition, from) in partitions {
        list.add_partition_offset(topic, partition, Offset::Offset(from))?;
    }
    consumer.incremental_assign(&list)
}

fn unknown(partition: i32) -> KafkaError {
    KafkaError::ClientCreation(format!("there is no partition {partition}"))
}

impl Reader {
    pub(in crate::journal) fn position(&self) -> Position {
        self.next
    }

    pub(in crate::journal) fn watch_end(&self) -> watch::Receiver<Position> {
        self.end.subscribe()
    }

    pub(in crate::journal) async fn readable(&mut self) {
        while self.ahead.is_none() {
            match self.take() {
                Ok(Some(read)) => self.ahead = Some(read),
                Ok(None) if self.removed_to().is_some() => return,
                Ok(None) => self.feed.supply.filled.notified().await,
                // It comes again, or is over, when the partition is read.
                Err(_) => return,
            }
        }
    }

    pub(in crate::journal) fn read(
        &mut self,
        max_bytes: u64,
        mut visit: impl FnMut(Position, Entry) -> bool,
    ) -> Result<(), ReadError> {
        let mut left = max_bytes;
        while left > 0 {
            let read = match self.ahead.take() {
                Some(read) => read,
                None => match self.take()? {
                    Some(read) => read,
                    None => {
                        if let Some(begin) = self.removed_to() {
                            self.miss_to(begin);
                        }
                        return Ok(());
                    }
                },
            };
            left = left.saturating_sub(read.bytes);
            let Some(position) = self.pass(read.position) else { continue };
            if let Some(entry) = read.entry
                && !visit(position, entry)
            {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Moves on to what follows `position`; nothing if that was read before.
    fn pass(&mut self, position: Position) -> Option<Position> {
        if position < self.next {
            return None;
        }
        if position > self.next {
            self.miss_to(position);
        }
        self.move_to(Position(position.0 + 1));
        Some(position)
    }

    /// Where the partition begins, if what is read next has been removed.
    fn removed_to(&self) -> Option<Position> {
        Some(Position::from_stored(self.feed.begin.load(Ordering::Relaxed))).filter(|begin| *begin > self.next)
    }

    /// Goes on at a position, without those before it.
    fn miss_to(&mut self, position: Position) {
        let (sink, partition, from) = (&self.sink, self.partition, self.next.to_stored());
        let lost = position.since(self.next);
        error!(%sink, partition, from, lost, "entries are lost from the journal: its topic has not kept them until they were read");
        self.move_to(position);
    }

    fn move_to(&mut self, next: Position) {
        self.next = next;
        self.feed.next.store(next.to_stored(), Ordering::Relaxed);
        advance(&self.end, next);
    }

    fn take(&self) -> Result<Option<Read>, ReadError> {
        let queue = self.feed.lock();
        // Before looking, so that what comes right after is not forgotten.
        self.feed.supply.is_starved.store(true, Ordering::Relaxed);
        let Some(message) = queue.queue.poll(Duration::ZERO) else { return Ok(None) };
        self.feed.supply.is_starved.store(false, Ordering::Relaxed);
        let message = message.map_err(|source| ReadError { partition: self.partition, source })?;
        Ok(Some(self.found(&message)))
    }

    fn found(&self, message: &BorrowedMessage<'_>) -> Read {
        let headers = message.headers();
        let mut addressed = headers.iter().flat_map(|headers| headers.iter());
        let route = addressed.find(|header| header.key == &*self.sink).map(|header| {
            let route = header.value.map(String::from_utf8_lossy).unwrap_or_default();
            Arc::from(&*route)
        });
        let payload = message.payload().unwrap_or_default();
        Read {
            position: Position::from_stored(message.offset()),
            bytes: payload.len() as u64 + 64,
            entry: route.map(|route| Entry {
                record: Bytes::copy_from_slice(payload),
                route: Some(route),
                again_at: is_replay(message).then(|| written_at(message)).flatten(),
            }),
        }
    }
}

fn written_at(message: &BorrowedMessage<'_>) -> Option<SystemTime> {
    let millis = u64::try_from(message.timestamp().to_millis()?).ok()?;
    UNIX_EPOCH.checked_add(Duration::from_millis(millis))
}

/// A partition could not be read.
#[derive(Debug, thiserror::Error)]
#[error("partition {partition} can't be read")]
pub struct ReadError {
    pub(super) partition: i32,
    pub(super) source: KafkaError,
}

#[cfg(test)]
mod tests {
    use rdkafka::ClientConfig;
    use rdkafka::message::{Header, OwnedHeaders};
    use rdkafka::mocking::MockCluster;
    use rdkafka::producer::{FutureProducer, FutureRecord};

    use super::super::tests::config_of;
    use super::*;

    /// Reads the next entry.
    async fn next(reader: &mut Reader) -> (i64, Bytes) {
        let read = async {
            let mut found = None;
            while found.is_none() {
                reader.readable().await;
                let visit = |position: Position, entry: Entry| {
                    found = Some((position.to_stored(), entry.record));
                    false
                };
                reader.read(u64::MAX, visit).unwrap();
            }
            found.unwrap()
        };
        tokio::time::timeout(Duration::from_secs(120), read).await.expect("an entry")
    }

    /// Pausing stands for what librdkafka may do by itself: see [`Silence`].
    #[tokio::test(flavor = "multi_thread")]
    async fn a_partition_that_gives_nothing_is_read_on() {
        let cluster = MockCluster::new(1).unwrap();
        cluster.create_topic("p.events", 2, 1).unwrap();
        let config = config_of(&cluster);
        let mut client = ClientConfig::new();
        let producer: FutureProducer = client.set("bootstrap.servers", cluster.bootstrap_servers()).create().unwrap();
        let send = async |partition, value: &str| {
            let headers = OwnedHeaders::new().insert(Header { key: "s", value: Some("route") });
            let record = FutureRecord::<str, str>::to("p.events").partition(partition).headers(headers).payload(value);
            producer.send(record, Duration::from_secs(60)).await.unwrap();
        };
        let ends = Ends::watch(&config, 2).unwrap();
        let readers = Arc::new(Readers::new(&config, "s", &ends).unwrap());
        let [mut silent, mut other] = [0, 1].map(|partition| readers.reader(partition, Position::ZERO).unwrap());
        let serving = Arc::downgrade(&readers);
        let serve = std::thread::spawn(move || {
            while let Some(readers) = serving.upgrade() {
                readers.serve();
                std::thread::sleep(Duration::from_millis(50));
            }
        });
        send(0, "a").await;
        assert_eq!(next(&mut silent).await, (0, "a".into()));
        let mut list = TopicPartitionList::new();
        list.add_partition("p.events", 0);
        let before = Arc::clone(&readers.lock().consumer);
        before.pause(&list).unwrap();
        // Or else its client does not end.
        drop(list);
        send(0, "b").await;
        send(1, "c").await;
        assert_eq!(next(&mut other).await, (0, "c".into()), "the others go on meanwhile");
        assert_eq!(next(&mut silent).await, (1, "b".into()));
        assert!(!Arc::ptr_eq(&before, &readers.lock().consumer));
        send(1, "d").await;
        assert_eq!(next(&mut other).await, (1, "d".into()), "nothing comes twice");
        // What is read no longer is nobody's business.
        readers.stop(0);
        drop((silent, other, readers));
        serve.join().unwrap();
    }
}
