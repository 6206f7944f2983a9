//! Appending: a record per entry, by one idempotent producer for all cores.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::Bytes;
use futures_util::future::{BoxFuture, try_join_all};
use rdkafka::error::RDKafkaErrorCode as Code;

use super::topics::{self, Topics};
use super::{Address, Addressing, Aside, Config, Ends, OpenError, REPLAYED, ReadError, Reception, Scan, scan};
use crate::journal::{AppendError, Position, Start};
use crate::kafka::{Courier, Log, Producer, Record, SendError, Sent};

/// How long brokers may take to be there.
const PATIENCE: Duration = Duration::from_secs(30);
/// What a header takes besides its name and value, in bytes.
const HEADER_OVERHEAD: usize = 10;

/// A journal that is ready to be written to.
pub struct Journal {
    config: Config,
    writing: Arc<Writing>,
    addressing: Arc<ArcSwap<Box<dyn Addressing>>>,
    ends: Ends,
}

/// The producer, and what comes of it.
struct Writing {
    producer: Producer,
    reception: Reception,
}

/// One core's way into the journal. Clones share its courier.
#[derive(Clone)]
pub struct Appender {
    courier: Arc<Courier>,
    topic: Arc<str>,
    writing: Arc<Writing>,
    addressing: Arc<ArcSwap<Box<dyn Addressing>>>,
    /// In bytes.
    max_entry: u64,
}

/// The journal as those see it who look at it. Clones share it.
#[derive(Clone)]
pub struct View {
    config: Arc<Config>,
    appender: Appender,
    ends: Ends,
}

impl View {
    /// A reader of all partitions. Blocks.
    pub(in crate::journal) fn scan(&self, start: Start) -> Result<Scan, ReadError> {
        let scan = Scan::new(&self.config, self.ends.count(), start);
        scan.map_err(|source| ReadError { partition: 0, source })
    }

    /// The position that a scan ends at.
    pub(in crate::journal) fn end(&self) -> Position {
        scan::end(self.ends.count())
    }

    pub(in crate::journal) fn appender(&self) -> Appender {
        Appender { courier: Arc::default(), ..self.appender.clone() }
    }

    /// How far the partitions go.
    pub fn ends(&self) -> &Ends {
        &self.ends
    }

    /// Whether brokers take what is written.
    pub fn reception(&self) -> &Reception {
        &self.appender.writing.reception
    }
}

/// An append on its way to the brokers.
pub struct Append(OnItsWay);

enum OnItsWay {
    /// Most are of one record, and need no memory of their own.
    One(Arc<Writing>, Sent),
    More(BoxFuture<'static, Result<(), AppendError>>),
}

impl Journal {
    /// Makes what topics there are not, and checks them.
    ///
    /// # Errors
    ///
    /// [`OpenError`].
    pub async fn open(config: Config, addressing: Box<dyn Addressing>) -> Result<Self, OpenError> {
        let Topics { partitions } = topics::prepare(&config, PATIENCE).await?;
        let producer = Producer::new(Log::default(), producer(&config));
        producer.prepare()?;
        let ends = Ends::watch(&config, partitions)?;
        let addressing = Arc::new(ArcSwap::from_pointee(addressing));
        let writing = Arc::new(Writing { producer, reception: Reception::default() });
        Ok(Self { config, writing, addressing, ends })
    }

    /// The settings.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// A handle for those who append.
    pub fn appender(&self) -> Appender {
        let (writing, addressing) = (Arc::clone(&self.writing), Arc::clone(&self.addressing));
        let (courier, topic, max_entry) = (Arc::default(), self.config.events().into(), self.config.max_entry());
        Appender { courier, topic, writing, addressing, max_entry }
    }

    /// How far the partitions go.
    pub fn ends(&self) -> &Ends {
        &self.ends
    }

    /// Whether brokers take what is written.
    pub fn reception(&self) -> &Reception {
        &self.writing.reception
    }

    /// A handle for those who look at it.
    pub fn view(&self) -> View {
        View { config: Arc::new(self.config.clone()), appender: self.appender(), ends: self.ends.clone() }
    }

    /// Addresses entries otherwise from now on.
    pub fn readdress(&self, addressing: Box<dyn Addressing>) {
        self.addressing.store(Arc::new(addressing));
    }

    /// Waits for what is on its way.
    pub async fn close(&self) {
        self.writing.producer.close().await;
    }
}

pub(super) fn producer(config: &Config) -> rdkafka::ClientConfig {
    let timeout = config.timeout.as_millis().to_string();
    let mut client = config.client();
    let mut unless_given = |name, alias, value| {
        if ![name, alias].iter().any(|name| config.options.contains_key(*name)) {
            client.set(name, value);
        }
    };
    // A broker answers a connection's requests one after the other: events that come meanwhile had better wait here, and go
    // out together, than behind it in many small requests.
    unless_given("max.in.flight", "max.in.flight.requests.per.connection", "1");
    // Events have much in common, and are kept several times.
    unless_given("compression.type", "compression.codec", "lz4");
    client
        .set("queue.buffering.max.messages", "100000")
        .set("queue.buffering.max.kbytes", "131072")
        .set("message.timeout.ms", &timeout)
        .set("enable.idempotence", "true")
        .set("acks", "all")
        // As Java's clients do it, so that others can tell where an entry is.
        .set("partitioner", "murmur2_random");
    client
}

impl Appender {
    /// Sends the entries. The result is ready when all in-sync replicas have them.
    pub(in crate::journal) fn append(&self, entries: Vec<Vec<u8>>) -> Result<Append, AppendError> {
        let addressing = self.addressing.load();
        let entries = entries.into_iter().map(|entry| {
            let entry = Bytes::from(entry);
            let address = addressing.address(&entry);
            (entry, address)
        });
        let entries: Vec<_> = entries.collect();
        let longest = entries.iter().map(|(entry, address)| size(entry, address)).max().unwrap_or(0);
        if longest > self.max_entry {
            return Err(AppendError::TooLarge { bytes: longest, max: self.max_entry });
        }
        let mut sent = Vec::with_capacity(entries.len());
        for (entry, Address { key, groups, aside, .. }) in entries {
            sent.push((self.begin(entry, key, groups, Some(&self.courier))?, aside));
        }
        Ok(self.arrived(sent))
    }

    /// Sends entries again, each to the one group, and waits until they are stored.
    ///
    /// # Errors
    ///
    /// [`AppendError`]: some may be stored nevertheless.
    pub async fn send_to(&self, group: &str, entries: Vec<Bytes>) -> Result<(), AppendError> {
        let addressing = self.addressing.load_full();
        for some in entries.chunks(1000) {
            let sent = some.iter().map(|entry| {
                let groups = vec![(group.to_owned(), "-".to_owned()), (REPLAYED.to_owned(), String::new())];
                Ok((self.begin(entry.clone(), addressing.key(entry), groups, None)?, None))
            });
            let sent = sent.collect::<Result<_, AppendError>>()?;
            self.arrived(sent).await?;
        }
        Ok(())
    }

    /// Wakes this core's requests when brokers have what they wait for; runs for ever. One per core, on that core.
    pub(in crate::journal) async fn courier(self) {
        self.courier.run().await;
    }

    fn begin(
        &self,
        body: Bytes,
        key: Option<String>,
        headers: Vec<(String, String)>,
        courier: Option<&Arc<Courier>>,
    ) -> Result<Sent, AppendError> {
        let record = Record { topic: self.topic.to_string(), partition: None, key, headers, body: Some(body) };
        self.writing.producer.begin(&record, courier).map_err(refused)
    }

    fn arrived(&self, sent: Vec<(Sent, Option<Aside>)>) -> Append {
        let writing = Arc::clone(&self.writing);
        let sent = match <[_; 1]>::try_from(sent) {
            Ok([(only, None)]) => return Append(OnItsWay::One(writing, only)),
            Ok(one) => one.into(),
            Err(sent) => sent,
        };
        let has_aside = sent.iter().any(|(_, aside)| aside.is_some());
        let arrived = async move {
            let all = sent.into_iter().map(|(sent, aside)| stored(&writing.producer, sent, aside));
            let result = try_join_all(all).await.map(drop);
            writing.ended(&result);
            result.map_err(refused)
        };
        if !has_aside {
            return Append(OnItsWay::More(Box::pin(arrived)));
        }
        // A task of its own: dropping an append takes nothing back.
        let task = tokio::spawn(arrived);
        Append(OnItsWay::More(Box::pin(async move { task.await.unwrap_or(Err(AppendError::Closed)) })))
    }
}

/// What an entry takes with what it is sent with, or with what is said about it later, in bytes.
fn size(entry: &Bytes, address: &Address) -> u64 {
    let groups = address.groups.iter().map(|(group, route)| group.len() + route.len() + HEADER_OVERHEAD);
    let sent_with = groups.sum::<usize>() + address.key.as_ref().map_or(0, String::len);
    (entry.len() + sent_with.max(address.about)) as u64
}

async fn stored(producer: &Producer, sent: Sent, aside: Option<Aside>) -> Result<(), SendError> {
    let place = producer.arrived(sent).await?;
    if let Some(aside) = aside {
        // A broker may say that it has the record already, and not where.
        if place.offset < 0 {
            return Err(SendError::Report(Code::DuplicateSequenceNumber));
        }
        producer.send(&aside(place)).await?;
    }
    Ok(())
}

impl Future for Append {
    type Output = Result<(), AppendError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut self.0 {
            OnItsWay::One(writing, sent) => writing.producer.poll_arrived(sent, cx).map(|place| {
                let result = place.map(drop);
                writing.ended(&result);
                result.map_err(refused)
            }),
            OnItsWay::More(arrived) => arrived.as_mut().poll(cx),
        }
    }
}

impl Writing {
    fn ended(&self, result: &Result<(), SendError>) {
        match result {
            Ok(()) => self.reception.taken(),
            // What else there is says that a broker has answered.
            Err(SendError::Report(Code::MessageTimedOut)) => self.reception.missed(Code::MessageTimedOut.to_string()),
            Err(_) => {}
        }
    }
}

fn refused(error: SendError) -> AppendError {
    match error {
        SendError::Closed => AppendError::Closed,
        SendError::Local(Code::QueueFull) => AppendError::Busy,
        SendError::Local(code) | SendError::Report(code) => AppendError::Unconfirmed(code.to_string().into()),
    }
}
