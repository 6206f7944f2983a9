//! The admin side and the commands that use it: what an operator sees, and what they can do about it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::Request;
use http_body_util::Full;
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStdout};

use crate::brokers::{field, receiver};
use crate::harness::{Answer, Receiver, Relay, Reply, Setup, event, eventually, within};

/// Sinks that produce every reason for a dead letter, and one that takes all that is sent to it.
async fn failing() -> (Setup, Receiver, crate::brokers::Inbox) {
    let (server, inbox) = receiver(|request| {
        Reply::Status(match request.uri.path() {
            "/rejects" => 400,
            "/fails" => 503,
            _ => 200,
        })
    })
    .await;
    let sink = |name: &str, path: &str, delivery: &str| {
        let url = server.url(path);
        format!("[sinks.{name}]\ntype = \"http\"\nurl = \"{url}\"\ndelivery = {{ {delivery} }}\n")
    };
    let breaker = "breaker = { failures = 1000, probe = \"1s\" }";
    let rules = sink("rejects", "/rejects", "")
        + &sink("exhausts", "/fails", &format!("max_attempts = 3, schedule = [\"50ms\"], {breaker}"))
        + &sink("expires", "/fails", &format!("max_age = \"3s\", schedule = [\"500ms\"], {breaker}"))
        + &sink("good", "/good", "")
        + "[[routes]]\nname = \"bad\"\nwhen = { status = \"error\" }\nto = [\"rejects\", \"exhausts\", \"expires\"]\n"
        + "[[routes]]\nname = \"good\"\nwhen = { status = \"read\" }\nto = [\"good\"]\n";
    (Setup::new(&rules), server, inbox)
}

async fn letters(relay: &Relay, query: &str) -> Vec<Value> {
    relay.get(&format!("/api/v1/dead-letters{query}")).await["dead_letters"].as_array().expect("a list").clone()
}

async fn wait_for_letters(relay: &Relay, count: usize) -> Vec<Value> {
    let mut found = Vec::new();
    eventually(&format!("{count} dead letters"), async || {
        found = letters(relay, "").await;
        found.len() >= count
    })
    .await;
    found
}

#[tokio::test]
async fn every_dead_letter_says_why_and_can_be_replayed_or_discarded() {
    let (setup, _server, inbox) = failing().await;
    let relay = setup.start().await;
    let id = relay.post(event(1, "error")).await.ids().remove(0);
    let unrouted = relay.post(event(2, "sent")).await.ids().remove(0);
    let found = wait_for_letters(&relay, 4).await;
    let expected = [
        ("rejects", "rejected", "http_400", json!(1), &id),
        ("exhausts", "exhausted", "http_503", json!(3), &id),
        ("expires", "expired", "http_503", json!(3), &id),
        ("unrouted", "unrouted", "unrouted", json!(0), &unrouted),
    ];
    for (sink, reason, kind, attempts, id) in expected {
        let letter = found.iter().find(|letter| letter["sink"] == sink).unwrap_or_else(|| panic!("{sink}: {found:#?}"));
        assert_eq!((&letter["reason"], &letter["error_kind"]), (&json!(reason), &json!(kind)), "{letter:#}");
        assert_eq!(letter["event_id"], **id);
        if sink == "expires" {
            assert!(letter["attempts"].as_u64() > Some(1), "{letter:#}");
        } else {
            assert_eq!(letter["attempts"], attempts, "{letter:#}");
        }
        let [received, failed, died] = ["received_at", "first_failed_at", "died_at"].map(|at| letter[at].as_str());
        assert!(received <= died && (sink == "unrouted") == failed.is_none(), "{letter:#}");
        assert!(letter.get("body").is_none(), "lists have no bodies");
        let number = letter["id"].to_string();
        let shown = relay.get(&format!("/api/v1/dead-letters/{number}")).await;
        assert_eq!(shown["body"]["message_id"], letter["message_id"]);
        let shown = relay.command(&["dead-letters", "show", &number]).await;
        assert!(shown.stdout.contains(reason) && shown.stdout.contains("\"event_name\":\"msg_status\""), "{shown:?}");
    }
    let query = format!("?status=error&event_id={id}&key=wamid.00000001&since=2020-01-01T00:00:00Z&limit=2");
    let page = relay.get(&format!("/api/v1/dead-letters{query}")).await;
    let next = page["next"].as_i64().expect("there are three");
    let rest = relay.get(&format!("/api/v1/dead-letters{query}&after={next}")).await;
    assert_eq!(
        (page["dead_letters"].as_array().map(Vec::len), rest["dead_letters"].as_array().map(Vec::len)),
        (Some(2), Some(1))
    );
    assert_eq!(rest["next"], Value::Null);
    assert_eq!(letters(&relay, "?until=2020-01-01T00:00:00Z").await.len(), 0);

    // One, to another sink; some, by a filter, to theirs, where they die again; and those without a sink of their own.
    let rejected = letters(&relay, "?reason=rejected").await[0]["id"].to_string();
    let done = relay.command(&["dead-letters", "replay", &rejected, "--to", "good"]).await;
    assert_eq!((done.code, &*done.stdout), (Some(0), "1 replayed\n"));
    inbox.wait_for_ids("good", [id.clone()]).await;
    let exhausted = letters(&relay, "?sink=exhausts").await[0]["id"].as_i64();
    assert_eq!(relay.command_json(&["dead-letters", "replay", "--sink", "exhausts"]).await["replayed"], 1);
    eventually("it to die again", async || {
        let again = letters(&relay, "?sink=exhausts").await;
        again.first().is_some_and(|letter| letter["id"].as_i64() > exhausted && letter["attempts"] == 3)
    })
    .await;
    let lost = letters(&relay, "?sink=unrouted").await[0]["id"].to_string();
    let done = relay.command(&["dead-letters", "replay", &lost]).await;
    assert!(done.code == Some(1) && done.stderr.contains("no route matches"), "{done:?}");
    relay.stop().await;

    // A rule is added, and what it had missed is sent.
    let rules = std::fs::read_to_string(setup.dir().join("routes.toml")).expect("the rules");
    setup.file("routes.toml", &rules.replace("status = \"read\"", "status = [\"read\", \"sent\"]"));
    let relay = setup.start().await;
    assert_eq!(relay.command_json(&["dead-letters", "replay", "--reason", "unrouted"]).await["replayed"], 1);
    inbox.wait_for_ids("good", [unrouted]).await;
    let left = letters(&relay, "").await.len();
    assert_eq!(relay.command_json(&["dead-letters", "discard", "--all"]).await["discarded"], left);
    assert_eq!(letters(&relay, "").await.len(), 0);
    relay.stop().await;
}

/// What several requests want to replay or discard at once is replayed or discarded by one of them, and counted once: by
/// them, and by the lane, which would read nothing more with too many.
#[tokio::test]
async fn dead_letters_that_several_take_away_count_once() {
    let rejects = Arc::new(AtomicBool::new(true));
    let is_rejecting = Arc::clone(&rejects);
    let (server, inbox) = receiver(move |request| {
        Reply::Status(match (&*field(&request.body, "/message_status"), is_rejecting.load(Ordering::Relaxed)) {
            ("error", _) => 503,
            (_, true) => 400,
            (_, false) => 200,
        })
    })
    .await;
    let url = server.url("/");
    let relay = Setup::new(&format!(
        "[sinks.http]\ntype = \"http\"\nurl = \"{url}\"\ndelivery = {{ max_parked = 60, schedule = [\"1h\"] }}\n\
         [[routes]]\nto = [\"http\"]\n"
    ))
    .start()
    .await;
    relay.post(event(0, "error")).await.ids();
    let events: Vec<_> = (1..41).map(|number| event(number, "sent")).collect();
    relay.post(format!("[{}]", events.join(","))).await.ids();
    relay.sink_is("http", "has rejected them", |sink| sink["dead_letters"] == 40 && sink["parked"] == 1).await;
    rejects.store(false, Ordering::Relaxed);
    let which = json!({ "sink": "http" });
    let all = ["replay", "replay", "discard", "replay", "replay", "discard", "replay", "replay"];
    let all = all.map(async |action| relay.operate(&format!("/api/v1/dead-letters/{action}"), &which).await);
    let done = futures_util::future::join_all(all).await;
    let taken: u64 = done.iter().map(|done| done["done"].as_u64().expect("a number")).sum();
    assert_eq!(taken, 40, "{done:?}");
    relay.sink_is("http", "has one parked", |sink| sink["parked"] == 1).await;
    let posted = relay.post(event(50, "sent")).await.ids();
    inbox.wait_for_ids("HTTP", posted).await;
    relay.stop().await;
}

/// A letter that goes to several sinks goes to each of them once, whoever else asks for that.
#[tokio::test]
async fn dead_letters_that_go_to_several_sinks_do_so_once() {
    let (server, inbox) = receiver(|_| Reply::Status(200)).await;
    let sink = |name: &str| format!("[sinks.{name}]\ntype = \"http\"\nurl = \"{}\"\n", server.url(&format!("/{name}")));
    let route = "[[routes]]\nto = [\"a\", \"b\", \"c\"]\n";
    let setup = Setup::new(&["a", "b", "c"].map(sink).concat());
    let relay = setup.start().await;
    let events: Vec<_> = (0..600).map(|number| event(number, "sent")).collect();
    relay.post(format!("[{}]", events.join(","))).await.ids();
    relay.status_is("none has a route", |status| status["dead_letters"]["unrouted"] == 600).await;
    let drained = relay.command(&["drain", "--timeout", "20s"]).await;
    let said = "drained: nothing is left to deliver; it keeps 600 dead letters: replay or discard them";
    assert!(drained.code == Some(0) && drained.stdout.starts_with(said), "{drained:?}");
    relay.change_rules(&(["a", "b", "c"].map(sink).concat() + route));
    assert_eq!(relay.command(&["reload"]).await.code, Some(0));
    let all = json!({ "sink": "unrouted" });
    let all = [(); 5].map(|()| relay.operate("/api/v1/dead-letters/replay", &all));
    let done = futures_util::future::join_all(all).await;
    let taken: u64 = done.iter().map(|done| done["done"].as_u64().expect("a number")).sum();
    assert_eq!(taken, 600, "{done:?}");
    let drained = relay.command(&["drain", "--timeout", "20s"]).await;
    assert_eq!((drained.code, &*drained.stdout), (Some(0), "drained: nothing is left to deliver\n"), "{drained:?}");
    relay.stop().await;
    let arrived = inbox.now().all;
    let at = |path: &str| arrived.iter().filter(|arrival| arrival.to == path).count();
    assert_eq!((at("/a"), at("/b"), at("/c")), (600, 600, 600));
}

/// Of several that are named, those that are missing do not keep the others.
#[tokio::test]
async fn dead_letters_are_named_by_number() {
    let relay = Setup::new("").start().await;
    for number in 1..=4 {
        relay.post(event(number, "sent")).await.ids();
    }
    let found = wait_for_letters(&relay, 4).await;
    let [a, b, c, d] = [0, 1, 2, 3].map(|at: usize| found[at]["id"].to_string());
    let done = relay.command(&["dead-letters", "discard", &a, "777", &b]).await;
    assert_eq!((done.code, &*done.stdout), (Some(1), "2 discarded\n"), "{done:?}");
    assert!(done.stderr.starts_with("error: 777 could not be discarded: ") && done.stderr.contains("777"), "{done:?}");
    let done = relay.command(&["dead-letters", "discard", "777", &c, "778", "--json"]).await;
    let said: Value = serde_json::from_str(&done.stdout).expect("JSON");
    assert_eq!((done.code, said), (Some(1), json!({ "discarded": 1, "skipped": 0, "failed": [777, 778] })));
    let error: Value = serde_json::from_str(&done.stderr).expect("JSON");
    assert_eq!(error["error"].as_str().map(|error| error.lines().count()), Some(2), "{error}");
    let done = relay.command(&["dead-letters", "discard", &d, "--sink", "other"]).await;
    assert_eq!((done.code, letters(&relay, "").await.len()), (Some(2), 1), "{done:?}");
    assert_eq!(relay.command_json(&["dead-letters", "discard", &d]).await["discarded"], 1);
    relay.stop().await;
}

/// What senders write is shown, and does nothing to the terminal.
#[tokio::test]
async fn terminals_are_not_controlled_by_events() {
    let relay = Setup::new("").start().await;
    // U+009B begins a sequence like ESC and [ do, and JSON does not escape it.
    let body = event(1, "\\u001b[2J\\n\u{9b}31m");
    relay.post(body.clone()).await.ids();
    let number = wait_for_letters(&relay, 1).await[0]["id"].to_string();
    let explained =
        Setup::new("[sinks.s]\ntype = \"stdout\"\n[[routes]]\nto = [\"s\"]\n").run(&["explain"], &body).await;
    let list = relay.command(&["dead-letters", "list"]).await;
    let show = relay.command(&["dead-letters", "show", &number]).await;
    assert!(list.stdout.contains("\\u{1b}[2J\\n\\u{9b}31m") && list.stdout.lines().count() == 2, "{list:?}");
    for shown in [list, show, explained] {
        let obeyed = |c: char| c.is_control() && c != '\n';
        assert!(shown.code == Some(0) && !shown.stdout.contains(obeyed), "{shown:?}");
        assert!(shown.stdout.contains("\\u{9b}31m"), "{shown:?}");
    }
    relay.stop().await;
}

/// An event may be nested deeper than most parsers go.
#[tokio::test]
async fn deep_events_are_shown() {
    let relay = Setup::new("").start().await;
    let deep = format!("{{\"message_id\":\"m\",\"x\":{}1{}}}", "[".repeat(200), "]".repeat(200));
    relay.post(deep.clone()).await.ids();
    let number = wait_for_letters(&relay, 1).await[0]["id"].to_string();
    for json in [&[][..], &["--json"]] {
        let shown = relay.command(&[&["dead-letters", "show", &number], json].concat()).await;
        assert!(shown.code == Some(0) && shown.stdout.contains(&deep), "{shown:?}");
    }
    relay.stop().await;
}

/// Many dead letters at once, at a rate and without.
#[tokio::test]
async fn dead_letters_are_replayed_in_bulk() {
    const LETTERS: usize = 3000;
    let up = Arc::new(AtomicBool::new(false));
    let is_up = Arc::clone(&up);
    let (server, inbox) = receiver(move |_| Reply::Status(if is_up.load(Ordering::Relaxed) { 200 } else { 400 })).await;
    let setup = Setup::new(&server.routes());
    let relay = setup.start().await;
    for batch in 0..6 {
        let events: Vec<_> = (0..500).map(|number| event(batch * 500 + number, "sent")).collect();
        relay.post(format!("[{}]", events.join(","))).await.ids();
    }
    relay.sink_is("http", "has rejected them", |sink| sink["dead_letters"] == LETTERS).await;
    up.store(true, Ordering::Relaxed);
    let since = std::time::Instant::now();
    let some = ["dead-letters", "replay", "--until", "0s", "--key", "wamid.00000007", "--rate", "5"];
    assert_eq!(relay.command_json(&some).await["replayed"], 1);
    let body = json!({ "sink": "http", "limit": 100, "rate": 100 });
    let answer = relay.operate("/api/v1/dead-letters/replay", &body).await;
    assert_eq!((&answer["done"], &answer["remaining"]), (&json!(100), &json!(LETTERS - 101)));
    assert!(since.elapsed() > Duration::from_millis(800), "100 at 100 a second take a second, less the first few");
    assert_eq!(relay.command_json(&["dead-letters", "replay", "--sink", "http"]).await["replayed"], LETTERS - 101);
    let arrived = inbox.wait_for_events("HTTP", LETTERS).await;
    assert_eq!(arrived.ids.len(), LETTERS);
    relay.sink_is("http", "has none left", |sink| sink["parked"] == 0 && sink["dead_letters"] == 0).await;
    relay.stop().await;
    assert_eq!(inbox.now().all.len(), LETTERS, "each once");
}

#[tokio::test]
async fn retained_events_are_sent_again_by_time_and_rule() {
    let (server, inbox) = receiver(|_| Reply::Status(200)).await;
    let setup = Setup::new(&server.routes());
    let relay = setup.start().await;
    let mut ids = Vec::new();
    for number in 0..10 {
        ids.extend(relay.post(event(number, if number % 2 == 0 { "sent" } else { "read" })).await.ids());
    }
    inbox.wait_for_events("HTTP", 10).await;
    let replay = async |more: &[&str]| relay.command_json(&[&["replay", "--sink", "http"], more].concat()).await;
    assert_eq!(replay(&["--since", "1h", "--when", "status = \"read\""]).await["replayed"], 5);
    inbox.wait("five again", |arrived| arrived.all.len() == 15).await;
    assert_eq!(replay(&["--until", "1h"]).await, json!({ "replayed": 0, "scanned": 10 }));
    assert_eq!(replay(&["--rate", "20"]).await["replayed"], 10);
    let arrived = inbox.wait("all again", |arrived| arrived.all.len() == 25).await;
    assert_eq!(arrived.ids.len(), 10);
    let period = ["--since", "1h", "--until", "2h"];
    for command in [&["replay", "--sink", "http"][..], &["dead-letters", "discard"], &["diff", "routes.toml"]] {
        let empty = relay.command(&[command, &period].concat()).await;
        assert!(empty.code == Some(2) && empty.stderr.contains("--since must be before --until"), "{empty:?}");
    }
    let all = relay.command(&["dead-letters", "discard"]).await;
    assert!(all.code == Some(2) && all.stderr.contains("or --all"), "{all:?}");
    let wrong = relay.command(&["replay", "--sink", "http", "--when", "staus = \"read\""]).await;
    assert!(wrong.code == Some(1) && wrong.stderr.contains("did you mean `status`?"), "{wrong:?}");
    let nowhere = relay.command(&["replay", "--sink", "nowhere"]).await;
    assert!(nowhere.code == Some(1) && nowhere.stderr.contains("no sink is called \"nowhere\""), "{nowhere:?}");
    relay.stop().await;
    assert_eq!(inbox.now().all.len(), 25);
}

#[tokio::test]
async fn a_paused_sink_waits_and_status_says_so() {
    let (server, inbox) = receiver(|_| Reply::Status(200)).await;
    let relay = Setup::new(&server.routes()).start().await;
    let paused = relay.command(&["pause", "http"]).await;
    assert!(paused.stdout.contains("paused"), "{paused:?}");
    let mut ids = Vec::new();
    for number in 0..5 {
        ids.extend(relay.post(event(number, "sent")).await.ids());
    }
    let sink = relay
        .sink_is("http", "has read what it does not deliver", |sink| sink["lag_seconds"].as_f64() > Some(0.2))
        .await;
    assert_eq!((&sink["paused"], &sink["lag_events"], &sink["delivered"]), (&json!(true), &json!(5), &json!(0)));
    let status = relay.command(&["status"]).await;
    let expected = ["http", "paused", "accepting", "LAG"];
    assert!(expected.iter().all(|word| status.stdout.contains(word)), "{}", status.stdout);
    assert_eq!(relay.command_json(&["resume", "http"]).await["paused"], false);
    inbox.wait_for_ids("HTTP", ids).await;
    relay.sink_is("http", "has caught up", |sink| sink["lag_events"] == 0 && sink["delivered"] == 5).await;
    let unknown = relay.command(&["pause", "nowhere"]).await;
    assert!(unknown.code == Some(1) && unknown.stderr.contains("nowhere"), "{unknown:?}");
    relay.stop().await;
}

/// What `status --watch --json` prints, line by line, and its process.
fn watch(setup: &Setup, admin: SocketAddr) -> (Child, Lines<BufReader<ChildStdout>>) {
    let admin = format!("http://{admin}");
    let mut child = setup.command(&["status", "--watch", "--json", "--admin", &admin]).spawn().expect("a process");
    let lines = BufReader::new(child.stdout.take().expect("its output")).lines();
    (child, lines)
}

#[tokio::test]
async fn watching_goes_on_while_the_relay_is_away_and_ends_with_its_reader() {
    let relay = Setup::new("").start().await;
    let admin = relay.admin();
    let setup = relay.kill().await.env("RELAY_ADMIN__LISTEN", admin.to_string());
    let (mut child, mut lines) = watch(&setup, admin);
    let mut saw = async |what: &str| loop {
        let line = within(what, lines.next_line()).await.expect("its output").expect("it goes on");
        if serde_json::from_str::<Value>(&line).expect("JSON").get(what).is_some() {
            return;
        }
    };
    saw("error").await;
    let relay = setup.start().await;
    saw("version").await;
    relay.stop().await;
    saw("error").await;
    drop(lines);
    let ended = within("its end", child.wait()).await.expect("a status");
    assert_eq!(ended.code(), Some(0));
}

#[tokio::test]
async fn status_shows_what_was_refused() {
    let relay = Setup::new("[sinks.s]\ntype = \"stdout\"\n").start().await;
    assert!(!relay.command(&["status"]).await.stdout.contains("refused"));
    relay.change_rules("[sinks.s]\ntype = \"stdout\"\ncolour = \"red\"\n");
    assert_eq!(relay.command(&["reload"]).await.code, Some(64));
    // What commands need not know may be wrong too.
    relay.change_settings("[ingress]\nmax_body = \"${NONE}\"\n");
    let status = relay.command(&["status"]).await.stdout;
    assert!(status.contains("\nreload refused at 2") && status.contains("\n  routes.toml:3:1: "), "{status}");
    relay.stop().await;
}

#[tokio::test]
async fn commands_say_when_no_relay_answers() {
    let setup = Setup::new(&Receiver::accepting().await.routes());
    for command in [&["status"][..], &["dead-letters", "list"], &["replay", "--sink", "x"], &["pause", "x"]] {
        let done = setup.run(&[command, &["--admin", "http://127.0.0.1:1"]].concat(), "").await;
        assert!(done.code == Some(1) && done.stderr.contains("is it running?"), "{done:?}");
    }
    // Something else that speaks HTTP.
    let other = Receiver::accepting().await;
    let done = setup.run(&["status", "--admin", &other.url("")], "").await;
    assert!(done.code == Some(1) && done.stderr.contains("is not a relay's admin side"), "{done:?}");
}

fn with_token(path: &str, token: Option<&str>) -> Request<Full<Bytes>> {
    let request = Request::get(path).header("host", "localhost");
    let request = token.into_iter().fold(request, |request, token| request.header("authorization", token));
    request.body(Full::default()).expect("a request")
}

fn is_problem(answer: &Answer, status: u16) {
    assert_eq!((answer.status, answer.header("content-type")), (status, "application/problem+json"), "{answer:?}");
    let problem: Value = serde_json::from_slice(&answer.body).expect("JSON");
    assert_eq!(problem["status"], status);
    assert!(problem["detail"].as_str().is_some_and(|detail| detail.len() > 10), "{problem}");
}

#[tokio::test]
async fn the_token_guards_the_api_and_not_the_probes() {
    let setup = Setup::new(&Receiver::accepting().await.routes()).env("RELAY_ADMIN__TOKEN", "a-token-for-operators");
    let relay = setup.start().await;
    for path in ["/api/v1/status", "/api/v1/openapi.json", "/api/v1/dead-letters"] {
        for token in [None, Some("Bearer wrong"), Some("a-token-for-operators")] {
            let answer = relay.ask(with_token(path, token)).await;
            is_problem(&answer, 401);
            assert_eq!(answer.header("www-authenticate"), "Bearer");
        }
        assert_eq!(relay.ask(with_token(path, Some("Bearer a-token-for-operators"))).await.status, 200, "{path}");
    }
    for path in ["/healthz", "/readyz"] {
        assert_eq!(relay.ask(with_token(path, None)).await.status, 200);
    }
    is_problem(&relay.ask(with_token("/nothing", None)).await, 404);
    // Commands find the token in the settings, or take it.
    assert_eq!(relay.command(&["status"]).await.code, Some(0));
    let admin = format!("http://{}", relay.admin());
    let other = setup.clone().without("RELAY_ADMIN__TOKEN");
    let arguments = ["status", "--admin", &admin];
    let refused = other.run(&arguments, "").await;
    assert!(refused.code == Some(1) && refused.stderr.contains("admin.token"), "{refused:?}");
    let taken = other.run(&[&arguments[..], &["--admin-token", "a-token-for-operators"]].concat(), "").await;
    assert_eq!(taken.code, Some(0), "{taken:?}");
    relay.stop().await;
}

#[tokio::test]
async fn requests_that_can_not_be_served_say_why() {
    let relay = Setup::new(&Receiver::accepting().await.routes()).start().await;
    let post = async |path: &str, body: &str| {
        let request = Request::post(path).header("host", "localhost").header("content-type", "application/json");
        relay.ask(request.body(Full::new(body.to_owned().into())).expect("a request")).await
    };
    for query in ["limit=0", "limit=10001", "limit=x", "since=yesterday", "snik=http"] {
        is_problem(&relay.ask(with_token(&format!("/api/v1/dead-letters?{query}"), None)).await, 400);
    }
    for limit in ["1", "10000"] {
        assert_eq!(relay.ask(with_token(&format!("/api/v1/dead-letters?limit={limit}"), None)).await.status, 200);
    }
    for body in
        ["", "[]", "[null]", "{\"limit\":0}", "{\"rate\":0}", "{\"rate\":1000001}", "{\"snik\":1}", "{\"limit\":1.5}"]
    {
        is_problem(&post("/api/v1/dead-letters/replay", body).await, 400);
    }
    is_problem(&post("/api/v1/dead-letters/replay", "{\"to\":\"nowhere\"}").await, 404);
    is_problem(&post("/api/v1/dead-letters/1/replay", "{}").await, 404);
    is_problem(&post("/api/v1/sinks/nowhere/pause", "").await, 404);
    is_problem(&post("/api/v1/explain", "[]").await, 400);
    for body in ["{\"sink\":\"http\",\"from\":-1}", "{\"sink\":\"http\",\"up_to\":-1}"] {
        is_problem(&post("/api/v1/replay", body).await, 400);
    }
    is_problem(&post("/api/v1/drain?up_to=-1", "").await, 400);
    is_problem(&post("/api/v1/status", "").await, 405);
    let explained = post("/api/v1/explain", &event(1, "sent")).await.json();
    assert_eq!(explained[0]["sinks"][0]["sink"], "http");
    relay.stop().await;
}

/// What the ingress takes can be explained, and nothing longer.
#[tokio::test]
async fn bodies_are_explained_up_to_the_limit_of_the_ingress() {
    let setup = Setup::new(&Receiver::accepting().await.routes()).env("RELAY_INGRESS__MAX_BODY", "3MiB");
    let relay = setup.start().await;
    let explain = async |len: usize| {
        let body = format!("{{\"x\":\"{}\"}}", "x".repeat(len - 8));
        let request = Request::post("/api/v1/explain").header("host", "localhost");
        relay.ask(request.body(Full::new(body.into())).expect("a request")).await
    };
    assert_eq!(explain(3 << 20).await.status, 200);
    is_problem(&explain((3 << 20) + 1).await, 413);
    relay.stop().await;
}

/// From SIGTERM on the relay is not ready, and still accepts until the delay is over.
#[tokio::test]
async fn readiness_ends_before_accepting_does() {
    let setup = Setup::new(&Receiver::accepting().await.routes()).env("RELAY_SHUTDOWN__DELAY", "1s");
    let mut relay = setup.start().await;
    assert_eq!(relay.get("/readyz").await["status"], "ready");
    relay.signal(Signal::TERM);
    eventually("the relay to notice", async || !relay.logged("asked to stop; accepting a little longer").is_empty())
        .await;
    is_problem(&relay.ask(with_token("/readyz", None)).await, 503);
    assert_eq!(relay.ask(with_token("/healthz", None)).await.status, 200);
    assert_eq!(relay.post(event(1, "sent")).await.status, 200);
    assert_eq!(relay.ended().await.code(), Some(0));
}

/// `[ingress] dedup`: an event that is sent again is answered alike, and delivered once; also after a restart.
#[tokio::test]
async fn resent_events_are_stored_once() {
    let (server, inbox) = receiver(|_| Reply::Status(200)).await;
    let setup = Setup::new(&server.routes()).env("RELAY_INGRESS__DEDUP", "10m");
    let relay = setup.start().await;
    let first = relay.post(event(1, "sent")).await.ids();
    assert_eq!(relay.post(event(1, "sent")).await.ids(), first);
    let three = format!("[{},{},{}]", event(1, "sent"), event(2, "sent"), event(2, "sent"));
    let ids = relay.post(three).await.ids();
    assert_eq!((ids.len(), &ids[0], &ids[1]), (3, &first[0], &ids[2]));
    assert_ne!(relay.post(event(1, "read")).await.ids(), first, "another status is another event");
    let many: Vec<_> = (0..16).map(|_| relay.post(event(9, "sent"))).collect();
    let answers = futures_util::future::join_all(many).await;
    assert!(answers.iter().all(|answer| answer.ids() == answers[0].ids()));
    assert_eq!(relay.get("/api/v1/status").await["ingress"]["resent"], 18);
    let relay = relay.kill().await.start().await;
    assert_eq!(relay.post(event(2, "sent")).await.ids(), [ids[1].clone()]);
    assert_eq!(relay.get("/api/v1/status").await["journal"]["end"], 4);
    inbox.wait_for_events("HTTP", 4).await;
    relay.stop().await;
    let mut messages: Vec<_> = inbox.now().all.iter().map(|arrival| field(&arrival.body, "/message_id")).collect();
    messages.sort();
    messages.dedup();
    assert_eq!(messages.len(), 3);
}
