//! Lanes from outside: where they go on, what they try again, and that none feels another.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::brokers::{Arrived, Inbox, field, receiver};
use crate::harness::{Received, Receiver, Relay, Reply, Setup, event};
use crate::load::{Load, latencies};

/// A table of an HTTP sink.
fn sink(name: &str, server: &Receiver, more: &str) -> String {
    format!("[sinks.{name}]\ntype = \"http\"\nurl = \"{}\"\n{more}\n", server.url("/"))
}

/// A route that sends everything to these.
fn all_to(sinks: &[&str]) -> String {
    format!("[[routes]]\nname = \"all\"\nto = {sinks:?}\n")
}

async fn post(relay: &Relay, numbers: std::ops::Range<u32>) -> Vec<String> {
    let mut ids = Vec::new();
    for number in numbers {
        ids.extend(relay.post(event(number, "sent")).await.ids());
    }
    ids
}

/// The ids that have arrived, in order.
fn ids(arrived: &Arrived) -> Vec<String> {
    arrived.all.iter().map(|arrival| arrival.id().to_owned()).collect()
}

async fn accepting() -> (Receiver, Inbox) {
    receiver(|_| Reply::Status(200)).await
}

#[tokio::test]
async fn a_restart_goes_on_and_a_new_sink_starts_where_it_should() {
    let ((first, first_inbox), (end, end_inbox), (earliest, earliest_inbox)) =
        (accepting().await, accepting().await, accepting().await);
    let serial = "delivery = { concurrency = 1 }";
    let setup = Setup::new(&(sink("first", &first, serial) + &all_to(&["first"])));
    let relay = setup.start().await;
    let mut posted = post(&relay, 0..20).await;
    first_inbox.wait_for_ids("the first sink", posted.clone()).await;
    relay.stop().await;

    let relay = setup.start().await;
    posted.extend(post(&relay, 20..25).await);
    first_inbox.wait_for_ids("the first sink", posted.clone()).await;
    relay.stop().await;
    assert_eq!(ids(&first_inbox.now()), posted, "a restart delivers what is new, and nothing else");

    let rules = sink("first", &first, serial)
        + &sink("end", &end, serial)
        + &sink("earliest", &earliest, &format!("start = \"earliest\"\n{serial}"))
        + &all_to(&["first", "end", "earliest"]);
    setup.file("routes.toml", &rules);
    let relay = setup.start().await;
    let new = post(&relay, 25..30).await;
    posted.extend(new.clone());
    for inbox in [&first_inbox, &end_inbox, &earliest_inbox] {
        inbox.wait_for_ids("each sink", new.clone()).await;
    }
    relay.stop().await;
    assert_eq!(ids(&first_inbox.now()), posted);
    assert_eq!(ids(&end_inbox.now()), new, "a new sink starts at the end");
    assert_eq!(ids(&earliest_inbox.now()), posted, "start = \"earliest\" starts at the oldest event");

    // It started at the end once; from then on it goes on where it was, also from what came while nobody was there.
    let relay = setup.start().await;
    let last = post(&relay, 30..31).await;
    end_inbox.wait_for_ids("the new sink", last.clone()).await;
    relay.stop().await;
    assert_eq!(ids(&end_inbox.now()), [new, last].concat());
}

/// Every fifth message's first event fails three times; what comes after it for the same message waits, the rest does not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failed_deliveries_are_tried_again_and_hold_up_only_their_own_message() {
    const FAILURES: usize = 3;
    let attempts: Mutex<HashMap<String, usize>> = Mutex::default();
    let fails = |message: &str| message.ends_with('0') || message.ends_with('5');
    let (server, inbox) = receiver(move |request: &Received| {
        let (message, status) = (field(&request.body, "/message_id"), field(&request.body, "/message_status"));
        let mut attempts = attempts.lock().expect("nobody panics");
        let attempt = attempts.entry(request.id().to_owned()).or_default();
        *attempt += 1;
        assert_eq!(request.header("relay-attempt"), attempt.to_string());
        Reply::Status(if fails(&message) && status == "sent" && *attempt <= FAILURES { 500 } else { 200 })
    })
    .await;
    let backoff = "delivery = { concurrency = 8, backoff = { initial = \"400ms\", max = \"2s\" }, breaker = { failures = 1000, probe = \"1s\" } }";
    let relay = Setup::new(&(sink("http", &server, backoff) + &all_to(&["http"]))).start().await;
    let load = Load::new(8, Duration::from_millis(5));
    load.to(Some(relay.address()));
    load.more(600).await;
    let posted = load.stop().await;
    let arrived = inbox.wait_for_ids("HTTP", posted.ids()).await;
    relay.stop().await;
    posted.check("HTTP", &arrived);
    assert_eq!(inbox.now().repeated(), 0, "accepted twice");

    let posted_at: HashMap<_, _> = posted.acked.iter().map(|acked| (&*acked.id, acked.posted)).collect();
    let (mut failed, mut others) = (Vec::new(), Vec::new());
    for arrival in &arrived.all {
        let failing = fails(&arrival.field("/message_id"));
        let took = arrival.at.saturating_duration_since(posted_at[arrival.id()]);
        let expected = if failing && arrival.field("/message_status") == "sent" { FAILURES + 1 } else { 1 };
        assert_eq!(arrival.header("relay-attempt"), expected.to_string(), "{arrival:?}");
        if failing { &mut failed } else { &mut others }.push(took);
    }
    let median = |times: &mut Vec<Duration>| {
        times.sort();
        times[times.len() / 2]
    };
    let (failed, others) = (median(&mut failed), median(&mut others));
    eprintln!("messages that fail: median {failed:.1?}; others: {others:.1?}");
    assert!(others * 3 < failed, "others are held up: {others:?}, against {failed:?} for those that fail");
}

/// What an operator sends again comes in between, and keeps the others of its key in their order.
#[tokio::test]
async fn a_replay_does_not_change_the_order_of_its_key() {
    const SLOW: Duration = Duration::from_secs(5);
    let failed = AtomicBool::new(false);
    let (server, inbox) = receiver(move |request| {
        match field(&request.body, "/message_id").ends_with("-2") && !failed.swap(true, Ordering::Relaxed) {
            true => Reply::After(SLOW, 503),
            false => Reply::Status(200),
        }
    })
    .await;
    let rules =
        sink("http", &server, "delivery = { order_by = \"sender_id\", schedule = [\"500ms\"] }") + &all_to(&["http"]);
    let relay = Setup::new(&rules).start().await;
    let post = async |number: u32| {
        let body = format!(
            "{{\"message_id\":\"m-{number}\",\"message_status\":\"sent\",\"channel\":{{\"sender_id\":\"1\"}}}}"
        );
        relay.post(body).await.ids()
    };
    let first = post(1).await;
    inbox.wait_for_ids("HTTP", first).await;
    let begun = Instant::now();
    post(2).await;
    post(3).await;
    relay.sink_is("http", "has begun the second", |sink| sink["in_flight"] == 1).await;
    let replay = relay.command_json(&["replay", "--sink", "http", "--when", "\"/message_id\" = \"m-1\""]).await;
    assert_eq!(replay["replayed"], 1);
    post(4).await;
    assert!(begun.elapsed() < SLOW, "the second was to be under way all the time");
    let arrived = inbox.wait("all, one twice", |arrived| arrived.all.len() == 5).await;
    let order: Vec<_> = arrived.all.iter().map(|arrival| arrival.field("/message_id")).collect();
    let without = |again: &str| order.iter().skip(1).filter(|id| *id != again).cloned().collect::<Vec<_>>();
    assert_eq!(without("m-1"), ["m-2", "m-3", "m-4"], "{order:?}");
    relay.stop().await;
}

/// A sink with one event that never succeeds, and nothing else to do, still takes the next one.
#[tokio::test]
async fn an_event_that_never_succeeds_does_not_stop_its_sink() {
    let (server, inbox) =
        receiver(|request| Reply::Status(if field(&request.body, "/message_status") == "error" { 503 } else { 200 }))
            .await;
    let hasty = "delivery = { backoff = { initial = \"20ms\", max = \"100ms\" }, breaker = { failures = 3, probe = \"300ms\" } }";
    let relay = Setup::new(&(sink("http", &server, hasty) + &all_to(&["http"]))).start().await;
    relay.post(event(0, "error")).await.ids();
    crate::harness::eventually("the breaker to open", async || {
        !relay.logged("sink is failing; it is only probed until it is back").is_empty()
    })
    .await;
    for number in 1..6 {
        let since = Instant::now();
        let posted = post(&relay, number..number + 1).await;
        inbox.wait_for_ids("HTTP", posted).await;
        let took = since.elapsed();
        assert!(took < Duration::from_secs(5), "held up for {took:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sink_that_never_answers_delays_no_other() {
    let (silent, _) = receiver(|_| Reply::Never).await;
    let mut measured = Vec::new();
    for (what, other) in [("alone", None), ("beside one that never answers", Some(&silent))] {
        let (server, inbox) = accepting().await;
        let rules = match other {
            None => sink("http", &server, "") + &all_to(&["http"]),
            Some(silent) => {
                sink("http", &server, "") + &sink("silent", silent, "timeout = \"1s\"") + &all_to(&["http", "silent"])
            }
        };
        let relay = Setup::new(&rules).start().await;
        let load = Load::new(4, Duration::from_millis(10));
        load.to(Some(relay.address()));
        let since = Instant::now();
        let mut events = load.more(300).await;
        while since.elapsed() < Duration::from_secs(3) {
            events.extend(load.more(1).await);
        }
        measured.push(latencies(&format!("HTTP, {what}"), &events, &inbox).await);
        load.stop().await;
        relay.kill().await;
    }
    let [alone, beside] = measured[..] else { panic!("two were measured") };
    // A busy machine delays single events, hardly half of them.
    let delayed = beside.0 > alone.0 + Duration::from_millis(50) || beside.1 > alone.1 * 5 + Duration::from_millis(500);
    assert!(!delayed, "{beside:?}; alone: {alone:?}");
}
