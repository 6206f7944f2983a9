//! Reading all partitions, one after the other, for those who look for entries rather than deliver them.

use std::collections::VecDeque;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use rdkafka::config::FromClientConfigAndContext;
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode as Code};
use rdkafka::message::{BorrowedMessage, Headers as _, Message as _};
use rdkafka::{Offset, TopicPartitionList};
use tokio::sync::watch;

use super::{Config, REPLAYED, ReadError, number_of, place_of};
use crate::journal::{Entry, Position, Start};
use crate::kafka::Log;

/// How long brokers may take to answer, or to give what there is.
const TIMEOUT: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(100);

/// Reads every entry once, whoever it is for, up to where the partitions ended when it began. A position is a partition and
/// an offset in one number. What was sent again is left out: the entry that it repeats is there too.
pub struct Scan {
    consumer: BaseConsumer<Log>,
    topic: String,
    /// What is left to read; the first is being read.
    left: VecDeque<Part>,
    is_assigned: bool,
    end: watch::Sender<Position>,
}

struct Part {
    partition: i32,
    next: i64,
    end: i64,
}

impl Scan {
    /// Blocks, to ask where the partitions begin and end.
    pub(super) fn new(config: &Config, partitions: i32, start: Start) -> KafkaResult<Self> {
        let consumer = BaseConsumer::from_config_and_context(&config.consumer(&config.group("scan")), Log::default())?;
        let (topic, mut left) = (config.events(), VecDeque::new());
        for partition in 0..partitions {
            let (low, end) = consumer.fetch_watermarks(&topic, partition, TIMEOUT)?;
            let next = match start {
                Start::Earliest => low,
                Start::End => end,
                Start::At(position) => {
                    let (first, offset) = place_of(position);
                    match partition.cmp(&first) {
                        std::cmp::Ordering::Less => end,
                        std::cmp::Ordering::Equal => offset.clamp(low, end.max(low)),
                        std::cmp::Ordering::Greater => low,
                    }
                }
                Start::WrittenSince(time) => written_since(&consumer, &topic, partition, time)?.unwrap_or(end),
            };
            left.push_back(Part { partition, next, end });
        }
        let mut scan = Self { consumer, topic, left, is_assigned: false, end: watch::Sender::new(end(partitions)) };
        scan.pass_read();
        Ok(scan)
    }

    pub(in crate::journal) fn position(&self) -> Position {
        self.left.front().map_or(*self.end.borrow(), |part| number_of(part.partition, part.next))
    }

    pub(in crate::journal) fn watch_end(&self) -> watch::Receiver<Position> {
        self.end.subscribe()
    }

    pub(in crate::journal) fn read(
        &mut self,
        max_bytes: u64,
        mut visit: impl FnMut(Position, Entry) -> bool,
    ) -> Result<(), ReadError> {
        let mut left = max_bytes;
        let mut deadline = Instant::now() + TIMEOUT;
        while left > 0
            && let Some(Part { partition, next, .. }) = self.left.front()
        {
            let (partition, next) = (*partition, *next);
            let failed = |source| ReadError { partition, source };
            if !self.is_assigned {
                self.assign(partition, next).map_err(failed)?;
            }
            let Some(message) = self.consumer.poll(POLL) else {
                if Instant::now() >= deadline {
                    return Err(failed(KafkaError::MessageConsumption(Code::OperationTimedOut)));
                }
                continue;
            };
            let message = match message {
                Ok(message) => message,
                // It reconnects by itself.
                Err(_) if Instant::now() < deadline => continue,
                Err(source) => return Err(failed(source)),
            };
            deadline = Instant::now() + TIMEOUT;
            // What is left of the partition before.
            if message.partition() != partition || message.offset() < next {
                continue;
            }
            let position = number_of(partition, message.offset());
            let entry = (!is_replay(&message)).then(|| {
                let record = Bytes::copy_from_slice(message.payload().unwrap_or_default());
                Entry { record, route: None, again_at: None }
            });
            left = left.saturating_sub(message.payload_len() as u64 + 64);
            let offset = message.offset();
            drop(message);
            if let Some(part) = self.left.front_mut() {
                part.next = offset + 1;
            }
            self.pass_read();
            if entry.is_some_and(|entry| !visit(position, entry)) {
                return Ok(());
            }
        }
        Ok(())
    }

    fn assign(&mut self, partition: i32, from: i64) -> KafkaResult<()> {
        let mut list = TopicPartitionList::new();
        list.add_partition_offset(&self.topic, partition, Offset::Offset(from))?;
        self.consumer.assign(&list)?;
        self.is_assigned = true;
        Ok(())
    }

    fn pass_read(&mut self) {
        while self.left.front().is_some_and(|part| part.next >= part.end) {
            self.left.pop_front();
            self.is_assigned = false;
        }
    }
}

/// Where a scan ends: after the last partition.
pub(super) fn end(partitions: i32) -> Position {
    number_of(partitions, 0)
}

/// The offset of the first record that was written since then.
fn written_since(
    consumer: &BaseConsumer<Log>,
    topic: &str,
    partition: i32,
    time: SystemTime,
) -> KafkaResult<Option<i64>> {
    let millis = time.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
    let mut list = TopicPartitionList::new();
    let millis = i64::try_from(millis).unwrap_or(i64::MAX);
    list.add_partition_offset(topic, partition, Offset::Offset(millis))?;
    let found = consumer.offsets_for_times(list, TIMEOUT)?;
    Ok(match found.find_partition(topic, partition).map(|element| element.offset()) {
        Some(Offset::Offset(offset)) => Some(offset),
        _ => None,
    })
}

pub(super) fn is_replay(message: &BorrowedMessage<'_>) -> bool {
    let headers = message.headers();
    headers.iter().flat_map(|headers| headers.iter()).any(|header| header.key == REPLAYED)
}
