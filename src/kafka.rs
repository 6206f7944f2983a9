//! What those share who speak to Kafka: a producer, following a topic, librdkafka's log, and what may be said about brokers and
//! options.

mod courier;
mod follower;
mod producer;
mod silence;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rdkafka::config::{FromClientConfigAndContext as _, RDKafkaLogLevel};
use rdkafka::consumer::ConsumerContext;
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode as Code};
use rdkafka::producer::{BaseProducer, DeliveryResult, ProducerContext};
use rdkafka::{ClientConfig, ClientContext};
use tracing::{debug, info, warn};

pub use courier::Courier;
pub use follower::Follower;
pub use producer::{Place, Producer, Record, SendError, Sent};
pub use silence::Silence;

/// librdkafka properties that nobody may set, and why.
pub const RESERVED_OPTIONS: [(&str, &str); 12] = [
    ("acks", "every event has to be acknowledged by all in-sync replicas"),
    ("request.required.acks", "every event has to be acknowledged by all in-sync replicas"),
    ("enable.idempotence", "the producer is always idempotent, so that resending makes no duplicates"),
    ("bootstrap.servers", "write `brokers` instead"),
    ("metadata.broker.list", "write `brokers` instead"),
    ("message.timeout.ms", "write `timeout` instead"),
    ("delivery.timeout.ms", "write `timeout` instead"),
    ("transactional.id", "the relay decides about transactions"),
    ("delivery.report.only.error", "every delivery report is awaited"),
    ("queuing.strategy", "order matters"),
    ("log_level", "the relay's own log level decides"),
    ("plugin.library.paths", "plugins are not loaded"),
];

/// How many clients may be ending at once that one owner has given up.
const MAX_GIVEN_UP: usize = 4;
/// Within this time the same error is the same one: producers are told of each twice.
const REPEATED: Duration = Duration::from_secs(1);

/// librdkafka's log as ours. It reconnects by itself, so that nothing it says is more than a warning.
#[derive(Clone, Default)]
pub struct Log {
    sink: Option<Arc<str>>,
    last_error: Arc<Mutex<Option<(Instant, String)>>>,
}

impl Log {
    /// Of a sink's client; the journal's have none.
    pub fn of_sink(sink: &str) -> Self {
        Self { sink: Some(sink.into()), ..Self::default() }
    }

    fn sink(&self) -> Option<&str> {
        self.sink.as_deref()
    }

    /// Whether an error is another one than the last, which it is from then on.
    fn note(&self, reason: &str) -> bool {
        let mut last = self.last_error.lock().unwrap_or_else(PoisonError::into_inner);
        let is_new = last.as_ref().is_none_or(|(at, last)| last != reason || at.elapsed() >= REPEATED);
        if is_new {
            *last = Some((Instant::now(), reason.to_owned()));
        }
        is_new
    }
}

impl ClientContext for Log {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, text: &str) {
        let sink = self.sink();
        if is_usual(facility, text) {
            return debug!(sink, facility, text, "librdkafka");
        }
        match level {
            // It comes as an error too.
            RDKafkaLogLevel::Emerg | RDKafkaLogLevel::Alert | RDKafkaLogLevel::Critical | RDKafkaLogLevel::Error
                if facility == "FAIL" =>
            {
                debug!(sink, facility, text, "librdkafka");
            }
            RDKafkaLogLevel::Emerg
            | RDKafkaLogLevel::Alert
            | RDKafkaLogLevel::Critical
            | RDKafkaLogLevel::Error
            | RDKafkaLogLevel::Warning => warn!(sink, facility, text, "librdkafka"),
            RDKafkaLogLevel::Notice | RDKafkaLogLevel::Info => info!(sink, facility, text, "librdkafka"),
            RDKafkaLogLevel::Debug => debug!(sink, facility, text, "librdkafka"),
        }
    }

    fn error(&self, error: KafkaError, reason: &str) {
        let sink = self.sink();
        match error.rdkafka_error_code() {
            // That is none.
            Some(Code::PartitionEOF) => {}
            // That follows from the others.
            Some(Code::AllBrokersDown) => debug!(sink, %error, reason, "librdkafka reports an error"),
            _ if self.note(reason) => warn!(sink, %error, reason, "librdkafka reports an error"),
            _ => {}
        }
    }

    fn stats_raw(&self, _statistics: &[u8]) {}
}

/// Whether nothing is unexpected about it.
fn is_usual(facility: &str, text: &str) -> bool {
    match facility {
        // What is set for all clients of a kind is not for each of them.
        "CONFWARN" => {
            let is_of = |kind| text.ends_with(&format!("will be ignored by this {kind} instance"));
            is_of("consumer") || is_of("producer")
        }
        // So a broker answers the first that asks it since its start.
        "GETPID" => text.contains("oordinator load in progress"),
        _ => false,
    }
}

impl ConsumerContext for Log {}

/// What fails to arrive fails the transaction that it is part of.
impl ProducerContext for Log {
    type DeliveryOpaque = ();

    fn delivery(&self, _result: &DeliveryResult<'_>, (): ()) {}
}

/// Clients that were given up. Each is ended on a thread of its own, since librdkafka may take long for that, or for ever.
#[derive(Default)]
pub struct GivenUp(Vec<JoinHandle<()>>);

impl GivenUp {
    /// Whether so many have not ended yet that no other should be given up.
    pub fn is_full(&mut self) -> bool {
        self.0.retain(|ending| !ending.is_finished());
        self.0.len() >= MAX_GIVEN_UP
    }

    /// Ends another one.
    pub fn end(&mut self, client: impl Send + 'static) {
        match std::thread::Builder::new().name("kafka-end".to_owned()).spawn(move || drop(client)) {
            Ok(ending) => self.0.push(ending),
            Err(error) => debug!(%error, "a client was ended here and now"),
        }
    }
}

fn code_of(error: &KafkaError) -> Code {
    error.rdkafka_error_code().unwrap_or(Code::Fail)
}

/// What is wrong with a list of brokers that is empty.
pub const NO_BROKERS: &str = "the list of brokers is empty";

/// What is wrong with a list of brokers.
pub fn problems_of_brokers(brokers: &[String]) -> Vec<String> {
    if brokers.is_empty() {
        return vec![NO_BROKERS.to_owned()];
    }
    brokers.iter().filter_map(|broker| problem_of_broker(broker)).collect()
}

/// What is wrong with one of them.
pub fn problem_of_broker(broker: &str) -> Option<String> {
    (!is_broker(broker)).then(|| format!("{broker:?} is not a broker's address, such as \"kafka-0:9092\""))
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

/// Takes those options away that nobody may set, of ours or of the caller's, and says why.
pub fn take_reserved(options: &mut BTreeMap<String, String>, callers: &[(&str, &str)]) -> Vec<String> {
    let mut problems = Vec::new();
    options.retain(|option, _| {
        // librdkafka takes what is set for a topic with this prefix too.
        let name = option.trim_start_matches("topic.");
        let reserved = RESERVED_OPTIONS.iter().chain(callers).find(|(reserved, _)| *reserved == name);
        problems.extend(reserved.map(|(_, reason)| format!("{option:?} cannot be set: {reason}")));
        reserved.is_none()
    });
    problems
}

/// Whether a producer can be made of the options: of the files that they name, and of all of them together. Connects to
/// nothing.
///
/// # Errors
///
/// Why not.
pub fn check(mut client: ClientConfig) -> KafkaResult<()> {
    client.remove("bootstrap.servers").set_log_level(RDKafkaLogLevel::Critical);
    BaseProducer::from_config_and_context(&client, Log::default()).map(drop)
}

/// What librdkafka objects to, of each option.
pub fn refused_options(options: &BTreeMap<String, String>) -> impl Iterator<Item = String> {
    let refused = |(name, value)| ClientConfig::new().set(name, value).create_native_config().err();
    options.iter().filter_map(refused).map(|error| refused_option(&error))
}

/// What librdkafka objects to; without the value, which may be a secret.
fn refused_option(error: &KafkaError) -> String {
    match error {
        KafkaError::ClientConfig(_, _, name, _) => {
            format!("librdkafka does not know {name:?}, or not with this value")
        }
        _ => "librdkafka refuses these options".to_owned(),
    }
}
