use rdkafka::bindings::rd_kafka_resp_err_t as Error;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::{Headers, Message};
use rdkafka::mocking::MockCluster;
use rdkafka::types::RDKafkaApiKey;

use super::super::tests::{check_problems, config, event};
use super::super::{Sink, Verdict};
use super::*;

const ATTEMPT: Attempt<'_> = Attempt { number: 1, route: "all", traceparent: None };
const BODY: &str = r#"{"message_id":"wamid.A","message_status":"read"}"#;

#[test]
fn problems() {
    let check = |table: &str, expected: &[&str]| check_problems(&format!("type = \"kafka\"\n{table}"), expected);
    let base = "brokers = [\"k:9092\"]\ntopic = \"t\"\n";
    let with = |line: &str| format!("{base}{line}");
    check(base, &[]);
    check("brokers = [\"k\", \"10.0.0.1:9093\", \"[::1]:9092\"]\ntopic = \"engage.{status}\"", &[]);
    check(
        &with("options = { \"compression.type\" = \"zstd\", linger.ms = 0, \"socket.keepalive.enable\" = false }"),
        &[],
    );
    check("", &["`topic` is missing", "`brokers` is missing"]);
    check("brokers = []\ntopic = \"t\"", &["2: the list of brokers is empty"]);
    for broker in ["", ":9092", "k:", "k:0", "k:99999", "k 1", "a,b", "kafka://k:9092", "a:b:1", "u@k:1"] {
        check(&format!("brokers = [{broker:?}]\ntopic = \"t\""), &["is not a broker's address"]);
    }
    check(
        "brokers = [\"k\",\n  \"u:${TOKEN}@k\"]\ntopic = \"t\"",
        &["2: the value is not valid after its `${…}` have been put in"],
    );
    for topic in ["", "a/b", "a b", ".", "..", "é", "{status}/x", &"x".repeat(250)] {
        check(&format!("brokers = [\"k\"]\ntopic = {topic:?}"), &["3: a topic name has"]);
    }
    check(&with("headers = { traceparent = \"x\", ce_id = \"y\" }"), &["set by the relay", "set by the relay"]);
    check(&with("timeout = \"never\""), &["4: not a duration"]);
    for (name, reason) in kafka::RESERVED_OPTIONS {
        for name in [name.to_owned(), format!("topic.{name}")] {
            let problem = format!("{name:?} cannot be set: {reason}");
            check(&with(&format!("options = {{ {name:?} = \"0\" }}")), &[&problem]);
        }
    }
    check(&with("options = { \"no.such.thing\" = 1 }"), &["4: librdkafka does not know \"no.such.thing\""]);
    check(
        &with("options = { \"compression.type\" = \"${TOKEN}\" }"),
        &["\"compression.type\", or not with this value"],
    );
    check(&with("options = { acks = [1] }"), &["\"acks\" has to be a string, a number or a boolean"]);
}

#[test]
fn keys() {
    fn check(key: &str, body: &str, expected: Option<&str>) {
        let table = format!("type = \"kafka\"\nbrokers = [\"k\"]\ntopic = \"t.{{status|none}}\"\n{key}");
        let preview = config(&table).unwrap().preview("k", &event(body), &ATTEMPT).unwrap();
        let found = preview.target.iter().find(|(label, _)| *label == "key").map(|(_, value)| value.as_str());
        assert_eq!(found, expected, "{key} {body}");
        let topic = if body == BODY { "t.read" } else { "t.none" };
        assert_eq!(preview.target[0], ("topic", topic.to_owned()));
    }
    check("", BODY, Some("wamid.A"));
    check("", "{}", None);
    check("key = \"{status}\"", BODY, Some("read"));
    check("key = \"{sender_id}\"", BODY, Some("-"));
    check("key = \"{sender_id|}\"", BODY, None);
    check("key = \"${TOKEN}\"", BODY, Some("${TOKEN}"));
}

#[test]
fn topics_are_checked_before_sending() {
    let table = "type = \"kafka\"\nbrokers = [\"k\"]\ntopic = \"{status}\"";
    for status in ["a b", "..", "é", &"x".repeat(250)] {
        let event = event(&serde_json::json!({ "message_status": status }).to_string());
        let error = config(table).unwrap().preview("k", &event, &ATTEMPT).unwrap_err();
        assert_eq!((error.verdict, &*error.kind), (Verdict::Reject, "invalid_topic"), "{status}");
        assert!(!error.text.contains(status), "{error}");
    }
}

fn sink(brokers: &str, options: &str) -> Sink {
    let table = format!(
        "type = \"kafka\"\nbrokers = [{brokers:?}]\ntopic = \"engage\"\ntimeout = \"2s\"\nformat = \"cloudevents\"\n\
         headers = {{ x-status = \"{{status}}\" }}\noptions = {{ {options} }}"
    );
    Sink::build("k", &config(&table).unwrap()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_arrives() {
    let cluster = MockCluster::new(1).unwrap();
    cluster.create_topic("engage", 1, 1).unwrap();
    let sink = sink(&cluster.bootstrap_servers(), "");
    let event = event(BODY);
    sink.deliver(&event, &ATTEMPT).await.unwrap();
    sink.close().await;
    assert_eq!(sink.deliver(&event, &ATTEMPT).await.unwrap_err().kind, "closed");
    let brokers = cluster.bootstrap_servers();
    let read = tokio::task::spawn_blocking(move || {
        let mut client = ClientConfig::new();
        client.set("bootstrap.servers", brokers).set("group.id", "test").set("auto.offset.reset", "earliest");
        let consumer: BaseConsumer = client.create().unwrap();
        consumer.subscribe(&["engage"]).unwrap();
        std::iter::repeat_with(|| consumer.poll(Duration::from_secs(10))).flatten().next().unwrap().unwrap().detach()
    });
    let record = read.await.unwrap();
    assert_eq!((record.key(), record.payload()), (Some(&b"wamid.A"[..]), Some(BODY.as_bytes())));
    let headers = record.headers().unwrap();
    let header = |name: &str| headers.iter().find(|header| header.key == name).and_then(|header| header.value);
    assert_eq!(header("webhook-id"), Some(event.id().to_string().as_bytes()));
    assert_eq!(header("content-type"), Some(&b"application/json"[..]));
    assert_eq!(header("ce_subject"), Some(&b"wamid.A"[..]));
    assert_eq!(header("x-status"), Some(&b"read"[..]));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_brokers_refuse() {
    async fn check(errors: &[Error], expected: Option<(Verdict, &str)>) {
        let cluster = MockCluster::new(1).unwrap();
        cluster.create_topic("engage", 1, 1).unwrap();
        let sink = sink(&cluster.bootstrap_servers(), "");
        cluster.request_errors(RDKafkaApiKey::Produce, errors);
        let error = sink.deliver(&event(BODY), &ATTEMPT).await.err();
        assert_eq!(error.as_ref().map(|error| (error.verdict, &*error.kind)), expected, "{errors:?}");
        sink.close().await;
    }
    let too_large = Error::RD_KAFKA_RESP_ERR_MSG_SIZE_TOO_LARGE;
    let retry = Verdict::Retry { after: None };
    check(&[], None).await;
    check(&[Error::RD_KAFKA_RESP_ERR_LEADER_NOT_AVAILABLE], None).await;
    // The first says that the batch was too large, the second that the record is.
    check(&[too_large], None).await;
    check(&[too_large; 2], Some((Verdict::Reject, "message_too_large"))).await;
    check(&[Error::RD_KAFKA_RESP_ERR_POLICY_VIOLATION], Some((Verdict::Reject, "policy_violation"))).await;
    check(&[Error::RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED], Some((retry, "not_authorized"))).await;
    check(&[Error::RD_KAFKA_RESP_ERR_NOT_ENOUGH_REPLICAS; 1000], Some((retry, "timeout"))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_never_leaves() {
    async fn check(sink: Sink, body: &str, expected: (Verdict, &str)) {
        let error = sink.deliver(&event(body), &ATTEMPT).await.unwrap_err();
        assert_eq!((error.verdict, &*error.kind), expected);
        sink.close().await;
    }
    let large = serde_json::json!({ "text": "x".repeat(2000) }).to_string();
    let limit = "\"message.max.bytes\" = 1000";
    check(sink("127.0.0.1:1", limit), &large, (Verdict::Reject, "message_too_large")).await;
    check(sink("127.0.0.1:1", ""), BODY, (Verdict::Retry { after: None }, "timeout")).await;
}
