//! A librdkafka producer that is replaced when it has failed for good.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use rdkafka::ClientConfig;
use rdkafka::config::FromClientConfigAndContext;
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{DeliveryFuture, FutureProducer, FutureRecord, Producer as _};
use tracing::warn;

use super::Log;

/// How long [`Producer::close`] waits for what is on its way.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(5);

/// What is sent.
pub struct Record {
    /// Where to.
    pub topic: String,
    /// Which; the key decides without it.
    pub partition: Option<i32>,
    /// What decides about the partition; any without it.
    pub key: Option<String>,
    /// Names and values.
    pub headers: Vec<(String, String)>,
    /// The value. In a topic that is compacted, nothing removes what has the key.
    pub body: Option<Bytes>,
}

impl Record {
    /// The headers, as librdkafka takes them.
    pub fn headers(&self) -> OwnedHeaders {
        let headers = OwnedHeaders::new_with_capacity(self.headers.len());
        self.headers.iter().fold(headers, |headers, (key, value)| headers.insert(Header { key, value: Some(value) }))
    }
}

/// A record on its way.
pub struct Sent {
    producer: FutureProducer<Log>,
    report: DeliveryFuture,
}

/// Where a record is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Which.
    pub partition: i32,
    /// In it.
    pub offset: i64,
}

/// Why a record was not accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// Refused before it was queued: nothing was sent.
    #[error("the record was not sent: {0}")]
    Local(RDKafkaErrorCode),
    /// What the delivery report says.
    #[error("the record was not acknowledged: {0}")]
    Report(RDKafkaErrorCode),
    /// The producer was closed.
    #[error("the producer is closed")]
    Closed,
}

/// A producer, made when it is first needed. An idempotent producer that can no longer keep its promise fails every
/// record from then on ("fatal"), so that it has to be made anew.
pub struct Producer {
    config: ClientConfig,
    log: Log,
    state: Mutex<State>,
}

enum State {
    Unmade,
    Made(FutureProducer<Log>),
    Closed,
}

impl Producer {
    /// For a sink, or for the journal.
    pub fn new(log: Log, config: ClientConfig) -> Self {
        Self { config, log, state: Mutex::new(State::Unmade) }
    }

    /// Makes the producer now, so that a mistake in its settings shows at the start.
    ///
    /// # Errors
    ///
    /// librdkafka does not take the settings.
    pub fn prepare(&self) -> KafkaResult<()> {
        self.current().map(drop)
    }

    /// Sends one record and awaits its delivery report, which librdkafka gives within the message time-out.
    ///
    /// # Errors
    ///
    /// [`SendError`].
    pub async fn send(&self, record: &Record) -> Result<Place, SendError> {
        self.arrived(self.begin(record)?).await
    }

    /// Queues one record.
    ///
    /// # Errors
    ///
    /// [`SendError`]: nothing was sent.
    pub fn begin(&self, record: &Record) -> Result<Sent, SendError> {
        let producer = self.current().map_err(|error| match error {
            KafkaError::Canceled => SendError::Closed,
            error => SendError::Local(code_of(&error)),
        })?;
        let mut message: FutureRecord<'_, str, [u8]> = FutureRecord::to(&record.topic).headers(record.headers());
        if let Some(body) = &record.body {
            message = message.payload(&**body);
        }
        if let Some(key) = &record.key {
            message = message.key(key.as_str());
        }
        if let Some(partition) = record.partition {
            message = message.partition(partition);
        }
        match producer.send_result(message) {
            Ok(report) => Ok(Sent { producer, report }),
            Err((error, _message)) => {
                self.replace_failed(producer);
                Err(SendError::Local(code_of(&error)))
            }
        }
    }

    /// Awaits a record's delivery report.
    ///
    /// # Errors
    ///
    /// [`SendError`].
    pub async fn arrived(&self, Sent { producer, report }: Sent) -> Result<Place, SendError> {
        let result = match report.await {
            Ok(Ok(accepted)) => return Ok(Place { partition: accepted.partition, offset: accepted.offset }),
            Ok(Err((error, _message))) => Err(SendError::Report(code_of(&error))),
            Err(_canceled) => Err(SendError::Closed),
        };
        self.replace_failed(producer);
        result
    }

    /// Waits for the reports of what was sent, a few seconds at most, and lets go of the producer.
    pub async fn close(&self) {
        let state = std::mem::replace(&mut *self.lock(), State::Closed);
        let State::Made(producer) = state else { return };
        let flush = tokio::task::spawn_blocking(move || producer.flush(FLUSH_TIMEOUT));
        if let Ok(Err(error)) = flush.await {
            warn!(sink = self.log.sink(), %error, "some records were not acknowledged before the producer was closed");
        }
    }

    /// The producer, made now if need be; `Canceled` after [`Producer::close`].
    fn current(&self) -> KafkaResult<FutureProducer<Log>> {
        let mut state = self.lock();
        match &*state {
            State::Made(producer) => Ok(producer.clone()),
            State::Closed => Err(KafkaError::Canceled),
            State::Unmade => {
                let producer = FutureProducer::from_config_and_context(&self.config, self.log.clone())?;
                *state = State::Made(producer.clone());
                Ok(producer)
            }
        }
    }

    fn replace_failed(&self, producer: FutureProducer<Log>) {
        let Some((code, reason)) = producer.client().fatal_error() else { return };
        let failed = |client: &FutureProducer<Log>| client.client().fatal_error().is_some();
        let mut state = self.lock();
        let old = match &*state {
            State::Made(current) if failed(current) => std::mem::replace(&mut *state, State::Unmade),
            State::Made(_) | State::Unmade | State::Closed => return,
        };
        drop(state);
        warn!(sink = self.log.sink(), %code, reason, "the producer failed for good and is made anew");
        // The last one to let go waits for librdkafka's threads.
        tokio::task::spawn_blocking(move || drop((old, producer)));
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn code_of(error: &KafkaError) -> RDKafkaErrorCode {
    error.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::Fail)
}
