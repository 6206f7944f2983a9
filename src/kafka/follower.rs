//! Reading a whole topic on from its beginning, for those who keep a copy of what it says.

use std::time::{Duration, Instant};

use rdkafka::config::FromClientConfigAndContext as _;
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::message::{BorrowedMessage, Message as _};
use rdkafka::{ClientConfig, Offset, TopicPartitionList};
use tracing::{debug, warn};

use super::{GivenUp, Log, Silence};

/// How long to wait for what comes.
const POLL: Duration = Duration::from_millis(200);
/// How often to look whether partitions have more than was read.
const LOOK: Duration = Duration::from_secs(2);
/// In how many looks all partitions have had their turn.
const TURNS: usize = 8;
/// How long a partition's broker may take to say where it ends.
const TIMEOUT: Duration = Duration::from_secs(1);

/// Follows a topic. Its consumer is made anew where a partition has more and gives nothing.
pub struct Follower {
    client: ClientConfig,
    topic: String,
    consumer: BaseConsumer<Log>,
    /// Asks where partitions end: at the other one's connections answers would wait behind those with records.
    asking: BaseConsumer<Log>,
    partitions: Vec<Partition>,
    silence: Silence,
    given_up: GivenUp,
    look_at: Instant,
    /// The partition to look at.
    next: i32,
}

/// What is known of a partition.
#[derive(Clone, Copy, Default)]
struct Partition {
    /// Up to where its records were read.
    read_to: i64,
    /// Where it ended when it last said that it has no more. Behind the last record may be what only brokers need: where
    /// transactions ended.
    end: i64,
    /// Whether it has said so yet.
    has_ended: bool,
}

impl Follower {
    /// Begins with the oldest records of so many partitions.
    ///
    /// # Errors
    ///
    /// The client can't be made.
    pub fn new(mut client: ClientConfig, topic: String, partitions: usize) -> KafkaResult<Self> {
        client.set("enable.partition.eof", "true");
        let partitions = vec![Partition::default(); partitions];
        let consumer = assigned(&client, &topic, &partitions)?;
        let asking = BaseConsumer::from_config_and_context(&client, Log::default())?;
        let (silence, given_up, look_at) = (Silence::default(), GivenUp::default(), Instant::now() + LOOK);
        Ok(Self { client, topic, consumer, asking, partitions, silence, given_up, look_at, next: 0 })
    }

    /// Hands what has come to `note`, up to `most` records; waits a moment for the first. Blocks.
    pub fn follow(&mut self, most: usize, mut note: impl FnMut(&BorrowedMessage<'_>)) {
        self.look();
        let mut patience = POLL;
        for _ in 0..most {
            match self.consumer.poll(patience) {
                None => return,
                Some(Ok(message)) => {
                    note(&message);
                    let index = message.partition();
                    self.silence.heard(index);
                    if let Some(partition) = of(&mut self.partitions, index) {
                        partition.read_to = message.offset() + 1;
                    }
                }
                Some(Err(KafkaError::PartitionEOF(index))) => {
                    self.silence.heard(index);
                    let end = self.end(index);
                    if let Some(partition) = of(&mut self.partitions, index) {
                        partition.has_ended = true;
                        partition.end = end.unwrap_or(partition.end);
                    }
                }
                // It reconnects by itself.
                Some(Err(error)) => debug!(topic = self.topic, %error, "can't be read at present"),
            }
            patience = Duration::ZERO;
        }
    }

    /// Whether all was read that was there at the beginning.
    pub fn is_complete(&self) -> bool {
        self.partitions.iter().all(|partition| partition.has_ended)
    }

    /// Where a partition ends; nothing if its broker does not say.
    fn end(&self, partition: i32) -> Option<i64> {
        self.asking.fetch_watermarks(&self.topic, partition, TIMEOUT).ok().map(|(_, end)| end)
    }

    /// Looks at some partitions, if it is time to.
    fn look(&mut self) {
        if Instant::now() < self.look_at {
            return;
        }
        // Callbacks, and the log.
        drop(self.asking.poll(Duration::ZERO));
        for _ in 0..self.partitions.len().div_ceil(TURNS) {
            let index = self.next;
            let Some(Partition { read_to, end: passed, .. }) = of(&mut self.partitions, index).copied() else { break };
            self.next += 1;
            match self.end(index) {
                Some(end) if end > read_to.max(passed) => {
                    if self.silence.missed(index, Instant::now()) {
                        self.renew(index);
                    }
                }
                Some(_) => self.silence.heard(index),
                // Nobody can say. The others wait for the next look, so that this one does not take too long.
                None => {
                    self.silence.heard(index);
                    break;
                }
            }
        }
        if of(&mut self.partitions, self.next).is_none() {
            self.next = 0;
        }
        self.look_at = Instant::now() + LOOK;
    }

    fn renew(&mut self, partition: i32) {
        if self.given_up.is_full() {
            return;
        }
        match assigned(&self.client, &self.topic, &self.partitions) {
            Ok(consumer) => {
                self.given_up.end(std::mem::replace(&mut self.consumer, consumer));
                self.silence.clear();
                let topic = &self.topic;
                warn!(topic, partition, "a partition gives nothing of what it has; the consumer is made anew");
            }
            Err(error) => warn!(topic = self.topic, partition, %error, "a consumer can't be made anew"),
        }
    }
}

fn of(partitions: &mut [Partition], index: i32) -> Option<&mut Partition> {
    partitions.get_mut(usize::try_from(index).ok()?)
}

/// A consumer of all partitions, each from where it was read to.
fn assigned(client: &ClientConfig, topic: &str, partitions: &[Partition]) -> KafkaResult<BaseConsumer<Log>> {
    let consumer: BaseConsumer<Log> = BaseConsumer::from_config_and_context(client, Log::default())?;
    let mut list = TopicPartitionList::new();
    for (index, partition) in (0..).zip(partitions) {
        let from = if partition.read_to == 0 { Offset::Beginning } else { Offset::Offset(partition.read_to) };
        list.add_partition_offset(topic, index, from)?;
    }
    consumer.assign(&list)?;
    Ok(consumer)
}

#[cfg(test)]
mod tests {
    use rdkafka::mocking::MockCluster;
    use rdkafka::producer::{DefaultProducerContext, FutureProducer, FutureRecord};

    use super::*;

    /// A cluster with the topic `copied`, a client of it, and a producer.
    fn cluster(partitions: i32) -> (MockCluster<'static, DefaultProducerContext>, ClientConfig, FutureProducer) {
        let cluster = MockCluster::new(1).unwrap();
        cluster.create_topic("copied", partitions, 1).unwrap();
        let mut client = ClientConfig::new();
        client.set("bootstrap.servers", cluster.bootstrap_servers()).set("group.id", "copy");
        let producer = client.create().unwrap();
        (cluster, client, producer)
    }

    async fn send(producer: &FutureProducer, partition: i32, value: &str) {
        let record = FutureRecord::<str, str>::to("copied").partition(partition).payload(value);
        producer.send(record, Duration::from_secs(60)).await.unwrap();
    }

    /// Pausing stands for what librdkafka may do by itself: see [`super::super::silence`].
    #[tokio::test(flavor = "multi_thread")]
    async fn a_partition_that_gives_nothing_is_read_on() {
        let (_cluster, client, producer) = cluster(2);
        let mut follower = Follower::new(client, "copied".to_owned(), 2).unwrap();
        let mut followed = Vec::new();
        let mut follow_until = |follower: &mut Follower, count| {
            let deadline = Instant::now() + Duration::from_secs(120);
            while followed.len() < count && Instant::now() < deadline {
                follower.follow(10, |message| {
                    followed.push(String::from_utf8_lossy(message.payload().unwrap()).into_owned())
                });
            }
            followed.clone()
        };
        send(&producer, 0, "a").await;
        assert_eq!(follow_until(&mut follower, 1), ["a"]);
        let mut silent = TopicPartitionList::new();
        silent.add_partition("copied", 0);
        follower.consumer.pause(&silent).unwrap();
        // Or else its client does not end.
        drop(silent);
        send(&producer, 0, "b").await;
        send(&producer, 1, "c").await;
        assert_eq!(follow_until(&mut follower, 2), ["a", "c"], "the others go on meanwhile");
        assert_eq!(follow_until(&mut follower, 3), ["a", "c", "b"], "and nothing comes twice");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn it_is_complete_when_all_was_read_that_was_there() {
        let (_cluster, client, producer) = cluster(3);
        for number in 0..20 {
            send(&producer, number % 2, "x").await;
        }
        let mut follower = Follower::new(client, "copied".to_owned(), 3).unwrap();
        let (mut followed, deadline) = (0, Instant::now() + Duration::from_secs(120));
        while !follower.is_complete() && Instant::now() < deadline {
            follower.follow(1, |_| followed += 1);
        }
        assert_eq!((followed, follower.is_complete()), (20, true));
    }
}
