//! What others make of us, and we of them: the reference libraries for signatures and CloudEvents, and schemathesis for
//! the API.

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;

use crate::brokers::{
    Amqp, AmqpReader, Arrival, KafkaReader, create_topic, receiver, shared_amqp, shared_kafka, unique,
};
use crate::harness::{Reply, Setup, event, webhook};

/// How long a Python program may take.
const PATIENCE: Duration = Duration::from_secs(240);
const SECRETS: [&str; 2] = ["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD"];

/// The Python that has the libraries.
pub(crate) fn python() -> String {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/python");
    let Output { status, stdout, stderr } = Command::new(script).output().expect("scripts/python runs");
    assert!(status.success(), "scripts/python: {}", String::from_utf8_lossy(&stderr));
    String::from_utf8(stdout).expect("a path").trim().to_owned()
}

/// Runs a program to its end; what it printed.
pub(crate) async fn run(program: &str, arguments: &[&str], input: String) -> String {
    // They leave files where they run.
    let folder = tempfile::tempdir().expect("a folder");
    let mut command = tokio::process::Command::new(program);
    command
        .current_dir(folder.path())
        .args(arguments)
        .kill_on_drop(true)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().expect("it starts");
    let mut stdin = child.stdin.take().expect("a pipe");
    stdin.write_all(input.as_bytes()).await.expect("it reads");
    drop(stdin);
    let output =
        tokio::time::timeout(PATIENCE, child.wait_with_output()).await.expect("it ends in time").expect("its end");
    let [stdout, stderr] = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
    assert!(output.status.success(), "{program} {arguments:?}: {stdout}\n{stderr}");
    stdout
}

fn message(sink: &str, arrival: &Arrival) -> Value {
    let pairs = |pairs: &[(String, String)]| -> serde_json::Map<String, Value> {
        pairs.iter().map(|(name, value)| (name.clone(), json!(value))).collect()
    };
    let properties: Vec<_> =
        arrival.properties.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect();
    json!({
        "sink": sink,
        "headers": pairs(&arrival.headers),
        "properties": pairs(&properties),
        "key": arrival.key,
        "body": std::str::from_utf8(&arrival.body).expect("UTF-8"),
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_reference_libraries_verify_and_parse_what_sinks_send() {
    let (kafka, amqp, name) = (shared_kafka(), shared_amqp(), unique("python"));
    create_topic(&kafka, &name, &[]).await;
    Amqp::declare(&amqp, &name, &name).await;
    let (server, http) = receiver(|_| Reply::Status(200)).await;
    let (kafka_reader, amqp_reader) = (KafkaReader::new(&kafka, &[&name]), AmqpReader::new(&amqp, &name));
    let url = server.url("/");
    let rules = format!(
        "[sinks.http]\ntype = 'http'\nurl = '{url}'\nformat = 'cloudevents'\nsigning_secret = {SECRETS:?}\n\
         [sinks.kafka]\ntype = 'kafka'\nbrokers = ['{kafka}']\ntopic = '{name}'\nformat = 'cloudevents'\n\
         [sinks.rabbitmq]\ntype = 'rabbitmq'\nurls = ['{amqp}']\nexchange = '{name}'\nrouting_key = '{{status}}'\nformat = 'cloudevents'\n\
         [[routes]]\nto = ['http', 'kafka', 'rabbitmq']\n"
    );
    let relay = Setup::new(&rules).start().await;
    let mut ids = relay.post(event(1, "sent")).await.ids();
    // Letters that headers can't carry as they are.
    ids.extend(relay.post(event(2, "read").replace("wamid.", "wamid. é\\\"%")).await.ids());
    let mut messages = Vec::new();
    for (sink, inbox) in [("http", &http), ("kafka", &kafka_reader.inbox), ("rabbitmq", &amqp_reader.inbox)] {
        let arrived = inbox.wait_for_ids(sink, ids.clone()).await;
        messages.extend(arrived.all.iter().map(|arrival| message(sink, arrival)));
    }
    relay.stop().await;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python/messages.py");
    let given = json!({ "secrets": SECRETS, "messages": messages });
    let parsed = run(&python(), &[script.to_str().expect("UTF-8")], given.to_string()).await;
    let events: Vec<Value> = serde_json::from_str(&parsed).expect("JSON");
    assert_eq!(events.len(), 6);
    for event in &events {
        let number = ids.iter().position(|id| event["id"] == **id).unwrap_or_else(|| panic!("{event}"));
        let (subject, status) = [("wamid.00000001", "sent"), ("wamid. é\"%00000002", "read")][number];
        assert_eq!(event["source"], "/aivo/engage/5491122223333", "{event}");
        assert_eq!(event["type"], format!("com.aivo.engage.msg_status.{status}"), "{event}");
        assert_eq!((&event["subject"], &event["time"]), (&json!(subject), &json!(1_687_548_944)), "{event}");
        assert_eq!(event["data"]["message_status"], status, "{event}");
    }
}

#[tokio::test]
async fn what_others_sign_is_taken() {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python/sign.py");
    for scheme in ["hub-sha256", "standard-webhooks"] {
        let signature = format!("{{ scheme = \"{scheme}\", secret = {SECRETS:?} }}");
        let setup = Setup::new(include_str!("../../routes.toml")).env("RELAY_INGRESS__SIGNATURE", signature);
        let relay = setup.env("RELAY_INGRESS__AUTH", "none").start().await;
        let body = event(1, "sent").replace("Channel Name", "é");
        let answer = async |headers: &serde_json::Map<String, Value>, body: &str| {
            let mut request = webhook(body.to_owned());
            for (name, value) in headers {
                let name = http::HeaderName::try_from(name).expect("a name");
                request.headers_mut().insert(name, value.as_str().expect("text").parse().expect("a value"));
            }
            relay.send(request).await
        };
        let wrong = "whsec_d3Jvbmc=";
        let given = json!({ "scheme": scheme, "secrets": [SECRETS[0], SECRETS[1], wrong], "body": body });
        let made = run(&python(), &[script.to_str().expect("UTF-8")], given.to_string()).await;
        let signed: Vec<serde_json::Map<String, Value>> = serde_json::from_str(&made).expect("JSON");
        let mut refused = Vec::new();
        for (headers, expected) in signed.iter().zip([200, 200, 401]) {
            let answered = answer(headers, &body).await;
            assert_eq!(answered.status, expected, "{scheme}: {headers:?}: {answered:?}");
            refused.extend((expected == 401).then_some(answered.body));
            let altered = answer(headers, &body.replace("sent", "read")).await;
            assert_eq!(altered.status, 401, "{scheme}: {headers:?}: {altered:?}");
            refused.push(altered.body);
        }
        let unsigned = answer(&serde_json::Map::new(), &body).await;
        assert_eq!(unsigned.status, 401, "{unsigned:?}");
        assert!(refused.iter().all(|body| *body == unsigned.body), "they differ: {refused:#?}");
        relay.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_api_is_what_its_document_says() {
    let (server, _) = receiver(|_| Reply::Status(400)).await;
    let relay = Setup::new(&server.routes()).start().await;
    let events: Vec<_> = (0..200).map(|number| event(number, "sent")).collect();
    relay.post(format!("[{}]", events.join(","))).await.ids();
    relay.sink_is("http", "has rejected them", |sink| sink["dead_letters"] == 200).await;
    let document = format!("http://{}/api/v1/openapi.json", relay.admin());
    // The stream does not end.
    let stream = ["--exclude-path", "/api/v1/stream"];
    let arguments = ["-m", "schemathesis.cli", "run", &document, "--checks", "all", "--max-examples", "40"];
    let repeatable = ["--seed", "20", "--generation-database", "none"];
    let said = run(&python(), &[&arguments[..], &stream, &repeatable].concat(), String::new()).await;
    assert!(said.contains("20/21"), "every operation but the stream: {said}");
    relay.stop().await;
}
