//! The `kafka` sink against a real broker.

use serde_json::Value;

use crate::brokers::{KafkaReader, Kind, OwnBroker, create_topic, receiver, shared_kafka, unique};
use crate::harness::{Reply, Setup, event, eventually};
use crate::outage;
use crate::rejections::Rejections;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_may_be_absent_stop_and_be_killed() {
    let broker = OwnBroker::start(Kind::Kafka).await;
    let (address, topic) = (broker.address(), unique("outage"));
    create_topic(&address, &topic, &[]).await;
    let reader = KafkaReader::new(&address, &[&topic]);
    broker.stop().await;
    outage::walk(&broker, &format!("type = \"kafka\"\nbrokers = [\"{address}\"]\ntopic = \"{topic}\""), &reader.inbox)
        .await;
}

#[tokio::test]
async fn what_librdkafka_says_is_logged() {
    let rules = "[sinks.topic]\ntype = \"kafka\"\nbrokers = [\"127.0.0.1:1\"]\ntopic = \"t\"\n\
                 [[routes]]\nname = \"all\"\nto = [\"topic\"]\n";
    let relay = Setup::new(rules).env("RELAY_TELEMETRY__LOG", "debug").start().await;
    let says = |line: &Value| line["sink"] == "topic" && line["text"].as_str().is_some_and(|text| !text.is_empty());
    eventually("a line of librdkafka's", async || relay.logged("librdkafka").iter().any(says)).await;
    relay.kill().await;
}

#[tokio::test]
async fn an_oversized_message_is_rejected_alone() {
    let (kafka, topic) = (shared_kafka(), unique("oversized"));
    create_topic(&kafka, &topic, &[("max.message.bytes", "4000")]).await;
    let reader = KafkaReader::new(&kafka, &[&topic]);
    let (server, http) = receiver(|_| Reply::Status(200)).await;
    let rules = format!(
        "[sinks.topic]\ntype = \"kafka\"\nbrokers = [\"{kafka}\"]\ntopic = \"{topic}\"\n\
         [sinks.http]\ntype = \"http\"\nurl = \"{}\"\n[[routes]]\nname = \"all\"\nto = [\"topic\", \"http\"]\n",
        server.url("/")
    );
    let large = |number| event(number, "sent").replace("campaign name", &"x".repeat(6000));
    let mut rejections = Rejections::new(Setup::new(&rules), "topic", "message_too_large").await;
    for number in 0..40 {
        match number % 10 {
            3 => rejections.post_hopeless(&large(number)).await,
            _ => rejections.post_good(&event(number, "sent")).await,
        }
    }
    http.wait_for_events("HTTP, which takes all", 40).await;
    rejections.check(&reader.inbox).await;
}

#[tokio::test]
async fn an_illegal_topic_name_is_rejected_alone() {
    let (kafka, name) = (shared_kafka(), unique("illegal"));
    let topic = format!("{name}.read");
    create_topic(&kafka, &topic, &[]).await;
    let reader = KafkaReader::new(&kafka, &[&topic]);
    let rules = format!(
        "[sinks.topic]\ntype = \"kafka\"\nbrokers = [\"{kafka}\"]\ntopic = \"{name}.{{status}}\"\n\
         [[routes]]\nname = \"all\"\nto = [\"topic\"]\n"
    );
    let mut rejections = Rejections::new(Setup::new(&rules), "topic", "invalid_topic").await;
    for number in 0..30 {
        rejections.post_hopeless(&event(number, "no topic!")).await;
        rejections.post_good(&event(number, "read")).await;
    }
    rejections.check(&reader.inbox).await;
}

/// A topic that is compacted takes no record without a key, and then refuses the whole batch.
#[tokio::test]
async fn an_invalid_record_is_rejected_alone() {
    let (kafka, topic) = (shared_kafka(), unique("invalid"));
    create_topic(&kafka, &topic, &[("cleanup.policy", "compact")]).await;
    let reader = KafkaReader::new(&kafka, &[&topic]);
    let rules = format!(
        "[sinks.topic]\ntype = \"kafka\"\nbrokers = [\"{kafka}\"]\ntopic = \"{topic}\"\nkey = \"{{/key}}\"\n\
         [[routes]]\nname = \"all\"\nto = [\"topic\"]\n"
    );
    let keyed = |number, key: &str| event(number, "sent").replacen('{', &format!("{{\"key\":\"{key}\","), 1);
    let mut rejections = Rejections::new(Setup::new(&rules), "topic", "invalid_record").await;
    rejections.hold().await;
    for number in 0..200 {
        match number % 70 {
            50 => rejections.post_hopeless(&keyed(number, "")).await,
            _ => rejections.post_good(&keyed(number, &number.to_string())).await,
        }
    }
    rejections.let_go().await;
    rejections.check(&reader.inbox).await;
}

/// A topic that is not there yet is no reason to give an event up.
#[tokio::test]
async fn a_missing_topic_holds_up_no_other_and_gets_its_events_when_it_is_made() {
    let (kafka, name) = (shared_kafka(), unique("missing"));
    let topics = ["one", "two"].map(|topic| format!("{name}.{topic}"));
    create_topic(&kafka, &topics[0], &[]).await;
    // The shared brokers make topics for those who ask; librdkafka then has to ask not to.
    let rules = format!(
        "[sinks.topic]\ntype = \"kafka\"\nbrokers = [\"{kafka}\"]\ntopic = \"{name}.{{status}}\"\n\
         options = {{ \"allow.auto.create.topics\" = false }}\n{}\n[[routes]]\nname = \"all\"\nto = [\"topic\"]\n",
        outage::IMPATIENT
    );
    let one = KafkaReader::new(&kafka, &[&topics[0]]);
    let relay = Setup::new(&rules).start().await;
    for number in 0..20 {
        relay.post(event(number, "two")).await.ids();
        relay.post(event(number + 100, "one")).await.ids();
    }
    one.inbox.wait_for_events("the topic that is there", 20).await;
    eventually("a failed attempt in the log", async || !relay.logged("attempt failed").is_empty()).await;
    create_topic(&kafka, &topics[1], &[]).await;
    let two = KafkaReader::new(&kafka, &[&topics[1]]);
    two.inbox.wait_for_events("the topic that was missing", 20).await;
    relay.stop().await;
    assert_eq!((one.inbox.now().repeated(), two.inbox.now().repeated()), (0, 0));
}
