//! Writing: one transaction of Kafka for what one of SQLite has changed.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rdkafka::consumer::ConsumerGroupMetadata;
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode as Code};
use rdkafka::{ClientConfig, Offset, TopicPartitionList};
use tracing::warn;

use super::super::{Commit, Written};
use super::Lease;
use super::records;
use super::transactor::{Transactor, Work};
use crate::journal::kafka::{Config, Member};
use crate::kafka::Log;

/// After so long without an end the coordinator aborts a transaction, in milliseconds. Whoever takes a partition over may
/// have to wait for that.
const TRANSACTION_TIMEOUT: &str = "10000";
/// How often there is a transaction at most: each costs the brokers a dozen writes. What lanes ask for meanwhile goes into
/// the next.
const PACE: Duration = Duration::from_millis(200);

/// Writes one sink's transactions.
pub(super) struct Committer {
    config: Config,
    sink: String,
    member: Member,
    lease: Lease,
    /// By which membership of the group the next transaction is written.
    right: Option<Arc<ConsumerGroupMetadata>>,
    /// Of this process alone. A new producer with it ends what the last one has left open.
    transactional_id: String,
    /// Made when it is needed, and again when it has failed for good.
    transactor: Option<Transactor>,
    not_before: Instant,
}

impl Committer {
    pub(super) fn new(config: Config, sink: &str, member: Member, lease: Lease) -> Self {
        let transactional_id = format!("{}.{:016x}", config.group(sink), rand::random::<u64>());
        Self {
            config,
            sink: sink.to_owned(),
            member,
            lease,
            right: None,
            transactional_id,
            transactor: None,
            not_before: Instant::now(),
        }
    }

    fn producer(&self) -> ClientConfig {
        let mut client = self.config.client();
        client
            .set("transactional.id", &self.transactional_id)
            .set("transaction.timeout.ms", TRANSACTION_TIMEOUT)
            .set("message.timeout.ms", TRANSACTION_TIMEOUT)
            .set("linger.ms", "0");
        client
    }

    fn transact(&mut self, written: &[Written]) -> KafkaResult<()> {
        // Whoever has left the group, or was never in it, has nothing to write.
        let right = self.right.take().ok_or(KafkaError::Canceled)?;
        let records = written.iter().filter_map(|written| records::of(&self.config, &self.sink, written));
        let work = Work { records: records.collect(), offsets: self.offsets(written)?, right };
        let transactor = match self.transactor.take() {
            Some(transactor) => transactor,
            None => Transactor::start(self.producer(), Log::of_sink(&self.sink))?,
        };
        let (transactor, result) = transactor.run(work);
        self.transactor = transactor;
        result
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
    fn pace(&mut self) {
        std::thread::sleep(self.not_before.saturating_duration_since(Instant::now()));
    }

    fn begin(&mut self) {
        self.right = self.member.right();
    }

    fn commit(&mut self, written: &[Written]) -> Result<(), String> {
        let begun = Instant::now();
        self.not_before = begun + PACE;
        match self.transact(written) {
            Ok(()) => {
                self.lease.renew(begun);
                Ok(())
            }
            Err(error) if is_of_rebalance(&error) => {
                self.lease.end();
                Err("partitions are being shared out anew".to_owned())
            }
            Err(error) => {
                warn!(sink = self.sink, %error, "a transaction failed");
                Err(error.to_string())
            }
        }
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
