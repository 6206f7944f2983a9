//! The `kafka` sink: one record per event. Accepted means acknowledged by all in-sync replicas.
//!
//! librdkafka batches, compresses and, within `timeout`, resends; its idempotent producer keeps that from making
//! duplicates or changing the order within a partition. What then still fails is for the lane.
//!
//! Without a `key` the record's key is the message id, so that the statuses of one message stay in one partition; an
//! event without a message id has no key, and goes to any partition. A `key` template that renders to nothing means no
//! key too.

mod verdict;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use rdkafka::ClientConfig;
use serde::Deserialize;

use super::metadata::{self, Binding, Format};
use super::{Attempt, BuildError, DeliveryError, Preview, View};
use crate::document::Section;
use crate::event::{Event, Field};
use crate::kafka::{self, Log, Producer, Record};
use crate::telemetry::Begin;
use crate::template::{Escape, Template};

const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);
/// Kafka's own limit.
const MAX_TOPIC_LEN: usize = 249;

/// How many records share a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Batching {
    Many,
    One,
}

/// The checked settings.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    brokers: String,
    topic: Template,
    key: Option<Template>,
    headers: Vec<(String, Template)>,
    format: Format,
    timeout: Duration,
    options: BTreeMap<String, String>,
}

impl Config {
    pub(super) fn read(section: &mut Section<'_>) -> Option<Self> {
        let topic = read_topic(section);
        Some(Self {
            brokers: read_brokers(section),
            key: section.template("key"),
            headers: metadata::read_headers(section, Binding::Kafka, |name, _| {
                name.is_empty().then(|| "a header needs a name".to_owned())
            }),
            format: metadata::read_format(section),
            timeout: super::read_timeout(section, DEFAULT_TIMEOUT),
            options: read_options(section),
            topic: topic?,
        })
    }

    pub(super) fn check(&self) -> Result<(), BuildError> {
        // What is wrong with one of them alone has been told.
        if self.options.is_empty() || kafka::refused_options(&self.options).next().is_some() {
            return Ok(());
        }
        kafka::check(self.client(Batching::Many)).map_err(|error| BuildError::Client(error.into()))
    }

    /// The options that name a file.
    pub(super) fn files(&self) -> Vec<PathBuf> {
        let files = self.options.iter().filter(|(option, _)| option.ends_with(".location"));
        files.map(|(_, path)| path.into()).collect()
    }

    pub(super) fn preview(
        &self,
        event: &Event,
        attempt: &Attempt<'_>,
        now: SystemTime,
    ) -> Result<Preview, DeliveryError> {
        let record = self.record(event, attempt, now, View::Redacted)?;
        let mut target = vec![("topic", record.topic)];
        target.extend(record.key.map(|key| ("key", key)));
        Ok(Preview { target, headers: record.headers })
    }

    fn record(
        &self,
        event: &Event,
        attempt: &Attempt<'_>,
        now: SystemTime,
        view: View,
    ) -> Result<Record, DeliveryError> {
        if !is_topic(&self.topic.render(event, Escape::None)) {
            return Err(DeliveryError::reject("invalid_topic", "the event's values make no legal topic name"));
        }
        let key = match &self.key {
            Some(template) => Some(view.render(template, event, Escape::None)),
            None => event.field(Field::MessageId).map(str::to_owned),
        };
        let mut headers = vec![("content-type".to_owned(), metadata::CONTENT_TYPE.to_owned())];
        for (name, value) in metadata::headers(event, attempt, now, self.format, Binding::Kafka) {
            headers.push((name.into_owned(), value));
        }
        for (name, template) in &self.headers {
            headers.push((name.clone(), view.render(template, event, Escape::None)));
        }
        let topic = view.render(&self.topic, event, Escape::None);
        Ok(Record { topic, partition: None, key: key.filter(|key| !key.is_empty()), headers, body: Some(event.body()) })
    }

    /// The settings of librdkafka: ours may be overridden by `options`, except for what those cannot name.
    fn client(&self, batching: Batching) -> ClientConfig {
        let timeout = super::millis(self.timeout).to_string();
        let mut client = ClientConfig::new();
        client
            .set("client.id", "engage-relay")
            .set("linger.ms", "5")
            .set("queue.buffering.max.messages", "20000")
            .set("queue.buffering.max.kbytes", "65536")
            .set("socket.keepalive.enable", "true")
            .set("socket.nagle.disable", "true")
            .set("request.timeout.ms", &timeout)
            .set("reconnect.backoff.ms", "100")
            .set("reconnect.backoff.max.ms", "5000");
        for (name, value) in &self.options {
            client.set(name, value);
        }
        client
            .set("bootstrap.servers", &self.brokers)
            .set("message.timeout.ms", timeout)
            .set("enable.idempotence", "true")
            .set("acks", "all");
        if batching == Batching::One {
            client.set("batch.num.messages", "1");
        }
        client
    }
}

/// The sink.
pub(super) struct Kafka {
    config: Config,
    /// Carries all events.
    batched: Producer,
    /// Finds out whether an event is refused, or only was in a batch that is.
    single: Producer,
}

impl Kafka {
    pub(super) fn build(name: &str, config: Config) -> Result<Self, BuildError> {
        let batched = Producer::new(Log::of_sink(name), config.client(Batching::Many));
        batched.prepare().map_err(|error| BuildError::Client(error.into()))?;
        Ok(Self { batched, single: Producer::new(Log::of_sink(name), config.client(Batching::One)), config })
    }

    /// What the span of an attempt begins with.
    pub(super) fn begin(&self, event: &Event) -> Begin {
        metadata::begin("kafka", self.config.topic.render_redacted(event, Escape::None), event)
    }

    /// A broker that finds a batch too large, or a record in it invalid, refuses all of it. Only a record that is refused
    /// on its own is hopeless.
    pub(super) async fn deliver(&self, event: &Event, attempt: &Attempt<'_>) -> Result<(), DeliveryError> {
        let record = self.config.record(event, attempt, SystemTime::now(), View::Real)?;
        let sent = match self.batched.send(&record).await {
            Err(error) if verdict::may_be_of_batch(error) => self.single.send(&record).await,
            sent => sent,
        };
        sent.map(drop).map_err(|error| {
            let error = DeliveryError::from(error);
            let varies = self.config.topic.as_literal().is_none();
            DeliveryError { is_of_event: varies && error.kind == verdict::UNKNOWN_TOPIC, ..error }
        })
    }

    pub(super) async fn close(&self) {
        self.batched.close().await;
        self.single.close().await;
    }
}

fn read_brokers(section: &mut Section<'_>) -> String {
    let Some(brokers) = section.require::<Vec<Broker>>("brokers") else { return String::new() };
    if brokers.is_empty() {
        section.problem("brokers", kafka::NO_BROKERS);
    }
    brokers.iter().map(|Broker(address)| address.as_str()).collect::<Vec<_>>().join(",")
}

/// A broker's address. One that is none is told of without what its references hold.
#[derive(Deserialize)]
#[serde(try_from = "String")]
struct Broker(String);

impl TryFrom<String> for Broker {
    type Error = String;

    fn try_from(address: String) -> Result<Self, String> {
        kafka::problem_of_broker(&address).map_or(Ok(Self(address)), Err)
    }
}

fn read_topic(section: &mut Section<'_>) -> Option<Template> {
    let topic = super::require_template(section, "topic")?;
    if !is_topic(&topic.render_sample("x")) {
        section.problem("topic", "a topic name has up to 249 letters, digits, \".\", \"_\" and \"-\"");
        return None;
    }
    Some(topic)
}

fn is_topic(name: &str) -> bool {
    let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    (1..=MAX_TOPIC_LEN).contains(&name.len()) && name.chars().all(legal) && name != "." && name != ".."
}

/// Reads `options`. A name may be quoted or not: `compression.type` is then a table in a table.
fn read_options(section: &mut Section<'_>) -> BTreeMap<String, String> {
    let mut options = BTreeMap::new();
    for (name, value) in section.get::<toml::Table>("options").unwrap_or_default() {
        if let Err(name) = flatten(name, value, &mut options) {
            section.problem("options", format!("{name:?} has to be a string, a number or a boolean"));
        }
    }
    let reserved = kafka::take_reserved(&mut options, &[]);
    for problem in reserved.into_iter().chain(kafka::refused_options(&options)) {
        section.problem("options", problem);
    }
    options
}

fn flatten(name: String, value: toml::Value, options: &mut BTreeMap<String, String>) -> Result<(), String> {
    let value = match value {
        toml::Value::String(text) => text,
        toml::Value::Integer(number) => number.to_string(),
        toml::Value::Float(number) => number.to_string(),
        toml::Value::Boolean(truth) => truth.to_string(),
        toml::Value::Table(table) => {
            return table.into_iter().try_for_each(|(key, value)| flatten(format!("{name}.{key}"), value, options));
        }
        toml::Value::Array(_) | toml::Value::Datetime(_) => return Err(name),
    };
    options.insert(name, value);
    Ok(())
}

#[cfg(test)]
mod tests;
