//! Operating relays that share a journal on Kafka: whatever is asked of one of them is asked of all.

use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use http::Request;
use http_body_util::Full;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tokio::net::TcpStream;

use crate::balancer::unused_addresses;
use crate::brokers::{create_topic, empty_topic, set_topic, shared_kafka, unique};
use crate::harness::{Client, Receiver, Relay, Reply, Setup, event, eventually, within};
use crate::metrics::scrape;

/// The settings of relays that share a journal on the tests' one broker.
fn settings(prefix: &str, more: &str) -> String {
    let brokers = shared_kafka();
    format!(
        "[journal]\nkind = \"kafka\"\nbrokers = [\"{brokers}\"]\nprefix = \"{prefix}\"\npartitions = 4\nreplication = 1\n\
         min_insync = 1\n{more}"
    )
}

/// Two replicas with the same rules.
async fn pair(rules: &str, more: &str) -> [Relay; 2] {
    let settings = settings(&unique("replicas"), more);
    let setups = [(); 2].map(|()| {
        let setup = Setup::new(rules);
        setup.file("relay.toml", &settings);
        setup
    });
    let [first, second] = setups;
    let first = first.start().await;
    let relays = [first, second.start().await];
    agree(&relays, "to share the partitions", |status| {
        let replicas = status["replicas"].as_array().expect("a list");
        let share = |replica: &Value| replica["sinks"][0]["partitions"].as_array().map_or(0, Vec::len);
        replicas.len() == 2 && replicas.iter().all(|replica| share(replica) == 2)
    })
    .await;
    relays
}

/// Waits until both say so.
async fn agree(relays: &[Relay; 2], what: &str, condition: impl Fn(&Value) -> bool) {
    for relay in relays {
        relay.status_is(&format!("the replicas {what}"), &condition).await;
    }
}

fn rules(receiver: &Receiver) -> String {
    format!(
        "[sinks.http]\ntype = \"http\"\nurl = \"{}\"\n[[routes]]\nname = \"sent\"\nwhen = {{ status = \"sent\" }}\n\
         to = [\"http\"]\n",
        receiver.url("/")
    )
}

/// The same, with settings of how it delivers.
fn rules_with(receiver: &Receiver, delivery: &str) -> String {
    rules(receiver).replace("[[routes]]", &format!("[sinks.http.delivery]\n{delivery}[[routes]]"))
}

async fn stop(relays: [Relay; 2]) {
    for relay in relays {
        relay.stop().await;
    }
}

/// Probes can tell it from one that hangs, and senders are not kept waiting.
#[tokio::test]
async fn a_relay_that_waits_for_brokers_is_alive_and_not_ready() {
    let [ingress, admin, nobody] = unused_addresses();
    let setup = Setup::new(include_str!("../../routes.toml"))
        .env("RELAY_INGRESS__LISTEN", ingress.to_string())
        .env("RELAY_ADMIN__LISTEN", admin.to_string())
        .env("RELAY_JOURNAL__KIND", "kafka")
        .env("RELAY_JOURNAL__BROKERS", format!("[\"{nobody}\"]"));
    let mut relay = setup.command(&[]).spawn().expect("it starts");
    let probe = async |path: &str| {
        let request = Request::get(path).header("host", "relay").body(Full::default()).expect("a request");
        Client::try_http1(admin).await?.try_send(request).await.ok().map(|answer| answer.status)
    };
    eventually("the admin side", async || probe("/healthz").await == Some(200)).await;
    for path in ["/readyz", "/metrics", "/api/v1/status"] {
        assert_eq!(probe(path).await, Some(503), "{path}");
    }
    let refused = TcpStream::connect(ingress).await.expect_err("nobody listens");
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    let pid = relay.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?)).expect("it runs");
    kill_process(pid, Signal::TERM).expect("it runs");
    let ended = within("its end", relay.wait()).await.expect("a status");
    assert_eq!(ended.code(), Some(0), "nothing was begun");
}

#[tokio::test]
async fn a_sink_is_paused_and_resumed_on_all() {
    let receiver = Receiver::accepting().await;
    let [first, second] = pair(&rules(&receiver), "").await;
    assert_eq!(first.operate("/api/v1/sinks/http/pause", &Value::Null).await["paused"], true);
    let relays = [first, second];
    agree(&relays, "to pause", |status| status["sinks"][0]["paused"] == true).await;
    let [first, second] = relays;
    for number in 0..20 {
        assert_eq!(second.post(event(number, "sent")).await.status, 200);
    }
    // One that starts now does not deliver either.
    let second = second.kill().await.start().await;
    let relays = [first, second];
    agree(&relays, "to have all events waiting", |status| status["sinks"][0]["lag_events"] == 20).await;
    assert_eq!(receiver.received().len(), 0);
    let drained = relays[1].operate("/api/v1/drain?wait=0", &Value::Null).await;
    assert_eq!((&drained["drained"], &drained["sinks"][0]["paused"]), (&json!(false), &json!(true)));
    relays[1].operate("/api/v1/sinks/http/resume", &Value::Null).await;
    receiver.wait_for(20).await;
    let drained = relays[0].command(&["drain", "--timeout", "60s"]).await;
    assert_eq!(drained.code, Some(0), "{drained:?}");
    assert_eq!(receiver.received().len(), 20);
    stop(relays).await;
}

#[tokio::test]
async fn dead_letters_are_those_of_all() {
    let answer = Arc::new(AtomicU16::new(400));
    let answers = Arc::clone(&answer);
    let receiver = Receiver::start(move |_| Reply::Status(answers.load(Ordering::Relaxed))).await;
    let [first, second] = pair(&rules(&receiver), "").await;
    for number in 0..8 {
        assert_eq!(first.post(event(number, "sent")).await.status, 200);
    }
    assert_eq!(second.post(event(8, "read")).await.status, 200);
    let relays = [first, second];
    agree(&relays, "to know all dead letters", |status| status["dead_letters"] == json!({ "http": 8, "unrouted": 1 }))
        .await;
    let list = relays[0].get("/api/v1/dead-letters?sink=http").await;
    assert_eq!(list, relays[1].get("/api/v1/dead-letters?sink=http").await, "the same, with the same numbers");
    let letter = &list["dead_letters"][0];
    assert_eq!((&letter["reason"], &letter["route"]), (&json!("rejected"), &json!("sent")));
    // Metrics are summed over all: one of them tells, and a replica that has not been heard of for a moment is none of them.
    for (sink, expected) in [("http", 8.0), ("unrouted", 1.0)] {
        let name = format!("relay_sink_dead_letters{{sink=\"{sink}\"}}");
        let is_told_once = async || scrape(&relays[0]).await[&name] + scrape(&relays[1]).await[&name] == expected;
        eventually("one of the replicas tells", is_told_once).await;
    }
    let path = format!("/api/v1/dead-letters/{}", letter["id"]);
    assert_eq!(relays[1].get(&path).await["body"]["message_status"], "sent");

    // One through the first, the rest through the second; what no route matches to a sink that is named.
    answer.store(200, Ordering::Relaxed);
    let before = receiver.received().len();
    relays[0].operate(&format!("{path}/replay"), &Value::Null).await;
    agree(&relays, "to know that it is none any more", |status| status["dead_letters"]["http"] == 7).await;
    let done = relays[1].operate("/api/v1/dead-letters/replay", &json!({ "sink": "http" })).await;
    assert_eq!((&done["done"], &done["remaining"]), (&json!(7), &json!(0)), "{done}");
    let done = relays[1].operate("/api/v1/dead-letters/replay", &json!({ "sink": "unrouted", "to": "http" })).await;
    assert_eq!(done["done"], 1, "{done}");
    receiver.wait_for(before + 9).await;
    agree(&relays, "to have no dead letters", |status| status["dead_letters"] == json!({})).await;
    let routes = receiver.received().into_iter().skip(before);
    assert!(routes.into_iter().all(|request| request.header("relay-attempt") == "1"));

    // Discarded by one, gone for both.
    answer.store(400, Ordering::Relaxed);
    assert_eq!(relays[0].post(event(9, "sent")).await.status, 200);
    agree(&relays, "to know of another", |status| status["dead_letters"]["http"] == 1).await;
    relays[1].operate("/api/v1/dead-letters/discard", &json!({ "sink": "http" })).await;
    agree(&relays, "to have none again", |status| status["dead_letters"] == json!({})).await;
    stop(relays).await;
}

/// A replay gives a delivery its time anew.
#[tokio::test]
async fn a_replay_is_as_old_as_itself() {
    let answer = Arc::new(AtomicU16::new(500));
    let answers = Arc::clone(&answer);
    let receiver = Receiver::start(move |_| Reply::Status(answers.load(Ordering::Relaxed))).await;
    let delivery = "schedule = [\"1s\"]\nmax_age = \"3s\"\nbreaker = { failures = 1000 }\n";
    let relays = pair(&rules_with(&receiver, delivery), "").await;
    assert_eq!(relays[0].post(event(1, "sent")).await.status, 200);
    agree(&relays, "to know that it has expired", |status| status["dead_letters"]["http"] == 1).await;
    let before = receiver.received().len();
    relays[1].operate("/api/v1/dead-letters/replay", &json!({ "sink": "http" })).await;
    receiver.wait_for(before + 1).await;
    answer.store(200, Ordering::Relaxed);
    receiver.wait_for(before + 2).await;
    assert_eq!(receiver.received()[before + 1].header("relay-attempt"), "2");
    agree(&relays, "to have no dead letters", |status| status["dead_letters"] == json!({})).await;
    stop(relays).await;
}

/// Or else it would wait for as long as its failures have said; whichever replica has its partition then.
#[tokio::test]
async fn what_has_failed_goes_out_when_the_sink_is_mended() {
    let bad = Receiver::start(|_| Reply::Status(503)).await;
    let good = Receiver::accepting().await;
    let delivery = "schedule = [\"1h\"]\nbreaker = { failures = 1, probe = \"1h\" }\n";
    let relays = pair(&rules_with(&bad, delivery), "").await;
    for number in 0..20 {
        assert_eq!(relays[0].post(event(number, "sent")).await.status, 200);
    }
    agree(&relays, "to have parked of each partition", |status| status["sinks"][0]["parked"].as_u64() >= Some(4)).await;
    for relay in &relays {
        relay.change_rules(&rules_with(&good, delivery));
        relay.operate("/api/v1/reload", &Value::Null).await;
    }
    good.wait_for(20).await;
    agree(&relays, "to have nothing parked", |status| status["sinks"][0]["parked"] == 0).await;
    stop(relays).await;
}

/// What dies meanwhile has numbers among those that were there: each partition has its own.
#[tokio::test]
async fn dead_letters_that_die_meanwhile_are_left_out() {
    let receiver = Receiver::start(|_| Reply::Status(400)).await;
    let relays = pair(&rules(&receiver), "").await;
    let die = async |numbers: std::ops::Range<u32>, in_all: usize| {
        for number in numbers {
            assert_eq!(relays[0].post(event(number, "sent")).await.status, 200);
        }
        agree(&relays, "to know all dead letters", |status| status["dead_letters"]["http"] == in_all).await;
    };
    die(0..12, 12).await;
    let mut replay = json!({ "sink": "http", "limit": 3 });
    for round in 1..=4 {
        let answer = relays[round % 2].operate("/api/v1/dead-letters/replay", &replay).await;
        assert_eq!((&answer["done"], &answer["remaining"]), (&json!(3), &json!(12 - 3 * round)), "{answer}");
        receiver.wait_for(12 + 3 * round).await;
        agree(&relays, "to know that they have died again", |status| status["dead_letters"]["http"] == 12).await;
        (replay["after"], replay["up_to"]) = (answer["last"].clone(), answer["up_to"].clone());
    }
    let replayed = relays[0].command_json(&["dead-letters", "replay", "--sink", "http"]).await;
    assert_eq!(replayed["replayed"], 12, "{replayed}");
    receiver.wait_for(36).await;
    agree(&relays, "to know that they have died again", |status| status["dead_letters"]["http"] == 12).await;

    let first = relays[0].get("/api/v1/dead-letters?limit=5").await;
    die(12..24, 24).await;
    let path = format!("/api/v1/dead-letters?limit=20&after={}&up_to={}", first["next"], first["up_to"]);
    let second = relays[1].get(&path).await;
    let listed = |page: &Value| page["dead_letters"].as_array().map(Vec::len);
    assert_eq!((listed(&first), listed(&second), &second["next"]), (Some(5), Some(7), &Value::Null), "{second}");
    let discard = json!({ "after": first["next"], "up_to": first["up_to"] });
    let discarded = relays[1].operate("/api/v1/dead-letters/discard", &discard).await;
    assert_eq!((&discarded["done"], &discarded["remaining"]), (&json!(7), &json!(0)), "{discarded}");
    stop(relays).await;
}

#[tokio::test]
async fn what_comes_in_meanwhile_is_not_sent_again() {
    let receiver = Receiver::accepting().await;
    let relays = pair(&rules(&receiver), "").await;
    let post = async |numbers: std::ops::Range<u32>| {
        for number in numbers {
            assert_eq!(relays[0].post(event(number, "sent")).await.status, 200);
        }
    };
    post(0..12).await;
    receiver.wait_for(12).await;
    let mut replay = json!({ "sink": "http", "limit": 3 });
    let mut replayed = 0;
    loop {
        let answer = relays[1].operate("/api/v1/replay", &replay).await;
        replayed += answer["replayed"].as_u64().expect("a number");
        if replayed == 3 {
            post(12..24).await;
        }
        if answer["next"].is_null() {
            break;
        }
        (replay["from"], replay["up_to"]) = (answer["next"].clone(), answer["up_to"].clone());
        replay["until"] = answer["until"].clone();
    }
    assert_eq!(replayed, 12);
    receiver.wait_for(36).await;
    stop(relays).await;
}

#[tokio::test]
async fn what_is_kept_is_sent_again_and_compared() {
    let receiver = Receiver::accepting().await;
    let relays = pair(&rules(&receiver), "").await;
    for number in 0..30 {
        let status = if number % 3 == 0 { "read" } else { "sent" };
        assert_eq!(relays[number as usize % 2].post(event(number, status)).await.status, 200);
    }
    receiver.wait_for(20).await;
    let replayed = relays[1].command_json(&["replay", "--sink", "http"]).await;
    assert_eq!((&replayed["replayed"], &replayed["scanned"]), (&json!(20), &json!(30)), "{replayed}");
    receiver.wait_for(40).await;
    // What was sent again is not there twice.
    let replayed = relays[0].command_json(&["replay", "--sink", "http"]).await;
    assert_eq!(replayed["replayed"], 20, "{replayed}");
    receiver.wait_for(60).await;
    let compared =
        relays[0].operate("/api/v1/diff", &json!({ "rules": rules(&receiver).replace("sent", "read") })).await;
    assert_eq!(compared["diff"]["events"], 30, "{compared}");
    stop(relays).await;
}

#[tokio::test]
async fn rules_change_on_one_replica_after_the_other() {
    let (old, new) = (Receiver::accepting().await, Receiver::accepting().await);
    let relays = pair(&rules(&old), "").await;
    assert_eq!(relays[0].post(event(0, "sent")).await.status, 200);
    old.wait_for(1).await;
    let with_another = format!(
        "{}[sinks.other]\ntype = \"http\"\nurl = \"{}\"\n[[routes]]\nname = \"read\"\nwhen = {{ status = \"read\" }}\n\
         to = [\"other\"]\n",
        rules(&old),
        new.url("/")
    );
    relays[0].change_rules(&with_another);
    relays[0].operate("/api/v1/reload", &Value::Null).await;
    // The second one does not know the sink yet: what it accepts is unrouted, as its rules say.
    assert_eq!(relays[0].post(event(1, "read")).await.status, 200);
    assert_eq!(relays[1].post(event(2, "read")).await.status, 200);
    new.wait_for(1).await;
    relays[1].change_rules(&with_another);
    relays[1].operate("/api/v1/reload", &Value::Null).await;
    assert_eq!(relays[1].post(event(3, "read")).await.status, 200);
    new.wait_for(2).await;
    agree(&relays, "to know of the dead letter", |status| status["dead_letters"] == json!({ "unrouted": 1 })).await;
    assert_eq!(relays[1].get("/api/v1/routes").await["unrouted"], 1);
    assert_eq!(relays[0].get("/api/v1/routes").await["unrouted"], 0);
    stop(relays).await;
}

#[tokio::test]
async fn a_sink_that_is_gone_at_a_start_is_told_of() {
    let answer = Arc::new(AtomicU16::new(503));
    let answers = Arc::clone(&answer);
    let receiver = Receiver::start(move |_| Reply::Status(answers.load(Ordering::Relaxed))).await;
    let setup = Setup::new(&rules(&receiver));
    setup.file("relay.toml", &settings(&unique("gone"), ""));
    let relay = setup.start().await;
    assert_eq!(relay.post(event(0, "sent")).await.status, 200);
    relay.sink_is("http", "has parked it", |sink| sink["parked"] == 1).await;
    let setup = relay.kill().await;
    setup.file("routes.toml", &rules(&receiver).replace("http]", "new]").replace("[\"http\"]", "[\"new\"]"));
    let relay = setup.start().await;
    let told =
        || relay.log().into_iter().find(|line| line["message"].to_string().contains("what it may have parked stays"));
    eventually("the relay to tell", async || told().is_some()).await;
    assert_eq!(told().expect("it was there just now")["sink"], "http");

    // It is back, and what it had parked goes out.
    answer.store(200, Ordering::Relaxed);
    let before = receiver.received().len();
    relay.change_rules(&rules(&receiver));
    relay.operate("/api/v1/reload", &Value::Null).await;
    receiver.wait_for(before + 1).await;
    relay.stop().await;
}

#[tokio::test]
async fn topics_that_would_lose_events_are_refused() {
    let receiver = Receiver::accepting().await;
    let refused = async |topic: &str, made: &[(&str, &str)], expected: &[&str]| {
        let prefix = unique("refused");
        create_topic(&shared_kafka(), &format!("{prefix}.{topic}"), made).await;
        let setup = Setup::new(&receiver.routes());
        setup.file("relay.toml", &settings(&prefix, ""));
        for (arguments, code) in [(&["check", "--connect"][..], 64), (&["run"], 1)] {
            let done = setup.run(arguments, "").await;
            assert_eq!(done.code, Some(code), "{done:?}");
            let said = if code == 64 { &done.stdout } else { &done.stderr };
            assert!(expected.iter().all(|expected| said.contains(expected)), "{done:?}\n should have {expected:?}");
        }
    };
    let kept = "retention.ms is \"60000\", and should be at least";
    let bytes = "retention.bytes is \"1000000\", and should be -1";
    refused("events", &[("cleanup.policy", "compact")], &["cleanup.policy is \"compact\", and should be delete"]).await;
    refused("events", &[("retention.ms", "60000"), ("retention.bytes", "1000000")], &[kept, bytes]).await;
    let long = "max.message.bytes is \"900000\", and should be at least";
    refused("events", &[("max.message.bytes", "900000")], &[long]).await;
    refused("parked", &[("cleanup.policy", "delete")], &["cleanup.policy is \"delete\", and should be compact"]).await;
    let unclean = [("cleanup.policy", "compact"), ("unclean.leader.election.enable", "true")];
    refused("dead-letters", &unclean, &["election.enable is \"true\", and should be false"]).await;
}

#[tokio::test]
async fn topics_are_made_or_checked_without_serving() {
    let receiver = Receiver::accepting().await;
    let (prefix, setup) = (unique("checked"), Setup::new(&receiver.routes()));
    setup.file("relay.toml", &settings(&prefix, ""));
    for _ in 0..2 {
        let done = setup.run(&["check", "--connect"], "").await;
        assert_eq!(done.code, Some(0), "{done:?}");
    }
    setup.file("relay.toml", &settings(&prefix, "").replace("min_insync = 1", "min_insync = 2"));
    let done = setup.run(&["check"], "").await;
    assert!(done.stdout.contains("journal.min_insync is 2; it must be from 1 to journal.replication, 1"), "{done:?}");
    setup.file("relay.toml", &settings(&prefix, "").replace("replication = 1", "replication = 2"));
    let done = setup.run(&["check", "--connect"], "").await;
    // Each of the four.
    let too_few = done.stdout.matches("it has 1 replicas, fewer than journal.replication, 2").count();
    assert_eq!((done.code, too_few), (Some(64), 4), "{done:?}");
    let nobody = settings(&prefix, "").replace(&shared_kafka(), "127.0.0.1:9");
    setup.file("relay.toml", &nobody);
    let done = setup.run(&["check", "--connect", "--json"], "").await;
    let said: Value = serde_json::from_str(&done.stdout).expect("JSON");
    assert_eq!((done.code, &said["ok"]), (Some(1), &json!(false)), "{done:?}");
    assert!(said["problems"].to_string().contains("Kafka can't be reached at 127.0.0.1:9"), "{said}");
}

#[tokio::test]
async fn an_event_that_is_longer_than_kafka_takes_is_refused() {
    let receiver = Receiver::accepting().await;
    let setup = Setup::new(&receiver.routes());
    let more = "options = { \"message.max.bytes\" = 40000 }\n";
    setup.file("relay.toml", &settings(&unique("long"), more));
    let relay = setup.start().await;
    let long = |length: usize| event(1, "sent").replace("campaign name", &"x".repeat(length));
    assert_eq!(relay.post(long(10_000)).await.status, 200);
    let answer = relay.post(long(33_000)).await;
    assert_eq!(answer.status, 413, "{answer:?}");
    // There would be no room for its status beside it where it is parked.
    let answer = relay.post(event(1, &"\\u0001".repeat(3_500))).await;
    assert_eq!(answer.status, 413, "{answer:?}");
    receiver.wait_for(1).await;
    relay.stop().await;
}

/// Posts events that no route matches until one is answered so; how many are accepted.
async fn post_until(relay: &Relay, wanted: u16) -> usize {
    let (mut numbers, mut accepted) = (0.., 0);
    eventually("the topic's settings to take effect", async || {
        let status = relay.post(event(numbers.next().expect("no end"), "read")).await.status;
        accepted += usize::from(status == 200);
        status == wanted
    })
    .await;
    accepted
}

/// What the topic has not kept is told, and waited for by nobody.
#[tokio::test]
async fn events_that_retention_has_removed_are_told() {
    let receiver = Receiver::accepting().await;
    let prefix = unique("replicas");
    let setup = Setup::new(&rules(&receiver));
    setup.file("relay.toml", &settings(&prefix, ""));
    let relay = setup.start().await;
    relay.status_is("it has all partitions", |status| status["sinks"][0]["unheld_partitions"] == 0).await;
    relay.operate("/api/v1/sinks/http/pause", &Value::Null).await;
    for number in 0..20 {
        assert_eq!(relay.post(event(number, "sent")).await.status, 200);
    }
    relay.status_is("they wait", |status| status["sinks"][0]["lag_events"] == 20).await;
    let setup = relay.kill().await;
    empty_topic(&shared_kafka(), &format!("{prefix}.events"), 4).await;
    let relay = setup.start().await;
    relay.operate("/api/v1/sinks/http/resume", &Value::Null).await;
    let drained = relay.command(&["drain", "--timeout", "100s"]).await;
    assert_eq!(drained.code, Some(0), "{drained:?}");
    let told = relay.logged("entries are lost from the journal: its topic has not kept them until they were read");
    assert_eq!(told.iter().map(|line| line["lost"].as_u64().expect("a number")).sum::<u64>(), 20, "{told:?}");
    // And it goes on.
    assert_eq!(relay.post(event(20, "sent")).await.status, 200);
    receiver.wait_for(1).await;
    relay.stop().await;
    assert_eq!(receiver.received().len(), 1);
}

/// Its dead letter is written before the 200, and an event without that is not accepted.
#[tokio::test]
async fn what_no_route_matches_waits_for_its_dead_letter() {
    let receiver = Receiver::accepting().await;
    let (prefix, setup) = (unique("aside"), Setup::new(&rules(&receiver)));
    setup.file("relay.toml", &settings(&prefix, ""));
    let relay = setup.start().await;
    let topic = format!("{prefix}.dead-letters");
    set_topic(&shared_kafka(), &topic, &[("cleanup.policy", "compact"), ("max.message.bytes", "100")]).await;
    let early = post_until(&relay, 503).await;
    let answer = relay.post(event(1, "read")).await;
    assert_eq!(answer.status, 503, "{answer:?}");
    assert_eq!(answer.headers["retry-after"], "1");
    // What a route matches has no need of it.
    assert_eq!(relay.post(event(2, "sent")).await.status, 200);
    receiver.wait_for(1).await;

    set_topic(&shared_kafka(), &topic, &[("cleanup.policy", "compact"), ("max.message.bytes", "1048588")]).await;
    let accepted = early + post_until(&relay, 200).await;
    relay.status_is("the dead letters are there", |status| status["dead_letters"]["unrouted"] == accepted).await;
    let letters = relay.get("/api/v1/dead-letters?sink=unrouted").await;
    assert_eq!(letters["dead_letters"][0]["status"], "read", "{letters}");
    relay.stop().await;
}

#[tokio::test]
async fn what_no_route_matches_is_only_counted_without_keep() {
    let receiver = Receiver::accepting().await;
    let setup = Setup::new(&format!("{}[unrouted]\nkeep = false\n", rules(&receiver)));
    setup.file("relay.toml", &settings(&unique("counted"), ""));
    let relay = setup.start().await;
    for (number, status) in [(0, "read"), (1, "sent"), (2, "read")] {
        assert_eq!(relay.post(event(number, status)).await.status, 200);
    }
    receiver.wait_for(1).await;
    assert_eq!(relay.get("/api/v1/routes").await["unrouted"], 2);
    assert_eq!(relay.get("/api/v1/status").await["dead_letters"], json!({}));
    relay.stop().await;
}

#[tokio::test]
async fn what_nobody_can_deliver_shows() {
    let receiver = Receiver::accepting().await;
    let setup = Setup::new(&rules(&receiver));
    let refused = "options = { \"session.timeout.ms\" = \"100\" }\n";
    setup.file("relay.toml", &settings(&unique("unheld"), refused));
    let done = setup.run(&["check", "--connect"], "").await;
    assert!(done.code == Some(64) && done.stdout.contains("can't be joined: JoinGroup failed"), "{done:?}");
    let relay = setup.start().await;
    assert_eq!(relay.post(event(0, "sent")).await.status, 200);
    let sink = relay.sink_is("http", "has a reason", |sink| !sink["last_error"].is_null()).await;
    assert_eq!((&sink["unheld_partitions"], &sink["last_error"]["kind"]), (&json!(4), &json!("not_joined")), "{sink}");
    assert!(sink["last_error"]["text"].as_str().is_some_and(|text| text.contains("session timeout")), "{sink}");
    relay.status_is("it tells", |status| status["replicas"].as_array().is_some_and(|there| there.len() == 1)).await;
    assert_eq!(scrape(&relay).await["relay_sink_unheld_partitions{sink=\"http\"}"], 4.0);
    let shown = relay.command(&["status"]).await;
    assert!(shown.stdout.contains("unheld"), "{shown:?}");
    relay.stop().await;
}

/// Sooner than the others notice by themselves: its figures are another's by then.
#[tokio::test]
async fn a_relay_that_ends_in_order_is_gone_at_once() {
    let receiver = Receiver::start(|_| Reply::Status(503)).await;
    let [first, second] = pair(&rules(&receiver), "").await;
    for number in 0..8 {
        assert_eq!(first.post(event(number, "sent")).await.status, 200);
    }
    first.sink_is("http", "has parked all", |sink| sink["parked"] == 8).await;
    second.stop().await;
    let alone = first.status_is("it is alone", |status| status["replicas"].as_array().map(Vec::len) == Some(1));
    tokio::time::timeout(Duration::from_secs(5), alone).await.expect("it was told");
    let all = first.sink_is("http", "has all of it", |sink| sink["unheld_partitions"] == 0).await;
    assert_eq!(all["parked"], 8, "{all}");
    first.stop().await;
}
