//! The journal on Kafka, for relays that share it: each entry is a record of the topic `<prefix>.events`.
//!
//! # What it guarantees
//!
//! - An append that returned `Ok` is on all in-sync replicas of its partitions, `min_insync` of them at least, and so is what
//!   had to be written besides. One that returned an error may be stored nevertheless, in whole or in part.
//! - Entries with one key are in one partition, and keep their order there for as long as the number of partitions stays
//!   the same.
//! - Who an entry is for is settled when it is appended, and written with it: relays that change their rules at different
//!   times can't lose it between them.
//! - Entries are kept for `retention`, read or not.
//!
//! `topics` makes the topics and checks them, `append` writes, `reader` reads one partition on, `scan` all from a point, `group` shares partitions
//! out among relays, and `board` is what those tell each other. A [`Position`] is an offset in one partition.

mod append;
mod board;
mod ends;
mod group;
mod reader;
mod reception;
mod scan;
mod topics;

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use rdkafka::ClientConfig;
use rdkafka::error::KafkaError;
use serde::Deserialize;

pub use append::{Append, Appender, Journal, View};
pub use board::{Board, Note};
pub use ends::Ends;
pub use group::{Group, Member, Moved, known_sinks, try_to_join};
pub use reader::{ReadError, Reader, Readers};
pub use reception::Reception;
pub use scan::Scan;
pub use topics::prepare;

use super::Position;
use crate::kafka::{self, Log, Place, Producer, Record};

/// How long a member of a group may be silent before its partitions go to others, in milliseconds.
const SESSION_TIMEOUT: &str = "10000";
/// How much is fetched of a partition at once, in bytes.
const FETCH_BYTES: &str = "131072";
/// The longest record that librdkafka sends unless `options` say otherwise, and what an entry leaves free of it, in bytes.
const MAX_MESSAGE: u64 = 1_000_000;
const MESSAGE_MARGIN: u64 = 8192;
/// The property that says otherwise.
const MESSAGE_MAX: &str = "message.max.bytes";
/// Properties that are nobody's business but ours, beside those of [`kafka::take_reserved`].
const RESERVED_OPTIONS: [(&str, &str); 8] = [
    ("group.id", "each sink is a group, which `prefix` and its name make up"),
    ("group.instance.id", "replicas come and go"),
    ("isolation.level", "what was not committed must not be seen"),
    ("enable.auto.commit", "offsets are committed with what they pass"),
    ("enable.auto.offset.store", "offsets are committed with what they pass"),
    ("auto.offset.reset", "nothing may be passed over"),
    ("enable.partition.eof", "readers wait for more"),
    ("transaction.timeout.ms", "a replica that ends must not hold up the next for long"),
];

/// The checked settings.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "named like the settings")]
pub struct Config {
    pub brokers: Vec<String>,
    pub prefix: String,
    pub partitions: i32,
    pub replication: i32,
    pub min_insync: i32,
    pub retention: Duration,
    pub key: KeyBy,
    pub timeout: Duration,
    pub options: BTreeMap<String, String>,
}

/// What keeps entries in one partition.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "named like the fields")]
pub enum KeyBy {
    #[default]
    MessageId,
    RecipientId,
    SenderId,
}

impl KeyBy {
    /// As it is written in the settings.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::MessageId => "message_id",
            Self::RecipientId => "recipient_id",
            Self::SenderId => "sender_id",
        }
    }
}

/// The header by which an entry is known that an operator sends again. No sink can be called so.
const REPLAYED: &str = "engage-relay:replayed";
/// So many bits of a number that stands for a place are the offset's.
pub const OFFSET_BITS: u32 = 44;

/// A number for a place in a topic, the same on every replica.
pub fn number_of(partition: i32, offset: i64) -> Position {
    Position::from_stored((i64::from(partition) << OFFSET_BITS) | offset)
}

/// The partition and the offset that such a number stands for.
pub fn place_of(number: Position) -> (i32, i64) {
    let number = number.to_stored();
    (i32::try_from(number >> OFFSET_BITS).unwrap_or(-1), number & ((1 << OFFSET_BITS) - 1))
}

/// Says where entries go.
pub trait Addressing: Send + Sync {
    /// What an entry's partition is chosen by; any without it.
    fn key(&self, entry: &Bytes) -> Option<String>;

    /// For whom an entry is that was accepted just now.
    fn address(&self, entry: &Bytes) -> Address;
}

/// For whom an entry is.
pub struct Address {
    /// What its partition is chosen by; any without it.
    pub key: Option<String>,
    /// The groups that it is for, each with the route that says so.
    pub groups: Vec<(String, String)>,
    /// How much is said about it where it is parked or dead, in bytes, beyond what there is room for in any case.
    pub about: usize,
    /// What has to be written besides, for the entry to count as appended.
    pub aside: Option<Aside>,
}

/// What is written once it is known where an entry is.
pub type Aside = Box<dyn FnOnce(Place) -> Record + Send>;

impl Default for Config {
    fn default() -> Self {
        Self {
            brokers: Vec::new(),
            prefix: "engage-relay".to_owned(),
            partitions: 12,
            replication: 3,
            min_insync: 2,
            retention: Duration::from_secs(24 * 3600),
            key: KeyBy::default(),
            timeout: Duration::from_secs(5),
            options: BTreeMap::new(),
        }
    }
}

impl Config {
    /// What is wrong with the settings. Each problem names its setting first.
    pub fn problems(&self) -> Vec<String> {
        let brokers = kafka::problems_of_brokers(&self.brokers).into_iter();
        let brokers = brokers.map(|problem| format!("journal.brokers: {problem}"));
        brokers.chain(self.out_of_range()).chain(self.problems_of_options()).collect()
    }

    fn out_of_range(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        // The longest name that is made of it has to be a topic's.
        if !(1..=200).contains(&self.prefix.len()) || !self.prefix.chars().all(legal) {
            problems.push("journal.prefix has up to 200 letters, digits, \".\", \"_\" and \"-\"".to_owned());
        }
        if !(1..=10_000).contains(&self.partitions) {
            problems.push(format!("journal.partitions is {}; it must be from 1 to 10000", self.partitions));
        }
        if !(1..=100).contains(&self.replication) {
            problems.push(format!("journal.replication is {}; it must be from 1 to 100", self.replication));
        } else if !(1..=self.replication).contains(&self.min_insync) {
            let (given, most) = (self.min_insync, self.replication);
            problems.push(format!("journal.min_insync is {given}; it must be from 1 to journal.replication, {most}"));
        }
        if self.timeout < Duration::from_millis(100) || self.timeout > Duration::from_secs(300) {
            problems.push("journal.timeout must be from 100 ms to 5 minutes".to_owned());
        }
        if self.retention < Duration::from_secs(60) {
            problems.push("journal.retention must be at least a minute".to_owned());
        }
        problems
    }

    fn problems_of_options(&self) -> Vec<String> {
        let mut options = self.options.clone();
        let mut problems = kafka::take_reserved(&mut options, &RESERVED_OPTIONS);
        problems.extend(kafka::refused_options(&options));
        if problems.is_empty() && !options.is_empty() {
            let checked = kafka::check(append::producer(self));
            problems.extend(checked.err().map(|error| error.to_string()));
        }
        problems.into_iter().map(|problem| format!("journal.options: {problem}")).collect()
    }

    /// The topic of the entries.
    pub fn events(&self) -> String {
        format!("{}.events", self.prefix)
    }

    /// The topic of what is parked.
    pub fn parked(&self) -> String {
        format!("{}.parked", self.prefix)
    }

    /// The topic of dead letters.
    pub fn dead_letters(&self) -> String {
        format!("{}.dead-letters", self.prefix)
    }

    /// The topic by which replicas tell each other what they are to do.
    pub fn control(&self) -> String {
        format!("{}.control", self.prefix)
    }

    /// A sink's group.
    pub fn group(&self, sink: &str) -> String {
        format!("{}.{sink}", self.prefix)
    }

    /// How long a member of a group may be silent before its partitions go to others.
    pub fn session_timeout(&self) -> Duration {
        let given = self.options.get("session.timeout.ms").map_or(SESSION_TIMEOUT, String::as_str);
        Duration::from_millis(given.parse().unwrap_or(10_000))
    }

    /// How often a member of a group says that it is there.
    pub fn heartbeat(&self) -> Duration {
        let given = self.options.get("heartbeat.interval.ms").and_then(|given| given.parse().ok());
        Duration::from_millis(given.unwrap_or(3000))
    }

    /// How long a record may be, in bytes.
    fn max_message(&self) -> u64 {
        self.options.get(MESSAGE_MAX).and_then(|bytes| bytes.parse().ok()).unwrap_or(MAX_MESSAGE)
    }

    /// How long an entry may be, in bytes: what is said about it where it is parked or dead has to fit beside it.
    fn max_entry(&self) -> u64 {
        self.max_message().saturating_sub(MESSAGE_MARGIN)
    }

    /// What all clients have in common.
    pub fn client(&self) -> ClientConfig {
        let mut client = ClientConfig::new();
        client
            .set("client.id", "engage-relay")
            .set("socket.keepalive.enable", "true")
            .set("socket.nagle.disable", "true")
            .set("reconnect.backoff.ms", "100")
            .set("reconnect.backoff.max.ms", "2000")
            .set("log.connection.close", "false");
        for (name, value) in &self.options {
            client.set(name, value);
        }
        client.set("bootstrap.servers", self.brokers.join(","));
        client
    }

    /// A producer of single records that are not entries.
    pub fn producer(&self) -> Producer {
        let mut client = self.client();
        client.set("acks", "all").set("enable.idempotence", "true").set("message.timeout.ms", "10000");
        Producer::new(Log::default(), client)
    }

    /// A consumer that sees only what is committed.
    pub fn consumer(&self, group: &str) -> ClientConfig {
        let mut client = self.client();
        if !self.options.contains_key("session.timeout.ms") {
            client.set("session.timeout.ms", SESSION_TIMEOUT);
        }
        client
            .set("group.id", group)
            .set("isolation.level", "read_committed")
            .set("enable.auto.commit", "false")
            .set("enable.auto.offset.store", "false")
            .set("auto.offset.reset", "earliest")
            .set("queued.max.messages.kbytes", "4096");
        // What comes is compressed, and all of it is unpacked at once.
        if !["fetch.message.max.bytes", "max.partition.fetch.bytes"].iter().any(|name| self.options.contains_key(*name))
        {
            client.set("fetch.message.max.bytes", FETCH_BYTES);
        }
        client
    }
}

/// Why the journal can't be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The brokers did not answer, or refused.
    #[error("Kafka can't be reached at {brokers}, or refuses: check journal.brokers and journal.options: {reason}")]
    Unreachable {
        /// Where they should be.
        brokers: String,
        /// What librdkafka says.
        reason: String,
    },
    /// Topics could not be made, or would weaken what is guaranteed: all that is wrong with them.
    #[error("{}", .0.join("; "))]
    Topics(Vec<String>),
    /// librdkafka can't be used so.
    #[error("a client of Kafka can't be set up")]
    Client(#[from] KafkaError),
}

#[cfg(test)]
mod tests;
