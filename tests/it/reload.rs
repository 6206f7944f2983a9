//! Rules, secrets and settings that change while the relay runs.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::symlink;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::harness::{Client, Received, Receiver, Relay, Reply, Setup, TOKEN, event, webhook, within};
use crate::metrics::scrape;

/// How long a destination takes to answer that holds up what comes after.
const SLOW: Duration = Duration::from_secs(6);

/// Two sinks, and the routes that follow.
fn rules(one: &Receiver, two: &Receiver, routes: &str) -> String {
    let sink =
        |name, downstream: &Receiver| format!("[sinks.{name}]\ntype = \"http\"\nurl = \"{}\"\n", downstream.url("/"));
    format!("{}{}{routes}", sink("one", one), sink("two", two))
}

fn to(sinks: &str) -> String {
    format!("[[routes]]\nto = [{sinks}]\n")
}

async fn reload(relay: &Relay) -> Value {
    relay.command_json(&["reload"]).await
}

/// Waits until rules were loaded that are not those of `before`.
async fn reloaded(relay: &Relay, before: &Value) -> Value {
    let other = |status: &Value| status["rules"]["last_reload"] != before["last_reload"];
    relay.status_is("the rules are loaded", other).await["rules"].clone()
}

#[tokio::test]
async fn a_changed_file_is_loaded_and_a_broken_one_is_not() {
    let (one, two) = (Receiver::accepting().await, Receiver::accepting().await);
    let setup = Setup::new(&rules(&one, &two, &to("\"one\"")));
    let relay = setup.start().await;
    let before = relay.get("/api/v1/status").await["rules"].clone();
    assert_eq!(before["last_reload"], Value::Null);
    setup.file("routes.toml", &rules(&one, &two, &to("\"two\"")));
    let rules_now = reloaded(&relay, &before).await;
    assert_eq!(rules_now["last_reload"]["outcome"], "applied");
    relay.post(event(1, "sent")).await;
    two.wait_for(1).await;

    setup.file("routes.toml", &rules(&one, &two, "[[routes]]\nto = [\"three\"]\nwhem = {}\n"));
    let broken = reloaded(&relay, &rules_now).await;
    assert_eq!(broken["last_reload"]["outcome"], "refused");
    assert_eq!(broken["loaded_at"], rules_now["loaded_at"]);
    let problems = broken["last_reload"]["problems"].to_string();
    assert!(problems.contains("routes.toml:8:7") && problems.contains("routes.toml:9:1"), "{problems}");
    let done = relay.command(&["reload"]).await;
    assert_eq!(done.code, Some(64), "{}", done.stderr);
    assert!(done.stderr.contains("routes.toml:8:7") && done.stderr.contains("whem"), "{}", done.stderr);
    // That no route leads to the sinks comes of the mistake, and is none.
    assert!(!done.stderr.contains("no route leads"), "{}", done.stderr);
    assert!(relay.logged("not reloaded; what was in force stays in force").iter().all(|line| line["problems"] == 2));
    relay.post(event(2, "sent")).await;
    two.wait_for(2).await;
    assert!(one.received().is_empty());

    setup.file("routes.toml", &rules(&one, &two, &to("\"one\"")));
    assert_eq!(reload(&relay).await["outcome"], "applied");
    assert_eq!(reload(&relay).await["outcome"], "unchanged");
    relay.post(event(3, "sent")).await;
    one.wait_for(1).await;
    assert_eq!(relay.logged("not reloaded; what was in force stays in force").len(), 2);
    relay.stop().await;
}

/// Or else it would wait for as long as its failures have said, although somebody has just mended the sink.
#[tokio::test]
async fn what_has_failed_goes_out_when_the_sink_is_mended() {
    let bad = Receiver::start(|_| Reply::Status(503)).await;
    let good = Receiver::accepting().await;
    let sink = |downstream: &Receiver| {
        let delivery = "schedule = [\"1h\"], breaker = { failures = 3, probe = \"1h\" }";
        let url = downstream.url("/");
        format!("[sinks.one]\ntype = \"http\"\nurl = \"{url}\"\ndelivery = {{ {delivery} }}\n{}", to("\"one\""))
    };
    let setup = Setup::new(&sink(&bad));
    let relay = setup.start().await;
    for number in 0..3 {
        relay.post(event(number, "sent")).await;
    }
    relay.sink_is("one", "is away", |sink| sink["breaker"] == "open" && sink["parked"] == 3).await;
    setup.file("routes.toml", &sink(&good));
    assert_eq!(reload(&relay).await["outcome"], "applied");
    good.wait_for(3).await;
    relay.sink_is("one", "has nothing parked", |sink| sink["parked"] == 0).await;
    relay.stop().await;
}

/// Whoever writes a file anew may have removed it first, or emptied it: that is no reason to forget sinks and tokens.
#[tokio::test]
async fn files_that_are_gone_or_empty_for_a_while_are_waited_for() {
    let one = Receiver::accepting().await;
    let setup = Setup::new(&one.routes()).without("RELAY_INGRESS__AUTH__TOKENS");
    let settings =
        format!("[ingress.auth]\nheader = \"{}\"\ntokens = [{{ name = \"a\", value = \"{}\" }}]\n", TOKEN.0, TOKEN.1);
    setup.file("relay.toml", &settings);
    let relay = setup.start().await;
    let (routes, file) = (setup.dir().join("routes.toml"), setup.dir().join("relay.toml"));

    async fn check(relay: &Relay, problem: &str) {
        let refused = relay.command(&["reload"]).await;
        assert_eq!(refused.code, Some(64), "{}", refused.stderr);
        assert!(refused.stderr.contains(problem), "{}", refused.stderr);
        relay.post("{}").await.ids();
    }
    std::fs::remove_file(&routes).unwrap();
    check(&relay, "routes.toml: No such file").await;
    std::fs::write(&routes, "").unwrap();
    check(&relay, "routes.toml is gone or empty").await;
    std::fs::remove_file(&file).unwrap();
    setup.file("routes.toml", &one.routes());
    check(&relay, "relay.toml is gone or empty").await;
    setup.file("relay.toml", &settings);
    assert_eq!(reload(&relay).await["outcome"], "applied");
    one.wait_for(3).await;
    relay.stop().await;
}

/// A token that was made up is a secret like others.
#[tokio::test]
async fn a_token_file_that_changes_is_read() {
    let one = Receiver::accepting().await;
    let setup = Setup::new(&one.routes()).without("RELAY_INGRESS__AUTH__TOKENS");
    let relay = setup.start().await;
    assert_eq!(relay.post("{}").await.status, 401);
    let before = relay.get("/api/v1/status").await["rules"].clone();
    setup.file("data/ingress-token", TOKEN.1);
    assert_eq!(reloaded(&relay, &before).await["last_reload"]["outcome"], "applied");
    relay.post("{}").await.ids();
    relay.stop().await;
}

#[tokio::test]
async fn a_config_map_that_is_swapped_is_loaded_in_time_and_a_touched_file_is_not() {
    let (one, two) = (Receiver::accepting().await, Receiver::accepting().await);
    let setup = Setup::new("");
    let path = |name: &str| setup.dir().join(name);
    for (version, sinks) in [("v1", "\"one\""), ("v2", "\"two\"")] {
        std::fs::create_dir(path(version)).unwrap();
        std::fs::write(path(version).join("routes.toml"), rules(&one, &two, &to(sinks))).unwrap();
    }
    std::fs::remove_file(path("routes.toml")).unwrap();
    symlink("v1", path("..data")).unwrap();
    symlink("..data/routes.toml", path("routes.toml")).unwrap();
    let relay = setup.start().await;
    let before = relay.get("/api/v1/status").await["rules"].clone();
    std::fs::write(path("v1/routes.toml"), rules(&one, &two, &to("\"one\""))).unwrap();
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(relay.get("/api/v1/status").await["rules"], before);

    let swapped_at = Instant::now();
    symlink("v2", path("..tmp")).unwrap();
    std::fs::rename(path("..tmp"), path("..data")).unwrap();
    let rules_now = reloaded(&relay, &before).await;
    assert!(swapped_at.elapsed() < Duration::from_secs(5), "{:?}", swapped_at.elapsed());
    relay.post(event(1, "sent")).await;
    two.wait_for(1).await;
    // One change is one reload.
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(relay.get("/api/v1/status").await["rules"], rules_now);
    assert_eq!(relay.logged("reloaded").len(), 1);
    relay.stop().await;
}

#[tokio::test]
async fn a_hangup_loads_the_file_again() {
    let (one, two) = (Receiver::accepting().await, Receiver::accepting().await);
    let setup = Setup::new(&rules(&one, &two, &to("\"one\"")));
    let relay = setup.start().await;
    let before = relay.get("/api/v1/status").await["rules"].clone();
    relay.signal(Signal::HUP);
    assert_eq!(reloaded(&relay, &before).await["last_reload"]["outcome"], "unchanged");
    relay.stop().await;
}

#[tokio::test]
async fn a_sinks_secret_rotates_and_what_is_under_way_keeps_the_old_one() {
    let one = Receiver::start(|received| match received.header("x-hold") {
        "first" => Reply::After(Duration::from_millis(1500), 200),
        _ => Reply::Status(200),
    })
    .await;
    let setup = Setup::new("");
    let secret = setup.file("secret", "first");
    let rules = format!(
        "[sinks.one]\ntype = \"http\"\nurl = \"{}\"\nheaders = {{ x-hold = \"${{file:{}}}\" }}\n{}",
        one.url("/"),
        secret.display(),
        to("\"one\"")
    );
    setup.file("routes.toml", &rules);
    let relay = setup.start().await;
    relay.post(event(1, "sent")).await;
    one.wait_for(1).await;
    setup.file("secret", "second");
    assert_eq!(reload(&relay).await["outcome"], "applied");
    relay.post(event(2, "sent")).await;
    let received = one.wait_for(2).await;
    // The first was not sent again, though it took until after the reload.
    assert_eq!(received.iter().map(|received| received.header("x-hold")).collect::<Vec<_>>(), ["first", "second"]);
    let sink = relay.sink_is("one", "has delivered both", |sink| sink["delivered"] == 2).await;
    assert_eq!((&sink["attempts_failed"], &sink["parked"]), (&json!(0), &json!(0)));
    let log = relay.stop().await;
    assert!(!log.iter().any(|line| line.to_string().contains("second")), "a secret was logged");
}

#[tokio::test]
async fn a_removed_sinks_parked_deliveries_are_dead_letters_and_a_changed_one_keeps_its_pause() {
    let one = Receiver::start(|_| Reply::Status(503)).await;
    let two = Receiver::accepting().await;
    let setup = Setup::new(&rules(&one, &two, &to("\"one\", \"two\"")));
    let relay = setup.start().await;
    relay.post(event(1, "sent")).await;
    relay.sink_is("one", "has parked it", |sink| sink["parked"] == 1).await;
    relay.operate("/api/v1/sinks/two/pause", &Value::Null).await;
    let two_only = format!("[sinks.two]\ntype = \"http\"\nurl = \"{}\"\ntimeout = \"3s\"\n", two.url("/"));
    setup.file("routes.toml", &format!("{two_only}{}", to("\"two\"")));
    assert_eq!(reload(&relay).await["outcome"], "applied");
    relay.status_is("the sink is closed", |status| status["dead_letters"]["one"] == 1).await;
    let letters = relay.get("/api/v1/dead-letters?sink=one").await;
    assert_eq!(letters["dead_letters"][0]["reason"], "sink_removed", "{letters}");
    let counted = scrape(&relay).await;
    // Or else no alert would know of them.
    assert_eq!(counted.get("relay_deliveries_total{outcome=\"dead\",sink=\"one\"}"), Some(&1.0), "{counted:#?}");
    assert_eq!(counted.get("relay_deliveries_total{outcome=\"parked\",sink=\"one\"}"), None, "{counted:#?}");
    let routed = |sink| counted.keys().any(|name| name.starts_with("relay_routed_events_total") && name.contains(sink));
    assert!(!routed("\"one\"") && routed("\"two\""), "{counted:#?}");
    relay.sink_is("two", "is paused still", |sink| sink["paused"] == true).await;
    relay.post(event(2, "sent")).await;
    relay.operate("/api/v1/sinks/two/resume", &Value::Null).await;
    two.wait_for(2).await;
    // Back again, it begins with what comes now.
    setup.file("routes.toml", &rules(&two, &two, &to("\"one\"")));
    assert_eq!(reload(&relay).await["outcome"], "applied");
    relay.post(event(3, "sent")).await;
    two.wait_for(3).await;
    relay.stop().await;
}

/// While a sink is paused, so that it has a backlog, the rules change: the backlog follows them, and what has nowhere
/// else to go stays.
#[tokio::test]
async fn a_backlog_follows_the_new_rules_and_nothing_is_lost_between_them() {
    let (one, two) = (Receiver::accepting().await, Receiver::accepting().await);
    let setup = Setup::new(&rules(&one, &two, &to("\"one\"")));
    let relay = setup.start().await;
    relay.operate("/api/v1/sinks/one/pause", &Value::Null).await;
    // More than a lane reads ahead.
    for seed in ["1", "2", "3"] {
        let target = ["--url", &relay.url(), "--token", TOKEN.1];
        let arguments = [&["send", "--count", "10000", "--seed", seed][..], &target].concat();
        let done = setup.run(&arguments, "").await;
        assert_eq!(done.code, Some(0), "{}", done.stderr);
    }
    setup.file("routes.toml", &rules(&one, &two, &to("\"two\"")));
    assert_eq!(reload(&relay).await["outcome"], "applied");
    relay.post(event(1, "sent")).await;
    relay.operate("/api/v1/sinks/one/resume", &Value::Null).await;
    let drained = relay.command(&["drain", "--timeout", "60s"]).await;
    assert!((drained.code == Some(0)), "{}{}", drained.stdout, drained.stderr);
    let ids = |downstream: &Receiver| {
        let received = downstream.received();
        received.iter().map(|received| received.id().to_owned()).collect::<BTreeSet<_>>()
    };
    let (ones, twos) = (ids(&one), ids(&two));
    assert_eq!(ones.union(&twos).count(), 30_001);
    assert_eq!(twos.len(), 1, "the lane of two had read past the others");
    relay.stop().await;
}

/// What a lane has read and not begun with is backlog too, however little it is: also while an attempt is under way.
#[tokio::test]
async fn a_backlog_that_was_read_already_follows_the_new_rules() {
    let held = Arc::new(AtomicBool::new(true));
    let hold = Arc::clone(&held);
    let answer =
        move |_: &Received| if hold.load(Ordering::SeqCst) { Reply::After(SLOW, 200) } else { Reply::Status(200) };
    let (one, two) = (Receiver::start(answer).await, Receiver::accepting().await);
    let only = |status: &str| format!("[[routes]]\nwhen = {{ status = \"{status}\" }}\nto = [\"one\"]\n");
    let (all, both) = (to("\"one\""), to("\"one\", \"two\""));
    let rules = |routes: &str| {
        let one_at_a_time = "delivery = { concurrency = 1, order_by = \"message_id\" }\n[sinks.two]";
        rules(&one, &two, routes).replace("[sinks.two]", one_at_a_time)
    };
    // Before, after, and whether those that are sent and those that are read go to the first sink after that.
    let cases = [
        (both.clone(), format!("{}{}", only("read"), to("\"two\"")), (false, true)),
        (format!("{}{}", only("read"), to("\"two\"")), both, (true, true)),
        (all.clone(), only("read"), (false, true)),
        // Those that were unrouted are dead letters besides.
        (only("read"), all, (true, true)),
    ];
    let setup = Setup::new(&rules(&cases[0].0));
    let relay = setup.start().await;
    for (number, (before, after, (sent, read))) in (0..).step_by(1000).zip(cases) {
        setup.file("routes.toml", &rules(&before));
        assert_ne!(reload(&relay).await["outcome"], "refused");
        held.store(true, Ordering::SeqCst);
        let seen = one.received().len();
        // This one is under way.
        relay.post(event(number, "read")).await;
        one.wait_for(seen + 1).await;
        let mut expected = BTreeSet::new();
        for other in 1..=6 {
            for (status, goes) in [("read", read), ("sent", sent)] {
                let ids = relay.post(event(number + other, status)).await.ids();
                expected.extend(ids.into_iter().filter(|_| goes));
            }
        }
        relay.sink_is("two", "has read past them", |sink| sink["lag_events"] == 0).await;
        relay.sink_is("one", "has a backlog", |sink| sink["lag_events"] == 13 && sink["in_flight"] == 1).await;
        setup.file("routes.toml", &rules(&after));
        assert_eq!(reload(&relay).await["outcome"], "applied");
        held.store(false, Ordering::SeqCst);
        let drained = relay.command(&["drain", "--timeout", "20s"]).await;
        assert_eq!(drained.code, Some(0), "case {number}: {}{}", drained.stdout, drained.stderr);
        let got: Vec<_> = one.received()[seen + 1..].iter().map(|received| received.id().to_owned()).collect();
        assert_eq!(got.iter().cloned().collect::<BTreeSet<_>>(), expected, "case {number}");
        assert_eq!(got.len(), expected.len(), "case {number}: nothing comes twice");
    }
    // What no rule named a sink for any more, or not yet.
    let letters = relay.get("/api/v1/dead-letters?sink=unrouted").await;
    let statuses: Vec<_> = letters["dead_letters"].as_array().unwrap().iter().map(|letter| &letter["status"]).collect();
    assert_eq!(statuses, vec!["sent"; 12], "{letters}");
    let counted = scrape(&relay).await;
    assert_eq!(counted.get("relay_unrouted_events_total"), Some(&12.0), "{counted:#?}");
    // Each is counted once, however often it was read.
    let routed =
        counted.iter().filter(|(name, _)| name.starts_with("relay_routed_events_total{") && name.contains("\"one\""));
    assert_eq!(routed.map(|(_, count)| count).sum::<f64>(), one.received().len() as f64, "{counted:#?}");
    relay.stop().await;
}

/// Rules that change while a sink has a backlog, by a reload or while nobody runs: events that another sink has read past by
/// then stay with the one that had them, also after a restart.
#[tokio::test]
async fn a_backlog_keeps_its_sinks_over_restarts() {
    for (by_reload, kill) in [(true, true), (true, false), (false, false)] {
        let (one, two) = (Receiver::accepting().await, Receiver::accepting().await);
        let rules = |routes: String| rules(&one, &two, &routes);
        // It answers nobody at first.
        let away = |rules: String| rules.replace(&one.url("/"), "http://127.0.0.1:9/");
        let setup = Setup::new(&away(rules(to("\"one\""))));
        let relay = setup.start().await;
        let mut ids = BTreeSet::new();
        for number in 0..200 {
            ids.extend(relay.post(event(number, "sent")).await.ids());
        }
        relay.sink_is("two", "has read past them", |sink| sink["lag_events"] == 0).await;
        if by_reload {
            setup.file("routes.toml", &away(rules(to("\"two\""))));
            assert_eq!(reload(&relay).await["outcome"], "applied");
        }
        match kill {
            true => drop(relay.kill().await),
            false => drop(relay.stop().await),
        }
        setup.file("routes.toml", &rules(to("\"two\"")));
        let relay = setup.start().await;
        let last = relay.post(event(1000, "sent")).await.ids();
        let received = one.wait_for(200).await;
        let received: BTreeSet<_> = received.iter().map(|received| received.id().to_owned()).collect();
        assert_eq!(received, ids, "by reload: {by_reload}, killed: {kill}");
        assert_eq!(two.wait_for(1).await[0].id(), last[0]);
        let drained = relay.command(&["drain", "--timeout", "20s"]).await;
        assert_eq!(drained.code, Some(0), "{drained:?}");
        relay.stop().await;
        assert_eq!((one.received().len(), two.received().len()), (200, 1));
    }
}

/// A lane that ends must not be waited for, nor its successor be told what is out of date.
#[tokio::test]
async fn a_sink_that_changes_again_before_its_lane_has_ended() {
    let (one, two) = (Receiver::accepting().await, Receiver::accepting().await);
    let file = |number: u64| {
        let sink = if number.is_multiple_of(2) { "one" } else { "two" };
        rules(&one, &two, &to(&format!("\"{sink}\"")))
            .replace("type = \"http\"\n", &format!("type = \"http\"\ntimeout = \"{}s\"\n", 1 + number))
    };
    let setup = Setup::new(&file(0));
    let relay = setup.start().await;
    let going = AtomicBool::new(true);
    let changing = async {
        let mut number = 0;
        while going.load(Ordering::Relaxed) {
            number += 1;
            // Whole or not at all, so that nothing is refused.
            std::fs::rename(setup.file("next.toml", &file(number % 1000)), setup.dir().join("routes.toml")).unwrap();
            tokio::task::yield_now().await;
        }
        setup.file("routes.toml", &file(1000));
    };
    let reloading = async || {
        for _ in 0..100 {
            let reload = within("a reload", relay.operate("/api/v1/reload", &Value::Null)).await;
            assert_ne!(reload["outcome"], "refused", "{reload}");
        }
    };
    let all = async {
        tokio::join!(reloading(), reloading(), reloading());
        going.store(false, Ordering::Relaxed);
    };
    let sending = async {
        let (client, mut sent) = (Client::http1(relay.address()).await, BTreeSet::new());
        while going.load(Ordering::Relaxed) {
            let number = u32::try_from(sent.len()).unwrap();
            sent.extend(client.send(webhook(event(1000 + number, "sent"))).await.ids());
        }
        sent
    };
    let ((), (), sent) = tokio::join!(changing, all, sending);
    relay.operate("/api/v1/reload", &Value::Null).await;
    // By the last rules, and nothing is held.
    let last = relay.post(event(1, "sent")).await.ids();
    let drained = relay.command(&["drain", "--timeout", "20s"]).await;
    assert_eq!(drained.code, Some(0), "{}", drained.stdout);
    let ids = |receiver: &Receiver| receiver.received().iter().map(|received| received.id().to_owned()).collect();
    let (ones, twos): (BTreeSet<_>, BTreeSet<_>) = (ids(&one), ids(&two));
    assert!(ones.contains(&last[0]) && !twos.contains(&last[0]));
    assert!(sent.iter().all(|id| ones.contains(id) || twos.contains(id)));
    relay.stop().await;
}

#[tokio::test]
async fn two_hundred_reloads_under_load_lose_nothing() {
    let (one, two) = (Receiver::accepting().await, Receiver::accepting().await);
    let file = |number: usize| match number % 4 {
        0 => rules(&one, &two, &to("\"one\"")),
        1 | 3 => rules(&one, &two, &format!("[[routes]]\nto = [\"{number}\"]\n")),
        _ => rules(&one, &two, &to("\"two\"")),
    };
    let setup = Setup::new(&file(0));
    let relay = Arc::new(setup.start().await);
    let going = Arc::new(AtomicBool::new(true));
    let sender = tokio::spawn({
        let (relay, going) = (Arc::clone(&relay), Arc::clone(&going));
        async move {
            let client = Client::http1(relay.address()).await;
            let (mut sent, mut slowest) = (Vec::new(), Duration::ZERO);
            while going.load(Ordering::Relaxed) {
                let begun = Instant::now();
                let number = u32::try_from(sent.len()).unwrap();
                sent.extend(client.send(webhook(event(number, "sent"))).await.ids());
                slowest = slowest.max(begun.elapsed());
            }
            (sent, slowest)
        }
    });
    let mut outcomes = BTreeMap::new();
    let memory_at_first = memory(&relay);
    for number in 1..=200 {
        setup.file("routes.toml", &file(number));
        let done = relay.command(&["reload", "--json"]).await;
        let place = done.stderr.contains("routes.toml:8:7");
        let outcome = if done.code == Some(0) { "applied" } else { "refused" };
        assert_eq!(outcome == "refused", number % 2 == 1, "{}{}", done.stdout, done.stderr);
        assert!((done.code == Some(0)) || place, "{}", done.stderr);
        *outcomes.entry(outcome).or_insert(0) += 1;
    }
    going.store(false, Ordering::Relaxed);
    let (sent, slowest) = sender.await.unwrap();
    assert_eq!(outcomes, BTreeMap::from([("applied", 100), ("refused", 100)]));
    let drained = relay.command(&["drain", "--timeout", "60s"]).await;
    assert!((drained.code == Some(0)), "{}", drained.stdout);
    let mut arrived = BTreeMap::new();
    for received in one.received().iter().chain(&two.received()) {
        *arrived.entry(received.id().to_owned()).or_insert(0) += 1;
    }
    let lost = sent.iter().filter(|id| !arrived.contains_key(*id)).count();
    assert_eq!(lost, 0, "of {}", sent.len());
    // An event that was read by one lane and not yet by the other when the rules changed may go to both.
    let twice = arrived.values().filter(|count| **count > 1).count();
    assert!(twice < sent.len() / 20, "{twice} of {} went to both", sent.len());
    assert!(slowest < Duration::from_secs(2), "a sender waited {slowest:?}");
    let grown = memory(&relay).saturating_sub(memory_at_first);
    assert!(grown < 64 << 20, "{grown} bytes");
    let status = relay.get("/api/v1/status").await;
    assert_eq!(status["sinks"][0]["attempts_failed"], 0, "{status}");
    Arc::into_inner(relay).unwrap().stop().await;
}

/// Resident memory in bytes.
fn memory(relay: &Relay) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", relay.pid().as_raw_nonzero())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

#[tokio::test]
async fn settings_that_need_a_restart_are_named_and_the_log_level_is_not_one() {
    let one = Receiver::accepting().await;
    let setup = Setup::new(&one.routes());
    setup.file(
        "relay.toml",
        "[telemetry]\nlog = \"info\"\notlp_headers = { x = \"one\" }\n[shutdown]\ngrace = \"20s\"\n",
    );
    let relay = setup.start().await;
    setup.file(
        "relay.toml",
        "[telemetry]\nlog = \"debug\"\notlp_headers = { x = \"two\" }\n[shutdown]\ngrace = \"10s\"\n",
    );
    let reload = reload(&relay).await;
    assert_eq!(reload["outcome"], "applied");
    let problems = reload["problems"].to_string();
    assert!(["shutdown has", "telemetry has"].iter().all(|setting| problems.contains(setting)), "{reload}");
    assert_eq!(relay.get("/api/v1/log").await["log"], "debug");
    relay.stop().await;
}
