//! What lanes count for those who watch the relay.

use std::time::Duration;

use prometheus::core::Collector as _;
use prometheus::proto::{LabelPair, MetricFamily};
use prometheus::{Error, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, Opts, Registry};

/// Upper bounds in seconds.
const ATTEMPT_SECONDS: [f64; 13] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0];

/// What all lanes count. Clones count the same.
#[derive(Clone)]
pub struct Metrics {
    deliveries: IntCounterVec,
    attempts: IntCounterVec,
    attempt_seconds: HistogramVec,
    routed: IntCounterVec,
    unrouted: IntCounter,
}

impl Metrics {
    /// Metrics that a registry shows.
    ///
    /// # Errors
    ///
    /// The registry has metrics of these names.
    pub fn new(registry: &Registry) -> Result<Self, Error> {
        let counters = |name, help, labels: &[&str]| {
            let counters = IntCounterVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(counters.clone())).map(|()| counters)
        };
        let seconds = HistogramOpts::new("relay_attempt_seconds", "How long attempts took, in seconds.");
        let attempt_seconds = HistogramVec::new(seconds.buckets(ATTEMPT_SECONDS.into()), &["sink"])?;
        registry.register(Box::new(attempt_seconds.clone()))?;
        let unrouted = IntCounter::new("relay_unrouted_events_total", "Events that no route matched.")?;
        registry.register(Box::new(unrouted.clone()))?;
        Ok(Self {
            deliveries: counters(
                "relay_deliveries_total",
                "Deliveries by what became of them: delivered, parked (to be tried again) or dead.",
                &["sink", "outcome"],
            )?,
            attempts: counters(
                "relay_attempts_total",
                "Attempts by their result: delivered, retry, reject (not to be tried again) or gone (HTTP 410).",
                &["sink", "result"],
            )?,
            routed: counters(
                "relay_routed_events_total",
                "Events that a route brought to a sink, as the first of the matching ones that name it.",
                &["sink", "route"],
            )?,
            attempt_seconds,
            unrouted,
        })
    }

    /// How many events a route has brought to a sink, as the first of the matching ones that name it.
    pub fn routed_events(&self, sink: &str, route: &str) -> u64 {
        self.routed.with_label_values(&[sink, route]).get()
    }

    /// How many events no route matched.
    pub fn unrouted_events(&self) -> u64 {
        self.unrouted.get()
    }

    /// Counts dead letters that no lane of a sink has made: of a sink that is no longer in the rules, or of the reserved one.
    pub fn buried(&self, sink: &str, dead_letters: usize) {
        self.deliveries.with_label_values(&[sink, "dead"]).inc_by(dead_letters as u64);
    }

    /// Forgets such a sink, but for its dead letters.
    pub fn forget(&self, sink: &str) {
        for outcome in ["delivered", "parked"] {
            drop(self.deliveries.remove_label_values(&[sink, outcome]));
        }
        for result in ["delivered", "retry", "reject", "gone"] {
            drop(self.attempts.remove_label_values(&[sink, result]));
        }
        drop(self.attempt_seconds.remove_label_values(&[sink]));
        // Routes may have gone with it, so that they are not known by their rules.
        let families = self.routed.collect();
        for metric in families.iter().flat_map(MetricFamily::get_metric) {
            let label = |name| metric.get_label().iter().find(|label| label.name() == name).map(LabelPair::value);
            if label("sink") == Some(sink) {
                drop(self.routed.remove_label_values(&[sink, label("route").unwrap_or_default()]));
            }
        }
    }

    /// What counts the events that no route matches.
    pub fn unrouted(&self) -> &IntCounter {
        &self.unrouted
    }
}

/// What one lane counts.
pub(super) struct Meters {
    sink: String,
    pub(super) delivered: IntCounter,
    pub(super) parked: IntCounter,
    pub(super) dead: IntCounter,
    pub(super) attempt_delivered: IntCounter,
    pub(super) attempt_retry: IntCounter,
    pub(super) attempt_reject: IntCounter,
    pub(super) attempt_gone: IntCounter,
    attempt_seconds: Histogram,
    pub(super) unrouted: IntCounter,
    routed: IntCounterVec,
}

impl Meters {
    pub(super) fn new(metrics: &Metrics, sink: &str) -> Self {
        let delivery = |outcome| metrics.deliveries.with_label_values(&[sink, outcome]);
        let attempt = |result| metrics.attempts.with_label_values(&[sink, result]);
        Self {
            sink: sink.to_owned(),
            delivered: delivery("delivered"),
            parked: delivery("parked"),
            dead: delivery("dead"),
            attempt_delivered: attempt("delivered"),
            attempt_retry: attempt("retry"),
            attempt_reject: attempt("reject"),
            attempt_gone: attempt("gone"),
            attempt_seconds: metrics.attempt_seconds.with_label_values(&[sink]),
            unrouted: metrics.unrouted.clone(),
            routed: metrics.routed.clone(),
        }
    }

    pub(super) fn attempt_took(&self, time: Duration) {
        self.attempt_seconds.observe(time.as_secs_f64());
    }

    pub(super) fn routed_by(&self, route: &str) {
        self.routed.with_label_values(&[self.sink.as_str(), route]).inc();
    }
}
