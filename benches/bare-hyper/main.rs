//! The yardstick of `scripts/bench`: a bare hyper server that reads the body and answers 200, built like the ingress (one
//! single-threaded runtime per core, connections dealt in turn) and doing nothing else.
//!
//! With a directory, it first appends each body to a journal there, and answers when it is durable: the least that the relay
//! can do. With a topic, it sends each body there, as the relay's journal on Kafka does, and answers when it is acknowledged.
//! With a group, it also reads the topic as a member of that group, as a relay with a sink does, and throws away what it reads.
//!
//! Usage: `bare-hyper ADDRESS [DIRECTORY | BROKERS TOPIC [GROUP]]`

use std::convert::Infallible;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use engage_relay::journal::Position;
use engage_relay::journal::disk::recovery::Known;
use engage_relay::journal::disk::{Appender, Config, Journal, Metrics};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::error::KafkaError;
use rdkafka::producer::{FutureProducer, FutureRecord};
use tokio::sync::mpsc;

static NUMBER: AtomicU64 = AtomicU64::new(0);

/// Where bodies are kept.
#[derive(Clone)]
enum Store {
    Nowhere,
    Journal(Appender),
    Topic(Topic),
}

impl Store {
    /// Whether a body is kept there.
    async fn keep(&self, body: &[u8]) -> bool {
        match self {
            Self::Nowhere => true,
            Self::Journal(appender) => {
                match appender.append(|entries| entries.entry(|out| out.extend_from_slice(body))) {
                    Ok(append) => append.await.is_ok(),
                    Err(_) => false,
                }
            }
            Self::Topic(topic) => topic.send(body).await,
        }
    }
}

/// A journal as the relay has it, of which nothing is kept that is full.
fn journal(dir: &Path) -> Result<Journal, Box<dyn std::error::Error>> {
    let config = Config { retention: Duration::ZERO, ..Config::default() };
    let known = Known { needed: None, floor: Position::ZERO };
    let metrics = Metrics::new(&prometheus::Registry::new())?;
    let (mut journal, _) = Journal::open(&dir.join("journal"), &dir.join("quarantine"), &config, known, metrics)?;
    journal.start()?;
    Ok(journal)
}

/// What is sent to a topic.
#[derive(Clone)]
struct Topic {
    producer: FutureProducer,
    name: String,
}

impl Topic {
    fn new(brokers: &str, name: &str) -> Result<Self, KafkaError> {
        let mut client = ClientConfig::new();
        client
            .set("bootstrap.servers", brokers)
            .set("socket.nagle.disable", "true")
            .set("max.in.flight", "1")
            .set("compression.type", "lz4")
            .set("queue.buffering.max.messages", "100000")
            .set("queue.buffering.max.kbytes", "131072")
            .set("message.timeout.ms", "5000")
            .set("enable.idempotence", "true")
            .set("acks", "all")
            .set("partitioner", "murmur2_random");
        Ok(Self { producer: client.create()?, name: name.to_owned() })
    }

    /// Whether it was acknowledged. The keys spread over partitions as the message ids of `scripts/bench` do.
    async fn send(&self, body: &[u8]) -> bool {
        let key = NUMBER.fetch_add(1, Ordering::Relaxed).to_string();
        let record = FutureRecord::to(&self.name).key(&key).payload(body);
        match self.producer.send_result(record) {
            Ok(report) => matches!(report.await, Ok(Ok(_))),
            Err(_) => false,
        }
    }
}

/// Reads a topic for a group, on a thread of its own, with the settings of the relay's readers.
fn read(brokers: &str, topic: &str, group: &str) -> Result<(), KafkaError> {
    let mut client = ClientConfig::new();
    client
        .set("bootstrap.servers", brokers)
        .set("group.id", group)
        .set("isolation.level", "read_committed")
        .set("auto.offset.reset", "earliest")
        .set("auto.commit.interval.ms", "1000")
        .set("queued.min.messages", "1")
        .set("fetch.queue.backoff.ms", "100")
        .set("fetch.wait.max.ms", "100")
        .set("fetch.message.max.bytes", "131072");
    let consumer: BaseConsumer = client.create()?;
    consumer.subscribe(&[topic])?;
    std::thread::spawn(move || {
        consumer.iter().for_each(|read| read.map(drop).unwrap_or_else(|error| eprintln!("{error}")))
    });
    Ok(())
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let address: SocketAddr = arguments.next().ok_or("usage: bare-hyper ADDRESS")?.parse()?;
    let listener = TcpListener::bind(address)?;
    let store: Box<dyn Fn() -> Store> = match (arguments.next(), arguments.next(), arguments.next()) {
        (Some(brokers), Some(topic), group) => {
            if let Some(group) = group {
                read(&brokers, &topic, &group)?;
            }
            let topic = Topic::new(&brokers, &topic)?;
            Box::new(move || Store::Topic(topic.clone()))
        }
        (Some(dir), None, _) => {
            let journal = journal(dir.as_ref())?;
            Box::new(move || Store::Journal(journal.view().appender()))
        }
        _ => Box::new(|| Store::Nowhere),
    };
    let cores = std::thread::available_parallelism()?.get();
    let queues: Vec<_> = (0..cores)
        .map(|_| {
            let (sender, queue) = mpsc::channel(128);
            let store = store();
            std::thread::spawn(move || serve(queue, store));
            sender
        })
        .collect();
    for (queue, stream) in queues.iter().cycle().zip(listener.incoming()) {
        queue.blocking_send(stream?)?;
    }
    Ok(())
}

fn serve(mut queue: mpsc::Receiver<TcpStream>, store: Store) -> std::io::Result<()> {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    if let Store::Journal(appender) = store.clone() {
        runtime.on_thread_park(move || appender.submit());
    }
    runtime.enable_all().build()?.block_on(async {
        if let Store::Journal(appender) = store.clone() {
            tokio::spawn(appender.courier());
        }
        while let Some(stream) = queue.recv().await {
            stream.set_nodelay(true)?;
            stream.set_nonblocking(true)?;
            let io = TokioIo::new(tokio::net::TcpStream::from_std(stream)?);
            // A client that goes away is none of the measurement's business.
            let store = store.clone();
            tokio::spawn(async move {
                let mut server = http1::Builder::new();
                // As the ingress does it for those who wait for the journal.
                server.writev(false).half_close(matches!(store, Store::Journal(_)));
                let answer = service_fn(|request| answer(request, &store));
                drop(server.serve_connection(io, answer).await)
            });
        }
        Ok(())
    })
}

async fn answer(request: Request<Incoming>, store: &Store) -> Result<Response<Full<Bytes>>, Infallible> {
    // As above.
    let body = request.into_body().collect().await;
    let mut response = Response::new(Full::from("ok"));
    if let Ok(body) = body
        && !store.keep(&body.to_bytes()).await
    {
        *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
    }
    Ok(response)
}
