//! Events that a sink can never take, among others: each becomes one dead letter, is logged, and holds up nothing.

use serde_json::Value;

use crate::brokers::Inbox;
use crate::harness::{Relay, Setup};

const REJECTED: &str = "a delivery is a dead letter now";

/// A relay, and what was posted to it.
pub(crate) struct Rejections {
    setup: Setup,
    relay: Relay,
    sink: &'static str,
    kind: &'static str,
    good: Vec<String>,
    hopeless: Vec<String>,
}

impl Rejections {
    /// Starts the relay. The sink is to reject events with this kind of error.
    pub(crate) async fn new(setup: Setup, sink: &'static str, kind: &'static str) -> Self {
        let relay = setup.start().await;
        Self { setup, relay, sink, kind, good: Vec::new(), hopeless: Vec::new() }
    }

    /// Lets the sink begin nothing, until all that has been posted is to be under way at once.
    pub(crate) async fn hold(&self) {
        self.relay.operate(&format!("/api/v1/sinks/{}/pause", self.sink), &Value::Null).await;
    }

    /// Lets it begin.
    pub(crate) async fn let_go(&self) {
        self.relay.operate(&format!("/api/v1/sinks/{}/resume", self.sink), &Value::Null).await;
    }

    /// Posts an event that the sink is to take.
    pub(crate) async fn post_good(&mut self, body: &str) {
        self.good.extend(self.relay.post(body.to_owned()).await.ids());
    }

    /// Posts an event that the sink is to reject.
    pub(crate) async fn post_hopeless(&mut self, body: &str) {
        self.hopeless.extend(self.relay.post(body.to_owned()).await.ids());
    }

    /// Checks what came of it, also after a restart; the good ones have arrived once.
    pub(crate) async fn check(self, inbox: &Inbox) {
        self.check_up_to(1, inbox).await;
    }

    /// As `check`, but the good ones may have arrived so many times.
    pub(crate) async fn check_up_to(self, most: usize, inbox: &Inbox) {
        let Self { setup, relay, sink, kind, good, hopeless } = self;
        inbox.wait_for_ids(sink, good.iter().cloned()).await;
        relay.sink_is(sink, "has buried them", |status| status["dead_letters"] == hopeless.len()).await;
        let letters = relay.get(&format!("/api/v1/dead-letters?limit=1000&sink={sink}")).await;
        let letters = letters["dead_letters"].as_array().unwrap();
        let mut buried: Vec<_> = letters
            .iter()
            .map(|letter| {
                assert_eq!((&letter["reason"], &letter["error_kind"]), (&"rejected".into(), &kind.into()), "{letter}");
                letter["event_id"].as_str().expect("an event id").to_owned()
            })
            .collect();
        buried.sort();
        let mut expected = hopeless;
        expected.sort();
        assert_eq!(buried, expected, "each once");
        let log = relay.stop().await;
        let lines: Vec<_> = log.iter().filter(|line| line["message"] == REJECTED).collect();
        // The first of many have a line of their own.
        assert!(lines.len() >= expected.len().min(10), "{lines:#?}");
        for line in lines {
            assert_eq!(
                (&line["level"], &line["sink"], &line["kind"]),
                (&"ERROR".into(), &sink.into(), &kind.into()),
                "{line}"
            );
        }
        let failed: Vec<_> = log.iter().filter(|line| line["message"] == "attempt failed").collect();
        assert!(failed.is_empty(), "{failed:#?}");

        let again = setup.start().await;
        let log = again.stop().await;
        assert!(log.iter().all(|line| line["message"] != REJECTED), "{log:#?}");
        let arrived = inbox.now();
        assert_eq!(arrived.ids.len(), good.len(), "each, and no other");
        assert!(arrived.ids.values().all(|times| *times <= most), "too often: {:?}", arrived.ids);
    }
}
