//! A sink's consumer group: which replica has which partitions.
//!
//! The client here only belongs to the group; [`super::Readers`] reads. Its thread stays in a call of librdkafka until what
//! a move of partitions asks for is done, so that nobody else has a partition before it was given up here.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwapOption;
use rdkafka::config::{FromClientConfigAndContext, RDKafkaLogLevel};
use rdkafka::consumer::{BaseConsumer, Consumer as _, ConsumerContext, ConsumerGroupMetadata, Rebalance};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode as Code};
use rdkafka::{ClientContext, Offset, TopicPartitionList};
use tokio::sync::mpsc;
use tracing::{debug, warn};

use super::{Config, Readers};
use crate::journal::{NotJoined, Position};
use crate::kafka::Log;

/// How many moves may wait to be told.
const MOVES: usize = 16;
/// How long one call may wait for something to happen.
const POLL: Duration = Duration::from_millis(100);
/// How long giving up what is left may take.
const LEAVE: Duration = Duration::from_secs(2);
/// How long an attempt to join may last before the next one, and how long others wait for a member that gives nothing up.
/// librdkafka's own are five minutes.
const REJOIN: Duration = Duration::from_secs(60);
/// How long the coordinator may take to say what was committed.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Partitions that come or go.
#[derive(Debug)]
pub enum Moved {
    /// These are ours now.
    Assigned(Vec<i32>),
    /// These were.
    Revoked {
        /// Which.
        partitions: Vec<i32>,
        /// Others may have them already: this replica was silent for too long.
        lost: bool,
        /// To be told when they are given up.
        done: SyncSender<()>,
    },
}

/// This replica's membership of a group.
pub struct Group {
    consumer: Arc<BaseConsumer<Membership>>,
    right: Right,
    not_joined: Arc<ArcSwapOption<NotJoined>>,
    topic: String,
    leaving: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

/// The group as those see it who commit offsets. Clones share it.
#[derive(Clone)]
pub struct Member {
    consumer: Arc<BaseConsumer<Membership>>,
    right: Right,
    topic: Arc<str>,
}

struct Membership {
    log: Log,
    moved: mpsc::Sender<Moved>,
    right: Right,
    not_joined: Arc<ArcSwapOption<NotJoined>>,
}

/// What says in which generation of the group this replica is a member, as of the last time that partitions were shared out.
/// librdkafka's own answer says that there is no group when it has just lost it, and brokers take that for a right.
type Right = Arc<ArcSwapOption<ConsumerGroupMetadata>>;

impl Group {
    /// Joins; what then comes and goes is told.
    ///
    /// # Errors
    ///
    /// librdkafka refuses it.
    pub fn join(config: &Config, sink: &str, readers: Arc<Readers>) -> KafkaResult<(Self, mpsc::Receiver<Moved>)> {
        let (membership, moves) = Membership::new(Log::of_sink(sink));
        let (right, not_joined) = (Arc::clone(&membership.right), Arc::clone(&membership.not_joined));
        let topic = config.events();
        let consumer = Arc::new(membership.join(config, &config.group(sink), &topic)?);
        let leaving = Arc::new(AtomicBool::new(false));
        let (member, leave) = (Arc::clone(&consumer), Arc::clone(&leaving));
        let run = move || {
            while !leave.load(Ordering::Relaxed) {
                // Its partitions are paused: whatever got through before that is read by the readers too.
                if let Some(Err(error)) = member.poll(POLL) {
                    debug!(%error, "the group");
                }
                readers.serve();
            }
            member.unsubscribe();
            let deadline = Instant::now() + LEAVE;
            while member.assignment().is_ok_and(|assigned| assigned.count() > 0) && Instant::now() < deadline {
                drop(member.poll(POLL));
            }
        };
        let thread = std::thread::Builder::new().name(format!("group-{sink}")).spawn(run);
        let thread = thread.map_err(|error| KafkaError::ClientCreation(error.to_string()))?;
        Ok((Self { consumer, right, not_joined, topic, leaving, thread }, moves))
    }

    /// For those who commit offsets.
    pub fn member(&self) -> Member {
        let (consumer, right) = (Arc::clone(&self.consumer), Arc::clone(&self.right));
        Member { consumer, right, topic: self.topic.as_str().into() }
    }

    /// Why this replica has no partitions, where that is not because others have them.
    pub fn not_joined(&self) -> Option<Arc<NotJoined>> {
        self.not_joined.load_full()
    }

    /// Leaves, so that others take over at once. Whoever is told of moves has to be there still. Blocks.
    pub fn leave(self) {
        self.leaving.store(true, Ordering::Relaxed);
        // Its panic has been reported by the thread itself.
        drop(self.thread.join());
    }
}

/// Joins a group that is no sink's, and leaves it: brokers that refuse it refuse those of the sinks too. Blocks.
///
/// # Errors
///
/// Why it can't be joined.
pub fn try_to_join(config: &Config) -> Result<(), String> {
    let (membership, moves) = Membership::new(Log::default());
    let not_joined = Arc::clone(&membership.not_joined);
    let group = config.group("check.member");
    let member = membership.join(config, &group, &config.control()).map_err(|error| error.to_string())?;
    // Dropped before the member, which leaves only when nobody is told any more.
    let mut moves = moves;
    let deadline = Instant::now() + TIMEOUT;
    while moves.try_recv().is_err() {
        drop(member.poll(POLL));
        match not_joined.load_full() {
            Some(refused) => return Err(format!("the group {group} can't be joined: {}", refused.reason)),
            None if Instant::now() >= deadline => return Err(format!("the group {group} can't be joined in time")),
            None => {}
        }
    }
    Ok(())
}

/// The sinks whose groups brokers know, also if nobody is in them. Blocks.
///
/// # Errors
///
/// They do not say.
pub fn known_sinks(config: &Config) -> KafkaResult<Vec<String>> {
    let client: BaseConsumer<Log> = BaseConsumer::from_config_and_context(&config.client(), Log::default())?;
    let groups = client.fetch_group_list(None, TIMEOUT)?;
    let prefix = config.group("");
    let sinks = groups.groups().iter().filter_map(|group| group.name().strip_prefix(&prefix));
    // Others may have a prefix that begins with ours.
    Ok(sinks.filter(|sink| !sink.contains('.')).map(str::to_owned).collect())
}

impl Member {
    /// What says that this replica is a member at this time; nothing if it is none.
    pub fn right(&self) -> Option<Arc<ConsumerGroupMetadata>> {
        self.right.load_full()
    }

    /// How far a partition was settled, and what was written with that; waits for a transaction of whoever had it before.
    /// Blocks.
    ///
    /// # Errors
    ///
    /// The coordinator does not say.
    pub fn committed(&self, partition: i32) -> KafkaResult<Option<(Position, String)>> {
        let mut list = TopicPartitionList::new();
        list.add_partition(&self.topic, partition);
        let committed = self.consumer.committed_offsets(list, TIMEOUT)?;
        let found = committed.find_partition(&self.topic, partition);
        let found = found.ok_or(KafkaError::NoMessageReceived)?;
        found.error()?;
        Ok(match found.offset() {
            Offset::Offset(offset) => Some((Position::from_stored(offset), found.metadata().to_owned())),
            _ => None,
        })
    }

    /// Where a partition begins and ends. Blocks.
    ///
    /// # Errors
    ///
    /// The brokers do not say.
    pub fn bounds(&self, partition: i32) -> KafkaResult<(Position, Position)> {
        let (low, high) = self.consumer.fetch_watermarks(&self.topic, partition, TIMEOUT)?;
        Ok((Position::from_stored(low), Position::from_stored(high)))
    }
}

impl Membership {
    /// What then comes and goes is told.
    fn new(log: Log) -> (Self, mpsc::Receiver<Moved>) {
        let (moved, moves) = mpsc::channel(MOVES);
        (Self { log, moved, right: Right::default(), not_joined: Arc::default() }, moves)
    }

    fn join(self, config: &Config, group: &str, topic: &str) -> KafkaResult<BaseConsumer<Self>> {
        let mut client = config.consumer(group);
        client.set("partition.assignment.strategy", "cooperative-sticky");
        let rejoin = REJOIN.max(config.session_timeout()).as_millis().to_string();
        for name in ["max.poll.interval.ms", "topic.metadata.refresh.interval.ms"] {
            if !config.options.contains_key(name) {
                client.set(name, &rejoin);
            }
        }
        let consumer = BaseConsumer::from_config_and_context(&client, self)?;
        consumer.subscribe(&[topic])?;
        Ok(consumer)
    }
}

impl ClientContext for Membership {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        self.log.log(level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        // That a broker is away says nothing of the group, nor that one has not heard yet of a topic that was just made.
        let passes = matches!(
            error.rdkafka_error_code(),
            Some(
                Code::BrokerTransportFailure
                    | Code::AllBrokersDown
                    | Code::Resolve
                    | Code::UnknownTopicOrPartition
                    | Code::UnknownTopic
            )
        );
        if self.right.load().is_none() && !passes {
            let not_joined = NotJoined { at: SystemTime::now(), reason: reason.to_owned() };
            self.not_joined.store(Some(Arc::new(not_joined)));
        }
        self.log.error(error, reason);
    }
}

impl ConsumerContext for Membership {
    fn pre_rebalance(&self, consumer: &BaseConsumer<Self>, rebalance: &Rebalance<'_>) {
        let Rebalance::Revoke(list) = rebalance else { return };
        let (done, given_up) = sync_channel(1);
        // Before it is given up, what is settled is written: in the generation that takes it away.
        let right = consumer.group_metadata();
        let lost = consumer.assignment_lost();
        self.right.store(right.filter(|_| !lost).map(Arc::new));
        let moved = Moved::Revoked { partitions: partitions(list), lost, done };
        // Ends when they are given up, or when nobody listens any more.
        if self.moved.blocking_send(moved).is_ok() {
            given_up.recv().unwrap_or(());
        }
    }

    fn post_rebalance(&self, consumer: &BaseConsumer<Self>, rebalance: &Rebalance<'_>) {
        match rebalance {
            Rebalance::Assign(list) => {
                self.right.store(consumer.group_metadata().map(Arc::new));
                self.not_joined.store(None);
                if let Err(error) = consumer.pause(list) {
                    warn!(%error, "partitions are read twice");
                }
                // Nobody may be there any more.
                drop(self.moved.blocking_send(Moved::Assigned(partitions(list))));
            }
            Rebalance::Revoke(_) => {}
            Rebalance::Error(error) => warn!(%error, "partitions can't be shared out"),
        }
    }
}

fn partitions(list: &TopicPartitionList) -> Vec<i32> {
    list.elements().iter().map(|element| element.partition()).collect()
}

#[cfg(test)]
mod tests {
    use rdkafka::mocking::MockCluster;

    use super::super::tests::config_of;
    use super::*;

    #[test]
    fn a_topic_that_a_broker_has_not_heard_of_yet_is_waited_for() {
        let cluster = MockCluster::new(1).unwrap();
        let config = config_of(&cluster);
        let joining = std::thread::spawn(move || try_to_join(&config));
        std::thread::sleep(Duration::from_secs(2));
        assert!(!joining.is_finished());
        cluster.create_topic("p.control", 1, 1).unwrap();
        assert_eq!(joining.join().unwrap(), Ok(()));
    }
}
