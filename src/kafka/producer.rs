//! A librdkafka producer that is replaced when it has failed for good, or gets nothing through to a partition any more.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use bytes::Bytes;
use rdkafka::ClientConfig;
use rdkafka::config::FromClientConfigAndContext;
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer as _};
use tokio::sync::oneshot;
use tracing::warn;

use super::courier::{Courier, Report, Reports, Waiting};
use super::silence::Silence;
use super::{Log, code_of};

/// How long a producer that is not needed any more waits for what is on its way.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(5);
/// How long one call may wait for reports. rdkafka is busy for its last millisecond, and who ends a producer waits for it.
const POLL: Duration = Duration::from_millis(250);

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
    pub fn headers(&self) -> Option<OwnedHeaders> {
        if self.headers.is_empty() {
            return None;
        }
        let headers = OwnedHeaders::new_with_capacity(self.headers.len());
        let insert =
            |headers: OwnedHeaders, (key, value): &(String, String)| headers.insert(Header { key, value: Some(value) });
        Some(self.headers.iter().fold(headers, insert))
    }
}

/// A record on its way.
pub struct Sent(oneshot::Receiver<Report>);

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
    state: ArcSwap<State>,
    /// Held while the state is changed.
    changing: Mutex<()>,
    silence: Silence,
}

enum State {
    Unmade,
    Made(Arc<Polled>),
    Closed,
}

/// A producer, and the thread that its reports come on. Dropping it waits for librdkafka's threads.
struct Polled {
    producer: Arc<BaseProducer<Reports>>,
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Producer {
    /// For a sink, or for the journal.
    pub fn new(log: Log, config: ClientConfig) -> Self {
        Self {
            config,
            log,
            state: ArcSwap::from_pointee(State::Unmade),
            changing: Mutex::new(()),
            silence: Silence::default(),
        }
    }

    /// Makes the producer now, so that a mistake in its settings shows at the start.
    ///
    /// # Errors
    ///
    /// librdkafka does not take the settings.
    pub fn prepare(&self) -> KafkaResult<()> {
        self.make().map(drop)
    }

    /// Sends one record and awaits its delivery report, which librdkafka gives within the message time-out.
    ///
    /// # Errors
    ///
    /// [`SendError`].
    pub async fn send(&self, record: &Record) -> Result<Place, SendError> {
        self.arrived(self.begin(record, None)?).await
    }

    /// Queues one record. Its delivery report comes by the courier, if one is given, who has to be running.
    ///
    /// # Errors
    ///
    /// [`SendError`]: nothing was sent.
    pub fn begin(&self, record: &Record, courier: Option<&Arc<Courier>>) -> Result<Sent, SendError> {
        let (report, sent) = oneshot::channel();
        let waiting = Box::new(Waiting { report, courier: courier.cloned() });
        let message = BaseRecord {
            topic: &record.topic,
            partition: record.partition,
            key: record.key.as_deref(),
            payload: record.body.as_deref(),
            headers: record.headers(),
            timestamp: None,
            delivery_opaque: waiting,
        };
        let queued = match &**self.state.load() {
            State::Made(polled) => polled.producer.send(message),
            State::Unmade | State::Closed => self.make().map_err(|error| refused(&error))?.producer.send(message),
        };
        match queued {
            Ok(()) => Ok(Sent(sent)),
            Err((error, _message)) => {
                self.replace_failed();
                Err(refused(&error))
            }
        }
    }

    /// Awaits a record's delivery report.
    ///
    /// # Errors
    ///
    /// [`SendError`].
    pub async fn arrived(&self, mut sent: Sent) -> Result<Place, SendError> {
        poll_fn(|cx| self.poll_arrived(&mut sent, cx)).await
    }

    /// [`Producer::arrived`], for whoever is a future already.
    pub fn poll_arrived(&self, sent: &mut Sent, cx: &mut Context<'_>) -> Poll<Result<Place, SendError>> {
        let error = match ready!(Pin::new(&mut sent.0).poll(cx)) {
            Ok(Ok(place)) => {
                self.silence.heard(place.partition);
                return Poll::Ready(Ok(place));
            }
            Ok(Err(unsent)) => {
                if unsent.code == RDKafkaErrorCode::MessageTimedOut
                    && self.silence.missed(unsent.partition, Instant::now())
                {
                    self.replace_silent(&unsent.topic, unsent.partition);
                }
                SendError::Report(unsent.code)
            }
            Err(_closed) => SendError::Closed,
        };
        self.replace_failed();
        Poll::Ready(Err(error))
    }

    /// Waits for the reports of what was sent, a few seconds at most, and lets go of the producer.
    pub async fn close(&self) {
        let changing = self.lock();
        let state = self.state.swap(Arc::new(State::Closed));
        drop(changing);
        let flush = tokio::task::spawn_blocking(move || state.flush());
        if let Ok(Err(error)) = flush.await {
            warn!(sink = self.log.sink(), %error, "some records were not acknowledged before the producer was closed");
        }
    }

    /// The producer, made now if need be; `Canceled` after [`Producer::close`].
    fn make(&self) -> KafkaResult<Arc<Polled>> {
        let _changing = self.lock();
        match &**self.state.load() {
            State::Made(polled) => Ok(Arc::clone(polled)),
            State::Closed => Err(KafkaError::Canceled),
            State::Unmade => {
                let polled = Arc::new(Polled::start(&self.config, self.log.clone())?);
                self.state.store(Arc::new(State::Made(Arc::clone(&polled))));
                Ok(polled)
            }
        }
    }

    /// Another is made for the next record, if this one has failed for good.
    fn replace_failed(&self) {
        if self.state.load().failure().is_none() {
            return;
        }
        let changing = self.lock();
        let state = self.state.load_full();
        let Some((code, reason)) = state.failure() else { return };
        self.let_go(state, changing);
        warn!(sink = self.log.sink(), %code, reason, "the producer failed for good and is made anew");
    }

    /// Another is made for the next record.
    fn replace_silent(&self, topic: &str, partition: i32) {
        let changing = self.lock();
        let state = self.state.load_full();
        if let State::Made(_) = &*state {
            self.silence.clear();
            self.let_go(state, changing);
            warn!(
                sink = self.log.sink(),
                topic, partition, "nothing gets through to a partition; the producer is made anew"
            );
        }
    }

    fn let_go(&self, state: Arc<State>, changing: MutexGuard<'_, ()>) {
        self.state.store(Arc::new(State::Unmade));
        drop(changing);
        // What is on its way gets its report, or is given up. The last one to let go waits for librdkafka's threads.
        tokio::task::spawn_blocking(move || drop(state.flush()));
    }

    fn lock(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// What the producer has failed for good with, if so.
    fn failure(&self) -> Option<(RDKafkaErrorCode, String)> {
        match self {
            Self::Made(polled) => polled.producer.client().fatal_error(),
            Self::Unmade | Self::Closed => None,
        }
    }

    /// Waits for the reports of what was sent.
    fn flush(&self) -> KafkaResult<()> {
        match self {
            Self::Made(polled) => polled.producer.flush(FLUSH_TIMEOUT),
            Self::Unmade | Self::Closed => Ok(()),
        }
    }
}

impl Polled {
    fn start(config: &ClientConfig, log: Log) -> KafkaResult<Self> {
        let producer: Arc<BaseProducer<_>> = Arc::new(BaseProducer::from_config_and_context(config, Reports(log))?);
        let ended = Arc::new(AtomicBool::new(false));
        let (polled, end) = (Arc::clone(&producer), Arc::clone(&ended));
        let poll = move || {
            while !end.load(Ordering::Relaxed) {
                polled.poll(POLL);
            }
        };
        let thread = std::thread::Builder::new().name("kafka-reports".to_owned()).spawn(poll);
        let thread = thread.map_err(|error| KafkaError::ClientCreation(error.to_string()))?;
        Ok(Self { producer, ended, thread: Some(thread) })
    }
}

impl Drop for Polled {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        // Its panic has been reported by the thread itself.
        drop(self.thread.take().map(JoinHandle::join));
    }
}

fn refused(error: &KafkaError) -> SendError {
    match error {
        KafkaError::Canceled => SendError::Closed,
        error => SendError::Local(code_of(error)),
    }
}
