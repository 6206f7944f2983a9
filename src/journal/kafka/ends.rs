//! How far the partitions go: asked of the brokers about once a second.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rdkafka::config::FromClientConfigAndContext;
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::{Offset, TopicPartitionList};
use tokio::sync::watch;
use tracing::debug;

use super::{Config, OpenError};
use crate::journal::Position;
use crate::kafka::Log;

const INTERVAL: Duration = Duration::from_secs(1);
const TIMEOUT: Duration = Duration::from_secs(5);

/// The partitions' ends. Clones share them; the last one to go ends the asking.
#[derive(Clone)]
pub struct Ends(Arc<Watched>);

struct Watched {
    ends: Arc<Vec<watch::Sender<Position>>>,
    stopped: Arc<AtomicBool>,
}

impl Ends {
    pub(super) fn watch(config: &Config, partitions: i32) -> Result<Self, OpenError> {
        let mut client = config.consumer(&config.group("ends"));
        client.set("isolation.level", "read_uncommitted");
        let consumer = BaseConsumer::from_config_and_context(&client, Log::default())?;
        let ends: Arc<Vec<_>> = Arc::new((0..partitions).map(|_| watch::Sender::new(Position::ZERO)).collect());
        let stopped = Arc::new(AtomicBool::new(false));
        let watched = Watched { ends: Arc::clone(&ends), stopped: Arc::clone(&stopped) };
        let topic = config.events();
        let ask = move || {
            while !stopped.load(Ordering::Relaxed) {
                // One request to each broker. A partition that nobody leads makes all fail.
                if ask_for(&consumer, &topic, &ends, 0..partitions).is_err() {
                    // Or else one that had no leader for a moment is taken to have none for many minutes.
                    if let Err(error) = consumer.fetch_metadata(Some(&topic), TIMEOUT) {
                        debug!(%error, "brokers do not say who leads");
                    }
                    for partition in 0..partitions {
                        if let Err(error) = ask_for(&consumer, &topic, &ends, [partition]) {
                            debug!(partition, %error, "the end of a partition is not known");
                        }
                    }
                }
                // Callbacks, and the log.
                drop(consumer.poll(Duration::ZERO));
                std::thread::sleep(INTERVAL);
            }
        };
        let spawned = std::thread::Builder::new().name("kafka-ends".to_owned()).spawn(ask);
        spawned.map_err(|error| KafkaError::ClientCreation(error.to_string()))?;
        Ok(Self(Arc::new(watched)))
    }

    /// How many partitions there are.
    pub fn partitions(&self) -> usize {
        self.0.ends.len()
    }

    pub(super) fn count(&self) -> i32 {
        i32::try_from(self.partitions()).unwrap_or(i32::MAX)
    }

    /// All ends together: how many entries there ever were.
    pub fn total(&self) -> u64 {
        self.0.ends.iter().map(|end| end.borrow().0).sum()
    }

    /// A partition's end, as far as is known.
    pub fn of(&self, partition: i32) -> Option<&watch::Sender<Position>> {
        of(&self.0.ends, partition)
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::Relaxed);
    }
}

fn of(ends: &[watch::Sender<Position>], partition: i32) -> Option<&watch::Sender<Position>> {
    ends.get(usize::try_from(partition).ok()?)
}

/// Notes the ends of these partitions; fails if one of them is not known.
fn ask_for(
    consumer: &BaseConsumer<Log>,
    topic: &str,
    ends: &[watch::Sender<Position>],
    partitions: impl IntoIterator<Item = i32>,
) -> KafkaResult<()> {
    let mut list = TopicPartitionList::new();
    for partition in partitions {
        // In the place of a timestamp: the latest.
        list.add_partition_offset(topic, partition, Offset::End)?;
    }
    for found in consumer.offsets_for_times(list, TIMEOUT)?.elements() {
        found.error()?;
        if let Offset::Offset(end) = found.offset()
            && let Some(known) = of(ends, found.partition())
        {
            advance(known, Position::from_stored(end));
        }
    }
    Ok(())
}

/// An end does not go back.
pub(super) fn advance(end: &watch::Sender<Position>, to: Position) {
    end.send_if_modified(|end| {
        let further = to > *end;
        if further {
            *end = to;
        }
        further
    });
}

#[cfg(test)]
mod tests {
    use rdkafka::ClientConfig;
    use rdkafka::mocking::MockCluster;
    use rdkafka::producer::{FutureProducer, FutureRecord};

    use super::super::tests::config_of;
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);

    #[tokio::test(flavor = "multi_thread")]
    async fn a_partition_that_nobody_leads_hides_no_other() {
        let cluster = MockCluster::new(1).unwrap();
        cluster.create_topic("p.events", 3, 1).unwrap();
        let config = config_of(&cluster);
        let mut client = ClientConfig::new();
        let producer: FutureProducer = client.set("bootstrap.servers", cluster.bootstrap_servers()).create().unwrap();
        for partition in [0, 1, 1, 2, 2, 2] {
            let record = FutureRecord::<str, str>::to("p.events").partition(partition).payload("a");
            producer.send(record, PATIENCE).await.unwrap();
        }
        cluster.partition_leader("p.events", 1, None).unwrap();
        let ends = Ends::watch(&config, 3).unwrap();
        let come = async |partition, count| {
            let mut end = ends.of(partition).unwrap().subscribe();
            tokio::time::timeout(PATIENCE, end.wait_for(|end| *end == Position(count))).await.expect("an end").unwrap();
        };
        come(0, 1).await;
        come(2, 3).await;
        assert_eq!(*ends.of(1).unwrap().borrow(), Position::ZERO);
        cluster.partition_leader("p.events", 1, Some(1)).unwrap();
        come(1, 2).await;
        assert_eq!(ends.total(), 6);
    }
}
