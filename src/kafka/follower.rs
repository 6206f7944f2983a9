//! Reading a whole topic on from its beginning, for those who keep a copy of what it says.

use std::time::{Duration, Instant};

use rdkafka::config::FromClientConfigAndContext as _;
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::message::{BorrowedMessage, Message as _};
use rdkafka::{ClientConfig, Offset, TopicPartitionList};
use tracing::{debug, warn};

use super::{Log, Silence, end_aside};

/// How long to wait for what comes.
const POLL: Duration = Duration::from_millis(200);
/// How often to look whether a partition has more than was read, one after the other.
const LOOK: Duration = Duration::from_secs(2);
/// How long its broker may take to say.
const TIMEOUT: Duration = Duration::from_secs(1);

/// Follows a topic. Its consumer is made anew where a partition has more and gives nothing.
pub struct Follower {
    client: ClientConfig,
    topic: String,
    consumer: BaseConsumer<Log>,
    /// Up to where each partition was read, and what there is for nobody passed over.
    read_to: Vec<i64>,
    silence: Silence,
    look_at: Instant,
    /// The partition to look at.
    next: usize,
}

impl Follower {
    /// Begins with the oldest records of so many partitions.
    ///
    /// # Errors
    ///
    /// The client can't be made.
    pub fn new(mut client: ClientConfig, topic: String, partitions: usize) -> KafkaResult<Self> {
        client.set("enable.partition.eof", "true");
        let read_to = vec![0; partitions];
        let consumer = assigned(&client, &topic, read_to.iter().map(|_| Offset::Beginning))?;
        let (silence, look_at) = (Silence::default(), Instant::now() + LOOK);
        Ok(Self { client, topic, consumer, read_to, silence, look_at, next: 0 })
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
                    let (partition, next) = (message.partition(), message.offset() + 1);
                    drop(message);
                    self.heard(partition, next);
                }
                Some(Err(KafkaError::PartitionEOF(partition))) => {
                    // Behind its last record may be what only brokers need: where transactions ended.
                    if let Some(end) = self.end(partition) {
                        self.heard(partition, end);
                    }
                }
                // It reconnects by itself.
                Some(Err(error)) => debug!(topic = self.topic, %error, "can't be read at present"),
            }
            patience = Duration::ZERO;
        }
    }

    fn heard(&mut self, partition: i32, read_to: i64) {
        self.silence.heard(partition);
        if let Some(place) = usize::try_from(partition).ok().and_then(|index| self.read_to.get_mut(index)) {
            *place = read_to;
        }
    }

    /// Where a partition ends; nothing if its broker does not say.
    fn end(&self, partition: i32) -> Option<i64> {
        self.consumer.fetch_watermarks(&self.topic, partition, TIMEOUT).ok().map(|(_, end)| end)
    }

    /// Looks at one partition, if it is time to.
    fn look(&mut self) {
        if Instant::now() < self.look_at {
            return;
        }
        self.look_at = Instant::now() + LOOK;
        let index = self.next;
        self.next = (index + 1) % self.read_to.len().max(1);
        let (Some(read_to), Ok(partition)) = (self.read_to.get(index), i32::try_from(index)) else { return };
        match self.end(partition) {
            Some(end) if end > *read_to => {
                if self.silence.missed(partition, Instant::now()) {
                    self.renew(partition);
                }
            }
            Some(_) => self.silence.heard(partition),
            None => {}
        }
    }

    fn renew(&mut self, partition: i32) {
        let from = self.read_to.iter().map(|read_to| match read_to {
            0 => Offset::Beginning,
            next => Offset::Offset(*next),
        });
        match assigned(&self.client, &self.topic, from) {
            Ok(consumer) => {
                end_aside(std::mem::replace(&mut self.consumer, consumer));
                warn!(
                    topic = self.topic,
                    partition, "a partition gives nothing of what it has; the consumer is made anew"
                );
            }
            Err(error) => warn!(topic = self.topic, partition, %error, "a consumer can't be made anew"),
        }
    }
}

/// A consumer of all partitions, each from its offset on.
fn assigned(client: &ClientConfig, topic: &str, from: impl Iterator<Item = Offset>) -> KafkaResult<BaseConsumer<Log>> {
    let consumer: BaseConsumer<Log> = BaseConsumer::from_config_and_context(client, Log::default())?;
    let mut list = TopicPartitionList::new();
    for (partition, offset) in (0..).zip(from) {
        list.add_partition_offset(topic, partition, offset)?;
    }
    consumer.assign(&list)?;
    Ok(consumer)
}

#[cfg(test)]
mod tests {
    use rdkafka::mocking::MockCluster;
    use rdkafka::producer::{FutureProducer, FutureRecord};

    use super::*;

    /// Pausing stands for what librdkafka may do by itself: see [`super::super::silence`].
    #[tokio::test(flavor = "multi_thread")]
    async fn a_partition_that_gives_nothing_is_read_on() {
        let cluster = MockCluster::new(1).unwrap();
        cluster.create_topic("copied", 2, 1).unwrap();
        let mut client = ClientConfig::new();
        client.set("bootstrap.servers", cluster.bootstrap_servers()).set("group.id", "copy");
        let producer: FutureProducer = client.create().unwrap();
        let send = async |partition, value: &str| {
            let record = FutureRecord::<str, str>::to("copied").partition(partition).payload(value);
            producer.send(record, Duration::from_secs(60)).await.unwrap();
        };
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
        send(0, "a").await;
        assert_eq!(follow_until(&mut follower, 1), ["a"]);
        let mut silent = TopicPartitionList::new();
        silent.add_partition("copied", 0);
        follower.consumer.pause(&silent).unwrap();
        // Or else its client does not end.
        drop(silent);
        send(0, "b").await;
        send(1, "c").await;
        assert_eq!(follow_until(&mut follower, 2), ["a", "c"], "the others go on meanwhile");
        assert_eq!(follow_until(&mut follower, 3), ["a", "c", "b"], "and nothing comes twice");
    }
}
