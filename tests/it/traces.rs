//! Traces, as a collector of another make gets them.

use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};

use crate::brokers::{KafkaReader, create_topic, shared_kafka, unique};
use crate::harness::{Receiver, Reply, Setup, event, eventually, webhook, within};
use crate::python::python;

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const SENDERS_SPAN: &str = "00f067aa0ba902b7";

/// Takes OTLP over gRPC and HTTP. Ends when it is dropped.
struct Collector {
    _child: Child,
    lines: Lines<BufReader<ChildStdout>>,
    ports: Value,
}

impl Collector {
    async fn start() -> Self {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/python/collector.py");
        let mut command = Command::new(python());
        command.arg(script).stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().expect("it starts");
        let lines = BufReader::new(child.stdout.take().expect("a pipe")).lines();
        let mut collector = Self { _child: child, lines, ports: Value::Null };
        collector.ports = collector.next().await;
        collector
    }

    async fn next(&mut self) -> Value {
        let line = within("the collector", self.lines.next_line()).await.expect("a line").expect("a line");
        serde_json::from_str(&line).expect("JSON")
    }

    /// The next spans, as many as there should be.
    async fn spans(&mut self, count: usize) -> Vec<Value> {
        let mut spans = Vec::new();
        while spans.len() < count {
            spans.push(self.next().await);
        }
        spans
    }

    fn traced(&self, rules: &str, protocol: &str) -> Setup {
        Setup::new(rules)
            .env("RELAY_TELEMETRY__OTLP_ENDPOINT", format!("http://127.0.0.1:{}", self.ports[protocol]))
            .env("RELAY_TELEMETRY__OTLP_PROTOCOL", protocol)
            .env("RELAY_TELEMETRY__OTLP_HEADERS", "{x-collector=\"${SECRET}\"}")
            .env("SECRET", "s3cret")
    }
}

/// The spans of which the attributes have this.
fn with<'s>(spans: &'s [Value], name: &str, value: &Value) -> Vec<&'s Value> {
    spans.iter().filter(|span| span["attributes"][name] == *value).collect()
}

/// From the sender's header to the request's span, to that of each attempt, to the header that a receiver gets.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trace_goes_from_the_sender_to_the_receivers() {
    let mut collector = Collector::start().await;
    let (kafka, topic) = (shared_kafka(), unique("traces"));
    create_topic(&kafka, &topic, &[]).await;
    let reader = KafkaReader::new(&kafka, &[&topic]);
    let server =
        Receiver::start(|request| Reply::Status(if request.header("relay-attempt") == "1" { 503 } else { 204 })).await;
    let rules = format!(
        "[sinks.crm]\ntype = 'http'\nurl = '{}'\ndelivery = {{ schedule = ['10ms'] }}\n\
         [sinks.analytics]\ntype = 'kafka'\nbrokers = ['{kafka}']\ntopic = '{topic}'\n\
         [[routes]]\nname = 'all'\nto = ['crm', 'analytics']\n",
        server.url("/{recipient_id}")
    );
    for (round, protocol) in [(1, "grpc"), (2, "http")] {
        let relay = collector.traced(&rules, protocol).start().await;
        let mut request = webhook(event(round, "sent"));
        request.headers_mut().insert("traceparent", format!("00-{TRACE}-{SENDERS_SPAN}-01").parse().expect("a value"));
        let id = relay.send(request).await.ids().remove(0);
        let spans = collector.spans(4).await;
        for span in &spans {
            assert_eq!(
                (&span["trace"], &span["protocol"], &span["ended"]),
                (&json!(TRACE), &json!(protocol), &json!(true)),
                "{span:#}"
            );
            assert_eq!(span["resource"]["service.name"], "engage-relay");
            assert!(!span.to_string().contains("541100000"), "nobody's number: {span:#}");
        }
        let ingress = spans.iter().find(|span| span["kind"] == "SERVER").expect("the request's");
        assert_eq!((&ingress["parent"], &ingress["name"]), (&json!(SENDERS_SPAN), &json!("POST /webhooks/engage")));
        let expected = json!({
            "http.request.method": "POST", "http.route": "/webhooks/engage", "url.path": "/webhooks/engage",
            "url.scheme": "http", "network.protocol.version": "1.1", "http.response.status_code": 200
        });
        assert_eq!(ingress["attributes"], expected);
        let attempts: Vec<_> = spans.iter().filter(|span| span["kind"] != "SERVER").collect();
        assert!(attempts.iter().all(|span| span["parent"] == ingress["span"]), "{attempts:#?}");
        let sent = with(&spans, "messaging.system", &json!("kafka"));
        let attributes = &sent[0]["attributes"];
        assert_eq!((sent.len(), &sent[0]["kind"], &sent[0]["error"]), (1, &json!("PRODUCER"), &json!(false)));
        assert_eq!(
            (&attributes["messaging.destination.name"], &attributes["messaging.operation.type"]),
            (&json!(topic), &json!("send"))
        );
        assert_eq!((&attributes["messaging.message.id"], &attributes["relay.sink"]), (&json!(id), &json!("analytics")));
        let traceparent = |span: &Value| format!("00-{TRACE}-{}-01", span["span"].as_str().expect("an id"));
        let arrived = reader.inbox.wait_for_events("Kafka", usize::try_from(round).expect("small")).await;
        let message = arrived.all.iter().find(|message| message.header("webhook-id") == id).expect("the message");
        assert_eq!(message.header("traceparent"), traceparent(sent[0]));
        let [failed, delivered] =
            [503, 204].map(|status| with(&spans, "http.response.status_code", &json!(status)).remove(0));
        assert_eq!((&failed["error"], &failed["attributes"]["error.type"]), (&json!(true), &json!("http_503")));
        assert_eq!(
            (&delivered["error"], &delivered["kind"], &delivered["attributes"]["relay.attempt"]),
            (&json!(false), &json!("CLIENT"), &json!(2))
        );
        assert_eq!(delivered["attributes"]["server.address"], "127.0.0.1");
        let received = server.wait_for(2 * usize::try_from(round).expect("small")).await;
        let last: Vec<_> =
            received.iter().rev().take(2).map(|request| request.header("traceparent").to_owned()).collect();
        assert_eq!(last, [traceparent(delivered), traceparent(failed)]);
        relay.stop().await;
    }
}

/// Without a sender's header the request begins a trace; the last spans are sent at the end; what is not sampled is not sent.
#[tokio::test]
async fn a_trace_begins_with_the_request_if_it_is_sampled() {
    let mut collector = Collector::start().await;
    let server = Receiver::accepting().await;
    let relay = collector.traced(&server.routes(), "grpc").start().await;
    relay.post(event(1, "sent")).await.ids();
    let header = server.wait_for(1).await.remove(0).header("traceparent").to_owned();
    relay.stop().await;
    let spans = collector.spans(2).await;
    let ingress = spans.iter().find(|span| span["kind"] == "SERVER").expect("the request's");
    let attempt = spans.iter().find(|span| span["kind"] == "CLIENT").expect("the attempt's");
    assert_eq!((&ingress["parent"], &attempt["parent"]), (&json!(""), &ingress["span"]));
    let text = |value: &Value| value.as_str().expect("text").to_owned();
    assert_eq!(header, format!("00-{}-{}-01", text(&ingress["trace"]), text(&attempt["span"])));

    let setup = collector.traced(&server.routes(), "grpc").env("RELAY_TELEMETRY__TRACE_SAMPLE", "0");
    let relay = setup.start().await;
    relay.post(event(2, "sent")).await.ids();
    let header = server.wait_for(2).await.remove(1).header("traceparent").to_owned();
    assert!(header.ends_with("-00"), "{header}");
    let mut request = webhook(event(3, "sent"));
    request.headers_mut().insert("traceparent", format!("00-{TRACE}-{SENDERS_SPAN}-01").parse().expect("a value"));
    relay.send(request).await.ids();
    assert_eq!(relay.send(webhook("no JSON")).await.status, 400);
    relay.stop().await;
    // Only what its sender wanted to be traced, although there was more before and after.
    assert!(collector.spans(2).await.iter().all(|span| span["trace"] == TRACE));
}

/// A collector that is away or refuses costs a warning.
#[tokio::test]
async fn a_collector_that_fails_costs_nothing_else() {
    let collector = Collector::start().await;
    let server = Receiver::accepting().await;
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let silent = format!("http://{}", silent.local_addr().expect("its address"));
    let away = "http://127.0.0.1:1".to_owned();
    let of = |protocol: &str| format!("http://127.0.0.1:{}", collector.ports[protocol]);
    let cases = [
        ("grpc", &away, true),
        ("http", &away, true),
        ("grpc", &of("grpc"), true),
        ("http", &of("http"), true),
        ("grpc", &silent, false),
    ];
    for (number, (protocol, endpoint, warns)) in (1..).zip(cases) {
        let setup = collector.traced(&server.routes(), protocol);
        // A wrong secret.
        let setup = setup.env("RELAY_TELEMETRY__OTLP_ENDPOINT", endpoint).env("SECRET", "wr0ng");
        let relay = setup.start().await;
        relay.post(event(number, "sent")).await.ids();
        let warning = "traces can't be sent to the collector, and are dropped; events are not affected";
        if warns {
            eventually(&format!("a warning of {protocol} {endpoint}"), async || !relay.logged(warning).is_empty())
                .await;
        }
        relay.post(event(number + 100, "sent")).await.ids();
        let since = Instant::now();
        let log = relay.stop().await;
        assert!(since.elapsed() < Duration::from_secs(5), "{protocol} {endpoint}: {:?}", since.elapsed());
        let warned = log.iter().filter(|line| line["message"] == warning).count();
        assert_eq!(warned, usize::from(warns), "once: {protocol} {endpoint}: {log:#?}");
        assert!(!format!("{log:?}").contains("wr0ng"));
    }
}
