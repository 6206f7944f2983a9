//! The `[journal]` settings.

use std::collections::BTreeMap;
use std::time::Duration;

use bytesize::ByteSize;
use serde::Deserialize;

use super::{Durability, disk, kafka};

/// The settings as they are written. Each kind has its own.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Where it is kept.
    pub kind: Kind,
    /// What an append waits for.
    pub durability: Option<Durability>,
    /// Length of a segment file; from 64 KiB to 1 GiB.
    pub segment: Option<ByteSize>,
    /// The most that segment files may take; at least two segments.
    pub max_disk: Option<ByteSize>,
    /// With less than this free on the file system nothing is accepted.
    pub min_free_disk: Option<ByteSize>,
    /// How long entries are kept: on disk those that every reader has passed, in Kafka all.
    #[serde(with = "humantime_serde")]
    pub retention: Option<Duration>,
    /// Kafka's brokers, as `host:port`.
    pub brokers: Option<Vec<String>>,
    /// What the names of topics and groups begin with.
    pub prefix: Option<String>,
    /// How many partitions the topics get when they are made.
    pub partitions: Option<i32>,
    /// How many replicas they get.
    pub replication: Option<i32>,
    /// How many of those have to have an entry before it counts as stored.
    pub min_insync: Option<i32>,
    /// What keeps events in one partition, and so in order.
    pub key: Option<kafka::KeyBy>,
    /// How long an append may take.
    #[serde(with = "humantime_serde")]
    pub timeout: Option<Duration>,
    /// Properties of librdkafka, for all its clients.
    pub options: BTreeMap<String, Property>,
}

/// Kinds of journals.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// In files of the data directory.
    #[default]
    Disk,
    /// In a topic.
    Kafka,
}

/// A value in `options`. A name with dots that is not quoted is a table in a table.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(untagged, expecting = "should be text, a number, true or false, or a table of those")]
pub enum Property {
    /// `true` or `false`.
    Boolean(bool),
    /// A whole number.
    Integer(i64),
    /// Another number.
    Float(f64),
    /// Text.
    String(String),
    /// More of them.
    Table(BTreeMap<String, Self>),
}

impl Config {
    /// The settings of a journal on disk.
    pub fn disk(&self) -> disk::Config {
        let default = disk::Config::default();
        disk::Config {
            durability: self.durability.unwrap_or(default.durability),
            segment: self.segment.unwrap_or(default.segment),
            max_disk: self.max_disk.unwrap_or(default.max_disk),
            min_free_disk: self.min_free_disk.unwrap_or(default.min_free_disk),
            retention: self.retention.unwrap_or(default.retention),
        }
    }

    /// The settings of a journal on Kafka.
    pub fn kafka(&self) -> kafka::Config {
        let mut options = BTreeMap::new();
        for (name, property) in &self.options {
            property.flatten(name.clone(), &mut options);
        }
        let default = kafka::Config::default();
        kafka::Config {
            brokers: self.brokers.clone().unwrap_or_default(),
            prefix: self.prefix.clone().unwrap_or(default.prefix),
            partitions: self.partitions.unwrap_or(default.partitions),
            replication: self.replication.unwrap_or(default.replication),
            min_insync: self.min_insync.unwrap_or(default.min_insync),
            retention: self.retention.unwrap_or(default.retention),
            key: self.key.unwrap_or(default.key),
            timeout: self.timeout.unwrap_or(default.timeout),
            options,
        }
    }

    /// What is wrong with the settings. Each problem names its setting first.
    pub fn problems(&self) -> Vec<String> {
        let disk = [
            ("durability", self.durability.is_some(), "every event is stored by as many brokers as min_insync says"),
            ("segment", self.segment.is_some(), "Kafka's brokers decide about its files (segment.bytes of the topic)"),
            ("max_disk", self.max_disk.is_some(), "Kafka's brokers decide about their disks (retention.bytes)"),
            ("min_free_disk", self.min_free_disk.is_some(), "nothing is kept on this machine's disk"),
        ];
        let kafka = [
            ("brokers", self.brokers.is_some()),
            ("prefix", self.prefix.is_some()),
            ("partitions", self.partitions.is_some()),
            ("replication", self.replication.is_some()),
            ("min_insync", self.min_insync.is_some()),
            ("key", self.key.is_some()),
            ("timeout", self.timeout.is_some()),
            ("options", !self.options.is_empty()),
        ];
        match self.kind {
            Kind::Disk => {
                let foreign = kafka.iter().filter(|(_, given)| *given);
                let foreign =
                    foreign.map(|(name, _)| format!("journal.{name} is for journal.kind = \"kafka\"; it is \"disk\""));
                foreign.chain(self.disk().problems()).collect()
            }
            Kind::Kafka => {
                let foreign = disk.iter().filter(|(_, given, _)| *given);
                let foreign = foreign.map(|(name, _, why)| {
                    format!("journal.{name} has no meaning with journal.kind = \"kafka\": {why}")
                });
                foreign.chain(self.kafka().problems()).collect()
            }
        }
    }
}

impl Property {
    fn flatten(&self, name: String, options: &mut BTreeMap<String, String>) {
        let value = match self {
            Self::Boolean(truth) => truth.to_string(),
            Self::Integer(number) => number.to_string(),
            Self::Float(number) => number.to_string(),
            Self::String(text) => text.clone(),
            Self::Table(table) => {
                return table.iter().for_each(|(key, value)| value.flatten(format!("{name}.{key}"), options));
            }
        };
        options.insert(name, value);
    }
}
