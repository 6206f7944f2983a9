//! Ends of the program, under load: `kill -9` and SIGTERM, over and over, with Kafka, RabbitMQ and an HTTP server as sinks.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, SystemTime};

use crate::brokers::{
    Amqp, AmqpReader, Arrived, Inbox, KafkaReader, create_topic, receiver, shared_amqp, shared_kafka, unique,
};
use crate::harness::{Receiver, Reply, Setup};
use crate::load::{Load, Posted};

/// How often the relay is killed.
const KILLS: usize = 22;
/// How often it is stopped in order.
const STOPS: usize = 8;
/// How many events have to be acknowledged before the relay is ended.
const PER_ROUND: usize = 150;
/// How long after that, in steps from round to round, so that it is ended in ever other moments.
const STEP: Duration = Duration::from_millis(23);
/// How many senders post at once.
const SENDERS: u32 = 24;
/// A cursor that is written every 0.2 s is never older than this, also where a disk takes its time to sync.
const CURSOR_AGE: Duration = Duration::from_secs(5);
/// How many deliveries each sink may have under way.
const AT_ONCE: usize = 64;
/// `webhook-timestamp` is rounded down to it.
const TIMESTAMP_STEP: Duration = Duration::from_secs(1);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_that_got_a_200_is_lost_by_kill_9() {
    let sinks = Sinks::new("kill", Duration::ZERO).await;
    let setup = Setup::new(&sinks.rules);
    let load = Load::new(SENDERS, Duration::from_millis(5));
    let mut kills = Vec::new();
    for round in 0..KILLS {
        let relay = setup.start().await;
        load.to(Some(relay.address()));
        load.more(PER_ROUND).await;
        // The last two last longer than a cursor may be old, so that what is repeated shows to be near the crash.
        let longer = if round + 2 < KILLS { STEP * u32::try_from(round % 20).unwrap_or(0) } else { 2 * CURSOR_AGE };
        tokio::time::sleep(longer).await;
        load.to(None);
        relay.kill().await;
        kills.push(SystemTime::now());
    }
    let relay = setup.start().await;
    load.to(Some(relay.address()));
    load.more(PER_ROUND).await;
    let posted = load.stop().await;
    sinks.wait_for_all(&posted).await;
    relay.stop().await;
    for (what, arrived) in sinks.now() {
        posted.check(what, &arrived);
        let repeats = arrived.all.len() - arrived.ids.len();
        eprintln!(
            "{what}: {KILLS} kills, {} events got a 200, {} different ones arrived, {repeats} repeats of {} events",
            posted.acked.len(),
            arrived.ids.len(),
            arrived.repeated(),
        );
        check_repeats(what, &arrived, &kills);
    }
}

/// Only what was delivered shortly before a crash comes again, and what was under way, however long: a broker that is still
/// working off earlier rounds, or that the relay has only just reached, confirms late, and the cursor can pass only what
/// is confirmed. When an attempt was made says its `webhook-timestamp`: an arrival may be seen later, also after the crash.
fn check_repeats(what: &str, arrived: &Arrived, kills: &[SystemTime]) {
    let (mut last, mut late): (HashMap<&str, SystemTime>, BTreeMap<_, usize>) = Default::default();
    for arrival in &arrived.all {
        let seconds = arrival.header("webhook-timestamp").parse().expect("seconds");
        let attempted = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        let Some(before) = last.insert(arrival.id(), attempted) else { continue };
        let kill = kills.iter().find(|kill| **kill >= before);
        let kill = kill.unwrap_or_else(|| panic!("{what}: repeated, and no crash between: {arrival:?}"));
        let age = kill.duration_since(before).expect("it is later").saturating_sub(TIMESTAMP_STEP);
        if age >= CURSOR_AGE {
            let late = late.entry(kill).or_default();
            *late += 1;
            assert!(*late <= AT_ONCE, "{what}: repeated, and had been sent {age:?} before the crash: {arrival:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clean_stop_under_load_loses_and_repeats_nothing() {
    let sinks = Sinks::new("stop", Duration::from_millis(5)).await;
    let setup = Setup::new(&sinks.rules);
    let load = Load::new(SENDERS, Duration::from_millis(2));
    for round in 0..STOPS {
        let relay = setup.start().await;
        load.to(Some(relay.address()));
        load.more(PER_ROUND).await;
        tokio::time::sleep(STEP * u32::try_from(round).unwrap_or(0)).await;
        // Without a pause for the senders: they get answers or refusals until the end.
        let log = relay.stop().await;
        let stopped: Vec<_> = log.iter().filter(|line| line["message"] == "sink stopped").collect();
        assert_eq!(stopped.len(), 3, "{log:#?}");
        load.to(None);
    }
    let relay = setup.start().await;
    load.to(Some(relay.address()));
    load.more(PER_ROUND).await;
    let posted = load.stop().await;
    sinks.wait_for_all(&posted).await;
    relay.stop().await;
    for (what, arrived) in sinks.now() {
        posted.check(what, &arrived);
        assert_eq!(
            arrived.repeated(),
            0,
            "{what}: {} events of {} came again after a clean stop",
            arrived.repeated(),
            arrived.ids.len()
        );
    }
}

/// One sink of each kind, all of which get every event.
struct Sinks {
    rules: String,
    http: Inbox,
    kafka: KafkaReader,
    amqp: AmqpReader,
    _receiver: Receiver,
}

impl Sinks {
    /// The HTTP server takes `answer_after` for an answer.
    async fn new(name: &str, answer_after: Duration) -> Self {
        let (kafka, amqp, name) = (shared_kafka(), shared_amqp(), unique(name));
        create_topic(&kafka, &name, &[]).await;
        Amqp::declare(&amqp, &name, &name).await;
        let (receiver, http) = receiver(move |_| Reply::After(answer_after, 200)).await;
        let rules = format!(
            r#"
[sinks.http]
type = "http"
url = "{}"
delivery = {{ concurrency = {AT_ONCE} }}
[sinks.kafka]
type = "kafka"
brokers = ["{kafka}"]
topic = "{name}"
delivery = {{ concurrency = {AT_ONCE} }}
[sinks.rabbitmq]
type = "rabbitmq"
urls = ["{amqp}"]
exchange = "{name}"
routing_key = "{{status}}"
delivery = {{ concurrency = {AT_ONCE} }}
[[routes]]
name = "all"
to = ["http", "kafka", "rabbitmq"]
"#,
            receiver.url("/")
        );
        let (kafka, amqp) = (KafkaReader::new(&kafka, &[&name]), AmqpReader::new(&amqp, &name));
        Self { rules, http, kafka, amqp, _receiver: receiver }
    }

    async fn wait_for_all(&self, posted: &Posted) {
        self.http.wait_for_ids("HTTP", posted.ids()).await;
        self.kafka.inbox.wait_for_ids("Kafka", posted.ids()).await;
        self.amqp.inbox.wait_for_ids("RabbitMQ", posted.ids()).await;
    }

    fn now(&self) -> [(&'static str, Arrived); 3] {
        [("HTTP", self.http.now()), ("Kafka", self.kafka.inbox.now()), ("RabbitMQ", self.amqp.inbox.now())]
    }
}
