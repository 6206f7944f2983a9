//! Real brokers: those that `scripts/test` has started and all tests share, brokers of a test's own to stop and kill, and
//! readers that collect what has arrived there.

use std::collections::HashMap;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::{FutureExt as _, StreamExt as _};
use lapin::message::Delivery;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, Connection, ConnectionProperties, ExchangeKind};
use rdkafka::admin::{AdminClient, AdminOptions, AlterConfig, NewTopic, ResourceSpecifier, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{Consumer as _, StreamConsumer};
use rdkafka::message::{BorrowedMessage, Headers as _, Message as _};
use rdkafka::{ClientConfig, Offset, TopicPartitionList};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::sync::watch;
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::timeout;

use crate::harness::{DEADLINE, Received, Receiver, Reply, eventually, within};

/// How long a reader of Kafka waits for the next message before it begins anew where it was.
const SILENT: Duration = Duration::from_secs(10);
/// How long a reader waits before it connects again.
const RECONNECT: Duration = Duration::from_millis(100);
/// How long connecting may take before a reader tries again.
const CONNECT_PATIENCE: Duration = Duration::from_secs(5);
/// Partitions of a test's topic.
const PARTITIONS: i32 = 3;
/// Starts and ends brokers.
const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/brokers");

// ---- brokers ---------------------------------------------------------------------------------------------------

/// The Kafka brokers that all tests share.
pub(crate) fn shared_kafka() -> String {
    shared("KAFKA_BROKERS")
}

/// The RabbitMQ broker that all tests share.
pub(crate) fn shared_amqp() -> String {
    shared("AMQP_URL")
}

fn shared(variable: &str) -> String {
    std::env::var(variable).unwrap_or_else(|_| {
        panic!(
            "{variable} is not set: this test needs brokers; run scripts/test, or eval \"$(scripts/brokers up)\" first"
        )
    })
}

/// A name that no other test and no other run uses.
pub(crate) fn unique(name: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let since_1970 = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("it-{name}-{}-{}-{number}", std::process::id(), since_1970.as_secs())
}

/// Which broker a test wants for itself.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Kind {
    Kafka,
    RabbitMq,
}

/// A broker of a test's own, or several, that it may stop and kill. Ends with this value.
pub(crate) struct OwnBroker {
    kind: Kind,
    dir: PathBuf,
    variables: HashMap<String, String>,
    /// Ends the brokers when its input ends.
    end: Child,
}

impl OwnBroker {
    /// Starts one and waits until it answers.
    pub(crate) async fn start(kind: Kind) -> Self {
        Self::up(kind, &[]).await
    }

    /// Starts so many of Kafka's, numbered from 1, that make up one cluster, and waits until they answer.
    pub(crate) async fn start_kafka_nodes(count: usize) -> Self {
        Self::up(Kind::Kafka, &["--nodes", &count.to_string(), "--native"]).await
    }

    /// Starts one that takes clients over TLS only; see `scripts/brokers --help`.
    pub(crate) async fn start_with_tls(kind: Kind, pems: &Path) -> Self {
        Self::up(kind, &["--tls", pems.to_str().expect("UTF-8")]).await
    }

    async fn up(kind: Kind, options: &[&str]) -> Self {
        let dir = std::env::temp_dir().join(unique("brokers"));
        let end = down_at_end_of_input(&dir);
        let mut broker = Self { kind, dir, variables: HashMap::new(), end };
        let lines = broker.script(&[&["up", "--only", kind.name()], options].concat()).await;
        for line in lines.lines() {
            let assignment = line.strip_prefix("export ").and_then(|line| line.split_once('='));
            let (name, value) = assignment.unwrap_or_else(|| panic!("not a shell assignment: {line:?}"));
            broker.variables.insert(name.to_owned(), value.trim_matches('"').to_owned());
        }
        broker
    }

    /// Its address: a list of brokers, or a URL.
    pub(crate) fn address(&self) -> String {
        let variable = match self.kind {
            Kind::Kafka => "KAFKA_BROKERS",
            Kind::RabbitMq => "AMQP_URL",
        };
        self.variables[variable].clone()
    }

    /// Ends it in order.
    pub(crate) async fn stop(&self) {
        self.script(&["stop", self.kind.name()]).await;
    }

    /// Ends it with SIGKILL.
    pub(crate) async fn kill(&self) {
        self.script(&["kill", self.kind.name()]).await;
    }

    /// Starts it again, with what it has on disk, and waits until it answers.
    pub(crate) async fn start_again(&self) {
        self.script(&["start", self.kind.name()]).await;
    }

    /// Ends one of Kafka's nodes with SIGKILL.
    pub(crate) async fn kill_node(&self, node: usize) {
        self.script(&["kill", "kafka", "--node", &node.to_string()]).await;
    }

    /// Starts one of Kafka's nodes again, with what it has on disk, and waits until it answers.
    pub(crate) async fn start_node_again(&self, node: usize) {
        self.script(&["start", "kafka", "--node", &node.to_string()]).await;
    }

    /// Sends one of Kafka's nodes a signal.
    pub(crate) fn signal_node(&self, node: usize, signal: Signal) {
        let file = self.dir.join(format!("kafka-{node}/pid"));
        let pid = std::fs::read_to_string(&file).expect("the node runs");
        let pid = pid.split_whitespace().next().and_then(|pid| Pid::from_raw(pid.parse().ok()?));
        kill_process(pid.expect("a pid"), signal).expect("the node runs");
    }

    /// Waits until nobody leads some partition of a topic.
    pub(crate) async fn leaderless(&self, topic: &str) {
        let (admin, topic) = (Arc::new(admin(&self.address())), Arc::<str>::from(topic));
        eventually("a partition without a leader", async || {
            let (admin, topic) = (Arc::clone(&admin), Arc::clone(&topic));
            spawn_blocking(move || is_leaderless(&admin, &topic)).await.expect("no panic")
        })
        .await;
    }

    /// Waits until every copy of every partition is in sync.
    pub(crate) async fn in_sync(&self) {
        let admin = Arc::new(admin(&self.address()));
        eventually("all copies to be in sync", async || {
            let admin = Arc::clone(&admin);
            spawn_blocking(move || all_in_sync(&admin)).await.expect("no panic")
        })
        .await;
    }

    /// Runs `rabbitmqctl`.
    pub(crate) async fn ctl(&self, arguments: &[&str]) -> String {
        let mut words = self.variables["RABBITMQ_CTL"].split_whitespace();
        let mut command = Command::new(words.next().expect("RABBITMQ_CTL is a command"));
        command.args(words).args(arguments);
        run(command).await
    }

    async fn script(&self, arguments: &[&str]) -> String {
        run(self.command(arguments)).await
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(SCRIPT);
        // The shared brokers' addresses would keep the script from starting others.
        command.env_remove("KAFKA_BROKERS").env_remove("AMQP_URL").env_remove("RABBITMQ_CTL");
        command.args(arguments).arg("--dir").arg(&self.dir);
        command
    }
}

impl Drop for OwnBroker {
    fn drop(&mut self) {
        drop(self.end.stdin.take());
        let ended = self.end.wait();
        assert!(std::thread::panicking() || ended.is_ok_and(|status| status.success()), "the broker does not end");
    }
}

/// A process that waits for the end of its input, and then ends the brokers in a folder. Its input ends with this process
/// too, whatever ends that: nothing else has the other side of the pipe. In a group of its own, out of reach of Ctrl-C.
fn down_at_end_of_input(dir: &Path) -> Child {
    let mut command = Command::new("sh");
    command.args(["-c", "cat; exec \"$@\"", "sh", SCRIPT, "down", "--dir"]).arg(dir).process_group(0);
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"))
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Kafka => "kafka",
            Self::RabbitMq => "rabbitmq",
        }
    }
}

/// Runs a command to its end, on a thread of its own, and gives what it printed.
async fn run(mut command: Command) -> String {
    let run = spawn_blocking(move || {
        let output = command.stdin(Stdio::null()).output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{command:?} failed: {said}");
        String::from_utf8(output.stdout).expect("text")
    });
    within("a command to end", run).await.expect("the command succeeds")
}

// ---- what has arrived ------------------------------------------------------------------------------------------

/// One delivery, as a sink's other side has seen it.
#[derive(Clone, Debug)]
pub(crate) struct Arrival {
    pub(crate) at: Instant,
    /// Kafka: the topic. AMQP: exchange and routing key, with a slash between. HTTP: the path.
    pub(crate) to: String,
    /// Kafka's record key.
    pub(crate) key: Option<String>,
    pub(crate) headers: Vec<(String, String)>,
    /// AMQP's properties beside the headers.
    pub(crate) properties: Vec<(&'static str, String)>,
    pub(crate) body: Bytes,
}

impl Arrival {
    /// A header's value; there has to be exactly one.
    pub(crate) fn header(&self, name: &str) -> &str {
        let mut values = self.headers.iter().filter(|(other, _)| other.eq_ignore_ascii_case(name));
        match (values.next(), values.next()) {
            (Some((_, value)), None) => value,
            (first, _) => {
                panic!("header {name} is {}: {self:?}", if first.is_some() { "there twice" } else { "missing" })
            }
        }
    }

    /// The event's id.
    pub(crate) fn id(&self) -> &str {
        self.header("webhook-id")
    }

    /// An AMQP property.
    pub(crate) fn property(&self, name: &str) -> &str {
        let property = self.properties.iter().find(|(other, _)| *other == name);
        property.map_or_else(|| panic!("property {name} is missing: {self:?}"), |(_, value)| value)
    }

    /// A field of the event.
    pub(crate) fn field(&self, pointer: &str) -> String {
        field(&self.body, pointer)
    }
}

/// A string in a body.
pub(crate) fn field(body: &[u8], pointer: &str) -> String {
    let value: Value = serde_json::from_slice(body).expect("a body is JSON");
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned()
}

/// All that has arrived in one place so far.
#[derive(Clone, Debug, Default)]
pub(crate) struct Arrived {
    pub(crate) all: Vec<Arrival>,
    /// How often each event has.
    pub(crate) ids: HashMap<String, usize>,
}

/// Collects what arrives.
#[derive(Clone)]
pub(crate) struct Inbox(watch::Sender<Arrived>);

impl Inbox {
    pub(crate) fn new() -> Self {
        Self(watch::Sender::new(Arrived::default()))
    }

    pub(crate) fn push(&self, arrival: Arrival) {
        self.0.send_modify(|arrived| arrived.add(arrival));
    }

    /// Whether the event has arrived.
    pub(crate) fn has(&self, id: &str) -> bool {
        self.0.borrow().ids.contains_key(id)
    }

    /// What has arrived by now.
    pub(crate) fn now(&self) -> Arrived {
        self.0.borrow().clone()
    }

    /// Forgets what has arrived by now.
    pub(crate) fn clear(&self) {
        self.0.send_replace(Arrived::default());
    }

    /// Looks at what has arrived by now, without a copy of it; nothing arrives meanwhile.
    pub(crate) fn look<T>(&self, look: impl FnOnce(&Arrived) -> T) -> T {
        look(&self.0.borrow())
    }

    /// Waits until `condition` holds.
    pub(crate) async fn wait(&self, what: &str, condition: impl FnMut(&Arrived) -> bool) -> Arrived {
        let mut arrived = self.0.subscribe();
        match timeout(DEADLINE, arrived.wait_for(condition)).await {
            Ok(arrived) => arrived.expect("the sender is ours").clone(),
            Err(_elapsed) => {
                let now = self.0.borrow();
                panic!(
                    "waited {DEADLINE:?} for {what}; {} have arrived, {} of them different",
                    now.all.len(),
                    now.ids.len()
                )
            }
        }
    }

    /// Waits until so many different events have arrived.
    pub(crate) async fn wait_for_events(&self, what: &str, count: usize) -> Arrived {
        self.wait(&format!("{count} events at {what}"), |arrived| arrived.ids.len() >= count).await
    }

    /// Waits until all these have arrived.
    pub(crate) async fn wait_for_ids(&self, what: &str, ids: impl IntoIterator<Item = String>) -> Arrived {
        let mut missing: Vec<String> = ids.into_iter().collect();
        let count = missing.len();
        self.wait(&format!("{count} events at {what}"), |arrived| {
            while missing.last().is_some_and(|id| arrived.ids.contains_key(id)) {
                missing.pop();
            }
            missing.is_empty()
        })
        .await
    }
}

impl Arrived {
    pub(crate) fn add(&mut self, arrival: Arrival) {
        *self.ids.entry(arrival.id().to_owned()).or_default() += 1;
        self.all.push(arrival);
    }

    /// Events that have arrived more than once.
    pub(crate) fn repeated(&self) -> usize {
        self.ids.values().filter(|count| **count > 1).count()
    }

    /// For each message the ids of its events in the order in which they arrived first.
    pub(crate) fn orders(&self) -> HashMap<String, Vec<String>> {
        let mut orders: HashMap<String, Vec<String>> = HashMap::new();
        for arrival in &self.all {
            let order = orders.entry(arrival.field("/message_id")).or_default();
            if !order.iter().any(|id| id == arrival.id()) {
                order.push(arrival.id().to_owned());
            }
        }
        orders
    }
}

// ---- HTTP ------------------------------------------------------------------------------------------------------

/// An HTTP server, and what it has accepted: what it was told to answer 2xx.
pub(crate) async fn receiver(answer: impl Fn(&Received) -> Reply + Send + Sync + 'static) -> (Receiver, Inbox) {
    let inbox = Inbox::new();
    let to = inbox.clone();
    let receiver = Receiver::start_without_memory(move |request| {
        let reply = answer(request);
        if let Reply::Status(200..=299) | Reply::After(_, 200..=299) = reply {
            to.push(from_http(request));
        }
        reply
    });
    (receiver.await, inbox)
}

fn from_http(request: &Received) -> Arrival {
    let text = |value: &http::HeaderValue| value.to_str().expect("ASCII").to_owned();
    Arrival {
        at: request.at,
        to: request.uri.path().to_owned(),
        key: None,
        headers: request.headers.iter().map(|(name, value)| (name.to_string(), text(value))).collect(),
        properties: Vec::new(),
        body: request.body.clone(),
    }
}

// ---- Kafka -----------------------------------------------------------------------------------------------------

fn admin(brokers: &str) -> AdminClient<DefaultClientContext> {
    ClientConfig::new().set("bootstrap.servers", brokers).create().expect("a client")
}

/// Whether every copy of every partition is in sync, as some broker knows it; false if none answers.
fn all_in_sync(admin: &AdminClient<DefaultClientContext>) -> bool {
    let metadata = admin.inner().fetch_metadata(None, RECONNECT * 50);
    metadata.is_ok_and(|metadata| {
        let mut partitions = metadata.topics().iter().flat_map(|topic| topic.partitions());
        partitions.all(|partition| partition.isr().len() == partition.replicas().len())
    })
}

/// Whether some partition of a topic has no leader, as some broker knows it; false if none answers.
fn is_leaderless(admin: &AdminClient<DefaultClientContext>, topic: &str) -> bool {
    let metadata = admin.inner().fetch_metadata(Some(topic), RECONNECT * 50);
    metadata.is_ok_and(|metadata| {
        let mut partitions = metadata.topics().iter().flat_map(|topic| topic.partitions());
        partitions.any(|partition| partition.leader() == -1)
    })
}

/// Makes a topic, with a copy at each broker (at three of them, if there are more).
pub(crate) async fn create_topic(brokers: &str, topic: &str, settings: &[(&str, &str)]) {
    let copies = i32::try_from(brokers.split(',').count().min(3)).expect("at most three");
    let mut new = NewTopic::new(topic, PARTITIONS, TopicReplication::Fixed(copies));
    for (name, value) in settings {
        new = new.set(name, value);
    }
    let options = AdminOptions::new().operation_timeout(Some(DEADLINE)).request_timeout(Some(DEADLINE));
    let made = admin(brokers).create_topics([&new], &options).await.expect("Kafka answers");
    assert!(made.iter().all(Result::is_ok), "cannot make the topic {topic}: {made:?}");
}

/// Sets these settings of a topic, and all others to what they are by default.
pub(crate) async fn set_topic(brokers: &str, topic: &str, settings: &[(&str, &str)]) {
    let topic = AlterConfig::new(ResourceSpecifier::Topic(topic));
    let changed = settings.iter().fold(topic, |topic, (name, value)| topic.set(name, value));
    let options = AdminOptions::new().request_timeout(Some(DEADLINE));
    let done = admin(brokers).alter_configs([&changed], &options).await.expect("Kafka answers");
    assert!(done.iter().all(Result::is_ok), "cannot set {settings:?}: {done:?}");
}

/// Removes all that is in a topic, as its retention does.
pub(crate) async fn empty_topic(brokers: &str, topic: &str, partitions: i32) {
    let mut all = TopicPartitionList::new();
    for partition in 0..partitions {
        all.add_partition_offset(topic, partition, Offset::End).expect("a partition");
    }
    let options = AdminOptions::new().operation_timeout(Some(DEADLINE)).request_timeout(Some(DEADLINE));
    let done = admin(brokers).delete_records(&all, &options).await.expect("Kafka answers");
    assert!(done.elements().iter().all(|partition| partition.error().is_ok()), "cannot empty {topic}: {done:?}");
}

/// Collects what is and comes in topics, from their beginning. It outlives a restart of the brokers.
pub(crate) struct KafkaReader {
    pub(crate) inbox: Inbox,
    task: JoinHandle<()>,
}

impl KafkaReader {
    pub(crate) fn new(brokers: &str, topics: &[&str]) -> Self {
        let (brokers, mut next) = (brokers.to_owned(), from_the_beginning(topics, PARTITIONS));
        let inbox = Inbox::new();
        let to = inbox.clone();
        let task = tokio::spawn(async move {
            loop {
                let consumer = consumer_of(&brokers, &next);
                read_on(&consumer, &mut next, &to).await;
            }
        });
        Self { inbox, task }
    }
}

/// Reads until nothing has come for a while. librdkafka may lose a partition's leader for good when a broker goes and comes
/// back (<https://github.com/confluentinc/librdkafka/issues/5430>): another consumer finds it.
async fn read_on(consumer: &StreamConsumer, next: &mut TopicPartitionList, to: &Inbox) {
    let mut last = Instant::now();
    while last.elapsed() < SILENT {
        // Errors tell of brokers that are away; what was sent there comes when they are back.
        if let Ok(Ok(message)) = timeout(SILENT, consumer.recv()).await {
            let following = Offset::Offset(message.offset() + 1);
            next.set_partition_offset(message.topic(), message.partition(), following).expect("one of ours");
            to.push(from_kafka(&message));
            last = Instant::now();
        }
    }
}

impl Drop for KafkaReader {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What reads so many partitions of topics, each from its beginning: only what is committed, if it is in transactions.
pub(crate) fn consumer(brokers: &str, topics: &[&str], partitions: i32) -> StreamConsumer {
    consumer_of(brokers, &from_the_beginning(topics, partitions))
}

fn from_the_beginning(topics: &[&str], partitions: i32) -> TopicPartitionList {
    let mut list = TopicPartitionList::new();
    for topic in topics {
        for partition in 0..partitions {
            list.add_partition_offset(topic, partition, Offset::Beginning).expect("an offset");
        }
    }
    list
}

fn consumer_of(brokers: &str, assigned: &TopicPartitionList) -> StreamConsumer {
    let consumer: StreamConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", unique("reader"))
        .set("enable.auto.commit", "false")
        .set("fetch.wait.max.ms", "20")
        .set("reconnect.backoff.max.ms", "500")
        .create()
        .expect("a consumer");
    consumer.assign(assigned).expect("an assignment");
    consumer
}

fn from_kafka(message: &BorrowedMessage<'_>) -> Arrival {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("text");
    let headers = message.headers().into_iter().flat_map(|headers| headers.iter());
    Arrival {
        at: Instant::now(),
        to: message.topic().to_owned(),
        key: message.key().map(text),
        headers: headers.map(|header| (header.key.to_owned(), text(header.value.unwrap_or_default()))).collect(),
        properties: Vec::new(),
        body: Bytes::copy_from_slice(message.payload().unwrap_or_default()),
    }
}

// ---- RabbitMQ --------------------------------------------------------------------------------------------------

/// A connection to declare things with.
pub(crate) struct Amqp {
    _connection: Connection,
    channel: Channel,
}

impl Amqp {
    pub(crate) async fn connect(url: &str) -> Self {
        let connect = Connection::connect(url, ConnectionProperties::default());
        let connection = within("RabbitMQ to answer", connect).await.expect("a connection");
        let channel = connection.create_channel().await.expect("a channel");
        Self { _connection: connection, channel }
    }

    pub(crate) async fn declare_exchange(&self, name: &str) {
        let options = ExchangeDeclareOptions { durable: true, ..Default::default() };
        let declared = self.channel.exchange_declare(name.into(), ExchangeKind::Topic, options, FieldTable::default());
        declared.await.expect("an exchange");
    }

    /// Declares a durable queue that takes what matches the binding key.
    pub(crate) async fn declare_queue(&self, name: &str, exchange: &str, binding_key: &str) {
        let options = QueueDeclareOptions { durable: true, ..Default::default() };
        self.channel.queue_declare(name.into(), options, FieldTable::default()).await.expect("a queue");
        let (options, table) = (QueueBindOptions::default(), FieldTable::default());
        let bound = self.channel.queue_bind(name.into(), exchange.into(), binding_key.into(), options, table);
        bound.await.expect("a binding");
    }

    /// Makes a queue, and then an exchange whose messages all go there from the first moment on. (A binding can only be
    /// made when there is an exchange, which may have got messages by then.)
    pub(crate) async fn declare_at_once(url: &str, exchange: &str) {
        let amqp = Self::connect(url).await;
        let fallback = format!("{exchange}.fallback");
        amqp.declare_exchange(&fallback).await;
        amqp.declare_queue(exchange, &fallback, "#").await;
        let mut table = FieldTable::default();
        table.insert("alternate-exchange".into(), AMQPValue::LongString(fallback.into()));
        let options = ExchangeDeclareOptions { durable: true, ..Default::default() };
        let declared = amqp.channel.exchange_declare(exchange.into(), ExchangeKind::Topic, options, table);
        declared.await.expect("an exchange");
    }

    /// Makes an exchange and a queue that takes all of it.
    pub(crate) async fn declare(url: &str, exchange: &str, queue: &str) {
        let amqp = Self::connect(url).await;
        amqp.declare_exchange(exchange).await;
        amqp.declare_queue(queue, exchange, "#").await;
    }
}

/// Collects what is and comes in a queue. It outlives a restart of the broker.
pub(crate) struct AmqpReader {
    pub(crate) inbox: Inbox,
    task: JoinHandle<()>,
}

impl AmqpReader {
    pub(crate) fn new(url: &str, queue: &str) -> Self {
        let inbox = Inbox::new();
        let (to, url, queue) = (inbox.clone(), url.to_owned(), queue.to_owned());
        let task = tokio::spawn(async move {
            loop {
                // Errors tell of a broker that is away; what was sent there comes when it is back.
                drop(read_queue(&url, &queue, &to).await);
                tokio::time::sleep(RECONNECT).await;
            }
        });
        Self { inbox, task }
    }
}

impl Drop for AmqpReader {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn read_queue(url: &str, queue: &str, to: &Inbox) -> lapin::Result<()> {
    let consume = async {
        let connection = Connection::connect(url, ConnectionProperties::default()).await?;
        let channel = connection.create_channel().await?;
        let (options, table) = (BasicConsumeOptions::default(), FieldTable::default());
        let consumer = channel.basic_consume(queue.into(), "".into(), options, table).await?;
        lapin::Result::Ok((connection, consumer))
    };
    // A broker that is just starting may take a connection and say nothing on it.
    let Ok(consuming) = timeout(CONNECT_PATIENCE, consume).await else { return Ok(()) };
    let (_connection, mut consumer) = consuming?;
    while let Some(delivery) = consumer.next().await {
        let delivery = delivery?;
        let arrival = from_amqp(&delivery);
        // What the broker gives out again, because it has not seen our acknowledgement, is no repetition of the relay's.
        if !(delivery.redelivered && to.has(arrival.id())) {
            to.push(arrival);
        }
        // Handed over, and not awaited: what became of one that meets the connection's end, lapin may never say. That the
        // connection has ended, the consumer tells.
        drop(delivery.ack(BasicAckOptions::default()).now_or_never());
    }
    Ok(())
}

fn from_amqp(delivery: &Delivery) -> Arrival {
    let properties = &delivery.properties;
    let text = |value: &AMQPValue| match value {
        AMQPValue::LongString(text) => text.to_string(),
        other => panic!("a header is no string: {other:?}"),
    };
    let headers = properties.headers().iter().flat_map(|table| table.inner().iter());
    let named = [
        ("message_id", properties.message_id().as_ref().map(ToString::to_string)),
        ("timestamp", properties.timestamp().map(|seconds| seconds.to_string())),
        ("content_type", properties.content_type().as_ref().map(ToString::to_string)),
        ("delivery_mode", properties.delivery_mode().map(|mode| mode.to_string())),
    ];
    Arrival {
        at: Instant::now(),
        to: format!("{}/{}", delivery.exchange, delivery.routing_key),
        key: None,
        headers: headers.map(|(name, value)| (name.to_string(), text(value))).collect(),
        properties: named.into_iter().filter_map(|(name, value)| Some((name, value?))).collect(),
        body: delivery.data.clone().into(),
    }
}
