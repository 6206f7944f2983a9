//! The whole path at once: 10,000 events by `engage-relay send`, and Kafka, RabbitMQ and an HTTP server as sinks.

use std::collections::{HashMap, HashSet};
use std::time::SystemTime;

use bytes::Bytes;
use serde_json::{Value, json};

use crate::brokers::{
    Amqp, AmqpReader, Arrival, Arrived, KafkaReader, create_topic, field, receiver, shared_amqp, shared_kafka, unique,
};
use crate::harness::{Relay, Reply, Setup, eventually};

/// How many events, in so many runs of `send`.
const EVENTS: usize = 10_000;
const RUNS: usize = 4;
const STATUSES: [&str; 4] = ["sent", "delivered", "read", "error"];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_events_reach_exactly_the_sinks_that_the_rules_name() {
    let (kafka, amqp, name) = (shared_kafka(), shared_amqp(), unique("everything"));
    let topics: Vec<String> = STATUSES.iter().map(|status| format!("{name}.{status}")).chain([name.clone()]).collect();
    for topic in &topics {
        create_topic(&kafka, topic, &[]).await;
    }
    Amqp::declare(&amqp, &name, &name).await;
    let (http, crm) = receiver(|_| Reply::Status(200)).await;
    let kafka_reader = KafkaReader::new(&kafka, &topics.iter().map(String::as_str).collect::<Vec<_>>());
    let amqp_reader = AmqpReader::new(&amqp, &name);

    let setup = Setup::new(&rules(&http.url("/whatsapp/{sender_id}"), &kafka, &amqp, &name));
    let relay = setup.start().await;
    let started = SystemTime::now();
    let posted = send(&setup, &relay).await;
    let expected = |sink: &str| -> HashMap<&str, &Bytes> {
        posted.iter().filter(|(_, body)| sinks_of(body).contains(&sink)).map(|(id, body)| (&**id, body)).collect()
    };
    for sink in ["crm", "analytics", "ops"] {
        let share = expected(sink).len();
        assert!((1..EVENTS).contains(&share), "the rules should tell events apart: {sink} is to get {share}");
    }

    let crm = crm.wait_for_events("crm", expected("crm").len()).await;
    let ops = amqp_reader.inbox.wait_for_events("ops", expected("ops").len()).await;
    let on_kafka = expected("analytics").len() + EVENTS;
    let kafka = kafka_reader.inbox.wait("analytics and history", |arrived| arrived.all.len() >= on_kafka).await;
    eventually("all lines on standard output", async || relay.stdout().len() >= EVENTS).await;
    let tape = Tape::new(&relay.stdout());
    let log = relay.stop().await;
    assert!(log.iter().all(|line| line["level"] == "INFO"), "{log:#?}");

    // Nothing has come meanwhile that should not have.
    let (analytics, history) = by_topic(kafka_reader.inbox.now(), &name);
    assert_eq!(kafka.all.len(), analytics.all.len() + history.all.len(), "something came twice");
    let ops_now = amqp_reader.inbox.now();
    assert_eq!(ops.all.len(), ops_now.all.len(), "something came twice");
    let check = |sink, arrived: &Arrived| check_sink(sink, arrived, &expected(sink), &tape, started);
    check("crm", &crm);
    check("ops", &ops_now);
    check("analytics", &analytics);
    check("history", &history);
    assert_eq!(tape.positions.len(), EVENTS);

    for arrival in &crm.all {
        assert_eq!(arrival.to, format!("/whatsapp/{}", arrival.field("/channel/sender_id")));
        assert_eq!(arrival.header("x-campaign"), arrival.field("/campaign/name"));
    }
    for arrival in &analytics.all {
        assert_eq!(arrival.to, format!("{name}.{}", arrival.field("/message_status")));
        assert_eq!(arrival.key.as_deref(), Some(&*arrival.field("/recipient/id")));
        assert_eq!(arrival.header("x-campaign"), or_dash(arrival.field("/campaign/id")));
    }
    for arrival in &history.all {
        assert_eq!(arrival.key.as_deref(), Some(&*arrival.field("/message_id")));
    }
    for arrival in &ops_now.all {
        let routing_key = format!("{}.{}", arrival.field("/message_status"), arrival.field("/channel/sender_id"));
        assert_eq!(arrival.to, format!("{name}/{routing_key}"));
        check_properties(arrival);
    }
}

fn rules(url: &str, kafka: &str, amqp: &str, name: &str) -> String {
    format!(
        r#"
[sinks.crm]
type = "http"
url = "{url}"
headers = {{ x-campaign = "{{campaign_name}}" }}

[sinks.analytics]
type = "kafka"
brokers = ["{kafka}"]
topic = "{name}.{{status}}"
key = "{{recipient_id}}"
headers = {{ x-campaign = "{{campaign_id}}" }}

[sinks.history]
type = "kafka"
brokers = ["{kafka}"]
topic = "{name}"

[sinks.ops]
type = "rabbitmq"
urls = ["{amqp}"]
exchange = "{name}"
routing_key = "{{status}}.{{sender_id}}"

# One line at a time: the order of the journal.
[sinks.tape]
type = "stdout"
delivery = {{ concurrency = 1 }}

[[routes]]
name = "records"
to = ["tape", "history"]

[[routes]]
name = "errors"
when = {{ status = "error" }}
to = ["ops"]

[[routes]]
name = "argentina"
when = {{ sender_id = "54911*", status = ["delivered", "read"], campaign_id = {{ exists = true }} }}
to = ["crm", "analytics"]
final = true

[[routes]]
name = "not sent"
when = {{ status = {{ not = "sent" }} }}
to = ["analytics", "ops"]
"#
    )
}

/// What the rules above say, said again.
fn sinks_of(body: &[u8]) -> Vec<&'static str> {
    let status = field(body, "/message_status");
    let mut sinks = vec!["tape", "history"];
    if status == "error" {
        sinks.push("ops");
    }
    let argentina = field(body, "/channel/sender_id").starts_with("54911");
    if argentina && (status == "delivered" || status == "read") && !field(body, "/campaign/id").is_empty() {
        sinks.extend(["crm", "analytics"]);
    } else if status != "sent" {
        sinks.extend(["analytics", "ops"]);
    }
    sinks
}

/// Posts the events with the program's own command; all must be acknowledged. Id and body of each.
async fn send(setup: &Setup, relay: &Relay) -> Vec<(String, Bytes)> {
    let (url, count) = (relay.url(), (EVENTS / RUNS).to_string());
    let mut posted = Vec::new();
    for run in 0..RUNS {
        let (seed, file) = (run.to_string(), format!("acked-{run}"));
        let arguments = [
            "send",
            "--json",
            "--count",
            &count,
            "--connections",
            "32",
            "--seed",
            &seed,
            "--url",
            &url,
            "--acked",
            &file,
        ];
        let done = setup.run(&arguments, "").await;
        assert_eq!(done.code, Some(0), "{done:?}");
        let acked = std::fs::read_to_string(setup.dir().join(&file)).expect("the file of acknowledged events");
        posted.extend(acked.lines().map(|line| {
            let line: Value = serde_json::from_str(line).expect("JSON");
            let text = |name: &str| line[name].as_str().expect("text").to_owned();
            (text("id"), Bytes::from(text("body")))
        }));
    }
    let different: HashSet<_> = posted.iter().map(|(id, _)| id).collect();
    assert_eq!((posted.len(), different.len()), (EVENTS, EVENTS));
    posted
}

/// What the relay has written to standard output: the order in which it received the events, and when.
struct Tape {
    positions: HashMap<String, usize>,
    received_at: HashMap<String, String>,
}

impl Tape {
    fn new(lines: &[String]) -> Self {
        let lines: Vec<Value> = lines.iter().map(|line| serde_json::from_str(line).expect("JSON")).collect();
        let text = |line: &Value, name: &str| line[name].as_str().expect("text").to_owned();
        let ids = lines.iter().map(|line| text(line, "id"));
        Self {
            positions: ids.enumerate().map(|(position, id)| (id, position)).collect(),
            received_at: lines.iter().map(|line| (text(line, "id"), text(line, "received_at"))).collect(),
        }
    }
}

fn by_topic(arrived: Arrived, history: &str) -> (Arrived, Arrived) {
    let (mut one, mut other) = (Arrived::default(), Arrived::default());
    for arrival in arrived.all {
        let into = if arrival.to == history { &mut other } else { &mut one };
        into.add(arrival);
    }
    (one, other)
}

/// Exactly these events, each once, as they were posted, with the relay's metadata, each message's in order.
fn check_sink(sink: &str, arrived: &Arrived, expected: &HashMap<&str, &Bytes>, tape: &Tape, started: SystemTime) {
    let came: HashSet<&str> = arrived.ids.keys().map(String::as_str).collect();
    let named: HashSet<&str> = expected.keys().copied().collect();
    assert_eq!(came.difference(&named).next(), None, "{sink} got what the rules do not name it for");
    assert_eq!(named.difference(&came).next(), None, "{sink} has not got what the rules name it for");
    assert_eq!((arrived.repeated(), arrived.all.len()), (0, expected.len()), "{sink} got something twice");
    for arrival in &arrived.all {
        assert_eq!(arrival.body, expected[arrival.id()], "{sink}: the body is another");
        check_metadata(arrival, &tape.received_at[arrival.id()], started);
    }
    for (message, ids) in arrived.orders() {
        // Another key or another topic per status leaves the order open.
        if sink != "analytics" {
            assert!(ids.is_sorted_by_key(|id| tape.positions[id]), "{sink}: {message} came in another order: {ids:?}");
        }
    }
}

fn check_metadata(arrival: &Arrival, received_at: &str, started: SystemTime) {
    assert_eq!(arrival.header("relay-received-at"), received_at, "{arrival:?}");
    assert_eq!(arrival.header("relay-attempt"), "1", "{arrival:?}");
    check_time(arrival.header("webhook-timestamp"), started);
    let traceparent: Vec<&str> = arrival.header("traceparent").split('-').collect();
    let lengths: Vec<_> = traceparent.iter().map(|part| part.len()).collect();
    assert_eq!((lengths, traceparent[0]), (vec![2, 32, 16, 2], "00"), "{arrival:?}");
    if arrival.properties.is_empty() {
        assert_eq!(arrival.header("content-type"), "application/json", "{arrival:?}");
    } else {
        check_time(arrival.property("timestamp"), started);
    }
}

fn check_time(seconds: &str, not_before: SystemTime) {
    let since_1970 = |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH).expect("after 1970").as_secs();
    let seconds: u64 = seconds.parse().expect("seconds");
    assert!((since_1970(not_before)..=since_1970(SystemTime::now())).contains(&seconds), "{seconds}");
}

fn check_properties(arrival: &Arrival) {
    let named = ["message_id", "content_type", "delivery_mode"].map(|name| arrival.property(name));
    assert_eq!(json!(named), json!([arrival.id(), "application/json", "2"]), "{arrival:?}");
}

fn or_dash(text: String) -> String {
    if text.is_empty() { "-".to_owned() } else { text }
}
