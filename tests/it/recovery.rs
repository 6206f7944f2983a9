//! What a lane does when its sink fails: parks, waits, tries again, gives up; and that nobody else feels it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::brokers::{Inbox, field, receiver};
use crate::harness::{Received, Receiver, Relay, Reply, Setup, event, eventually};
use crate::load::{Load, latencies};

fn sink(name: &str, server: &Receiver, delivery: &str) -> String {
    let url = server.url("/");
    format!("[sinks.{name}]\ntype = \"http\"\nurl = \"{url}\"\ntimeout = \"2s\"\ndelivery = {{ {delivery} }}\n")
}

fn all_to(sinks: &[&str]) -> String {
    format!("[[routes]]\nname = \"all\"\nto = {sinks:?}\n")
}

/// A server that answers 503 as long as the switch is off.
async fn switched() -> (Receiver, Inbox, Arc<AtomicBool>) {
    let up = Arc::new(AtomicBool::new(false));
    let is_up = Arc::clone(&up);
    let (server, inbox) = receiver(move |_| Reply::Status(if is_up.load(Ordering::Relaxed) { 200 } else { 503 })).await;
    (server, inbox, up)
}

async fn post(relay: &Relay, events: &[(u32, &str)]) -> Vec<String> {
    let mut ids = Vec::new();
    for (number, status) in events {
        ids.extend(relay.post(event(*number, status)).await.ids());
    }
    ids
}

/// One event in three gets a 500, at random, for a minute, with a crash in the middle.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_in_three_fails_and_everything_arrives_in_order() {
    const FAILING: Duration = Duration::from_secs(30);
    const WELL: Duration = Duration::from_secs(5);
    let failing = Arc::new(AtomicBool::new(true));
    let fails = Arc::clone(&failing);
    let (bad, bad_inbox) = receiver(move |_| {
        Reply::Status(if fails.load(Ordering::Relaxed) && rand::random_ratio(1, 3) { 500 } else { 200 })
    })
    .await;
    let (good, good_inbox) = receiver(|_| Reply::Status(200)).await;
    let hasty = "backoff = { initial = \"100ms\", max = \"1s\" }";
    let setup = Setup::new(&(sink("bad", &bad, hasty) + &sink("good", &good, "") + &all_to(&["bad", "good"])));
    // Less than the processors can do: else the good sink waits for those.
    let load = Load::new(8, Duration::from_millis(25));
    let phase = async |relay: &Relay, what: &str, time: Duration| {
        load.to(Some(relay.address()));
        let since = Instant::now();
        let mut events = load.more(300).await;
        while since.elapsed() < time {
            events.extend(load.more(10).await);
        }
        latencies(&format!("the good sink, {what}"), &events, &good_inbox).await
    };
    let relay = setup.start().await;
    phase(&relay, "while the other fails", FAILING).await;
    load.to(None);
    assert!(relay.sink("bad").await["parked"].as_u64() > Some(0));
    relay.kill().await;
    let relay = setup.start().await;
    let during = phase(&relay, "after a crash, while the other fails", FAILING).await;
    failing.store(false, Ordering::Relaxed);
    let after = phase(&relay, "when the other is well", WELL).await;
    let posted = load.stop().await;
    let arrived = bad_inbox.wait_for_ids("the bad sink", posted.ids()).await;
    good_inbox.wait_for_ids("the good sink", posted.ids()).await;
    relay.stop().await;
    posted.check("the bad sink", &arrived);
    posted.check("the good sink", &good_inbox.now());
    eprintln!("{} events, {} repeated after the crash", arrived.ids.len(), arrived.repeated());
    let delayed =
        during.0 > after.0 * 5 + Duration::from_millis(50) || during.1 > after.1 * 5 + Duration::from_millis(500);
    assert!(!delayed, "the good sink is delayed: {during:?}; when the other is well: {after:?}");
}

/// What is parked, and what waits behind it, goes on after a stop and after a crash: in order, and once.
#[tokio::test]
async fn parked_deliveries_survive_restarts_in_order() {
    let (server, inbox, up) = switched().await;
    let patient = "schedule = [\"700ms\"], breaker = { failures = 1000, probe = \"1s\" }, concurrency = 4";
    let setup = Setup::new(&(sink("http", &server, patient) + &all_to(&["http"])));
    let relay = setup.start().await;
    let mut posted = post(&relay, &[(1, "sent"), (2, "sent"), (1, "delivered")]).await;
    relay
        .sink_is("http", "has parked them", |sink| sink["parked"] == 3 && sink["attempts_failed"].as_u64() > Some(2))
        .await;
    let log = relay.stop().await;
    let stopped = log.iter().find(|line| line["message"] == "sink stopped").expect("it says so");
    assert_eq!((&stopped["parked"], &stopped["lag_events"]), (&json!(3), &json!(0)));
    let relay = setup.start().await;
    posted.extend(post(&relay, &[(1, "read"), (3, "sent")]).await);
    relay.sink_is("http", "has parked the new ones too", |sink| sink["parked"] == 5).await;
    let setup = relay.kill().await;
    let relay = setup.start().await;
    assert_eq!(relay.sink("http").await["parked"], 5);
    up.store(true, Ordering::Relaxed);
    let arrived = inbox.wait_for_ids("HTTP", posted.clone()).await;
    relay.sink_is("http", "has none parked", |sink| sink["parked"] == 0).await;
    relay.stop().await;
    assert_eq!((arrived.all.len(), inbox.now().all.len()), (5, 5), "each once");
    let orders = arrived.orders();
    assert_eq!(orders["wamid.00000001"], [&*posted[0], &posted[2], &posted[3]]);
    let relay = setup.start().await;
    relay.stop().await;
    assert_eq!(inbox.now().all.len(), 5, "none again after a clean stop");
}

/// The times of attempts: a schedule, `Retry-After`, a rate.
#[tokio::test]
async fn attempts_are_made_when_they_should_be() {
    let attempts: Arc<Mutex<HashMap<String, Vec<Instant>>>> = Arc::default();
    let seen = Arc::clone(&attempts);
    let (server, inbox) = receiver(move |request: &Received| {
        let message = field(&request.body, "/message_id");
        let mut seen = seen.lock().expect("nobody panics");
        let made = seen.entry(format!("{} {message}", request.uri.path())).or_default();
        made.push(request.at);
        match (request.uri.path(), &*message, made.len()) {
            ("/rate", ..) | (_, _, 3..) => Reply::Status(200),
            (_, "wamid.00000001", _) => Reply::Status(503),
            (_, "wamid.00000002", 1) => Reply::Later("1"),
            (_, "wamid.00000003", 1) => Reply::Later("2"),
            _ => Reply::Status(200),
        }
    })
    .await;
    let rules = format!(
        "[sinks.schedule]\ntype = 'http'\nurl = '{}'\ndelivery = {{ schedule = ['300ms', '1500ms'], breaker = {{ failures = 1000, probe = '1s' }} }}\n\
         [sinks.rate]\ntype = 'http'\nurl = '{}'\ndelivery = {{ rate = '20/s' }}\n\
         [[routes]]\nto = ['schedule']\nwhen = {{ status = 'sent' }}\n[[routes]]\nto = ['rate']\nwhen = {{ status = 'read' }}\n",
        server.url("/schedule"),
        server.url("/rate"),
    );
    let relay = Setup::new(&rules).start().await;
    let mut posted = post(&relay, &[(1, "sent"), (2, "sent"), (3, "sent")]).await;
    let since = Instant::now();
    for number in 100..150 {
        posted.extend(post(&relay, &[(number, "read")]).await);
    }
    inbox.wait_for_ids("HTTP", posted).await;
    let took = since.elapsed();
    relay.stop().await;
    let attempts = attempts.lock().expect("nobody panics");
    let waits = |message: &str| -> Vec<u128> {
        let made = &attempts[&format!("/schedule wamid.0000000{message}")];
        made.windows(2).map(|pair| pair[1].duration_since(pair[0]).as_millis()).collect()
    };
    let about =
        |waited: u128, wait: u128| assert!((wait..wait + 900).contains(&waited), "{waited} ms instead of {wait}");
    let first = waits("1");
    about(first[0], 300);
    about(first[1], 1500);
    about(waits("2")[0], 1000);
    about(waits("3")[0], 2000);
    // 50 at 20 a second, of which two may be made up for at once.
    assert!((2300..4500).contains(&took.as_millis()), "50 events at 20 a second took {took:?}");
}

/// A sink that is away while events come in: only probed, nothing read on, and all of it delivered when it is back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sink_that_is_away_costs_a_cursor() {
    const EVENTS: usize = 20_000;
    let (server, inbox, up) = switched().await;
    let (good, good_inbox) = receiver(|_| Reply::Status(200)).await;
    let delivery = "breaker = { failures = 5, probe = \"300ms\" }, backoff = { initial = \"1s\", max = \"1h\" }";
    let rules = sink("bad", &server, delivery) + &sink("good", &good, "") + &all_to(&["bad", "good"]);
    let relay = Setup::new(&rules).start().await;
    let batch: Vec<String> = (0..500).map(|number| event(number, "sent")).collect();
    for round in 0..EVENTS / batch.len() {
        let events: Vec<_> = batch.iter().map(|body| body.replace("\"1687548944\"", &format!("\"{round}\""))).collect();
        relay.post(format!("[{}]", events.join(","))).await.ids();
    }
    let bad = relay.sink_is("bad", "is known to be away", |sink| sink["breaker"] == "open").await;
    good_inbox.wait_for_events("the good sink", EVENTS).await;
    // What was under way when it opened, and what it was probed with.
    assert!(bad["parked"].as_u64() < Some(1000), "{bad}");
    assert!(bad["lag_events"].as_u64() > Some(EVENTS as u64 - 5000), "{bad}");
    up.store(true, Ordering::Relaxed);
    let arrived = inbox.wait_for_events("the sink that is back", EVENTS).await;
    relay.sink_is("bad", "has caught up", |sink| sink["lag_events"] == 0 && sink["parked"] == 0).await;
    assert_eq!(arrived.ids.len(), EVENTS);
    // One message's events differ by their time only; they came in this order.
    let mut last = HashMap::new();
    for arrival in &arrived.all {
        let at: u64 = arrival.field("/event_timestamp").parse().expect("a number");
        let before = last.insert(arrival.field("/message_id"), at);
        assert!(before.is_none_or(|before| before < at), "{before:?} before {at}");
    }
    relay.stop().await;
}

/// Deliveries that all end as dead letters while the sink is away leave a lane that still finds out when it is back.
#[tokio::test]
async fn a_lane_goes_on_after_all_that_it_probed_with_is_dead() {
    let (server, inbox, up) = switched().await;
    let delivery =
        "max_attempts = 2, schedule = [\"10ms\"], concurrency = 200, breaker = { failures = 3, probe = \"10ms\" }";
    let setup = Setup::new(&(sink("http", &server, delivery) + &all_to(&["http"])));
    let relay = setup.start().await;
    let events: Vec<_> = (0..150).map(|number| event(number, "sent")).collect();
    relay.post(format!("[{}]", events.join(","))).await.ids();
    relay.sink_is("http", "has given up on all", |sink| sink["dead_letters"] == 150).await;
    up.store(true, Ordering::Relaxed);
    let posted = post(&relay, &[(1000, "sent")]).await;
    inbox.wait_for_ids("HTTP", posted).await;
    relay.stop().await;
}

/// What probes with before it is due comes no closer to its end by that.
#[tokio::test]
async fn probes_do_not_use_attempts_up() {
    const EVENTS: u64 = 4;
    let (server, inbox, up) = switched().await;
    let delivery = "max_attempts = 3, schedule = [\"60s\"], breaker = { failures = 3, probe = \"50ms\" }";
    let relay = Setup::new(&(sink("http", &server, delivery) + &all_to(&["http"]))).start().await;
    let events: Vec<_> = (0..EVENTS).map(|number| event(u32::try_from(number).expect("few"), "sent")).collect();
    let posted = relay.post(format!("[{}]", events.join(","))).await.ids();
    let failed = relay.sink_is("http", "was probed often", |sink| sink["attempts_failed"].as_u64() > Some(20)).await;
    assert_eq!((&failed["parked"], &failed["dead_letters"]), (&EVENTS.into(), &0.into()), "{failed}");
    up.store(true, Ordering::Relaxed);
    let arrived = inbox.wait_for_ids("HTTP", posted).await;
    assert!(arrived.all.iter().all(|arrival| arrival.header("relay-attempt") == "2"), "each failed once: {arrived:?}");
    relay.stop().await;
}

/// At `max_parked` the lane begins nothing else, and goes on when there is room again.
#[tokio::test]
async fn max_parked_bounds_what_is_parked() {
    let (server, inbox, up) = switched().await;
    let delivery =
        "max_parked = 10, concurrency = 4, schedule = [\"300ms\"], breaker = { failures = 1000, probe = \"1s\" }";
    let setup = Setup::new(&(sink("http", &server, delivery) + &all_to(&["http"])));
    let relay = setup.start().await;
    // Each of its own key, all of one key, and more than is read at once.
    let events = (0..20).map(|number| event(number, "sent")).chain((0..500).map(|_| event(7, "sent")));
    let events: Vec<_> = events.collect();
    let posted = relay.post(format!("[{}]", events.join(","))).await.ids();
    relay.sink_is("http", "has tried often", |sink| sink["attempts_failed"].as_u64() > Some(50)).await;
    let full = relay.sink_is("http", "is at the bound", |sink| sink["parked"] == 10).await;
    assert!(full["lag_events"] == 510 && full["lag_seconds"].as_f64() > Some(0.2), "{full}");
    relay.stop().await;
    let relay = setup.start().await;
    relay.sink_is("http", "goes on where it was", |sink| sink["lag_events"] == 510 && sink["parked"] == 10).await;
    up.store(true, Ordering::Relaxed);
    let arrived = inbox.wait_for_ids("HTTP", posted).await;
    assert_eq!(arrived.ids.len(), 20);
    relay.sink_is("http", "has delivered all", |sink| sink["lag_events"] == 0 && sink["parked"] == 0).await;
    assert_eq!(inbox.now().all.len(), 520, "none twice");
    relay.stop().await;
}

/// 410: the receiver wants no more. The event is kept, and the sink is only probed.
#[tokio::test]
async fn a_sink_that_is_gone_is_left_alone() {
    let gone = Arc::new(AtomicBool::new(true));
    let is_gone = Arc::clone(&gone);
    let (server, inbox) =
        receiver(move |_| Reply::Status(if is_gone.load(Ordering::Relaxed) { 410 } else { 200 })).await;
    let setup =
        Setup::new(&(sink("http", &server, "breaker = { failures = 100, probe = \"300ms\" }") + &all_to(&["http"])));
    let relay = setup.start().await;
    let posted = post(&relay, &[(1, "sent"), (2, "sent"), (3, "sent")]).await;
    relay.sink_is("http", "is left alone", |sink| sink["breaker"] == "open" && sink["parked"].as_u64() > Some(0)).await;
    let errors = relay.logged("the sink wants no more events; it is only probed until it does");
    assert!(errors.iter().all(|line| line["level"] == "ERROR") && !errors.is_empty());
    gone.store(false, Ordering::Relaxed);
    inbox.wait_for_ids("HTTP", posted).await;
    relay.stop().await;
}

/// What became too old while its sink was paused, or the relay away, is a dead letter without another attempt, also while
/// the sink is only probed. What waits behind it has its first.
#[tokio::test]
async fn what_is_too_old_when_its_turn_comes_is_not_tried_again() {
    const MAX_AGE: Duration = Duration::from_secs(3);
    for failures in [1, 1000] {
        let (server, inbox, up) = switched().await;
        let delivery = format!(
            "max_age = \"{MAX_AGE:?}\", schedule = [\"1s\"], breaker = {{ failures = {failures}, probe = \"100ms\" }}"
        );
        let setup = Setup::new(&(sink("http", &server, &delivery) + &all_to(&["http"])));
        let relay = setup.start().await;
        let has_parked = async |relay: &Relay, count: u64| {
            relay.sink_is("http", "has parked them", |sink| sink["parked"] == count).await;
        };
        let grows_old = async || {
            let since = Instant::now();
            eventually("it to be too old", async || since.elapsed() > MAX_AGE).await;
        };
        let posted = post(&relay, &[(1, "sent"), (1, "read")]).await;
        has_parked(&relay, 2).await;
        relay.operate("/api/v1/sinks/http/pause", &json!({})).await;
        relay.sink_is("http", "begins nothing", |sink| sink["in_flight"] == 0).await;
        up.store(true, Ordering::Relaxed);
        grows_old().await;
        relay.operate("/api/v1/sinks/http/resume", &json!({})).await;
        let arrived = inbox.wait_for_ids("HTTP", [posted[1].clone()]).await;
        assert_eq!((arrived.all.len(), arrived.all[0].header("relay-attempt")), (1, "1"));

        up.store(false, Ordering::Relaxed);
        post(&relay, &[(2, "sent")]).await;
        has_parked(&relay, 1).await;
        relay.stop().await;
        up.store(true, Ordering::Relaxed);
        grows_old().await;
        let relay = setup.start().await;
        relay.sink_is("http", "has given up", |sink| sink["dead_letters"] == 2 && sink["parked"] == 0).await;
        let letters = relay.get("/api/v1/dead-letters").await["dead_letters"].take();
        for letter in letters.as_array().expect("a list") {
            assert_eq!((&letter["reason"], &letter["error_kind"]), (&json!("expired"), &json!("http_503")), "{letter}");
            assert_eq!((&letter["attempts"], &letter["status"]), (&json!(1), &json!("sent")), "{letter}");
        }
        relay.stop().await;
        assert_eq!(inbox.now().all.len(), 1, "none of them was tried again");
    }
}

/// Who asks to wait longer than the sink is away for is waited for: also by probes while there are others, and after a
/// restart.
#[tokio::test]
async fn a_destination_that_asks_to_wait_is_waited_for_when_the_sink_is_back() {
    const ASKED: Duration = Duration::from_secs(6);
    let up = Arc::new(AtomicBool::new(false));
    let (is_up, asks) = (Arc::clone(&up), AtomicBool::new(true));
    let (server, inbox) = receiver(move |request: &Received| {
        match (&*field(&request.body, "/message_status"), is_up.load(Ordering::Relaxed)) {
            ("error", _) if asks.swap(false, Ordering::Relaxed) => Reply::Later("6"),
            (_, up) => Reply::Status(if up { 200 } else { 503 }),
        }
    })
    .await;
    let delivery = "concurrency = 1, schedule = [\"1s\"], breaker = { failures = 3, probe = \"100ms\" }";
    let setup = Setup::new(&(sink("http", &server, delivery) + &all_to(&["http"])));
    let relay = setup.start().await;
    let asked_at = Instant::now();
    let asked = post(&relay, &[(1, "error")]).await;
    let others = post(&relay, &[(2, "sent"), (3, "sent")]).await;
    // Each was probed with more than once.
    relay.sink_is("http", "was probed often", |sink| sink["attempts_failed"].as_u64() > Some(12)).await;
    up.store(true, Ordering::Relaxed);
    inbox.wait_for_ids("HTTP", others).await;
    let setup = relay.kill().await;
    let relay = setup.start().await;
    let arrived = inbox.wait_for_ids("HTTP", asked.clone()).await;
    let waited = arrived.all.iter().find(|arrival| arrival.id() == asked[0]).expect("it arrived").at - asked_at;
    assert!((ASKED..ASKED * 3).contains(&waited), "{waited:?}");
    relay.stop().await;
}

/// What is parked holds back what comes later by the new `order_by` too, and what was parked apart goes in the order in which
/// it came.
#[tokio::test]
async fn what_is_parked_follows_a_changed_order() {
    let up = Arc::new(AtomicBool::new(false));
    let is_up = Arc::clone(&up);
    let (server, inbox) = receiver(move |request: &Received| {
        let is_read = field(&request.body, "/message_status") == "read";
        Reply::Status(if is_read || is_up.load(Ordering::Relaxed) { 200 } else { 503 })
    })
    .await;
    let rules = |order_by: &str| {
        let delivery = format!(
            "order_by = \"{order_by}\", schedule = [\"500ms\"], breaker = {{ failures = 1000, probe = \"1s\" }}"
        );
        sink("http", &server, &delivery) + &all_to(&["http"])
    };
    let setup = Setup::new(&rules("message_id"));
    let relay = setup.start().await;
    let parked = async |relay: &Relay, count: u64| {
        relay.sink_is("http", "has parked them", |sink| sink["parked"] == count && sink["lag_events"] == 0).await;
    };
    let mut posted = post(&relay, &[(1, "sent"), (2, "sent")]).await;
    parked(&relay, 2).await;
    relay.change_rules(&rules("sender_id"));
    relay.operate("/api/v1/reload", &json!({})).await;
    posted.extend(post(&relay, &[(3, "read")]).await);
    parked(&relay, 3).await;
    let setup = relay.kill().await;
    setup.file("routes.toml", &rules("recipient_id"));
    let relay = setup.start().await;
    posted.extend(post(&relay, &[(2, "read")]).await);
    inbox.wait_for_ids("HTTP", [posted[2].clone()]).await;
    parked(&relay, 3).await;
    setup.file("routes.toml", &rules("sender_id"));
    relay.operate("/api/v1/reload", &json!({})).await;
    up.store(true, Ordering::Relaxed);
    inbox.wait_for_ids("HTTP", posted.clone()).await;
    relay.stop().await;
    let arrived: Vec<_> = inbox.now().all.iter().map(|arrival| arrival.id().to_owned()).collect();
    assert_eq!(arrived, [2, 0, 1, 3].map(|index: usize| posted[index].clone()));
}

/// The system's clock jumps back a day, and forward again: nothing is stuck, and nothing comes in a storm.
#[tokio::test]
async fn a_clock_that_jumps_does_no_harm() {
    let (server, inbox, up) = switched().await;
    let delivery = "schedule = [\"2s\"], max_age = \"100h\", breaker = { failures = 1000, probe = \"1s\" }";
    let setup = Setup::new(&(sink("http", &server, delivery) + &all_to(&["http"])));
    let clock = setup.file("clock", "+0");
    let setup = setup
        .env("LD_PRELOAD", faketime())
        .env("FAKETIME_TIMESTAMP_FILE", clock.to_str().expect("UTF-8"))
        .env("FAKETIME_NO_CACHE", "1")
        .env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
    let relay = setup.start().await;
    let posted = post(&relay, &[(1, "sent"), (2, "sent"), (1, "read")]).await;
    relay.sink_is("http", "has parked them", |sink| sink["parked"] == 3).await;
    for jump in ["-1d", "+1d", "-1d"] {
        setup.file("clock", jump);
        let before = relay.sink("http").await["attempts_failed"].as_u64().expect("a number");
        let since = Instant::now();
        relay.sink_is("http", "is tried again", |sink| sink["attempts_failed"].as_u64() > Some(before + 3)).await;
        let took = since.elapsed();
        // Two heads, tried every two seconds; the first after a jump may come at once.
        assert!((Duration::from_secs(1)..Duration::from_secs(15)).contains(&took), "{jump}: 4 attempts took {took:?}");
    }
    up.store(true, Ordering::Relaxed);
    let arrived = inbox.wait_for_ids("HTTP", posted).await;
    assert_eq!(arrived.all.len(), 3);
    let status = relay.get("/api/v1/status").await;
    assert!(status["uptime_seconds"].as_f64() >= Some(0.0), "{status}");
    relay.stop().await;
}

/// The library that makes a process see another time.
fn faketime() -> String {
    let folders = std::fs::read_dir("/usr/lib").expect("a folder").flatten().map(|entry| entry.path().join("faketime"));
    let mut found = folders.map(|folder| folder.join("libfaketimeMT.so.1")).filter(|library| library.exists());
    found.next().expect("this test needs the package libfaketime; scripts/test installs it").display().to_string()
}

/// Sinks that were removed from the rules.
#[tokio::test]
async fn a_removed_sink_leaves_dead_letters() {
    let (server, _, _) = switched().await;
    let (good, inbox) = receiver(|_| Reply::Status(200)).await;
    let setup = Setup::new(&(sink("old", &server, "") + &all_to(&["old"])));
    let relay = setup.start().await;
    let posted = post(&relay, &[(1, "sent"), (1, "read")]).await;
    relay.sink_is("old", "has parked them", |sink| sink["parked"] == 2).await;
    relay.stop().await;
    setup.file("routes.toml", &(sink("new", &good, "") + &all_to(&["new"])));
    let relay = setup.start().await;
    let warned = relay.logged("a sink is no longer in the rules: its parked deliveries are dead letters, and the events that it has not read stay unread");
    assert_eq!((&warned[0]["sink"], &warned[0]["dead_letters"]), (&json!("old"), &json!(2)));
    let letters = relay.command_json(&["dead-letters", "list", "--reason", "sink_removed"]).await;
    assert_eq!(letters["dead_letters"].as_array().map(Vec::len), Some(2), "{letters}");
    let done = relay.command(&["dead-letters", "replay", "--sink", "old"]).await;
    assert!(done.stdout.contains("0 replayed; 2 not"), "{done:?}");
    let replayed = relay.command_json(&["dead-letters", "replay", "--sink", "old", "--to", "new"]).await;
    assert_eq!(replayed["replayed"], 2);
    let arrived = inbox.wait_for_ids("the new sink", posted.clone()).await;
    assert_eq!(arrived.orders()["wamid.00000001"], posted, "in order");
    eventually("nothing else to come", async || inbox.now().all.len() == 2).await;
    relay.stop().await;
}
