//! Reading one partition on. All partitions that a sink has here are read by one client.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use rdkafka::config::FromClientConfigAndContext;
use rdkafka::consumer::base_consumer::PartitionQueue;
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::message::{BorrowedMessage, Headers as _, Message as _};
use rdkafka::{Offset, TopicPartitionList};
use tokio::sync::{Notify, watch};
use tracing::error;

use super::ends::advance;
use super::{Config, Ends};
use crate::journal::{Entry, Position};
use crate::kafka::Log;

/// What reads a sink's partitions.
pub struct Readers {
    consumer: Arc<BaseConsumer<Log>>,
    topic: String,
    sink: Arc<str>,
    ends: Ends,
    /// The partitions that are being read.
    read: Mutex<HashSet<i32>>,
}

/// Reads those entries of a partition that are for one sink.
pub struct Reader {
    queue: PartitionQueue<Log>,
    filled: Arc<Notify>,
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
        // The group is never joined: what is read is said by `reader`.
        let client = config.consumer(&config.group(&format!("{sink}.reader")));
        let consumer = Arc::new(BaseConsumer::from_config_and_context(&client, Log::of_sink(sink))?);
        Ok(Self { consumer, topic: config.events(), sink: sink.into(), ends: ends.clone(), read: Mutex::default() })
    }

    /// Reads a partition from a position on.
    ///
    /// # Errors
    ///
    /// librdkafka refuses it.
    pub fn reader(&self, partition: i32, from: Position) -> KafkaResult<Reader> {
        let unknown = || KafkaError::ClientCreation(format!("there is no partition {partition}"));
        let end = self.ends.of(partition).ok_or_else(unknown)?.clone();
        // Before anything is fetched, so that nothing gets into the common queue.
        let mut queue = self.consumer.split_partition_queue(&self.topic, partition).ok_or_else(unknown)?;
        let filled = Arc::new(Notify::new());
        let notify = Arc::clone(&filled);
        queue.set_nonempty_callback(move || notify.notify_one());
        let mut list = TopicPartitionList::new();
        list.add_partition_offset(&self.topic, partition, Offset::Offset(from.to_stored()))?;
        self.consumer.incremental_assign(&list)?;
        self.lock().insert(partition);
        Ok(Reader { queue, filled, sink: Arc::clone(&self.sink), partition, next: from, ahead: None, end })
    }

    /// Reads a partition no longer.
    pub fn stop(&self, partition: i32) {
        if !self.lock().remove(&partition) {
            return;
        }
        let mut list = TopicPartitionList::new();
        list.add_partition(&self.topic, partition);
        if let Err(error) = self.consumer.incremental_unassign(&list) {
            error!(sink = %self.sink, partition, %error, "a partition can't be let go");
        }
    }

    /// Lets librdkafka say what it has to say; nothing is read by this.
    pub fn serve(&self) {
        drop(self.consumer.poll(Duration::ZERO));
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashSet<i32>> {
        self.read.lock().unwrap_or_else(PoisonError::into_inner)
    }
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
                Ok(None) => self.filled.notified().await,
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
                    None => return Ok(()),
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
        let lost = position.since(self.next);
        if lost > 0 {
            let (sink, partition, from) = (&self.sink, self.partition, self.next.to_stored());
            error!(%sink, partition, from, lost, "entries are lost from the journal: its topic has not kept them until they were read");
        }
        self.next = Position(position.0 + 1);
        advance(&self.end, self.next);
        Some(position)
    }

    fn take(&self) -> Result<Option<Read>, ReadError> {
        match self.queue.poll(Duration::ZERO) {
            None => Ok(None),
            Some(Ok(message)) => Ok(Some(self.found(&message))),
            Some(Err(source)) => Err(ReadError { partition: self.partition, source }),
        }
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
            entry: route.map(|route| Entry { record: Bytes::copy_from_slice(payload), route: Some(route) }),
        }
    }
}

/// A partition could not be read.
#[derive(Debug, thiserror::Error)]
#[error("partition {partition} can't be read")]
pub struct ReadError {
    pub(super) partition: i32,
    pub(super) source: KafkaError,
}
