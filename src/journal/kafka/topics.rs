//! The journal's topics: made where there are none, and checked for what would weaken the guarantee.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rdkafka::ClientContext;
use rdkafka::admin::{
    AdminClient, AdminOptions, ConfigEntry, ConfigResourceResult, NewTopic, ResourceSpecifier, TopicReplication,
};
use rdkafka::config::{FromClientConfigAndContext, RDKafkaLogLevel};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode as Code};
use rdkafka::metadata::MetadataTopic;
use rdkafka::producer::{BaseProducer, DeliveryResult, Producer as _, ProducerContext};
use tokio::time::{Instant, sleep};
use tracing::{info, warn};

use super::{Config, OpenError};
use crate::kafka::Log;

/// How long brokers may take to answer, and topics to appear.
const TIMEOUT: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(200);
/// How long to wait before brokers are asked again that did not answer.
const PAUSE: Duration = Duration::from_secs(1);
/// The longest batch of records that brokers take unless they are told otherwise, in bytes.
const MAX_MESSAGE: u64 = 1_048_588;

/// How long, and how often at most, brokers that can't be reached are asked again, and librdkafka may take to say why.
const ASKING: Duration = Duration::from_secs(3);
const ASKED: usize = 4;
const HEARING: Duration = Duration::from_millis(50);

/// What was found.
pub struct Topics {
    /// How many partitions the entries have.
    pub partitions: i32,
}

/// A topic as it should be.
struct Wanted {
    name: String,
    partitions: i32,
    /// What it is made with besides what all have.
    settings: Vec<(&'static str, String)>,
    cleanup: &'static str,
}

/// Makes what topics there are not, and checks all. Brokers that do not answer are asked again for some time: they may be
/// starting too.
///
/// # Errors
///
/// [`OpenError`]: they do not answer, or what there is would weaken what is guaranteed.
pub async fn prepare(config: &Config, patience: Duration) -> Result<Topics, OpenError> {
    let brokers = Brokers::new(config)?;
    let deadline = Instant::now() + patience;
    loop {
        match brokers.prepare().await {
            Err(OpenError::Unreachable { reason, .. }) if Instant::now() < deadline => {
                warn!(reason, "the brokers are not ready; trying again");
                sleep(PAUSE).await;
            }
            result => return result,
        }
    }
}

/// The brokers of the journal, as those see them who make topics.
struct Brokers<'c> {
    config: &'c Config,
    admin: AdminClient<Log>,
}

/// Hears why brokers can't be reached.
#[derive(Clone, Default)]
struct Reasons {
    last: Arc<Mutex<Option<String>>>,
}

impl Reasons {
    fn last(&self) -> MutexGuard<'_, Option<String>> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ClientContext for Reasons {
    fn log(&self, _level: RDKafkaLogLevel, facility: &str, message: &str) {
        // Some reasons are only logged, with a thread's name before them.
        if facility == "FAIL" {
            *self.last() = Some(message.split_once("]: ").map_or(message, |(_thread, reason)| reason).to_owned());
        }
    }

    fn error(&self, error: KafkaError, reason: &str) {
        // That follows from the others.
        if error.rdkafka_error_code() != Some(Code::AllBrokersDown) {
            *self.last() = Some(reason.to_owned());
        }
    }

    fn stats_raw(&self, _statistics: &[u8]) {}
}

impl ProducerContext for Reasons {
    type DeliveryOpaque = ();

    fn delivery(&self, _result: &DeliveryResult<'_>, (): ()) {}
}

impl<'c> Brokers<'c> {
    fn new(config: &'c Config) -> KafkaResult<Self> {
        Ok(Self { config, admin: AdminClient::from_config_and_context(&config.client(), Log::default())? })
    }

    async fn prepare(&self) -> Result<Topics, OpenError> {
        let wanted = wanted(self.config);
        let known = self.metadata().await?;
        let mut problems = Vec::new();
        for topic in wanted.iter().filter(|topic| !known.contains_key(&topic.name)) {
            problems.extend(self.create(topic).await?);
        }
        none(problems)?;
        let found = self.await_topics(&wanted).await?;
        let mut problems = Vec::new();
        for (topic, described) in wanted.iter().zip(self.describe(&wanted).await?) {
            match described {
                Ok(described) => problems.extend(wrong_settings(self.config, topic, &described.entry_map())),
                Err(code) => problems.push(wrong(&topic.name, format!("its settings can't be read: {code}"))),
            }
            problems.extend(too_few_replicas(self.config, topic, found.get(&topic.name)));
        }
        let partitions = |name: &str| found.get(name).map_or(0, |found| found.partitions);
        let events = partitions(&self.config.events());
        for topic in [self.config.parked(), self.config.dead_letters()] {
            let found = partitions(&topic);
            // More does no harm: those of events are added last.
            if found < events {
                let as_many = format!("{} has {events}: give it as many", self.config.events());
                problems.push(wrong(&topic, format!("it has {found} partitions and {as_many}")));
            }
        }
        none(problems)?;
        Ok(Topics { partitions: events })
    }

    /// Makes a topic; why not, if so.
    async fn create(&self, topic: &Wanted) -> Result<Option<String>, OpenError> {
        let config = self.config;
        let (min_insync, max_message) =
            (config.min_insync.to_string(), config.max_message().max(MAX_MESSAGE).to_string());
        let mut new = NewTopic::new(&topic.name, topic.partitions, TopicReplication::Fixed(config.replication))
            .set("min.insync.replicas", &min_insync)
            .set("max.message.bytes", &max_message)
            .set("unclean.leader.election.enable", "false");
        for (name, value) in &topic.settings {
            new = new.set(name, value);
        }
        let created = self.asked(async || self.admin.create_topics([&new], &options()).await).await?;
        match created.into_iter().next() {
            // Another replica was faster.
            Some(Err((_, Code::TopicAlreadyExists))) | None => Ok(None),
            Some(Ok(_)) => {
                info!(
                    topic = topic.name,
                    partitions = topic.partitions,
                    replication = config.replication,
                    "topic made"
                );
                Ok(None)
            }
            Some(Err((name, code))) => {
                let hint = match code {
                    Code::InvalidReplicationFactor => {
                        format!("; journal.replication is {}: are there as many brokers?", config.replication)
                    }
                    _ => String::new(),
                };
                Ok(Some(format!("the topic {name} can't be made: {code}{hint}")))
            }
        }
    }

    /// Asks again where librdkafka has ended the connection that it had chosen: those to `journal.brokers` end when it has
    /// found the brokers themselves.
    async fn asked<T>(&self, ask: impl AsyncFn() -> KafkaResult<T>) -> Result<T, OpenError> {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            match ask().await {
                Err(KafkaError::AdminOp(Code::DestroyBroker)) if Instant::now() < deadline => sleep(POLL).await,
                result => return result.map_err(|error| self.unreachable(&error)),
            }
        }
    }

    async fn metadata(&self) -> Result<HashMap<String, Found>, OpenError> {
        // Blocks, at most for the time of a start.
        let metadata = tokio::task::block_in_place(|| self.admin.inner().fetch_metadata(None, TIMEOUT / 3));
        let metadata = metadata.map_err(|error| self.unreachable(&error))?;
        let usable = |topic: &&MetadataTopic| topic.error().is_none() && !topic.partitions().is_empty();
        let number = |count: usize| i32::try_from(count).unwrap_or(i32::MAX);
        let found = metadata.topics().iter().filter(usable).map(|topic| {
            let replicas = topic.partitions().iter().map(|partition| number(partition.replicas().len())).min();
            let found = Found { partitions: number(topic.partitions().len()), replicas: replicas.unwrap_or(0) };
            (topic.name().to_owned(), found)
        });
        Ok(found.collect())
    }

    /// Waits until all are known: it takes a moment after they were made.
    async fn await_topics(&self, wanted: &[Wanted]) -> Result<HashMap<String, Found>, OpenError> {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let found = self.metadata().await?;
            match wanted.iter().find(|topic| !found.contains_key(&topic.name)) {
                None => return Ok(found),
                Some(missing) if Instant::now() >= deadline => {
                    let reason = format!("the topic {} was made and does not appear", missing.name);
                    return Err(OpenError::Topics(vec![reason]));
                }
                Some(_) => sleep(POLL).await,
            }
        }
    }

    /// Asks for the topics' settings until the broker that answers knows them: it takes a moment after they were made.
    async fn describe(&self, wanted: &[Wanted]) -> Result<Vec<ConfigResourceResult>, OpenError> {
        let names: Vec<_> = wanted.iter().map(|topic| ResourceSpecifier::Topic(&topic.name)).collect();
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let described = self.asked(async || self.admin.describe_configs(&names, &options()).await).await?;
            let is_unknown = |described: &ConfigResourceResult| match described {
                // A broker that has only heard of a topic knows no settings of it.
                Ok(described) => described.entries.is_empty(),
                Err(code) => *code == Code::UnknownTopicOrPartition,
            };
            if !described.iter().any(is_unknown) {
                return Ok(described);
            }
            if Instant::now() >= deadline {
                return Err(self.unreachable(&KafkaError::AdminOp(Code::UnknownTopicOrPartition)));
            }
            sleep(POLL).await;
        }
    }

    fn unreachable(&self, error: &KafkaError) -> OpenError {
        let reason = match tokio::task::block_in_place(|| reason(self.config)) {
            Some(reason) => format!("{error}: {reason}"),
            None => error.to_string(),
        };
        OpenError::Unreachable { brokers: self.config.brokers.join(", "), reason }
    }
}

/// Why brokers can't be reached, if so. A call that fails only says that they can't; a client of its own hears more. Blocks.
fn reason(config: &Config) -> Option<String> {
    let mut client = config.client();
    client.set("log.connection.close", "true").set_log_level(RDKafkaLogLevel::Info);
    let client = BaseProducer::from_config_and_context(&client, Reasons::default()).ok()?;
    for _ in 0..ASKED {
        if client.client().fetch_metadata(None, ASKING).is_ok() {
            return None;
        }
        client.poll(HEARING);
        let last = client.context().last().take();
        if last.is_some() {
            return last;
        }
    }
    None
}

fn wanted(config: &Config) -> [Wanted; 4] {
    let retention = config.retention.as_millis().to_string();
    let events = vec![("cleanup.policy", "delete".to_owned()), ("retention.ms", retention)];
    // What is compacted has to be read through at a change of hands: it is kept short.
    let compacted = || {
        vec![
            ("cleanup.policy", "compact".to_owned()),
            ("segment.bytes", (16 << 20).to_string()),
            ("min.cleanable.dirty.ratio", "0.2".to_owned()),
        ]
    };
    // How old what a replica tells is, is seen by the brokers' clock.
    let told = compacted().into_iter().chain([("message.timestamp.type", "LogAppendTime".to_owned())]).collect();
    let topic = |name, partitions, settings, cleanup| Wanted { name, partitions, settings, cleanup };
    [
        topic(config.events(), config.partitions, events, "delete"),
        topic(config.parked(), config.partitions, compacted(), "compact"),
        topic(config.dead_letters(), config.partitions, compacted(), "compact"),
        topic(config.control(), 1, told, "compact"),
    ]
}

/// A topic as brokers know it.
struct Found {
    partitions: i32,
    /// The fewest replicas that a partition has.
    replicas: i32,
}

/// What would lose events, and how to mend it.
fn wrong_settings(config: &Config, topic: &Wanted, settings: &HashMap<&str, &ConfigEntry>) -> Vec<String> {
    let value = |name: &str| settings.get(name).and_then(|entry| entry.value.as_deref()).unwrap_or_default();
    let number = |name: &str| value(name).parse::<i64>().unwrap_or(0);
    let mut problems = Vec::new();
    let mut refuse = |name: &str, should: &str, why: &str| {
        problems.push(wrong(&topic.name, format!("{name} is {:?}, and should be {should}: {why}", value(name))));
    };
    if value("cleanup.policy") != topic.cleanup {
        refuse("cleanup.policy", topic.cleanup, "otherwise what is still needed would be removed");
    }
    if number("min.insync.replicas") < config.min_insync.into() {
        let should = format!("at least journal.min_insync, {}", config.min_insync);
        refuse("min.insync.replicas", &should, "what is acknowledged would be on fewer brokers");
    }
    if value("unclean.leader.election.enable") != "false" {
        let why = "a broker that lacks what was acknowledged could become the leader";
        refuse("unclean.leader.election.enable", "false", why);
    }
    let (taken, sent) = (number("max.message.bytes"), i64::try_from(config.max_message()).unwrap_or(i64::MAX));
    if taken < sent {
        let should = format!("at least message.max.bytes of journal.options, {sent}");
        refuse("max.message.bytes", &should, "events would be refused, alone or with others");
    }
    if topic.cleanup == "delete" {
        let (kept, wanted) = (number("retention.ms"), i64::try_from(config.retention.as_millis()).unwrap_or(i64::MAX));
        if kept != -1 && kept < wanted {
            let should = format!("at least journal.retention, {wanted}");
            refuse("retention.ms", &should, "events would be removed before they are delivered");
        }
        if number("retention.bytes") != -1 {
            refuse("retention.bytes", "-1", "events could be removed before they are delivered");
        }
    }
    problems
}

fn too_few_replicas(config: &Config, topic: &Wanted, found: Option<&Found>) -> Option<String> {
    let (replicas, wanted) = (found.map_or(0, |found| found.replicas), config.replication);
    let reason = || format!("it has {replicas} replicas, fewer than journal.replication, {wanted}");
    (replicas < wanted).then(|| wrong(&topic.name, reason()))
}

fn wrong(topic: &str, reason: String) -> String {
    format!("the topic {topic} can't be the journal's: {reason}")
}

fn none(problems: Vec<String>) -> Result<(), OpenError> {
    if problems.is_empty() { Ok(()) } else { Err(OpenError::Topics(problems)) }
}

fn options() -> AdminOptions {
    AdminOptions::new().request_timeout(Some(TIMEOUT / 3)).operation_timeout(Some(TIMEOUT / 3))
}
