//! Writing: one transaction of Kafka for what one of SQLite has changed.

use std::time::{Duration, Instant};

use rdkafka::config::FromClientConfigAndContext;
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode as Code};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer as _};
use rdkafka::{Offset, TopicPartitionList};
use tracing::{debug, warn};

use super::super::{Commit, Written};
use super::Lease;
use super::records::{self, Record};
use crate::journal::kafka::{Config, Member};
use crate::kafka::Log;

/// How long each step of a transaction may take.
const TIMEOUT: Duration = Duration::from_secs(10);
/// After so long without an end the coordinator aborts a transaction, in milliseconds.
const TRANSACTION_TIMEOUT: &str = "10000";
/// How long to let a full queue empty itself.
const QUEUE_PAUSE: Duration = Duration::from_millis(10);

/// Writes one sink's transactions.
pub(super) struct Committer {
    config: Config,
    sink: String,
    member: Member,
    lease: Lease,
    /// Of this process alone. A new producer with it ends what the last one has left open.
    transactional_id: String,
    /// Made when it is needed, and again when it has failed for good.
    producer: Option<BaseProducer<Log>>,
}

impl Committer {
    pub(super) fn new(config: Config, sink: &str, member: Member, lease: Lease) -> Self {
        let transactional_id = format!("{}.{:016x}", config.group(sink), rand::random::<u64>());
        Self { config, sink: sink.to_owned(), member, lease, transactional_id, producer: None }
    }

    fn make(&self) -> KafkaResult<BaseProducer<Log>> {
        let mut client = self.config.client();
        client
            .set("transactional.id", &self.transactional_id)
            .set("transaction.timeout.ms", TRANSACTION_TIMEOUT)
            .set("message.timeout.ms", TRANSACTION_TIMEOUT)
            .set("linger.ms", "0");
        let producer: BaseProducer<Log> = BaseProducer::from_config_and_context(&client, Log::of_sink(&self.sink))?;
        producer.init_transactions(TIMEOUT * 3)?;
        Ok(producer)
    }

    fn transact(&mut self, written: &[Written]) -> KafkaResult<()> {
        let producer = match self.producer.take() {
            Some(producer) => producer,
            None => self.make()?,
        };
        producer.begin_transaction()?;
        match self.fill(&producer, written).and_then(|()| producer.commit_transaction(TIMEOUT)) {
            Ok(()) => {
                self.producer = Some(producer);
                Ok(())
            }
            Err(error) => {
                if can_abort(&error)
                    && let Err(error) = producer.abort_transaction(TIMEOUT)
                {
                    debug!(sink = self.sink, %error, "a transaction can't be aborted; the next producer does that");
                } else if can_abort(&error) {
                    self.producer = Some(producer);
                }
                Err(error)
            }
        }
    }

    fn fill(&self, producer: &BaseProducer<Log>, written: &[Written]) -> KafkaResult<()> {
        let topics = (self.config.parked(), self.config.dead_letters());
        for record in written.iter().filter_map(|written| records::of(&self.sink, written)) {
            send(producer, if record.is_dead { &topics.1 } else { &topics.0 }, &record)?;
        }
        let offsets = self.offsets(written)?;
        // Whoever has left the group, or was never in it, has nothing to write.
        let metadata = self.member.metadata().ok_or(KafkaError::Canceled)?;
        producer.send_offsets_to_transaction(&offsets, &metadata, TIMEOUT)
    }

    fn offsets(&self, written: &[Written]) -> KafkaResult<TopicPartitionList> {
        let (mut list, topic) = (TopicPartitionList::new(), self.config.events());
        for written in written {
            let Written::Progress { lane, progress } = written else { continue };
            let offset = Offset::Offset(progress.cursor.to_stored());
            let partition = lane.parse().unwrap_or(-1);
            if list.find_partition(&topic, partition).is_none() {
                list.add_partition(&topic, partition);
            }
            list.set_partition_offset(&topic, partition, offset)?;
            if let Some(mut element) = list.find_partition(&topic, partition) {
                element.set_metadata(records::ahead_to_text(progress));
            }
        }
        Ok(list)
    }
}

impl Commit for Committer {
    fn commit(&mut self, written: &[Written]) -> Result<(), String> {
        let begun = Instant::now();
        match self.transact(written) {
            Ok(()) => {
                self.lease.renew(begun);
                Ok(())
            }
            Err(error) if is_of_rebalance(&error) => Err("partitions are being shared out anew".to_owned()),
            Err(error) => {
                warn!(sink = self.sink, %error, "a transaction failed");
                Err(error.to_string())
            }
        }
    }
}

fn send(producer: &BaseProducer<Log>, topic: &str, record: &Record) -> KafkaResult<()> {
    loop {
        let mut message: BaseRecord<'_, str, [u8]> =
            BaseRecord::to(topic).key(record.key.as_str()).partition(record.partition);
        if let Some(value) = &record.value {
            message = message.payload(&value[..]);
        }
        if let Some(headers) = &record.headers {
            message = message.headers(headers.clone());
        }
        match producer.send(message) {
            Err((KafkaError::MessageProduction(Code::QueueFull), _)) => producer.poll(QUEUE_PAUSE),
            result => return result.map_err(|(error, _)| error),
        }
    }
}

/// Whether librdkafka can end the transaction in order. Else the producer is of no use any more: what it has left open is
/// ended by the next.
fn can_abort(error: &KafkaError) -> bool {
    match error {
        KafkaError::Transaction(error) => error.txn_requires_abort() && !error.is_fatal(),
        // Nothing was sent to the coordinator of transactions yet.
        KafkaError::Canceled => true,
        _ => false,
    }
}

/// Whether this replica has no right to the partitions at the moment, which is normal when replicas come and go.
fn is_of_rebalance(error: &KafkaError) -> bool {
    matches!(
        error.rdkafka_error_code(),
        Some(
            Code::IllegalGeneration
                | Code::UnknownMemberId
                | Code::RebalanceInProgress
                | Code::FencedInstanceId
                | Code::UnstableOffsetCommit
        )
    ) || matches!(error, KafkaError::Canceled)
}
