//! The `rabbitmq` sink against a real broker.

use std::time::{Duration, Instant};

use serde_json::Value;

use crate::brokers::{Amqp, AmqpReader, Kind, OwnBroker, receiver, shared_amqp, unique};
use crate::harness::{Reply, Setup, event, eventually};
use crate::load::{Load, latencies};
use crate::outage;
use crate::rejections::Rejections;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_may_be_absent_stop_and_be_killed() {
    let broker = OwnBroker::start(Kind::RabbitMq).await;
    let (url, name) = (broker.address(), unique("outage"));
    Amqp::declare(&url, &name, &name).await;
    broker.stop().await;
    let reader = AmqpReader::new(&url, &name);
    let sink = format!("type = \"rabbitmq\"\nurls = [\"{url}\"]\nexchange = \"{name}\"\nrouting_key = \"{{status}}\"");
    outage::walk(&broker, &sink, &reader.inbox).await;
    drop(reader);
    a_memory_alarm_slows_and_repeats_nothing(&broker).await;
}

/// The broker blocks publishers for longer than an attempt may take: that is slow, and not gone.
async fn a_memory_alarm_slows_and_repeats_nothing(broker: &OwnBroker) {
    let (url, name) = (broker.address(), unique("alarm"));
    Amqp::declare(&url, &name, &name).await;
    let reader = AmqpReader::new(&url, &name);
    let (server, http) = receiver(|_| Reply::Status(200)).await;
    let rules = format!(
        "[sinks.ops]\ntype = \"rabbitmq\"\nurls = [\"{url}\"]\nexchange = \"{name}\"\nrouting_key = \"{{status}}\"\n\
         timeout = \"3s\"\n[sinks.http]\ntype = \"http\"\nurl = \"{}\"\n\
         [[routes]]\nname = \"all\"\nto = [\"ops\", \"http\"]\n",
        server.url("/")
    );
    let relay = Setup::new(&rules).start().await;
    let load = Load::new(4, Duration::from_millis(20));
    load.to(Some(relay.address()));
    let events = load.more(100).await;
    let before = latencies("HTTP, before the memory alarm", &events, &http).await;
    reader.inbox.wait_for_ids("RabbitMQ", events.into_iter().map(|acked| acked.id)).await;

    broker.ctl(&["set_vm_memory_high_watermark", "0.00000001"]).await;
    eventually("the broker to block", async || !relay.logged("the broker blocks publishers").is_empty()).await;
    let (since, arrived) = (Instant::now(), reader.inbox.now().all.len());
    let mut events = load.more(200).await;
    // Longer than an attempt may take, by far.
    while since.elapsed() < Duration::from_secs(8) {
        events.extend(load.more(1).await);
    }
    let during = latencies("HTTP, during the memory alarm", &events, &http).await;
    let blocked = reader.inbox.now().all.len();
    broker.ctl(&["set_vm_memory_high_watermark", "0.4"]).await;
    load.more(50).await;

    let posted = load.stop().await;
    let at_broker = reader.inbox.wait_for_ids("RabbitMQ after the alarm", posted.ids()).await;
    http.wait_for_ids("HTTP", posted.ids()).await;
    let log = relay.stop().await;
    posted.check("RabbitMQ", &at_broker);
    posted.check("HTTP", &http.now());
    let failed: Vec<_> = log.iter().filter(|line| line["message"] == "attempt failed").collect();
    assert!(failed.is_empty(), "a broker that blocks is slow, and not gone: {failed:#?}");
    assert_eq!(reader.inbox.now().repeated(), 0, "a message came twice");
    assert!(blocked < arrived + events.len() / 2, "there was no alarm: {arrived} before it, {blocked} during it");
    let limit = before.1 * 5 + Duration::from_millis(500);
    assert!(during.1 < limit, "HTTP is delayed during the alarm: {during:?}; before: {before:?}");
}

#[tokio::test]
async fn an_unroutable_message_is_rejected_alone() {
    let (url, name) = (shared_amqp(), unique("unroutable"));
    let amqp = Amqp::connect(&url).await;
    amqp.declare_exchange(&name).await;
    amqp.declare_queue(&name, &name, "read.*").await;
    let reader = AmqpReader::new(&url, &name);
    let rules = format!(
        "[sinks.ops]\ntype = \"rabbitmq\"\nurls = [\"{url}\"]\nexchange = \"{name}\"\n\
         routing_key = \"{{status}}.{{sender_id}}\"\n[[routes]]\nname = \"all\"\nto = [\"ops\"]\n"
    );
    let mut rejections = Rejections::new(Setup::new(&rules), "ops", "unroutable").await;
    for number in 0..50 {
        rejections.post_hopeless(&event(number, "sent")).await;
        rejections.post_good(&event(number, "read")).await;
    }
    rejections.check(&reader.inbox).await;
}

/// The broker closes the channel for a message that it refuses, and does not say which that was.
#[tokio::test]
async fn a_refused_message_is_rejected_alone() {
    let (url, name) = (shared_amqp(), unique("refused"));
    Amqp::declare(&url, &name, &name).await;
    let reader = AmqpReader::new(&url, &name);
    let rules = format!(
        "[sinks.ops]\ntype = \"rabbitmq\"\nurls = [\"{url}\"]\nexchange = \"{{/exchange|{name}}}\"\nrouting_key = \"x\"\n\
         [[routes]]\nname = \"all\"\nto = [\"ops\"]\n"
    );
    // No client may publish there.
    let internal = |number| event(number, "sent").replacen('{', "{\"exchange\":\"amq.rabbitmq.trace\",", 1);
    let mut rejections = Rejections::new(Setup::new(&rules), "ops", "not_authorized").await;
    rejections.hold().await;
    for number in 0..300 {
        match number % 50 {
            7 => rejections.post_hopeless(&internal(number)).await,
            _ => rejections.post_good(&event(number, "sent")).await,
        }
    }
    rejections.let_go().await;
    // What the broker had taken before it refused another, it gets once more.
    rejections.check_up_to(2, &reader.inbox).await;
}

#[tokio::test]
async fn headers_that_fit_into_no_frame_are_rejected_alone() {
    let (url, name) = (shared_amqp(), unique("frames"));
    Amqp::declare(&url, &name, &name).await;
    let reader = AmqpReader::new(&url, &name);
    let rules = format!(
        "[sinks.ops]\ntype = \"rabbitmq\"\nurls = [\"{url}?frame_max=8192\"]\nexchange = \"{name}\"\nrouting_key = \"x\"\n\
         headers = {{ name = \"{{campaign_name}}\" }}\n[[routes]]\nname = \"all\"\nto = [\"ops\"]\n"
    );
    let mut rejections = Rejections::new(Setup::new(&rules), "ops", "headers_too_large").await;
    let padded = |number, length| event(number, "sent").replace("campaign name", &"x".repeat(length));
    for number in 0..10 {
        // The other headers take some 300 bytes.
        rejections.post_good(&padded(number, 7700)).await;
        rejections.post_hopeless(&padded(number + 100, 7900 + 500 * number as usize)).await;
    }
    rejections.check(&reader.inbox).await;
}

#[tokio::test]
async fn rights_that_are_missing() {
    let broker = OwnBroker::start(Kind::RabbitMq).await;
    let (admin, name) = (broker.address(), unique("rights"));
    Amqp::declare(&admin, &name, &name).await;
    let reader = AmqpReader::new(&admin, &name);
    let url = admin.replace("guest:guest", "relay:secret");
    broker.ctl(&["add_user", "relay", "secret"]).await;
    broker.ctl(&["set_permissions", "relay", "^$", &name, ".*"]).await;
    broker.ctl(&["set_topic_permissions", "relay", &name, "^read", ".*"]).await;
    broker.ctl(&["eval", "application:set_env(rabbit, max_message_size, 3000)."]).await;
    let rules = |key: &str| {
        format!(
            "[sinks.ops]\ntype = \"rabbitmq\"\nurls = [\"{url}\"]\nexchange = \"{name}\"\nrouting_key = \"{key}\"\n\
             {}\n[[routes]]\nname = \"all\"\nto = [\"ops\"]\n",
            outage::IMPATIENT
        )
    };
    let large = |number| event(number, "read").replace("campaign name", &"x".repeat(3000));
    for (kind, hopeless) in
        [("not_authorized", (|number| event(number, "sent")) as fn(u32) -> String), ("message_too_large", large)]
    {
        let mut rejections = Rejections::new(Setup::new(&rules("{status}.{sender_id}")), "ops", kind).await;
        rejections.hold().await;
        for number in 0..100 {
            match number % 40 {
                7 => rejections.post_hopeless(&hopeless(number)).await,
                _ => rejections.post_good(&event(number, "read")).await,
            }
        }
        rejections.let_go().await;
        rejections.check_up_to(2, &reader.inbox).await;
        reader.inbox.clear();
    }

    // No event is at fault where all have the same key: they wait until the right is granted.
    let relay = Setup::new(&rules("sent")).start().await;
    for number in 0..20 {
        relay.post(event(number, "sent")).await.ids();
    }
    let failed = relay.sink_is("ops", "is only probed", |sink| sink["breaker"] == "open").await;
    assert_eq!(failed["last_error"]["kind"], "not_authorized", "{failed}");
    broker.ctl(&["set_topic_permissions", "relay", &name, ".*", ".*"]).await;
    reader.inbox.wait_for_events("the exchange that may be written to", 20).await;
    relay.stop().await;
    assert_eq!(reader.inbox.now().repeated(), 0);
}

/// An operator reads why there is no connection, and nothing that is secret.
#[tokio::test]
async fn the_broker_says_why_it_lets_nobody_in() {
    let (url, name) = (shared_amqp(), unique("why"));
    Amqp::declare(&url, &name, &name).await;
    let host = url.trim_end_matches("%2f");
    for (urls, more, expected) in [
        (
            url.clone(),
            "declare = { type = \"fanout\" }",
            format!("406 PRECONDITION_FAILED - inequivalent arg 'type' for exchange '{name}'"),
        ),
        (url.replace("guest:guest", "guest:wrong"), "", "403 ACCESS_REFUSED - Login was refused".to_owned()),
        (format!("{host}none"), "", "530 NOT_ALLOWED - vhost none not found".to_owned()),
        (format!("{host}${{VHOST}}"), "", "530 NOT_ALLOWED - vhost … not found".to_owned()),
    ] {
        let rules = format!(
            "[sinks.ops]\ntype = \"rabbitmq\"\nurls = [\"{urls}\"]\nexchange = \"{name}\"\n{more}\n\
             [[routes]]\nname = \"all\"\nto = [\"ops\"]\n"
        );
        let relay = Setup::new(&rules).env("VHOST", "topsecret").start().await;
        relay.post(event(1, "sent")).await.ids();
        let failed = relay.sink_is("ops", "has failed", |sink| sink["last_error"] != Value::Null).await;
        let text = failed["last_error"]["text"].as_str().unwrap();
        assert!(text.contains(&expected), "{text}\n should have {expected}");
        let log = relay.stop().await;
        assert!(!format!("{failed} {log:?}").contains("topsecret"), "{failed} {log:#?}");
    }
}

#[tokio::test]
async fn a_missing_exchange_holds_up_no_other_and_gets_its_events_when_it_is_declared() {
    let (url, name) = (shared_amqp(), unique("missing"));
    let exchanges = ["one", "two"].map(|exchange| format!("{name}.{exchange}"));
    Amqp::declare(&url, &exchanges[0], &exchanges[0]).await;
    let one = AmqpReader::new(&url, &exchanges[0]);
    let rules = format!(
        "[sinks.ops]\ntype = \"rabbitmq\"\nurls = [\"{url}\"]\nexchange = \"{name}.{{status}}\"\nrouting_key = \"x\"\n\
         delivery = {{ backoff = {{ initial = \"50ms\", max = \"200ms\" }} }}\n\
         [[routes]]\nname = \"all\"\nto = [\"ops\"]\n"
    );
    let relay = Setup::new(&rules).start().await;
    for number in 0..30 {
        relay.post(event(number, "two")).await.ids();
    }
    // Those fail over and over by now, with nothing else to do for the sink.
    eventually("a third attempt", async || relay.logged("attempt failed").len() > 1).await;
    for number in 100..110 {
        let posted = Instant::now();
        let ids = relay.post(event(number, "one")).await.ids();
        one.inbox.wait_for_ids("the exchange that is there", ids).await;
        let took = posted.elapsed();
        assert!(took < Duration::from_secs(2), "held up for {took:?} by the exchange that is missing");
    }
    Amqp::declare_at_once(&url, &exchanges[1]).await;
    let two = AmqpReader::new(&url, &exchanges[1]);
    two.inbox.wait_for_events("the exchange that was missing", 30).await;
    relay.stop().await;
    assert_eq!((one.inbox.now().repeated(), two.inbox.now().repeated()), (0, 0));
}

/// Each exchange that is not there costs a channel, of which a connection has only so many.
#[tokio::test]
async fn many_missing_exchanges_are_not_taken_for_one_that_is_there() {
    let (url, name) = (shared_amqp(), unique("channels"));
    let exchange = format!("{name}.there");
    Amqp::declare(&url, &exchange, &exchange).await;
    let there = AmqpReader::new(&url, &exchange);
    let rules = format!(
        "[sinks.ops]\ntype = \"rabbitmq\"\nurls = [\"{url}?channel_max=16\"]\nexchange = \"{name}.{{status}}\"\n\
         routing_key = \"x\"\ndelivery = {{ max_attempts = 5, schedule = [\"100ms\"] }}\n[[routes]]\nto = [\"ops\"]\n"
    );
    let relay = Setup::new(&rules).start().await;
    for number in 0..40 {
        relay.post(event(number, &format!("missing-{number}"))).await.ids();
        let ids = relay.post(event(100 + number, "there")).await.ids();
        there.inbox.wait_for_ids("the exchange that is there", ids).await;
    }
    relay.sink_is("ops", "has given up the others", |sink| sink["dead_letters"] == 40).await;
    let letters = relay.get("/api/v1/dead-letters").await;
    let letters = letters["dead_letters"].as_array().unwrap();
    assert!(letters.iter().all(|letter| letter["error_kind"] == "no_exchange"), "{letters:#?}");
    assert!(!relay.logged("something was refused; connecting anew").is_empty());
    assert_eq!(relay.logged("connection lost").len(), 0);
    relay.stop().await;
}
