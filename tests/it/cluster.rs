//! The journal on Kafka: three brokers, and replicas of the relay that are killed, frozen, added and taken away.
//!
//! All of it is one test, since it takes a while to start three brokers, which end with it. Each scenario has topics of its
//! own. `CLUSTER_EVENTS` says how many events the long one posts.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use http::Request;
use http_body_util::Full;
use rdkafka::Message as _;
use rustix::process::Signal;

use crate::brokers::{Arrival, Arrived, Inbox, KafkaReader, OwnBroker, consumer, create_topic, receiver, unique};
use crate::fleet::{Fault, Fleet};
use crate::harness::{Receiver, Relay, Reply, Setup, event, eventually, within};
use crate::load::{Acked, Load};

/// How often a condition is looked at.
const POLL: Duration = Duration::from_millis(50);
/// Partitions of each of the relay's topics.
const PARTITIONS: i32 = 6;
/// The time after which a replica that says nothing has lost its lanes, where a scenario waits for that.
const SESSION: (Duration, &str) = (Duration::from_secs(10), "\"session.timeout.ms\" = \"10000\"");

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_stands_what_comes_and_goes() {
    let kafka = OwnBroker::start_kafka_nodes(3).await;
    topics_are_made_before_anything_is_served(&kafka).await;
    a_deleted_replicas_parked_deliveries_go_out_from_another(&kafka).await;
    a_frozen_replica_commits_nothing(&kafka).await;
    too_few_in_sync_replicas(&kafka).await;
    a_broker_with_the_only_copies_hangs(&kafka).await;
    everything_arrives(&kafka).await;
}

/// Also where brokers hear of them one after the other.
async fn topics_are_made_before_anything_is_served(kafka: &OwnBroker) {
    for number in 0..3 {
        let shared = Shared::new(kafka, &format!("made-{number}"), "", "");
        let done = shared.replica().run(&["check", "--connect"], "").await;
        assert_eq!(done.code, Some(0), "{done:?}");
    }
}

/// What the replicas of one relay have in common.
struct Shared {
    prefix: String,
    rules: String,
    settings: String,
}

impl Shared {
    /// With topics that nobody else uses; `options` are librdkafka's.
    fn new(kafka: &OwnBroker, name: &str, rules: &str, options: &str) -> Self {
        let (prefix, brokers) = (unique(name), kafka.address());
        let brokers: Vec<_> = brokers.split(',').collect();
        let settings = format!(
            "[journal]\nkind = \"kafka\"\nbrokers = {brokers:?}\nprefix = \"{prefix}\"\npartitions = {PARTITIONS}\n\
             replication = 3\nmin_insync = 2\noptions = {{ {options} }}\n"
        );
        Self { prefix, rules: rules.to_owned(), settings }
    }

    fn replica(&self) -> Setup {
        let setup = Setup::new(&self.rules);
        setup.file("relay.toml", &self.settings);
        setup
    }
}

/// Waits until a sink has settled all that there is.
async fn settled(relay: &Relay, sink: &str) {
    relay.sink_is(sink, "has settled everything", |sink| sink["lag_events"] == 0 && sink["parked"] == 0).await;
}

/// A request with an event for each of these messages.
fn batch(messages: impl Iterator<Item = u32>) -> String {
    let events: Vec<_> = messages.map(|message| event(message, "sent")).collect();
    format!("[{}]", events.join(","))
}

// ---- everything arrives ------------------------------------------------------------------------------------------

/// How many replicas there are at the beginning.
const AT_FIRST: usize = 3;
/// How many deliveries each sink may have under way.
const AT_ONCE: usize = 64;
/// How many senders post at once.
const SENDERS: u32 = 48;
/// The time over which they spread the events, so that there are always some when something happens.
const SPREAD: Duration = Duration::from_secs(150);
/// How often a lane writes what it has settled, at least.
const WRITES_PER_SECOND: usize = 1;
/// How many new events have to arrive before the next thing happens.
const AFTERWARDS: usize = 100;

/// What happens: from three replicas to one, and to four.
const FAULTS: [Fault; 8] = [
    Fault::ReplicaKilled(0),
    Fault::BrokerKilled(1),
    Fault::ReplicaKilled(2),
    Fault::BrokerKilled(2),
    Fault::ScaledIn(&[0, 2]),
    Fault::BrokerKilled(3),
    Fault::ScaledOut(&[0, 2, 3]),
    Fault::ReplicaKilled(3),
];

/// Where the events of [`everything_arrives`] go: both sinks get all of them.
struct Sinks {
    rules: String,
    http: Inbox,
    kafka: KafkaReader,
    _receiver: Receiver,
}

impl Sinks {
    async fn new(kafka: &OwnBroker) -> Self {
        let (brokers, topic) = (kafka.address(), unique("cluster-sink"));
        create_topic(&brokers, &topic, &[]).await;
        let (receiver, http) = receiver(|_| Reply::Status(200)).await;
        let delivery = format!(
            "order_by = \"message_id\", concurrency = {AT_ONCE}, backoff = {{ initial = \"100ms\", max = \"1s\" }}, \
             breaker = {{ failures = 10, probe = \"500ms\" }}"
        );
        let rules = format!(
            r#"
[sinks.http]
type = "http"
url = "{}"
delivery = {{ {delivery} }}
[sinks.kafka]
type = "kafka"
brokers = ["{brokers}"]
topic = "{topic}"
delivery = {{ {delivery} }}
[[routes]]
name = "all"
to = ["http", "kafka"]
"#,
            receiver.url("/"),
            brokers = brokers.replace(',', "\", \"")
        );
        Self { rules, http, kafka: KafkaReader::new(&brokers, &[&topic]), _receiver: receiver }
    }

    fn all(&self) -> [(&'static str, &Inbox); 2] {
        [("HTTP", &self.http), ("Kafka", &self.kafka.inbox)]
    }

    async fn wait_for(&self, acked: &[Acked]) {
        for (what, inbox) in self.all() {
            inbox.wait_for_ids(what, acked.iter().map(|acked| acked.id.clone())).await;
        }
    }
}

fn events() -> usize {
    std::env::var("CLUSTER_EVENTS").map_or(20_000, |number| number.parse().expect("CLUSTER_EVENTS is a number"))
}

/// Waits until so many events have been acknowledged in all, for as long as it takes if there always are some more.
async fn reach(load: &Load, count: usize) {
    while load.count() < count {
        load.more(1).await;
    }
}

/// Whatever happens to replicas and brokers: all that got a 200 arrives, in order, and little of it twice.
async fn everything_arrives(kafka: &OwnBroker) {
    let (since, events) = (Instant::now(), events());
    let sinks = Sinks::new(kafka).await;
    let shared = Shared::new(kafka, "cluster", &sinks.rules, "");
    let mut fleet = Fleet::new(|| shared.replica());
    for replica in 0..AT_FIRST {
        fleet.start(replica).await;
    }
    let load = Load::new(SENDERS, SPREAD * SENDERS / u32::try_from(events).expect("not so many"));
    load.to(Some(fleet.front()));
    for (number, fault) in (1..).zip(FAULTS) {
        reach(&load, events * number / (FAULTS.len() + 1)).await;
        let before = load.count();
        fleet.suffer(fault, kafka).await;
        let over = Instant::now();
        let acked = load.more(AFTERWARDS).await;
        sinks.wait_for(&acked).await;
        eprintln!(
            "{fault:?}: {} events got a 200 meanwhile; the next {} have arrived {:.1?} after it was over",
            load.count() - before - acked.len(),
            acked.len(),
            over.elapsed()
        );
    }
    reach(&load, events).await;
    let posted = load.stop().await;
    sinks.wait_for(&posted.acked).await;
    fleet.end().await;
    for (what, inbox) in sinks.all() {
        inbox.look(|arrived| {
            posted.check(what, arrived);
            let (repeats, most) = (arrived.all.len() - arrived.ids.len(), most_repeats(events));
            eprintln!(
                "everything arrives, {what}: {} events got a 200, {} different ones arrived, {repeats} repeats (at most \
                 {most}), after {:.0?}",
                posted.acked.len(),
                arrived.ids.len(),
                since.elapsed()
            );
            assert!(repeats <= most, "{what}: {repeats} repeats are more than was under way: {most}");
        });
    }
}

/// Each time that something ends or is added, partitions may move between all replicas. Of each the deliveries are repeated
/// that were under way, and those that it had settled since it last wrote how far it is: as many as come in between two
/// writes.
fn most_repeats(events: usize) -> usize {
    let rate = events / usize::try_from(SPREAD.as_secs()).expect("not so long") + 1;
    let between_writes = rate / WRITES_PER_SECOND + 1;
    FAULTS.iter().map(|fault| fault.count() * AT_FIRST * (AT_ONCE + between_writes)).sum()
}

// ---- a frozen replica --------------------------------------------------------------------------------------------

/// How many deliveries each replica has under way there.
const FEW: usize = 4;
/// How long each of them takes.
const ANSWER_AFTER: Duration = Duration::from_millis(200);

/// Posts one event after the other through a relay, to see who delivers them.
struct Probe<'a> {
    through: &'a Relay,
    inbox: &'a Inbox,
    next: u32,
}

impl Probe<'_> {
    /// Until it was this replica that has delivered one.
    async fn until_delivered_by(&mut self, replica: &str) {
        eventually(&format!("a delivery by the replica {replica}"), async || {
            let [id] = &*self.through.post(event(self.next, "sent")).await.ids() else { panic!("one event, one id") };
            self.next += 1;
            self.inbox.wait("a probe", |arrived| arrived.ids.contains_key(id)).await;
            self.inbox.look(|arrived| {
                let first = arrived.all.iter().find(|arrival| arrival.id() == id);
                first.is_some_and(|arrival| by(arrival, replica))
            })
        })
        .await;
    }
}

fn by(arrival: &Arrival, replica: &str) -> bool {
    arrival.header("x-replica") == replica
}

/// How many of the arrivals from the `from`th on are of events that had arrived before.
fn repeats(arrived: &Arrived, from: usize) -> usize {
    let mut before: HashSet<&str> = arrived.all[..from].iter().map(Arrival::id).collect();
    arrived.all[from..].iter().filter(|arrival| !before.insert(arrival.id())).count()
}

/// A replica that stands still for longer than its session, and then goes on where it was, does not disturb the one that
/// has taken over: it repeats no more than it may have under way, and what it commits does not count.
async fn a_frozen_replica_commits_nothing(kafka: &OwnBroker) {
    let (server, inbox) = receiver(|_| Reply::After(ANSWER_AFTER, 200)).await;
    let rules = format!(
        "[sinks.slow]\ntype = \"http\"\nurl = \"{}\"\nheaders = {{ x-replica = \"${{REPLICA}}\" }}\n\
         delivery = {{ concurrency = {FEW} }}\n[[routes]]\nname = \"all\"\nto = [\"slow\"]\n",
        server.url("/")
    );
    let shared = Shared::new(kafka, "frozen", &rules, SESSION.1);
    let [frozen, other] = ["frozen", "other"].map(|replica| shared.replica().env("REPLICA", replica));
    let (frozen, other) = (frozen.start().await, other.start().await);
    let mut probe = Probe { through: &other, inbox: &inbox, next: 0 };
    probe.until_delivered_by("other").await;
    probe.until_delivered_by("frozen").await;

    // Frozen in the middle of its part of a backlog, which the other one then delivers.
    let begin = inbox.look(|arrived| arrived.all.len());
    let backlog = other.post(batch(100_000..100_300)).await.ids();
    let busy =
        |arrived: &Arrived| arrived.all[begin..].iter().filter(|arrival| by(arrival, "frozen")).nth(15 * FEW).is_some();
    inbox.wait("the replica that is to be frozen", busy).await;
    frozen.signal(Signal::STOP);
    let since = Instant::now();
    inbox.wait_for_ids("the receiver of the other replica", backlog.iter().cloned()).await;
    settled(&other, "slow").await;
    tokio::time::sleep_until((since + 2 * SESSION.0).into()).await;
    let woken = inbox.look(|arrived| arrived.all.len());
    frozen.signal(Signal::CONT);
    let cold = since.elapsed();

    // Both work on.
    probe.until_delivered_by("frozen").await;
    let mut after = frozen.post(batch(200_000..200_050)).await.ids();
    after.extend(other.post(batch(200_050..200_100)).await.ids());
    inbox.wait_for_ids("the receiver", after.iter().cloned()).await;
    for relay in [frozen, other] {
        settled(&relay, "slow").await;
        relay.stop().await;
    }
    let arrived = inbox.now();
    let taken_over = arrived.all[begin..woken].len() - backlog.len();
    let by_the_woken = repeats(&arrived, woken);
    eprintln!(
        "a frozen replica: frozen for {cold:.1?} of {} deliveries, {taken_over} repeated when the other took over, \
         {by_the_woken} after it was woken",
        backlog.len()
    );
    // What was under way, and what can be settled in two seconds, by when progress is written even where that is slow: it
    // has delivered for three.
    let in_time = FEW * usize::try_from(Duration::from_secs(2).as_millis() / ANSWER_AFTER.as_millis()).unwrap();
    assert!(taken_over <= FEW + in_time, "{taken_over} repeats of the frozen replica's deliveries");
    assert!(by_the_woken <= FEW, "{by_the_woken} repeats after the replica was woken");
}

// ---- too few brokers ---------------------------------------------------------------------------------------------

/// How long a sender may wait for a refusal.
const REFUSED_WITHIN: Duration = Duration::from_secs(20);

/// Posts events of this and the next messages until one is accepted; the others have to be refused for now.
async fn until_accepted(relay: &Relay, first: u32) -> Vec<String> {
    let mut messages = first..;
    let accepted = async {
        loop {
            let answer = relay.post(event(messages.next().expect("no end"), "sent")).await;
            match answer.status {
                200 => return answer.ids(),
                503 => tokio::time::sleep(POLL).await,
                _ => panic!("{answer:?}"),
            }
        }
    };
    within("an event to be accepted", accepted).await
}

async fn ready(relay: &Relay) -> u16 {
    let request = Request::get("/readyz").header("host", "relay").body(Full::default()).expect("a request");
    relay.ask(request).await.status
}

/// With two of three brokers away nothing is accepted, and with them back it is, by itself.
async fn too_few_in_sync_replicas(kafka: &OwnBroker) {
    const AWAY: [usize; 2] = [2, 3];
    let (server, inbox) = receiver(|_| Reply::Status(200)).await;
    let relay = Shared::new(kafka, "few", &server.routes(), "").replica().start().await;
    let mut accepted = until_accepted(&relay, 0).await;
    for node in AWAY {
        kafka.kill_node(node).await;
    }
    let mut longest = Duration::ZERO;
    for round in 1..=2 {
        let refused = join_all((0..8).map(async |message| {
            let since = Instant::now();
            (relay.post(event(round * 1000 + message, "sent")).await, since.elapsed())
        }));
        for (answer, took) in refused.await {
            assert_eq!(answer.status, 503, "{answer:?}");
            assert!(answer.header("retry-after").parse::<u32>().is_ok_and(|seconds| seconds > 0), "{answer:?}");
            longest = longest.max(took);
        }
    }
    assert!(longest < REFUSED_WITHIN, "a refusal took {longest:?}");
    eventually("the relay to be unready", async || ready(&relay).await == 503).await;
    for node in AWAY {
        kafka.start_node_again(node).await;
    }
    let back = Instant::now();
    accepted.extend(until_accepted(&relay, 10_000).await);
    eprintln!("too few brokers: refused within {longest:.1?}; accepted again after {:.1?}", back.elapsed());
    eventually("the relay to be ready", async || ready(&relay).await == 200).await;
    kafka.in_sync().await;
    accepted.extend(until_accepted(&relay, 20_000).await);
    inbox.wait_for_ids("HTTP", accepted).await;
    settled(&relay, "http").await;
    relay.stop().await;
}

// ---- a broker that hangs -------------------------------------------------------------------------------------

/// A broker that says nothing for a while is left behind, and nobody leads the partitions of which it has the only copy. When it
/// goes on, clients hear that from it for a moment, and librdkafka may take it for good: then other clients have to find them.
async fn a_broker_with_the_only_copies_hangs(kafka: &OwnBroker) {
    const HANGS: usize = 2;
    let (server, inbox) = receiver(|_| Reply::Status(200)).await;
    let mut shared = Shared::new(kafka, "hangs", &server.routes(), "");
    shared.settings = shared.settings.replace("replication = 3\nmin_insync = 2", "replication = 1\nmin_insync = 1");
    let relay = shared.replica().start().await;
    let everywhere = relay.post(batch(0..100)).await.ids();
    inbox.wait_for_ids("HTTP", everywhere).await;
    kafka.signal_node(HANGS, Signal::STOP);
    kafka.leaderless(&format!("{}.events", shared.prefix)).await;
    let load = Load::new(8, POLL);
    load.to(Some(relay.address()));
    kafka.signal_node(HANGS, Signal::CONT);
    let since = Instant::now();
    // Every partition takes events again, and gives them.
    eventually("events to be accepted by all partitions", async || relay.post(batch(1000..1100)).await.status == 200)
        .await;
    let accepted = since.elapsed();
    let acked = load.stop().await.acked;
    let everywhere = relay.post(batch(2000..2100)).await.ids();
    inbox.wait_for_ids("HTTP", acked.into_iter().map(|acked| acked.id).chain(everywhere)).await;
    settled(&relay, "http").await;
    eprintln!(
        "a broker hangs: all partitions have taken events after {accepted:.1?}, and given them after {:.1?}",
        since.elapsed()
    );
    relay.stop().await;
    kafka.in_sync().await;
}

// ---- a deleted replica -------------------------------------------------------------------------------------------

/// What a replica has parked is tried again by another when it is gone with all that it had.
async fn a_deleted_replicas_parked_deliveries_go_out_from_another(kafka: &OwnBroker) {
    const EVENTS: u32 = 5;
    let up = Arc::new(AtomicBool::new(false));
    let is_up = Arc::clone(&up);
    let server = Receiver::start(move |_| Reply::Status(if is_up.load(Ordering::Relaxed) { 200 } else { 503 })).await;
    let rules = format!(
        "[sinks.http]\ntype = \"http\"\nurl = \"{}\"\n\
         delivery = {{ schedule = [\"15s\"], breaker = {{ failures = 1000, probe = \"1s\" }} }}\n\
         [[routes]]\nname = \"all\"\nto = [\"http\"]\n",
        server.url("/")
    );
    let shared = Shared::new(kafka, "deleted", &rules, SESSION.1);
    let deleted = shared.replica().start().await;
    let ids = deleted.post(batch(0..EVENTS)).await.ids();
    deleted.sink_is("http", "has parked all", |sink| sink["parked"] == EVENTS).await;
    // The replica knows of them before Kafka does.
    let parked = consumer(&kafka.address(), &[&format!("{}.parked", shared.prefix)], PARTITIONS);
    let mut keys = HashSet::new();
    eventually("the parked deliveries in Kafka", async || {
        if let Ok(message) = parked.recv().await {
            let key = String::from_utf8_lossy(message.key().expect("a key")).into_owned();
            // What says that a lane was opened is none.
            keys.extend(Some((message.partition(), key)).filter(|(_, key)| !key.ends_with("/opened")));
        }
        keys.len() == ids.len()
    })
    .await;
    drop(deleted.kill().await);
    let since = Instant::now();
    up.store(true, Ordering::Relaxed);
    let heir = shared.replica().start().await;
    eventually("second attempts", async || server.received().len() >= 2 * ids.len()).await;
    eprintln!("a deleted replica: its parked deliveries have gone out after {:.1?}", since.elapsed());
    settled(&heir, "http").await;
    heir.stop().await;
    let mut attempts: HashMap<String, Vec<String>> = HashMap::new();
    for request in server.received() {
        attempts.entry(request.id().to_owned()).or_default().push(request.header("relay-attempt").to_owned());
    }
    let expected = ids.into_iter().map(|id| (id, vec!["1".to_owned(), "2".to_owned()])).collect();
    assert_eq!(attempts, expected);
}
