//! The yardstick of `scripts/bench`: a bare hyper server that reads the body and answers 200, built like the ingress (one
//! single-threaded runtime per core, connections dealt in turn) and doing nothing else.
//!
//! With a topic, it sends each body there first, as the relay's journal on Kafka does, and answers when it is acknowledged.
//!
//! Usage: `bare-hyper ADDRESS [BROKERS TOPIC]`

use std::convert::Infallible;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use rdkafka::ClientConfig;
use rdkafka::error::KafkaError;
use rdkafka::producer::{FutureProducer, FutureRecord};
use tokio::sync::mpsc;

static NUMBER: AtomicU64 = AtomicU64::new(0);

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

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let address: SocketAddr = std::env::args().nth(1).ok_or("usage: bare-hyper ADDRESS")?.parse()?;
    let listener = TcpListener::bind(address)?;
    let topic = match (std::env::args().nth(2), std::env::args().nth(3)) {
        (Some(brokers), Some(topic)) => Some(Topic::new(&brokers, &topic)?),
        _ => None,
    };
    let cores = std::thread::available_parallelism()?.get();
    let queues: Vec<_> = (0..cores)
        .map(|_| {
            let (sender, queue) = mpsc::channel(128);
            let topic = topic.clone();
            std::thread::spawn(move || serve(queue, topic));
            sender
        })
        .collect();
    for (queue, stream) in queues.iter().cycle().zip(listener.incoming()) {
        queue.blocking_send(stream?)?;
    }
    Ok(())
}

fn serve(mut queue: mpsc::Receiver<TcpStream>, topic: Option<Topic>) -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        while let Some(stream) = queue.recv().await {
            stream.set_nodelay(true)?;
            stream.set_nonblocking(true)?;
            let io = TokioIo::new(tokio::net::TcpStream::from_std(stream)?);
            // A client that goes away is none of the measurement's business.
            let topic = topic.clone();
            tokio::spawn(async move {
                let answer = service_fn(|request| answer(request, topic.as_ref()));
                drop(http1::Builder::new().writev(false).serve_connection(io, answer).await)
            });
        }
        Ok(())
    })
}

async fn answer(request: Request<Incoming>, topic: Option<&Topic>) -> Result<Response<Full<Bytes>>, Infallible> {
    // As above.
    let body = request.into_body().collect().await;
    let mut response = Response::new(Full::from("ok"));
    if let (Some(topic), Ok(body)) = (topic, body)
        && !topic.send(&body.to_bytes()).await
    {
        *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
    }
    Ok(response)
}
