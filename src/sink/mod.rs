//! Sinks: the destinations that events are delivered to.
//!
//! [`Config`] is what a `[sinks.NAME]` table of `routes.toml` compiles to, and [`Sink`] the client that is built from
//! it once and shared. [`Sink::deliver`] makes one attempt; `Ok` means that the other side has durably accepted the
//! event, and a [`DeliveryError`] carries the verdict on what is to become of it otherwise. [`Config::preview`] shows
//! what an attempt sends; both get the message from one function per sink, so that they cannot disagree.
//!
//! A sink neither retries nor counts, and knows nothing of queues, the journal or other sinks. What errors, logs and
//! previews say holds no secret, no body and no value of an event.
//!
//! A new sink is a file like the ones here, a variant of [`Config`] and of `Client`, and their match arms below.

mod http;
mod kafka;
mod metadata;
mod rabbitmq;
mod signing;
mod stdout;
mod tls;

use std::borrow::Cow;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::document::Section;
use crate::event::Event;
use crate::telemetry::{Begin, Traces};
use crate::template::{Escape, Template};

pub(crate) use tls::install_crypto_provider;

/// What a `[sinks.NAME]` table says, checked: everything in it can work, as far as that shows without connecting.
#[derive(Clone, Debug, PartialEq)]
#[expect(missing_docs, reason = "each is the sink of that type")]
pub enum Config {
    Http(http::Config),
    Kafka(kafka::Config),
    RabbitMq(rabbitmq::Config),
    Stdout(stdout::Config),
}

/// The `type` of a sink.
#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Type {
    Http,
    Kafka,
    RabbitMq,
    Stdout,
}

impl Config {
    /// Reads the sink's own keys, and reports every problem in `section`; `None` where there was one. The caller reads
    /// what is left (`delivery`) and finishes the section.
    pub fn read(section: &mut Section<'_>) -> Option<Self> {
        let Some(kind) = section.require::<Type>("type") else {
            section.give_up();
            return None;
        };
        match kind {
            Type::Http => http::Config::read(section).map(Self::Http),
            Type::Kafka => kafka::Config::read(section).map(Self::Kafka),
            Type::RabbitMq => rabbitmq::Config::read(section).map(Self::RabbitMq),
            Type::Stdout => stdout::Config::read(section).map(Self::Stdout),
        }
    }

    /// The sink's `type`, as it is written in the file.
    pub fn type_name(&self) -> &'static str {
        match self {
            Self::Http(_) => "http",
            Self::Kafka(_) => "kafka",
            Self::RabbitMq(_) => "rabbitmq",
            Self::Stdout(_) => "stdout",
        }
    }

    /// How many deliveries a lane should have under way at once, unless its settings say otherwise.
    pub fn default_concurrency(&self) -> usize {
        match self {
            Self::Http(_) | Self::Stdout(_) => 64,
            Self::Kafka(_) | Self::RabbitMq(_) => 1024,
        }
    }

    /// The files that building the sink reads: certificates and keys.
    pub fn files(&self) -> Vec<PathBuf> {
        match self {
            Self::Http(config) => config.files(),
            Self::Kafka(config) => config.files(),
            Self::RabbitMq(config) => config.files(),
            Self::Stdout(_) => Vec::new(),
        }
    }

    /// Looks into those files, and at what only the client library can tell; without connecting.
    ///
    /// # Errors
    ///
    /// The key that is to blame, and what [`Sink::build`] would say.
    pub fn check(&self) -> Result<(), (&'static str, BuildError)> {
        install_crypto_provider();
        match self {
            Self::Http(config) => config.check().map_err(|error| ("tls", error)),
            Self::Kafka(config) => config.check().map_err(|error| ("options", error)),
            Self::RabbitMq(config) => config.check().map_err(|error| ("tls", error)),
            Self::Stdout(_) => Ok(()),
        }
    }

    /// What an attempt made now by the sink `name` would send, with secrets as their `${…}` references.
    ///
    /// # Errors
    ///
    /// The event cannot be sent to this sink at all: [`Sink::deliver`] would reject it with this error.
    pub fn preview(&self, name: &str, event: &Event, attempt: &Attempt<'_>) -> Result<Preview, DeliveryError> {
        let now = SystemTime::now();
        match self {
            Self::Http(config) => config.preview(event, attempt, now),
            Self::Kafka(config) => config.preview(event, attempt, now),
            Self::RabbitMq(config) => config.preview(event, attempt, now),
            Self::Stdout(_) => Ok(stdout::preview(name, event, attempt)),
        }
    }
}

/// A destination, ready to be delivered to. Cloning is cheap, and clones share the connections.
#[derive(Clone)]
pub struct Sink {
    client: Arc<Client>,
    name: Arc<str>,
    traces: Option<Traces>,
}

enum Client {
    Http(http::Http),
    Kafka(kafka::Kafka),
    RabbitMq(rabbitmq::RabbitMq),
    Stdout(stdout::Stdout),
}

impl Sink {
    /// Builds the client of the sink `name`. Has to be called within a Tokio runtime. A destination that is down is no
    /// error: connections are made when they are needed, or in the background.
    ///
    /// # Errors
    ///
    /// A certificate that cannot be read, or an option that the client library refuses.
    pub fn build(name: &str, config: &Config) -> Result<Self, BuildError> {
        install_crypto_provider();
        let client = match config {
            Config::Http(config) => Client::Http(http::Http::build(config.clone())?),
            Config::Kafka(config) => Client::Kafka(kafka::Kafka::build(name, config.clone())?),
            Config::RabbitMq(config) => Client::RabbitMq(rabbitmq::RabbitMq::build(name, config.clone())?),
            Config::Stdout(_) => Client::Stdout(stdout::Stdout::new(name)),
        };
        Ok(Self { client: Arc::new(client), name: name.into(), traces: None })
    }

    /// With a span for every attempt, if there are traces.
    #[must_use]
    pub fn traced(self, traces: Option<&Traces>) -> Self {
        Self { traces: traces.cloned(), ..self }
    }

    /// Makes one attempt. It ends within the sink's `timeout`: but a broker that blocks publishers stops that clock, a
    /// record that Kafka refuses with others is sent again by itself, and a standard output that nobody reads has no limit.
    /// It may be dropped at any time: the event may then have arrived or not.
    ///
    /// # Errors
    ///
    /// The other side has not accepted the event, or not said so: the verdict tells what to do.
    pub async fn deliver(&self, event: &Event, attempt: &Attempt<'_>) -> Result<(), DeliveryError> {
        let Some(traces) = &self.traces else { return self.attempt(event, attempt).await.map(drop) };
        let mut span = traces.span(self.begin(event, attempt), Some(&event.traceparent()));
        let traceparent = span.traceparent();
        let result = self.attempt(event, &Attempt { traceparent: Some(&traceparent), ..*attempt }).await;
        let status = result.as_ref().map_or_else(DeliveryError::http_status, |status| *status);
        if let Some(status) = status {
            span.set("http.response.status_code", i64::from(status));
        }
        if let Err(error) = &result {
            span.fail(error.kind.clone().into_owned(), error.text.clone());
        }
        result.map(drop)
    }

    /// Also returns the HTTP status, if there is one.
    async fn attempt(&self, event: &Event, attempt: &Attempt<'_>) -> Result<Option<u16>, DeliveryError> {
        match &*self.client {
            Client::Http(sink) => sink.deliver(event, attempt).await.map(|status| Some(status.as_u16())),
            Client::Kafka(sink) => sink.deliver(event, attempt).await.map(|()| None),
            Client::RabbitMq(sink) => sink.deliver(event, attempt).await.map(|()| None),
            Client::Stdout(sink) => sink.deliver(event, attempt).await.map(|()| None),
        }
    }

    /// What an attempt's span begins with.
    fn begin(&self, event: &Event, attempt: &Attempt<'_>) -> Begin {
        let begin = match &*self.client {
            Client::Http(sink) => sink.begin(),
            Client::Kafka(sink) => sink.begin(event),
            Client::RabbitMq(sink) => sink.begin(event),
            Client::Stdout(_) => Begin::internal("write"),
        };
        begin
            .with("relay.event_id", event.id().to_string())
            .with("relay.sink", self.name.to_string())
            .with("relay.route", attempt.route.to_owned())
            .with("relay.attempt", i64::from(attempt.number))
    }

    /// Hands over what is on its way and closes connections politely, within a few seconds. Deliveries after this fail.
    pub async fn close(&self) {
        match &*self.client {
            Client::Http(_) | Client::Stdout(_) => {}
            Client::Kafka(sink) => sink.close().await,
            Client::RabbitMq(sink) => sink.close().await,
        }
    }
}

/// What an attempt knows of the delivery that it belongs to.
#[derive(Clone, Copy, Debug)]
pub struct Attempt<'a> {
    /// Counted from 1.
    pub number: u32,
    /// The name of the (first) route that the event matched.
    pub route: &'a str,
    /// The `traceparent` of the attempt's own span; without one the event's goes on.
    pub traceparent: Option<&'a str>,
}

/// Why an attempt did not deliver.
#[derive(Debug, thiserror::Error)]
#[error("{text}")]
pub struct DeliveryError {
    /// What is to become of the delivery.
    pub verdict: Verdict,
    /// A short name, for filters and counts: `timeout`, `refused`, `http_503`, `unroutable`, `message_too_large`.
    pub kind: Cow<'static, str>,
    /// For people. Without secrets, bodies and values of the event.
    pub text: String,
    /// Whether the sink is there and only the place that this event names is missing: no reason to hold others back.
    pub is_of_event: bool,
}

/// The longest time that the other side may ask to be left alone for.
pub const MAX_ASKED: Duration = Duration::from_secs(24 * 3600);

/// What is to become of a delivery whose attempt failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The next attempt may succeed.
    Retry {
        /// How long the other side asked to be left alone; at most a day.
        after: Option<Duration>,
    },
    /// No attempt can succeed before someone changes something: a dead letter.
    Reject,
    /// The whole sink wants no more events (HTTP 410). It is left alone but for probes; the delivery is kept.
    Gone,
}

impl DeliveryError {
    fn retry(kind: impl Into<Cow<'static, str>>, text: impl Into<String>) -> Self {
        Self::new(Verdict::Retry { after: None }, kind, text)
    }

    fn new(verdict: Verdict, kind: impl Into<Cow<'static, str>>, text: impl Into<String>) -> Self {
        Self { verdict, kind: kind.into(), text: text.into(), is_of_event: false }
    }

    /// The HTTP status that stands behind it, if one does.
    fn http_status(&self) -> Option<u16> {
        if self.verdict == Verdict::Gone { Some(410) } else { self.kind.strip_prefix("http_")?.parse().ok() }
    }

    fn gone(kind: impl Into<Cow<'static, str>>, text: impl Into<String>) -> Self {
        Self::new(Verdict::Gone, kind, text)
    }

    fn reject(kind: impl Into<Cow<'static, str>>, text: impl Into<String>) -> Self {
        Self::new(Verdict::Reject, kind, text)
    }
}

/// What an attempt would send beside the event's body, in the order to show it in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct Preview {
    /// Where it goes: label and value, such as `url`, `topic`, `exchange`.
    pub target: Vec<(&'static str, String)>,
    /// Headers by name.
    pub headers: Vec<(String, String)>,
}

/// Why a sink's client cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// A file that the settings name.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What reading it said.
        source: std::io::Error,
    },
    /// The file was read, but is not what it should be.
    #[error("{} holds no PEM {expected}", path.display())]
    Pem {
        /// The file.
        path: PathBuf,
        /// What it should hold.
        expected: &'static str,
    },
    /// The client library refused its settings.
    #[error("cannot build the client")]
    Client(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// For whom a message is rendered.
#[derive(Clone, Copy, PartialEq, Eq)]
enum View {
    /// The destination.
    Real,
    /// People: secrets stay references.
    Redacted,
}

impl View {
    fn render(self, template: &Template, event: &Event, escape: Escape) -> String {
        match self {
            Self::Real => template.render(event, escape),
            Self::Redacted => template.render_redacted(event, escape),
        }
    }
}

/// Reads `timeout`: how long one attempt may take.
fn read_timeout(section: &mut Section<'_>, default: Duration) -> Duration {
    let parse = |text: &str| match humantime::parse_duration(text) {
        Ok(timeout) if timeout < Duration::from_millis(1) => Err("a time-out is at least 1ms".to_owned()),
        Ok(timeout) if timeout > MAX_TIMEOUT => Err("a time-out is at most 1h".to_owned()),
        Ok(timeout) => Ok(timeout),
        Err(error) => Err(format!("not a duration such as \"15s\": {error}")),
    };
    section.parse("timeout", parse).unwrap_or(default)
}

const MAX_TIMEOUT: Duration = Duration::from_secs(3600);

/// Milliseconds of a time-out; those are limited to far below what would saturate.
fn millis(timeout: Duration) -> u64 {
    u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX)
}

/// Reads a template that has to be there.
fn require_template(section: &mut Section<'_>, key: &'static str) -> Option<Template> {
    if section.value(key).is_none() && !section.lost(key) {
        section.problem(key, format!("`{key}` is missing"));
    }
    section.template(key)
}

#[cfg(test)]
mod tests;
