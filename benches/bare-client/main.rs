//! The yardstick of `scripts/bench drain`: sends what a sink sends, with the same guarantee and as many under way at once,
//! from the client library alone.
//!
//! Usage: `bare-client prepare|count|remove KIND ADDRESS NAME`, where KIND is `kafka` (NAME is a topic) or `rabbitmq` (a
//! queue), and `bare-client send KIND ADDRESS NAME COUNT CONCURRENCY BODY`, where it may also be `http` (a path). In BODY
//! the event's number takes the place of `{}`. `count` prints how many messages are there, `send` how many seconds it took.

use std::error::Error;
use std::io::Write as _;
use std::time::{Duration, Instant};

use futures_util::stream::{self, StreamExt as _, TryStreamExt as _};
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions, QueueDeleteOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Confirmation, Connection, ConnectionProperties};
use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{FutureProducer, FutureRecord};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// How long a broker may take to answer.
const PATIENCE: Duration = Duration::from_secs(30);

#[tokio::main]
async fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match *arguments {
        ["prepare", "kafka", brokers, topic] => {
            let new = NewTopic::new(topic, 3, TopicReplication::Fixed(-1));
            admin(brokers)?.create_topics([&new], &AdminOptions::new()).await?;
        }
        ["prepare", "rabbitmq", url, queue] => drop(declare(url, queue, false).await?),
        ["count", "kafka", brokers, topic] => print(&tokio::task::block_in_place(|| kafka_count(brokers, topic))?)?,
        ["count", "rabbitmq", url, queue] => print(&declare(url, queue, true).await?)?,
        ["remove", "kafka", brokers, topic] => {
            admin(brokers)?.delete_topics(&[topic], &AdminOptions::new()).await?;
        }
        ["remove", "rabbitmq", url, queue] => {
            channel(url).await?.queue_delete(queue.into(), QueueDeleteOptions::default()).await?;
        }
        ["send", kind, address, name, count, concurrency, body] => {
            let load = Load { count: count.parse()?, concurrency: concurrency.parse()?, body };
            let took = match kind {
                "kafka" => load.send_to_kafka(address, name).await?,
                "rabbitmq" => load.send_to_rabbitmq(address, name).await?,
                _ => load.send_by_http(address, name).await?,
            };
            print(&took.as_secs_f64())?;
        }
        _ => return Err("see the usage at the top of benches/bare-client/main.rs".into()),
    }
    Ok(())
}

fn print(figure: &impl std::fmt::Display) -> Result<()> {
    Ok(writeln!(std::io::stdout(), "{figure}")?)
}

struct Load<'a> {
    count: u64,
    concurrency: usize,
    body: &'a str,
}

impl Load<'_> {
    /// Sends all messages, so many at once; how long that took.
    async fn run(&self, send: impl AsyncFn(Message) -> Result<()>) -> Result<Duration> {
        let started = Instant::now();
        let messages = stream::iter(0..self.count).map(|number| send(Message::new(self.body, number)));
        messages.buffer_unordered(self.concurrency).try_for_each(|()| async { Ok(()) }).await?;
        Ok(started.elapsed())
    }

    async fn send_to_kafka(&self, brokers: &str, topic: &str) -> Result<Duration> {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", brokers).set("acks", "all").set("enable.idempotence", "true");
        let producer: FutureProducer = config.set("linger.ms", "5").create()?;
        let send = async |message: Message| {
            let headers = message
                .headers
                .iter()
                .fold(OwnedHeaders::new(), |headers, (key, value)| headers.insert(Header { key, value: Some(value) }));
            let record = FutureRecord::to(topic).key(&message.key).payload(&message.body).headers(headers);
            let report = producer.send_result(record).map_err(|(error, _)| error)?;
            report.await?.map_err(|(error, _)| error)?;
            Ok(())
        };
        self.run(send).await
    }

    async fn send_to_rabbitmq(&self, url: &str, queue: &str) -> Result<Duration> {
        let channel = channel(url).await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        let options = BasicPublishOptions { mandatory: true, ..Default::default() };
        let send = async |message: Message| {
            let mut headers = FieldTable::default();
            for (name, value) in &message.headers {
                headers.insert((*name).into(), AMQPValue::LongString(value.as_str().into()));
            }
            let properties = BasicProperties::default()
                .with_content_type("application/json".into())
                .with_delivery_mode(2)
                .with_message_id(message.id.as_str().into())
                .with_headers(headers);
            let publish = channel.basic_publish("".into(), queue.into(), options, message.body.as_bytes(), properties);
            match publish.await?.await? {
                Confirmation::Ack(None) => Ok(()),
                Confirmation::Ack(Some(_)) | Confirmation::Nack(_) | Confirmation::NotRequested => {
                    Err("not accepted".into())
                }
            }
        };
        self.run(send).await
    }

    async fn send_by_http(&self, address: &str, path: &str) -> Result<Duration> {
        // Fails only where it was done before.
        drop(rustls::crypto::ring::default_provider().install_default());
        let client = reqwest::Client::builder().no_proxy().tcp_nodelay(true).timeout(PATIENCE).build()?;
        let url = format!("http://{address}{path}");
        let send = async |message: Message| {
            let request = client.post(&url).header("content-type", "application/json");
            let request = message.headers.iter().fold(request, |request, (name, value)| request.header(*name, value));
            request.body(message.body).send().await?.error_for_status()?.bytes().await?;
            Ok(())
        };
        self.run(send).await
    }
}

/// One event as the relay sends it.
struct Message {
    id: String,
    key: String,
    body: String,
    headers: Vec<(&'static str, String)>,
}

impl Message {
    fn new(body: &str, number: u64) -> Self {
        let id = format!("evt_{number:026}");
        let headers = vec![
            ("webhook-id", id.clone()),
            ("webhook-timestamp", "1687548944".to_owned()),
            ("relay-received-at", "2023-06-23T19:35:44.000Z".to_owned()),
            ("relay-attempt", "1".to_owned()),
            ("traceparent", format!("00-{number:032x}-{number:016x}-00")),
        ];
        let body = body.replacen("{}", &format!("{number:08}"), 1);
        Self { id, key: format!("wamid.{number:050}"), body, headers }
    }
}

fn admin(brokers: &str) -> Result<AdminClient<DefaultClientContext>> {
    Ok(ClientConfig::new().set("bootstrap.servers", brokers).create()?)
}

/// How many records a topic has. Blocks.
fn kafka_count(brokers: &str, topic: &str) -> Result<i64> {
    let consumer: BaseConsumer = ClientConfig::new().set("bootstrap.servers", brokers).create()?;
    let metadata = consumer.fetch_metadata(Some(topic), PATIENCE)?;
    let partitions = metadata.topics().iter().flat_map(|topic| topic.partitions());
    partitions.map(|partition| Ok(consumer.fetch_watermarks(topic, partition.id(), PATIENCE)?.1)).sum()
}

async fn channel(url: &str) -> Result<Channel> {
    Ok(Connection::connect(url, ConnectionProperties::default()).await?.create_channel().await?)
}

/// Makes a queue, or (`passive`) looks at the one that is there; how many messages it has.
async fn declare(url: &str, queue: &str, passive: bool) -> Result<u32> {
    let options = QueueDeclareOptions { durable: true, passive, ..Default::default() };
    Ok(channel(url).await?.queue_declare(queue.into(), options, FieldTable::default()).await?.message_count())
}
