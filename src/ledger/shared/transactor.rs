//! A producer of transactions, on a thread of its own: librdkafka may stay in a call for ever, whatever time it is given
//! (confluentinc/librdkafka issues 5456 and 5511, open). Then both are left to themselves, and another takes their place,
//! by which the brokers refuse whatever the first might still do.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;

use rdkafka::config::FromClientConfigAndContext;
use rdkafka::consumer::ConsumerGroupMetadata;
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode as Code};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer as _};
use rdkafka::{ClientConfig, TopicPartitionList};
use tracing::warn;

use crate::kafka::{Log, Record};

/// How long each step of a transaction may take, the first of a producer twice that.
const TIMEOUT: Duration = Duration::from_secs(5);
/// How long all of it may take.
const LIMIT: Duration = Duration::from_secs(20);
/// How long to let a full queue empty itself.
const QUEUE_PAUSE: Duration = Duration::from_millis(10);

/// What is written in one transaction.
pub(super) struct Work {
    pub(super) records: Vec<Record>,
    pub(super) offsets: TopicPartitionList,
    /// By which membership of the group.
    pub(super) right: Arc<ConsumerGroupMetadata>,
}

/// Writes transactions, one after the other.
pub(super) struct Transactor {
    work: SyncSender<Work>,
    done: Receiver<KafkaResult<()>>,
    /// Nobody waits any more: nothing may be committed.
    abandoned: Arc<AtomicBool>,
}

impl Transactor {
    /// Makes a producer with its first transaction.
    pub(super) fn start(config: ClientConfig, log: Log) -> KafkaResult<Self> {
        let (work, works) = sync_channel(1);
        let (finished, done) = sync_channel(1);
        let abandoned = Arc::new(AtomicBool::new(false));
        let given_up = Arc::clone(&abandoned);
        let run = move || {
            let mut producer = None;
            while let Ok(work) = works.recv() {
                let result = transact(&mut producer, &config, &log, work, &given_up);
                if finished.send(result).is_err() {
                    break;
                }
            }
        };
        let thread = std::thread::Builder::new().name("transactions".to_owned()).spawn(run);
        thread.map_err(|error| KafkaError::ClientCreation(error.to_string()))?;
        Ok(Self { work, done, abandoned })
    }

    /// Writes a transaction. Gives the transactor back if it can be used again.
    pub(super) fn run(self, work: Work) -> (Option<Self>, KafkaResult<()>) {
        if self.work.send(work).is_err() {
            return (None, Err(KafkaError::Canceled));
        }
        match self.done.recv_timeout(LIMIT) {
            Ok(result) => (Some(self), result),
            Err(RecvTimeoutError::Disconnected) => (None, Err(KafkaError::Canceled)),
            Err(RecvTimeoutError::Timeout) => {
                self.abandoned.store(true, Ordering::Release);
                warn!("a transaction has neither succeeded nor failed in time; going on with another producer");
                (None, Err(KafkaError::Global(Code::OperationTimedOut)))
            }
        }
    }
}

/// The producer stays only where the next transaction can begin with it.
fn transact(
    kept: &mut Option<BaseProducer<Log>>,
    config: &ClientConfig,
    log: &Log,
    work: Work,
    abandoned: &AtomicBool,
) -> KafkaResult<()> {
    let producer = match kept.take() {
        Some(producer) => producer,
        None => {
            let producer: BaseProducer<Log> = BaseProducer::from_config_and_context(config, log.clone())?;
            producer.init_transactions(TIMEOUT * 2)?;
            producer
        }
    };
    producer.begin_transaction()?;
    let filled = fill(&producer, work);
    let result = match filled {
        // What was given up must not come true.
        Ok(()) if abandoned.load(Ordering::Acquire) => return Err(KafkaError::Canceled),
        Ok(()) => producer.commit_transaction(TIMEOUT),
        Err(error) => Err(error),
    };
    match &result {
        Ok(()) => *kept = Some(producer),
        Err(error) if can_abort(error) && producer.abort_transaction(TIMEOUT).is_ok() => *kept = Some(producer),
        // What it has left open is ended by the next.
        Err(_) => {}
    }
    result
}

fn fill(producer: &BaseProducer<Log>, Work { records, offsets, right }: Work) -> KafkaResult<()> {
    records.iter().try_for_each(|record| send(producer, record))?;
    producer.send_offsets_to_transaction(&offsets, &right, TIMEOUT)
}

fn send(producer: &BaseProducer<Log>, record: &Record) -> KafkaResult<()> {
    loop {
        let message = BaseRecord {
            topic: &record.topic,
            partition: record.partition,
            key: record.key.as_deref(),
            payload: record.body.as_deref(),
            headers: record.headers(),
            timestamp: None,
            delivery_opaque: (),
        };
        match producer.send(message) {
            Err((KafkaError::MessageProduction(Code::QueueFull), _)) => producer.poll(QUEUE_PAUSE),
            result => return result.map_err(|(error, _)| error),
        }
    }
}

/// Whether librdkafka can end the transaction in order.
fn can_abort(error: &KafkaError) -> bool {
    match error {
        KafkaError::Transaction(error) => error.txn_requires_abort() && !error.is_fatal(),
        _ => false,
    }
}
