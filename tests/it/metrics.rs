//! What Prometheus reads.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Stdio;

use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;

use crate::harness::{Receiver, Relay, Reply, Setup, event, webhook};

/// Every sample by its name with labels.
pub(crate) async fn scrape(relay: &Relay) -> BTreeMap<String, f64> {
    let text = text(relay).await;
    let samples = text.lines().filter(|line| !line.starts_with('#'));
    let sample = |line: &str| {
        let (name, value) = line.rsplit_once(' ').unwrap();
        (name.to_owned(), value.parse().unwrap())
    };
    samples.map(sample).collect()
}

async fn text(relay: &Relay) -> String {
    let request = http::Request::get("/metrics").body(http_body_util::Full::default()).unwrap();
    let answer = relay.ask(request).await;
    assert!(answer.header("content-type").starts_with("text/plain; version=0.0.4"), "{answer:?}");
    String::from_utf8(answer.body.into()).unwrap()
}

#[tokio::test]
async fn every_metric_counts_what_it_says() {
    let good = Receiver::accepting().await;
    let bad = Receiver::start(|received| match received.uri.path() {
        "/rejects" => Reply::Status(400),
        _ => Reply::Status(503),
    })
    .await;
    let sink = |name: &str, url: &str| format!("[sinks.{name}]\ntype = \"http\"\nurl = \"{url}\"\n");
    let setup = Setup::new(&format!(
        "{}{}{}[[routes]]\nname = \"all\"\nwhen = {{ status = \"sent\" }}\nto = [\"good\", \"rejects\", \"fails\"]\n",
        sink("good", &good.url("/")),
        sink("rejects", &bad.url("/rejects")),
        sink("fails", &bad.url("/fails")),
    ));
    let relay = setup.start().await;
    let batch = format!("[{},{},{}]", event(1, "sent"), event(2, "sent"), event(3, "read"));
    assert_eq!(relay.post(batch).await.ids().len(), 3);
    let mut wrong = webhook(event(4, "sent"));
    wrong.headers_mut().insert("x-auth-token", "wrong".parse().unwrap());
    assert_eq!(relay.send(wrong).await.status, 401);
    assert_eq!(relay.post("nonsense").await.status, 400);
    relay.sink_is("good", "has delivered", |sink| sink["delivered"] == 2).await;
    relay.sink_is("rejects", "has buried", |sink| sink["dead_letters"] == 2).await;
    relay.sink_is("fails", "has parked", |sink| sink["parked"] == 2).await;
    relay.operate("/api/v1/sinks/fails/pause", &Value::Null).await;
    relay.operate("/api/v1/reload", &Value::Null).await;
    relay.status_is("the unrouted event is kept", |status| status["dead_letters"]["unrouted"] == 1).await;
    let found = scrape(&relay).await;
    let check = |name: &str, expected: f64| assert_eq!(found.get(name), Some(&expected), "{name} in {found:#?}");
    check("relay_ingress_requests_total{code=\"200\"}", 1.0);
    check("relay_ingress_requests_total{code=\"400\"}", 1.0);
    check("relay_ingress_requests_total{code=\"401\"}", 1.0);
    check("relay_ingress_requests_total{code=\"503\"}", 0.0);
    check("relay_ingress_events_total{token=\"test\"}", 3.0);
    check("relay_ingress_ack_seconds_count", 1.0);
    check("relay_journal_batch_events_sum", 3.0);
    check("relay_journal_sync_seconds_count", found["relay_journal_batch_events_count"]);
    check("relay_deliveries_total{outcome=\"delivered\",sink=\"good\"}", 2.0);
    check("relay_deliveries_total{outcome=\"dead\",sink=\"rejects\"}", 2.0);
    check("relay_deliveries_total{outcome=\"parked\",sink=\"fails\"}", 2.0);
    check("relay_attempts_total{result=\"delivered\",sink=\"good\"}", 2.0);
    check("relay_attempts_total{result=\"reject\",sink=\"rejects\"}", 2.0);
    check("relay_attempt_seconds_count{sink=\"good\"}", 2.0);
    check("relay_routed_events_total{route=\"all\",sink=\"good\"}", 2.0);
    check("relay_unrouted_events_total", 1.0);
    check("relay_sink_parked{sink=\"fails\"}", 2.0);
    check("relay_sink_paused{sink=\"fails\"}", 1.0);
    check("relay_sink_breaker_open{sink=\"good\"}", 0.0);
    check("relay_sink_dead_letters{sink=\"rejects\"}", 2.0);
    check("relay_sink_dead_letters{sink=\"unrouted\"}", 1.0);
    check("relay_sink_unheld_partitions{sink=\"good\"}", 0.0);
    check("relay_sink_lag_events{sink=\"good\"}", 0.0);
    check("relay_sink_lag_seconds{sink=\"good\"}", 0.0);
    check("relay_sink_inflight{sink=\"good\"}", 0.0);
    check("relay_reloads_total{outcome=\"unchanged\"}", 1.0);
    check("relay_reloads_total{outcome=\"refused\"}", 0.0);
    check("relay_ready", 1.0);
    check(concat!("relay_build_info{version=\"", env!("CARGO_PKG_VERSION"), "\"}"), 1.0);
    assert!(found["relay_journal_limit_bytes"] >= found["relay_journal_needed_bytes"]);
    for positive in ["relay_journal_bytes", "relay_journal_needed_bytes", "relay_routes_loaded_timestamp_seconds"] {
        assert!(found[positive] > 0.0, "{positive}");
    }
    check("relay_ingress_connections", 0.0);
    assert!(found["process_resident_memory_bytes"] > 0.0);
    assert!(found["relay_attempts_total{result=\"retry\",sink=\"fails\"}"] >= 2.0);
    relay.stop().await;
}

/// What senders write is in no label, however much of it there is.
#[tokio::test]
async fn senders_control_no_label() {
    let receiver = Receiver::accepting().await;
    let setup = Setup::new(&receiver.routes());
    let relay = setup.start().await;
    relay.post(event(1, "sent")).await;
    relay.sink_is("http", "has delivered", |sink| sink["delivered"] == 1).await;
    let names = |found: BTreeMap<String, f64>| found.into_keys().collect::<BTreeSet<_>>();
    let before = names(scrape(&relay).await);
    for number in 2..200 {
        let mut sent: Value = serde_json::from_str(&event(number, &format!("status{number}"))).unwrap();
        sent["campaign"] = json!({ "id": format!("campaign{number}"), "name": "x" });
        sent["channel"]["sender_id"] = json!(number.to_string());
        relay.post(sent.to_string()).await;
    }
    relay.sink_is("http", "has delivered all", |sink| sink["delivered"] == 199).await;
    assert_eq!(names(scrape(&relay).await), before);
    relay.stop().await;
}

#[tokio::test]
async fn promtool_finds_nothing_wrong() {
    let receiver = Receiver::accepting().await;
    let relay = Setup::new(&receiver.routes()).start().await;
    relay.post(event(1, "sent")).await;
    relay.sink_is("http", "has delivered", |sink| sink["delivered"] == 1).await;
    let text = text(&relay).await;
    let mut command = Command::new("promtool");
    let piped = command.args(["check", "metrics"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut promtool = piped.spawn().expect("promtool, of Debian's package prometheus");
    promtool.stdin.take().unwrap().write_all(text.as_bytes()).await.unwrap();
    let output = promtool.wait_with_output().await.unwrap();
    let said = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap()).concat();
    assert!(output.status.success() && said.is_empty(), "{said}");
    relay.stop().await;
}
