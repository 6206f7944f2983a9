//! The commands, as people and scripts call them.

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::harness::{Receiver, Setup, TOKEN, event, eventually, within};

const SHIPPED: &str = include_str!("../../routes.toml");

/// The event of Engage's documentation.
const SAMPLE: &str = r#"{
  "message_id": "wamid.HBgMMzU5ODg0NjE4MTgAERgSTMwMTQ5ODY1NTFERUY0AA==",
  "message_status": "delivered",
  "channel":  { "channel_type": "Whatsapp", "name": "Channel Name", "sender_id": "5491122223333" },
  "campaign": { "id": "074116ff-76f3-47b7-8be2-92f465718a3e", "name": "campaign name" },
  "event_name": "msg_status",
  "event_timestamp": "1687548944",
  "recipient": { "id": "541112341234" }
}
"#;

const TEN_MISTAKES: &str = r#"
[sinks.a]
type = "http"
url = "ftp://example.com/"
timeout = "soon"
colour = "red"

[sinks.b]
type = "kafka"
brokers = ["kafka-0:9092"]
topic = "engage.{nope}"

[sinks.c]
type = "pigeon"

[[routes]]
name = "one"
when = { sender_id = { regex = "(" } }
to = ["a", "nowhere", "c"]

[[routes]]
name = "one"
when = { size = "large" }
to = ["b", "${NOT_SET_ANYWHERE}"]
"#;

#[tokio::test]
async fn check_reports_every_mistake_with_its_place() {
    let expected = [
        (4, 7, "this scheme"),
        (5, 11, "duration"),
        (6, 1, "colour"),
        (11, 9, "nope"),
        (14, 8, "pigeon"),
        (18, 32, "regex"),
        (19, 12, "nowhere"),
        (22, 8, "name"),
        (23, 10, "size"),
        (24, 12, "NOT_SET_ANYWHERE"),
    ];
    let setup = Setup::new(TEN_MISTAKES);
    let done = setup.run(&["check"], "").await;
    assert_eq!(done.code, Some(64), "{done:?}");
    for (line, column, about) in expected {
        let place = format!("error: routes.toml:{line}:{column}: ");
        let found = done.stdout.lines().find(|found| found.starts_with(&place));
        assert!(found.is_some_and(|found| found.contains(about)), "{place}… {about} in\n{}", done.stdout);
    }
    assert_eq!(done.stdout.lines().filter(|line| line.starts_with("error: ")).count(), 10, "{}", done.stdout);
    let done = setup.run(&["check", "--json"], "").await;
    let report: Value = serde_json::from_str(&done.stdout).unwrap();
    assert_eq!((done.code, &report["ok"]), (Some(64), &Value::Bool(false)));
    assert_eq!(report["problems"].as_array().map(Vec::len), Some(10), "{report}");
    let done = setup.run(&["run"], "").await;
    assert_eq!(done.code, Some(64), "{done:?}");
    assert!(done.stderr.contains("routes.toml:4:7"), "{done:?}");
}

#[tokio::test]
async fn check_says_once_what_is_a_warning() {
    let done = Setup::new("[sinks.idle]\ntype = \"stdout\"\n").run(&["check"], "").await;
    let expected = "warning: routes.toml:1:8: no route leads to the sink `idle`\nroutes.toml: ok, 0 routes, 1 sink\n";
    assert_eq!((done.code, &*done.stdout), (Some(0), expected), "{done:?}");
}

#[tokio::test]
async fn check_says_where_settings_and_rules_do_not_go_together() {
    let check = async |setup: Setup, expected: &[&str]| {
        let done = setup.run(&["check"], "").await;
        let warnings: Vec<_> = done.stdout.lines().filter_map(|line| line.strip_prefix("warning: ")).collect();
        assert_eq!((done.code, &*warnings), (Some(0), expected), "{done:?}");
    };
    let rules = "[sinks.out]\ntype = \"stdout\"\nstart = \"earliest\"\ndelivery = { order_by = \"sender_id\" }\n\
        [[routes]]\nwhen = { token = [\"test\", \"${OTHER}\"] }\nto = [\"out\"]\n\
        [[routes]]\nname = \"mine\"\nwhen = { token = { in = [\"test\"], prefix = \"o\" } }\nto = [\"out\"]\n\
        [[routes]]\nwhen = { token = \"o*\" }\nto = [\"out\"]\n";
    let setup = Setup::new(rules).env("OTHER", "s3cret").env("RELAY_JOURNAL__SEGMENT", "64KiB");
    let strange = "route \"route-1\": its `token` ([\"test\", \"${OTHER}\"]) names one that ingress.auth does not have";
    let short = "ingress.max_body is 64.0 KiB, and journal.segment 64.0 KiB: a body that no journal file has room for is refused";
    check(setup.clone().env("RELAY_INGRESS__MAX_BODY", "65536"), &[short, strange]).await;
    check(setup.clone().env("RELAY_INGRESS__MAX_BODY", "65535").env("OTHER", "test"), &[]).await;
    let kafka = setup.clone().env("RELAY_JOURNAL__KIND", "kafka").env("RELAY_JOURNAL__BROKERS", "[\"k:9092\"]");
    let order = "sinks.out: its `order_by` is not kept across partitions: journal.key is \"message_id\", by which events are spread over them";
    let start = "sinks.out: `start` has no meaning with journal.kind = \"kafka\": a sink gets what is accepted after the rules name it; `engage-relay replay` sends it what was before";
    check(kafka.without("RELAY_JOURNAL__SEGMENT"), &[strange, order, start]).await;
    let made_up =
        setup.without("RELAY_INGRESS__AUTH__TOKENS").without("RELAY_JOURNAL__SEGMENT").env("OTHER", "generated");
    let mine =
        "route \"mine\": its `token` (in = [\"test\"], prefix = \"o\") names one that ingress.auth does not have";
    check(made_up, &[strange, mine]).await;
}

#[tokio::test]
async fn check_accepts_the_shipped_rules() {
    let done = Setup::new(SHIPPED).run(&["check"], "").await;
    assert_eq!(done.code, Some(0), "{done:?}");
    let done = Setup::new(SHIPPED).run(&["check", "--json"], "").await;
    assert_eq!(serde_json::from_str::<Value>(&done.stdout).unwrap()["ok"], true, "{done:?}");
}

#[tokio::test]
async fn bad_settings_are_named_and_their_values_are_not() {
    async fn check(relay_toml: &str, variable: Option<(&str, &str)>, about: &str) {
        let mut setup = Setup::new(SHIPPED);
        setup.file("relay.toml", relay_toml);
        if let Some((name, value)) = variable {
            setup = setup.without("RELAY_INGRESS__AUTH__TOKENS").env(name, value);
        }
        for command in ["check", "run"] {
            let done = setup.run(&[command], "").await;
            assert_eq!(done.code, Some(64), "{relay_toml:?} {variable:?}: {done:?}");
            let said = done.stdout + &done.stderr;
            assert!(said.contains(about), "{about:?} is not in {said:?}");
            assert!(!said.contains("s3cret") && !said.contains(TOKEN.1), "a value is in {said:?}");
        }
    }
    check("data_dri = \"s3cret\"", None, "data_dri").await;
    check("[ingress]\nmax_body = \"s3cret\"", None, "ingress.max_body").await;
    check("[ingress]\nmax_body = \"12 B\"", None, "ingress.max_body").await;
    check("[ingress.auth]\ntoken = \"s3cret\"", None, "token").await;
    check("", Some(("RELAY_INGRESS__AUTH", "s3cret")), "auth").await;
    check("[ingress", None, "relay.toml:1:9: ").await;
    check("[admin]\ntoken = \"s3cret\" x", None, "relay.toml:2:18: ").await;
    check("[telemetry]\nlog = \"inof\"", None, "relay.toml:2:7: telemetry.log is ").await;
    check("", Some(("RELAY_ADMIN__TOKEN", "s3cret ")), "RELAY_ADMIN__TOKEN: admin.token begins or ends").await;
    check("[journal]\nsegment = \"1MiB\"\nmax_disk = \"1MiB\"", None, "journal.max_disk").await;
    check("[admin]\nlisten = \"0.0.0.0:9090\"", Some(("RELAY_ADMIN__LISTEN", "0.0.0.0:9090")), "admin.token").await;
    check("", Some(("RELAY_INGRESS__MAX_BODY", "s3cret")), "max_body").await;
    check("", Some(("RELAY_INGRES__MAX_BODY", "s3cret")), "RELAY_INGRES__MAX_BODY").await;
    check("", Some(("RELAY_INGRESS__AUTH__TOKENS", "[{name=\"a\",valeu=\"s3cret\"}]")), "valeu").await;
    check("", Some(("RELAY_JOURNAL__DURABILITY", "s3cret")), "durability").await;
    for option in ["--config", "--routes"] {
        let missing = Setup::new(SHIPPED).run(&["check", option, "nowhere.toml"], "").await;
        assert!(missing.code == Some(64) && missing.stdout.contains("nowhere.toml"), "{missing:?}");
        let missing = Setup::new(SHIPPED).run(&["run", option, "nowhere.toml"], "").await;
        assert!(missing.code == Some(64) && missing.stderr.contains("nowhere.toml"), "{missing:?}");
    }
}

#[tokio::test]
async fn check_looks_at_settings_certificates_and_rules_at_once() {
    let setup = Setup::new(TEN_MISTAKES).env("RELAY_SHUTDOWN__GRACE", "soon");
    setup.file(
        "relay.toml",
        "[ingress]\nmax_body = \"1B\"\nlitsen = 1\ntls = { cert = \"none.pem\", key = \"none.pem\" }\ntrusted_proxies = [\"::1\"]\n",
    );
    let places =
        ["relay.toml:2:12: ", "relay.toml:3:1: ", "RELAY_SHUTDOWN__GRACE: ", "ingress.tls: ", "routes.toml:4:7: "];
    let text = setup.run(&["check"], "").await;
    assert_eq!(text.code, Some(64), "{text:?}");
    for place in places {
        let found = text.stdout.lines().any(|line| line.starts_with(&format!("error: {place}")));
        assert!(found, "{place} is not in\n{}", text.stdout);
    }
    assert!(text.stdout.ends_with("\n14 errors; nothing would be applied\n"), "{}", text.stdout);
    let json = setup.run(&["check", "--json"], "").await;
    let report: Value = serde_json::from_str(&json.stdout).unwrap();
    assert_eq!((json.code, &report["ok"]), (Some(64), &Value::Bool(false)));
    assert_eq!(report["problems"].as_array().map(Vec::len), Some(14), "{report}");
    let first = &report["problems"][0];
    assert_eq!((&first["file"], &first["line"], &first["column"]), (&"relay.toml".into(), &2.into(), &12.into()));
    assert!(report["problems"].as_array().unwrap().iter().all(|problem| problem["severity"] == "error"), "{report}");
    assert!(report["warnings"][0].as_str().is_some_and(|text| text.starts_with("ingress.trusted_proxies")), "{report}");
    let run = setup.run(&["run"], "").await;
    assert_eq!((run.code, run.stdout.as_str()), (Some(64), ""));
    assert!(places.iter().all(|place| run.stderr.contains(place)), "{run:?}");
}

/// One sink of each kind, each with a secret.
fn four_sinks() -> Setup {
    let routes = r#"
[sinks.crm]
type = "http"
url = "https://crm.example.com/whatsapp/{sender_id}"
headers = { authorization = "Bearer ${CRM_TOKEN}" }
signing_secret = "${CRM_SIGNING}"

[sinks.analytics]
type = "kafka"
brokers = ["kafka-0:9092"]
topic = "engage.{status}"
key = "{message_id}"
options = { "sasl.password" = "${KAFKA_PASSWORD}" }

[sinks.ops]
type = "rabbitmq"
urls = ["${RABBITMQ_URL}"]
exchange = "engage"
routing_key = "{status}.{sender_id}"

[sinks.screen]
type = "stdout"

[[routes]]
name = "errors"
when = { status = "error" }
to = ["ops"]

[[routes]]
name = "argentina"
when = { sender_id = "54911*", status = ["delivered", "read"], campaign_id = { exists = true } }
to = ["crm", "analytics", "ops"]

[[routes]]
name = "everything"
to = ["analytics", "screen"]
final = true

[[routes]]
name = "later"
to = ["screen"]
"#;
    Setup::new(routes)
        .env("CRM_TOKEN", "s3cret-crm")
        .env("CRM_SIGNING", "whsec_czNjcmV0LXNpZ25pbmcta2V5LWZvci10ZXN0cw==")
        .env("KAFKA_PASSWORD", "s3cret-kafka")
        .env("RABBITMQ_URL", "amqp://relay:s3cret-rabbit@rabbit:5672/%2f")
}

#[tokio::test]
async fn explain_says_what_each_sink_would_be_sent() {
    let setup = four_sinks();
    let done = setup.run(&["explain"], SAMPLE).await;
    assert_eq!(done.code, Some(0), "{done:?}");
    let expected = [
        "errors: does not match",
        "status should be \"error\", the event has \"delivered\"",
        "argentina: matches, to crm, analytics, ops",
        "later: not tried, since everything is final",
        "sink crm (by route argentina)",
        "url: https://crm.example.com/whatsapp/5491122223333",
        "authorization: Bearer ${CRM_TOKEN}",
        "webhook-signature: v1,",
        "topic: engage.delivered",
        "key: wamid.HBgMMzU5ODg0NjE4MTgAERgSTMwMTQ5ODY1NTFERUY0AA==",
        "exchange: engage",
        "routing_key: delivered.5491122223333",
        "delivery_mode: 2",
        "sink screen (by route everything)",
        "\"route\":\"everything\"",
    ];
    for text in expected {
        assert!(done.stdout.contains(text), "{text:?} is not in\n{}", done.stdout);
    }
    setup.file("event.json", SAMPLE);
    let json = setup.run(&["explain", "--json", "event.json"], "").await;
    let explained: Value = serde_json::from_str(&json.stdout).unwrap();
    let sinks: Vec<_> = explained[0]["sinks"].as_array().unwrap().iter().map(|sink| sink["sink"].clone()).collect();
    assert_eq!(sinks, ["crm", "analytics", "ops", "screen"]);
    let all = done.stdout + &done.stderr + &json.stdout + &json.stderr;
    assert!(!all.contains("s3cret") && !all.contains("czNjcmV0"), "a secret is in {all}");
    let dash = setup.run(&["explain", "-"], SAMPLE).await;
    assert!(dash.code == Some(0) && dash.stdout.contains("sink crm (by route argentina)"), "{dash:?}");
    let bad = setup.run(&["explain"], "[]").await;
    assert!(bad.code == Some(1) && bad.stderr.contains("array"), "{bad:?}");
    let bad = setup.run(&["explain"], "x").await;
    assert_eq!(bad.stderr, "error: the body is not JSON: expected value at line 1 column 1\n");
}

#[tokio::test]
async fn explain_says_the_same_as_is_sent() {
    let receiver = Receiver::accepting().await;
    let routes =
        receiver.routes().replace("/\"", "/{sender_id}/{campaign_name}\"\nheaders = { x-status = \"{status}\" }");
    let relay = Setup::new(&routes).start().await;
    relay.post(SAMPLE).await.ids();
    let sent = receiver.wait_for(1).await.remove(0);
    let explained = Setup::new(&routes).run(&["explain", "--json"], SAMPLE).await;
    let explained: Value = serde_json::from_str(&explained.stdout).unwrap();
    let preview = &explained[0]["sinks"][0]["sent"];
    assert_eq!(preview["target"][1], serde_json::json!(["url", receiver.url(sent.uri.path())]));
    // These change with the time.
    let volatile = ["webhook-timestamp", "relay-received-at"];
    let headers = preview["headers"].as_array().unwrap();
    assert!(headers.len() >= 7, "{headers:?}");
    for header in headers {
        let (name, value) = (header[0].as_str().unwrap(), header[1].as_str().unwrap());
        assert!(
            volatile.contains(&name) || sent.header(name) == value,
            "{name}: {value:?}, was {:?}",
            sent.header(name)
        );
    }
}

#[tokio::test]
async fn send_posts_and_sums_up() {
    let receiver = Receiver::accepting().await;
    let setup = Setup::new(&receiver.routes());
    let relay = setup.start().await;
    let url = relay.url();
    let done = setup.run(&["send", "--count", "50", "--url", &url], "").await;
    assert_eq!(done.code, Some(0), "{done:?}");
    assert!(done.stdout.starts_with("50 accepted in ") && done.stdout.contains("latency in ms: p50 "), "{done:?}");
    let done =
        setup.run(&["send", "--count", "20", "--seed", "1", "--url", &url, "--json", "--acked", "acked"], "").await;
    let summary: Value = serde_json::from_str(&done.stdout).unwrap();
    assert_eq!((&summary["accepted"], &summary["answers"]["200"]), (&20.into(), &20.into()), "{summary}");
    assert_eq!(std::fs::read_to_string(setup.dir().join("acked")).unwrap().lines().count(), 20);
    let ids: std::collections::BTreeSet<_> =
        receiver.wait_for(70).await.iter().map(|received| received.id().to_owned()).collect();
    assert_eq!(ids.len(), 70);
    let done = setup.run(&["send", "--count", "3", "--url", &url, "--token", "wrong", "--json"], "").await;
    let summary: Value = serde_json::from_str(&done.stdout).unwrap();
    assert_eq!(
        (done.code, &summary["accepted"], &summary["answers"]["401"]),
        (Some(1), &0.into(), &3.into()),
        "{summary}"
    );
}

#[tokio::test]
async fn send_notes_what_was_acknowledged_or_fails() {
    let receiver = Receiver::accepting().await;
    let setup = Setup::new(&receiver.routes());
    let relay = setup.start().await;
    let done = setup.run(&["send", "--count", "500", "--url", &relay.url(), "--acked", "/dev/full"], "").await;
    assert!(done.code == Some(1) && done.stdout.contains(" accepted in "), "{done:?}");
    assert!(done.stderr.contains("can't write to the file of acknowledged events: No space left"), "{done:?}");
    assert!(receiver.received().len() < 500, "nothing is sent that can't be noted");
    relay.stop().await;
}

#[tokio::test]
async fn send_sums_up_when_it_is_interrupted() {
    let receiver = Receiver::accepting().await;
    let setup = Setup::new(&receiver.routes());
    let relay = setup.start().await;
    for json in [false, true] {
        let seed = json.to_string().len().to_string();
        let seen = receiver.received().len();
        let rate = ["send", "--count", "100000", "--rate", "10", "--url", &relay.url(), "--seed", &seed];
        let sending = setup.command(&[&rate[..], if json { &["--json"] } else { &[] }].concat()).spawn().unwrap();
        receiver.wait_for(seen + 2).await;
        let pid = Pid::from_raw(i32::try_from(sending.id().unwrap()).unwrap()).unwrap();
        kill_process(pid, Signal::INT).unwrap();
        let done = within("its end", sending.wait_with_output()).await.unwrap();
        let summary = String::from_utf8(done.stdout).unwrap();
        assert_eq!(done.status.code(), Some(130), "{summary}");
        match json {
            true => assert!(serde_json::from_str::<Value>(&summary).unwrap()["accepted"].as_u64() >= Some(2)),
            false => assert!(summary.contains(" accepted in ") && summary.contains("latency in ms"), "{summary}"),
        }
    }
    relay.stop().await;
}

/// Without a URL it sends to where the settings say that the ingress listens.
#[tokio::test]
async fn send_goes_where_the_settings_say() {
    let relay = Setup::new(SHIPPED).env("RELAY_INGRESS__LISTEN", "127.0.0.2:0").start().await;
    let setup = Setup::new(SHIPPED).env("RELAY_INGRESS__LISTEN", relay.address().to_string());
    let done = setup.run(&["send", "--count", "3"], "").await;
    assert_eq!(done.code, Some(0), "{done:?}");
    relay.stop().await;
}

/// Without a token in its settings it sends none, and without an answer it says why.
#[tokio::test]
async fn send_needs_no_token_and_says_what_went_wrong() {
    let elsewhere = Setup::new("").without("RELAY_INGRESS__AUTH__TOKENS");
    let send = async |url: &str| elsewhere.run(&["send", "--count", "3", "--url", url], "").await;
    let open = elsewhere.clone().env("RELAY_INGRESS__AUTH", "none").start().await;
    let done = send(&open.url()).await;
    assert!(done.code == Some(0) && done.stdout.starts_with("3 accepted in "), "{done:?}");
    let plain = open.url();
    open.stop().await;
    let guarded = Setup::new("").start().await;
    for (url, expected) in [
        (guarded.url(), "3  401: no token was sent, since none is configured here; give --token"),
        (
            guarded.url().replace("http:", "https:"),
            "3  not connected: client error (Connect): received corrupt message",
        ),
        (plain, "3  not connected: client error (Connect): tcp connect error: Connection refused"),
    ] {
        let done = send(&url).await;
        assert!(done.code == Some(1) && done.stdout.contains(expected), "{expected:?}: {done:?}");
    }
    // One that is given is sent.
    let nobody = elsewhere.clone().env("RELAY_INGRESS__AUTH", "none");
    let given = nobody.run(&["send", "--count", "3", "--url", &guarded.url(), "--token", TOKEN.1], "").await;
    assert_eq!(given.code, Some(0), "{given:?}");
    // One that a relay made up here is found.
    let generated = Setup::new("").without("RELAY_INGRESS__AUTH__TOKENS");
    let relay = generated.start().await;
    assert_eq!(generated.run(&["send", "--count", "3", "--url", &relay.url()], "").await.code, Some(0));
}

#[tokio::test]
async fn the_shipped_rules_work_as_shipped() {
    let relay = Setup::new(SHIPPED).start().await;
    let id = relay.post(SAMPLE).await.ids().remove(0);
    eventually("a line on standard output", async || !relay.stdout().is_empty()).await;
    let line: Value = serde_json::from_str(&relay.stdout()[0]).unwrap();
    assert_eq!(line["id"], *id);
    assert_eq!(line["body"], serde_json::from_str::<Value>(SAMPLE).unwrap());
    relay.stop().await;
}

#[tokio::test]
async fn what_keeps_it_from_starting() {
    let setup = Setup::new(SHIPPED);
    let relay = setup.start().await;
    let address = relay.address().to_string();
    let done = Setup::new(SHIPPED).env("RELAY_INGRESS__LISTEN", &address).run(&["run"], "").await;
    assert_eq!(done.code, Some(1), "{done:?}");
    assert!(done.stderr.contains(&address) && done.stderr.contains("in use"), "{done:?}");
    let done = setup.run(&[], "").await;
    assert_eq!(done.code, Some(1), "{done:?}");
    assert!(done.stderr.contains("another process uses the data directory data"), "{done:?}");
    // Also if somebody has deleted the lock.
    std::fs::remove_file(setup.dir().join("data/lock")).unwrap();
    for command in [&["run"][..], &["fsck"], &["fsck", "--repair"]] {
        let done = setup.run(command, "").await;
        assert!(done.code == Some(1) && done.stderr.contains("another process uses the data directory"), "{done:?}");
    }
    relay.post(event(1, "sent")).await.ids();
    let setup = Setup::new(SHIPPED).env("RELAY_DATA_DIR", "file/data");
    setup.file("file", "not a directory");
    let done = setup.run(&[], "").await;
    assert_eq!(done.code, Some(1), "{done:?}");
    assert!(done.stderr.contains("file/data"), "{done:?}");
}

#[tokio::test]
async fn the_command_line() {
    let setup = Setup::new(SHIPPED);
    let help = setup.run(&["--help"], "").await;
    assert_eq!(help.code, Some(0), "{help:?}");
    for text in
        ["Examples:", "engage-relay check", "engage-relay explain", "engage-relay send", "RELAY_INGRESS__LISTEN"]
    {
        assert!(help.stdout.contains(text), "{text:?} is not in\n{}", help.stdout);
    }
    for command in ["run", "check", "explain", "send", "fsck"] {
        let help = setup.run(&[command, "--help"], "").await;
        assert!(help.code == Some(0) && help.stdout.contains("Usage: engage-relay"), "{help:?}");
        assert!(help.stdout.contains(&format!("Examples:\n  engage-relay {command}")), "{help:?}");
    }
    for (wrong, about) in [
        (&["--unknown"][..], "--unknown"),
        (&["fly"], "fly"),
        (&["send", "--count", "many"], "many"),
        (&["send", "--rate", "0"], "give a number from 0.001 to 1000000"),
        (&["send", "--rate", "nan"], "give a number from 0.001 to 1000000"),
        (&["send", "--connections", "0"], "0 is not in 1..=10000"),
        (&["replay", "--sink", "x", "--rate", "0"], "0 is not in 1.."),
        (&["dead-letters", "replay", "--all", "--rate", "0"], "0 is not in 1.."),
        (&["dead-letters", "discard", "2", "--sink", "x"], "'[IDS]...' cannot be used with"),
        (&["dead-letters", "discard", "--all", "2"], "'--all' cannot be used with '[IDS]...'"),
        (&["dead-letters", "replay", "2", "--since", "2h"], "'[IDS]...' cannot be used with"),
        (&["dead-letters", "replay", "2", "--rate", "5"], "'[IDS]...' cannot be used with '--rate <RATE>'"),
        (&["dead-letters", "list", "--since", "99999999y"], "\"99999999y\" is no time"),
    ] {
        let done = setup.run(wrong, "").await;
        assert_eq!(done.code, Some(2), "{done:?}");
        assert!(done.stderr.contains("--help") && done.stderr.contains(about), "{about:?}: {done:?}");
    }
}
