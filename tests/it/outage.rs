//! A broker that is absent at the start, comes, stops, is killed and comes back, while events come in: nothing is lost,
//! nothing gets stuck, and another sink does not feel it. The same for every kind of broker.

use std::time::{Duration, Instant};

use crate::brokers::{Inbox, OwnBroker, receiver};
use crate::harness::{Reply, Setup};
use crate::load::{Acked, Load, latencies};

/// Events in each phase.
const PER_PHASE: usize = 300;
/// How long a phase lasts at least: longer than an attempt's time-out below.
const OUTAGE: Duration = Duration::from_secs(3);
/// What a sink needs for short outages: attempts end soon, and it is tried again soon.
pub(crate) const IMPATIENT: &str = r#"
timeout = "2s"
delivery = { backoff = { initial = "100ms", max = "1s" }, breaker = { failures = 5, probe = "500ms" } }
"#;

/// Walks through all of it. `sink` is the table of the sink `broker`, whose broker is away; `inbox` what arrives there.
pub(crate) async fn walk(broker: &OwnBroker, sink: &str, inbox: &Inbox) {
    let (server, http) = receiver(|_| Reply::Status(200)).await;
    let rules = format!(
        "[sinks.broker]\n{sink}{IMPATIENT}\n[sinks.http]\ntype = \"http\"\nurl = \"{}\"\n\
         [[routes]]\nname = \"all\"\nto = [\"broker\", \"http\"]\n",
        server.url("/")
    );
    let relay = Setup::new(&rules).start().await;
    let load = Load::new(4, Duration::from_millis(20));
    load.to(Some(relay.address()));
    load.more(100).await;
    let phase = async |what: &str| {
        let since = Instant::now();
        let mut events = load.more(PER_PHASE).await;
        while since.elapsed() < OUTAGE {
            events.extend(load.more(1).await);
        }
        let latencies = latencies(&format!("HTTP, {what}"), &events, &http).await;
        (events, latencies)
    };
    let caught_up = async |what: &str, events: Vec<Acked>| {
        let since = Instant::now();
        inbox.wait_for_ids(what, events.into_iter().map(|acked| acked.id)).await;
        eprintln!("caught up {:.1?} after the broker {what}", since.elapsed());
    };

    let (events, absent) = phase("broker absent at the start").await;
    broker.start_again().await;
    caught_up("came", events).await;
    let (events, before) = phase("broker there").await;
    caught_up("was there", events).await;
    broker.stop().await;
    let (events, stopped) = phase("broker stopped").await;
    broker.start_again().await;
    caught_up("came back after a stop", events).await;
    broker.kill().await;
    let (events, killed) = phase("broker killed").await;
    broker.start_again().await;
    caught_up("came back after a kill", events).await;

    let posted = load.stop().await;
    http.wait_for_ids("HTTP", posted.ids()).await;
    inbox.wait_for_ids("the broker", posted.ids()).await;
    relay.stop().await;
    let (at_http, at_broker) = (http.now(), inbox.now());
    posted.check("HTTP", &at_http);
    posted.check("the broker", &at_broker);
    assert_eq!(at_http.repeated(), 0, "an undisturbed sink gets everything once");
    eprintln!("{} events, {} of them repeated at the broker", at_broker.ids.len(), at_broker.repeated());
    for (what, (median, p99)) in [("absent", absent), ("stopped", stopped), ("killed", killed)] {
        // Whoever waits for the broker waits for an attempt's time-out, or for the whole outage.
        let delayed =
            median > before.0 * 5 + Duration::from_millis(50) || p99 > before.1 * 5 + Duration::from_millis(1500);
        assert!(!delayed, "HTTP is delayed while the broker is {what}: {median:?}, {p99:?}; before: {before:?}");
    }
}
