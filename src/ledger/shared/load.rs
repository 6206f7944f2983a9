//! Reading what whoever had a partition before has left.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use rdkafka::config::FromClientConfigAndContext;
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::error::{KafkaError, RDKafkaErrorCode as Code};
use rdkafka::{Offset, TopicPartitionList};
use tracing::error;

use super::super::{Parked, Progress};
use super::records::{Found, ahead_from_text, read_parked};
use crate::journal::Position;
use crate::journal::kafka::{Config, Member};
use crate::kafka::Log;

/// How long reading may take: a transaction that a replica has left open is ended after ten seconds, and looked for every
/// ten.
const TIMEOUT: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(100);

/// How far a partition was settled. One that never was begins with the oldest entry: what is older than its sink is not
/// addressed to it.
pub(super) fn progress(member: &Member, partition: i32) -> Result<Progress, KafkaError> {
    let (oldest, end) = member.bounds(partition)?;
    Ok(match member.committed(partition)? {
        Some((cursor, metadata)) => Progress { cursor: cursor.min(end), ahead: ahead_from_text(cursor, &metadata) },
        None => Progress { cursor: oldest, ahead: Vec::new() },
    })
}

/// What a sink has parked in a partition, in order. Everything up to the mark is there: it was written after the last that
/// anyone else could write.
pub(super) fn parked(config: &Config, sink: &str, partition: i32, mark: &str) -> Result<Vec<Parked>, KafkaError> {
    let client = config.consumer(&config.group(&format!("{sink}.parked")));
    let consumer: BaseConsumer<Log> = BaseConsumer::from_config_and_context(&client, Log::of_sink(sink))?;
    let mut list = TopicPartitionList::new();
    list.add_partition_offset(&config.parked(), partition, Offset::Beginning)?;
    consumer.assign(&list)?;
    let deadline = Instant::now() + TIMEOUT;
    let mut parked: BTreeMap<Position, Parked> = BTreeMap::new();
    while Instant::now() < deadline {
        let Some(message) = consumer.poll(POLL) else { continue };
        match read_parked(sink, &message?) {
            Some(Found::Opened(found)) if found == mark.as_bytes() => return Ok(parked.into_values().collect()),
            Some(Found::Parked(found)) => drop(parked.insert(found.position, *found)),
            Some(Found::Unparked(position)) => drop(parked.remove(&position)),
            Some(Found::Unreadable(position)) => {
                let position = position.to_stored();
                error!(
                    sink,
                    partition,
                    position,
                    "a parked delivery can't be read, and is not made; the event is in the journal still"
                );
            }
            Some(Found::Opened(_)) | None => {}
        }
    }
    Err(KafkaError::OffsetFetch(Code::OperationTimedOut))
}
