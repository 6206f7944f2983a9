//! The `kafka` sink: one record per event. Accepted means acknowledged by all in-sync replicas.
//!
//! librdkafka batches, compresses and, within `timeout`, resends; its idempotent producer keeps that from making
//! duplicates or changing the order within a partition. What then still fails is for the lane.
//!
//! Without a `key` the record's key is the message id, so that the statuses of one message stay in one partition; an
//! event without a message id has no key, and goes to any partition. A `key` template that renders to nothing means no
//! key too.

mod producer;
mod verdict;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use rdkafka::ClientConfig;

use self::producer::{Batching, Producer};
use super::metadata::{self, Binding, Format};
use super::{Attempt, BuildError, DeliveryError, Preview, View};
use crate::document::Section;
use crate::event::{Event, Field};
use crate::telemetry::Begin;
use crate::template::{Escape, Template};

const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);
/// Kafka's own limit.
const MAX_TOPIC_LEN: usize = 249;

/// librdkafka properties that are the sink's business, and why.
const RESERVED_OPTIONS: [(&str, &str); 12] = [
    ("acks", "every event has to be acknowledged by all in-sync replicas"),
    ("request.required.acks", "every event has to be acknowledged by all in-sync replicas"),
    ("enable.idempotence", "the producer is always idempotent, so that resending makes no duplicates"),
    ("bootstrap.servers", "write `brokers` instead"),
    ("metadata.broker.list", "write `brokers` instead"),
    ("message.timeout.ms", "write `timeout` instead"),
    ("delivery.timeout.ms", "write `timeout` instead"),
    ("transactional.id", "events are not sent in transactions"),
    ("delivery.report.only.error", "every delivery report is awaited"),
    ("queuing.strategy", "order matters"),
    ("log_level", "the relay's own log level decides"),
    ("plugin.library.paths", "plugins are not loaded"),
];

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
        let config = Self {
            brokers: read_brokers(section),
            key: section.template("key"),
            headers: metadata::read_headers(section, Binding::Kafka, |name| {
                name.is_empty().then(|| "a header needs a name".to_owned())
            }),
            format: metadata::read_format(section),
            timeout: super::read_timeout(section, DEFAULT_TIMEOUT),
            options: read_options(section),
            topic: topic?,
        };
        if let Err(error) = config.client(Batching::Many).create_native_config() {
            section.problem("options", refused_option(&error));
            return None;
        }
        Some(config)
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
        Ok(Record { topic, key: key.filter(|key| !key.is_empty()), headers, body: event.body() })
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

/// What one attempt sends.
struct Record {
    topic: String,
    key: Option<String>,
    headers: Vec<(String, String)>,
    body: Bytes,
}

/// The sink.
pub(super) struct Kafka {
    config: Config,
    /// Carries all events.
    batched: Producer,
    /// Finds out whether an event is too large, or only was in a batch that is.
    single: Producer,
}

impl Kafka {
    pub(super) fn build(name: &str, config: Config) -> Result<Self, BuildError> {
        let batched = Producer::new(name, config.client(Batching::Many));
        batched.prepare().map_err(|error| BuildError::Client(error.into()))?;
        Ok(Self { batched, single: Producer::new(name, config.client(Batching::One)), config })
    }

    /// What the span of an attempt begins with.
    pub(super) fn begin(&self, event: &Event) -> Begin {
        metadata::begin("kafka", self.config.topic.render_redacted(event, Escape::None), event)
    }

    /// A broker that finds a batch too large refuses all of it. Only a record that is refused on its own is too large.
    pub(super) async fn deliver(&self, event: &Event, attempt: &Attempt<'_>) -> Result<(), DeliveryError> {
        let record = self.config.record(event, attempt, SystemTime::now(), View::Real)?;
        match self.batched.send(&record).await {
            Err(error) if error.is_batch_too_large() => self.single.send(&record).await,
            result => result,
        }
        .map_err(Into::into)
    }

    pub(super) async fn close(&self) {
        self.batched.close().await;
        self.single.close().await;
    }
}

fn read_brokers(section: &mut Section<'_>) -> String {
    let Some(brokers) = section.require::<Vec<String>>("brokers") else { return String::new() };
    if brokers.is_empty() {
        section.problem("brokers", "the list of brokers is empty");
    }
    for broker in &brokers {
        if !is_broker(broker) {
            section.problem("brokers", format!("{broker:?} is not a broker's address, such as \"kafka-0:9092\""));
        }
    }
    brokers.join(",")
}

fn is_broker(text: &str) -> bool {
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, Some(port)),
        _ => (text, None),
    };
    let bracketed = host.starts_with('[') && host.ends_with(']');
    let illegal = |c: char| c.is_whitespace() || c.is_control() || matches!(c, ',' | '/' | '@');
    !host.is_empty()
        && !host.contains(illegal)
        && (bracketed || !host.contains(':'))
        && port.is_none_or(|port| port.parse::<u16>().is_ok_and(|port| port != 0))
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
    for (name, reason) in RESERVED_OPTIONS {
        if options.contains_key(name) {
            section.problem("options", format!("{name:?} cannot be set: {reason}"));
            options.remove(name);
        }
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

/// What librdkafka objects to; without the value, which may be a secret.
fn refused_option(error: &rdkafka::error::KafkaError) -> String {
    match error {
        rdkafka::error::KafkaError::ClientConfig(_, _, name, _) => {
            format!("librdkafka does not know {name:?}, or not with this value")
        }
        _ => "librdkafka refuses these options".to_owned(),
    }
}

#[cfg(test)]
mod tests;
